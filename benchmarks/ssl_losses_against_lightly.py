"""Compare the self-supervised losses with those of the lightly library (1.6), where it has them.

`python benchmarks/ssl_losses_against_lightly.py`; needs `pip install lightly==1.6.*`, which is no dependency
of canopy. The tests compare the same losses with NumPy.
"""

from __future__ import annotations

import itertools

import torch
from lightly.loss.dino_loss import DINOLoss
from lightly.loss.ibot_loss import IBOTPatchLoss
from lightly.loss.koleo_loss import KoLeoLoss

from canopy.training import losses as ours

TEMPERATURE = 0.07


def dino(batch: int, prototypes: int, views: int) -> float:
    """Largest difference over two steps, so that the running centre counts too."""
    theirs, centre, worst = DINOLoss(prototypes, center_momentum=0.9), torch.zeros(1, prototypes), 0.0
    for _ in range(2):
        teacher, student = torch.randn(2, batch, prototypes), torch.randn(views, batch, prototypes)
        want = theirs(list(teacher), list(student), teacher_temp=TEMPERATURE)
        flat = teacher.flatten(0, 1)
        targets = ours.centred_softmax(flat, centre, TEMPERATURE).unflatten(0, (2, batch))
        centre = ours.updated_centre(centre, flat, 0.9)
        worst = max(worst, float((ours.dino_loss(student, targets) - want).abs() / want))
    return worst


def ibot(batch: int, prototypes: int, side: int) -> float:
    mask = torch.rand(batch, side, side) < 0.4
    mask[0], mask[-1, 0, 0] = False, True
    n = int(mask.sum())
    teacher, student = torch.randn(n, prototypes), torch.randn(n, prototypes)
    want = IBOTPatchLoss(prototypes)(teacher, student, mask, teacher_temp=TEMPERATURE)
    targets = ours.centred_softmax(teacher, torch.zeros(1, prototypes), TEMPERATURE)
    got = ours.ibot_loss(student, targets, mask.nonzero()[:, 0], batch)
    return float((got - want).abs() / want)


def koleo(batch: int, dim: int, scale: int) -> float:
    x = torch.randn(batch, dim) * scale
    want = KoLeoLoss()(x)
    return float((ours.koleo_loss(x) - want).abs() / want.abs().clamp_min(0.1))


def main() -> None:
    torch.manual_seed(0)
    for name, compare, grid in (
        ("DINO with a running centre", dino, ((1, 4, 16), (3, 64, 1000), (2, 4, 10))),
        ("iBOT with a centre of 0", ibot, ((2, 4, 16), (3, 64, 1000), (3, 8, 14))),
        ("KoLeo", koleo, ((2, 8, 64), (3, 64, 256), (1, 10, 100))),
    ):
        worst = max(compare(*sizes) for sizes in itertools.product(*grid))
        print(f"{name}: largest relative difference {worst:.1e}")


if __name__ == "__main__":
    main()
