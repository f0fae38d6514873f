"""What a catalogue offers for download: files, sizes and checksums, before anything is fetched."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path

from canopy.errors import DataError, InputError
from canopy.files import file_sha256
from canopy.geo.aoi import AOI
from canopy.sources import http
from canopy.sources.crc32c import file_crc32c
from canopy.sources.dates import parse_range
from canopy.sources.paths import redact

_SAFE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,199}")
_CHECKSUM = re.compile(r"(crc32c|md5|sha256):[0-9a-f]+")
NO_HEADERS: Mapping[str, str] = {}


@dataclass(frozen=True)
class Wish:
    """What is wanted of a source.

    Attributes:
        area: files that touch it; None: all, where the catalogue can list all.
        datetime: STAC-style interval; None: the newest, or all where files have no dates.
        sites: NEON codes.
        match: regular expression that file names must contain.
    """

    area: AOI | None = None
    datetime: str | None = None
    sites: tuple[str, ...] = ()
    match: str | None = None

    def __post_init__(self) -> None:
        try:
            re.compile(self.match or "")
        except re.error as error:
            raise InputError(f"not a regular expression ({error})", where=f"--match {self.match}") from None
        try:
            parse_range(self.datetime)
        except ValueError as error:
            raise InputError(
                str(error), where="--datetime", expected="such as 2019, 2019-07 or 2018/2021"
            ) from None

    def holds(self, first: date | None, last: date | None) -> bool:
        """Whether a file of these days is within the interval; one without dates only where none is asked."""
        start, end = parse_range(self.datetime)
        if start is None and end is None:
            return True
        if first is None or last is None:
            return False
        return (start or date.min) <= last and first <= (end or date.max)

    def names(self, name: str) -> bool:
        """Whether a file of this name is wanted."""
        return self.match is None or re.search(self.match, name) is not None


@dataclass(frozen=True)
class RemoteFile:
    """One file that can be fetched.

    Attributes:
        url: where; may hold a signature, so it is shown only as `address`.
        name: file name, safe to use in a folder.
        folder: subfolder, where names alone would not tell files apart (flights of different years).
        bytes: size; None where nobody says.
        about: `bytes` is the usual size of such files, not this one's.
        checksum: `crc32c:`, `md5:` or `sha256:` and lower-case hex.
        day: acquisition, as the catalogue writes it.
        headers: gives request headers such as an access token; asked just before the download.
        sign: makes the URL readable, again after a refusal.
    """

    url: str = field(repr=False)
    name: str
    bytes: int | None = None
    folder: str = ""
    about: bool = False
    checksum: str | None = None
    day: str | None = None
    headers: Callable[[], Mapping[str, str]] = field(default=lambda: NO_HEADERS, repr=False, compare=False)
    sign: http.Signer | None = field(default=None, repr=False, compare=False)

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
        if self.checksum is not None and not _CHECKSUM.fullmatch(self.checksum):
            raise DataError(f"a checksum that cannot be read for {self.name}", where=self.address)

    @property
    def path(self) -> str:
        """Where it goes in a folder, with `/`."""
        return f"{self.folder}/{self.name}" if self.folder else self.name

    @property
    def address(self) -> str:
        """The URL without user, query and signature."""
        return redact(self.url)

    def check(self, path: Path) -> None:
        """Compare a complete local file with what the catalogue says.

        Raises:
            DataError: another size or checksum.
        """
        size = path.stat().st_size
        if self.bytes is not None and not self.about and size != self.bytes:
            raise DataError(
                f"{self.name} has {size} bytes", where=path, expected=f"{self.bytes}", remedy=_DAMAGED
            )
        if self.checksum is None:
            return
        kind, _, expected = self.checksum.partition(":")
        got = {"crc32c": file_crc32c, "md5": _file_md5, "sha256": file_sha256}[kind](path)
        if got != expected:
            raise DataError(f"{kind} of {self.name} is {got}", where=path, expected=expected, remedy=_DAMAGED)


_DAMAGED = "the file changed at its source or was damaged: fetch it again with --overwrite"


def checksum_of(kind: str, value: object) -> str | None:
    """A catalogue's checksum as `kind:hex`; None where it gives none."""
    text = str(value or "").strip().strip('"').lower()
    digits = {"crc32c": 8, "md5": 32, "sha256": 64}[kind]
    return f"{kind}:{text.zfill(digits)}" if re.fullmatch(rf"[0-9a-f]{{1,{digits}}}", text) else None


def whole_number(value: object) -> int | None:
    """A size as catalogues write it (number or text) -> int, or None."""
    try:
        number = int(str(value))
    except ValueError:
        return None
    return number if number >= 0 else None


def _file_md5(path: Path) -> str:
    digest = hashlib.md5(usedforsecurity=False)
    with open(path, "rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()
