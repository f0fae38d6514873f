"""Fetch labels: plan what a source offers for an area, then download it completely and verified.

A folder that was filled here holds `canopy-data.json`, a record of every file: where from, under which terms,
how many bytes, the source's checksum and the sha256 of what arrived. A rerun fetches only what is missing.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Any

from canopy import download
from canopy.errors import (
    AreaError,
    DataError,
    OutputError,
    refuse_options,
)
from canopy.files import file_sha256, replacing, told_as_output
from canopy.labels.catalog import (
    LabelManifest,
    Product,
    RemoteFile,
    Wish,
    label_source,
)
from canopy.runtime import NoProgress, Progress, log

RECORD = "canopy-data.json"
_MOST_ASKED = 32  # files whose size is asked for one by one
Planner = Callable[[LabelManifest, Product, Wish], tuple[list[RemoteFile], list[str]]]


@dataclass(frozen=True)
class Plan:
    """What will be fetched.

    Attributes:
        manifest, product: the source and the kind of file.
        files: sorted by path.
        notes: what the user should know.
    """

    manifest: LabelManifest
    product: str
    files: tuple[RemoteFile, ...]
    notes: tuple[str, ...]

    @property
    def total_bytes(self) -> int:
        """Of the files whose size is known or usual."""
        return sum(file.bytes or 0 for file in self.files)

    @property
    def unknown(self) -> int:
        """Files whose size nobody says."""
        return sum(file.bytes is None for file in self.files)

    def facts(self) -> dict[str, Any]:
        """JSON-ready, without secrets."""
        rows = [
            {
                "path": f.path,
                "address": f.address,
                "bytes": f.bytes,
                "about": f.about,
                "checksum": f.checksum,
                "date": f.day,
            }
            for f in self.files
        ]
        return {
            "source": self.manifest.name,
            "product": self.product,
            "licence": self.manifest.licence,
            "attribution": self.manifest.attribution,
            "citation": self.manifest.citation,
            "files": rows,
            "total_bytes": self.total_bytes,
            "unknown_sizes": self.unknown,
            "notes": list(self.notes),
        }


def plan_get(name: str, wish: Wish, *, product: str | None = None) -> Plan:
    """Ask a source which files answer a wish; nothing is downloaded.

    Args:
        name: of a label source, as in `known_labels()`.
        wish: area, dates, sites, names.
        product: kind of file; None: the source's default.

    Raises:
        InputError: unknown source or product, or too little said; AreaError: nothing there;
        FetchError: the host; MissingDependencyError: an optional library.
    """
    manifest = label_source(name)
    if manifest.protocol != "neon":
        refuse_options({"--site": wish.sites}, where=name, because="sites are NEON's")
    chosen, details = manifest.product(product)
    coverage = manifest.geometry
    if wish.area is not None and coverage is not None and not coverage.intersects(wish.area.lonlat):
        raise AreaError(
            f"{name} has nothing there ({wish.area.describe()})", remedy=f"see `canopy data describe {name}`"
        )
    files, notes = _planner(manifest.protocol)(manifest, details, wish)
    unique = {file.path: file for file in files}
    if len(unique) < len(files):
        notes.append(f"{len(files) - len(unique)} files share a name with another one: the last is kept")
    files = [unique[key] for key in sorted(unique)]
    if sum(file.bytes is None for file in files) <= _MOST_ASKED:
        files = [_with_size(file) for file in files]
    return Plan(manifest, chosen, tuple(files), tuple(notes))


def _planner(protocol: str) -> Planner:
    """The function of a protocol; imported late, because some need optional libraries."""
    if protocol == "neon":
        from canopy.labels.neon import plan_neon

        return plan_neon
    if protocol == "wfs":
        from canopy.labels.ign import plan_wfs

        return plan_wfs
    if protocol == "stac":
        from canopy.labels.stac_cmr import plan_stac

        return plan_stac
    from canopy.labels.stac_cmr import plan_earthdata

    return plan_earthdata


def _with_size(file: RemoteFile) -> RemoteFile:
    if file.bytes is not None:
        return file
    return replace(file, bytes=download.size_of(file.url, headers=file.headers(), sign=file.sign))


@dataclass(frozen=True)
class Got:
    """What a download left: paths of files fetched now, and of those that were there and right."""

    fetched: tuple[str, ...]
    kept: tuple[str, ...]


def get_files(
    plan: Plan, out_dir: Path | str, *, overwrite: bool = False, progress: Progress | None = None
) -> Got:
    """Download a plan into a folder; what is there and right is kept.

    Raises:
        OutputError: no room or no right to write; DataError: a file that is there or arrived differs from
            what the source says; FetchError: a host. Files that are complete stay, and are in the record.
    """
    out_dir = Path(out_dir)
    with told_as_output(out_dir, "cannot be made"):
        out_dir.mkdir(parents=True, exist_ok=True)
    known, done = _read_record(out_dir), dict[str, dict[str, Any]]()
    missing = [f for f in plan.files if overwrite or not (out_dir / f.path).is_file()]
    _check_room(out_dir, missing)
    progress = progress or NoProgress()
    progress.start(len(plan.files), plan.manifest.name)

    def work(file: RemoteFile) -> None:
        there = (out_dir / file.path).is_file() and not overwrite
        path = download.download(
            file.url, out_dir / file.path, headers=file.headers() if not there else None, sign=file.sign,
            check=file.check, overwrite=overwrite,
        )  # fmt: skip
        if not (there and known.get(file.path, {}).get("bytes") == path.stat().st_size):
            done[file.path] = _entry(plan, file, path)
        log.debug("%s: %s", file.path, "kept" if there else "fetched")
        progress.advance()

    try:
        with ThreadPoolExecutor(max_workers=plan.manifest.parallel) as pool:
            jobs = [pool.submit(work, file) for file in plan.files]
            _, waiting = wait(jobs, return_when=FIRST_EXCEPTION)
            for job in waiting:
                job.cancel()
    finally:
        # Also after an error or Ctrl-C: what is complete is noted. (A killed run: by the next.)
        if done:
            _add_to_record(out_dir, done)
    for job in jobs:
        if not job.cancelled():
            job.result()
    names = {file.path for file in missing}
    return Got(tuple(sorted(names)), tuple(f.path for f in plan.files if f.path not in names))


def verify_folder(folder: Path | str) -> dict[str, Any]:
    """Compare every file of a fetched folder with its record.

    Returns:
        JSON-ready: `files` checked, and `problems` by file name (empty: all is well).

    Raises:
        DataError: the folder has no record, or one that cannot be read.
    """
    folder = Path(folder)
    entries = _read_record(folder)
    if not entries:
        raise DataError(
            "holds no record of downloads", where=folder, expected=f"{RECORD}, written by `canopy data get`"
        )
    problems: dict[str, str] = {}
    for name, entry in sorted(entries.items()):
        path = folder / name
        if not path.is_file():
            problems[name] = "missing"
        elif path.stat().st_size != entry["bytes"]:
            problems[name] = f"{path.stat().st_size} bytes instead of {entry['bytes']}"
        elif file_sha256(path) != entry["sha256"]:
            problems[name] = "another sha256 than when it was fetched"
    return {"folder": str(folder), "files": len(entries), "problems": problems}


def _entry(plan: Plan, file: RemoteFile, path: Path) -> dict[str, Any]:
    return {
        "source": plan.manifest.name,
        "product": plan.product,
        "address": file.address,
        "date": file.day,
        "licence": plan.manifest.licence,
        "bytes": path.stat().st_size,
        "checksum": file.checksum,
        "sha256": file_sha256(path),
    }


def _read_record(folder: Path) -> dict[str, dict[str, Any]]:
    """What is on record of a folder, by path; empty without a record. Raises DataError."""
    path = folder / RECORD
    if not path.is_file():
        return {}
    try:
        entries = dict(json.loads(path.read_text())["files"])
        if any(not _is_inside(name) or not {"bytes", "sha256"} <= set(e) for name, e in entries.items()):
            raise ValueError("an entry that is not a file of this folder")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"cannot be read ({error})", where=path, remedy="move it away and fetch again"
        ) from None
    return entries


def _add_to_record(folder: Path, entries: Mapping[str, dict[str, Any]]) -> None:
    """Note complete files: once for a batch, beside what other processes have noted meanwhile."""
    path = folder / RECORD
    with told_as_output(path), download.only_one(path):
        text = json.dumps({"files": dict(sorted({**_read_record(folder), **entries}.items()))}, indent=1)
        with replacing(path) as part:
            part.write_text(text + "\n")


def _is_inside(name: str) -> bool:
    path = PurePosixPath(name)
    return not path.is_absolute() and ".." not in path.parts


def _check_room(folder: Path, files: list[RemoteFile]) -> None:
    # Usual sizes are too rough to refuse a download that may fit.
    needed, free = sum(file.bytes or 0 for file in files if not file.about), shutil.disk_usage(folder).free
    if needed > free:
        raise OutputError(f"{needed / 1e9:.1f} GB to fetch and {free / 1e9:.1f} GB free", where=folder)
