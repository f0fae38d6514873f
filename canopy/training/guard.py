"""NaN guard: a step whose loss or gradient is not finite is left out and named; the third ends the run."""

from __future__ import annotations

import math

from canopy.errors import CanopyError
from canopy.runtime import log


class TrainingError(CanopyError):
    """A training that cannot go on. Its last checkpoint is good."""


class NanGuard:
    """Counts steps left out.

    Two are forgiven (after DINOv2's training loop, which tolerates two as well); those longer ago than
    `memory` steps are forgotten, so that a long run does not end for rare accidents.
    """

    def __init__(self, forgiven: int = 2, memory: int = 1000) -> None:
        self.forgiven, self.memory = forgiven, memory
        self.skipped: list[int] = []

    def passes(self, step: int, **values: float) -> bool:
        """Whether the step may be taken; `values` are what must be finite, by name.

        Raises:
            TrainingError: more than `forgiven` bad steps within `memory` steps.
        """
        bad = [f"{name} is {value}" for name, value in values.items() if not math.isfinite(value)]
        if not bad:
            return True
        self.skipped = [s for s in self.skipped if s > step - self.memory] + [step]
        if len(self.skipped) > self.forgiven:
            raise TrainingError(
                f"{', '.join(bad)} at step {step}, and so it was at {self.skipped[:-1]}",
                remedy="lower lr, or look at the chips of these steps; --resume goes on from last.ckpt",
            )
        log.warning("step %d is left out: %s", step, ", ".join(bad))
        return False

    def state_dict(self) -> dict[str, list[int]]:
        """For a checkpoint."""
        return {"skipped": list(self.skipped)}

    def load_state_dict(self, state: dict[str, list[int]]) -> None:
        """From a checkpoint."""
        self.skipped = [int(s) for s in state["skipped"]]
