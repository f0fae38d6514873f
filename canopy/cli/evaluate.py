"""`canopy evaluate`: parse, call, print."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from canopy.cli.common import Json, Overwrite, Quiet, Verbose, print_json

if TYPE_CHECKING:
    from canopy.evaluation.result import Evaluation, Score

_HELP_MAP = "Height GeoTIFF, folder of tiles, or a published v1 or v2 map."
_HELP_REFERENCE = "Height raster (may be repeated), table of GEDI shots, or field plots."
_HELP_BY = (
    "site, height, cover, slope, a column, NAME=classes.tif, NAME=zones.gpkg:COLUMN; several with commas."
)
_HELP_STAT = "What a pixel, footprint or plot takes. Default: mean; for GEDI the column's percentile."
_HELP_FLOOR = "Heights below this count as 0 on both sides (NEON's height models: 2, or 0.667 m)."
_HELP_BENCHMARK = "Named benchmark: neon-test, sao-paulo, california, france, open-canopy, pack."
_HELP_DATA = "Folder of the benchmark's files; `canopy data get` fills it."
_PANEL = "Benchmarks"
_HELP_BLOCK = "Side of the blocks resampled for intervals, m. Default: up to 250 m, so that 25 are left."


def evaluate(
    map_: Annotated[str | None, typer.Argument(metavar="[MAP.tif]", help=_HELP_MAP)] = None,
    reference: Annotated[list[str] | None, typer.Option("--reference", help=_HELP_REFERENCE)] = None,
    kind: Annotated[
        str | None, typer.Option("--kind", metavar="chm|gedi|plots", help="Default: told from the file.")
    ] = None,
    by: Annotated[list[str] | None, typer.Option("--by", metavar="WAY,WAY", help=_HELP_BY)] = None,
    out: Annotated[Path | None, typer.Option("-o", "--out", metavar="DIR", help="Folder to write.")] = None,
    stat: Annotated[str | None, typer.Option("--stat", metavar="mean|max|p95", help=_HELP_STAT)] = None,
    floor_m: Annotated[float | None, typer.Option("--floor-m", help=_HELP_FLOOR)] = None,
    sensor: Annotated[
        str | None, typer.Option("--sensor", help="The floor by NEON's lidar: gemini, riegl or galaxy.")
    ] = None,
    column: Annotated[str | None, typer.Option("--column", help="Heights of a table, e.g. rh_98.")] = None,
    radius_m: Annotated[
        float | None, typer.Option("--radius-m", help="Of plots that are points. Default 10; GEDI 12.5.")
    ] = None,
    slope: Annotated[Path | None, typer.Option("--slope", help="Raster of slope in degrees.")] = None,
    dem: Annotated[Path | None, typer.Option("--dem", help="Elevation raster, for slope.")] = None,
    shift: Annotated[bool, typer.Option("--shift/--no-shift", help="Measure the shift.")] = True,
    block_m: Annotated[float | None, typer.Option("--block-m", help=_HELP_BLOCK)] = None,
    replicates: Annotated[
        int, typer.Option("--replicates", help="Of the bootstrap; 0: no intervals.")
    ] = 1000,
    seed: Annotated[int, typer.Option("--seed", help="Of the bootstrap.")] = 0,
    nodata: Annotated[float | None, typer.Option("--nodata", help="Missing in the map.")] = None,
    reference_nodata: Annotated[
        float | None, typer.Option("--reference-nodata", help="Missing in the reference.")
    ] = None,
    map_date: Annotated[str | None, typer.Option("--map-date", help="2021, 2021-07 or 2021-07-04.")] = None,
    reference_date: Annotated[str | None, typer.Option("--reference-date", help="Likewise.")] = None,
    benchmark: Annotated[
        str | None, typer.Option("--benchmark", metavar="NAME", help=_HELP_BENCHMARK, rich_help_panel=_PANEL)
    ] = None,
    model: Annotated[
        list[str] | None,
        typer.Option(
            "--model", help="Name or file; may be repeated. Default: default.", rich_help_panel=_PANEL
        ),
    ] = None,
    data_dir: Annotated[
        Path | None, typer.Option("--data-dir", metavar="DIR", help=_HELP_DATA, rich_help_panel=_PANEL)
    ] = None,
    group: Annotated[
        list[str] | None,
        typer.Option("--group", help="Only this group of the benchmark; repeat.", rich_help_panel=_PANEL),
    ] = None,
    device: Annotated[
        str, typer.Option("--device", help="auto, cpu, cuda or mps.", rich_help_panel=_PANEL)
    ] = "auto",
    overwrite: Overwrite = False,
    json_: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Score any canopy height map against lidar, GEDI shots or field plots, in any CRS and pixel size.

    Both sides are brought onto the coarser grid (area-weighted). Prints the scores with 95 % intervals; with
    -o also writes metrics.json, CSV tables and report.html.

    Examples:

      canopy evaluate chm.tif --reference lidar_chm.tif -o report --by height,slope --dem dem.tif

      canopy evaluate chm.tif --reference shots.parquet --by beam_type

      canopy evaluate published/v2 --reference plots.gpkg --column top_height --stat p95

      canopy evaluate --benchmark pack --model default --model first.safetensors --data-dir ../shared/data
    """
    from canopy.errors import InputError
    from canopy.evaluation.compare import evaluate as judge
    from canopy.runtime import progress_bar, setup_logging

    setup_logging(quiet, verbose)
    if benchmark is not None:
        _refuse_map(map_, reference)
        from canopy.cli.evaluate_benchmark import evaluate_benchmark

        code = evaluate_benchmark(
            benchmark, model or (), data_dir, out, groups=group or (), device=device, replicates=replicates,
            overwrite=overwrite, json_=json_, quiet=quiet,
        )  # fmt: skip
        raise typer.Exit(code)
    if model or data_dir or group:
        raise InputError("--model, --data-dir and --group go with a benchmark", remedy="add --benchmark NAME")
    if map_ is None or not reference:
        missing = "MAP.tif" if map_ is None else "--reference"
        raise InputError("nothing to score" if map_ is None else "no reference", remedy=f"give {missing}")
    ways = tuple(word.strip() for words in by or () for word in words.split(",") if word.strip())
    with progress_bar(quiet or json_) as progress:
        result = judge(
            map_, reference, out=out, overwrite=overwrite, progress=progress, kind=kind, by=ways, stat=stat,
            floor_m=floor_m, sensor=sensor, column=column, radius_m=radius_m, slope=slope, dem=dem,
            shift=shift, block_m=block_m, replicates=replicates, seed=seed, nodata=nodata,
            reference_nodata=reference_nodata, map_date=map_date, reference_date=reference_date,
        )  # fmt: skip
    if json_:
        print_json(result.to_dict())
    elif not quiet:
        print_scores(result)
        if out is not None:
            typer.echo(f"written to {out}")


def _refuse_map(map_: str | None, reference: list[str] | None) -> None:
    from canopy.errors import InputError

    if map_ is not None or reference:
        raise InputError("a map and a benchmark together", where="--benchmark", expected="one or the other")


def print_scores(result: Evaluation) -> None:
    """The scores as a table on stdout, then what must be known."""
    facts = result.provenance
    typer.echo(f"{facts['rule']}; {result.overall.n:,} {'pixels' if result.kind == 'chm' else 'samples'}")
    shift = result.shift
    if shift is not None:
        sure = "" if shift.sure else " (not sure)"
        east, north = f"{shift.east_m:+.2f} m east", f"{shift.north_m:+.2f} m north"
        typer.echo(f"the map lies {east}, {north} of the reference{sure}")
    head = ("", "value", "95 % interval", "shift undone" if result.corrected else "")
    rows = [
        (name, _value(score), _interval(score), _value(result.corrected[name]) if result.corrected else "")
        for name, score in result.overall.metrics.items()
    ]
    _print_table(head, rows)
    bins = [
        (f"{b.name} m", *(_value(b.scores[k]) for k in ("n", "bias_m", "mae_m")))
        for b in result.overall.by_height
        if b.scores["n"].value
    ]
    _print_table(("by reference height", "n", "bias_m", "mae_m"), bins)
    for by in dict.fromkeys(s.by for s in result.strata):
        parts = [s for s in result.strata if s.by == by]
        names = ("n", "mae_m", "bias_m", "rmse_m", "r2")
        _print_table(
            (f"by {by}", *names), [(p.name, *(_value(p.scores[name]) for name in names)) for p in parts]
        )
    for note in result.notes:
        typer.echo(f"note: {note}")


def _print_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    wide = [max(len(row[i]) for row in (head, *rows)) for i in range(len(head))]
    typer.echo()
    for row in (head, *rows):
        first, *rest = row
        cells = [first.ljust(wide[0]), *(cell.rjust(w) for cell, w in zip(rest, wide[1:], strict=True))]
        typer.echo("  ".join(cells).rstrip())


def _value(score: Score) -> str:
    if score.value is None:
        return "-"
    return f"{score.value:,}" if isinstance(score.value, int) else f"{score.value:.3f}"


def _interval(score: Score) -> str:
    if score.ci95 is None or isinstance(score.value, int):
        return ""
    return f"{score.ci95[0]:.3f} to {score.ci95[1]:.3f}"
