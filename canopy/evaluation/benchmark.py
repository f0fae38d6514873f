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
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from canopy import __version__
from canopy.config import Named, Settings, load_manifest, manifest_names
from canopy.errors import CanopyError, DataError, InputError
from canopy.evaluation.evaluate import Options, score_rasters
from canopy.evaluation.maps import open_heights
from canopy.evaluation.pixels import RasterPair
from canopy.evaluation.report import number_text, wide_row, write_csv, write_results
from canopy.evaluation.scores import Evaluation
from canopy.imagery.manifests import known_names
from canopy.labels.catalog import known_labels, label_source
from canopy.labels.names import read_name
from canopy.runtime import NoProgress, Progress, log, manifests_dir

METRICS = (
    "n", "mae_m", "rmse_m", "bias_m", "r2", "r", "nmae", "nmae_plus1", "block_r2", "edge_error",
    "edge_error_symmetric", "cover_iou_2m", "cover_iou_3m", "cover_iou_5m", "cover_precision_2m",
    "cover_recall_2m", "cover_f1_2m", "p50_error_m", "p95_error_m", "p98_error_m", "interval_coverage",
    "interval_width_m",
)  # fmt: skip
Seen = Literal["yes", "near", "no", "unknown"]


class Rows(Settings):
    """Rows of a pack's manifest.csv; fields left out mean any.

    Attributes:
        split: train, val, test, test_hard.
        kind, not_kind: neon (plots) or other (tiles).
        site: pattern such as `Natural Bridge*`.
    """

    split: str
    kind: str | None = None
    not_kind: str | None = None
    site: str | None = None

    def takes(self, row: dict[str, str]) -> bool:
        """Whether a row of the manifest belongs to this group."""
        return (
            row["split"] == self.split
            and (self.kind is None or row["kind"] == self.kind)
            and (self.not_kind is None or row["kind"] != self.not_kind)
            and (self.site is None or fnmatch.fnmatch(row["site"], self.site))
        )


class Group(Settings):
    """Scenes that are pooled into one score.

    Attributes:
        title: what they are.
        rows: of a pack; None: every reference file of the benchmark whose name matches `match`.
        match: regular expression for reference file names.
        per_site: also show every site as a line of its own.
        shift: whether to measure a shift (not on plots of a few pixels).
    """

    title: str
    rows: Rows | None = None
    match: str | None = None
    per_site: bool = False
    shift: bool = True

    @field_validator("match")
    @classmethod
    def _match_compiles(cls, value: str | None) -> str | None:
        if value is not None:
            re.compile(value)
        return value


class Reference(Settings):
    """Where the measured heights come from.

    Attributes:
        labels: a manifest of data_manifests/labels; None: files that come with the benchmark.
        product: of that source; points need `canopy data chm` first.
        sites: its sites, for `canopy data get --site`.
        floor_m: heights below count as 0 on both sides; None: what the reference's own tags say.
        datetime: which acquisitions.
    """

    labels: str | None
    product: str | None = None
    sites: tuple[str, ...] = ()
    floor_m: float | None = Field(default=None, ge=0, le=10)
    datetime: str | None = None


class Published(Settings):
    """Scores that others have published, to stand beside ours.

    Attributes:
        model: whose. scores: metric -> value, named and measured as ours are.
        measured_on: what exactly they were measured on. source: where they were read.
        comparable: whether scenes and rules are the same as here.
        note: what else a reader must know.
    """

    model: str
    scores: dict[str, float] = Field(min_length=1)
    measured_on: str
    source: str = Field(min_length=1)
    comparable: bool = False
    note: str = ""

    @field_validator("scores")
    @classmethod
    def _known_metrics(cls, value: dict[str, float]) -> dict[str, float]:
        unknown = sorted(set(value) - set(METRICS))
        if unknown:
            raise ValueError(f"unknown metric {unknown[0]!r}; known: {', '.join(METRICS)}")
        return value


class Leak(Settings):
    """Whether a model saw the place in training.

    Attributes:
        models: patterns of model names (a card's `name`, or what --model was given).
        seen: yes (trained on it), near (on other tiles of the same sites), no, unknown.
        why: one sentence. groups: to which groups it applies; empty: all.
        source: where this was read.
    """

    models: tuple[str, ...] = Field(min_length=1)
    seen: Seen
    why: str = Field(min_length=1)
    groups: tuple[str, ...] = ()
    source: str = Field(min_length=1)

    def concerns(self, name: str) -> bool:
        """Whether a model of that name is meant."""
        return any(fnmatch.fnmatch(name.lower(), pattern.lower()) for pattern in self.models)


class Exclusion(Settings):
    """Scenes that are left out, and why. `match`: regular expression for reference file names or row ids."""

    match: str
    why: str = Field(min_length=1)


class BenchmarkManifest(Named):
    """One benchmark.

    Attributes:
        name: what `--benchmark` takes; the file's stem. title: one line.
        layout: `pack` (a folder with manifest.csv that pairs images and heights) or `folders` (DIR/reference
            with height rasters, DIR/imagery with the images that cover them).
        reference: the heights. imagery: named source used where DIR/imagery is absent; None: DIR/imagery is
            needed.
        image_nodata: image value that means missing; None: as the files say.
        get: commands that fill DIR, with `{dir}` for it.
        groups: what is pooled, in order of the table.
        metrics: columns of the table.
        exclusions: scenes left out.
        published: others' scores. leakage: who has seen the place.
        area: [west, south, east, north] of the place in degrees; None where it is many.
        licence: terms of the data. notes: what a user should know.
    """

    title: str
    layout: Literal["pack", "folders"]
    reference: Reference
    imagery: str | None = None
    image_nodata: float | None = None
    get: tuple[str, ...] = Field(min_length=1)
    groups: dict[str, Group] = Field(min_length=1)
    metrics: tuple[str, ...] = Field(min_length=1)
    exclusions: tuple[Exclusion, ...] = ()
    published: tuple[Published, ...] = ()
    leakage: tuple[Leak, ...] = Field(min_length=1)
    area: tuple[float, float, float, float] | None = None
    licence: str
    notes: str = ""

    @model_validator(mode="after")
    def _parts_fit(self) -> BenchmarkManifest:
        for name in self.metrics:
            if name not in METRICS:
                raise ValueError(f"unknown metric {name!r}; known: {', '.join(METRICS)}")
        for name, group in self.groups.items():
            if (self.layout == "pack") != (group.rows is not None):
                raise ValueError(f"group {name!r}: rows go with layout pack, and only with it")
        for leak in self.leakage:
            stray = sorted(set(leak.groups) - set(self.groups))
            if stray:
                raise ValueError(f"leakage names the group {stray[0]!r}, which is not in groups")
        self._check_sources()
        return self

    def _check_sources(self) -> None:
        labels, product = self.reference.labels, self.reference.product
        if labels is not None:
            if labels not in known_labels():
                raise ValueError(f"reference: no label source {labels!r}")
            label_source(labels).product(product)
        if self.imagery is not None and self.imagery not in known_names():
            raise ValueError(f"no imagery source {self.imagery!r}")

    def leak_of(self, names: tuple[str, ...], group: str) -> Leak | None:
        """What is known of a model (by any of its names) on a group; the first entry that fits."""
        for leak in self.leakage:
            if (not leak.groups or group in leak.groups) and any(leak.concerns(name) for name in names):
                return leak
        return None


def benchmarks_dir() -> Path:
    """Folder of the manifests."""
    return manifests_dir() / "benchmarks"


def known_benchmarks() -> list[str]:
    """Names, sorted."""
    return manifest_names("benchmarks")


def benchmark(name: str) -> BenchmarkManifest:
    """A benchmark by name.

    Raises:
        InputError: no such benchmark; names the nearest one and lists all.
        ConfigError: its file breaks the schema.
    """
    return load_manifest(BenchmarkManifest, "benchmarks", name, "benchmark")


PACK_COLUMNS = {"id", "kind", "site", "split", "rgb_path", "chm_path"}
_RASTERS = {".tif", ".tiff", ".vrt"}


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


def scenes_of(
    manifest: BenchmarkManifest, data_dir: Path | None, groups: tuple[str, ...] = ()
) -> list[Scene]:
    """The scenes of the groups asked for (all by default), in the manifest's order.

    Raises InputError for a folder that lacks files, with the commands that fill it, or an unknown group.
    """
    unknown = [name for name in groups if name not in manifest.groups]
    if unknown:
        raise InputError(
            f"no group {unknown[0]!r} in {manifest.name}",
            where="--group",
            expected=", ".join(manifest.groups),
        )
    if data_dir is None:
        raise InputError(
            f"the benchmark {manifest.name} needs its data",
            where="--data-dir",
            remedy=how_to_get(manifest, None),
        )
    if not data_dir.is_dir():
        raise InputError("no such folder", where=data_dir, remedy=how_to_get(manifest, data_dir))
    wanted = groups or tuple(manifest.groups)
    find = _pack_scenes if manifest.layout == "pack" else _folder_scenes
    scenes = find(manifest, data_dir, wanted)
    empty = [name for name in wanted if not any(s.group == name for s in scenes)]
    if empty:
        raise InputError(
            f"no scenes of group {empty[0]!r}", where=data_dir, remedy=how_to_get(manifest, data_dir)
        )
    return scenes


def how_to_get(manifest: BenchmarkManifest, data_dir: Path | None) -> str:
    """The commands that fill a folder, in one line."""
    steps = (step.replace("{dir}", str(data_dir or "DIR")) for step in manifest.get)
    return "fill it: " + "; then ".join(steps)


def _left_out(manifest: BenchmarkManifest, name: str) -> bool:
    return any(re.search(rule.match, name) for rule in manifest.exclusions)


def _pack_scenes(manifest: BenchmarkManifest, data_dir: Path, groups: tuple[str, ...]) -> list[Scene]:
    table = data_dir / "manifest.csv"
    if not table.is_file():
        raise InputError(
            "no manifest.csv in the folder", where=data_dir, remedy=how_to_get(manifest, data_dir)
        )
    with table.open(newline="", encoding="utf-8") as file:
        reader = csv.DictReader(file)
        missing = PACK_COLUMNS - set(reader.fieldnames or ())
        if missing:
            raise DataError(
                f"no column {sorted(missing)[0]!r}", where=table, expected=", ".join(sorted(PACK_COLUMNS))
            )
        rows = [row for row in reader if not _left_out(manifest, row["id"])]
    scenes = []
    for name in groups:
        chosen = manifest.groups[name].rows
        for row in rows:
            if chosen is not None and chosen.takes(row):
                image, reference = data_dir / row["rgb_path"], data_dir / row["chm_path"]
                for path in (image, reference):
                    if not path.is_file():
                        raise InputError("a file of manifest.csv is not there", where=path)
                scenes.append(Scene(row["id"], name, row["site"], reference, (image,), whole_image=True))
    return scenes


def _folder_scenes(manifest: BenchmarkManifest, data_dir: Path, groups: tuple[str, ...]) -> list[Scene]:
    references = _rasters(data_dir / "reference")
    images = data_dir / "imagery"
    has_images = bool(_rasters(images))
    if not references or (not has_images and manifest.imagery is None):
        lacking = "reference" if not references else "imagery"
        raise InputError(f"no rasters in {lacking}/", where=data_dir, remedy=how_to_get(manifest, data_dir))
    scenes = []
    for name in groups:
        pattern = manifest.groups[name].match
        for path in references:
            if (pattern and not re.search(pattern, path.name)) or _left_out(manifest, path.name):
                continue
            source = None if has_images else manifest.imagery
            scenes.append(
                Scene(path.stem, name, _site(path), path, (images,) if has_images else (), source)
            )  # fmt: skip
    return scenes


def _rasters(folder: Path) -> list[Path]:
    """Rasters of a folder and those below it, sorted by name."""
    if not folder.is_dir():
        return []
    return sorted(p for p in folder.rglob("*") if p.suffix.lower() in _RASTERS and not p.name.startswith("."))


def _site(path: Path) -> str:
    """The site in a tile's name (NEON), else the folder below `reference`, else the file's name."""
    tile = read_name(path.name)
    if tile is not None and tile.site:
        return tile.site
    return path.parent.name if path.parent.name != "reference" else path.stem


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
        if part.leak is None:
            text = "unknown: the benchmark knows nothing of this model; read its card"
        else:
            text = f"{part.leak.seen}: {part.leak.why} ({part.leak.source})"
        lines.append(f"{part.group}: was {result.model.name} trained here? {text}")
    return lines


KEY = ["benchmark", "group", "site", "model", "model_sha256", "canopy_version"]
FACTS = (*KEY, "scored", "scenes", "trained_here")
ALL_SITES = "all"
SHORT = {
    "n": "pixels", "mae_m": "MAE m", "rmse_m": "RMSE m", "bias_m": "bias m", "r2": "R2",
    "block_r2": "block-R2", "edge_error": "edge", "nmae": "nMAE",
    "cover_iou_2m": "IoU 2 m", "cover_iou_5m": "IoU 5 m",
    "p95_error_m": "p95 error m", "nmae_plus1": "nMAE (1 + h)",
}  # fmt: skip
COLUMNS = [*FACTS, *(c for m in METRICS for c in ((m,) if m == "n" else (m, f"{m}_low95", f"{m}_high95")))]


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
        rows.append(facts | wide_row(part.evaluation.overall, METRICS))
        rows += [
            facts | {"site": stratum.name, "scenes": ""} | wide_row(stratum.scores, METRICS)
            for stratum in part.evaluation.strata
            if stratum.by == "site"
        ]
    return rows


def append_rows(path: Path, rows: Sequence[Mapping[str, Any]]) -> list[dict[str, str]]:
    """Add rows to results.csv; a row of the same model, group and version takes the old one's place.

    Returns all rows, as texts. Raises DataError for a table of another layout.
    """
    import pandas

    kept = pandas.DataFrame(columns=COLUMNS, dtype=str)
    if path.is_file():
        kept = pandas.read_csv(path, dtype=str, keep_default_na=False)
        if list(kept.columns) != COLUMNS:
            raise DataError(
                "a table of another layout", where=path, remedy="move it away, or choose another -o"
            )
    new = pandas.DataFrame(
        [[_text(row.get(name)) for name in COLUMNS] for row in rows], columns=COLUMNS, dtype=str
    )
    merged = pandas.concat([kept, new]).drop_duplicates(KEY, keep="last")
    write_csv(path, merged)
    return [{str(k): str(v) for k, v in row.items()} for row in merged.to_dict("records")]


def _text(value: Any) -> str:
    return "" if value is None else f"{value:.6g}" if isinstance(value, float) else str(value)


def markdown(manifest: BenchmarkManifest, rows: Sequence[Mapping[str, str]]) -> str:
    """The table for people: groups, models one under the other, published scores, who has seen the place."""
    metrics = [m for m in manifest.metrics if m != "n"]
    head = ["group", "model", "trained here?", "pixels", *(SHORT.get(m, m) for m in metrics)]
    lines = [f"# {manifest.name}: {manifest.title}", "", *_table_head(head, 3)]
    for name, group in manifest.groups.items():
        here = [r for r in rows if r["benchmark"] == manifest.name and r["group"] == name]
        sites = [ALL_SITES, *dict.fromkeys(r["site"] for r in here if r["site"] != ALL_SITES)]
        for site in sites if group.per_site and len(sites) > 2 else [ALL_SITES]:
            title = f"{name}: {group.title}" if site == ALL_SITES else f"… {site}"
            lines += [_line([title, *_cells(row, metrics)]) for row in here if row["site"] == site]
    lines += ["", *_published(manifest), "Trained here?", ""]
    for leak in manifest.leakage:
        where = f" ({', '.join(leak.groups)})" if leak.groups else ""
        lines.append(f"- {', '.join(leak.models)}{where}: **{leak.seen}**, {leak.why} [{leak.source}]")
    return "\n".join(lines) + "\n"


def _published(manifest: BenchmarkManifest) -> list[str]:
    """Others' scores as a table; nothing where there are none."""
    if not manifest.published:
        return []
    found = [m for p in manifest.published for m in p.scores]
    names = list(dict.fromkeys([m for m in manifest.metrics if m in found] + found))
    head = ["model", *(SHORT.get(m, m) for m in names), "measured on", "same scenes and rules?"]
    lines = ["Published by others, for orientation:", "", *_table_head(head, 1)]
    for entry in manifest.published:
        values = [number_text(entry.scores[m]) if m in entry.scores else "" for m in names]
        on = "; ".join(t for t in (f"{entry.measured_on} ({entry.source})", entry.note) if t)
        lines.append(_line([entry.model, *values, on, "yes" if entry.comparable else "no"]))
    return [*lines, ""]


def _cells(row: Mapping[str, str], metrics: Sequence[str]) -> list[str]:
    cells = [
        f"{row['model']} `{row['model_sha256'][:8]}`",
        row["trained_here"],
        f"{int(float(row['n'] or 0)):,}",
    ]
    for metric in metrics:
        text = number_text(float(row[metric])) if row[metric] else ""
        low, high = row[f"{metric}_low95"], row[f"{metric}_high95"]
        if metric == "mae_m" and low and high:
            text += f" ({number_text(float(low))}-{number_text(float(high))})"
        cells.append(text)
    return cells


def _table_head(cells: Sequence[str], words: int) -> list[str]:
    """Head of a table whose first `words` columns are words and the others numbers."""
    return [_line(cells), _line(["---" if i < words else "---:" for i in range(len(cells))])]


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "/") for cell in cells) + " |"
