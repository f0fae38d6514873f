"""The scenes of a benchmark in a folder: which image is predicted, which heights it is scored by."""

from __future__ import annotations

import csv
import re
from dataclasses import dataclass
from pathlib import Path

from canopy.errors import DataError, InputError
from canopy.evaluation.benchmark_manifest import BenchmarkManifest
from canopy.sources.naming import read_name

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
    site = getattr(tile, "site", None)
    if site:
        return str(site)
    return path.parent.name if path.parent.name != "reference" else path.stem
