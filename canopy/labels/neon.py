"""NEON's field sites, as its airborne platform (AOP) flies and publishes them.

Three facts trip people up, so they live in the table `data_manifests/labels/neon-sites.csv` and in
`data_manifests/labels/neon.yaml`, and are asked through functions here: some sites are published under
another one (TREE under STEI), the zone of the flights is that of the flight site (BLAN and
LEWI fly in 17N), and the lowest height a CHM can hold depends on the lidar that flew.

File names of NEON's airborne products: site, product and the tile's south-west corner.

NEON's data API, v0: which site-months exist of a product, and their files with sizes and CRC-32C.

`{api}/products/{product}` lists the months of every site; `{api}/data/{product}/{site}/{YYYY-MM}` lists
files, and has asked for a token since June 2026. The token comes from NEON_API_TOKEN, goes only to the API's
own host, and is never shown. File URLs may be signed for some days: a refused one is asked for again.
"""

from __future__ import annotations

import csv
import difflib
import json
import math
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import date
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urljoin, urlsplit

import httpx
from pydantic import Field, field_validator, model_validator
from shapely.geometry import box

from canopy import download as http
from canopy.config import Settings, validate_settings
from canopy.errors import AreaError, ConfigError, FetchError, InputError
from canopy.files import host_of, redact
from canopy.geo.area import AOI
from canopy.geo.crs import METRES_PER_DEGREE
from canopy.labels.catalog import (
    NO_HEADERS,
    LabelManifest,
    Product,
    RemoteFile,
    Wish,
    checksum_of,
    whole_number,
)
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
        ConfigError: unreadable, a column too many or too few, a value out of range, a site twice, a flight
            site that is not in the table, or a site in another split than the flights that show it.
    """
    try:
        with open(path, newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise ConfigError(f"cannot be read ({error})", where=path) from error
    sites: dict[str, NeonSite] = {}
    for line, row in enumerate(rows, 2):
        if None in row or None in row.values():
            raise ConfigError("has another number of columns than the header", where=f"{path}, line {line}")
        site = validate_settings(
            NeonSite, {k: v or None for k, v in row.items()} | _texts(row), where=f"{path}, line {line}"
        )
        if site.site in sites:
            raise ConfigError(f"{site.site} is there twice", where=f"{path}, line {line}")
        sites[site.site] = site
    for site in sites.values():
        flight = sites.get(site.flight_site)
        if flight is None or flight.published_under:
            raise ConfigError(
                f"{site.site} is published under {site.published_under!r}",
                where=path,
                expected="a site that is published under its own name",
            )
        if flight.split != site.split:
            raise ConfigError(
                f"{site.site} is {site.split} but {flight.site}, whose flights show it, is {flight.split}",
                where=path,
            )
    return sites


def _texts(row: dict[str, str]) -> dict[str, str]:
    """Fields that are text even when empty."""
    return {name: row[name] for name in ("notes", "years", "unverified") if name in row}


@lru_cache(maxsize=4)
def _cached(path: Path) -> dict[str, NeonSite]:
    return read_sites(path)


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


Bounds = tuple[float, float, float, float]
KM = 1000


def require(fits: bool, what: str, expected: str) -> None:
    """Raise InputError unless a name's field fits."""
    if not fits:
        raise InputError(what, expected=expected)


NeonKind = Literal["CHM", "DTM", "DSM", "points", "image"]
_NEON_LIDAR = re.compile(
    r"NEON_D(?P<domain>\d\d)_(?P<site>[A-Z]{4})_(?P<level>DP[13])_(?P<east>\d{6})_(?P<north>\d{7})_"
    r"(?P<kind>CHM\.tif|DTM\.tif|DSM\.tif|classified_point_cloud_colorized\.laz|classified_point_cloud\.laz)"
)
_NEON_IMAGE = re.compile(
    r"(?P<year>\d{4})_(?P<site>[A-Z]{4})_(?P<visit>\d+)_(?P<east>\d{6})_(?P<north>\d{7})_image\.tif"
)


@dataclass(frozen=True)
class NeonTile:
    """A 1 km tile of NEON's airborne products; the name holds its south-west corner.

    Attributes:
        site: whose name the file carries, the flight site.
        kind: CHM, DTM, DSM, points (classified point cloud) or image (camera mosaic).
        easting, northing: of the south-west corner, metres, whole kilometres.
        year, visit: of an image; lidar names carry neither.
        coloured: the point cloud has colours, which its name says.
    """

    site: str
    kind: NeonKind
    easting: int
    northing: int
    year: int | None = None
    visit: int | None = None
    coloured: bool = True

    def __post_init__(self) -> None:
        site = neon_site(self.site)
        require(
            site.published_under is None,
            f"{self.site} has no files of its own",
            f"{site.flight_site}, which it is published under",
        )
        require(
            self.easting % KM == 0 and self.northing % KM == 0 and 100_000 <= self.easting < 1_000_000
            and 1_000_000 <= self.northing < 10_000_000,
            f"corner {self.easting}, {self.northing}",
            "whole kilometres, 6 digits east and 7 north",
        )  # fmt: skip
        require(
            (self.kind == "image") == (self.year is not None) == (self.visit is not None),
            f"year {self.year}, visit {self.visit} of a {self.kind}",
            "both for an image, neither for lidar",
        )

    @classmethod
    def at(
        cls,
        site: str,
        kind: NeonKind,
        x: float,
        y: float,
        *,
        year: int | None = None,
        visit: int | None = None,
    ) -> NeonTile:
        """The tile that holds a point, in the CRS of the site's flights; a site published under another one
        gives that one's tile."""
        return cls(neon_site(site).flight_site, kind, int(x // KM) * KM, int(y // KM) * KM, year, visit)

    @classmethod
    def parse(cls, name: str) -> NeonTile | None:
        """The tile of a file name, or None where the name is of another grammar. Raises InputError for an
        unknown site, or a domain that is not the site's."""
        image, lidar = _NEON_IMAGE.fullmatch(name), _NEON_LIDAR.fullmatch(name)
        if image:
            return cls(
                image["site"],
                "image",
                int(image["east"]),
                int(image["north"]),
                int(image["year"]),
                int(image["visit"]),
            )
        if not lidar:
            return None
        kind: NeonKind = "points" if lidar["kind"].endswith(".laz") else lidar["kind"][:3]  # type: ignore[assignment]
        if (kind == "points") != (lidar["level"] == "DP1"):
            return None
        domain = neon_site(lidar["site"]).domain
        require(
            f"D{lidar['domain']}" == domain,
            f"{name}: site {lidar['site']} in domain D{lidar['domain']}",
            domain,
        )
        return cls(
            lidar["site"],
            kind,
            int(lidar["east"]),
            int(lidar["north"]),
            coloured=kind != "points" or "color" in lidar["kind"],
        )

    @property
    def filename(self) -> str:
        """The file's name."""
        corner = f"{self.easting:06d}_{self.northing:07d}"
        if self.kind == "image":
            return f"{self.year}_{self.site}_{self.visit}_{corner}_image.tif"
        start = f"NEON_{neon_site(self.site).domain}_{self.site}"
        if self.kind == "points":
            return f"{start}_DP1_{corner}_classified_point_cloud{'_colorized' if self.coloured else ''}.laz"
        return f"{start}_DP3_{corner}_{self.kind}.tif"

    @property
    def bounds(self) -> Bounds:
        """(west, south, east, north) in metres."""
        return self.easting, self.northing, self.easting + KM, self.northing + KM

    @property
    def crs(self) -> str:
        """CRS of the site's flights."""
        return aop_crs(self.site)


TOKEN = "NEON_API_TOKEN"
_HELP = f"set {TOKEN} to a token of your account at data.neonscience.org (My Account, API Tokens)"


def plan_neon(manifest: LabelManifest, product: Product, wish: Wish) -> tuple[list[RemoteFile], list[str]]:
    """Files of a product for an area or for named sites, and notes for the user.

    Without dates the newest year of each site is taken; a year's flight may be spread over two months.

    Raises:
        AreaError: no flown site near the area, or no tile in it; InputError: neither area nor site, an
            unknown site; FetchError: the host, or a token that is missing or refused.
    """
    sites, notes = _flight_sites(wish)
    api = _Api(manifest.href, product)
    available = api.months()
    files: list[RemoteFile] = []
    for site in sites:
        months = [month for month in available.get(site, []) if wish.holds(*_days(month))]
        if not months:
            notes.append(f"{site}: no {product.code}" + (f" in {wish.datetime}" if wish.datetime else ""))
            continue
        newest = [month for month in months if month[:4] == months[-1][:4]]
        if wish.datetime is None and len(newest) < len(months):
            notes.append(f"{site}: the newest year of {months[0]} to {months[-1]}; others with --datetime")
            months = newest
        for month in months:
            files += [f for f in api.files(site, month) if wish.names(f.name) and _touches(f.name, wish)]
    notes += [f"{place} is provisional: NEON may still change it" for place in sorted(api.provisional)]
    if not files and wish.area is not None:
        raise AreaError(f"NEON has no tile there ({wish.area.describe()})", where="; ".join(notes) or None)
    return files, notes


def _flight_sites(wish: Wish) -> tuple[list[str], list[str]]:
    notes = []
    if wish.sites:
        sites = []
        for code in wish.sites:
            site = neon_site(code)
            if site.published_under:
                notes.append(f"{site.site} is published under {site.published_under}")
            sites.append(site.flight_site)
        return list(dict.fromkeys(sites)), notes
    if wish.area is None:
        raise InputError("neither an area nor a site", expected="--site CODE, --bbox, --bounds or --aoi")
    sites = sites_near(wish.area)
    if not sites:
        raise AreaError(f"no NEON site within 25 km of {wish.area.describe()}", remedy="name one with --site")
    return sites, notes


def _days(month: str) -> tuple[date | None, date | None]:
    found = re.fullmatch(r"(\d{4})-(\d\d)", month)
    if not found or not 1 <= int(found[2]) <= 12:
        return None, None
    year, number = int(found[1]), int(found[2])
    after = date(year + number // 12, number % 12 + 1, 1)
    return date(year, number, 1), date.fromordinal(after.toordinal() - 1)


def _touches(name: str, wish: Wish) -> bool:
    if wish.area is None:
        return True
    tile = NeonTile.parse(name)
    return tile is not None and wish.area.to_crs(aop_crs(tile.site)).geometry.intersects(box(*tile.bounds))


class _Api:
    """One product at one API."""

    def __init__(self, href: str, product: Product) -> None:
        self.href, self.product = href.rstrip("/"), product
        self.provisional: set[str] = set()

    def headers_for(self, url: str) -> Mapping[str, str]:
        """The token, for the API's own host only."""
        token = os.environ.get(TOKEN, "").strip()
        at_home = urlsplit(url).netloc == urlsplit(self.href).netloc
        return {"X-API-TOKEN": token} if token and at_home else NO_HEADERS

    def months(self) -> dict[str, list[str]]:
        """Months with data by flight site, oldest first."""
        found: dict[str, list[str]] = {}
        for page in self._pages(f"{self.href}/products/{self.product.code}"):
            for row in page.get("siteCodes") or []:
                months = [str(month) for month in row.get("availableMonths") or []]
                found.setdefault(str(row.get("siteCode")), []).extend(months)
        return {site: sorted(set(months)) for site, months in found.items()}

    def files(self, site: str, month: str) -> list[RemoteFile]:
        """Files of a site and month whose names fit the product."""
        listing = f"{self.href}/data/{self.product.code}/{site}/{month}"
        place = f"{site}-{month}"
        return [self._file(row, listing, place) for row in self._rows(listing, place)]

    def _rows(self, listing: str, place: str) -> list[Mapping[str, Any]]:
        rows: list[Mapping[str, Any]] = []
        for page in self._pages(listing):
            rows += page.get("files") or []
            if page.get("release") == "PROVISIONAL":
                self.provisional.add(place)
        return [row for row in rows if re.search(self.product.match or "", str(row.get("name", "")))]

    def _file(self, row: Mapping[str, Any], listing: str, folder: str) -> RemoteFile:
        name, url = str(row["name"]), str(row.get("url") or "")

        def sign(url: str, fresh: bool) -> str:
            # A signed URL that has run out: the API gives a new one.
            again = (
                (str(r.get("url")) for r in self._rows(listing, folder) if r.get("name") == name)
                if fresh
                else iter(())
            )
            return next(again, url)

        return RemoteFile(
            url=url,
            name=name,
            bytes=whole_number(row.get("size")),
            folder=folder,
            checksum=checksum_of("crc32c", row.get("crc32c")) or checksum_of("md5", row.get("md5")),
            day=folder.partition("-")[2],
            headers=lambda: self.headers_for(url),
            sign=sign,
        )

    def _pages(self, url: str) -> Iterator[Mapping[str, Any]]:
        """The `data` object of a listing and of all its further pages."""
        seen: set[str] = set()
        following: str | None = url
        while following is not None and following not in seen:
            seen.add(following)
            response = self._ask(following)
            document = _document(response, following)
            yield document["data"]
            following = self._next(document, response, following)

    def _ask(self, url: str) -> httpx.Response:
        headers = {"Accept": "application/json", **self.headers_for(url)}
        response = http.get(url, headers=headers, what="the list of files", absent=(400, 401, 403, 404))
        if response.status_code in (401, 403):
            told = "refuses the token in " + TOKEN if "X-API-TOKEN" in headers else "asks for a token"
            raise FetchError(
                f"{host_of(url)} {told} ({response.status_code})", where=redact(url), remedy=_HELP
            )
        if response.status_code in (400, 404):
            raise FetchError(f"{host_of(url)} has no such product, site or month", where=redact(url))
        return response

    def _next(self, document: Mapping[str, Any], response: httpx.Response, url: str) -> str | None:
        """Address of the next page: a Link header, or a field `next` of the document."""
        link = response.links.get("next", {}).get("url") or document.get("next")
        if not link:
            return None
        target = urljoin(url, str(link))
        if urlsplit(target).netloc != urlsplit(self.href).netloc:
            raise FetchError(f"{host_of(url)} sends on to another host for the next page", where=redact(url))
        return target


def _document(response: httpx.Response, url: str) -> Mapping[str, Any]:
    try:
        document = json.loads(response.content)
    except ValueError:
        document = None
    if not isinstance(document, dict) or not isinstance(document.get("data"), dict):
        raise FetchError(
            f"{host_of(url)} answers no NEON listing", where=redact(url), remedy="try again later"
        )
    return document
