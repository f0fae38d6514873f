"""What moves weights: AdamW's groups (what is decayed, how fast a layer learns), and a teacher's average."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from canopy.training.sharding import local

_TOKENS = ("cls_token", "reg_token", "mask_token", "pos_embed")


def layer_of(name: str, depth: int) -> int:
    """Layer of a parameter: 0 before the blocks, i + 1 in block i, depth + 1 in the final norm and heads."""
    block = re.search(r"encoder\.vit\.blocks\.(\d+)\.", name)
    if block:
        return int(block[1]) + 1
    before = re.search(r"encoder\.(stem\.|vit\.(patch_embed|cls_token|reg_token|pos_embed|norm_pre))", name)
    return 0 if before or name == "mask_token" else depth + 1


def layer_factor(name: str, depth: int, decay: float) -> float:
    """Factor on the learning rate of a parameter: `decay` to the number of layers above its own.

    Block i of `depth` gets decay ** (depth - i), whatever lies before the blocks decay ** (depth + 1), what
    comes after them 1 (BEiT, Bao et al. 2021, arXiv 2106.08254).
    """
    return decay ** (depth + 1 - layer_of(name, depth))


def parameter_groups(
    named: Iterable[tuple[str, nn.Parameter]], factor: Callable[[str], float]
) -> list[dict[str, Any]]:
    """AdamW's groups of trainable parameters, in a fixed order, for `set_rates`: each has `factor` (on the
    learning rate) and `decays` (1 or 0, on the weight decay).

    Vectors (biases, norms, LayerScale), learnt tokens and positions are not decayed, as is usual for
    transformers.

    Args:
        named: names and parameters; those that need no gradient are left out.
        factor: of a name.
    """
    groups: dict[tuple[float, int, bool], list[Tensor]] = {}
    for name, parameter in named:
        if parameter.requires_grad:
            decays = int(parameter.ndim > 1 and not name.endswith(_TOKENS))
            # An optimiser's fused steps take spread tensors or whole ones, not both at once.
            groups.setdefault((factor(name), decays, isinstance(parameter, DTensor)), []).append(parameter)
    ordered = sorted(groups.items(), key=lambda group: group[0])
    return [{"params": p, "factor": f, "decays": d} for (f, d, _), p in ordered]


def set_rates(optimizer: torch.optim.Optimizer, rate: float, weight_decay: float) -> None:
    """Give every group of `parameter_groups` its share of the learning rate and of the weight decay."""
    for group in optimizer.param_groups:
        group["lr"], group["weight_decay"] = rate * group["factor"], weight_decay * group["decays"]


@torch.no_grad()
def follow(teacher: nn.Module, student: nn.Module, momentum: float) -> None:
    """Move the teacher's parameters towards the student's: teacher = m * teacher + (1 - m) * student.

    Running statistics stay each one's own: the student's stem sees blanked patches, the teacher's never does.
    """
    ours, theirs = dict(teacher.named_parameters()), dict(student.named_parameters())
    names = [name for name in ours if name in theirs]
    torch._foreach_lerp_(
        [local(ours[n].data) for n in names], [local(theirs[n].data) for n in names], 1.0 - momentum
    )
