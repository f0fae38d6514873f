"""Running a benchmark: predict every scene, pool the scores by group, say who has seen the place.

Predicting is handed in as a function, because evaluation knows GeoTIFFs and no models.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from canopy import __version__
from canopy.errors import CanopyError, InputError
from canopy.evaluation.benchmark_manifest import BenchmarkManifest, Leak
from canopy.evaluation.benchmark_scenes import Scene
from canopy.evaluation.compare import Options, score_rasters
from canopy.evaluation.heights import HeightSide
from canopy.evaluation.rasters import RasterPair
from canopy.evaluation.result import Evaluation
from canopy.evaluation.writing import write_results
from canopy.runtime import NoProgress, Progress, log

# (scene, path of the GeoTIFF to write)
Predict = Callable[[Scene, Path], None]


@dataclass(frozen=True)
class Judged:
    """A model as the tables name it. `names`: all that the leakage audit may know it by."""

    name: str
    sha256: str
    names: tuple[str, ...]


@dataclass(frozen=True, eq=False)
class GroupResult:
    """A group's scores, and what is known of the model and this ground (None: nothing)."""

    group: str
    scenes: int
    evaluation: Evaluation
    leak: Leak | None


@dataclass(eq=False)
class BenchmarkResult:
    """All groups of one model. `failed`: scene id -> why it could not be predicted."""

    manifest: BenchmarkManifest
    model: Judged
    groups: list[GroupResult] = field(default_factory=list)
    failed: dict[str, str] = field(default_factory=dict)


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

    Maps go to OUT/maps/HASH-VERSION/SCENE.tif, each group's scores and report to OUT/MODEL-HASH/GROUP/.
    `again` predicts what is there too. A scene that cannot be predicted is named in `failed` and the others
    go on. Raises InputError where a group has no scene left.
    """
    progress = progress or NoProgress()
    result = BenchmarkResult(manifest, model)
    folder = out / "maps" / f"{model.sha256[:16]}-{__version__}"
    maps = _predict_all(scenes, model, predict, folder, again, result.failed, progress)
    for name in manifest.groups:
        chosen = [scene for scene in scenes if scene.group == name]
        there = [scene for scene in chosen if scene.id in maps]
        if not chosen:
            continue
        if not there:
            raise InputError(
                f"no scene of group {name!r} could be predicted", where=manifest.name,
                expected=result.failed[chosen[0].id],
            )  # fmt: skip
        evaluation = score_group(there, maps, manifest, name, replicates, progress)
        write_results(evaluation, out / f"{slug(model.name)}-{model.sha256[:8]}" / name)
        leak = manifest.leak_of(model.names, name)
        result.groups.append(GroupResult(name, len(there), evaluation, leak))
    return result


def _predict_all(
    scenes: Sequence[Scene],
    model: Judged,
    predict: Predict,
    folder: Path,
    again: bool,
    failed: dict[str, str],
    progress: Progress,
) -> dict[str, Path]:
    """Scene id -> its map. Maps are kept by the model's hash and our version, so a second run only scores."""
    folder.mkdir(parents=True, exist_ok=True)
    unique = list({scene.id: scene for scene in scenes}.values())
    progress.start(len(unique), f"predicting with {model.name}")
    maps = {}
    for scene in unique:
        path = folder / f"{slug(scene.id)}.tif"
        try:
            if again or not path.exists():
                predict(scene, path)
            maps[scene.id] = path
        except CanopyError as error:
            failed[scene.id] = str(error)
            log.warning(f"{scene.id}: {error}")
        progress.advance()
    return maps


def score_group(
    scenes: Sequence[Scene],
    maps: dict[str, Path],
    manifest: BenchmarkManifest,
    name: str,
    replicates: int,
    progress: Progress,
) -> Evaluation:
    """One score over all scenes of a group, and one per site."""
    group = manifest.groups[name]
    options = Options(
        by=("site",), floor_m=manifest.reference.floor_m, shift=group.shift, replicates=replicates
    )
    facts: dict[str, Any] = {
        "benchmark": manifest.name, "group": name, "group_title": group.title, "scenes": len(scenes),
    }  # fmt: skip
    with ExitStack() as stack:
        pairs = []
        for scene in scenes:
            side = stack.enter_context(HeightSide.open(maps[scene.id]))
            truth = stack.enter_context(HeightSide.open(scene.reference, reference=True))
            pairs.append(RasterPair(side, truth, scene.site))
        return score_rasters(pairs, options, progress, facts)


def slug(text: str) -> str:
    """A text as a file name."""
    return "".join(c if c.isalnum() or c in "-_." else "_" for c in text).strip(".")[:80] or "_"


def audit_lines(result: BenchmarkResult) -> list[str]:
    """Who has seen the place, one line per group: first the model that was scored."""
    lines = []
    for part in result.groups:
        if part.leak is None:
            text = "unknown: the benchmark knows nothing of this model; read its card"
        else:
            text = f"{part.leak.seen}: {part.leak.why} ({part.leak.source})"
        lines.append(f"{part.group}: was {result.model.name} trained here? {text}")
    return lines
