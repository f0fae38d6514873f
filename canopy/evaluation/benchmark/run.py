"""Running a benchmark: every scene is predicted, scores are pooled by group, rows are added to a table.

Predicting is handed in as a function, because evaluation knows GeoTIFFs and no models.
"""

from __future__ import annotations

import datetime
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from canopy import __version__
from canopy.errors import CanopyError, DataError, InputError
from canopy.evaluation.benchmark.manifest import METRICS, BenchmarkManifest, Leak, Scene
from canopy.evaluation.evaluate import score_rasters
from canopy.evaluation.opening import open_heights
from canopy.evaluation.pixels import RasterPair
from canopy.evaluation.report.pages import render, wide_row, write_csv, write_results
from canopy.evaluation.scores import Evaluation, Options
from canopy.runtime import NoProgress, Progress, log

# (scene, path of the GeoTIFF to write)
Predict = Callable[[Scene, Path], None]


@dataclass(frozen=True)
class Judged:
    """A model as the tables name it. `names`: all that the leakage audit may know it by."""

    name: str
    sha256: str
    names: tuple[str, ...]


@dataclass(eq=False)
class BenchmarkResult:
    """All groups of one model. `failed`: scene id -> why it could not be predicted."""

    manifest: BenchmarkManifest
    model: Judged
    groups: dict[str, Evaluation] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)

    def leak(self, group: str) -> Leak | None:
        """What is known of the model and a group's ground."""
        return self.manifest.leak_of(self.model.names, group)


def run_benchmark(
    manifest: BenchmarkManifest,
    scenes: Sequence[Scene],
    model: Judged,
    predict: Predict,
    out: Path,
    *,
    replicates: int = 1000,
    again: bool = False,
    progress: Progress | None = None,
) -> BenchmarkResult:
    """Predict what is not yet there and score it by group.

    Maps go to OUT/maps/HASH-VERSION/SCENE.tif, so that a second run only scores; each group's scores and
    report to OUT/MODEL-HASH/GROUP/. `again` predicts what is there too. A scene that cannot be predicted is
    named in `failed` and the others go on. Raises InputError where a group has no scene left.
    """
    progress = progress or NoProgress()
    result = BenchmarkResult(manifest, model)
    folder = out / "maps" / f"{model.sha256[:16]}-{__version__}"
    folder.mkdir(parents=True, exist_ok=True)
    unique = {scene.id: scene for scene in scenes}
    progress.start(len(unique), f"predicting with {model.name}")
    maps = {}
    for scene in unique.values():
        path = folder / f"{slug(scene.id)}.tif"
        try:
            if again or not path.exists():
                predict(scene, path)
            maps[scene.id] = path
        except CanopyError as error:
            result.failed[scene.id] = str(error)
            log.warning(f"{scene.id}: {error}")
        progress.advance()
    for name in dict.fromkeys(scene.group for scene in scenes):
        chosen = [scene for scene in scenes if scene.group == name]
        there = [scene for scene in chosen if scene.id in maps]
        if not there:
            raise InputError(
                f"no scene of group {name!r} could be predicted", where=manifest.name,
                expected=result.failed[chosen[0].id],
            )  # fmt: skip
        floor_m, group = manifest.floor_m, manifest.groups[name]
        options = Options(by=["site"], floor_m=floor_m, shift=group.shift, replicates=replicates)
        facts = {"benchmark": manifest.name, "group": name, "group_title": group.title, "scenes": len(there)}
        with ExitStack() as stack:
            pairs = [
                RasterPair(
                    stack.enter_context(open_heights(maps[scene.id])),
                    stack.enter_context(
                        open_heights(scene.reference, reference=True, unit_m=manifest.unit_m)
                    ),
                    scene.site,
                )
                for scene in there
            ]
            result.groups[name] = score_rasters(pairs, options, progress, facts)
        write_results(result.groups[name], out / f"{slug(model.name)}-{model.sha256[:8]}" / name)
    return result


def slug(text: str) -> str:
    """A text as a file name."""
    return "".join(c if c.isalnum() or c in "-_." else "_" for c in text).strip(".")[:80] or "_"


def audit_lines(result: BenchmarkResult) -> list[str]:
    """Who has seen the place, one line per group: first the model that was scored."""
    lines = []
    for group in result.groups:
        text, leak = "unknown: the benchmark knows nothing of this model; read its card", result.leak(group)
        if leak is not None:
            text = f"{leak.seen}: {leak.why} ({leak.source})"
        lines.append(f"{group}: was {result.model.name} trained here? {text}")
    return lines


# ---- the table ------------------------------------------------------------------------------------
KEY = ["benchmark", "group", "site", "model", "model_sha256", "canopy_version"]
ALL_SITES = "all"
COLUMNS = [
    *KEY, "scored", "scenes", "trained_here",
    *(c for m in METRICS for c in ((m,) if m == "n" else (m, f"{m}_low95", f"{m}_high95"))),
]  # fmt: skip
SHORT = {
    "n": "pixels", "mae_m": "MAE m", "rmse_m": "RMSE m", "bias_m": "bias m", "r2": "R2",
    "block_r2": "block-R2", "edge_error": "edge", "nmae": "nMAE",
    "cover_iou_2m": "IoU 2 m", "cover_iou_5m": "IoU 5 m",
    "p95_error_m": "p95 error m", "nmae_plus1": "nMAE (1 + h)",
}  # fmt: skip


def rows_of(result: BenchmarkResult, today: str | None = None) -> list[dict[str, Any]]:
    """One row per group and per site of it, all columns of results.csv."""
    rows = []
    for group, evaluation in result.groups.items():
        leak = result.leak(group)
        facts = {
            "benchmark": result.manifest.name,
            "group": group,
            "site": ALL_SITES,
            "model": result.model.name,
            "model_sha256": result.model.sha256,
            "canopy_version": __version__,
            "scored": today or datetime.date.today().isoformat(),
            "scenes": evaluation.provenance["scenes"],
            "trained_here": leak.seen if leak else "unknown",
        }
        rows.append(facts | wide_row(evaluation.overall.metrics, METRICS))
        rows += [
            facts | {"site": name, "scenes": ""} | wide_row(scores.metrics, METRICS)
            for name, scores in evaluation.strata["site"].items()
        ]
    return rows


def append_rows(path: Path, rows: Sequence[Mapping[str, Any]]) -> list[dict[str, str]]:
    """Add rows to results.csv; a row of the same model, group and version takes the old one's place.

    Returns all rows, as texts. Raises DataError for a table of another layout.
    """
    import pandas

    new = pandas.DataFrame(list(rows), columns=COLUMNS, dtype=object)
    merged = new.map(lambda x: "" if x is None else f"{x:.6g}" if isinstance(x, float) else str(x))
    if path.is_file():
        kept = pandas.read_csv(path, dtype=str, keep_default_na=False)
        if list(kept.columns) != COLUMNS:
            remedy = "move it away, or choose another -o"
            raise DataError("a table of another layout", where=path, remedy=remedy)
        merged = pandas.concat([kept, merged]).drop_duplicates(KEY, keep="last")
    write_csv(path, merged)
    return [{str(k): str(v) for k, v in row.items()} for row in merged.to_dict("records")]


def markdown(manifest: BenchmarkManifest, rows: Sequence[Mapping[str, str]]) -> str:
    """The table for people: groups, models one under the other, published scores, who has seen the place."""
    shown = []
    for name, group in manifest.groups.items():
        here = [row for row in rows if row["benchmark"] == manifest.name and row["group"] == name]
        sites = dict.fromkeys([ALL_SITES, *(row["site"] for row in here)])
        for site in sites if group.per_site and len(sites) > 2 else [ALL_SITES]:
            title = f"{name}: {group.title}" if site == ALL_SITES else f"… {site}"
            shown += [(title, row) for row in here if row["site"] == site]
    found = [m for entry in manifest.published for m in entry.scores]
    return render(
        "results.md.j2", manifest=manifest, rows=shown, short=SHORT,
        metrics=[m for m in manifest.metrics if m != "n"],
        published=dict.fromkeys([m for m in manifest.metrics if m in found] + found),
    )  # fmt: skip
