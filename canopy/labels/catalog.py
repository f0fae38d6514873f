"""What sources of labels there are: manifests, NEON's sites, and what the names of tiles say of their place.

A source (airborne lidar, GEDI) is one strict YAML file in `data_manifests/labels`. As with imagery, it says
what exists, where, in which form and under which terms; it never holds pixels, points, keys or signed URLs.
A value that could not be verified in a public source is null and named in `unverified`.
"""

from __future__ import annotations

import csv
import difflib
import re
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path, PurePosixPath
from typing import Any, Literal

from pydantic import Field, model_validator
from shapely.geometry.base import BaseGeometry

from canopy.config import Named, Settings, load_manifest, manifest_names
from canopy.errors import ConfigError, DataError, InputError
from canopy.imagery.named import Coverage, coverage_geometry
from canopy.runtime import manifests_dir

Protocol = Literal["neon", "wfs", "stac", "earthdata", "quadkeys"]


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
        layers: WFS feature type; the first counts.
        asset: STAC asset key.
        zoom: of the quadkeys that name the tiles of a map.
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
    zoom: int | None = Field(default=None, ge=1, le=20)
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
    kind: Literal["airborne-lidar", "spaceborne-lidar", "height-map"]
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
    checksum: Literal["md5", "sha256", "per file"] | None
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
        needed = {
            "neon": "code", "wfs": "layers", "stac": "asset", "earthdata": "code", "quadkeys": "zoom"
        }[self.protocol]  # fmt: skip
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


# ---- NEON's sites -----------------------------------------------------------------------------
def neon_sites() -> dict[str, dict[str, Any]]:
    """NEON's field sites by their four letters: the rows of `neon-sites.csv`; what is not known is None.

    site, name, state (as NEON writes them), kind (terrestrial, aquatic, or `flight` for a flight box that is
    no field site), domain (D01 to D20), lat and lon (of the tower or stream station, WGS 84 degrees),
    utm_zone (of the site's own coordinates, such as 17N), published_under (the site whose name its airborne
    data carry; None: its own), flown (True where airborne data are known to exist), years (of flights that we
    could verify, those of the flight site), split (part of the training plan, or none), unverified (fields
    that are empty because no public source has them), notes. Made of them: flight_site, whose name airborne
    data carry, and flight_crs, the zone that it was flown in: BLAN and LEWI fly in 17N.

    Raises ConfigError for a table that cannot be read.
    """
    return _read_sites(manifests_dir() / "labels" / "neon-sites.csv")


@lru_cache(maxsize=4)
def _read_sites(path: Path) -> dict[str, dict[str, Any]]:
    try:
        with path.open(newline="", encoding="utf-8") as file:
            sites = {row["site"]: dict[str, Any](row) for row in csv.DictReader(file)}
        for row in sites.values():
            flight = sites[row["published_under"] or row["site"]]
            zone = flight["utm_zone"]
            row |= {
                "lat": float(row["lat"]) if row["lat"] else None,
                "lon": float(row["lon"]) if row["lon"] else None,
                "flown": row["flown"] == "yes" or None,
                "years": [int(year) for year in row["years"].split()],
                "unverified": row["unverified"].split(),
                "flight_site": flight["site"],
                "flight_crs": f"EPSG:{326 if zone[-1] == 'N' else 327}{int(zone[:-1]):02d}",
            }
    except (OSError, KeyError, ValueError, IndexError) as error:
        raise ConfigError(f"cannot be read ({error!r})", where=path) from error
    return {code: {k: None if v == "" else v for k, v in row.items()} for code, row in sites.items()}


def neon_site(code: str) -> dict[str, Any]:
    """One of `neon_sites`. Raises InputError for an unknown one; names the nearest ones."""
    sites = neon_sites()
    if code.upper() not in sites:
        close = difflib.get_close_matches(code.upper(), sites, n=3, cutoff=0.5)
        raise InputError(
            f"no NEON site {code!r}" + (f": did you mean {' or '.join(close)}?" if close else ""),
            expected="a four-letter code such as HARV",
        )
    return sites[code.upper()]


# NEON's height models set everything below this to 0, by the lidar that flew (metres).
SENSOR_FLOOR_M = {"gemini": 2.0, "riegl": 2 / 3, "galaxy": 2 / 3}


def sensor_floor(sensor: str | None) -> float:
    """Height in metres below which a NEON height model is set to 0; 0 where no sensor is given.

    Raises DataError for a sensor that is not known.
    """
    if not sensor:
        return 0.0
    words = sensor.lower()
    for name, floor in SENSOR_FLOOR_M.items():
        if name in words:
            return floor
    raise DataError(
        f"sensor {sensor!r} is not known", expected=", ".join(SENSOR_FLOOR_M), remedy="give floor_m instead"
    )


# ---- tiles ------------------------------------------------------------------------------------
_NEON = re.compile(
    r"(?:NEON_D\d\d_(?P<site>[A-Z]{4})_DP[13]_|\d{4}_(?P<flown>[A-Z]{4})_\d+_)"
    r"(?P<east>\d{6})_(?P<north>\d{7})_"
    r"(?:(?:CHM|DTM|DSM|image)\.tif|classified_point_cloud(?:_colorized)?\.laz)"
)
_IGN = re.compile(
    r"LHD_[A-Z]{3}_(?P<x>\d{4})[_-](?P<y>\d{4})_(?:PTS|MN[THS])(?:_[OC])?(?:_\dM\d\d)?"
    r"_(?P<crs>[A-Z0-9]+)_[A-Z0-9]+(?:\.copc\.laz|\.tif)?"
)
IGN_CRS = {
    "LAMB93": "EPSG:2154",
    "RGAF09UTM20": "EPSG:5490",
    "UTM22RGFG95": "EPSG:2972",
    "RGR92UTM40S": "EPSG:2975",
    "RGM04UTM38S": "EPSG:4471",
    "RGM23UTM38S": "EPSG:10674",
}
_KM = 1000


@dataclass(frozen=True)
class Tile:
    """A 1 km tile of lidar or of its images, as its file's name has it.

    Attributes:
        bounds: (west, south, east, north) of the tile, metres.
        crs: of the bounds.
        site: NEON's flight site, or None.
    """

    bounds: tuple[float, float, float, float]
    crs: str
    site: str | None = None


def read_name(name: str) -> Tile | None:
    """What a file name (or path, or URL) says about its place, or None where it is of another grammar.

    NEON's names hold the south-west corner in metres, IGN's the NORTH-west corner in km. Raises InputError
    for a NEON site that does not exist.
    """
    base = base_name(name)
    if found := _NEON.fullmatch(base):
        site = neon_site(found["site"] or found["flown"])
        west, south = int(found["east"]), int(found["north"])
        return Tile((west, south, west + _KM, south + _KM), site["flight_crs"], site["site"])
    found = _IGN.fullmatch(base)
    if not found or found["crs"] not in IGN_CRS:
        return None
    west, north = int(found["x"]) * _KM, int(found["y"]) * _KM
    return Tile((west, north - _KM, west + _KM, north), IGN_CRS[found["crs"]])


def base_name(name: str) -> str:
    """Last part of a path or URL, without a query."""
    return PurePosixPath(name.replace("\\", "/").split("?")[0]).name
