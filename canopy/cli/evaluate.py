"""`canopy evaluate`: parse, call, print.

With --benchmark it joins the models and the judge, which do not know each other.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from canopy.cli.options import Json, Overwrite, Quiet, Verbose, print_json, refuse_given, takes_groups
from canopy.config import Settings, option
from canopy.errors import InputError
from canopy.evaluation.scores import Evaluation, Options, Score
from canopy.files import replacing
from canopy.inference.options import HELP_BACKEND, HELP_PRECISION

if TYPE_CHECKING:
    from canopy.evaluation.benchmark.run import BenchmarkResult, Judged, Predict
    from canopy.inference.backends import Choice
    from canopy.models.height import HeightModel


_HELP_MAP = "Height GeoTIFF, folder of tiles, or a published v1 or v2 map."
_HELP_REFERENCE = "Height raster (may be repeated), table of GEDI shots, or field plots."
_HELP_BENCHMARK = "Named benchmark: neon-test, sao-paulo, california, france, open-canopy, pack."
_PANEL = "Benchmarks"


class BenchmarkOptions(Settings):
    """What only --benchmark takes."""

    model: list[str] = option([], "Name or file; may be repeated. Default: default.", panel=_PANEL)
    data_dir: Path | None = option(
        None, "Folder of the benchmark's files; `canopy data get` fills it.", metavar="DIR", panel=_PANEL
    )
    group: list[str] = option([], "Only this group of the benchmark; repeat.", panel=_PANEL)
    device: str = option("auto", "auto, cpu, cuda or mps.", panel=_PANEL)
    backend: str = option("auto", HELP_BACKEND, panel=_PANEL)
    precision: str = option("auto", HELP_PRECISION, panel=_PANEL)


@takes_groups
def evaluate(
    context: typer.Context,
    map_: Annotated[str | None, typer.Argument(metavar="MAP.tif", help=_HELP_MAP)] = None,
    reference: Annotated[list[str] | None, typer.Option("--reference", help=_HELP_REFERENCE)] = None,
    out: Annotated[Path | None, typer.Option("-o", "--out", metavar="DIR", help="Folder to write.")] = None,
    *,
    options: Options,
    benchmark: Annotated[
        str | None, typer.Option("--benchmark", metavar="NAME", help=_HELP_BENCHMARK, rich_help_panel=_PANEL)
    ] = None,
    judged: BenchmarkOptions,
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
    from canopy.evaluation.evaluate import evaluate as score
    from canopy.runtime import progress_bar, setup_logging

    setup_logging(quiet, verbose)
    if benchmark is not None:
        rules = [name for name in Options.model_fields if name != "replicates"]
        refuse_given(context, *rules, where="--benchmark", because="a benchmark has rules of its own")
        if map_ is not None or reference:
            expected = "one or the other"
            raise InputError("a map and a benchmark together", where="--benchmark", expected=expected)
        raise typer.Exit(evaluate_benchmark(
            benchmark, judged, out, replicates=options.replicates, overwrite=overwrite, json_=json_,
            quiet=quiet,
        ))  # fmt: skip
    because = "only --benchmark NAME runs a model"
    refuse_given(context, *BenchmarkOptions.model_fields, where="evaluate", because=because)
    if map_ is None or not reference:
        missing = "MAP.tif" if map_ is None else "--reference"
        raise InputError("nothing to score" if map_ is None else "no reference", remedy=f"give {missing}")
    with progress_bar(quiet or json_) as progress:
        result = score(
            map_, reference, out=out, overwrite=overwrite, progress=progress, **options.model_dump()
        )
    if json_:
        print_json(result.to_dict())
    elif not quiet:
        print_scores(result)
        if out is not None:
            typer.echo(f"written to {out}")


def print_scores(result: Evaluation) -> None:
    """The scores as a table on stdout, then what must be known."""
    facts = result.provenance
    typer.echo(f"{facts['rule']}; {result.overall.n:,} {'pixels' if result.kind == 'chm' else 'samples'}")
    shift = result.shift
    if shift is not None and not shift["sure"]:
        typer.echo(f"no shift against the reference could be measured: {shift['note']}")
    elif shift is not None:
        typer.echo(f"the map lies {result.shift_words} the reference")
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
    name: str, judged: BenchmarkOptions, out: Path | None, *, replicates: int, overwrite: bool, json_: bool,
    quiet: bool,
) -> int:  # fmt: skip
    """Predict and score a benchmark with one or several models; print one table. Returns the exit code.

    Maps that an earlier run of the same model left are used again, unless `overwrite`. 0: done; 3: some
    scenes could not be predicted. Raises InputError for an unknown benchmark, model or group, or a
    folder that lacks its files.
    """
    from canopy.evaluation.benchmark.manifest import benchmark, scenes_of
    from canopy.evaluation.benchmark.run import append_rows, audit_lines, markdown, rows_of, run_benchmark
    from canopy.inference.backends import settle
    from canopy.models.registry import load_model
    from canopy.runtime import progress_bar

    manifest = benchmark(name)
    scenes = scenes_of(manifest, judged.data_dir, judged.group)
    loaded = [(given, load_model(given)) for given in judged.model or ["default"]]
    folder = out if out is not None else Path(f"benchmark-{name}")
    folder.mkdir(parents=True, exist_ok=True)
    results: list[BenchmarkResult] = []
    rows: list[dict[str, str]] = []
    runners = judged.backend, judged.precision, judged.device
    chosen = [settle(model, *runners) for _, model in loaded]
    for (given, model), choice in zip(loaded, chosen, strict=True):
        with progress_bar(quiet or json_) as progress:
            done = run_benchmark(
                manifest, scenes, judged_model(given, model, choice),
                predictor(model, choice, manifest.image_nodata), folder,
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
    from canopy.evaluation.benchmark.run import Judged

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
    from canopy.evaluation.benchmark.manifest import Scene
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
