"""`canopy evaluate --benchmark`: joins the models and the judge, which do not know each other."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from canopy.cli.common import print_json
from canopy.files import replacing

if TYPE_CHECKING:
    from canopy.evaluation.benchmark import BenchmarkResult, Judged, Predict
    from canopy.inference.backends.choose import Choice
    from canopy.models.height import HeightModel


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
    from canopy.evaluation.benchmark import audit_lines, run_benchmark
    from canopy.evaluation.benchmark_manifest import benchmark
    from canopy.evaluation.benchmark_scenes import scenes_of
    from canopy.evaluation.benchmark_table import append_rows, markdown, rows_of
    from canopy.inference.backends.choose import settle
    from canopy.runtime import progress_bar
    from canopy.sources.weights import load_model

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
    from canopy.evaluation.benchmark_scenes import Scene
    from canopy.evaluation.products import open_product
    from canopy.geo.aoi import AOI
    from canopy.geo.crs import to_crs
    from canopy.inference.job import prepare
    from canopy.inference.request import Request

    def predict(scene: Scene, path: Path) -> None:
        area = None
        if not scene.whole_image:
            with open_product(scene.reference) as reference:
                area = AOI(reference.outline, to_crs("EPSG:4326"), True)
        request = Request(
            images=tuple(str(image) for image in scene.images), imagery=scene.imagery, area=area, model=model,
            out=path, nodata=nodata, overwrite=True, workers=1, **choice.names,  # type: ignore[arg-type]
        )  # fmt: skip
        prepare(request).run()

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
            f"{result.model.name}/{part.group}": part.evaluation.to_dict()
            | {"trained_here": part.leak.model_dump() if part.leak else None}
            for result in results
            for part in result.groups
        },
        "table": [row for row in rows if row["model_sha256"] in shas],
        "failed": failed,
    }
