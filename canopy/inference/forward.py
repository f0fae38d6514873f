"""The network on one device: crops in, metres out, in batches that fit its memory."""

from __future__ import annotations

import logging
import time
from typing import TYPE_CHECKING

import numpy as np

from canopy.errors import ConfigError, InputError
from canopy.inference.backends.runner import Runner, TorchRunner
from canopy.inference.extras import Extras
from canopy.models.fill import fill_invalid
from canopy.runtime import pick_device

if TYPE_CHECKING:
    import torch

    from canopy.models.height import HeightModel

log = logging.getLogger("canopy")

# Above 4 crops a CPU gains nothing; a large GPU is busy from about 32 on.
AUTO_BATCH = {"cpu": 4, "cuda": 32, "mps": 8}


class Predictor:
    """Calls the model on (n, 3, crop, crop) arrays and keeps count of what it took.

    Attributes:
        device: where the model runs.
        runner: the model on its runtime.
        batch_size: crops per forward pass now; halved whenever the device runs out of memory.
        seconds: time spent in the model so far, transfers included.
        notes: what the user should know about the run.
    """

    def __init__(
        self,
        model: HeightModel,
        *,
        device: str | torch.device = "auto",
        precision: str = "auto",
        batch_size: int | str = "auto",
        extras: Extras | None = None,
        runner: Runner | None = None,
    ) -> None:
        import torch

        self._extras = extras or Extras()
        if runner is None:
            device = device if isinstance(device, torch.device) else pick_device(device)
            half = use_bf16(precision, device)
            runner = TorchRunner(model, device, "bf16" if half else "fp32", self._extras.outputs)
        self.runner, self.device = runner, runner.device
        self.batch_size = resolve_batch(batch_size, self.device.type)
        self.seconds = 0.0
        self.notes: list[str] = []

    def __call__(self, rgb: np.ndarray, valid: np.ndarray) -> np.ndarray:
        """Layers (n, layers, crop, crop) float32: heights in metres, then what the extras need.

        Args:
            rgb: (n, 3, crop, crop) float32 in 0..1; anything where invalid.
            valid: (n, crop, crop) bool; invalid pixels are filled from their surroundings first.
        """
        started = time.perf_counter()
        done: list[np.ndarray] = []
        while (start := sum(map(len, done))) < len(rgb):
            stop = start + self.batch_size
            try:
                done.append(self._forward(rgb[start:stop], valid[start:stop]))
            except RuntimeError as error:
                if not _is_out_of_memory(error) or self.batch_size == 1:
                    raise
                self._halve_batch()
        self.seconds += time.perf_counter() - started
        return np.concatenate(done)

    def _forward(self, rgb: np.ndarray, valid: np.ndarray) -> np.ndarray:
        filled = np.stack([fill_invalid(*crop) for crop in zip(rgb, valid, strict=True)])
        if len(filled) == 1 and self.batch_size > 1 and not self.runner.alone:
            # A map must not depend on how many crops were left over.
            filled = np.concatenate([filled, filled])
        layers = self.runner(filled)[: len(rgb)]
        if self._extras.quality is not None:
            scores = [self._extras.quality.scores(*c) for c in zip(filled[: len(rgb)], valid, strict=True)]
            layers = np.concatenate([layers, np.stack(scores)], axis=1)
        return layers

    def _halve_batch(self) -> None:
        import torch

        self.batch_size = max(1, self.batch_size // 2)
        note = f"the {self.device.type} device ran out of memory; batch size reduced to {self.batch_size}"
        self.notes.append(note)
        log.warning(note)
        if self.device.type == "cuda":
            torch.cuda.empty_cache()


def use_bf16(precision: str, device: torch.device) -> bool:
    """Whether to run in bfloat16.

    `auto` means fp32: in bf16 a height can move by centimetres with the size of the batch, and a map must not
    depend on it. CPUs without bf16 units are 4x slower with it.

    Raises:
        InputError: an unknown precision, or bf16 on a device that cannot.
    """
    import torch

    if precision not in ("auto", "fp32", "bf16"):
        raise ConfigError(
            f"unknown precision {precision!r}", where="--precision", expected="auto, fp32 or bf16"
        )
    if precision != "bf16":
        return False
    if device.type != "cuda" or not torch.cuda.is_bf16_supported():
        raise InputError(
            f"bf16 is not supported on {device}",
            where="--precision bf16",
            remedy="use --precision auto or fp32",
        )
    return True


def resolve_batch(batch_size: int | str, device_type: str) -> int:
    """Crops per forward pass for `auto` or a positive number.

    Raises:
        InputError: anything else.
    """
    if batch_size == "auto":
        return AUTO_BATCH.get(device_type, 4)
    try:
        size = int(batch_size)
    except ValueError:
        size = 0
    if size < 1:
        raise ConfigError(
            f"{batch_size!r} is no batch size", where="--batch-size", expected="auto or a number from 1"
        )
    return size


def _is_out_of_memory(error: RuntimeError) -> bool:
    import torch

    # torch.OutOfMemoryError is CUDA's and MPS's; the CPU allocator raises a plain RuntimeError.
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)
