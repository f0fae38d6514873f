"""STAC: search an API or walk a static catalog, and mosaic the items it finds.

Items lie newest first, then least cloudy, then by id. One that lies wholly under newer outlines is kept in
reserve: it fills where those have no pixels. URLs are signed just before they are read and again after a
refusal; a signed URL is never kept. An item that cannot be read is an error that names it, never a hole in
the map.
"""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import date
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import pystac
import shapely
from pystac.utils import make_absolute_href
from shapely.geometry import MultiPolygon, Polygon, box, shape
from shapely.geometry.base import BaseGeometry

from canopy import download
from canopy.errors import AreaError, FetchError, ImageryError, InputError, MissingDependencyError
from canopy.files import host_of, is_url, redact
from canopy.geo.area import AOI
from canopy.imagery.bands import check_options, find_rgb
from canopy.imagery.base import COLOURS, SWAP_HINT, ReadOptions, swapped_area
from canopy.imagery.files import Mosaic
from canopy.imagery.names import is_within, parse_day
from canopy.imagery.scene import Handles, Scene, SceneRecord
from canopy.runtime import log

USUAL_KEYS = ("visual", "image", "rgb", "RGB", "ortho", "orthophoto", "true-color", "TCI")
_RASTER_TYPES = ("image/tiff", "image/vnd.stac.geotiff", "image/jp2", "image/jpeg", "image/png")
_RASTER_ENDS = (".tif", ".tiff", ".jp2")
_NOT_DATA_ROLES = {"thumbnail", "overview", "metadata", "mask", "data-mask"}
MAX_DOCUMENTS = 20_000
MAX_ITEMS = 2000
_LEAST_NEW_AREA_DEG2 = 1e-10  # about one square metre
_ABSENT = (403, 404, 410)
_ALL_CLOUD = 100.0


class TooManyItemsError(InputError):
    """A search finds more items than one mosaic may have; smaller areas can be searched on their own."""


def open_stac(
    href: str,
    area: AOI | None,
    options: ReadOptions,
    *,
    name: str,
    collection: str | None = None,
    assets: Sequence[str] = (),
    signing: str | None = None,
    gsd_m: float | None = None,
) -> Mosaic:
    """Find the items for an area and dates, and open them as a mosaic.

    Args:
        href: STAC API root, static catalog, collection or item; URL or path.
        area: what will be read; an API search requires it.
        options: how to read; `datetime` limits the search.
        name: for messages.
        collection: limits an API search.
        assets: asset keys to take first, whatever their roles.
        signing: `planetary-computer`, or None: as the address tells.
        gsd_m: ground sample distance to state when the items do not.

    Raises:
        AreaError: no item in the area; ImageryError: no item has colour; FetchError: the host.
    """
    check_options(options)

    def find(place: AOI | None) -> tuple[list[SceneRecord], list[str]]:
        items, notes = _items(href, collection, place, options.datetime)
        records = [record_of(item, assets, gsd_m) for item in items]
        return [
            r for r in records
            if is_within(r.day, options.datetime) and (place is None or place.lonlat.intersects(r.outline))
        ], notes  # fmt: skip

    found, notes = find(area)
    if not found:
        place = f" ({area.describe()})" if area else ""
        when = f" of {options.datetime}" if options.datetime else ""
        swapped = swapped_area(area) if area else None
        remedy = SWAP_HINT if swapped and find(swapped)[0] else "; ".join(notes) or None
        raise AreaError(f"no imagery{when} there{place}", where=name, remedy=remedy)
    colourless = [record.scene_id for record in found if not record.assets]
    if len(colourless) == len(found):
        raise ImageryError(
            f"item {colourless[0]!r} has no colour asset",
            where=name,
            expected="an asset `visual`, `image` or `rgb`, or three with the common names red, green, blue",
        )
    if colourless:
        example = f"such as {colourless[0]}"
        notes.append(
            f"{len(colourless)} of {len(found)} items have no colour asset and are left out, {example}"
        )
    signing, handles = signing or signing_of(href), Handles()
    records = in_order([record for record in found if record.assets], area)
    scenes = [Scene(record, options, handles, signer(signing)) for record in records]
    return Mosaic(
        scenes,
        name=name,
        notes=[*notes, *scenes[0].facts.notes, *scenes[0].pixel_notes()],
        handles=handles,
        options=options,
        signing=signing,
        has_own_extent=False,
    )


def in_order(records: Sequence[SceneRecord], area: AOI | None) -> list[SceneRecord]:
    """Newest first, then the least cloudy, then by id; those that lie under others in the area are hidden."""
    wanted = area.lonlat if area else box(-180, -90, 180, 90)
    covered: BaseGeometry = Polygon()
    ordered: list[SceneRecord] = []
    for record in sorted(records, key=lambda r: (-(r.day or date.min).toordinal(), r.cloud, r.scene_id)):
        seen = shapely.intersection(record.outline, wanted)
        hidden = bool(ordered) and seen.difference(covered).area <= _LEAST_NEW_AREA_DEG2
        ordered.append(record.model_copy(update={"hidden": hidden}))
        covered = covered if hidden else shapely.union(covered, seen)
    return ordered


# ---- finding ---------------------------------------------------------------------------------
def _items(
    href: str, collection: str | None, area: AOI | None, datetime: str | None
) -> tuple[list[pystac.Item], list[str]]:
    """Items that may touch the area, and notes about what is missing."""
    root = _read_if_there(href)
    if root is None:
        raise ImageryError("no such catalog", where=redact(href), remedy="check the address")
    links = {str(link.get("rel")): str(link.get("href", "")) for link in root.get("links", [])}
    if "search" in links:
        return search(href, collection, area, datetime), []
    if root.get("type") == "Collection" and "items" in links and "root" in links:
        # A collection inside an API: search it from the API's root.
        return search(resolve(links["root"], href), str(root.get("id")), area, datetime), []
    return walk(href, root, area.lonlat if area else None)


def search(href: str, collection: str | None, area: AOI | None, datetime: str | None) -> list[pystac.Item]:
    """Items of a STAC API in an area and time.

    Raises:
        InputError: no area, or more than MAX_ITEMS items; FetchError: the host, or it gives fewer items
            than it says it has; MissingDependencyError: pystac-client is not installed.
    """
    if area is None:
        raise InputError(
            "a STAC API is searched by area", where=redact(href), remedy="give --bbox, --bounds or --aoi"
        )
    try:
        from pystac_client import Client
        from pystac_client.exceptions import APIError
        from pystac_client.stac_api_io import StacApiIO
        from requests import RequestException
        from urllib3.util.retry import Retry
    except ImportError:
        raise MissingDependencyError(
            "STAC APIs need pystac-client",
            where=redact(href),
            remedy="install it: pip install 'canopy-height[stac]'",
        ) from None
    rules = download.policy()
    retry = Retry(
        total=rules.attempts - 1,
        backoff_factor=rules.first_wait_s,
        backoff_max=rules.longest_wait_s,
        status_forcelist=sorted(download.TRANSIENT),
        allowed_methods=None,
    )
    io = StacApiIO(max_retries=retry, timeout=rules.timeout_s)
    io.session.trust_env = not download.is_local(href)
    try:
        found = Client.open(href, stac_io=io).search(
            bbox=area.bounds_lonlat,
            collections=[collection] if collection else None,
            datetime=datetime,
            max_items=MAX_ITEMS + 1,
        )
        items, promised = list[pystac.Item](), 0
        for page in found.pages():
            items += page.items
            said = page.extra_fields.get("numberMatched") or page.extra_fields.get("context", {}).get(
                "matched"
            )
            promised = int(said or promised)
    except (APIError, RequestException) as error:
        said = f"{host_of(href)} did not answer the search ({redact(error)[:200]})"
        raise FetchError(said, where=redact(href)) from None
    except (KeyError, TypeError, ValueError, AttributeError, pystac.STACError) as error:
        said = f"{host_of(href)} answers no valid STAC ({redact(error)[:200]})"
        raise ImageryError(said, where=redact(href)) from None
    if len(items) > MAX_ITEMS:
        raise TooManyItemsError(
            f"more than {MAX_ITEMS} items there",
            where=redact(href),
            remedy="limit the dates with --datetime",
        )
    if len(items) < promised:  # an empty page ends a search, also one that a busy host gives too early
        raise FetchError(
            f"{host_of(href)} says it has {promised} items there and gives {len(items)}",
            where=redact(href),
            remedy="try again later",
        )
    return items


def walk(
    where: str, root: Mapping[str, Any], wanted: BaseGeometry | None
) -> tuple[list[pystac.Item], list[str]]:
    """Items of a static catalog, collection, item or item collection, level by level.

    Args:
        where: its address.
        root: its JSON.
        wanted: collections whose extent misses it (EPSG:4326) are not entered.

    Returns:
        The items, and a note where documents are named that are not there.

    Raises:
        ImageryError: a document cannot be read (it is named), or there are too many.
    """
    items, missing, seen = list[pystac.Item](), list[str](), {where}
    level: list[tuple[str, Mapping[str, Any]]] = [(where, root)]
    with ThreadPoolExecutor(download.REQUESTS_PER_HOST) as pool:
        while level:
            targets = []
            for address, document in level:
                kind = document.get("type")
                if kind in ("Feature", "FeatureCollection"):
                    features = [document] if kind == "Feature" else document.get("features", [])
                    items += [_item(feature, address) for feature in features]
                elif kind not in ("Catalog", "Collection") and "links" not in document:
                    raise ImageryError(f"JSON of type {kind!r}", where=redact(address), expected="STAC")
                elif wanted is None or any(_box(each).intersects(wanted) for each in _extent(document)):
                    links = [
                        link for link in document.get("links", []) if link.get("rel") in ("child", "item")
                    ]
                    targets += [resolve(str(link.get("href", "")), address) for link in links]
            targets = [target for target in dict.fromkeys(targets) if target not in seen]
            seen.update(targets)
            if len(seen) > MAX_DOCUMENTS:
                raise ImageryError(
                    f"more than {MAX_DOCUMENTS} documents",
                    where=redact(where),
                    remedy="give one collection's address",
                )
            found = dict(zip(targets, pool.map(_read_if_there, targets), strict=True))
            missing += [target for target, document in found.items() if document is None]
            level = [(target, document) for target, document in found.items() if document is not None]
    notes = (
        [f"{len(missing)} documents of the catalog are missing, such as {redact(missing[0])}"]
        if missing
        else []
    )
    return items, notes


def _read_if_there(where: str) -> Mapping[str, Any] | None:
    """A JSON object from a path or URL; None where it is named but not there (object stores have such holes).

    Raises:
        ImageryError: it cannot be fetched or is not a JSON object.
    """
    try:
        if is_url(where):
            response = download.get(where, what="JSON", absent=_ABSENT)
            if response.status_code in _ABSENT:
                return None
            value = json.loads(response.content)
        else:
            value = json.loads(Path(where).read_text(encoding="utf-8"))
    except ImageryError:
        raise
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise ImageryError(f"not readable as JSON ({error})", where=redact(where)) from None
    if not isinstance(value, dict):
        raise ImageryError("not a JSON object", where=redact(where), expected="a STAC catalog or item")
    return value


def _extent(document: Mapping[str, Any]) -> Sequence[Sequence[float]]:
    """Boxes of a collection; the whole world where it does not say."""
    return document.get("extent", {}).get("spatial", {}).get("bbox") or [(-180, -90, 180, 90)]


def _box(bounds: Sequence[float]) -> BaseGeometry:
    """A STAC bbox (4 or 6 numbers; west > east crosses the antimeridian)."""
    half = len(bounds) // 2
    west, south, east, north = bounds[0], bounds[1], bounds[half], bounds[half + 1]
    if west <= east:
        return box(west, south, east, north)
    return box(west, south, 180, north).union(box(-180, south, east, north))


def resolve(href: str, base: str) -> str:
    """An href relative to its document -> an absolute path or http(s) URL.

    Raises:
        ImageryError: a remote catalog that points at files of this machine, or an unknown scheme.
    """
    if href.startswith("s3://"):
        parts = urlsplit(href)
        return f"https://{parts.netloc}.s3.amazonaws.com{parts.path}"
    if href.startswith("file://") and not is_url(base):
        href = unquote(urlsplit(href).path)
    target = str(make_absolute_href(href, base if is_url(base) else str(Path(base).absolute())))
    if is_url(base) and not is_url(target):
        raise ImageryError(f"a remote catalog points at {redact(href)}", where=redact(base))
    if "://" in target and not is_url(target):
        raise ImageryError(f"cannot read {redact(href)}", where=base, expected="a file or an http(s) URL")
    return target


# ---- items -----------------------------------------------------------------------------------
def _item(document: Mapping[str, Any], address: str) -> pystac.Item:
    """An item's JSON as pystac reads it; relative hrefs count from its own address, else from `address`."""
    links = [str(link.get("href")) for link in document.get("links", []) if link.get("rel") == "self"]
    own = next(filter(is_url, links), address)
    try:
        properties = {"datetime": None, **document.get("properties", {})}
        whole = {"stac_version": "1.0.0", "links": [], "assets": {}, **document, "properties": properties}
        return pystac.Item.from_dict(whole, href=own)
    except (KeyError, TypeError, ValueError, AttributeError, pystac.STACError) as error:
        name = str(document.get("id") or redact(address))
        raise ImageryError(f"no valid STAC item ({type(error).__name__}: {error})", where=name) from None


def record_of(item: pystac.Item, preferred: Sequence[str] = (), gsd_m: float | None = None) -> SceneRecord:
    """Reduce an item to what reading needs.

    Args:
        item: with absolute hrefs, or with its own address.
        preferred: asset keys to take first.
        gsd_m: ground sample distance where it states none.

    Raises:
        ImageryError: the item has no usable geometry; the message names it.
    """
    properties, base = item.properties, item.get_self_href() or ""
    hrefs, bands = choose_assets(item.assets, preferred)
    gsds = [asset.extra_fields.get("gsd") for asset in item.assets.values()]
    try:
        outline = shape(item.geometry)
    except Exception as error:  # shapely raises many kinds on malformed GeoJSON
        raise ImageryError(f"item without a usable geometry ({error})", where=item.id) from None
    outline = outline if outline.is_valid else outline.buffer(0)
    if not isinstance(outline, (Polygon, MultiPolygon)) or outline.is_empty:
        raise ImageryError("item whose geometry is no area", where=item.id)
    cloud = properties.get("eo:cloud_cover", properties.get("tile:clouds_percent"))
    return SceneRecord(
        scene_id=item.id,
        assets=tuple(resolve(href, base) for href in hrefs),
        day=parse_day(str(properties.get("datetime") or properties.get("start_datetime") or "")),
        wkt=outline.wkt,
        bands=bands,
        cloud=_ALL_CLOUD if cloud is None else cloud,
        gsd_m=properties.get("gsd") or min((gsd for gsd in gsds if gsd), default=gsd_m),
    )


def choose_assets(
    assets: Mapping[str, pystac.Asset], preferred: Sequence[str] = ()
) -> tuple[tuple[str, ...], tuple[int, int, int] | None]:
    """Hrefs that make RGB, and band numbers if the catalog tells them.

    In order: the preferred keys (whatever their roles), the usual keys, an asset whose bands include red,
    green and blue, and three assets whose common names are red, green and blue. Empty when there are none.
    """
    usable = {key: assets[key] for key in sorted(assets) if _is_raster(assets[key])}
    named = [assets[key] for key in preferred if key in assets]
    named += [usable[key] for key in USUAL_KEYS if key in usable]
    named += [asset for asset in usable.values() if find_rgb(_band_names(asset))]
    if named:
        return (named[0].href,), find_rgb(_band_names(named[0]))
    singles = {tuple(_band_names(asset)): asset.href for asset in reversed(usable.values())}
    if all((colour,) in singles for colour in COLOURS):
        return tuple(singles[colour,] for colour in COLOURS), None
    return (), None


def _is_raster(asset: pystac.Asset) -> bool:
    if _NOT_DATA_ROLES & set(asset.roles or []) or not asset.href:
        return False
    kind = str(asset.media_type or "").split(";")[0].strip().lower()
    return kind in _RASTER_TYPES or urlsplit(asset.href).path.lower().endswith(_RASTER_ENDS)


def _band_names(asset: pystac.Asset) -> list[str]:
    """Lower-case colour of every band: `eo:bands` (STAC 1.0) or `bands` (1.1)."""
    bands = asset.extra_fields.get("eo:bands") or asset.extra_fields.get("bands") or []
    return [
        str(b.get("common_name") or b.get("eo:common_name") or b.get("name") or "").lower() for b in bands
    ]


# ---- signatures: the Planetary Computer's storage ---------------------------------------------
PLANETARY_COMPUTER = "planetary-computer"
_HOST = "planetarycomputer.microsoft.com"
_TOKENS_AT = "https://planetarycomputer.microsoft.com/api/sas/v1/token"
# A token lives about 45 minutes. One that is younger than half a minute was refused for another reason than
# its age: a new one would be refused, too.
_OLD_S, _YOUNG_S = 1800.0, 30.0
_token_lock = threading.Lock()
_tokens: dict[str, tuple[str, float]] = {}


def signer(signing: str | None) -> download.Signer | None:
    """The function that signs URLs of a source: `sign(url, fresh)`; None where nothing is signed."""
    return planetary_computer_sign if signing == PLANETARY_COMPUTER else None


def signing_of(catalog: str) -> str | None:
    """Who signs the URLs that a catalog gives, by its host."""
    host = urlsplit(catalog).hostname or ""
    return PLANETARY_COMPUTER if host == _HOST or host.endswith("." + _HOST) else None


def planetary_computer_sign(href: str, fresh: bool) -> str:
    """A Planetary Computer URL that may be read for some time; `fresh`: the last one was refused.

    Tokens are asked for by one thread at a time, from $PC_SDK_SAS_URL where that is set, with
    $PC_SDK_SUBSCRIPTION_KEY. Some containers may be read by anybody: where the token service fails, the URL
    is left as it is.
    """
    parts = urlsplit(href)
    account, _, rest = (parts.hostname or "").partition(".")
    if rest != "blob.core.windows.net" or account == "ai4edatasetspublicassets" or parts.query:
        return href
    container = f"{account}/{parts.path.lstrip('/').split('/', 1)[0]}"
    with _token_lock:
        token, made = _tokens.get(container, ("", -_OLD_S))
        age = time.monotonic() - made
        if age >= _OLD_S or (fresh and age > _YOUNG_S):
            address = f"{os.environ.get('PC_SDK_SAS_URL', _TOKENS_AT)}/{container}"
            key = os.environ.get("PC_SDK_SUBSCRIPTION_KEY")
            headers = {"Ocp-Apim-Subscription-Key": key} if key else None
            try:
                token = str(download.get(address, headers=headers, what="a signature").json()["token"])
            except (FetchError, ValueError, KeyError, TypeError) as error:
                log.warning("%s: no signature (%s); trying without one", host_of(href), error)
                return href
            _tokens[container] = token, time.monotonic()
    return f"{href}?{token}"
