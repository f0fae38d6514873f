"""Sources of labels (airborne lidar, GEDI): one strict YAML file each in `data_manifests/labels`.

As with imagery, a manifest says what exists, where, in which form and under which terms; it never holds
pixels, points, keys or signed URLs. A value that could not be verified in a public source is null and named
in `unverified`. Here too: what is wished of a source, and what its catalogue offers for download.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path
from typing import Literal

from pydantic import Field, model_validator
from shapely.geometry.base import BaseGeometry

from canopy.config import Named, Settings, load_manifest, manifest_names
from canopy.download import Signer, file_crc32c
from canopy.errors import DataError, InputError
from canopy.files import file_sha256, redact
from canopy.geo.area import AOI
from canopy.imagery.named import Coverage, coverage_geometry
from canopy.imagery.names import parse_range

Protocol = Literal["neon", "wfs", "stac", "earthdata"]


class WfsLayer(Settings):
    """One feature type of a WFS, and the property that says where a tile's file is.

    Attributes:
        typename: namespace:name.
        attribute: property with the file's URL, or with what `href` of the product takes as `{value}`.
    """

    typename: str = Field(pattern=r"^[\w.-]+:[\w.-]+$")
    attribute: str


class Product(Settings):
    """One kind of file of a source.

    Attributes:
        title: what it is.
        format: file format.
        unit: of its values; `m` or None.
        gsd_m: pixel side in metres of a raster.
        nodata: value that means no data.
        grammar: how its files are named, with fields in braces; None: as the catalogue says.
        code: NEON product, or Earthdata short name.
        version: Earthdata version.
        match: regular expression that a file's name must contain.
        layers: WFS feature types, tried in this order.
        asset: STAC asset key.
        href: URL of a file with `{value}`, where the catalogue gives only names.
        about_bytes: usual size of a file, for the list that is shown before a download.
    """

    title: str
    format: str
    unit: Literal["m"] | None = None
    gsd_m: float | None = Field(default=None, gt=0)
    nodata: float | None = None
    grammar: str | None = None
    code: str | None = None
    version: str | None = None
    match: str | None = None
    layers: tuple[WfsLayer, ...] = ()
    asset: str | None = None
    href: str | None = Field(default=None, pattern=r"^https?://.*\{value\}")
    about_bytes: int | None = Field(default=None, gt=0)


class Partner(Settings):
    """Imagery that goes with the labels.

    Attributes:
        imagery: name of a manifest in data_manifests/imagery; None: not one of them.
        what: which imagery, how near in time, and what to watch.
    """

    imagery: str | None
    what: str


class LabelManifest(Named):
    """One source of labels.

    Attributes:
        name: what `canopy data get` takes; the file's stem.
        title: one line for lists.
        kind: what is measured.
        protocol: how files are found and fetched.
        href: address of the catalogue: NEON API, WFS or STAC API; empty for Earthdata.
        collection: STAC collection.
        signing: who signs the URLs just before they are read.
        parallel: downloads at a time that the host bears.
        products, default: kinds of files, and the one that is meant.
        crs: of the files, EPSG:... or in words; None: as each file says.
        dates: first and last acquisition, `2017/2017`; an open end as `..`.
        licence, attribution, citation: the terms and how to cite.
        doi: where there is one.
        checksum: which kind the source publishes.
        coverage: as in imagery manifests; None: only where its catalogue says.
        sites: sites of another source that belong to this one's region.
        partners: imagery that goes with the labels.
        unverified: fields that could not be verified in a public source; those that are empty stay so.
        verified: where the facts were read.
        notes: what a user should know.
    """

    title: str
    kind: Literal["airborne-lidar", "spaceborne-lidar"]
    protocol: Protocol
    href: str = ""
    collection: str | None = None
    signing: Literal["planetary-computer"] | None = None
    parallel: int = Field(default=4, ge=1, le=8)
    products: dict[str, Product] = Field(min_length=1)
    default: str
    crs: str | None
    dates: str = Field(pattern=r"^\d{4}(-\d\d){0,2}/(\d{4}(-\d\d){0,2}|\.\.)$")
    licence: str = Field(min_length=1)
    attribution: str = Field(min_length=1)
    citation: str = Field(min_length=1)
    doi: str | None = None
    checksum: Literal["crc32c", "md5", "sha256", "per file"] | None
    coverage: Coverage | None
    sites: tuple[str, ...] = ()
    partners: tuple[Partner, ...] = Field(min_length=1)
    unverified: tuple[str, ...] = ()
    verified: tuple[str, ...] = Field(min_length=1)
    notes: str = ""

    @model_validator(mode="after")
    def _parts_fit(self) -> LabelManifest:
        if self.default not in self.products:
            raise ValueError(f"default {self.default!r} is none of the products {', '.join(self.products)}")
        if self.protocol != "earthdata" and not self.href.startswith(("http://", "https://")):
            raise ValueError(f"protocol {self.protocol} needs href, an http(s) address")
        if self.protocol == "stac" and not self.collection:
            raise ValueError("protocol stac needs collection")
        needed = {"neon": "code", "wfs": "layers", "stac": "asset", "earthdata": "code"}[self.protocol]
        for name, product in self.products.items():
            if not getattr(product, needed):
                raise ValueError(f"product {name!r} needs {needed} for protocol {self.protocol}")
        return self

    @property
    def geometry(self) -> BaseGeometry | None:
        """Where the source has labels, EPSG:4326 (generous), or None where only its catalogue knows."""
        return None if self.coverage is None else coverage_geometry(self.coverage)

    def product(self, name: str | None) -> tuple[str, Product]:
        """A product by name, or the default one. Raises InputError."""
        name = name or self.default
        if name not in self.products:
            raise InputError(
                f"{self.name} has no product {name!r}", where="--product", expected=" or ".join(self.products)
            )
        return name, self.products[name]


def known_labels() -> list[str]:
    """Names of all label sources, sorted."""
    return manifest_names("labels")


def label_source(name: str) -> LabelManifest:
    """The manifest of a label source.

    Raises:
        InputError: no such source; names the nearest one and lists all. ConfigError: its file is wrong.
    """
    return load_manifest(LabelManifest, "labels", name, "label source")


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
    sign: Signer | None = field(default=None, repr=False, compare=False)

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
    with open(path, "rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()
