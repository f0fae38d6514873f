"""Fetch labels: plan what a source offers for an area, then download it completely and verified.

A folder that was filled here holds `canopy-data.json`, a record of every file: where from, under which terms,
how many bytes, the source's checksum and the sha256 of what arrived. A rerun fetches only what is missing.

NASA Earthdata through `earthaccess`: granules of a collection, with the sizes and checksums of CMR.

Searching is anonymous. A login is made when the first file is fetched: EARTHDATA_TOKEN, or EARTHDATA_USERNAME
and EARTHDATA_PASSWORD, or a netrc file. Files come through canopy's own downloader, so they resume and are
checked; the token is dropped when the archive redirects to its storage.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path, PurePosixPath
from typing import Any

from canopy import download as http
from canopy.download import download, only_one
from canopy.errors import (
    AreaError,
    DataError,
    FetchError,
    InputError,
    MissingDependencyError,
    OutputError,
    refuse_options,
)
from canopy.files import file_sha256, redact, replacing, told_as_output
from canopy.labels.catalog import (
    LabelManifest,
    Product,
    RemoteFile,
    Wish,
    checksum_of,
    label_source,
    whole_number,
)
from canopy.labels.names import base_name
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
    """The module of a protocol; imported late, because some need optional libraries."""
    if protocol == "neon":
        from canopy.labels.neon import plan_neon

        return plan_neon
    if protocol == "wfs":
        from canopy.labels.ign import plan_wfs

        return plan_wfs
    if protocol == "stac":
        from canopy.labels.threedep import plan_stac

        return plan_stac
    if protocol == "earthdata":
        return plan_earthdata
    from canopy.labels.threedep import plan_s3

    return plan_s3


def _with_size(file: RemoteFile) -> RemoteFile:
    if file.bytes is not None:
        return file
    return replace(file, bytes=http.size_of(file.url, headers=file.headers(), sign=file.sign))


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
    _make(out_dir)
    record = _Record(out_dir)
    missing = [f for f in plan.files if overwrite or not (out_dir / f.path).is_file()]
    _check_room(out_dir, missing)
    progress = progress or NoProgress()
    progress.start(len(plan.files), plan.manifest.name)

    def work(file: RemoteFile) -> None:
        there = (out_dir / file.path).is_file() and not overwrite
        path = download(
            file.url, out_dir / file.path, headers=file.headers() if not there else None, sign=file.sign,
            check=file.check, overwrite=overwrite,
        )  # fmt: skip
        record.add(plan, file, path, fresh=not there)
        log.debug("%s: %s", file.path, "kept" if there else "fetched")
        progress.advance()

    with ThreadPoolExecutor(max_workers=plan.manifest.parallel) as pool:
        jobs = [pool.submit(work, file) for file in plan.files]
        _, waiting = wait(jobs, return_when=FIRST_EXCEPTION)
        for job in waiting:
            job.cancel()
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
    entries = _Record(folder).entries
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


class _Record:
    """The file RECORD of a folder."""

    def __init__(self, folder: Path) -> None:
        self.path, self.lock = folder / RECORD, threading.Lock()
        self.entries: dict[str, dict[str, Any]] = {}
        self._load()

    def _load(self) -> None:
        """What is on disk now. Raises DataError."""
        if not self.path.is_file():
            return
        try:
            self.entries = dict(json.loads(self.path.read_text())["files"])
            if any(
                not _is_inside(name) or not {"bytes", "sha256"} <= set(e) for name, e in self.entries.items()
            ):
                raise ValueError("an entry that is not a file of this folder")
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise DataError(
                f"cannot be read ({error})", where=self.path, remedy="move it away and fetch again"
            ) from None

    def add(self, plan: Plan, file: RemoteFile, path: Path, *, fresh: bool) -> None:
        """Note a complete file; the record on disk is always whole."""
        known = self.entries.get(file.path)
        if known is not None and not fresh and known["bytes"] == path.stat().st_size:
            return
        entry = {
            "source": plan.manifest.name,
            "product": plan.product,
            "address": file.address,
            "date": file.day,
            "licence": plan.manifest.licence,
            "bytes": path.stat().st_size,
            "checksum": file.checksum,
            "sha256": file_sha256(path),
        }
        with told_as_output(self.path), self.lock, only_one(self.path):
            self._load()  # another process may be filling the same folder
            self.entries[file.path] = entry
            text = json.dumps({"files": dict(sorted(self.entries.items()))}, indent=1)
            with replacing(self.path) as part:
                part.write_text(text + "\n")


def _is_inside(name: str) -> bool:
    path = PurePosixPath(name)
    return not path.is_absolute() and ".." not in path.parts


def _make(folder: Path) -> None:
    with told_as_output(folder, "cannot be made"):
        folder.mkdir(parents=True, exist_ok=True)


def _check_room(folder: Path, files: list[RemoteFile]) -> None:
    needed, free = sum(file.bytes or 0 for file in files), shutil.disk_usage(folder).free
    if needed > free:
        raise OutputError(f"{needed / 1e9:.1f} GB to fetch and {free / 1e9:.1f} GB free", where=folder)


_ALGORITHMS = {"md5": "md5", "sha-256": "sha256", "sha256": "sha256"}
_LOGIN = (
    "set EARTHDATA_TOKEN, or EARTHDATA_USERNAME and EARTHDATA_PASSWORD, or write ~/.netrc "
    "(accounts: urs.earthdata.nasa.gov)"
)


def plan_earthdata(
    manifest: LabelManifest, product: Product, wish: Wish
) -> tuple[list[RemoteFile], list[str]]:
    """Granules of a product that touch the area's bounding box, and notes for the user.

    Raises:
        InputError: no area; AreaError: nothing there; FetchError: the host; MissingDependencyError.
    """
    if wish.area is None:
        raise InputError(f"{manifest.name} is found by area", expected="--bbox, --bounds or --aoi")
    earthaccess = _earthaccess()
    query: dict[str, Any] = {"short_name": product.code, "bounding_box": wish.area.bounds_lonlat}
    if product.version:
        query["version"] = product.version
    if wish.datetime:
        first, slash, last = wish.datetime.partition("/")
        query["temporal"] = tuple(
            None if edge in ("", "..") else edge for edge in (first, last if slash else first)
        )
    try:
        granules = earthaccess.search_data(**query)
    except Exception as error:  # earthaccess passes on whatever its HTTP library raises
        raise FetchError(
            f"Earthdata did not answer the search ({redact(error)[:200]})", where=manifest.name
        ) from None
    files = [
        _file(granule, url, product) for granule in granules for url in granule.data_links(access="external")
    ]
    wanted = {f.name: f for f in files if re.search(product.match or "", f.name) and wish.names(f.name)}
    if not wanted:
        raise AreaError(f"nothing there ({wish.area.describe()})", where=manifest.name)
    return [wanted[name] for name in sorted(wanted)], []


def _earthaccess() -> Any:
    try:
        import earthaccess
    except ImportError:
        raise MissingDependencyError(
            "Earthdata needs earthaccess", remedy="install it: pip install earthaccess"
        ) from None
    return earthaccess


def _file(granule: Mapping[str, Any], url: str, product: Product) -> RemoteFile:
    name = base_name(url)
    umm = granule.get("umm") or {}
    parts = (umm.get("DataGranule") or {}).get("ArchiveAndDistributionInformation") or []
    facts = next((part for part in parts if part.get("Name") == name), parts[0] if len(parts) == 1 else {})
    checksum = facts.get("Checksum") or {}
    kind = _ALGORITHMS.get(str(checksum.get("Algorithm", "")).lower())
    size = whole_number(facts.get("SizeInBytes"))
    times = (umm.get("TemporalExtent") or {}).get("RangeDateTime") or {}
    return RemoteFile(
        url=url,
        name=name,
        bytes=size if size is not None else product.about_bytes,
        about=size is None and product.about_bytes is not None,
        checksum=checksum_of(kind, checksum.get("Value")) if kind else None,
        day=str(times.get("BeginningDateTime", ""))[:10] or None,
        headers=_bearer,
    )


@lru_cache(maxsize=1)
def _bearer() -> Mapping[str, str]:
    """The header of a logged-in session. Raises FetchError with how to log in."""
    earthaccess = _earthaccess()
    named = os.environ.get("EARTHDATA_USERNAME") and os.environ.get("EARTHDATA_PASSWORD")
    strategy = "environment" if os.environ.get("EARTHDATA_TOKEN") or named else "netrc"
    try:
        auth = earthaccess.login(strategy=strategy)
        token = auth.token["access_token"] if auth.authenticated else None
    except Exception as error:  # of many kinds, some with the answer of the login host in their text
        raise FetchError(
            f"no Earthdata login ({type(error).__name__})", where=strategy, remedy=_LOGIN
        ) from None
    if not token:
        raise FetchError("no Earthdata login", where=strategy, remedy=_LOGIN)
    return {"Authorization": f"Bearer {token}"}
