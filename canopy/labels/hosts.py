"""Which files a source offers for an area: of NEON (`labels.neon`), a WFS, a STAC API, or NASA's CMR.

A WFS 2.0 indexes tiles, as IGN does for LiDAR HD. Longitude comes first by asking in CRS:84, never in
EPSG:4326, whose order servers disagree about; and a tile is chosen by the bounds that its name states, not by
the geometry that came back. Servers cap a request, so pages are asked for until none is left.

Earthdata (GEDI) is asked through `earthaccess`. Searching is anonymous; a login is made when the first file
is fetched: EARTHDATA_TOKEN, or EARTHDATA_USERNAME and EARTHDATA_PASSWORD, or a netrc file. Files come through
canopy's own downloader, so they resume and are checked; the token is dropped when the archive redirects to
its storage.
"""

from __future__ import annotations

import json
import os
import re
import threading
from collections.abc import Mapping
from dataclasses import replace
from functools import lru_cache
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qs, urlencode, urlsplit

import shapely
from shapely.geometry import shape
from shapely.geometry.base import BaseGeometry

from canopy import web
from canopy.errors import AreaError, FetchError, InputError, refuse_options, require
from canopy.files import host_of, redact
from canopy.geo.area import AOI
from canopy.imagery.dates import parse_day
from canopy.imagery.stac import search
from canopy.imagery.stac_items import resolve, signer
from canopy.labels.catalog import LabelManifest, Product, WfsLayer, base_name, label_source
from canopy.labels.fetch import Plan, RemoteFile, Wish, checksum_of, whole_number
from canopy.labels.neon import plan_neon

if TYPE_CHECKING:
    import pystac

PAGE = 1000
_MOST_PAGES = 200
_EMPTY_TRIES = 3
_SURVEY = "3dep:usgs_id"  # of a STAC item: the survey that it is a tile of
_SLIVER = 0.02  # a tile whose share of new ground is less adds nothing but a second year
_MOST_ASKED = 32  # files whose size is asked for one by one
_UNITS = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
_one_login = threading.Lock()
_LOGIN = (
    "set EARTHDATA_TOKEN, or EARTHDATA_USERNAME and EARTHDATA_PASSWORD, or write ~/.netrc "
    "(accounts: urs.earthdata.nasa.gov)"
)


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
    chosen, details = manifest.product(product)
    area, coverage = wish.area, manifest.geometry
    if manifest.protocol != "neon":
        refuse_options({"--site": wish.sites}, where=name, because="sites are NEON's")
        if area is None:
            raise InputError(f"{name} is found by area", expected="--bbox, --bounds or --aoi")
    if area is not None and coverage is not None and not coverage.intersects(area.lonlat):
        raise AreaError(
            f"{name} has nothing there ({area.describe()})", remedy=f"see `canopy data describe {name}`"
        )
    if area is None or manifest.protocol == "neon":
        found, notes = plan_neon(manifest, details, wish)
    elif manifest.protocol == "wfs":
        found, notes = _plan_wfs(manifest, details, wish, area)
    elif manifest.protocol == "stac":
        found, notes = _plan_stac(manifest, details, wish, area)
    else:
        found, notes = _plan_earthdata(manifest, details, wish, area), []
    if not found and area is not None:
        raise AreaError(f"nothing there ({area.describe()})", where="; ".join([name, *notes]))
    unique = {file.path: file for file in found}
    files = [unique[key] for key in sorted(unique)]
    if sum(file.bytes is None for file in files) <= _MOST_ASKED:
        files = [file if file.bytes is not None else _with_size(file) for file in files]
    return Plan(manifest, chosen, tuple(files), tuple(notes))


def _with_size(file: RemoteFile) -> RemoteFile:
    url = file.sign(file.url, False) if file.sign else file.url
    headers = file.headers(False) if file.headers else None
    return replace(file, bytes=web.peek(url, 1, headers=headers)[1])


def _sized(size: int | None, product: Product, about: bool = False) -> dict[str, Any]:
    """What a RemoteFile says of its size: the catalogue's number, else the usual one."""
    if size is not None:
        return {"bytes": size, "about": about}
    return {"bytes": product.about_bytes, "about": product.about_bytes is not None}


# ---- WFS --------------------------------------------------------------------------------------
def _plan_wfs(
    manifest: LabelManifest, product: Product, wish: Wish, area: AOI
) -> tuple[list[RemoteFile], list[str]]:
    """Files of the tiles that touch the area, and notes for the user."""
    layer = product.layers[0]
    found = []
    for feature in _features(manifest.href, layer, area):
        one = _tile_file(feature, layer, product, wish)
        if one is not None:
            found.append(one)
    # A tile of several deliveries has one file name: the newest one counts, whatever the order of the answer.
    files = {file.name: file for _, file in sorted(found, key=lambda pair: pair[0])}
    again = len(found) - len(files)
    notes = [f"{again} tiles have an older edition, which is left out"] if again else []
    return list(files.values()), notes


def _features(href: str, layer: WfsLayer, area: AOI) -> list[Mapping[str, Any]]:
    """All features that touch the area's bounding box."""
    west, south, east, north = area.lonlat.bounds
    found: list[Mapping[str, Any]] = []
    total, empty = None, 0
    for _ in range(_MOST_PAGES):
        query = {
            "SERVICE": "WFS",
            "VERSION": "2.0.0",
            "REQUEST": "GetFeature",
            "TYPENAMES": layer.typename,
            "OUTPUTFORMAT": "application/json",
            "SRSNAME": "CRS:84",
            "BBOX": f"{west:.7f},{south:.7f},{east:.7f},{north:.7f},CRS:84",
            "COUNT": PAGE,
            "STARTINDEX": len(found),
        }
        response = web.get(f"{href}?{urlencode(query)}", what="the list of tiles", absent=(400, 404))
        try:
            document = json.loads(response.content)
            page = list(document["features"])
        except (ValueError, KeyError, TypeError):
            raise FetchError(
                f"{host_of(href)} gives no list of {layer.typename} ({response.status_code})",
                where=redact(href),
                remedy="the service may have renamed the layer: see `canopy data describe`",
            ) from None
        total = whole_number(document.get("numberMatched", document.get("totalFeatures")))
        found += page
        # A server may cap a page below what was asked: only its total, or an empty page, says it was all.
        if total is not None and len(found) >= total:
            return found
        if not page and (total is None or empty == _EMPTY_TRIES):
            break
        empty = 0 if page else empty + 1
    else:
        raise InputError(
            f"more than {len(found)} tiles there", where=redact(href), remedy="ask for a smaller area"
        )
    if total is not None:
        raise FetchError(
            f"{host_of(href)} says it has {total} tiles there and gives {len(found)}",
            where=redact(href),
            remedy="try again later: it does so when it is busy",
        )
    return found


def _tile_file(
    feature: Mapping[str, Any], layer: WfsLayer, product: Product, wish: Wish
) -> tuple[str, RemoteFile] | None:
    """When the tile was published or else flown, to sort by, and its file; None where it is not wanted."""
    properties = feature.get("properties") or {}
    value = properties.get(layer.attribute)
    if not isinstance(value, str) or not value:
        return None  # a tile without this product
    url = product.href.replace("{value}", value) if product.href else value
    # IGN's index holds some http addresses, and some names with a dash that are served with a `_`.
    url = re.sub(r"^http://(?=[^/]*geopf\.fr/)", "https://", url)
    url = re.sub(r"(LHD_[A-Z]{3}_\d{4})-(\d{4}_)", r"\1_\2", url)
    # The name is the query field FILENAME of a map request, else the end of the path.
    fields = {key.upper(): values[0] for key, values in parse_qs(urlsplit(url).query).items()}
    name = fields.get("FILENAME") or base_name(urlsplit(url).path)
    first, last = (
        parse_day(str(properties.get(key) or ""))
        for key in ("date_debut_acquisition", "date_fin_acquisition")
    )
    first, last = first or last, last or first
    if not (wish.names(name) and wish.holds(first, last) and wish.touches(name, feature.get("geometry"))):
        return None
    day = last.isoformat() if last else None
    edition = str(properties.get("date_edition") or day or "")
    return edition, RemoteFile(url=url, name=name, day=day, **_sized(None, product))


# ---- STAC -------------------------------------------------------------------------------------
def _plan_stac(
    manifest: LabelManifest, product: Product, wish: Wish, area: AOI
) -> tuple[list[RemoteFile], list[str]]:
    """Files of the items whose footprints touch the area, survey by survey, and notes for the user.

    A place flown in several years is taken from one survey, the newest or that nearest to `wish.near`; of the
    others come the tiles that reach beyond it. Each has a folder of its own: trees of different years may not
    be gridded together.
    """
    surveys: dict[str, list[tuple[BaseGeometry, RemoteFile]]] = {}
    for item in search(manifest.href, manifest.collection, area, wish.datetime):
        outline = shape(item.geometry).intersection(area.lonlat) if item.geometry else area.lonlat
        if (asset := item.assets.get(product.asset or "")) is None or outline.is_empty:
            continue
        file = _item_file(item, asset, product, manifest)
        if wish.names(file.name):
            surveys.setdefault(file.folder, []).append((outline, file))

    found, notes, covered = [], [], shapely.Polygon()
    for name in sorted(surveys, key=lambda name: (min(wish.order(f.day) for _, f in surveys[name]), name)):
        new = [
            (outline, file)
            for outline, file in surveys[name]
            if outline.difference(covered).area > _SLIVER * outline.area
        ]
        found += [file for _, file in new]
        covered = shapely.union_all([covered, *(outline for outline, _ in new)])
        if name and len(surveys) > 1:
            days = sorted({file.day or "date unknown" for _, file in surveys[name]})
            flown = " to ".join(dict.fromkeys((days[0], days[-1])))
            notes.append(f"{name} ({flown}): {len(new)} of {len(surveys[name])} tiles taken")
    if notes:
        by = (
            f"that nearest to {wish.near}" if wish.near else "the newest (--date takes that nearest to a day)"
        )
        notes.insert(0, f"surveys of several years; where they overlap, {by}")
    return found, notes


def _item_file(
    item: pystac.Item, asset: pystac.Asset, product: Product, manifest: LabelManifest
) -> RemoteFile:
    url = resolve(asset.href, item.get_self_href() or manifest.href)
    name, properties, more = base_name(url), item.properties, asset.extra_fields

    def plain(text: object) -> str:
        return re.sub(r"[^A-Za-z0-9._-]", "_", str(text or ""))

    # Projects of different years reuse tile names: the item's id tells them apart.
    identity = plain(item.id)
    multihash = re.fullmatch(r"1220([0-9a-fA-F]{64})", str(more.get("file:checksum", "")))
    return RemoteFile(
        url=url,
        name=name if name.split(".")[0] in identity else f"{identity}-{name}",
        folder=plain(properties.get(_SURVEY)),
        checksum=checksum_of("sha256", multihash[1]) if multihash else None,
        day=str(properties.get("datetime") or properties.get("end_datetime") or "")[:10] or None,
        sign=signer(manifest.signing),
        **_sized(whole_number(more.get("file:size")), product),
    )


# ---- Earthdata --------------------------------------------------------------------------------
def _plan_earthdata(manifest: LabelManifest, product: Product, wish: Wish, area: AOI) -> list[RemoteFile]:
    """Granules of a product that touch the area's bounding box."""
    query: dict[str, Any] = {"short_name": product.code, "bounding_box": area.bounds_lonlat}
    if product.version:
        query["version"] = product.version
    if wish.datetime:
        first, slash, last = wish.datetime.partition("/")
        edges = first, last if slash else first
        query["temporal"] = tuple(None if edge in ("", "..") else edge for edge in edges)
    earthaccess = _earthaccess()
    try:
        granules = earthaccess.search_data(**query)
    except Exception as error:  # earthaccess passes on whatever its HTTP library raises
        raise FetchError(
            f"Earthdata did not answer the search ({redact(error)[:200]})", where=manifest.name
        ) from None
    links = [(granule, url) for granule in granules for url in granule.data_links(access="external")]
    files = [_granule_file(granule, url, product) for granule, url in links]
    return [file for file in files if re.search(product.match or "", file.name) and wish.names(file.name)]


def _earthaccess() -> Any:
    require("searches of Earthdata", "earthaccess", "earthaccess")
    import earthaccess

    return earthaccess


def _granule_file(granule: Mapping[str, Any], url: str, product: Product) -> RemoteFile:
    name = base_name(url)
    umm = granule.get("umm") or {}
    parts = (umm.get("DataGranule") or {}).get("ArchiveAndDistributionInformation") or []
    facts = next((part for part in parts if part.get("Name") == name), parts[0] if len(parts) == 1 else {})
    checksum = facts.get("Checksum") or {}
    kind = str(checksum.get("Algorithm", "")).lower().replace("-", "")
    # CMR gives exact bytes, or a rounded number with its unit.
    size, unit = whole_number(facts.get("SizeInBytes")), _UNITS.get(str(facts.get("SizeUnit", "")).upper())
    about = size is None and unit != 1
    if size is None and unit and isinstance(facts.get("Size"), (int, float)):
        size = int(facts["Size"] * unit)
    times = (umm.get("TemporalExtent") or {}).get("RangeDateTime") or {}
    return RemoteFile(
        url=url,
        name=name,
        checksum=checksum_of(kind, checksum.get("Value")) if kind in ("md5", "sha256") else None,
        day=str(times.get("BeginningDateTime", ""))[:10] or None,
        headers=_bearer_of(),
        **_sized(size, product, about),
    )


def _bearer_of() -> web.Headers:
    """The header of a logged-in session, for one file; made anew where the last one that it had is refused.

    Raises FetchError with how to log in.
    """
    last: list[Mapping[str, str]] = []

    def headers(fresh: bool) -> Mapping[str, str]:
        with _one_login:
            if fresh and last[-1:] == [_bearer()]:  # no other file has renewed it since
                _bearer.cache_clear()
            last.append(_bearer())
        return last[-1]

    return headers


@lru_cache(maxsize=1)
def _bearer() -> Mapping[str, str]:
    earthaccess = _earthaccess()
    named = os.environ.get("EARTHDATA_USERNAME") and os.environ.get("EARTHDATA_PASSWORD")
    strategy = "environment" if os.environ.get("EARTHDATA_TOKEN") or named else "netrc"
    try:
        auth = earthaccess.Auth().login(strategy=strategy)  # its own session would not log in again
        token = auth.token["access_token"] if auth.authenticated else None
    except Exception as error:  # of many kinds, some with the answer of the login host in their text
        raise FetchError(
            f"no Earthdata login ({type(error).__name__})", where=strategy, remedy=_LOGIN
        ) from None
    if not token:
        raise FetchError("no Earthdata login", where=strategy, remedy=_LOGIN)
    return {"Authorization": f"Bearer {token}"}
