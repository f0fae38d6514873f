"""What a job will cost, before it starts: tiles, gigabytes, minutes; and where the line is."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from canopy.errors import AreaError
from canopy.inference.lattice import Plan
from canopy.inference.predictor import Predictor
from canopy.inference.target import Target
from canopy.models.height import EMPTY_VALUE

if TYPE_CHECKING:
    from canopy.inference.backends import Runner
    from canopy.inference.layers import Extras
    from canopy.models.height import HeightModel


# Without a file the map is held in memory.
MAX_PIXELS_IN_MEMORY = 400_000_000
BYTES_PER_PIXEL = {"float32": 4, "uint16cm": 2, "uint8m": 1}
# Reading, blending and writing beside the model: 0.1 s per Mpx mapped on the model's grid, 0.4 where imagery
# is warped (benchmarks/stages.py); charged for pixels predicted and pixels mapped.
OVERHEAD_S_PER_PX = 0.15e-6


@dataclass(frozen=True)
class Estimate:
    """What a job takes, if every crop has valid pixels.

    Attributes:
        windows, crops: units of reading and of prediction.
        pixels: of the map; predicted_pixels: of the grid at the model's ground sample distance.
        gigabytes: of the map, uncompressed.
        seconds: from a measurement of the model on this machine.
    """

    windows: int
    crops: int
    pixels: int
    predicted_pixels: int
    gigabytes: float
    seconds: float

    @property
    def tiles_text(self) -> str:
        return f"{self.windows:,} tile{'' if self.windows == 1 else 's'}"

    @property
    def time_text(self) -> str:
        """`~3 min`; minutes are the finest that such a guess deserves."""
        minutes = self.seconds / 60
        if minutes < 1:
            return "under 1 min"
        hours = minutes / 60
        return (
            f"~{minutes:.0f} min"
            if hours < 2
            else f"~{hours:.0f} h"
            if hours < 72
            else f"~{hours / 24:,.0f} days"
        )


def estimate(plan: Plan, target: Target, crop_seconds: float, bands: int, encoding: str) -> Estimate:
    """Cost of `plan` at a measured pace."""
    pixels = target.output.height * target.output.width
    predicted = plan.grid.height * plan.grid.width
    return Estimate(
        windows=len(plan),
        crops=plan.n_crops,
        pixels=pixels,
        predicted_pixels=predicted,
        gigabytes=pixels * bands * BYTES_PER_PIXEL[encoding] / 1e9,
        seconds=plan.n_crops * crop_seconds + OVERHEAD_S_PER_PX * (pixels + predicted),
    )


def seconds_per_crop(
    model: HeightModel, runner: Runner, batch_size: int | str, extras: Extras | None = None
) -> float:
    """Measured time of one crop, in as many views as the extras take: one pass to warm up, one to count, on
    an empty image."""
    import torch

    predictor = Predictor(model, batch_size=batch_size, extras=extras, runner=runner)
    side = model.config.crop_px
    # A single crop would be run twice.
    count = min(2, predictor.batch_size) if predictor.device.type == "cpu" else predictor.batch_size
    crops = torch.full((count, 3, side, side), EMPTY_VALUE, device=predictor.device)
    predictor(crops)
    warm = predictor.seconds
    predictor(crops)
    return (predictor.seconds - warm) / count


def refuse_too_large(cost: Estimate, max_pixels: int, where: str, in_memory: bool) -> None:
    """Stop a job that is larger than allowed.

    Raises:
        AreaError: with the tiles, gigabytes and time it would take.
    """
    if max(cost.pixels, cost.predicted_pixels) > max_pixels:
        limit, remedy = max_pixels, "choose a smaller area, or raise --max-pixels"
    elif in_memory and cost.pixels > MAX_PIXELS_IN_MEMORY:
        limit = MAX_PIXELS_IN_MEMORY
        remedy = "give `out` a file name: a map of this size is not held in memory"
    else:
        return
    raise AreaError(
        f"the area is too large: {max(cost.pixels, cost.predicted_pixels):,} px, {cost.tiles_text}, "
        f"{cost.gigabytes:.1f} GB, {cost.time_text}",
        where=where,
        expected=f"at most {limit:,} px",
        remedy=remedy,
    )
