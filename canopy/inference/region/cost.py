"""What a run will take, before it starts: tiles, imagery, hours, money (`canopy map --dry-run`)."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from canopy.inference.estimate import BYTES_PER_PIXEL, OVERHEAD_S_PER_PX, seconds_per_crop
from canopy.inference.plan import Lattice, plan_windows
from canopy.inference.region.engines import local_devices
from canopy.inference.region.plan import Prepared

# A worker reads its tile's imagery at its native pixel, three bytes each, before any compression.
IMAGERY_BYTES_PER_PX = 3


@dataclass(frozen=True)
class RegionCost:
    """Attributes:
    tiles: work tiles; km2: ground that they cover.
    crops: passes of the network if every tile has imagery everywhere.
    imagery_bytes: uncompressed RGB to read, crop margins included; JPEG imagery is about a tenth of it.
    map_bytes: of the tiles, uncompressed.
    worker_hours: of one worker; hours: with `workers` of them.
    money: worker_hours at the price of an hour, None without one.
    """

    tiles: int
    km2: float
    crops: int
    pixels: int
    imagery_bytes: float
    map_bytes: float
    workers: int
    worker_hours: float
    hours: float
    km2_per_hour: float
    price_per_worker_hour: float | None
    money: float | None

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return asdict(self)

    def lines(self) -> list[str]:
        """For a person."""
        text = [
            f"{self.tiles:,} tiles, {self.km2:,.2f} km2, {self.crops:,} crops",
            f"imagery {_size(self.imagery_bytes)} uncompressed (JPEG: about a tenth); "
            f"map {_size(self.map_bytes)} uncompressed",
            f"{self.worker_hours:,.2f} worker hours, {self.hours:,.2f} h with {self.workers} "
            f"worker{'' if self.workers == 1 else 's'}, {self.km2_per_hour:,.1f} km2/h",
        ]
        if self.money is not None:
            text.append(f"{self.money:,.2f} at {self.price_per_worker_hour:g} an hour and worker")
        return text


def region_cost(prepared: Prepared, crop_seconds: float | None = None) -> RegionCost:
    """Cost of a region if all of it has imagery.

    Args:
        crop_seconds: of one crop on one worker; measured here (two forward passes) if not given.
    """
    settings, config = prepared.settings, prepared.model.config
    if crop_seconds is None:
        runner = prepared.choice.open(prepared.model, prepared.extras.outputs)
        crop_seconds = seconds_per_crop(prepared.model, runner, settings.batch_size, prepared.extras)
    lattice = Lattice.of_model(config)
    tiling = prepared.tiling
    tiles = pixels = predicted = 0
    km2 = 0.0
    sample = None
    for task in tiling.tiles(prepared.aoi):
        _, _, height, width = tiling.offset(task.row, task.col)
        tiles, pixels, km2 = tiles + 1, pixels + height * width, km2 + task.km2
        if sample is None or height * width > sample[0]:
            sample = (height * width, task)
    crops = 0
    if sample is not None:
        # All tiles are alike but for the clipped ones, which cost as their share of a whole one.
        target = prepared.lattices.target(tiling.window(sample[1].row, sample[1].col))
        plan = plan_windows(target.predict, lattice)
        share = pixels / sample[0]
        crops = round(plan.n_crops * share)
        predicted = round(target.predict.height * target.predict.width * share)
    worker_s = crops * crop_seconds + OVERHEAD_S_PER_PX * (pixels + predicted)
    local = settings.scheduler == "local"
    workers = len(local_devices(settings.device, settings.workers)) if local else settings.workers or 1
    seen_m2 = crops * (config.crop_px * config.gsd_m) ** 2 * (1 / lattice.waste)
    hours = worker_s / 3600
    return RegionCost(
        tiles=tiles, km2=km2, crops=crops, pixels=pixels,
        imagery_bytes=seen_m2 / prepared.source.native_gsd_m**2 * IMAGERY_BYTES_PER_PX,
        map_bytes=float(pixels * len(prepared.bands) * BYTES_PER_PIXEL[settings.encoding]),
        workers=workers, worker_hours=hours, hours=hours / workers,
        km2_per_hour=km2 / (hours / workers) if hours else 0.0,
        price_per_worker_hour=settings.price,
        money=None if settings.price is None else hours * settings.price,
    )  # fmt: skip


def _size(count: float) -> str:
    """`3.4 GB`."""
    units = ["kB", "MB", "GB", "TB"]
    count /= 1000
    while count >= 1000 and len(units) > 1:
        count, units = count / 1000, units[1:]
    return f"{count:,.1f} {units[0]}"
