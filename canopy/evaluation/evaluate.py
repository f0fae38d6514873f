"""`canopy.evaluate`: any height map against lidar rasters, GEDI shots or field plots.

And what stands beside the scores: which files, which rules, which dates, what to know, and every block.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from canopy import __version__
from canopy.chips.targets import sensor_floor
from canopy.config import Settings, validate_settings
from canopy.errors import InputError
from canopy.evaluation.maps import HeightMap, known_sha256, open_heights, years_apart
from canopy.evaluation.pixels import RasterPair, RasterTally, Rules, Tally, tally_rasters
from canopy.evaluation.samples import (
    PARQUETS,
    TEXTS,
    SampleBlocks,
    SampleSet,
    block_samples,
    load_gedi,
    load_plots,
    pool_map,
    sample_strata,
    table_format,
)
from canopy.evaluation.scores import BOUNDED, LEVEL, REPLICATES, Bootstrap, Evaluation, Scoring, Stratum
from canopy.evaluation.strata import ByRaster, Stratifier, files_of, natural, stratifiers
from canopy.files import is_url
from canopy.geo.crs import transformer
from canopy.metrics import COLUMN, percent_of
from canopy.runtime import Progress

if TYPE_CHECKING:
    import geopandas
    import pandas

    from canopy.evaluation.maps import HeightSource

KINDS = ("chm", "gedi", "plots")
_RASTERS = {".tif", ".tiff", ".vrt", ".jp2"}
_TABLES = {*TEXTS, *PARQUETS}
_MOST_SAMPLES = 20_000
_NO_PIXELS = "footprints and plots have no neighbouring pixels"
_NO_INTERVAL = "the map's bands are of single pixels: over a disc or a polygon their means are no interval"
ABSENT_IN_SAMPLES = {name: _NO_PIXELS for name in ("block_r2", "edge_error", "edge_error_symmetric")}


class Options(Settings):
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
    replicates: int = REPLICATES
    seed: int = 0
    nodata: float | None = None
    reference_nodata: float | None = None
    band: int | str | None = None
    reference_band: int | str | None = None
    layer: str | None = None
    map_date: str | None = None
    reference_date: str | None = None

    def check(self) -> Options:
        """The options, or InputError for one that is out of range."""
        if self.kind is not None and self.kind not in KINDS:
            raise InputError(f"{self.kind!r}", where="--kind", expected=", ".join(KINDS))
        if self.stat is not None:
            percent_of(self.stat, "--stat")
        sensor_floor(self.sensor)
        for name, value, low, high in (
            ("--floor-m", self.floor_m, 0, 10), ("--block-m", self.block_m, 0.001, 1e6),
            ("--radius-m", self.radius_m, 0.001, 10_000), ("--replicates", self.replicates, 0, 100_000),
        ):  # fmt: skip
            if value is not None and not low <= value <= high:
                raise InputError(f"{value:g}", where=name, expected=f"{low:g} to {high:g}")
        return self

    @property
    def rules(self) -> Rules:
        """For rasters."""
        floor = self.floor_m if self.floor_m is not None else sensor_floor(self.sensor) or None
        setting = Bootstrap(self.replicates, self.seed)
        return Rules(self.stat or "mean", floor, self.shift, self.block_m, setting)


def evaluate(
    map: HeightSource,
    reference: HeightSource | geopandas.GeoDataFrame,
    *,
    out: str | Path | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
    **options: Any,
) -> Evaluation:
    """Score a canopy height map.

    Args:
        map: GeoTIFF in metres of any CRS and pixel size; a folder of tiles; a published v1 or v2 map; or an
            xarray DataArray with a CRS.
        reference: one or several height rasters (lidar CHMs) or a DataArray; a table of GEDI shots; or field
            plots with a height column (points, polygons, a text table with lon and lat, a GeoDataFrame).
        out: folder for metrics.json, tables, figures and report.html; None writes nothing.
        overwrite: replace files in `out`.
        options: kind ("chm", "gedi", "plots"; told from the reference by default); by (site, height, cover,
            slope, a column, NAME=raster.tif, NAME=polygons.gpkg:COLUMN); stat (mean, max, pNN; default mean,
            for GEDI the percentile that the column is); floor_m or sensor (below it both sides count as 0);
            column (of heights); radius_m (of plots that are points); layer (of a vector file that has
            several); slope or dem (rasters); block_m; shift; replicates, seed (of the bootstrap); nodata,
            band, reference_nodata, reference_band; map_date, reference_date (ISO).

    Returns:
        The scores; `.to_dict()` is metrics.json.

    Raises:
        InputError (and its kinds): what cannot be read, does not overlap, or makes no sense.
    """
    from canopy.evaluation.report import check_folder, write_results

    chosen = validate_settings(Options, options, "evaluate").check()
    listed = list(reference) if isinstance(reference, list | tuple) else [reference]
    if not listed:
        raise InputError("no reference", where="--reference")
    if out is not None:
        check_folder(out, [map, listed, chosen.slope, chosen.dem, files_of(chosen.by)], overwrite)
    kind = chosen.kind or guess_kind(listed[0])
    with open_heights(map, nodata=chosen.nodata, band=chosen.band) as heights:
        if kind == "chm":
            result = _against_rasters(heights, listed, chosen, progress)
        elif len(listed) > 1:
            raise InputError(f"{len(listed)} references", where="--reference", expected="one table")
        else:
            result = _against_samples(heights, listed[0], kind, chosen, progress)
    if out is not None:
        write_results(result, out)
    return result


def guess_kind(reference: Any) -> str:
    """chm, gedi or plots, told from a reference's name and columns. InputError for a missing file."""
    if not isinstance(reference, str | Path):
        return "plots" if hasattr(reference, "geometry") else "chm"
    path = Path(reference)
    suffix = path.suffix.lower()
    if is_url(str(reference)) or suffix in _RASTERS or (path.is_dir() and suffix != ".gdb"):
        return "chm"
    if not path.exists():
        raise InputError("no such file", where=reference, remedy="check the spelling of the path")
    if suffix in _TABLES:
        names = _column_names(path)
        return "gedi" if "shot_number" in names else "chm" if not names else "plots"
    return "plots"


def _column_names(path: Path) -> list[str]:
    """Of a table; none for a text file that is a list of tiles."""
    if path.suffix.lower() in TEXTS:
        with path.open(encoding="utf-8-sig", errors="replace") as file:
            line = file.readline()
        separator = table_format(path)[0]
        return [name.strip().strip('"') for name in line.split(separator)] if separator in line else []
    try:
        from pyarrow import parquet

        return list(parquet.read_schema(path).names)
    except Exception:  # the reader of its kind says what is wrong with it
        return ["?"]


# ---- rasters --------------------------------------------------------------------------------------
def _against_rasters(
    heights: HeightMap, references: Sequence[Any], options: Options, progress: Progress | None
) -> Evaluation:
    with ExitStack() as stack:
        pairs = []
        for source in references:
            if isinstance(source, str | Path) and Path(source).suffix.lower() in _TABLES - {".txt"}:
                remedy = "use --kind gedi or --kind plots"
                raise InputError("a table, not a raster", where=source, remedy=remedy)
            side = open_heights(
                source, nodata=options.reference_nodata, band=options.reference_band, reference=True
            )
            pairs.append(RasterPair(heights, stack.enter_context(side), Path(side.name).stem))
        return score_rasters(pairs, options, progress)


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
    if options.column or options.radius_m or options.layer:
        raise InputError("--column, --radius-m and --layer are for tables", expected="a raster has neither")
    rules = options.rules
    ways = stratifiers(options.by, slope=options.slope, dem=options.dem)
    try:
        tally = tally_rasters(pairs, rules, ways, progress)
    finally:
        for way in ways:
            way.close()
    how = Scoring(rules.bootstrap, f"{tally.layout.side_m:.0f} m", tally.absent)
    overall = tally.plain.scores(how)
    corrected = None
    if tally.corrected is not None:
        corrected = overall if tally.corrected is tally.plain else tally.corrected.scores(how)
    facts = raster_facts(pairs, tally, rules, options)
    return Evaluation(
        "chm", overall, corrected, tally.shift, tally.shift_note,
        tuple(_strata(tally.plain, {way.by: _names_of(way) for way in ways}, how)),
        tally.plain.joint_histogram(), raster_blocks(tally, pairs), tally.layout.side_m,
        tuple(tally.previews), None, facts | dict(provenance or {}), raster_notes(pairs, tally, rules, facts),
    )  # fmt: skip


def _names_of(way: Stratifier) -> Sequence[str]:
    """In the order to show them."""
    return sorted(way.names, key=natural) if isinstance(way, ByRaster) else way.names


def _strata(tally: Tally, names: Mapping[str, Sequence[str]], how: Scoring) -> list[Stratum]:
    return [
        Stratum(by, name, scores)
        for by, shown in names.items()
        for name, scores in tally.stratum_scores(by, shown, how)
    ]


def raster_facts(
    pairs: Sequence[RasterPair], tally: RasterTally, rules: Rules, options: Options
) -> dict[str, Any]:
    """The provenance: plain data."""
    maps = list({id(pair.map): pair.map for pair in pairs}.values())
    grid = tally.layout.grids[0]
    known = sorted({day for pair in pairs for day in pair.reference.dates})
    return {
        "canopy_version": __version__,
        "map": maps[0].facts() if len(maps) == 1 else {"maps": [one.name for one in maps]},
        "reference": [pair.reference.facts() for pair in pairs[:50]],
        "references": len(pairs),
        "grid": {
            "crs": str(grid.crs), "gsd_m": round(grid.gsd_m, 4), "width_px": grid.width,
            "height_px": grid.height, "bounds": grid.bounds,
        },
        "rule": f"both on the coarser grid, area-weighted {rules.stat}; pixels valid in both",
        "stat": rules.stat,
        "floor_m": sorted({rules.floor_of(pair.reference) for pair in pairs}),
        **_date_facts(options, maps[0].dates, (known[0], known[-1]) if known else ()),
        "bootstrap": _bootstrap_facts(
            rules.bootstrap, tally.layout.side_m, int((tally.plain.n_by_block > 0).sum())
        ) | {"block_px": tally.layout.side_px},
    }  # fmt: skip


def _date_facts(options: Options, map_dates: tuple[str, ...], ref_dates: tuple[str, ...]) -> dict[str, Any]:
    """Dates of both sides (given ones win) and the gap in years, None where one is unknown."""
    ours = tuple(options.map_date.split("/")) if options.map_date else map_dates
    theirs = tuple(options.reference_date.split("/")) if options.reference_date else ref_dates
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
    """What a reader must know, one sentence each."""
    sides = [*(pair.map for pair in pairs), *(pair.reference for pair in pairs)]
    notes = list(dict.fromkeys(note for side in sides for note in side.notes))
    notes.append(_date_note(facts))
    if tally.shift is not None and not tally.shift.sure:
        notes.append(f"the measured shift is not sure, so there is no corrected score: {tally.shift.note}")
    elif tally.shift is None and rules.shift:
        notes.append(f"no shift was measured: {tally.shift_note}")
    return tuple(notes)


def _date_note(facts: Mapping[str, Any]) -> str:
    gap = facts["date_gap_years"]
    if gap is None:
        unknown = [w for w, key in (("map", "map_dates"), ("reference", "reference_dates")) if not facts[key]]
        return f"the date gap is unknown: no date in the {' and the '.join(unknown) or 'tags'}"
    if abs(gap) < 0.05:
        return "the reference was taken at the time of the map's imagery"
    when = "after" if gap > 0 else "before"
    return f"the reference was taken {abs(gap):.1f} years {when} the map's imagery"


def raster_blocks(tally: RasterTally, pairs: Sequence[RasterPair]) -> pandas.DataFrame:
    """The table of blocks that have pixels."""
    layout = tally.layout
    outlines = list(layout.outlines())
    used = np.flatnonzero(tally.plain.n_by_block > 0)
    site = np.array([outlines[i][0] for i in used])
    bounds = np.array([outlines[i][1] for i in used])
    crs = np.array([str(grid.crs) for grid in layout.grids])[site]
    names = np.array([pair.site for pair in pairs])[site]
    return _block_table(tally.plain.whole.rows[used], names, crs, bounds)


def _block_table(rows: np.ndarray, site: np.ndarray, crs: np.ndarray, bounds: np.ndarray) -> pandas.DataFrame:
    """See `Evaluation.blocks`; `bounds` are (blocks, 4)."""
    import pandas

    x, y = bounds[:, [0, 2]].mean(axis=1), bounds[:, [1, 3]].mean(axis=1)
    lon, lat = np.empty(len(x)), np.empty(len(x))
    for name in np.unique(crs):
        here = crs == name
        lon[here], lat[here] = transformer(str(name), "EPSG:4326").transform(x[here], y[here])
    table = pandas.DataFrame({"site": site, "crs": crs})
    table[["west", "south", "east", "north"]] = bounds
    table["lon"], table["lat"] = lon, lat
    n = rows[:, COLUMN["n"]]
    table["n"] = n.astype(np.int64)
    for name, field in (("map_mean_m", "p"), ("reference_mean_m", "r"), ("bias_m", "e"), ("mae_m", "ae")):
        table[name] = rows[:, COLUMN[field]] / n
    return table


# ---- GEDI and plots -------------------------------------------------------------------------------
def _against_samples(
    heights: HeightMap, reference: Any, kind: str, options: Options, progress: Progress | None
) -> Evaluation:
    import pandas

    if isinstance(reference, str | Path) and Path(reference).suffix.lower() in _RASTERS:
        raise InputError("a raster, not a table", where=reference, remedy="use --kind chm")
    if kind == "gedi":
        samples = load_gedi(reference, options.column, options.radius_m)
    else:
        samples = load_plots(reference, options.column, options.radius_m, options.layer)
    stat = options.stat or (_gedi_stat(samples.column) if kind == "gedi" else "mean")
    strata = sample_strata(samples, options.by, slope=options.slope, dem=options.dem)
    values = pool_map(heights, samples, stat, progress)
    seen = np.isfinite(values)
    if not seen.any():
        raise InputError(
            "no sample lies on the map's valid pixels", where=f"{heights.name}, {samples.name}",
            expected="heights of the same place",
        )  # fmt: skip
    floor = options.rules.floor_m or 0.0
    table = pandas.DataFrame(
        {"lon": samples.lon, "lat": samples.lat, "reference_m": samples.height_m, "map_m": values}
    )[seen].reset_index(drop=True)
    table[["reference_m", "map_m"]] = table[["reference_m", "map_m"]].mask(lambda x: x < floor, 0.0)
    blocks = block_samples(table["lon"].to_numpy(), table["lat"].to_numpy(), options.block_m)
    tally = Tally(blocks.count)
    cut = {by: (codes[seen], names) for by, (codes, names) in strata.items()}
    tally.add_samples(table["map_m"].to_numpy(), table["reference_m"].to_numpy(), blocks.number, cut)
    absent = ABSENT_IN_SAMPLES | (dict.fromkeys(BOUNDED, _NO_INTERVAL) if heights.has_interval else {})
    how = Scoring(options.rules.bootstrap, f"{blocks.side_m:.0f} m", absent)
    facts = _sample_facts(heights, samples, reference, options, blocks, len(table))
    facts |= {"stat": stat, "floor_m": [floor]}
    facts["rule"] = f"{stat} of {facts['rule']}"
    corners = np.column_stack([blocks.west, blocks.south])
    keep = np.sort(np.random.default_rng(0).permutation(len(table))[:_MOST_SAMPLES])
    return Evaluation(
        kind, tally.scores(how), None, None,
        "footprints and plots are placed to metres: no shift is measured on them",
        tuple(_strata(tally, {by: names for by, (_, names) in cut.items()}, how)), tally.joint_histogram(),
        _block_table(
            tally.whole.rows, np.full(blocks.count, samples.name), np.full(blocks.count, blocks.crs),
            np.hstack([corners, corners + blocks.side_m]),
        ),
        blocks.side_m, (), table.iloc[keep].reset_index(drop=True), facts,
        _sample_notes(heights, samples, facts, len(table)),
    )  # fmt: skip


def _gedi_stat(column: str) -> str:
    """RH98 stands beside the 98th percentile of the disc's pixels."""
    digits = "".join(c for c in column if c.isdigit())
    return f"p{int(digits)}" if digits and int(digits) <= 100 else "p98"


def _sample_facts(
    heights: HeightMap, samples: SampleSet, reference: Any, options: Options, blocks: SampleBlocks, n: int
) -> dict[str, Any]:
    shape = "polygons" if samples.polygons is not None else f"discs of {2 * samples.radius_m:g} m"
    return {
        "canopy_version": __version__,
        "map": heights.facts(),
        "reference": [{"name": samples.name, "sha256": known_sha256(reference), "column": samples.column}],
        "rule": f"the map's pixels over {shape}, of which at least 90 % are valid",
        "samples": {
            "in_file": len(samples) + sum(samples.dropped.values()), "with_height": len(samples), "scored": n,
        },
        **_date_facts(options, heights.dates, samples.dates),
        "bootstrap": _bootstrap_facts(options.rules.bootstrap, blocks.side_m, blocks.count),
    }  # fmt: skip


def _sample_notes(
    heights: HeightMap, samples: SampleSet, facts: Mapping[str, Any], n: int
) -> tuple[str, ...]:
    notes = list(heights.notes)
    total = len(samples) + sum(samples.dropped.values())
    notes += [
        f"{count} of {total} rows have {why} and were left out" for why, count in samples.dropped.items()
    ]
    if n < len(samples):
        notes.append(f"{len(samples) - n} of {len(samples)} samples lie off the map or on missing pixels")
    return (*notes, _date_note(facts))
