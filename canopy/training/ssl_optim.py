"""Parameter groups of pretraining: layer-wise learning rates, no decay of vectors."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from canopy.training.sharding import local
from canopy.training.ssl_schedules import layer_factor

_TOKENS = ("cls_token", "reg_token", "mask_token", "pos_embed")


def layer_of(name: str, depth: int) -> int:
    """Layer of a parameter: 0 before the blocks, i + 1 in block i, depth + 1 in the final norm and heads."""
    block = re.search(r"encoder\.vit\.blocks\.(\d+)\.", name)
    if block:
        return int(block[1]) + 1
    before = re.search(r"encoder\.(stem\.|vit\.(patch_embed|cls_token|reg_token|pos_embed|norm_pre))", name)
    return 0 if before or name == "mask_token" else depth + 1


def parameter_groups(
    named: Iterable[tuple[str, nn.Parameter]], depth: int, layer_decay: float, patch_lr: float
) -> list[dict[str, Any]]:
    """AdamW groups with `factor` (on the learning rate) and `decays` (1 or 0, on the weight decay).

    Vectors (biases, norms, LayerScale) and learnt tokens are not decayed.
    """
    groups: dict[tuple[float, int, bool], list[Tensor]] = {}
    for name, parameter in named:
        if not parameter.requires_grad:
            continue
        layer = layer_of(name, depth)
        factor = layer_factor(layer, depth + 2, layer_decay) * (patch_lr if layer == 0 else 1.0)
        decays = int(parameter.ndim > 1 and not name.endswith(_TOKENS))
        # An optimiser's fused steps take spread tensors or whole ones, not both at once.
        groups.setdefault((factor, decays, isinstance(parameter, DTensor)), []).append(parameter)
    ordered = sorted(groups.items(), key=lambda group: group[0])
    return [{"params": p, "factor": f, "decays": d} for (f, d, _), p in ordered]


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
