"""Is the representation alive? Spread, effective rank, and the guard against losses that are not finite."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional

from canopy.errors import CanopyError
from canopy.runtime import log
from canopy.training.processes import distributed

_MOST_ROWS = 1024  # of a singular value decomposition, so that it takes milliseconds
_TOLERATED = 2


@torch.no_grad()
def feature_std(features: Tensor) -> float:
    """Spread of features (n, dim) of length 1 over the batch, times sqrt(dim): about 1 where they fill the
    sphere, 0 where they have collapsed to a point (Chen and He 2020, arXiv 2011.10566, section 4.1)."""
    unit = functional.normalize(features.float(), dim=-1)
    return float(unit.std(dim=0).mean() * features.shape[-1] ** 0.5)


@torch.no_grad()
def effective_rank(features: Tensor) -> float:
    """RankMe (Garrido et al. 2022, arXiv 2210.02885, eq. 2): exp(entropy of the singular values) of (n, dim).

    At least 1, at most min(n, dim); rows beyond 1024 are thinned out evenly.
    """
    step = -(-len(features) // _MOST_ROWS)
    values = torch.linalg.svdvals(features[::step].float().cpu())
    share = values / values.sum().clamp_min(1e-12) + 1e-7
    return float(torch.exp(-(share * share.log()).sum()))


class FiniteGuard:
    """Skips up to two steps in a row whose loss is not finite, naming them, then stops the run.

    A skipped step leaves no trace: gradients are dropped and running statistics put back.
    """

    def __init__(self) -> None:
        self.in_a_row, self.skip = 0, False
        self._kept: list[Tensor] = []

    def before(self, module: nn.Module) -> None:
        """Remember the buffers that a forward pass may change."""
        self._kept = [b.detach().clone() for b in module.buffers()]

    def check(self, terms: Mapping[str, Tensor], step: int) -> None:
        """Decide whether this step counts; all processes decide alike.

        Raises:
            CanopyError: the third bad one in a row.
        """
        named = [f"{k} is {v.item()}" for k, v in terms.items() if not torch.isfinite(v)]
        self.skip = _anywhere(bool(named), next(iter(terms.values())).device)
        if not self.skip:
            self.in_a_row = 0
            return
        self.in_a_row += 1
        where = f"step {step}: " + (", ".join(named) or "a loss of another process is not finite")
        if self.in_a_row > _TOLERATED:
            raise CanopyError(
                f"training stopped at {where}, the third time in a row",
                remedy="go on from the last checkpoint (--resume) with a smaller lr, or precision=32-true",
            )
        log.warning("%s: skipped (%d of %d)", where, self.in_a_row, _TOLERATED)

    def undo(self, module: nn.Module) -> None:
        """Drop the gradients of a bad step and put the buffers back."""
        with torch.no_grad():
            for buffer, kept in zip(module.buffers(), self._kept, strict=True):
                buffer.copy_(kept)
        for parameter in module.parameters():
            parameter.grad = None


def _anywhere(bad: bool, device: torch.device) -> bool:
    if not distributed():
        return bad
    flag = torch.tensor(float(bad), device=device)
    dist.all_reduce(flag, op=dist.ReduceOp.MAX)
    return bool(flag)
