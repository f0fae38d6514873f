"""`canopy.evaluate`: any height map against lidar rasters, GEDI shots or field plots."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from canopy.errors import InputError
from canopy.evaluation.blocks import BlockLayout
from canopy.evaluation.facts import (
    Options,
    raster_blocks,
    raster_facts,
    raster_notes,
    sample_blocks,
    sample_facts,
    sample_notes,
)
from canopy.evaluation.heights import HeightSide
from canopy.evaluation.pool import pool_map
from canopy.evaluation.rasters import RasterPair, tally_rasters
from canopy.evaluation.result import Evaluation, Samples, Stratum
from canopy.evaluation.samples import block_samples, load_gedi, load_plots, sample_strata
from canopy.evaluation.strata import stratifiers
from canopy.evaluation.tally import BOUNDED, Tally
from canopy.geo.paths import is_url
from canopy.runtime import Progress

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
    from canopy.evaluation.writing import check_folder, write_results

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
