"""What a job will cost, before it starts: tiles, gigabytes, minutes; and where the line is."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from canopy.errors import AreaError
from canopy.inference.forward import Predictor
from canopy.inference.plan import Plan
from canopy.inference.target import Target

if TYPE_CHECKING:
    import torch

    from canopy.models.height import HeightModel

# 4e9 px are 1000 km2 at 0.5 m and 16 GB of float32: a day of CPU work. More is a job for `canopy map`.
MAX_PIXELS = 4_000_000_000
# Without a file the map is held in memory.
MAX_PIXELS_IN_MEMORY = 400_000_000
BYTES_PER_PIXEL = {"float32": 4, "uint16cm": 2, "uint8m": 1}
# Reading, blending and writing beside the model (reference measurement: 0.25 CPU-s per Mpx).
OVERHEAD_S_PER_PX = 0.25e-6


@dataclass(frozen=True)
class Estimate:
    """`seconds` is None where it was not worth a measurement (the job is refused or trivial)."""

    windows: int
    crops: int
    pixels: int
    gigabytes: float
    seconds: float | None

    @property
    def tiles_text(self) -> str:
        return f"{self.windows:,} tile{'' if self.windows == 1 else 's'}"

    @property
    def time_text(self) -> str:
        """`~3 min`; minutes are the finest that such a guess deserves."""
        if self.seconds is None:
            return "time unknown"
        minutes = self.seconds / 60
        if minutes < 1:
            return "under 1 min"
        return f"~{minutes:.0f} min" if minutes < 120 else f"~{minutes / 60:.0f} h"


def estimate(
    plan: Plan, target: Target, seconds_per_crop: float | None, bands: int, encoding: str
) -> Estimate:
    """Cost of `plan`; every crop is counted as if it had valid pixels."""
    pixels = target.output.height * target.output.width
    seconds = None
    if seconds_per_crop is not None:
        seconds = plan.n_crops * seconds_per_crop + OVERHEAD_S_PER_PX * (
            pixels + plan.grid.height * plan.grid.width
        )
    return Estimate(
        len(plan), plan.n_crops, pixels, pixels * bands * BYTES_PER_PIXEL[encoding] / 1e9, seconds
    )


def seconds_per_crop(
    model: HeightModel, device: str | torch.device, precision: str, batch_size: int | str
) -> float:
    """Measured time of one crop: one forward pass to warm up, one to count, on an empty image."""
    predictor = Predictor(model, device=device, precision=precision, batch_size=batch_size)
    side = model.config.crop_px
    count = 1 if predictor.device.type == "cpu" else predictor.batch_size
    rgb, valid = np.full((count, 3, side, side), 0.4, np.float32), np.ones((count, side, side), bool)
    predictor(rgb, valid)
    started = time.perf_counter()
    predictor(rgb, valid)
    return (time.perf_counter() - started) / count


def refuse_too_large(cost: Estimate, max_pixels: int, where: str, in_memory: bool) -> None:
    """Stop a job that is larger than allowed.

    Raises:
        AreaError: with the tiles, gigabytes and time it would take.
    """
    limit = min(max_pixels, MAX_PIXELS_IN_MEMORY) if in_memory else max_pixels
    if cost.pixels <= limit:
        return
    remedy = "choose a smaller area or a coarser --gsd, or raise --max-pixels"
    if in_memory and cost.pixels <= max_pixels:
        remedy = "give `out` a file name: a map of this size is not held in memory"
    raise AreaError(
        f"the area is too large: {cost.pixels:,} px, {cost.tiles_text}, {cost.gigabytes:.1f} GB, "
        f"{cost.time_text}",
        where=where,
        expected=f"at most {limit:,} px",
        remedy=remedy,
    )
