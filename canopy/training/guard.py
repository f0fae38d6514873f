"""NaN guard of every training: a step that is not finite is left out and named; the third ends the run."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor, nn

from canopy.errors import CanopyError
from canopy.runtime import log
from canopy.training.processes import distributed


class TrainingError(CanopyError):
    """A training that cannot go on. Its last checkpoint is good."""


class NanGuard:
    """Decides whether a step is taken, and sees that one left out leaves no trace.

    A step is left out where a loss, the gradient's norm (a finite loss may have a gradient that is not) or a
    running statistic is not finite. Two such steps are forgiven (after DINOv2's training loop, which
    tolerates two as well); those longer ago than `memory` steps are forgotten, so that a long run does not
    end for rare accidents.
    """

    def __init__(self, forgiven: int = 2, memory: int = 1000) -> None:
        self.forgiven, self.memory = forgiven, memory
        self.skipped: list[int] = []
        self._kept: list[Tensor] = []

    def before(self, module: nn.Module) -> None:
        """Remember the buffers that a forward pass of `module` may change."""
        self._kept = [buffer.detach().clone() for buffer in module.buffers()]

    def passes(self, module: nn.Module, step: int, **values: float) -> bool:
        """Whether the step may be taken. If not, gradients are dropped and buffers are as they were `before`.

        Of several processes all decide alike.

        Args:
            module: whose step it is; gradients are in place.
            step: number of the step, for messages.
            values: what must be finite, by name.

        Raises:
            TrainingError: more than `forgiven` bad steps within `memory` steps.
        """
        bad = [f"{name} is {value}" for name, value in values.items() if not math.isfinite(value)]
        if not _all_finite(module.buffers()):
            bad.append("a running statistic is not finite")
        if not _anywhere(bool(bad), module):
            return True
        self._undo(module)
        what = ", ".join(bad) or "another process's values are not finite"
        self.skipped = [s for s in self.skipped if s > step - self.memory] + [step]
        if len(self.skipped) > self.forgiven:
            raise TrainingError(
                f"{what} at step {step}, and so it was at {self.skipped[:-1]}",
                remedy="lower lr, or look at the chips of these steps; --resume goes on from last.ckpt",
            )
        log.warning("step %d is left out: %s", step, what)
        return False

    @torch.no_grad()
    def _undo(self, module: nn.Module) -> None:
        for buffer, kept in zip(module.buffers(), self._kept, strict=True):
            buffer.copy_(kept)
        for parameter in module.parameters():
            parameter.grad = None

    def state_dict(self) -> dict[str, list[int]]:
        """For a checkpoint."""
        return {"skipped": list(self.skipped)}

    def load_state_dict(self, state: dict[str, list[int]]) -> None:
        """From a checkpoint."""
        self.skipped = [int(s) for s in state["skipped"]]


def _all_finite(buffers: Iterable[Tensor]) -> bool:
    found = [buffer for buffer in buffers if buffer.is_floating_point()]
    return not found or bool(torch.stack(torch._foreach_norm(found, math.inf)).isfinite().all())


def _anywhere(bad: bool, module: nn.Module) -> bool:
    """Whether it is so in any process."""
    if not distributed():
        return bad
    flag = torch.tensor(float(bad), device=next(module.parameters()).device)
    dist.all_reduce(flag, op=dist.ReduceOp.MAX)
    return bool(flag)
