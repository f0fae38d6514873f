"""Named benchmarks: one strict YAML file each in `data_manifests/benchmarks`, and the scenes it names.

A benchmark says which images are predicted and which heights they are scored by, what is left out, which
scores others have published on it, and which models have seen the place in training. It never holds pixels.
"""

from __future__ import annotations

import csv
import fnmatch
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from pydantic import AfterValidator, Field, model_validator

from canopy.config import Named, Settings, load_manifest, manifest_names
from canopy.errors import DataError, InputError
from canopy.labels.catalog import read_name

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


class Group(Settings):
    """Scenes that are pooled into one score.

    Attributes:
        rows: of a pack's manifest.csv: its split (train, val, test, test_hard) and kind (neon, other), or the
            kind that it is not; None: every height raster of DIR/reference whose name matches `match`.
        per_site: also show every site as a line of its own.
        shift: whether to measure a shift (not on plots of a few pixels).
    """

    title: str
    rows: dict[Literal["split", "kind", "not_kind"], str] | None = None
    match: re.Pattern[str] = re.compile("")
    per_site: bool = False
    shift: bool = True


class Published(Settings):
    """Scores that others have published, named and measured as ours, to stand beside them.

    Attributes:
        measured_on: what exactly they were measured on. source: where they were read.
    """

    model: str
    scores: dict[Metric, float] = Field(min_length=1)
    measured_on: str
    source: Text


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


class BenchmarkManifest(Named):
    """One benchmark: a pack (DIR/manifest.csv pairs images and heights), or DIR/reference and DIR/imagery.

    Attributes:
        imagery: named source used where DIR/imagery is absent; None: DIR/imagery is needed.
        image_nodata: image value that means missing; None: as the files say.
        unit_m: metres per unit of reference files that say neither a unit nor a scale (0.1: decimetres).
        floor_m: heights below count as 0 on both sides; None: what the reference's own tags say.
        get: commands that fill DIR, with `{dir}` for it.
        groups: what is pooled, metrics: columns; both in the table's order.
        leakage: who has seen the place.
    """

    title: str
    imagery: str | None = None
    image_nodata: float | None = None
    unit_m: float = Field(default=1.0, gt=0, le=1)
    floor_m: float | None = Field(default=None, ge=0, le=10)
    get: tuple[str, ...] = Field(min_length=1)
    groups: dict[str, Group] = Field(min_length=1)
    metrics: tuple[Metric, ...] = Field(min_length=1)
    published: tuple[Published, ...] = ()
    leakage: tuple[Leak, ...] = Field(min_length=1)
    licence: str
    notes: str = ""

    @model_validator(mode="after")
    def _names_are_known(self) -> BenchmarkManifest:
        stray = sorted({name for leak in self.leakage for name in leak.groups} - set(self.groups))
        if stray:
            raise ValueError(f"leakage names the group {stray[0]!r}, which is not in groups")
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
    scenes = []
    for name in groups or manifest.groups:
        group = manifest.groups[name]
        find = _folder_scenes if group.rows is None else _pack_scenes
        found = list(find(manifest, data_dir, name))
        if not found:
            raise InputError(f"no scenes of group {name!r}", where=data_dir, remedy=how)
        scenes += found
    return scenes


def _pack_scenes(manifest: BenchmarkManifest, data_dir: Path, group: str) -> Iterator[Scene]:
    table, wanted = data_dir / "manifest.csv", manifest.groups[group].rows or {}
    if not table.is_file():
        how = manifest.how_to_get(data_dir)
        raise InputError("no manifest.csv in the folder", where=data_dir, remedy=how)
    with table.open(newline="", encoding="utf-8") as file:
        reader = csv.DictReader(file)
        missing = sorted(PACK_COLUMNS - set(reader.fieldnames or ()))
        if missing:
            expected = ", ".join(sorted(PACK_COLUMNS))
            raise DataError(f"no column {missing[0]!r}", where=table, expected=expected)
        for row in reader:
            asked = row | {"not_kind": row["kind"]}
            if any((asked[name] == value) == (name == "not_kind") for name, value in wanted.items()):
                continue
            image, reference = data_dir / row["rgb_path"], data_dir / row["chm_path"]
            for path in (image, reference):
                if not path.is_file():
                    raise InputError("a file of manifest.csv is not there", where=path)
            yield Scene(row["id"], group, row["site"], reference, (image,), whole_image=True)


def _folder_scenes(manifest: BenchmarkManifest, data_dir: Path, group: str) -> Iterator[Scene]:
    references, images = _rasters(data_dir / "reference"), data_dir / "imagery"
    has_images = bool(_rasters(images))
    if not references or (not has_images and manifest.imagery is None):
        lacking, how = "reference" if not references else "imagery", manifest.how_to_get(data_dir)
        raise InputError(f"no rasters in {lacking}/", where=data_dir, remedy=how)
    for path in (path for path in references if manifest.groups[group].match.search(path.name)):
        # The site in a tile's name (NEON), else the folder below `reference`, else the file's name.
        tile = read_name(path.name)
        folder = path.parent.name if path.parent.name != "reference" else path.stem
        site = tile.site if tile is not None and tile.site else folder
        source = ((images,), None) if has_images else ((), manifest.imagery)
        yield Scene(path.stem, group, site, path, *source)


def _rasters(folder: Path) -> list[Path]:
    """Rasters of a folder and those below it, sorted by name."""
    return sorted(p for p in folder.rglob("[!.]*") if p.suffix.lower() in (".tif", ".tiff", ".vrt"))
