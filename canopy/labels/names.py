"""NEON's field sites, and what the names of lidar tiles say of their place.

Three facts of NEON's airborne platform (AOP) trip people up, so they live in the table
`data_manifests/labels/neon-sites.csv` and in `neon.yaml` beside it: some sites are published under another
one (TREE under STEI), the zone of the flights is that of the flight site (BLAN and LEWI fly in 17N), and the
lowest height a CHM can hold depends on the lidar that flew.
"""

from __future__ import annotations

import csv
import difflib
import math
import re
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path, PurePosixPath
from typing import Literal

from pydantic import Field, field_validator, model_validator

from canopy.config import Settings, validate_settings
from canopy.errors import ConfigError, InputError
from canopy.geo.area import AOI
from canopy.geo.crs import METRES_PER_DEGREE
from canopy.runtime import manifests_dir

Split = Literal["train", "val", "test", "none"]
TABLE = "neon-sites.csv"
# A flight box is about 10 to 20 km wide and holds the site's tower, not always in its middle.
REACH_KM = 25.0


class NeonSite(Settings):
    """One site.

    Attributes:
        site: NEON's four letters.
        name, state: as NEON writes them.
        kind: terrestrial, aquatic, or `flight` for a flight box that is no field site.
        domain: NEON domain, D01 to D20.
        lat, lon: of the tower or stream station, WGS 84 degrees.
        utm_zone: zone of the site's own coordinates, such as 17N.
        published_under: the site whose name its airborne data carry; None: its own.
        flown: True where airborne data are known to exist, None where we do not know.
        years: years of flights that we could verify, those of the flight site; there may be more.
        split: part of the training plan; `none`: not used.
        unverified: fields that could not be verified in a public source and are empty.
        notes: what a user should know.
    """

    site: str = Field(pattern=r"^[A-Z]{4}$")
    name: str = Field(min_length=1)
    kind: Literal["terrestrial", "aquatic", "flight"]
    domain: str = Field(pattern=r"^D(0[1-9]|1\d|20)$")
    state: str = Field(pattern=r"^[A-Z]{2}$")
    lat: float | None = Field(ge=-90, le=90)
    lon: float | None = Field(ge=-180, le=180)
    utm_zone: str | None = Field(pattern=r"^\d{1,2}[NS]$")
    published_under: str | None = Field(default=None, pattern=r"^[A-Z]{4}$")
    flown: bool | None = None
    years: tuple[int, ...] = ()
    split: Split
    unverified: tuple[str, ...] = ()
    notes: str = ""

    @field_validator("years", "unverified", mode="before")
    @classmethod
    def _words(cls, value: object) -> object:
        return tuple(value.split()) if isinstance(value, str) else value or ()

    @field_validator("years")
    @classmethod
    def _years_rise(cls, value: tuple[int, ...]) -> tuple[int, ...]:
        if list(value) != sorted(set(value)) or any(not 2012 <= year <= 2100 for year in value):
            raise ValueError("years are not rising four-digit years from 2012 on")
        return value

    @model_validator(mode="after")
    def _gaps_are_named(self) -> NeonSite:
        for name in ("lat", "lon", "utm_zone", "flown", "years"):
            empty = getattr(self, name) in (None, ())
            if empty != (name in self.unverified):
                raise ValueError(f"{name} is {'empty' if empty else 'given'}, which `unverified` denies")
        return self

    @property
    def flight_site(self) -> str:
        """The site whose name its airborne data carry."""
        return self.published_under or self.site


def read_sites(path: Path) -> dict[str, NeonSite]:
    """Read and check a table of sites.

    Raises:
        ConfigError: unreadable, a column too many or too few, a value out of range, a site twice, or a flight
            site that is not in the table.
    """
    try:
        with open(path, newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise ConfigError(f"cannot be read ({error})", where=path) from error
    sites: dict[str, NeonSite] = {}
    for line, row in enumerate(rows, 2):
        where = f"{path}, line {line}"
        if None in row or None in row.values():
            raise ConfigError("has another number of columns than the header", where=where)
        texts = ("notes", "years", "unverified")  # text even when empty
        site = validate_settings(
            NeonSite, {k: v if v or k in texts else None for k, v in row.items()}, where=where
        )
        if site.site in sites:
            raise ConfigError(f"{site.site} is there twice", where=where)
        sites[site.site] = site
    for site in sites.values():
        flight = sites.get(site.flight_site)
        if flight is None or flight.published_under:
            raise ConfigError(
                f"{site.site} is published under {site.published_under!r}",
                where=path,
                expected="a site that is published under its own name",
            )
    return sites


_cached = lru_cache(maxsize=4)(read_sites)


def neon_sites() -> dict[str, NeonSite]:
    """All sites by their four letters, sorted. Raises ConfigError."""
    return _cached(manifests_dir() / "labels" / TABLE)


def neon_site(code: str) -> NeonSite:
    """One site.

    Raises:
        InputError: no such site; names the nearest ones.
    """
    sites = neon_sites()
    found = sites.get(code.upper())
    if found is None:
        close = difflib.get_close_matches(code.upper(), sites, n=3, cutoff=0.5)
        raise InputError(
            f"no NEON site {code!r}" + (f": did you mean {' or '.join(close)}?" if close else ""),
            expected="a four-letter code such as HARV",
        )
    return found


def aop_crs(code: str) -> str:
    """CRS of a site's airborne data, such as `EPSG:32617`: the zone of the site that was flown.

    Raises:
        InputError: no such site, or a flight box whose zone is not known.
    """
    site = neon_site(code)
    zone = neon_site(site.flight_site).utm_zone
    if zone is None:
        raise InputError(f"the zone of {site.site}'s flights is not known", remedy="read it from the file")
    return f"EPSG:{326 if zone.endswith('N') else 327}{int(zone[:-1]):02d}"


def sites_near(area: AOI, reach_km: float = REACH_KM) -> list[str]:
    """Flight sites whose own or shared station lies in an area or within `reach_km` of its bounding box, the
    nearest first."""
    west, south, east, north = area.bounds_lonlat
    width = (east - west) % 360.0
    found: dict[str, float] = {}
    for site in neon_sites().values():
        if site.lat is None or site.lon is None or site.flown is not True:
            continue
        past = (site.lon - west) % 360.0  # degrees east of the west edge
        beside = 0.0 if past <= width else min(past - width, 360.0 - past)
        above = max(south - site.lat, 0.0, site.lat - north)
        distance = METRES_PER_DEGREE / 1000 * math.hypot(above, beside * math.cos(math.radians(site.lat)))
        if distance <= reach_km:
            found[site.flight_site] = min(distance, found.get(site.flight_site, math.inf))
    return sorted(found, key=lambda code: (found[code], code))


# ---- tiles -----------------------------------------------------------------------------------
_NEON_LIDAR = re.compile(
    r"NEON_D(?P<domain>\d\d)_(?P<site>[A-Z]{4})_(?:DP1|DP3)_(?P<east>\d{6})_(?P<north>\d{7})_"
    r"(?:(?:CHM|DTM|DSM)\.tif|classified_point_cloud(?:_colorized)?\.laz)"
)
_NEON_IMAGE = re.compile(r"\d{4}_(?P<site>[A-Z]{4})_\d+_(?P<east>\d{6})_(?P<north>\d{7})_image\.tif")
IGN_CRS = {
    "LAMB93": "EPSG:2154",
    "RGAF09UTM20": "EPSG:5490",
    "UTM22RGFG95": "EPSG:2972",
    "RGR92UTM40S": "EPSG:2975",
    "RGM04UTM38S": "EPSG:4471",
    "RGM23UTM38S": "EPSG:10674",
}
_IGN = re.compile(
    r"LHD_[A-Z]{3}_(?P<x>\d{4})[_-](?P<y>\d{4})_(?:PTS|MN[THS])(?:_[OC])?(?:_(?P<step>\dM\d\d))?"
    r"_(?P<crs>[A-Z0-9]+)_[A-Z0-9]+(?:\.copc\.laz|\.tif)?"
)
_KM = 1000


@dataclass(frozen=True)
class Tile:
    """A 1 km tile of lidar or of its images, as its file's name has it.

    Attributes:
        filename: the name.
        bounds: (west, south, east, north) of the tile, metres.
        raster_bounds: of its raster: IGN's are centred on pixel corners, so they begin half a pixel (0.25 m
            at 0.5 m) west and north of the tile.
        crs: of the bounds.
        site: NEON's flight site, or None.
    """

    filename: str
    bounds: tuple[float, float, float, float]
    raster_bounds: tuple[float, float, float, float]
    crs: str
    site: str | None = None


def read_name(name: str) -> Tile | None:
    """What a file name (or path, or URL) says about its place, or None where it is of another grammar.

    NEON's names hold the south-west corner in metres, IGN's the NORTH-west corner in km.

    Raises:
        InputError: a NEON site that does not exist, lies in another domain, or has no files of its own.
    """
    base = base_name(name)
    found = _NEON_LIDAR.fullmatch(base) or _NEON_IMAGE.fullmatch(base)
    if found:
        return _neon_tile(base, found)
    found = _IGN.fullmatch(base)
    if not found or found["crs"] not in IGN_CRS:
        return None
    west, north = int(found["x"]) * _KM, int(found["y"]) * _KM
    half = float((found["step"] or "0M00").replace("M", ".")) / 2
    raster = (west - half, north - _KM + half, west + _KM - half, north + half)
    return Tile(base, (west, north - _KM, west + _KM, north), raster, IGN_CRS[found["crs"]])


def _neon_tile(base: str, found: re.Match[str]) -> Tile:
    site = neon_site(found["site"])
    domain = f"D{found.groupdict().get('domain') or site.domain[1:]}"
    if domain != site.domain:
        raise InputError(f"{base}: site {site.site} in domain {domain}", expected=site.domain)
    if site.published_under:
        raise InputError(f"{base}: {site.site} has no files of its own", expected=site.published_under)
    west, south = int(found["east"]), int(found["north"])
    bounds = (west, south, west + _KM, south + _KM)
    return Tile(base, bounds, bounds, aop_crs(site.site), site.site)


def base_name(name: str) -> str:
    """Last part of a path or URL, without a query."""
    return PurePosixPath(name.replace("\\", "/").split("?")[0]).name
