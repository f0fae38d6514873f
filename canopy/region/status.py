"""What a run will take, before it starts (`canopy map --dry-run`), and how it stands (`--status DIR`)."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from canopy.errors import InputError
from canopy.inference.estimate import BYTES_PER_PIXEL, OVERHEAD_S_PER_PX, seconds_per_crop
from canopy.inference.lattice import Lattice, plan_windows
from canopy.region.ledger import LEDGER, LOCK, STATES, Ledger, holder_of, is_held, shard_ledgers
from canopy.region.plan import RUN_FILE, Region, read_pins, run_id
from canopy.region.workers import local_devices, local_threads

# A worker reads its tile's imagery at its native pixel, three bytes each, before any compression.
IMAGERY_BYTES_PER_PX = 3
_MOST_FAILURES = 20


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


def region_cost(region: Region) -> RegionCost:
    """Cost of a region if all of it has imagery."""
    options, config, tiling = region.options, region.model.config, region.tiling
    lattice = Lattice.of_model(config)
    tiles = pixels = 0
    km2 = 0.0
    largest, place = 0, None
    for tile in tiling.tiles(region.aoi):
        _, _, height, width = tiling.offset(tile.row, tile.col)
        tiles, pixels, km2 = tiles + 1, pixels + height * width, km2 + tile.km2
        if height * width > largest:
            largest, place = height * width, tile
    crops = predicted = 0
    if place is not None:
        # All tiles are alike but for the clipped ones, which cost as their share of a whole one.
        target = region.lattices.target(tiling.window(place.row, place.col))
        share = pixels / largest
        crops = round(plan_windows(target.predict, lattice).n_crops * share)
        predicted = round(target.predict.height * target.predict.width * share)
    local = options.scheduler == "local"
    workers = len(local_devices(options.device, options.workers)) if local else options.workers or 1
    runner = region.choice.open(region.model, region.extras.outputs)
    crop_seconds = seconds_per_crop(region.model, runner)
    if runner.device.type == "cpu":  # the estimate is that of all threads of this machine
        crop_seconds *= local_threads(1) / (options.threads or local_threads(workers))
    worker_s = crops * crop_seconds + OVERHEAD_S_PER_PX * (pixels + predicted)
    seen_m2 = crops * (config.crop_px * config.gsd_m) ** 2 * (1 / lattice.waste)
    hours = worker_s / 3600
    return RegionCost(
        tiles=tiles, km2=km2, crops=crops, pixels=pixels,
        imagery_bytes=seen_m2 / region.source.native_gsd_m**2 * IMAGERY_BYTES_PER_PX,
        map_bytes=float(pixels * len(region.bands) * BYTES_PER_PIXEL[options.encoding]),
        workers=workers, worker_hours=hours, hours=hours / workers,
        km2_per_hour=km2 / (hours / workers) if hours else 0.0,
        price_per_worker_hour=options.price,
        money=None if options.price is None else hours * options.price,
    )  # fmt: skip


def _size(count: float) -> str:
    """`3.4 GB`."""
    units = ["kB", "MB", "GB", "TB"]
    count /= 1000
    while count >= 1000 and len(units) > 1:
        count, units = count / 1000, units[1:]
    return f"{count:,.1f} {units[0]}"


def status(folder: Path) -> dict[str, Any]:
    """Counts, area, failures and pace of a run, from all of its ledgers; changes nothing.

    Raises:
        InputError: no run there.
    """
    pins = read_pins(folder)
    if pins is None:
        raise InputError("no run there", where=folder, expected=f"a folder with {RUN_FILE}")
    run = run_id(pins)
    main = [folder / LEDGER] if (folder / LEDGER).is_file() else []
    # The whole run's ledger is behind while shards are at work, and ahead of them afterwards.
    counts, totals, failures = max(
        (_sum(paths, run) for paths in (main, shard_ledgers(folder))),
        key=lambda one: one[0]["done"] + one[0]["empty"] + one[0]["failed"],
    )
    locks = [path for path in sorted(folder.glob(f"{LOCK}*")) if path.suffix != ".json"]
    holders = [holder for path in locks if is_held(path) and (holder := holder_of(path))]
    left_km2, pace = totals["km2"] - totals["km2_finished"], totals["km2_per_hour"]
    return {
        "folder": str(folder),
        "area": pins["area"]["text"],
        "model": pins["model"]["name"],
        "created": pins["canopy"]["created"],
        "tiles": counts,
        "finished_fraction": (counts["done"] + counts["empty"]) / max(1, sum(counts.values())),
        **{key: round(value, 6) for key, value in totals.items()},
        "seconds_per_tile": round(totals["worker_seconds"] / max(1, counts["done"]), 3),
        "at_work": [
            {"host": h["host"], "pid": h["pid"], "for_s": round(time.time() - h["since"])} for h in holders
        ],
        "left_s": round(left_km2 / pace * 3600) if holders and pace > 0 else None,
        "failures": failures,
    }


def _sum(paths: list[Path], run: str) -> tuple[dict[str, int], dict[str, float], list[dict[str, str]]]:
    """Counts, totals and first failures of some ledgers of a run."""
    counts = dict.fromkeys(STATES, 0)
    totals = dict.fromkeys(("km2", "km2_finished", "worker_seconds", "bytes", "km2_per_hour"), 0.0)
    failures: list[dict[str, str]] = []
    for path in paths:
        with Ledger(path, read_only=True) as ledger:
            if ledger.get("run") != run:
                continue
            for state, count in ledger.counts().items():
                counts[state] += count
            for key, value in ledger.totals().items():
                totals[key] += value
            for tile, outcome in ledger.rows("failed"):
                if len(failures) < _MOST_FAILURES:
                    failures.append({"tile": tile.id, "reason": outcome.reason or ""})
    return counts, totals, failures


def elapsed_text(seconds: float) -> str:
    """`45 s`, `12 min`, `3.4 h` or `2.1 days`."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    if seconds < 5400:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h" if seconds < 172_800 else f"{seconds / 86_400:.1f} days"
