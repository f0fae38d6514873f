"""NEON's data API, v0: which site-months exist of a product, and their files with sizes and checksums.

`{api}/products/{product}` lists the months of every site; `{api}/data/{product}/{site}/{YYYY-MM}` lists
files, and has asked for a token since June 2026. The token comes from NEON_API_TOKEN, goes only to the API's
own host, and is never shown. File URLs are signed for a week: a refused one is asked for again.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Mapping
from datetime import date
from typing import Any
from urllib.parse import urljoin, urlsplit

import httpx
from shapely.geometry import box

from canopy import download
from canopy.errors import AreaError, FetchError, InputError
from canopy.files import host_of, redact
from canopy.imagery.names import parse_range
from canopy.labels.catalog import (
    NO_HEADERS,
    LabelManifest,
    Product,
    RemoteFile,
    Wish,
    checksum_of,
    whole_number,
)
from canopy.labels.names import neon_site, read_name, sites_near

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
    try:
        return parse_range(month)
    except ValueError:
        return None, None


def _touches(name: str, wish: Wish) -> bool:
    if wish.area is None:
        return True
    tile = read_name(name)
    return tile is not None and bool(wish.area.to_crs(tile.crs).geometry.intersects(box(*tile.bounds)))


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
        response = download.get(url, headers=headers, what="the list of files", absent=(400, 401, 403, 404))
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
