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
from canopy.config import validate_settings
from canopy.errors import InputError
from canopy.evaluation.grids import own_grid
from canopy.evaluation.maps import HeightMap, years_apart
from canopy.evaluation.opening import open_heights
from canopy.evaluation.pixels import Matched, RasterPair, Tally, tally_rasters
from canopy.evaluation.samples import (
    TABLES,
    block_samples,
    load_samples,
    pool_map,
    read_table,
    sample_strata,
)
from canopy.evaluation.scores import BOUNDED, LEVEL, Evaluation, Options
from canopy.evaluation.strata import RASTERS, files_of, stratifiers
from canopy.files import check_output, file_sha256, is_url
from canopy.geo.crs import transformer
from canopy.metrics import COLUMN
from canopy.runtime import Progress

if TYPE_CHECKING:
    import geopandas
    import pandas

    from canopy.evaluation.opening import HeightSource

_MOST_SAMPLES = 20_000
# Hashing a file must not take longer than scoring it.
_HASH_BYTES = 2**30
_NO_PIXELS = "footprints and plots have no neighbouring pixels"
_NO_INTERVAL = "the map's bands are of single pixels: over a disc or a polygon their means are no interval"
ABSENT_IN_SAMPLES = dict.fromkeys(("block_r2", "edge_error", "edge_error_symmetric"), _NO_PIXELS)


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
            several); dem (elevations, for slope); image (imagery to show beside the heights); block_m;
            shift; replicates, seed (of the bootstrap); nodata, band, reference_nodata, reference_band;
            map_date, reference_date (ISO).

    Returns:
        The scores; `.to_dict()` is metrics.json.

    Raises:
        InputError (and its kinds): what cannot be read, does not overlap, or makes no sense.
    """
    from canopy.evaluation.report.pages import write_results

    chosen = validate_settings(Options, options, "evaluate").check()
    listed = list(reference) if isinstance(reference, list | tuple) else [reference]
    if not listed:
        raise InputError("no reference", where="--reference")
    if out is not None:
        inputs = [map, listed, chosen.dem, chosen.image, files_of(chosen.by)]
        expected = "a directory for the results"
        check_output(out, inputs, overwrite=overwrite, folder=True, expected=expected)
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
    """chm, gedi or plots, told from a reference's name and columns. InputError for what cannot be read."""
    if not isinstance(reference, str | Path):
        return "plots" if hasattr(reference, "geometry") else "chm"
    path = Path(reference)
    suffix = path.suffix.lower()
    if is_url(str(reference)) or suffix in RASTERS or (path.is_dir() and suffix != ".gdb"):
        return "chm"
    if not path.exists():
        raise InputError("no such file", where=reference, remedy="check the spelling of the path")
    return "gedi" if suffix in TABLES and "shot_number" in read_table(path) else "plots"


# ---- rasters --------------------------------------------------------------------------------------
def _against_rasters(
    heights: HeightMap, references: Sequence[Any], options: Options, progress: Progress | None
) -> Evaluation:
    with ExitStack() as stack:
        pairs = []
        for source in references:
            if isinstance(source, str | Path) and Path(source).suffix.lower() in TABLES:
                remedy = "use --kind gedi or --kind plots"
                raise InputError("a table, not a raster", where=source, remedy=remedy)
            side = open_heights(
                source, nodata=options.reference_nodata, band=options.reference_band, reference=True
            )
            pairs.append(RasterPair(heights, stack.enter_context(side), Path(side.name).stem))
        return score_rasters(pairs, options, progress)


def score_rasters(
    pairs: Sequence[RasterPair],
    options: Options,
    progress: Progress | None = None,
    provenance: Mapping[str, Any] | None = None,
) -> Evaluation:
    """Scores of one or many (map, reference) pairs, pooled; each pair is a site. For benchmarks.

    `provenance` is added to the result's. Raises InputError and ImageryError as `evaluate` does.
    """
    if options.column or options.radius_m or options.layer:
        raise InputError("--column, --radius-m and --layer are for tables", expected="a raster has neither")
    with ExitStack() as stack:
        ways = stratifiers(options.by, options.dem)
        for way in ways:
            stack.callback(way.close)
        tally = tally_rasters(pairs, options, ways, progress)
    side_m = tally.layout.side_m
    how = {"replicates": options.replicates, "seed": options.seed, "side_m": side_m, "absent": tally.absent}
    overall, strata = tally.plain.scores({way.by: way.shown() for way in ways}, **how)
    corrected = None
    if tally.corrected is not None:
        corrected = overall if tally.corrected is tally.plain else tally.corrected.scores({}, **how)[0]
    raster, bounds = tally.layout.outlines()
    crs = np.array([str(grid.crs) for grid in tally.layout.grids])[raster]
    blocks = _block_table(tally.plain, np.array([pair.site for pair in pairs])[raster], crs, bounds)
    maps = list({id(pair.map): pair.map for pair in pairs}.values())
    floors = {options.floor if options.floor is not None else pair.reference.floor_m for pair in pairs}
    grid, known = tally.layout.grids[0], [day for pair in pairs for day in pair.reference.dates]
    stat, dates = options.stat or "mean", (min(known), max(known)) if known else ()
    facts = {
        "map": _map_facts(maps[0]) if len(maps) == 1 else {"maps": [one.name for one in maps]},
        "reference": [_map_facts(pair.reference) for pair in pairs[:50]],
        "references": len(pairs),
        "grid": {
            "crs": str(grid.crs), "gsd_m": round(grid.gsd_m, 4), "width_px": grid.width,
            "height_px": grid.height, "bounds": grid.bounds,
        },
        "rule": f"both on the coarser grid, area-weighted {stat}; pixels valid in both",
        "stat": stat,
        "floor_m": sorted(floors),
    } | _common_facts(options, maps[0].dates, dates, side_m, len(blocks))  # fmt: skip
    facts["bootstrap"]["block_px"] = tally.layout.side_px
    sides = [*(pair.map for pair in pairs), *(pair.reference for pair in pairs)]
    notes = [*dict.fromkeys(note for side in sides for note in side.notes), _date_note(facts)]
    if tally.shift is not None and not tally.shift["sure"]:
        notes.append(f"the measured shift is not sure, so there is no corrected score: {tally.shift_note}")
    elif tally.shift is None and options.shift:
        notes.append(f"no shift was measured: {tally.shift_note}")
    return Evaluation(
        "chm", overall, corrected, tally.shift, tally.shift_note, strata, tally.plain.joint, blocks, side_m,
        tally.preview, None, facts | dict(provenance or {}), notes,
    )  # fmt: skip


def _map_facts(heights: HeightMap) -> dict[str, Any]:
    return {
        "name": heights.name,
        "kind": heights.kind,
        "files": len(heights.tiles),
        "sha256": _known_sha256(heights.tiles[0].path) if len(heights.tiles) == 1 else None,
        "crs": str(heights.crs),
        "gsd_m": round(heights.gsd_m, 4),
        "dates": list(heights.dates),
        "tags": {k: v for k, v in sorted(heights.tags.items()) if k.startswith("CANOPY_")},
    }


def _known_sha256(path: object) -> str | None:
    """Of a local file up to 1 GiB; None for others, and for what is no file."""
    if not isinstance(path, str | Path) or is_url(path) or not Path(path).is_file():
        return None
    return None if Path(path).stat().st_size > _HASH_BYTES else file_sha256(path)


def _common_facts(
    options: Options, map_dates: Sequence[str], ref_dates: Sequence[str], side_m: float, blocks: int
) -> dict[str, Any]:
    """What the provenance has for every kind: dates (given ones win), their gap in years, the bootstrap."""
    ours = options.map_date.split("/") if options.map_date else map_dates
    theirs = options.reference_date.split("/") if options.reference_date else ref_dates
    gap = years_apart(ours, theirs)
    return {
        "canopy_version": __version__,
        "map_dates": list(dict.fromkeys(ours)),
        "reference_dates": list(dict.fromkeys(theirs)),
        "date_gap_years": None if gap is None else round(gap, 2) + 0.0,
        "bootstrap": {
            "level": LEVEL, "replicates": options.replicates, "seed": options.seed,
            "block_m": round(side_m, 2), "blocks_with_data": blocks,
        },
    }  # fmt: skip


def _date_note(facts: Mapping[str, Any]) -> str:
    gap = facts["date_gap_years"]
    if gap is None:
        unknown = [w for w, key in (("map", "map_dates"), ("reference", "reference_dates")) if not facts[key]]
        return f"the date gap is unknown: no date in the {' and the '.join(unknown) or 'tags'}"
    if abs(gap) < 0.05:
        return "the reference was taken at the time of the map's imagery"
    when = "after" if gap > 0 else "before"
    return f"the reference was taken {abs(gap):.1f} years {when} the map's imagery"


def _block_table(tally: Tally, site: np.ndarray, crs: np.ndarray, bounds: np.ndarray) -> pandas.DataFrame:
    """The table of blocks that have pixels, see `Evaluation.blocks`; `bounds` are (blocks, 4)."""
    import pandas

    used = tally.n_by_block > 0
    rows, site, crs, bounds = tally.whole.rows[used], site[used], crs[used], bounds[used]
    x, y = bounds[:, [0, 2]].mean(axis=1), bounds[:, [1, 3]].mean(axis=1)
    lon, lat = np.empty(len(x)), np.empty(len(x))
    for name in np.unique(crs):
        here = crs == name
        lon[here], lat[here] = transformer(str(name), "EPSG:4326").transform(x[here], y[here])
    table = pandas.DataFrame({"site": site, "crs": crs})
    table[["west", "south", "east", "north"]] = bounds
    n = rows[:, COLUMN["n"]]
    table["lon"], table["lat"], table["n"] = lon, lat, n.astype(np.int64)
    for name, field in (("map_mean_m", "p"), ("reference_mean_m", "r"), ("bias_m", "e"), ("mae_m", "ae")):
        table[name] = rows[:, COLUMN[field]] / n
    return table


# ---- GEDI and plots -------------------------------------------------------------------------------
def _against_samples(
    heights: HeightMap, reference: Any, kind: str, options: Options, progress: Progress | None
) -> Evaluation:
    import pandas

    if isinstance(reference, str | Path) and Path(reference).suffix.lower() in RASTERS:
        raise InputError("a raster, not a table", where=reference, remedy="use --kind chm")
    if options.image is not None:
        raise InputError(
            "an image", where="--image", expected="a raster as the reference: no map is drawn of a table"
        )
    samples = load_samples(kind, reference, options.column, options.radius_m, options.layer)
    # RH98 stands beside the 98th percentile of the disc's pixels.
    percent = "".join(c for c in samples.column if c.isdigit()) or "98"
    stat = options.stat or (f"p{int(percent)}" if kind == "gedi" else "mean")
    strata = sample_strata(samples, options.by, options.dem, own_grid(heights))
    values = pool_map(heights, samples, stat, progress)
    seen = np.isfinite(values)
    if not seen.any():
        raise InputError(
            "no sample lies on the map's valid pixels", where=f"{heights.name}, {samples.name}",
            expected="heights of the same place",
        )  # fmt: skip
    floor = options.floor or 0.0
    table = pandas.DataFrame(
        {"lon": samples.lon, "lat": samples.lat, "reference_m": samples.height_m, "map_m": values}
    )[seen].reset_index(drop=True)
    table[["reference_m", "map_m"]] = table[["reference_m", "map_m"]].mask(lambda x: x < floor, 0.0)
    lon, lat, theirs, ours = table.to_numpy().T
    blocks = block_samples(lon, lat, options.block_m)
    count = len(blocks.bounds)
    tally = Tally(count)
    cut = {by: (codes[seen], names) for by, (codes, names) in strata.items()}
    everything = np.ones(len(table), bool)
    tally.add(Matched(ours, theirs, everything, blocks.number, np.arange(count)), cut)
    absent = ABSENT_IN_SAMPLES | (dict.fromkeys(BOUNDED, _NO_INTERVAL) if heights.has_interval else {})
    overall, parts = tally.scores(
        {by: names for by, (_, names) in cut.items()}, replicates=options.replicates, seed=options.seed,
        side_m=blocks.side_m, absent=absent,
    )  # fmt: skip
    shape = "polygons" if samples.radius_m is None else f"discs of {2 * samples.radius_m:g} m"
    in_file = len(samples) + sum(samples.dropped.values())
    facts = {
        "map": _map_facts(heights),
        "reference": [{"name": samples.name, "sha256": _known_sha256(reference), "column": samples.column}],
        "rule": f"{stat} of the map's pixels over {shape}, of which at least 90 % are valid",
        "stat": stat,
        "floor_m": [floor],
        "samples": {"in_file": in_file, "with_height": len(samples), "scored": len(table)},
    } | _common_facts(options, heights.dates, samples.dates, blocks.side_m, count)
    notes = list(heights.notes)
    if samples.unit:
        notes.append(f"the heights of {samples.column} are in {samples.unit} and were converted to metres")
    notes += [f"{n} of {in_file} rows have {why} and were left out" for why, n in samples.dropped.items()]
    if len(table) < len(samples):
        off = len(samples) - len(table)
        notes.append(f"{off} of {len(samples)} samples lie off the map or on missing pixels")
    keep = np.sort(np.random.default_rng(0).permutation(len(table))[:_MOST_SAMPLES])
    return Evaluation(
        kind, overall, None, None, "footprints and plots are placed to metres: no shift is measured on them",
        parts, tally.joint,
        _block_table(tally, np.full(count, samples.name), np.full(count, blocks.crs), blocks.bounds),
        blocks.side_m, None, table.iloc[keep].reset_index(drop=True), facts, [*notes, _date_note(facts)],
    )  # fmt: skip
