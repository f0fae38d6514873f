"""What stands beside the scores: which files, which rules, which dates, what to know, and every block.

`canopy.evaluate`: any height map against lidar rasters, GEDI shots or field plots.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from canopy import __version__
from canopy.chips.targets import sensor_floor
from canopy.errors import InputError
from canopy.evaluation.maps import HeightSide, known_sha256, years_apart
from canopy.evaluation.pixels import RasterPair, RasterTally, Rules, tally_rasters
from canopy.evaluation.samples import (
    SampleBlocks,
    SampleSet,
    block_samples,
    load_gedi,
    load_plots,
    pool_map,
    sample_strata,
)
from canopy.evaluation.scores import (
    BOUNDED,
    LEVEL,
    BlockTable,
    Bootstrap,
    Evaluation,
    Samples,
    Stratum,
    Tally,
)
from canopy.evaluation.strata import BlockLayout, stratifiers
from canopy.files import is_url
from canopy.geo.crs import transformer
from canopy.metrics import COLUMN, percent_of
from canopy.runtime import Progress

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


_RASTERS = {".tif", ".tiff", ".vrt", ".jp2"}
_TABLES = {".parquet", ".geoparquet", ".pq", ".csv", ".txt"}
_MOST_SAMPLES = 20_000
_NO_PIXELS = "footprints and plots have no neighbouring pixels"
_NO_INTERVAL = "the map's bands are of single pixels: over a disc or a polygon their means are no interval"
ABSENT_IN_SAMPLES = {name: _NO_PIXELS for name in ("block_r2", "edge_error", "edge_error_symmetric")}


def evaluate(
    map: str | Path,
    reference: str | Path | Sequence[str | Path],
    *,
    out: str | Path | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
    **options: Any,
) -> Evaluation:
    """Score a canopy height map.

    Args:
        map: GeoTIFF in metres of any CRS and pixel size; a folder of tiles; a published v1 or v2 map.
        reference: one or several height rasters (lidar CHMs); a table of GEDI shots; or field plots with a
            height column (points, polygons, or a CSV with lon and lat).
        out: folder for metrics.json, tables, figures and report.html; None writes nothing.
        overwrite: replace files in `out`.
        options: kind ("chm", "gedi", "plots"; told from the file by default); by (site, height, cover, slope,
            a column, NAME=raster.tif, NAME=polygons.gpkg:COLUMN); stat (mean, max, pNN; default mean, for
            GEDI the percentile that the column is); floor_m or sensor (below it both sides count as 0);
            column (of heights); radius_m (of plots that are points); slope or dem (rasters); block_m; shift;
            replicates, seed (of the bootstrap); nodata, reference_nodata; map_date, reference_date (ISO).

    Returns:
        The scores; `.to_dict()` is metrics.json.

    Raises:
        InputError (and its kinds): what cannot be read, does not overlap, or makes no sense.
    """
    from canopy.evaluation.report import check_folder, write_results

    chosen = Options(**options).check()
    references = [reference] if isinstance(reference, str | Path) else list(reference)
    if not references:
        raise InputError("no reference", where="--reference")
    if out is not None:
        check_folder(out, overwrite)
    kind = chosen.kind or guess_kind(references[0])
    with HeightSide.open(map, nodata=chosen.nodata) as side:
        if kind == "chm":
            result = _against_rasters(side, references, chosen, progress)
        else:
            if len(references) > 1:
                raise InputError(f"{len(references)} references", where="--reference", expected="one table")
            result = _against_samples(side, references[0], kind, chosen, progress)
    if out is not None:
        write_results(result, out)
    return result


def guess_kind(reference: str | Path) -> str:
    """chm, gedi or plots, told from a reference's name and columns. InputError for a missing file."""
    path = Path(reference)
    suffix = path.suffix.lower()
    if is_url(str(reference)) or suffix in _RASTERS or path.is_dir():
        return "chm"
    if not path.is_file():
        raise InputError("no such file", where=reference, remedy="check the spelling of the path")
    if suffix in _TABLES:
        names = _column_names(path)
        return "gedi" if "shot_number" in names else "chm" if not names else "plots"
    return "plots"


def _column_names(path: Path) -> list[str]:
    if path.suffix.lower() in (".csv", ".txt"):
        with path.open(encoding="utf-8", errors="replace") as file:
            line = file.readline()
        return [name.strip().strip('"') for name in line.split(",")] if "," in line else []
    try:
        from pyarrow import parquet

        return list(parquet.read_schema(path).names)
    except Exception:  # the reader of its kind says what is wrong with it
        return ["?"]


# ---- rasters --------------------------------------------------------------------------------------
def _against_rasters(
    side: HeightSide, references: Sequence[str | Path], options: Options, progress: Progress | None
) -> Evaluation:
    for path in references:
        if Path(path).suffix.lower() in _TABLES - {".txt"}:
            raise InputError("a table, not a raster", where=path, remedy="use --kind gedi or --kind plots")
    opened: list[HeightSide] = []
    try:
        pairs = []
        for path in references:
            opened.append(HeightSide.open(path, reference=True, nodata=options.reference_nodata))
            pairs.append(RasterPair(side, opened[-1], Path(opened[-1].product.name).stem))
        return score_rasters(pairs, options, progress)
    finally:
        for one in opened:
            one.close()


def score_rasters(
    pairs: Sequence[RasterPair],
    options: Options | None = None,
    progress: Progress | None = None,
    provenance: Mapping[str, Any] | None = None,
) -> Evaluation:
    """Scores of one or many (map, reference) pairs, pooled; each pair is a site. For benchmarks.

    `provenance` is added to the result's. Raises InputError and ImageryError as `evaluate` does.
    """
    options = (options or Options()).check()
    if options.column or options.radius_m:
        raise InputError("--column and --radius-m are for tables", expected="a raster has neither")
    rules = options.rules
    ways = stratifiers(options.by, slope=options.slope, dem=options.dem)
    tally = tally_rasters(pairs, rules, ways, progress)
    how = rules.bootstrap, _side_text(tally.layout), tally.absent
    overall = tally.plain.scores(*how)
    corrected = None
    if tally.corrected is tally.plain:
        corrected = overall
    elif tally.corrected is not None:
        corrected = tally.corrected.scores(*how)
    strata = [
        Stratum(way.by, name, scores)
        for way in ways
        for name, scores in _ordered(tally.plain.stratum_scores(way.by, *how), way.names)
    ]
    facts = raster_facts(pairs, tally, rules, options)
    return Evaluation(
        "chm", overall, corrected, tally.shift, tally.shift_note, tuple(strata),
        tally.plain.joint_histogram(), raster_blocks(tally, pairs), tuple(tally.previews), None,
        facts | dict(provenance or {}), raster_notes(pairs, tally, rules, facts),
    )  # fmt: skip


def _ordered(found: list[tuple[str, Any]], names: Sequence[str]) -> list[tuple[str, Any]]:
    order = {name: i for i, name in enumerate(names)}
    return sorted(found, key=lambda item: order.get(item[0], len(order)))


def _side_text(layout: BlockLayout) -> str:
    return f"{layout.side_m:.0f} m"


# ---- GEDI and plots -------------------------------------------------------------------------------
def _against_samples(
    side: HeightSide, reference: str | Path, kind: str, options: Options, progress: Progress | None
) -> Evaluation:
    if Path(reference).suffix.lower() in _RASTERS:
        raise InputError("a raster, not a table", where=reference, remedy="use --kind chm")
    if kind == "gedi":
        samples = load_gedi(reference, options.column)
        if options.radius_m is not None:
            samples = replace(samples, radius_m=options.radius_m)
    else:
        samples = load_plots(reference, options.column, options.radius_m)
    stat = options.stat or (_gedi_stat(samples.column) if kind == "gedi" else "mean")
    strata = sample_strata(samples, options.by, slope=options.slope, dem=options.dem)
    values = pool_map(side, samples, stat, progress)
    seen = np.isfinite(values)
    if not seen.any():
        raise InputError(
            "no sample lies on the map's valid pixels", where=f"{side.product.name}, {reference}",
            expected="heights of the same place",
        )  # fmt: skip
    lon, lat, heights, values = samples.lon[seen], samples.lat[seen], samples.height_m[seen], values[seen]
    floor = options.rules.floor_m or 0.0
    heights, values = (np.where(x < floor, 0, x) for x in (heights, values))
    blocks = block_samples(lon, lat, options.block_m)
    tally = Tally(blocks.count)
    cut = {by: (codes[seen], names) for by, (codes, names) in strata.items()}
    tally.add_samples(values, heights, blocks.number, cut)
    absent = ABSENT_IN_SAMPLES | (dict.fromkeys(BOUNDED, _NO_INTERVAL) if side.product.has_interval else {})
    how = options.rules.bootstrap, f"{blocks.side_m:.0f} m", absent
    scored = [
        Stratum(by, name, scores)
        for by, (_, names) in cut.items()
        for name, scores in _ordered(tally.stratum_scores(by, *how), names)
    ]
    facts = sample_facts(side, samples, reference, options, stat, floor, blocks, int(seen.sum()))
    keep = np.sort(np.random.default_rng(0).permutation(len(lon))[:_MOST_SAMPLES])
    return Evaluation(
        kind, tally.scores(*how), None, None,
        "footprints and plots are placed to metres: no shift is measured on them", tuple(scored),
        tally.joint_histogram(), sample_blocks(tally, blocks, samples.name), (),
        Samples(lon[keep], lat[keep], heights[keep], values[keep]), facts,
        sample_notes(side, samples, facts, int(seen.sum())),
    )  # fmt: skip


def _gedi_stat(column: str) -> str:
    """RH98 stands beside the 98th percentile of the disc's pixels."""
    digits = "".join(c for c in column if c.isdigit())
    return f"p{int(digits)}" if digits and int(digits) <= 100 else "p98"
