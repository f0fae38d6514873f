"""How weights move: schedules, AdamW's groups, several processes, and the base of both trainings' modules.

Schedules are pure functions of progress, the share of a run that is done, 0..1 (clamped).
"""

from __future__ import annotations

import math
import re
from abc import abstractmethod
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
import torch.distributed as dist
from torch import Tensor, nn

from canopy.errors import ConfigError

SHAPES = ("linear", "cosine")
_LEAST_WARMUP = 1e-3  # of the peak: a first step at rate 0 would be thrown away
_TOKENS = ("cls_token", "reg_token", "mask_token", "pos_embed")
_STATE, _STATE_FORMAT = "canopy", 3  # raise it when checkpoints change


def ramp(
    progress: float,
    first: float,
    last: float,
    begin: float = 0.0,
    end: float = 1.0,
    shape: str = "linear",
) -> float:
    """`first` until progress `begin`, `last` from `end` on; between them a line or half a 'cosine'."""
    if progress >= end:
        return last
    if progress <= begin:
        return first
    share = (progress - begin) / (end - begin)
    if shape == "cosine":
        share = 0.5 * (1.0 - math.cos(math.pi * share))
    return first + (last - first) * share


def learning_rate(progress: float, peak: float, end: float, warmup: float) -> float:
    """In a line from nearly 0 to `peak` over the share `warmup` (below 1), then along a cosine to `end`."""
    if progress < warmup:
        return peak * max(progress / warmup, _LEAST_WARMUP)
    return ramp(progress, peak, end, warmup, 1.0, "cosine")


def ema_decay(step: int, final: float = 0.998) -> float:
    """Decay of the weight average at `step`: short memory first, `final` later (as TensorFlow's EMA does)."""
    return min(final, (1.0 + step) / (10.0 + step))


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
    """AdamW's groups of trainable parameters, in a fixed order: each has `factor` (on the learning rate) and
    `decays` (1 or 0, on the weight decay), which `TrainingModule` applies at every step.

    Vectors (biases, norms, LayerScale), learnt tokens and positions are not decayed, as is usual for
    transformers.

    Args:
        named: names and parameters; those that need no gradient are left out.
        factor: of a name.
    """
    groups: dict[tuple[float, int], list[Tensor]] = {}
    for name, parameter in named:
        if parameter.requires_grad:
            decays = int(parameter.ndim > 1 and not name.endswith(_TOKENS))
            groups.setdefault((factor(name), decays), []).append(parameter)
    ordered = sorted(groups.items(), key=lambda group: group[0])
    return [{"params": p, "factor": f, "decays": d} for (f, d), p in ordered]


@torch.no_grad()
def follow(teacher: nn.Module, student: nn.Module, momentum: float) -> None:
    """Move the teacher's parameters towards the student's: teacher = m * teacher + (1 - m) * student.

    Running statistics stay each one's own: the student's stem sees blanked patches, the teacher's never does.
    """
    ours, theirs = dict(teacher.named_parameters()), dict(student.named_parameters())
    names = [name for name in ours if name in theirs]
    torch._foreach_lerp_([ours[n].data for n in names], [theirs[n].data for n in names], 1.0 - momentum)


# ---- several processes ------------------------------------------------------------------------------
def first_process() -> bool:
    """Whether this one writes files and says what is going on. Known before the processes have met."""
    from pytorch_lightning.utilities.rank_zero import rank_zero_only

    return not getattr(rank_zero_only, "rank", 0)


def distributed() -> bool:
    """Whether several processes train together."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


@torch.no_grad()
def sum_of_processes(x: Tensor, device: torch.device) -> Tensor:
    """The sum of `x` over all processes, without gradient, where `x` is; they talk by `device`."""
    if not distributed():
        return x
    total = x.detach().clone().to(device)
    dist.all_reduce(total)
    return total.to(x.device)


def mean_of_processes(x: Tensor) -> Tensor:
    """The mean of `x` over all processes, without gradient; `x` itself where there is only one."""
    return sum_of_processes(x, x.device) / dist.get_world_size() if distributed() else x


@torch.no_grad()
def largest_of_processes(value: float, device: torch.device) -> float:
    """The largest `value` of all processes. All must ask."""
    if not distributed():
        return value
    largest = torch.tensor(value, device=device)
    dist.all_reduce(largest, op=dist.ReduceOp.MAX)
    return float(largest)


class TrainingModule(pl.LightningModule):
    """What both trainings share.

    `callbacks.Schedule` says how far the run is before every step; learning rate and weight decay follow
    from it, and what is random in a step (stochastic depth, masks) from seed, step and process. So a
    checkpoint needs no generator states: a run that was killed and resumed goes on as if it had not been.

    Attributes:
        progress: share of the run done, 0..1, at the beginning of the step.
        losses: of the step, by name; what `callbacks.NanGuard` looks at.
        left_out: whether the step was left out.
    """

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.seed, self.progress, self.left_out = seed, 0.0, False
        self.losses: dict[str, Tensor] = {}

    @abstractmethod
    def rates(self) -> tuple[float, float]:
        """Learning rate and weight decay now."""

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        rate, decay = self.rates()
        for group in self.trainer.optimizers[0].param_groups:
            group["lr"], group["weight_decay"] = rate * group["factor"], decay * group["decays"]
        entropy = np.random.SeedSequence((self.seed, self.global_step, self.global_rank))
        torch.manual_seed(int(entropy.generate_state(1)[0]))

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint[_STATE] = {"format": _STATE_FORMAT}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        if checkpoint.get(_STATE, {}).get("format") != _STATE_FORMAT:
            raise ConfigError(
                "the checkpoint is of a run of another version of canopy",
                remedy="finish the run with that version, or start a new one",
            )
