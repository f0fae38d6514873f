"""Named benchmarks: one strict YAML file each in `data_manifests/benchmarks`.

A benchmark says which images are predicted and which heights they are scored by, what is left out, which
scores others have published on it, and which models have seen the place in training. It never holds pixels.
Running one predicts every scene, pools the scores by group, and adds rows to a table. Predicting is handed in
as a function, because evaluation knows GeoTIFFs and no models.
"""

from __future__ import annotations

import csv
import datetime
import fnmatch
import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, model_validator

from canopy import __version__
from canopy.config import Named, Settings, load_manifest, manifest_names
from canopy.errors import CanopyError, DataError, InputError
from canopy.evaluation.evaluate import score_rasters
from canopy.evaluation.maps import open_heights
from canopy.evaluation.pixels import RasterPair
from canopy.evaluation.report import render, wide_row, write_csv, write_results
from canopy.evaluation.scores import Evaluation, Options
from canopy.labels.catalog import known_labels, label_source
from canopy.labels.names import read_name
from canopy.runtime import NoProgress, Progress, log

METRICS = (
    "n", "mae_m", "rmse_m", "bias_m", "r2", "r", "nmae", "nmae_plus1", "block_r2", "edge_error",
    "edge_error_symmetric", "cover_iou_2m", "cover_iou_3m", "cover_iou_5m", "cover_precision_2m",
    "cover_recall_2m", "cover_f1_2m", "p50_error_m", "p95_error_m", "p98_error_m", "interval_coverage",
    "interval_width_m",
)  # fmt: skip


def _known_metric(name: str) -> str:
    if name not in METRICS:
        raise ValueError(f"unknown metric {name!r}; known: {', '.join(METRICS)}")
    return name


Metric = Annotated[str, AfterValidator(_known_metric)]
Text = Annotated[str, Field(min_length=1)]


class Rows(Settings):
    """Rows of a pack's manifest.csv: of a split (train, val, test, test_hard), and of a kind or not of it.

    Kinds are neon (plots) and other (tiles).
    """

    split: str
    kind: str | None = None
    not_kind: str | None = None


class Group(Settings):
    """Scenes that are pooled into one score.

    Attributes:
        rows: of a pack; None: every reference file of the benchmark whose name matches `match`.
        per_site: also show every site as a line of its own.
        shift: whether to measure a shift (not on plots of a few pixels).
    """

    title: str
    rows: Rows | None = None
    match: re.Pattern[str] | None = None
    per_site: bool = False
    shift: bool = True


class Reference(Settings):
    """Where the measured heights come from.

    Attributes:
        labels: a manifest of data_manifests/labels; None: files that come with the benchmark.
        product, sites, datetime: of that source; points need `canopy data chm` first.
        floor_m: heights below count as 0 on both sides; None: what the reference's own tags say.
    """

    labels: str | None
    product: str | None = None
    sites: tuple[str, ...] = ()
    floor_m: float | None = Field(default=None, ge=0, le=10)
    datetime: str | None = None


class Published(Settings):
    """Scores that others have published, named and measured as ours, to stand beside them.

    Attributes:
        measured_on: what exactly they were measured on. source: where they were read.
        comparable: whether scenes and rules are the same as here. note: what else a reader must know.
    """

    model: str
    scores: dict[Metric, float] = Field(min_length=1)
    measured_on: str
    source: Text
    comparable: bool = False
    note: str = ""


class Leak(Settings):
    """Whether a model saw the place in training.

    Attributes:
        models: patterns of model names (a card's `name`, or what --model was given).
        seen: yes (trained on it), near (on other tiles of the same sites), no, unknown.
        why: one sentence. groups: to which groups it applies; empty: all. source: where this was read.
    """

    models: tuple[str, ...] = Field(min_length=1)
    seen: Literal["yes", "near", "no", "unknown"]
    why: Text
    groups: tuple[str, ...] = ()
    source: Text


class Exclusion(Settings):
    """Scenes that are left out, and why. `match` is looked for in reference file names or row ids."""

    match: re.Pattern[str]
    why: Text


class BenchmarkManifest(Named):
    """One benchmark.

    Attributes:
        layout: `pack` (a folder with manifest.csv that pairs images and heights) or `folders` (DIR/reference
            with height rasters, DIR/imagery with the images that cover them).
        imagery: named source used where DIR/imagery is absent; None: DIR/imagery is needed.
        image_nodata: image value that means missing; None: as the files say.
        get: commands that fill DIR, with `{dir}` for it.
        groups: what is pooled, metrics: columns; both in the table's order.
        leakage: who has seen the place. area: [west, south, east, north] of the place in degrees.
    """

    title: str
    layout: Literal["pack", "folders"]
    reference: Reference
    imagery: str | None = None
    image_nodata: float | None = None
    get: tuple[str, ...] = Field(min_length=1)
    groups: dict[str, Group] = Field(min_length=1)
    metrics: tuple[Metric, ...] = Field(min_length=1)
    exclusions: tuple[Exclusion, ...] = ()
    published: tuple[Published, ...] = ()
    leakage: tuple[Leak, ...] = Field(min_length=1)
    area: tuple[float, float, float, float] | None = None
    licence: str
    notes: str = ""

    @model_validator(mode="after")
    def _parts_fit(self) -> BenchmarkManifest:
        for name, group in self.groups.items():
            if (self.layout == "pack") != (group.rows is not None):
                raise ValueError(f"group {name!r}: rows go with layout pack, and only with it")
        stray = sorted({name for leak in self.leakage for name in leak.groups} - set(self.groups))
        if stray:
            raise ValueError(f"leakage names the group {stray[0]!r}, which is not in groups")
        labels = self.reference.labels
        if labels is not None:
            if labels not in known_labels():
                raise ValueError(f"reference: no label source {labels!r}")
            label_source(labels).product(self.reference.product)
        if self.imagery is not None and self.imagery not in manifest_names("imagery"):
            raise ValueError(f"no imagery source {self.imagery!r}")
        return self

    def leak_of(self, names: Sequence[str], group: str) -> Leak | None:
        """What is known of a model (by any of its names) on a group; the first entry that fits."""
        for leak in self.leakage:
            pairs = [(name.lower(), pattern.lower()) for name in names for pattern in leak.models]
            if (not leak.groups or group in leak.groups) and any(fnmatch.fnmatch(*pair) for pair in pairs):
                return leak
        return None

    def how_to_get(self, data_dir: Path | None) -> str:
        """The commands that fill a folder, in one line."""
        steps = (step.replace("{dir}", str(data_dir or "DIR")) for step in self.get)
        return "fill it: " + "; then ".join(steps)


def benchmark(name: str) -> BenchmarkManifest:
    """A benchmark by name.

    Raises:
        InputError: no such benchmark; names the nearest one and lists all.
        ConfigError: its file breaks the schema.
    """
    return load_manifest(BenchmarkManifest, "benchmarks", name, "benchmark")


# ---- scenes ---------------------------------------------------------------------------------------
PACK_COLUMNS = {"id", "kind", "site", "split", "rgb_path", "chm_path"}


@dataclass(frozen=True)
class Scene:
    """One image and its heights.

    Attributes:
        id: unique in its benchmark, fit for a file name. group, site: where it counts.
        images: files or folders to predict from; empty: `imagery`, a named source.
        whole_image: map all of the image; else the reference's frame.
    """

    id: str
    group: str
    site: str
    reference: Path
    images: tuple[Path, ...] = ()
    imagery: str | None = None
    whole_image: bool = False


def scenes_of(manifest: BenchmarkManifest, data_dir: Path | None, groups: Sequence[str] = ()) -> list[Scene]:
    """The scenes of the groups asked for (all by default), in the manifest's order.

    Raises InputError for a folder that lacks files, with the commands that fill it, or an unknown group.
    """
    for name in groups:
        if name not in manifest.groups:
            known = ", ".join(manifest.groups)
            raise InputError(f"no group {name!r} in {manifest.name}", where="--group", expected=known)
    how = manifest.how_to_get(data_dir)
    if data_dir is None:
        raise InputError(f"the benchmark {manifest.name} needs its data", where="--data-dir", remedy=how)
    if not data_dir.is_dir():
        raise InputError("no such folder", where=data_dir, remedy=how)
    wanted = groups or tuple(manifest.groups)
    find = _pack_scenes if manifest.layout == "pack" else _folder_scenes
    scenes = [scene for name in wanted for scene in find(manifest, data_dir, name)]
    for name in wanted:
        if not any(scene.group == name for scene in scenes):
            raise InputError(f"no scenes of group {name!r}", where=data_dir, remedy=how)
    return scenes


def _pack_scenes(manifest: BenchmarkManifest, data_dir: Path, group: str) -> list[Scene]:
    table, rows = data_dir / "manifest.csv", manifest.groups[group].rows
    if not table.is_file():
        how = manifest.how_to_get(data_dir)
        raise InputError("no manifest.csv in the folder", where=data_dir, remedy=how)
    scenes = []
    with table.open(newline="", encoding="utf-8") as file:
        reader = csv.DictReader(file)
        missing = sorted(PACK_COLUMNS - set(reader.fieldnames or ()))
        if missing:
            expected = ", ".join(sorted(PACK_COLUMNS))
            raise DataError(f"no column {missing[0]!r}", where=table, expected=expected)
        for row in reader:
            wrong = rows is None or row["split"] != rows.split or row["kind"] == rows.not_kind
            if wrong or (rows and rows.kind not in (None, row["kind"])) or _left_out(manifest, row["id"]):
                continue
            image, reference = data_dir / row["rgb_path"], data_dir / row["chm_path"]
            for path in (image, reference):
                if not path.is_file():
                    raise InputError("a file of manifest.csv is not there", where=path)
            scenes.append(Scene(row["id"], group, row["site"], reference, (image,), whole_image=True))
    return scenes


def _folder_scenes(manifest: BenchmarkManifest, data_dir: Path, group: str) -> list[Scene]:
    references, images = _rasters(data_dir / "reference"), data_dir / "imagery"
    has_images = bool(_rasters(images))
    if not references or (not has_images and manifest.imagery is None):
        lacking, how = "reference" if not references else "imagery", manifest.how_to_get(data_dir)
        raise InputError(f"no rasters in {lacking}/", where=data_dir, remedy=how)
    scenes = []
    for path in references:
        pattern, tile = manifest.groups[group].match, read_name(path.name)
        if (pattern and not pattern.search(path.name)) or _left_out(manifest, path.name):
            continue
        # The site in a tile's name (NEON), else the folder below `reference`, else the file's name.
        folder = path.parent.name if path.parent.name != "reference" else path.stem
        site = tile.site if tile is not None and tile.site else folder
        source = ((images,), None) if has_images else ((), manifest.imagery)
        scenes.append(Scene(path.stem, group, site, path, *source))
    return scenes


def _left_out(manifest: BenchmarkManifest, name: str) -> bool:
    return any(rule.match.search(name) for rule in manifest.exclusions)


def _rasters(folder: Path) -> list[Path]:
    """Rasters of a folder and those below it, sorted by name."""
    return sorted(p for p in folder.rglob("[!.]*") if p.suffix.lower() in (".tif", ".tiff", ".vrt"))


# ---- running --------------------------------------------------------------------------------------
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
        evaluation = _score_group(there, maps, manifest, name, replicates, progress)
        write_results(evaluation, out / f"{slug(model.name)}-{model.sha256[:8]}" / name)
        leak = manifest.leak_of(model.names, name)
        result.groups.append(GroupResult(name, len(there), evaluation, leak))
    return result


def _score_group(
    scenes: Sequence[Scene], maps: Mapping[str, Path], manifest: BenchmarkManifest, name: str,
    replicates: int, progress: Progress,
) -> Evaluation:  # fmt: skip
    """One score over all scenes of a group, and one per site."""
    group, floor_m = manifest.groups[name], manifest.reference.floor_m
    options = Options(by=("site",), floor_m=floor_m, shift=group.shift, replicates=replicates)
    facts = {"benchmark": manifest.name, "group": name, "group_title": group.title, "scenes": len(scenes)}
    with ExitStack() as stack:
        pairs = []
        for scene in scenes:
            heights = stack.enter_context(open_heights(maps[scene.id]))
            truth = stack.enter_context(open_heights(scene.reference, reference=True))
            pairs.append(RasterPair(heights, truth, scene.site))
        return score_rasters(pairs, options, progress, facts)


def slug(text: str) -> str:
    """A text as a file name."""
    return "".join(c if c.isalnum() or c in "-_." else "_" for c in text).strip(".")[:80] or "_"


def audit_lines(result: BenchmarkResult) -> list[str]:
    """Who has seen the place, one line per group: first the model that was scored."""
    lines = []
    for part in result.groups:
        text = "unknown: the benchmark knows nothing of this model; read its card"
        if part.leak is not None:
            text = f"{part.leak.seen}: {part.leak.why} ({part.leak.source})"
        lines.append(f"{part.group}: was {result.model.name} trained here? {text}")
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
    for part in result.groups:
        facts = {
            "benchmark": result.manifest.name,
            "group": part.group,
            "site": ALL_SITES,
            "model": result.model.name,
            "model_sha256": result.model.sha256,
            "canopy_version": __version__,
            "scored": today or datetime.date.today().isoformat(),
            "scenes": part.scenes,
            "trained_here": part.leak.seen if part.leak else "unknown",
        }
        rows.append(facts | wide_row(part.evaluation.overall.metrics, METRICS))
        rows += [
            facts | {"site": name, "scenes": ""} | wide_row(scores.metrics, METRICS)
            for name, scores in part.evaluation.strata["site"].items()
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
