"""STAC JSON without a library: walking static catalogs, and choosing an item's colour assets."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urljoin, urlsplit

from shapely.geometry import MultiPolygon, Polygon, box, shape
from shapely.geometry.base import BaseGeometry

from canopy.errors import ImageryError
from canopy.sources import http
from canopy.sources.dates import parse_day
from canopy.sources.paths import is_url, redact

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
