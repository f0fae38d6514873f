"""Sources of labels (airborne lidar, GEDI): one strict YAML file each in `data_manifests/labels`.

As with imagery, a manifest says what exists, where, in which form and under which terms; it never holds
pixels, points, keys or signed URLs. A value that could not be verified in a public source is null and named
in `unverified`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator
from shapely.geometry import MultiPolygon, Polygon
from shapely.geometry.base import BaseGeometry

from canopy.config import Named, Settings, check_known, load_named
from canopy.errors import InputError
from canopy.runtime import manifests_dir
from canopy.sources.manifest import coverage_geometry

Protocol = Literal["neon", "wfs", "stac", "earthdata", "s3"]


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


class Lidar(Settings):
    """A lidar instrument and what it does to a CHM.

    Attributes:
        names: how files and papers write it, lower case.
        floor_m: heights below this are 0 in the source's CHM.
    """

    names: tuple[str, ...] = Field(min_length=1)
    floor_m: float = Field(ge=0)


class Flown(Settings):
    """Which instrument flew where and when; fields left out mean any."""

    lidar: str
    site: str | None = None
    years: tuple[int, int]


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
        href: address of the catalogue: NEON API, WFS, STAC API, or bucket; empty for Earthdata.
        collection: STAC collection.
        index: WFS that gives the names of a bucket's files in an area.
        signing: who signs the URLs just before they are read.
        parallel: downloads at a time that the host bears.
        products, default: kinds of files, and the one that is meant.
        crs: of the files, EPSG:... or in words; None: as each file says.
        dates: first and last acquisition, `2017/2017`; an open end as `..`.
        licence, attribution, citation: the terms and how to cite.
        doi: where there is one.
        checksum: which kind the source publishes.
        coverage: as in imagery manifests; None: only where its catalogue says.
        lidars, flown: instruments, their CHM floors, and who flew where and when; the first match counts.
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
    index: str | None = None
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
    coverage: (
        str
        | tuple[float, float, float, float]
        | list[tuple[float, float, float, float]]
        | dict[str, Any]
        | None
    )
    lidars: dict[str, Lidar] = Field(default_factory=dict)
    flown: tuple[Flown, ...] = ()
    sites: tuple[str, ...] = ()
    partners: tuple[Partner, ...] = Field(min_length=1)
    unverified: tuple[str, ...] = ()
    verified: tuple[str, ...] = Field(min_length=1)
    notes: str = ""

    @field_validator("coverage")
    @classmethod
    def _coverage_is_an_area(cls, value: Any) -> Any:
        if value is None:
            return None
        geometry = coverage_geometry(value)
        if geometry.is_empty or not geometry.is_valid or not isinstance(geometry, (Polygon, MultiPolygon)):
            raise ValueError("coverage is not a valid area")
        return value

    @model_validator(mode="after")
    def _parts_fit(self) -> LabelManifest:
        if self.default not in self.products:
            raise ValueError(f"default {self.default!r} is none of the products {', '.join(self.products)}")
        if self.protocol != "earthdata" and not self.href.startswith(("http://", "https://")):
            raise ValueError(f"protocol {self.protocol} needs href, an http(s) address")
        if self.protocol == "stac" and not self.collection:
            raise ValueError("protocol stac needs collection")
        needed = {"neon": "code", "wfs": "layers", "stac": "asset", "earthdata": "code", "s3": "match"}[
            self.protocol
        ]
        for name, product in self.products.items():
            if not getattr(product, needed):
                raise ValueError(f"product {name!r} needs {needed} for protocol {self.protocol}")
        for entry in self.flown:
            if entry.lidar not in self.lidars:
                raise ValueError(f"flown names the lidar {entry.lidar!r}, which is not in lidars")
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


def labels_dir() -> Path:
    """Folder of the label manifests."""
    return manifests_dir() / "labels"


def known_labels() -> list[str]:
    """Names of all label sources, sorted."""
    return sorted(path.stem for path in labels_dir().glob("*.yaml"))


def load_label_manifest(path: Path) -> LabelManifest:
    """Read and check one manifest.

    Raises:
        ConfigError: unreadable, a field that is unknown, missing or wrong, or a name that is not the file's.
    """
    return load_named(LabelManifest, path)


def label_source(name: str) -> LabelManifest:
    """The manifest of a label source.

    Raises:
        InputError: no such source; names the nearest one and lists all.
    """
    check_known(name, known_labels(), "label source")
    return load_label_manifest(labels_dir() / f"{name}.yaml")
