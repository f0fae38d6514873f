"""What is wished of a source of labels, the files that it offers, and their download, complete and verified.

A folder that was filled here holds `canopy-data.json`, a record of every file: where from, under which terms,
how many bytes, the source's checksum and the sha256 of what arrived. A rerun fetches only what is missing.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Mapping
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import dataclass, field, replace
from datetime import date
from pathlib import Path
from typing import Any

from shapely.geometry import box, shape

from canopy import download, web
from canopy.errors import DataError, InputError, OutputError
from canopy.files import check_digest, file_sha256, redact, replacing, told_as_output
from canopy.geo.area import AOI
from canopy.imagery.dates import parse_day, parse_range
from canopy.labels.catalog import LabelManifest, read_name
from canopy.runtime import NoProgress, Progress, log

RECORD = "canopy-data.json"
_SAFE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,199}")
_DAMAGED = "the file changed at its source or was damaged: fetch it again with --overwrite"


@dataclass(frozen=True)
class Wish:
    """What is wanted of a source.

    Attributes:
        area: files that touch it; None: all, where the catalogue can list all.
        datetime: STAC-style interval; None: the newest, or all where files have no dates.
        sites: NEON codes.
        match: regular expression that file names must contain.
        near: where surveys of several years overlap, the date to be nearest to; None: the newest.
    """

    area: AOI | None = None
    datetime: str | None = None
    sites: tuple[str, ...] = ()
    match: str | None = None
    near: str | None = None

    def __post_init__(self) -> None:
        try:
            re.compile(self.match or "")
        except re.error as error:
            raise InputError(f"not a regular expression ({error})", where=f"--match {self.match}") from None
        for option, value in (("--datetime", self.datetime), ("--date", self.near)):
            try:
                parse_range(value)
            except ValueError as error:
                raise InputError(
                    str(error), where=option, expected="such as 2019, 2019-07 or 2018/2021"
                ) from None

    def holds(self, first: date | None, last: date | None) -> bool:
        """Whether a file of these days is within the interval; one without dates only where none is asked."""
        start, end = parse_range(self.datetime)
        if start is None and end is None:
            return True
        if first is None or last is None:
            return False
        return (start or date.min) <= last and first <= (end or date.max)

    def order(self, day: str | None) -> int:
        """The less, the more a survey of this day is wanted: days from `near`, else the newest first."""
        when = parse_day(day or "") or date.min
        if self.near is None:
            return -when.toordinal()
        first, last = parse_range(self.near)
        return max(
            (first or when).toordinal() - when.toordinal(), when.toordinal() - (last or when).toordinal(), 0
        )

    def touches(self, name: str, outline: Mapping[str, Any] | None = None) -> bool:
        """Whether a file lies in the area: by the bounds that its name states, else by a GeoJSON outline."""
        if self.area is None:
            return True
        tile = read_name(name)
        if tile is not None:
            return bool(self.area.to_crs(tile.crs).geometry.intersection(box(*tile.bounds)).area > 0)
        return outline is None or bool(self.area.lonlat.intersects(shape(outline)))

    def names(self, name: str) -> bool:
        """Whether a file of this name is wanted."""
        return re.search(self.match or "", name) is not None


@dataclass(frozen=True)
class RemoteFile:
    """One file that can be fetched.

    Attributes:
        url: where; may hold a signature, so it is shown only as `address`.
        name: file name, safe to use in a folder.
        folder: subfolder, where names alone would not tell files apart (flights of different years).
        bytes: size; None where nobody says.
        about: `bytes` is the usual size of such files, not this one's.
        checksum: `md5:` or `sha256:` and lower-case hex.
        day: acquisition, as the catalogue writes it.
        headers: gives request headers such as an access token; asked just before the download, and again
            after a refusal.
        sign: makes the URL readable; likewise.
    """

    url: str = field(repr=False)
    name: str
    bytes: int | None = None
    folder: str = ""
    about: bool = False
    checksum: str | None = None
    day: str | None = None
    headers: web.Headers | None = field(default=None, repr=False, compare=False)
    sign: web.Signer | None = field(default=None, repr=False, compare=False)

    def __post_init__(self) -> None:
        parts = [self.name, self.folder] if self.folder else [self.name]
        if not all(_SAFE_NAME.fullmatch(part) and ".." not in part for part in parts):
            raise DataError(
                f"the catalogue names a file {self.name[:80]!r}",
                where=self.address,
                expected="a plain file name",
            )
        if not self.url.startswith(("http://", "https://")):
            raise DataError(f"the catalogue gives no http(s) address for {self.name}", where=self.address)

    @property
    def path(self) -> str:
        """Where it goes in a folder, with `/`."""
        return f"{self.folder}/{self.name}" if self.folder else self.name

    @property
    def address(self) -> str:
        """The URL without user, query and signature."""
        return redact(self.url)

    def check(self, path: Path) -> None:
        """Compare a complete local file with what the catalogue says. Raises DataError."""
        size = path.stat().st_size
        if self.bytes is not None and not self.about and size != self.bytes:
            raise DataError(
                f"{self.name} has {size} bytes", where=path, expected=f"{self.bytes}", remedy=_DAMAGED
            )
        kind, _, expected = (self.checksum or "").partition(":")
        if kind:
            check_digest(kind, expected, path)


def checksum_of(kind: str, value: object) -> str | None:
    """A catalogue's checksum as `kind:hex`; None where it gives none."""
    text = str(value or "").strip().strip('"').lower()
    digits = {"md5": 32, "sha256": 64}[kind]
    return f"{kind}:{text.zfill(digits)}" if re.fullmatch(rf"[0-9a-f]{{1,{digits}}}", text) else None


def whole_number(value: object) -> int | None:
    """A size as catalogues write it (number or text) -> int, or None."""
    return int(text) if (text := str(value)).isdecimal() else None


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
    def sure_bytes(self) -> int:
        """Of the files whose own size is known: usual sizes are too rough to refuse a download."""
        return sum(file.bytes or 0 for file in self.files if not file.about)

    @property
    def unknown(self) -> int:
        """Files whose size nobody says."""
        return sum(file.bytes is None for file in self.files)

    def facts(self) -> dict[str, Any]:
        """JSON-ready, without secrets."""
        terms = self.manifest.model_dump(include={"licence", "attribution", "citation"})
        rows = [
            {
                "path": f.path, "address": f.address, "bytes": f.bytes, "about": f.about,
                "checksum": f.checksum, "date": f.day,
            }
            for f in self.files
        ]  # fmt: skip
        return {
            "source": self.manifest.name, "product": self.product, **terms, "files": rows,
            "total_bytes": self.total_bytes, "unknown_sizes": self.unknown, "notes": list(self.notes),
        }  # fmt: skip


def get_files(
    plan: Plan, out_dir: Path | str, *, overwrite: bool = False, progress: Progress | None = None
) -> tuple[list[str], list[str]]:
    """Download a plan into a folder; what is there and right is kept.

    Returns:
        Paths of the files fetched now, and of those that were there.

    Raises:
        OutputError: no room or no right to write; DataError: a file that is there or arrived differs from
            what the source says; FetchError: a host. Files that are complete stay, and are in the record.
    """
    out_dir, progress = Path(out_dir), progress or NoProgress()
    with told_as_output(out_dir, "cannot be made"):
        out_dir.mkdir(parents=True, exist_ok=True)
    known, done = _read_record(out_dir), dict[str, dict[str, Any]]()
    missing = [f for f in plan.files if overwrite or not (out_dir / f.path).is_file()]
    needed = replace(plan, files=tuple(missing)).sure_bytes
    free = shutil.disk_usage(out_dir).free
    if needed > free:
        raise OutputError(f"{needed / 1e9:.1f} GB to fetch and {free / 1e9:.1f} GB free", where=out_dir)
    progress.start(len(plan.files), plan.manifest.name)

    def work(file: RemoteFile) -> None:
        new = file in missing
        path = download.download(
            file.url, out_dir / file.path, headers=file.headers, sign=file.sign, check=file.check,
            overwrite=overwrite,
        )  # fmt: skip
        if new or known.get(file.path, {}).get("bytes") != path.stat().st_size:
            done[file.path] = {
                "source": plan.manifest.name, "product": plan.product, "address": file.address,
                "date": file.day, "licence": plan.manifest.licence, "bytes": path.stat().st_size,
                "checksum": file.checksum, "sha256": file_sha256(path),
            }  # fmt: skip
        log.debug("%s: %s", file.path, "fetched" if new else "kept")
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
    return [f.path for f in missing], [f.path for f in plan.files if f not in missing]


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


def _read_record(folder: Path) -> dict[str, dict[str, Any]]:
    """What is on record of a folder, by path; empty without a record. Raises DataError."""
    path = folder / RECORD
    if not path.is_file():
        return {}
    try:
        entries = dict(json.loads(path.read_text())["files"])
        if not all({"bytes", "sha256"} <= set(entry) for entry in entries.values()):
            raise ValueError("an entry without bytes and sha256")
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
