"""NEON's data API, v0: which site-months exist of a product, and their files with sizes.

`{api}/products/{product}` lists the months of every site; `{api}/data/{product}/{site}/{YYYY-MM}` lists
files, and has asked for a token since June 2026. The token comes from NEON_API_TOKEN, goes only to the API's
own host, and is never shown. File URLs are signed for a week: a refused one is asked for again.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Iterator, Mapping
from typing import Any
from urllib.parse import urljoin, urlsplit

import httpx

from canopy import web
from canopy.errors import AreaError, FetchError, InputError
from canopy.files import host_of, redact
from canopy.geo.area import AOI
from canopy.geo.crs import METRES_PER_DEGREE
from canopy.imagery.dates import parse_range
from canopy.labels.catalog import LabelManifest, Product, neon_site, neon_sites
from canopy.labels.fetch import RemoteFile, Wish, checksum_of, whole_number

TOKEN = "NEON_API_TOKEN"
_HELP = f"set {TOKEN} to a token of your account at data.neonscience.org (My Account, API Tokens)"
# A flight box is about 10 to 20 km wide and holds the site's tower, not always in its middle.
REACH_KM = 25.0


def sites_near(area: AOI) -> list[str]:
    """Flight sites whose own or shared station lies within `REACH_KM` of an area's bounding box, nearest
    first."""
    west, south, east, north = area.bounds_lonlat
    width = (east - west) % 360.0
    found: dict[str, float] = {}
    for site in neon_sites().values():
        lat, lon, code = site["lat"], site["lon"], site["flight_site"]
        if lat is None or lon is None or not site["flown"]:
            continue
        past = (lon - west) % 360.0  # degrees east of the west edge
        beside = 0.0 if past <= width else min(past - width, 360.0 - past)
        above = max(south - lat, 0.0, lat - north)
        distance = METRES_PER_DEGREE / 1000 * math.hypot(above, beside * math.cos(math.radians(lat)))
        if distance <= REACH_KM:
            found[code] = min(distance, found.get(code, math.inf))
    return sorted(found, key=lambda code: (found[code], code))


def plan_neon(manifest: LabelManifest, product: Product, wish: Wish) -> tuple[list[RemoteFile], list[str]]:
    """Files of a product for an area or for named sites, and notes for the user.

    Without dates the newest year of each site is taken; a year's flight may be spread over two months.

    Raises:
        AreaError: no flown site near the area; InputError: neither area nor site, an unknown site;
        FetchError: the host, or a token that is missing or refused.
    """
    notes = []
    for site in map(neon_site, wish.sites):
        if site["published_under"]:
            notes.append(f"{site['site']} is published under {site['published_under']}")
    sites = list(dict.fromkeys(neon_site(code)["flight_site"] for code in wish.sites))
    if not sites:
        if wish.area is None:
            raise InputError("neither an area nor a site", expected="--site CODE, --bbox, --bounds or --aoi")
        sites = sites_near(wish.area)
        if not sites:
            where = wish.area.describe()
            raise AreaError(f"no NEON site within {REACH_KM:g} km of {where}", remedy="name one with --site")
    api = _Api(manifest.href, product)
    available = api.months()
    files: list[RemoteFile] = []
    for code in sites:
        months = [month for month in available.get(code, []) if wish.holds(*parse_range(month))]
        if not months:
            notes.append(f"{code}: no {product.code}" + (f" in {wish.datetime}" if wish.datetime else ""))
            continue
        newest = [month for month in months if month[:4] == months[-1][:4]]
        if wish.datetime is None and len(newest) < len(months):
            notes.append(f"{code}: the newest year of {months[0]} to {months[-1]}; others with --datetime")
            months = newest
        for month in months:
            files += [f for f in api.files(code, month) if wish.names(f.name) and wish.touches(f.name)]
    notes += [f"{place} is provisional: NEON may still change it" for place in sorted(api.provisional)]
    return files, notes


class _Api:
    """One product at one API. `provisional`: site-months seen that are not part of a release."""

    def __init__(self, href: str, product: Product) -> None:
        self.href, self.product = href.rstrip("/"), product
        self.provisional: set[str] = set()

    def headers_for(self, url: str) -> Mapping[str, str]:
        """The token, for the API's own host only."""
        token = os.environ.get(TOKEN, "").strip()
        at_home = urlsplit(url).netloc == urlsplit(self.href).netloc
        return {"X-API-TOKEN": token} if token and at_home else {}

    def months(self) -> dict[str, list[str]]:
        """Months with data by flight site, oldest first."""
        found: dict[str, set[str]] = {}
        for page in self._pages(f"{self.href}/products/{self.product.code}"):
            for row in page.get("siteCodes") or []:
                found.setdefault(str(row.get("siteCode")), set()).update(row.get("availableMonths") or [])
        return {site: sorted(months) for site, months in found.items()}

    def files(self, site: str, month: str) -> list[RemoteFile]:
        """Files of a site and month whose names fit the product."""
        listing = f"{self.href}/data/{self.product.code}/{site}/{month}"
        return [self._file(row, listing, f"{site}-{month}") for row in self._rows(listing, f"{site}-{month}")]

    def _rows(self, listing: str, place: str) -> list[Mapping[str, Any]]:
        rows: list[Mapping[str, Any]] = []
        for page in self._pages(listing):
            rows += page.get("files") or []
            if page.get("release") == "PROVISIONAL":
                self.provisional.add(place)
        return [row for row in rows if re.search(self.product.match or "", str(row.get("name", "")))]

    def _file(self, row: Mapping[str, Any], listing: str, place: str) -> RemoteFile:
        name, url = str(row["name"]), str(row.get("url") or "")

        def sign(url: str, fresh: bool) -> str:
            if fresh:  # a signed URL that has run out: the API gives a new one
                again = (str(r.get("url")) for r in self._rows(listing, place) if r.get("name") == name)
                return next(again, url)
            return url

        return RemoteFile(
            url=url,
            name=name,
            bytes=whole_number(row.get("size")),
            folder=place,
            checksum=checksum_of("md5", row.get("md5")),
            day=place.partition("-")[2],
            headers=lambda _: self.headers_for(url),
            sign=sign,
        )

    def _pages(self, url: str) -> Iterator[Mapping[str, Any]]:
        """The `data` object of a listing and of all its further pages: a Link header, or a field `next`."""
        seen: set[str] = set()
        while url not in seen:
            seen.add(url)
            response = self._ask(url)
            try:
                document = json.loads(response.content)
                yield dict(document["data"])
            except (ValueError, KeyError, TypeError):
                raise FetchError(
                    f"{host_of(url)} answers no NEON listing", where=redact(url), remedy="try again later"
                ) from None
            following = response.links.get("next", {}).get("url") or document.get("next")
            url = urljoin(url, str(following)) if following else url

    def _ask(self, url: str) -> httpx.Response:
        headers = {"Accept": "application/json", **self.headers_for(url)}
        response = web.get(url, headers=headers, what="the list of files", absent=(401, 403))
        if response.status_code in (401, 403):
            told = "refuses the token in " + TOKEN if "X-API-TOKEN" in headers else "asks for a token"
            raise FetchError(
                f"{host_of(url)} {told} ({response.status_code})", where=redact(url), remedy=_HELP
            )
        return response
