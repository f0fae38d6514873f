"""The network on one device: crops in, layers out, in batches that fit its memory."""

from __future__ import annotations

import logging
import time
from typing import TYPE_CHECKING

from canopy.errors import ConfigError
from canopy.inference.layers import Extras

if TYPE_CHECKING:
    import torch

    from canopy.inference.backends import Runner
    from canopy.models.height import HeightModel

log = logging.getLogger("canopy")

# Crops per batch at most, and pixels: beyond them a device gains nothing and only takes more memory. They are
# fixed, not measured: in bf16 a height can move by centimetres with the batch, and parts of a map that are
# made on several cards must fit together.
AUTO_BATCH = {"cpu": (4, 2**20), "cuda": (64, 2**22), "mps": (8, 2**20)}


class Predictor:
    """Calls the model on crops and keeps count of what it took.

    Attributes:
        device: where the model runs, and where layers come from.
        batch_size: crops per forward pass now; halved whenever the device runs out of memory.
        crops: predicted so far.
        notes: what the user should know about the run.
    """

    def __init__(
        self,
        model: HeightModel,
        *,
        runner: Runner | None = None,
        batch_size: int | str = "auto",
        extras: Extras | None = None,
    ) -> None:
        extras = extras or Extras()
        if runner is None:
            from canopy.inference.backends import TorchRunner

            runner = TorchRunner(model, outputs=extras.outputs)
        self.runner, self.device = runner, runner.device
        self.batch_size = resolve_batch(batch_size, self.device.type, model.config.crop_px)
        self.crops = 0
        self.notes: list[str] = []
        self._seconds = 0.0
        self._events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []

    @property
    def seconds(self) -> float:
        """Time spent in the model so far; on a GPU its own time, for which this waits."""
        for first, last in self._events:
            last.synchronize()
            self._seconds += first.elapsed_time(last) / 1000
        self._events.clear()
        return self._seconds

    def __call__(self, crops: torch.Tensor) -> torch.Tensor:
        """Crops (n, 3, crop, crop) float32 in 0..1, finite -> layers (n, l, crop, crop) float32 on `device`:
        heights in metres, then what else the extras need of the network.
        """
        import torch

        done: list[torch.Tensor] = []
        start = 0
        crops = crops.to(self.device)
        begun = self._now()
        while start < len(crops):
            part = crops[start : start + self.batch_size]
            try:
                done.append(self._forward(part))
                start += len(part)
            except RuntimeError as error:
                if not _is_out_of_memory(error) or self.batch_size == 1:
                    raise
                self._halve_batch()
        self._count(begun)
        self.crops += len(crops)
        return done[0] if len(done) == 1 else torch.cat(done)

    def _forward(self, crops: torch.Tensor) -> torch.Tensor:
        import torch

        # A map must not depend on how many crops were left over: other batch sizes take other kernels.
        whole = self.batch_size if self.device.type == "cuda" else min(2, self.batch_size)
        short = 0 if self.runner.alone else max(0, whole - len(crops))
        if short:
            crops = torch.cat([crops, crops[-1:].expand(short, -1, -1, -1)])
        layers = self.runner.forward(crops)
        return layers[: len(layers) - short]

    def _now(self) -> float | torch.cuda.Event:
        """A moment; a GPU's own, which nobody has to wait for."""
        if self.device.type != "cuda":
            return time.perf_counter()
        import torch

        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _count(self, begun: float | torch.cuda.Event) -> None:
        now = self._now()
        if isinstance(begun, float) and isinstance(now, float):
            self._seconds += now - begun
        else:
            self._events.append((begun, now))  # type: ignore[arg-type]

    def _halve_batch(self) -> None:
        import torch

        self.batch_size = max(1, self.batch_size // 2)
        note = f"the {self.device.type} device ran out of memory; batch size reduced to {self.batch_size}"
        self.notes.append(note)
        log.warning(note)
        if self.device.type == "cuda":
            torch.cuda.empty_cache()


def resolve_batch(batch_size: int | str, device_type: str, crop_px: int = 256) -> int:
    """Crops per forward pass for `auto` (see `AUTO_BATCH`) or a positive number.

    Raises:
        ConfigError: anything else.
    """
    if batch_size == "auto":
        crops, pixels = AUTO_BATCH.get(device_type, AUTO_BATCH["cpu"])
        return max(1, min(crops, pixels // crop_px**2))
    return counted(batch_size, "batch size", "--batch-size")


def counted(value: int | str, what: str, option: str) -> int:
    """A positive whole number, also from text; ConfigError otherwise."""
    try:
        number = int(value)
    except ValueError:
        number = 0
    if number < 1:
        raise ConfigError(f"{value!r} is no {what}", where=option, expected="auto or a number from 1")
    return number


def _is_out_of_memory(error: RuntimeError) -> bool:
    import torch

    # torch.OutOfMemoryError is CUDA's and MPS's; the CPU allocator raises a plain RuntimeError.
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)
