"""What stands beside the scores: which files, which rules, which dates, what to know, and every block."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from canopy import __version__
from canopy.chips.targets import sensor_floor
from canopy.errors import InputError
from canopy.evaluation.bootstrap import LEVEL, Bootstrap
from canopy.evaluation.heights import HeightSide, known_sha256
from canopy.evaluation.product_dates import years_apart
from canopy.evaluation.rasters import RasterPair, RasterTally, Rules
from canopy.evaluation.result import BlockTable
from canopy.evaluation.samples import SampleBlocks, SampleSet
from canopy.evaluation.tally import Tally
from canopy.geo.crs import transformer
from canopy.geo.statistic import percent_of
from canopy.metrics import COLUMN

KINDS = ("chm", "gedi", "plots")
# More than this share of pixels at impossible heights is a wrong file, not a bird.
STRANGE_SHARE = 1e-3


@dataclass(frozen=True)
class Options:
    """What `evaluate` takes besides the two sides; see there."""

    kind: str | None = None
    by: tuple[str, ...] = ()
    stat: str | None = None
    floor_m: float | None = None
    sensor: str | None = None
    column: str | None = None
    radius_m: float | None = None
    slope: str | Path | None = None
    dem: str | Path | None = None
    block_m: float | None = None
    shift: bool = True
    replicates: int = 1000
    seed: int = 0
    nodata: float | None = None
    reference_nodata: float | None = None
    map_date: str | None = None
    reference_date: str | None = None

    def check(self) -> Options:
        """The options, or InputError for one that is out of range."""
        if self.kind is not None and self.kind not in KINDS:
            raise InputError(f"{self.kind!r}", where="--kind", expected=", ".join(KINDS))
        if self.stat is not None:
            percent_of(self.stat, "--stat")
        sensor_floor(self.sensor)
        if self.floor_m is not None and not 0 <= self.floor_m <= 10:
            raise InputError(f"{self.floor_m:g} m", where="--floor-m", expected="0 to 10")
        if self.block_m is not None and not 0 < self.block_m < 1e6:
            raise InputError(f"{self.block_m:g} m", where="--block-m", expected="above 0")
        if not 0 <= self.replicates <= 100_000:
            raise InputError(f"{self.replicates}", where="--replicates", expected="0 to 100000")
        return self

    @property
    def rules(self) -> Rules:
        """For rasters."""
        floor = self.floor_m if self.floor_m is not None else sensor_floor(self.sensor) or None
        setting = Bootstrap(self.replicates, self.seed)
        return Rules(self.stat or "mean", floor, self.shift, self.block_m, setting)


def raster_facts(
    pairs: Sequence[RasterPair], tally: RasterTally, rules: Rules, options: Options
) -> dict[str, Any]:
    maps = list({id(pair.map): pair.map for pair in pairs}.values())
    grid = tally.layout.grids[0]
    floors = {rules.floor_m if rules.floor_m is not None else p.reference.floor_m for p in pairs}
    return {
        "canopy_version": __version__,
        "map": maps[0].facts() if len(maps) == 1 else {"maps": [m.product.name for m in maps]},
        "reference": [pair.reference.facts() for pair in pairs[:50]],
        "references": len(pairs),
        "grid": {
            "crs": str(grid.crs), "gsd_m": round(grid.gsd_m, 4), "width_px": grid.width,
            "height_px": grid.height, "bounds": grid.bounds,
        },
        "rule": f"both on the coarser grid, area-weighted {rules.stat}; pixels valid in both",
        "stat": rules.stat,
        "floor_m": sorted(floors),
        **date_facts(options.map_date, maps[0].dates, options.reference_date, _all_dates(pairs)),
        "bootstrap": _bootstrap_facts(
            rules.bootstrap, tally.layout.side_m, int((tally.plain.whole.rows[:, 0] > 0).sum())
        ) | {"block_px": tally.layout.side_px},
    }  # fmt: skip


def _all_dates(pairs: Sequence[RasterPair]) -> tuple[str, ...]:
    known = sorted({day for pair in pairs for day in pair.reference.dates})
    return (known[0], known[-1]) if known else ()


def date_facts(
    map_date: str | None, map_dates: tuple[str, ...], ref_date: str | None, ref_dates: tuple[str, ...]
) -> dict[str, Any]:
    """Dates of both sides (given ones win) and the gap in years, None where one is unknown."""
    ours = tuple(map_date.split("/")) if map_date else map_dates
    theirs = tuple(ref_date.split("/")) if ref_date else ref_dates
    gap = years_apart(ours, theirs)
    return {
        "map_dates": list(dict.fromkeys(ours)),
        "reference_dates": list(dict.fromkeys(theirs)),
        "date_gap_years": None if gap is None or not np.isfinite(gap) else round(gap, 2) + 0.0,
    }


def _bootstrap_facts(setting: Bootstrap, side_m: float, blocks: int) -> dict[str, Any]:
    return {
        "level": LEVEL, "replicates": setting.replicates, "seed": setting.seed, "block_m": round(side_m, 2),
        "blocks_with_data": blocks,
    }  # fmt: skip


def raster_notes(
    pairs: Sequence[RasterPair], tally: RasterTally, rules: Rules, facts: Mapping[str, Any]
) -> tuple[str, ...]:
    notes = _side_notes([*(p.map for p in pairs), *(p.reference for p in pairs)])
    for what, strange in (
        ("map", sum({id(p.map): p.map.strange for p in pairs}.values())),
        ("reference", sum(p.reference.strange for p in pairs)),
    ):
        if strange > STRANGE_SHARE * tally.plain.n:
            notes.append(
                f"{strange} pixels of the {what} have impossible heights and were left out: an undeclared "
                "nodata value, or not metres"
            )
    notes.append(_date_note(facts))
    if tally.shift is not None and not tally.shift.sure:
        notes.append(f"the measured shift is not sure, so there is no corrected score: {tally.shift.note}")
    elif tally.shift is None and rules.shift:
        notes.append(f"no shift was measured: {tally.shift_note}")
    return tuple(notes)


def _side_notes(sides: Sequence[HeightSide]) -> list[str]:
    return list(dict.fromkeys(note for side in sides for note in side.product.notes))


def _date_note(facts: Mapping[str, Any]) -> str:
    gap = facts["date_gap_years"]
    if gap is None:
        unknown = [w for w, key in (("map", "map_dates"), ("reference", "reference_dates")) if not facts[key]]
        return f"the date gap is unknown: no date in the {' and the '.join(unknown) or 'tags'}"
    if abs(gap) < 0.05:
        return "the reference was taken at the time of the map's imagery"
    when = "after" if gap > 0 else "before"
    return f"the reference was taken {abs(gap):.1f} years {when} the map's imagery"


def raster_blocks(tally: RasterTally, pairs: Sequence[RasterPair]) -> BlockTable:
    """The table of blocks that have pixels."""
    layout = tally.layout
    rows = tally.plain.whole.rows
    used = np.flatnonzero(rows[:, COLUMN["n"]] > 0)
    every = list(layout.outlines())
    site = np.array([every[i][0] for i in used])
    bounds = np.array([every[i][1] for i in used])
    crs = tuple(str(grid.crs) for grid in layout.grids)
    lon, lat = np.empty(len(used)), np.empty(len(used))
    for k in np.unique(site):
        here = site == k
        x, y = bounds[here][:, [0, 2]].mean(axis=1), bounds[here][:, [1, 3]].mean(axis=1)
        lon[here], lat[here] = transformer(crs[k], "EPSG:4326").transform(x, y)
    return _block_table(rows[used], [p.site for p in pairs], crs, layout.side_m, site, bounds, lon, lat)


def _block_table(
    rows: np.ndarray, sites: Sequence[str], crs: tuple[str, ...], side_m: float, site: np.ndarray,
    bounds: np.ndarray, lon: np.ndarray, lat: np.ndarray,
) -> BlockTable:  # fmt: skip
    n = rows[:, COLUMN["n"]]
    mean = {name: rows[:, COLUMN[name]] / n for name in ("p", "r", "e", "ae")}
    west, south, east, north = bounds.T
    return BlockTable(
        tuple(sites), crs, side_m, site, west, south, east, north, np.asarray(lon), np.asarray(lat),
        n.astype(np.int64), mean["p"], mean["r"], mean["e"], mean["ae"],
    )  # fmt: skip


def sample_facts(
    side: HeightSide, samples: SampleSet, reference: str | Path, options: Options, stat: str, floor: float,
    blocks: SampleBlocks, n: int,
) -> dict[str, Any]:  # fmt: skip
    shape = "polygons" if samples.polygons is not None else f"discs of {2 * samples.radius_m:g} m"
    return {
        "canopy_version": __version__,
        "map": side.facts(),
        "reference": [{"name": samples.name, "sha256": known_sha256(reference), "column": samples.column}],
        "rule": f"{stat} of the map's pixels over {shape}, of which at least 90 % are valid",
        "stat": stat,
        "floor_m": [floor],
        "samples": {"in_file": len(samples) + samples.dropped, "with_height": len(samples), "scored": n},
        **date_facts(options.map_date, side.dates, options.reference_date, samples.dates),
        "bootstrap": _bootstrap_facts(options.rules.bootstrap, blocks.side_m, blocks.count),
    }


def sample_notes(side: HeightSide, samples: SampleSet, facts: Mapping[str, Any], n: int) -> tuple[str, ...]:
    notes = _side_notes([side])
    if n < len(samples):
        notes.append(f"{len(samples) - n} of {len(samples)} samples lie off the map or on missing pixels")
    return (*notes, _date_note(facts))


def sample_blocks(tally: Tally, blocks: SampleBlocks, name: str) -> BlockTable:
    side = blocks.side_m
    bounds = np.column_stack([blocks.west, blocks.south, blocks.west + side, blocks.south + side])
    lon, lat = transformer(blocks.crs, "EPSG:4326").transform(blocks.west + side / 2, blocks.south + side / 2)
    site = np.zeros(blocks.count, np.int64)
    return _block_table(tally.whole.rows, [name], (blocks.crs,), side, site, bounds, lon, lat)
