"""`canopy evaluate`: parse, call, print.

With --benchmark it joins the models and the judge, which do not know each other.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from canopy.cli.options import Json, Overwrite, Quiet, Verbose, print_json, refuse_given
from canopy.files import replacing
from canopy.inference.options import HELP_BACKEND, HELP_PRECISION

if TYPE_CHECKING:
    from canopy.evaluation.benchmark import BenchmarkResult, Judged, Predict
    from canopy.evaluation.scores import Evaluation, Score
    from canopy.inference.backends import Choice
    from canopy.models.height import HeightModel


_HELP_MAP = "Height GeoTIFF, folder of tiles, or a published v1 or v2 map."
_HELP_REFERENCE = "Height raster (may be repeated), table of GEDI shots, or field plots."
_HELP_BY = (
    "site, height, cover, slope, a column, NAME=classes.tif, NAME=zones.gpkg:COLUMN; several with commas."
)
_HELP_STAT = "What a pixel, footprint or plot takes. Default: mean; for GEDI the column's percentile."
_HELP_FLOOR = "Heights below this count as 0 on both sides (NEON's height models: 2, or 0.667 m)."
_HELP_BENCHMARK = "Named benchmark: neon-test, sao-paulo, california, france, open-canopy, pack."
_HELP_DATA = "Folder of the benchmark's files; `canopy data get` fills it."
_SCORING = "Benchmarks"
_HELP_BLOCK = "Side of the blocks resampled for intervals, m. Default: up to 250 m, so that 25 are left."

Map = Annotated[str | None, typer.Argument(metavar="MAP.tif", help=_HELP_MAP)]
Reference = Annotated[list[str] | None, typer.Option("--reference", help=_HELP_REFERENCE)]
Kind = Annotated[
    str | None, typer.Option("--kind", metavar="chm|gedi|plots", help="Default: told from the file.")
]
By = Annotated[list[str] | None, typer.Option("--by", metavar="WAY,WAY", help=_HELP_BY)]
Out = Annotated[Path | None, typer.Option("-o", "--out", metavar="DIR", help="Folder to write.")]
Stat = Annotated[str | None, typer.Option("--stat", metavar="mean|max|p95", help=_HELP_STAT)]
FloorM = Annotated[float | None, typer.Option("--floor-m", help=_HELP_FLOOR)]
Sensor = Annotated[
    str | None, typer.Option("--sensor", help="The floor by NEON's lidar: gemini, riegl or galaxy.")
]
Column = Annotated[str | None, typer.Option("--column", help="Heights of a table, e.g. rh_98.")]
RadiusM = Annotated[
    float | None, typer.Option("--radius-m", help="Of plots that are points. Default 10; GEDI 12.5.")
]
Slope = Annotated[Path | None, typer.Option("--slope", help="Raster of slope in degrees.")]
Dem = Annotated[Path | None, typer.Option("--dem", help="Elevation raster, for slope.")]
Shift = Annotated[bool, typer.Option("--shift/--no-shift", help="Measure the shift.")]
BlockM = Annotated[float | None, typer.Option("--block-m", help=_HELP_BLOCK)]
Replicates = Annotated[int, typer.Option("--replicates", help="Of the bootstrap; 0: no intervals.")]
Seed = Annotated[int, typer.Option("--seed", help="Of the bootstrap.")]
Nodata = Annotated[float | None, typer.Option("--nodata", help="Missing in the map.")]
ReferenceNodata = Annotated[
    float | None, typer.Option("--reference-nodata", help="Missing in the reference.")
]
Band = Annotated[
    str | None, typer.Option("--band", metavar="N|NAME", help="The map's height band, if it has several.")
]
ReferenceBand = Annotated[
    str | None, typer.Option("--reference-band", metavar="N|NAME", help="The reference's, likewise.")
]
Layer = Annotated[str | None, typer.Option("--layer", help="Of a vector file with several (plots).")]
MapDate = Annotated[str | None, typer.Option("--map-date", help="2021, 2021-07 or 2021-07-04.")]
ReferenceDate = Annotated[str | None, typer.Option("--reference-date", help="Likewise.")]
Benchmark = Annotated[
    str | None, typer.Option("--benchmark", metavar="NAME", help=_HELP_BENCHMARK, rich_help_panel=_SCORING)
]
Model = Annotated[
    list[str] | None,
    typer.Option(
        "--model", help="Name or file; may be repeated. Default: default.", rich_help_panel=_SCORING
    ),
]
DataDir = Annotated[
    Path | None, typer.Option("--data-dir", metavar="DIR", help=_HELP_DATA, rich_help_panel=_SCORING)
]
Group = Annotated[
    list[str] | None,
    typer.Option("--group", help="Only this group of the benchmark; repeat.", rich_help_panel=_SCORING),
]
Device = Annotated[str, typer.Option("--device", help="auto, cpu, cuda or mps.", rich_help_panel=_SCORING)]
Backend = Annotated[str, typer.Option("--backend", help=HELP_BACKEND, rich_help_panel=_SCORING)]
Precision = Annotated[str, typer.Option("--precision", help=HELP_PRECISION, rich_help_panel=_SCORING)]


_OF_MAPS = (
    "kind", "by", "stat", "floor_m", "sensor", "column", "radius_m", "slope", "dem", "shift", "block_m",
    "seed", "nodata", "reference_nodata", "band", "reference_band", "layer", "map_date", "reference_date",
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
    band: Band = None,
    reference_band: ReferenceBand = None,
    layer: Layer = None,
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
    from canopy.evaluation.evaluate import evaluate as score
    from canopy.runtime import progress_bar, setup_logging

    setup_logging(quiet, verbose)
    if benchmark is not None:
        refuse_given(context, *_OF_MAPS, where="--benchmark", because="a benchmark has rules of its own")
        _refuse_map(map_, reference)

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
        result = score(
            map_, reference, out=out, overwrite=overwrite, progress=progress, kind=kind, by=ways, stat=stat,
            floor_m=floor_m, sensor=sensor, column=column, radius_m=radius_m, slope=slope, dem=dem,
            shift=shift, block_m=block_m, replicates=replicates, seed=seed, nodata=nodata,
            reference_nodata=reference_nodata, band=band, reference_band=reference_band, layer=layer,
            map_date=map_date, reference_date=reference_date,
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
    if shift is not None and not shift["sure"]:
        typer.echo(f"no shift against the reference could be measured: {shift['note']}")
    elif shift is not None:
        # Adding 0 turns the -0.0 of a rounded trifle into 0.0.
        east, north = (f"{round(x, 2) + 0.0:+.2f} m" for x in (shift["east_m"], shift["north_m"]))
        typer.echo(f"the map lies {east} east, {north} north of the reference")
    head = ("", "value", "95 % interval", "shift undone" if result.corrected else "")
    rows = [
        (name, _value(score), _interval(score), _value(result.corrected[name]) if result.corrected else "")
        for name, score in result.overall.metrics.items()
    ]
    _print_table(head, rows)
    bins = [
        (f"{name} m", *(_value(scores[k]) for k in ("n", "bias_m", "mae_m")))
        for name, scores in result.overall.by_height.items()
        if scores["n"].value
    ]
    _print_table(("by reference height", "n", "bias_m", "mae_m"), bins)
    names = ("n", "mae_m", "bias_m", "rmse_m", "r2")
    for by, parts in result.strata.items():
        parts_rows = [(part, *(_value(scores[name]) for name in names)) for part, scores in parts.items()]
        _print_table((f"by {by}", *names), parts_rows)
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


def evaluate_benchmark(
    name: str,
    models: Sequence[str],
    data_dir: Path | None,
    out: Path | None,
    *,
    groups: Sequence[str] = (),
    device: str = "auto",
    backend: str = "auto",
    precision: str = "auto",
    replicates: int = 1000,
    overwrite: bool = False,
    json_: bool = False,
    quiet: bool = False,
) -> int:
    """Predict and score a benchmark with one or several models; print one table. Returns the exit code.

    Maps that an earlier run of the same model left are used again, unless `overwrite`. 0: done; 3: some
    scenes could not be predicted. Raises InputError for an unknown benchmark, model or group, or a
    folder that lacks its files.
    """
    from canopy.evaluation.benchmark import (
        append_rows,
        audit_lines,
        benchmark,
        markdown,
        rows_of,
        run_benchmark,
        scenes_of,
    )
    from canopy.inference.backends import settle
    from canopy.models.registry import load_model
    from canopy.runtime import progress_bar

    manifest = benchmark(name)
    scenes = scenes_of(manifest, data_dir, tuple(groups))
    loaded = [(given, load_model(given)) for given in models or ("default",)]
    folder = out if out is not None else Path(f"benchmark-{name}")
    folder.mkdir(parents=True, exist_ok=True)
    results: list[BenchmarkResult] = []
    rows: list[dict[str, str]] = []
    chosen = [settle(model, backend, precision, device) for _, model in loaded]
    for (given, model), choice in zip(loaded, chosen, strict=True):
        judged = judged_model(given, model, choice)
        with progress_bar(quiet or json_) as progress:
            done = run_benchmark(
                manifest, scenes, judged, predictor(model, choice, manifest.image_nodata), folder,
                replicates=replicates, again=overwrite, progress=progress,
            )  # fmt: skip
        results.append(done)
        rows = append_rows(folder / "results.csv", rows_of(done))
        with replacing(folder / "results.md") as part:
            part.write_text(markdown(manifest, rows), encoding="utf-8")
    failed = {f"{r.model.name}: {scene}": why for r in results for scene, why in r.failed.items()}
    if json_:
        print_json(_facts(results, rows, failed, folder))
    elif not quiet:
        shas = {result.model.sha256 for result in results}
        table = markdown(manifest, [row for row in rows if row["model_sha256"] in shas])
        typer.echo(table.split("\nTrained here?")[0])
        for line in dict.fromkeys(line for result in results for line in audit_lines(result)):
            typer.echo(line)
        typer.echo(f"{folder / 'results.md'}: the table; a report.html per model and group beside it")
    for scene, why in failed.items():
        typer.echo(f"canopy: {scene}: {why}", err=True)
    return 3 if failed else 0


def judged_model(given: str, model: HeightModel, choice: Choice) -> Judged:
    """How tables and the audit name a model: as it was asked for; a file by its stem.

    In low precision it is another model: its maps and scores lie apart.
    """
    from canopy.evaluation.benchmark import Judged

    card = str(model.card.get("name", "")) if model.card else ""
    stem = Path(given).stem if Path(given).suffix else given
    names = tuple(dict.fromkeys(name for name in (given, stem, card) if name))
    sha256 = model.sha256 or "unsaved"
    if choice.precision != "fp32":
        sha256 = f"{choice.precision}-{choice.quantised_sha256 or sha256}"
        stem = f"{stem}-{choice.precision}"
    return Judged(stem, sha256, names)


def predictor(model: HeightModel, choice: Choice, nodata: float | None) -> Predict:
    """A function that maps one scene with the real inference."""
    from canopy.evaluation.benchmark import Scene
    from canopy.evaluation.opening import open_heights
    from canopy.geo.area import AOI
    from canopy.geo.crs import to_crs
    from canopy.inference.options import OneMapOptions
    from canopy.inference.predict import prepare

    def predict(scene: Scene, path: Path) -> None:
        area = None
        if not scene.whole_image:
            with open_heights(scene.reference) as reference:
                area = AOI(reference.outline, to_crs("EPSG:4326"), True)
        options = OneMapOptions(
            images=tuple(str(image) for image in scene.images), imagery=scene.imagery,
            out=str(path), nodata=nodata, overwrite=True, workers=1,
            backend=choice.backend, precision=choice.precision, device=choice.device,
        )  # fmt: skip
        prepare(options, area=area, model=model).run()

    return predict


def _facts(
    results: Sequence[BenchmarkResult], rows: Sequence[dict[str, str]], failed: dict[str, str], folder: Path
) -> dict[str, Any]:
    """For --json."""
    shas = {result.model.sha256 for result in results}
    return {
        "benchmark": results[0].manifest.name,
        "folder": str(folder),
        "groups": {
            f"{result.model.name}/{group}": evaluation.to_dict()
            | {"trained_here": leak.model_dump() if (leak := result.leak(group)) else None}
            for result in results
            for group, evaluation in result.groups.items()
        },
        "table": [row for row in rows if row["model_sha256"] in shas],
        "failed": failed,
    }
