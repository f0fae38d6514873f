"""STAC JSON without a library: walking static catalogs, and choosing an item's colour assets.

STAC: search an API or walk a static catalog, and mosaic the items it finds.

Items lie newest first, then least cloudy, then by id; an item wholly hidden under those above it (by
footprint) is left out. URLs are signed just before they are read and again after a refusal; a signed URL is
never kept. An item that cannot be read is an error that names it, never a hole in the map.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import date
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urljoin, urlsplit

import numpy as np
import shapely
from shapely.geometry import MultiPolygon, Polygon, box, shape
from shapely.geometry.base import BaseGeometry

from canopy import download as http
from canopy.errors import AreaError, FetchError, ImageryError, InputError, MissingDependencyError
from canopy.files import host_of, is_url, redact
from canopy.geo.area import AOI
from canopy.geo.grid import Grid
from canopy.imagery.bands import check_options
from canopy.imagery.base import SWAP_HINT, ReadOptions, swapped_area
from canopy.imagery.files import Layer, Mosaic, Pixels, Scene
from canopy.imagery.names import parse_day, parse_range

Json = Mapping[str, Any]
COLOURS = ("red", "green", "blue")
USUAL_KEYS = ("visual", "image", "rgb", "RGB", "ortho", "orthophoto", "true-color", "TCI")
_RASTER_TYPES = ("image/tiff", "image/vnd.stac.geotiff", "image/jp2", "image/jpeg", "image/png")
_RASTER_ENDS = (".tif", ".tiff", ".jp2")
_NOT_DATA_ROLES = {"thumbnail", "overview", "metadata", "mask", "data-mask"}
MAX_DOCUMENTS = 20_000


@dataclass(frozen=True)
class Item:
    """One STAC item, reduced to what reading needs.

    Attributes:
        item_id: for messages and tags.
        day: acquisition day, or None.
        cloud: cloud cover in percent, or None.
        footprint: EPSG:4326.
        assets: one href (RGB) or three (red, green, blue), absolute, unsigned; empty: no colour.
        bands: band numbers of red, green, blue in the one asset, when the catalog says.
        gsd_m: ground sample distance in metres, when the catalog says.
    """

    item_id: str
    day: date | None
    cloud: float | None
    footprint: Polygon | MultiPolygon
    assets: tuple[str, ...]
    bands: tuple[int, int, int] | None
    gsd_m: float | None

    @property
    def order(self) -> tuple[int, float, str]:
        """Newest first, then the least cloudy, then by id."""
        cloud = float("inf") if self.cloud is None else self.cloud
        return -(self.day or date.min).toordinal(), cloud, self.item_id


def read_json(where: str) -> Json:
    """A JSON object from a path or URL.

    Raises:
        ImageryError: it cannot be fetched or is not a JSON object.
    """
    try:
        content = http.get(where, what="JSON").content if is_url(where) else Path(where).read_bytes()
        value = json.loads(content)
    except FileNotFoundError:
        raise ImageryError("no such file", where=redact(where)) from None
    except (OSError, ValueError) as error:
        if isinstance(error, ImageryError):
            raise
        raise ImageryError(f"not readable as JSON ({error})", where=redact(where)) from None
    if not isinstance(value, dict):
        raise ImageryError("not a JSON object", where=redact(where), expected="a STAC catalog or item")
    return value


def resolve(href: str, base: str) -> str:
    """An href relative to its document -> an absolute path or http(s) URL.

    Raises:
        ImageryError: a remote catalog that points at files of this machine, or an unknown scheme.
    """
    if href.startswith("s3://"):
        parts = urlsplit(href)
        return f"https://{parts.netloc}.s3.amazonaws.com{parts.path}"
    if is_url(href):
        return href
    if is_url(base):
        joined = urljoin(base, href)
        if not is_url(joined):
            raise ImageryError(f"a remote catalog points at {redact(href)}", where=redact(base))
        return joined
    if href.startswith("file://"):
        return unquote(urlsplit(href).path)
    if "://" in href:
        raise ImageryError(f"cannot read {redact(href)}", where=base, expected="a file or an http(s) URL")
    return str(Path(base).parent / href)


def walk(where: str, wanted: BaseGeometry | None) -> Iterator[tuple[Json, str]]:
    """Items of a static catalog, collection, item or item collection, each with its own address.

    Collections whose extent misses `wanted` (EPSG:4326) are not entered.

    Raises:
        ImageryError: a document cannot be read (it is named), or there are too many.
    """
    pending, seen = [where], {where}
    while pending:
        address = pending.pop(0)
        document = read_json(address)
        kind = document.get("type")
        if kind == "Feature":
            yield document, address
            continue
        if kind == "FeatureCollection":
            yield from ((feature, address) for feature in document.get("features", []))
            continue
        if kind not in ("Catalog", "Collection") and "links" not in document:
            raise ImageryError(f"JSON of type {kind!r}", where=redact(address), expected="STAC")
        if wanted is not None and not _may_touch(document, wanted):
            continue
        for link in document.get("links", []):
            if link.get("rel") not in ("child", "item"):
                continue
            target = resolve(str(link.get("href", "")), address)
            if target not in seen:
                seen.add(target)
                pending.append(target)
        if len(seen) > MAX_DOCUMENTS:
            raise ImageryError(
                f"more than {MAX_DOCUMENTS} documents",
                where=redact(where),
                remedy="give one collection's address",
            )


def _may_touch(document: Json, wanted: BaseGeometry) -> bool:
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


def parse_item(document: Json, address: str, preferred: Sequence[str] = ()) -> Item:
    """Reduce an item's JSON.

    Args:
        document: the item.
        address: where it was found; relative hrefs count from there.
        preferred: asset keys to take first.

    Raises:
        ImageryError: the item has no usable geometry; the message names it.
    """
    name = str(document.get("id") or redact(address))
    properties = document.get("properties") or {}
    base = next(
        (
            str(link["href"])
            for link in document.get("links", [])
            if link.get("rel") == "self" and "href" in link
        ),
        address,
    )
    base = base if is_url(base) else address
    assets, bands = choose_assets(document.get("assets") or {}, preferred)
    gsds = [asset.get("gsd") for asset in (document.get("assets") or {}).values() if asset.get("gsd")]
    gsd = properties.get("gsd") or (min(gsds) if gsds else None)
    return Item(
        name,
        parse_day(str(properties.get("datetime") or properties.get("start_datetime") or "")),
        properties.get("eo:cloud_cover"),
        _footprint(document, name),
        tuple(resolve(href, base) for href in assets),
        bands,
        float(gsd) if gsd else None,
    )


def _footprint(document: Json, name: str) -> Polygon | MultiPolygon:
    try:
        geometry = shape(document["geometry"]) if document.get("geometry") else _box(document["bbox"])
    except Exception as error:  # shapely raises many kinds on malformed GeoJSON
        raise ImageryError(f"item without a usable geometry ({error})", where=name) from None
    geometry = geometry if geometry.is_valid else geometry.buffer(0)
    if not isinstance(geometry, (Polygon, MultiPolygon)) or geometry.is_empty:
        raise ImageryError("item whose geometry is no area", where=name)
    return geometry


def choose_assets(
    assets: Mapping[str, Json], preferred: Sequence[str] = ()
) -> tuple[tuple[str, ...], tuple[int, int, int] | None]:
    """Hrefs that make RGB, and band numbers if the catalog tells them.

    In order: the preferred keys, the usual keys, an asset whose bands include red, green and blue, and three
    assets whose common names are red, green and blue. Empty when there are none.
    """
    usable = {key: asset for key, asset in assets.items() if _is_raster(asset) and asset.get("href")}
    for key in (*preferred, *USUAL_KEYS):
        if key in usable:
            return (usable[key]["href"],), _band_numbers(usable[key])
    for key in sorted(usable):
        numbers = _band_numbers(usable[key])
        if numbers:
            return (usable[key]["href"],), numbers
    singles = {
        names[0]: usable[key]["href"]
        for key in sorted(usable, reverse=True)
        if len(names := _common_names(usable[key])) == 1
    }
    if all(colour in singles for colour in COLOURS):
        return tuple(singles[colour] for colour in COLOURS), None
    return (), None


def _is_raster(asset: Json) -> bool:
    if _NOT_DATA_ROLES & set(asset.get("roles") or []):
        return False
    kind = str(asset.get("type") or "").split(";")[0].strip().lower()
    return kind in _RASTER_TYPES or urlsplit(str(asset.get("href", ""))).path.lower().endswith(_RASTER_ENDS)


def _common_names(asset: Json) -> list[str]:
    """Lower-case colour of every band: `eo:bands` (STAC 1.0) or `bands` (1.1)."""
    bands = asset.get("eo:bands") or asset.get("bands") or []
    return [
        str(b.get("common_name") or b.get("eo:common_name") or b.get("name") or "").lower() for b in bands
    ]


def _band_numbers(asset: Json) -> tuple[int, int, int] | None:
    names = _common_names(asset)
    if any(names.count(colour) != 1 for colour in COLOURS):
        return None
    return names.index("red") + 1, names.index("green") + 1, names.index("blue") + 1


MAX_ITEMS = 2000
_INSTALL = "pip install 'canopy-height[stac]'"
_LEAST_NEW_AREA_DEG2 = 1e-10  # about one square metre


class TooManyItemsError(InputError):
    """A search finds more items than one mosaic may have; smaller areas can be searched on their own."""


@dataclass(frozen=True)
class StacQuery:
    """Where to look.

    Attributes:
        href: STAC API root, static catalog, collection or item; URL or path.
        name: for messages.
        collection: limits an API search.
        assets: asset keys to take first.
        signing: `planetary-computer`, or None.
    """

    href: str
    name: str
    collection: str | None = None
    assets: tuple[str, ...] = ()
    signing: str | None = None


def open_stac_url(url: str, area: AOI | None, options: ReadOptions) -> Mosaic:
    """Open a URL that is not an image: a STAC API, one of its collections, or a static catalog."""
    return open_stac(StacQuery(url, redact(url)), area, options)


def open_static(path: str, area: AOI | None, options: ReadOptions) -> Mosaic:
    """Open a static catalog, collection, item or item collection on disk."""
    return open_stac(StacQuery(path, path), area, options)


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
        AreaError: no item in the area; ImageryError: an item without colour; FetchError: the host.
    """
    check_options(options)
    items = _find(query, area, options)
    if not items:
        raise _nothing(query, area, options)
    layers = [_layer(item, query, options) for item in visible(items, area)]
    first = _first_scene(layers[0]).facts
    stated = [item.gsd_m for item in items if item.gsd_m]
    return Mosaic(
        layers,
        name=query.name,
        native_crs=first.place.crs,
        native_gsd_m=min(stated) if stated else gsd_m or first.gsd_m,
        notes=first.notes,
        has_own_extent=False,
    )


def _nothing(query: StacQuery, area: AOI | None, options: ReadOptions) -> AreaError:
    place = f" ({area.describe()})" if area else ""
    when = f" of {options.datetime}" if options.datetime else ""
    remedy = None
    swapped = swapped_area(area) if area else None
    if swapped is not None and _find(query, swapped, options):
        remedy = SWAP_HINT
    return AreaError(f"no imagery{when} there{place}", where=query.name, remedy=remedy)


def visible(items: Sequence[Item], area: AOI | None) -> list[Item]:
    """Items in mosaic order, without those whose footprint (in the area) is hidden under earlier ones."""
    wanted = area.lonlat if area else None
    covered: Polygon | MultiPolygon = Polygon()
    kept = []
    for item in sorted(items, key=lambda item: item.order):
        seen = item.footprint.intersection(wanted) if wanted is not None else item.footprint
        if seen.difference(covered).area > _LEAST_NEW_AREA_DEG2:
            kept.append(item)
            covered = shapely.union(covered, seen)
    return kept or sorted(items, key=lambda item: item.order)[:1]


# ---- finding ---------------------------------------------------------------------------------
def _find(query: StacQuery, area: AOI | None, options: ReadOptions) -> list[Item]:
    root = read_json(query.href)
    links = {str(link.get("rel")): str(link.get("href", "")) for link in root.get("links", [])}
    if "search" in links:
        documents = search_api(query.href, query.collection, area, options)
    elif root.get("type") == "Collection" and "items" in links and "root" in links:
        # A collection inside an API: search it from the API's root.
        api = resolve(links["root"], query.href)
        documents = search_api(api, str(root.get("id")), area, options)
    else:
        documents = list(walk(query.href, area.lonlat if area else None))
    items = [parse_item(document, address, query.assets) for document, address in documents]
    return _matching(items, query, area, options)


def _matching(items: list[Item], query: StacQuery, area: AOI | None, options: ReadOptions) -> list[Item]:
    """Items with colour, in the area and the interval of dates."""
    first, last = parse_range(options.datetime)
    if area is not None:
        wanted = area.lonlat
        items = [item for item in items if item.footprint.intersects(wanted)]
    if first or last:
        items = [i for i in items if i.day and (first or date.min) <= i.day <= (last or date.max)]
    colourless = [item for item in items if not item.assets]
    if colourless and (query.collection or len(colourless) == len(items)):
        raise ImageryError(
            f"item {colourless[0].item_id!r} has no colour asset",
            where=query.name,
            expected="an asset `visual`, `image` or `rgb`, or three with the common names red, green, blue",
        )
    return [item for item in items if item.assets]


def search_api(
    href: str, collection: str | None, area: AOI | None, options: ReadOptions
) -> list[tuple[Json, str]]:
    """Items of a STAC API in an area and time, as JSON, each with the API's address.

    Raises:
        InputError: no area, or more than MAX_ITEMS items; FetchError: the host; MissingDependencyError.
    """
    if area is None:
        raise InputError(
            "a STAC API is searched by area", where=redact(href), remedy="give --bbox, --bounds or --aoi"
        )
    try:
        from pystac_client import Client
        from pystac_client.exceptions import APIError
        from pystac_client.stac_api_io import StacApiIO
    except ImportError:
        raise MissingDependencyError(
            "STAC APIs need pystac-client", where=redact(href), remedy=_INSTALL
        ) from None
    import requests
    from urllib3.util.retry import Retry

    rules = http.policy()
    retry = Retry(
        total=rules.attempts - 1,
        backoff_factor=rules.first_wait_s,
        backoff_max=rules.longest_wait_s,
        status_forcelist=sorted(http.TRANSIENT),
        allowed_methods=None,
    )
    io = StacApiIO(max_retries=retry, timeout=rules.timeout_s)
    if http.local_proxy_options(href):
        io.session.trust_env = False
    west, south, east, north = area.bounds_lonlat
    try:
        search = Client.open(href, stac_io=io).search(
            bbox=(west, south, east, north),
            collections=[collection] if collection else None,
            datetime=options.datetime,
            max_items=MAX_ITEMS + 1,
        )
        found: list[tuple[Json, str]] = [(item, href) for item in search.items_as_dicts()]
    except (APIError, requests.RequestException) as error:
        raise FetchError(
            f"{host_of(href)} did not answer the search ({redact(error)[:200]})", where=redact(href)
        ) from None
    except (KeyError, TypeError, ValueError) as error:
        raise ImageryError(
            f"{host_of(href)} answers no valid STAC ({redact(error)[:200]})", where=redact(href)
        ) from None
    if len(found) > MAX_ITEMS:
        raise TooManyItemsError(
            f"more than {MAX_ITEMS} items there", where=redact(href), remedy="limit the dates with --datetime"
        )
    return found


# ---- reading ---------------------------------------------------------------------------------
def _layer(item: Item, query: StacQuery, options: ReadOptions) -> Layer:
    sign = planetary_computer_sign if query.signing or _needs_signing(item.assets[0]) else None
    label = item.item_id
    if len(item.assets) == 1:
        own = options if options.bands is not None else replace(options, bands=item.bands)
        return Scene(item.assets[0], own, label=label, day=item.day, outline=item.footprint, sign=sign)
    scenes = [
        Scene(
            href,
            options,
            label=f"{label} {colour}",
            day=item.day,
            outline=item.footprint,
            sign=sign,
            grey=True,
        )
        for href, colour in zip(item.assets, ("red", "green", "blue"), strict=True)
    ]
    return ThreeBands(label, scenes)


def _first_scene(layer: Layer) -> Scene:
    return layer.scenes[0] if isinstance(layer, ThreeBands) else layer  # type: ignore[return-value]


class ThreeBands:
    """A layer whose red, green and blue are three files."""

    def __init__(self, scene_id: str, scenes: Sequence[Scene]) -> None:
        self.scene_id, self.scenes = scene_id, tuple(scenes)

    @property
    def day(self) -> date | None:
        """Acquisition day."""
        return self.scenes[0].day

    def outline(self) -> Polygon | MultiPolygon:
        """Footprint of the item, EPSG:4326."""
        return self.scenes[0].outline()

    def read(self, grid: Grid) -> Pixels | None:
        """RGB and validity; a pixel needs all three files."""
        parts = [scene.read(grid) for scene in self.scenes]
        found = [part for part in parts if part is not None]
        if len(found) < 3:
            return None
        valid = np.logical_and.reduce([part[1] for part in found])
        rgb = np.concatenate([part[0][:1] for part in found])
        rgb[:, ~valid] = 0.0
        return rgb, valid


def _needs_signing(href: str) -> bool:
    """Planetary Computer's storage, in catalogs that are not its own."""
    host = urlsplit(href).hostname or ""
    return host.endswith("eo.blob.core.windows.net")


def planetary_computer_sign(href: str, fresh: bool) -> str:
    """A Planetary Computer URL that may be read for about 45 minutes; `fresh` forgets the cached token.

    Raises:
        FetchError: the token service did not answer; MissingDependencyError.
    """
    if not is_url(href):
        return href
    try:
        import planetary_computer
        from planetary_computer import sas
    except ImportError:
        raise MissingDependencyError(
            "Planetary Computer imagery needs planetary-computer", where=host_of(href), remedy=_INSTALL
        ) from None
    import requests

    if fresh:
        sas.TOKEN_CACHE.clear()
    try:
        return str(planetary_computer.sign(href))
    except (requests.RequestException, ValueError, KeyError) as error:
        raise FetchError(f"could not get a signature ({redact(error)[:200]})", where=host_of(href)) from None
