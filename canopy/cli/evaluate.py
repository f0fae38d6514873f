"""`canopy evaluate`: parse, call, print."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import typer

from canopy.cli.common import Json, Overwrite, Quiet, Verbose, print_json, refuse_given
from canopy.cli.evaluate_options import (
    Backend,
    Benchmark,
    BlockM,
    By,
    Column,
    DataDir,
    Dem,
    Device,
    FloorM,
    Group,
    Kind,
    Map,
    MapDate,
    Model,
    Nodata,
    Out,
    Precision,
    RadiusM,
    Reference,
    ReferenceDate,
    ReferenceNodata,
    Replicates,
    Seed,
    Sensor,
    Shift,
    Slope,
    Stat,
)

if TYPE_CHECKING:
    from canopy.evaluation.result import Evaluation, Score

_OF_MAPS = (
    "kind", "by", "stat", "floor_m", "sensor", "column", "radius_m", "slope", "dem", "shift", "block_m",
    "seed", "nodata", "reference_nodata", "map_date", "reference_date",
)  # fmt: skip
_OF_BENCHMARKS = ("model", "data_dir", "group", "device", "backend", "precision")


def evaluate(
    context: typer.Context,
    map_: Map = None,
    reference: Reference = None,
    kind: Kind = None,
    by: By = None,
    out: Out = None,
    stat: Stat = None,
    floor_m: FloorM = None,
    sensor: Sensor = None,
    column: Column = None,
    radius_m: RadiusM = None,
    slope: Slope = None,
    dem: Dem = None,
    shift: Shift = True,
    block_m: BlockM = None,
    replicates: Replicates = 1000,
    seed: Seed = 0,
    nodata: Nodata = None,
    reference_nodata: ReferenceNodata = None,
    map_date: MapDate = None,
    reference_date: ReferenceDate = None,
    benchmark: Benchmark = None,
    model: Model = None,
    data_dir: DataDir = None,
    group: Group = None,
    device: Device = "auto",
    backend: Backend = "auto",
    precision: Precision = "auto",
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
        refuse_given(context, *_OF_MAPS, where="--benchmark", because="a benchmark has rules of its own")
        _refuse_map(map_, reference)
        from canopy.cli.evaluate_benchmark import evaluate_benchmark

        raise typer.Exit(evaluate_benchmark(
            benchmark, model or (), data_dir, out, groups=group or (), device=device, backend=backend,
            precision=precision, replicates=replicates, overwrite=overwrite, json_=json_, quiet=quiet,
        ))  # fmt: skip
    refuse_given(context, *_OF_BENCHMARKS, where="evaluate", because="only --benchmark NAME runs a model")
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
    if shift is not None and not shift.sure:
        typer.echo(f"no shift against the reference could be measured: {shift.note or 'weak fit'}")
    elif shift is not None:
        # Adding 0 turns the -0.0 of a rounded trifle into 0.0.
        east, north = (f"{round(x, 2) + 0.0:+.2f} m" for x in (shift.east_m, shift.north_m))
        typer.echo(f"the map lies {east} east, {north} north of the reference")
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
