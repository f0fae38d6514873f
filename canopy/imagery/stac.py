"""STAC: search an API or walk a static catalog, and mosaic the items it finds.

Items lie newest first, then least cloudy, then by id. One that lies wholly under newer outlines is kept in
reserve: it fills where those have no pixels. URLs are signed just before they are read and again after a
refusal; a signed URL is never kept. An item that cannot be read is an error that names it, never a hole in
the map.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
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
from canopy.imagery.bands import check_options
from canopy.imagery.base import COLOURS, SWAP_HINT, ReadOptions, swapped_area
from canopy.imagery.files import Mosaic, SceneRecord, pin_of
from canopy.imagery.names import parse_day, parse_range
from canopy.imagery.scene import Handles
from canopy.imagery.signing import signing_of

USUAL_KEYS = ("visual", "image", "rgb", "RGB", "ortho", "orthophoto", "true-color", "TCI")
_RASTER_TYPES = ("image/tiff", "image/vnd.stac.geotiff", "image/jp2", "image/jpeg", "image/png")
_RASTER_ENDS = (".tif", ".tiff", ".jp2")
_NOT_DATA_ROLES = {"thumbnail", "overview", "metadata", "mask", "data-mask"}
MAX_DOCUMENTS = 20_000
MAX_ITEMS = 2000
_LEAST_NEW_AREA_DEG2 = 1e-10  # about one square metre
_TRUNCATED_TRIES = 3
_ABSENT = (403, 404, 410)


class TooManyItemsError(InputError):
    """A search finds more items than one mosaic may have; smaller areas can be searched on their own."""


@dataclass(frozen=True)
class StacQuery:
    """Where to look.

    Attributes:
        href: STAC API root, static catalog, collection or item; URL or path.
        name: for messages.
        collection: limits an API search.
        assets: asset keys to take first, whatever their roles.
        signing: `planetary-computer`, or None.
    """

    href: str
    name: str
    collection: str | None = None
    assets: tuple[str, ...] = ()
    signing: str | None = None


@dataclass(frozen=True)
class _Found:
    """An item with what the mosaic's order needs."""

    record: SceneRecord
    outline: Polygon | MultiPolygon
    cloud: float | None
    gsd_m: float | None

    @property
    def order(self) -> tuple[int, float, str]:
        """Newest first, then the least cloudy, then by id."""
        cloud = float("inf") if self.cloud is None else self.cloud
        return -(self.record.day or date.min).toordinal(), cloud, self.record.scene_id


def open_stac(
    query: StacQuery, area: AOI | None, options: ReadOptions, *, gsd_m: float | None = None
) -> Mosaic:
    """Find the items for an area and dates, and open them as a mosaic.

    Args:
        query: where to look.
        area: what will be read; an API search requires it.
        options: how to read; `datetime` limits the search.
        gsd_m: ground sample distance to state when neither items nor files do.

    Raises:
        AreaError: no item in the area; ImageryError: no item has colour; FetchError: the host.
    """
    check_options(options)
    found, notes = _find(query, area, options)
    if not found:
        raise _nothing(query, area, options, notes)
    records = in_order(found, area)
    signing, handles = query.signing or signing_of(query.href), Handles()
    layers = [record.layer(options, handles, signing) for record in records]
    first = layers[0].facts
    stated = [item.gsd_m for item in found if item.gsd_m]
    return Mosaic(
        layers,
        name=query.name,
        native_crs=first.place.crs,
        native_gsd_m=min(stated) if stated else gsd_m or first.gsd_m,
        notes=[*notes, *first.notes, *layers[0].pixel_notes()],
        has_own_extent=False,
        hidden=[number for number, record in enumerate(records) if record.hidden],
        handles=handles,
        pin=pin_of(records, options, signing),
    )


def in_order(found: Sequence[_Found], area: AOI | None) -> list[SceneRecord]:
    """Records in mosaic order; hidden ones are those that, in the area, lie under the outlines above them."""
    wanted = area.lonlat if area else None
    covered: BaseGeometry = Polygon()
    records: list[SceneRecord] = []
    for item in sorted(found, key=lambda item: item.order):
        seen = item.outline.intersection(wanted) if wanted is not None else item.outline
        hidden = bool(records) and seen.difference(covered).area <= _LEAST_NEW_AREA_DEG2
        records.append(replace(item.record, hidden=hidden))
        covered = covered if hidden else shapely.union(covered, seen)
    return records


def _nothing(query: StacQuery, area: AOI | None, options: ReadOptions, notes: Sequence[str]) -> AreaError:
    place = f" ({area.describe()})" if area else ""
    when = f" of {options.datetime}" if options.datetime else ""
    remedy = "; ".join(notes) or None
    swapped = swapped_area(area) if area else None
    if swapped is not None and _find(query, swapped, options)[0]:
        remedy = SWAP_HINT
    return AreaError(f"no imagery{when} there{place}", where=query.name, remedy=remedy)


# ---- finding ---------------------------------------------------------------------------------
def _find(query: StacQuery, area: AOI | None, options: ReadOptions) -> tuple[list[_Found], list[str]]:
    """Items with colour in the area and the interval of dates, and notes about what was left out."""
    root, missing = _read_if_there(query.href), list[str]()
    if root is None:
        raise ImageryError("no such catalog", where=redact(query.href), remedy="check the address")
    links = {str(link.get("rel")): str(link.get("href", "")) for link in root.get("links", [])}
    if "search" in links:
        items = search(query.href, query.collection, area, options)
    elif root.get("type") == "Collection" and "items" in links and "root" in links:
        # A collection inside an API: search it from the API's root.
        items = search(resolve(links["root"], query.href), str(root.get("id")), area, options)
    else:
        items = list(walk(query.href, root, area.lonlat if area else None, missing))
    first, last = parse_range(options.datetime)
    found = []
    for item in items:
        one = found_of(item, query.assets)
        day = one.record.day
        if area is not None and not one.outline.intersects(area.lonlat):
            continue
        if (first or last) and not (day and (first or date.min) <= day <= (last or date.max)):
            continue
        found.append(one)
    colourless = [item.record.scene_id for item in found if not item.record.assets]
    if colourless and len(colourless) == len(found):
        raise ImageryError(
            f"item {colourless[0]!r} has no colour asset",
            where=query.name,
            expected="an asset `visual`, `image` or `rgb`, or three with the common names red, green, blue",
        )
    notes = []
    if missing:
        notes.append(f"{len(missing)} documents of the catalog are missing, such as {redact(missing[0])}")
    if colourless:
        example = f"such as {colourless[0]}"
        notes.append(
            f"{len(colourless)} of {len(found)} items have no colour asset and are left out, {example}"
        )
    return [item for item in found if item.record.assets], notes


def search(href: str, collection: str | None, area: AOI | None, options: ReadOptions) -> list[pystac.Item]:
    """Items of a STAC API in an area and time.

    Raises:
        InputError: no area, or more than MAX_ITEMS items; FetchError: the host, or fewer items than it says
            it has.
    """
    if area is None:
        raise InputError(
            "a STAC API is searched by area", where=redact(href), remedy="give --bbox, --bounds or --aoi"
        )
    for _ in range(_TRUNCATED_TRIES):
        documents, promised = _search_once(href, collection, area, options)
        if len(documents) > MAX_ITEMS:
            raise TooManyItemsError(
                f"more than {MAX_ITEMS} items there",
                where=redact(href),
                remedy="limit the dates with --datetime",
            )
        if len(documents) >= promised:
            return [_item(document, href) for document in documents]
    raise FetchError(
        f"{host_of(href)} says it has {promised} items there and gives {len(documents)}",
        where=redact(href),
        remedy="try again later",
    )


def _search_once(
    href: str, collection: str | None, area: AOI, options: ReadOptions
) -> tuple[list[dict[str, Any]], int]:
    """Items as JSON, and how many the host says there are."""
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
    rules, host = download.policy(), host_of(href)
    retry = Retry(
        total=rules.attempts - 1,
        backoff_factor=rules.first_wait_s,
        backoff_max=rules.longest_wait_s,
        status_forcelist=sorted(download.TRANSIENT),
        allowed_methods=None,
    )
    io = StacApiIO(max_retries=retry, timeout=rules.timeout_s)
    io.session.trust_env = not download.local_proxy_options(href)
    documents, promised = list[dict[str, Any]](), 0
    try:
        found = Client.open(href, stac_io=io).search(
            bbox=area.bounds_lonlat,
            collections=[collection] if collection else None,
            datetime=options.datetime,
            max_items=MAX_ITEMS + 1,
        )
        for page in found.pages_as_dicts():
            documents += page["features"]
            total = page.get("numberMatched") or (page.get("context") or {}).get("matched")
            promised = total if isinstance(total, int) else promised
    except (APIError, RequestException) as error:
        shown = redact(error)[:200]
        raise FetchError(f"{host} did not answer the search ({shown})", where=redact(href)) from None
    except (KeyError, TypeError, ValueError, AttributeError, pystac.STACError) as error:
        shown = redact(error)[:200]
        raise ImageryError(f"{host} answers no valid STAC ({shown})", where=redact(href)) from None
    return documents, promised


def walk(
    where: str, root: Mapping[str, Any], wanted: BaseGeometry | None, missing: list[str]
) -> Iterator[pystac.Item]:
    """Items of a static catalog, collection, item or item collection.

    Args:
        where: its address.
        root: its JSON.
        wanted: collections whose extent misses it (EPSG:4326) are not entered.
        missing: takes the addresses of documents that are named and not there.

    Raises:
        ImageryError: a document cannot be read (it is named), or there are too many.
    """
    pending, seen = [(where, root)], {where}
    with ThreadPoolExecutor(download.REQUESTS_PER_HOST) as pool:
        while pending:
            address, document = pending.pop(0)
            kind = document.get("type")
            if kind in ("Feature", "FeatureCollection"):
                features = [document] if kind == "Feature" else document.get("features", [])
                yield from (_item(feature, address) for feature in features)
                continue
            if kind not in ("Catalog", "Collection") and "links" not in document:
                raise ImageryError(f"JSON of type {kind!r}", where=redact(address), expected="STAC")
            if wanted is not None and not _may_touch(document, wanted):
                continue
            links = [link for link in document.get("links", []) if link.get("rel") in ("child", "item")]
            targets = dict.fromkeys(resolve(str(link.get("href", "")), address) for link in links)
            fresh = [target for target in targets if target not in seen]
            seen.update(fresh)
            if len(seen) > MAX_DOCUMENTS:
                raise ImageryError(
                    f"more than {MAX_DOCUMENTS} documents",
                    where=redact(where),
                    remedy="give one collection's address",
                )
            for target, child in zip(fresh, pool.map(_read_if_there, fresh), strict=True):
                if child is None:
                    missing.append(target)
                else:
                    pending.append((target, child))


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


def _may_touch(document: Mapping[str, Any], wanted: BaseGeometry) -> bool:
    """Whether a collection's extent touches the area; True when it does not say."""
    boxes = document.get("extent", {}).get("spatial", {}).get("bbox") or []
    return not boxes or any(_box(bounds).intersects(wanted) for bounds in boxes)


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
    own = next((link.get("href") for link in document.get("links", []) if link.get("rel") == "self"), None)
    try:
        whole = {"stac_version": "1.0.0", "links": [], "properties": {}, "assets": {}, **document}
        whole["properties"] = {"datetime": None, **whole["properties"]}
        return pystac.Item.from_dict(whole, href=own if own and is_url(own) else address)
    except (KeyError, TypeError, ValueError, AttributeError, pystac.STACError) as error:
        name = str(document.get("id") or redact(address))
        raise ImageryError(f"no valid STAC item ({type(error).__name__}: {error})", where=name) from None


def found_of(item: pystac.Item, preferred: Sequence[str] = ()) -> _Found:
    """Reduce an item to what reading needs; `preferred` are asset keys to take first.

    Raises:
        ImageryError: the item has no usable geometry; the message names it.
    """
    properties, base = item.properties, item.get_self_href() or ""
    hrefs, bands = choose_assets(item.assets, preferred)
    gsds = [asset.extra_fields.get("gsd") for asset in item.assets.values()]
    gsd = properties.get("gsd") or min((float(each) for each in gsds if each), default=None)
    outline = _footprint(item)
    cloud = properties.get("eo:cloud_cover", properties.get("tile:clouds_percent"))
    record = SceneRecord(
        item.id,
        tuple(resolve(href, base) for href in hrefs),
        parse_day(str(properties.get("datetime") or properties.get("start_datetime") or "")),
        outline,
        bands,
    )
    return _Found(record, outline, cloud, float(gsd) if gsd else None)


def _footprint(item: pystac.Item) -> Polygon | MultiPolygon:
    try:
        geometry = shape(item.geometry) if item.geometry else _box(item.bbox or ())
    except Exception as error:  # shapely raises many kinds on malformed GeoJSON
        raise ImageryError(f"item without a usable geometry ({error})", where=item.id) from None
    geometry = geometry if geometry.is_valid else geometry.buffer(0)
    if not isinstance(geometry, (Polygon, MultiPolygon)) or geometry.is_empty:
        raise ImageryError("item whose geometry is no area", where=item.id)
    return geometry


def choose_assets(
    assets: Mapping[str, pystac.Asset], preferred: Sequence[str] = ()
) -> tuple[tuple[str, ...], tuple[int, int, int] | None]:
    """Hrefs that make RGB, and band numbers if the catalog tells them.

    In order: the preferred keys (whatever their roles), the usual keys, an asset whose bands include red,
    green and blue, and three assets whose common names are red, green and blue. Empty when there are none.
    """
    for key in preferred:
        if key in assets:
            return (assets[key].href,), _band_numbers(assets[key])
    usable = {key: asset for key, asset in assets.items() if _is_raster(asset) and asset.href}
    for key in USUAL_KEYS:
        if key in usable:
            return (usable[key].href,), _band_numbers(usable[key])
    for key in sorted(usable):
        numbers = _band_numbers(usable[key])
        if numbers:
            return (usable[key].href,), numbers
    singles = {
        names[0]: usable[key].href
        for key in sorted(usable, reverse=True)
        if len(names := _common_names(usable[key])) == 1
    }
    if all(colour in singles for colour in COLOURS):
        return tuple(singles[colour] for colour in COLOURS), None
    return (), None


def _is_raster(asset: pystac.Asset) -> bool:
    if _NOT_DATA_ROLES & set(asset.roles or []):
        return False
    kind = str(asset.media_type or "").split(";")[0].strip().lower()
    return kind in _RASTER_TYPES or urlsplit(asset.href).path.lower().endswith(_RASTER_ENDS)


def _common_names(asset: pystac.Asset) -> list[str]:
    """Lower-case colour of every band: `eo:bands` (STAC 1.0) or `bands` (1.1)."""
    bands = asset.extra_fields.get("eo:bands") or asset.extra_fields.get("bands") or []
    return [
        str(b.get("common_name") or b.get("eo:common_name") or b.get("name") or "").lower() for b in bands
    ]


def _band_numbers(asset: pystac.Asset) -> tuple[int, int, int] | None:
    names = _common_names(asset)
    if any(names.count(colour) != 1 for colour in COLOURS):
        return None
    return names.index("red") + 1, names.index("green") + 1, names.index("blue") + 1
