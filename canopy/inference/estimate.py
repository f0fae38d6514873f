"""What a map will cost, before it starts: tiles, gigabytes, minutes; and where the line is.

No pass of the network is made for it: its arithmetic is counted, and divided by what processors usually do.
So the minutes are a guess to within a factor of two; the progress bar has the measured pace.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import TYPE_CHECKING

from canopy.errors import AreaError
from canopy.inference.lattice import Plan
from canopy.inference.target import Target

if TYPE_CHECKING:
    from canopy.inference.backends import Runner
    from canopy.models.config import ModelConfig
    from canopy.models.height import HeightModel

# Without a file the map is held in memory.
MAX_PIXELS_IN_MEMORY = 400_000_000
BYTES_PER_PIXEL = {"float32": 4, "uint16cm": 2, "uint8m": 1}
# Reading, blending and writing beside the model: 0.1 s per Mpx mapped on the model's grid, 0.4 where imagery
# is warped; charged for pixels predicted and pixels mapped.
OVERHEAD_S_PER_PX = 0.15e-6
# Floating-point operations per second that networks of this kind reach in fp32: on a processor per thread.
_RATE = {"cpu": 45e9, "mps": 2e12, "cuda": 15e12}
_FASTER = {"fp32": 1.0, "bf16": 2.0, "int8": 3.0}
_FASTER_RUNTIME = {"openvino": 1.3}


@dataclass(frozen=True)
class Estimate:
    """What a job takes, if every crop has valid pixels.

    Attributes:
        windows, crops: units of reading and of prediction.
        pixels: of the map; predicted_pixels: of the grid at the model's ground sample distance.
        gigabytes: of the map, uncompressed.
        seconds: about, see `seconds_per_crop`.
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
    """Cost of `plan`, in float32 bands or whatever `encoding` stores, at so many seconds a crop."""
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


def seconds_per_crop(model: HeightModel, runner: Runner) -> float:
    """About how long a crop takes on a runtime; 0 for models whose work is not known."""
    import torch

    from canopy.models.height import HeightModel

    if not isinstance(model, HeightModel):
        return 0.0
    kind = runner.device.type
    rate = _RATE.get(kind, _RATE["cpu"]) * (torch.get_num_threads() if kind == "cpu" else 1)
    rate *= _FASTER.get(runner.precision, 1.0) * _FASTER_RUNTIME.get(runner.backend, 1.0)
    return operations_per_crop(model.config) / rate


@functools.lru_cache(maxsize=8)
def operations_per_crop(config: ModelConfig) -> float:
    """Floating-point operations from a crop to its bin scores, counted on a model without weights."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    from canopy.models.height import HeightModel

    with torch.device("meta"), torch.no_grad(), FlopCounterMode(display=False) as counter:
        outline = HeightModel(config).eval()
        side = config.crop_px + -config.crop_px % config.pad_px
        outline.decoder(outline.encoder(torch.zeros(1, len(config.bands), side, side)))
    return float(counter.get_total_flops())


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
