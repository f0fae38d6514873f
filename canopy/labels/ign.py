"""Tile indexes served by a WFS 2.0, as IGN does for LiDAR HD: features with the address of each tile's file.

Longitude comes first by asking in CRS:84, never in EPSG:4326, whose order servers disagree about; and a
tile is chosen by the bounds that its name states, not by the geometry that came back. Servers cap a request
(IGN: 5000 features), so pages are asked for until none is left.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any
from urllib.parse import parse_qs, urlencode, urlsplit

import shapely
from shapely.geometry import box, shape

from canopy import download
from canopy.errors import AreaError, FetchError, InputError
from canopy.files import host_of, redact
from canopy.geo.area import AOI
from canopy.imagery.names import parse_day
from canopy.labels.catalog import LabelManifest, Product, RemoteFile, WfsLayer, Wish
from canopy.labels.names import base_name, read_name

PAGE = 1000
_MOST_PAGES = 200
_EMPTY_TRIES = 3


def plan_wfs(manifest: LabelManifest, product: Product, wish: Wish) -> tuple[list[RemoteFile], list[str]]:
    """Files of the tiles that touch an area, and notes for the user.

    Raises:
        InputError: no area; AreaError: no tile there; FetchError: the host, or none of the layers is there.
    """
    if wish.area is None:
        raise InputError(f"{manifest.name} is found by area", expected="--bbox, --bounds or --aoi")
    for layer in product.layers:
        features = _features(manifest.href, layer, wish.area)
        if features is not None:
            break
    else:
        names = ", ".join(layer.typename for layer in product.layers)
        raise FetchError(
            f"{host_of(manifest.href)} has none of the layers {names}", where=redact(manifest.href)
        )
    found = [file for feature in features if (file := _file(feature, layer, product, wish)) is not None]
    if not found:
        raise AreaError(f"no tile there ({wish.area.describe()})", where=manifest.name)
    # A tile of several deliveries has one file name: the newest one counts, whatever the order of the answer.
    files = {file.name: file for _, file in sorted(found, key=lambda pair: pair[0])}
    again = len(found) - len(files)
    notes = [f"{again} tiles have an older edition, which is left out"] if again else []
    return [files[name] for name in sorted(files)], notes


def _features(href: str, layer: WfsLayer, area: AOI) -> list[Mapping[str, Any]] | None:
    """All features that touch the area's bounding box; None where the service does not know the layer."""
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
        page, total = _page(f"{href}?{urlencode(query)}")
        if page is None:
            return None
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


def _page(url: str) -> tuple[list[Mapping[str, Any]] | None, int | None]:
    response = download.get(url, what="the list of tiles", absent=(400, 404))
    if response.status_code in (400, 404):
        if "unknown" in response.text.lower() or response.status_code == 404:
            return None, None
        raise FetchError(
            f"{host_of(url)} does not accept the request ({response.status_code})", where=redact(url)
        )
    try:
        document = json.loads(response.content)
        features = list(document["features"])
    except (ValueError, KeyError, TypeError):
        if "ExceptionReport" in response.text and "unknown" in response.text.lower():
            return None, None
        raise FetchError(f"{host_of(url)} answers no GeoJSON", where=redact(url)) from None
    total = document.get("numberMatched", document.get("totalFeatures"))
    return features, total if isinstance(total, int) else None


def _file(
    feature: Mapping[str, Any], layer: WfsLayer, product: Product, wish: Wish
) -> tuple[str, RemoteFile] | None:
    """When the tile was published or else flown, to sort by, and its file; None where it is not wanted."""
    properties = feature.get("properties") or {}
    value = properties.get(layer.attribute)
    if not isinstance(value, str) or not value:
        return None  # a tile without this product
    url = _mended(product.href.replace("{value}", value) if product.href else value)
    name = _name(url)
    first, last = (_day(properties, key) for key in ("date_debut_acquisition", "date_fin_acquisition"))
    wanted = wish.names(name) and wish.holds(first or last, last or first) and _touches(name, feature, wish)
    if not wanted:
        return None
    about = product.about_bytes
    day = (last or first).isoformat() if last or first else None
    edition = str(properties.get("date_edition") or day or "")
    return edition, RemoteFile(url=url, name=name, bytes=about, about=about is not None, day=day)


def _mended(url: str) -> str:
    """IGN's index holds some http addresses, and some names with a dash that are served with a `_`."""
    url = re.sub(r"^http://(?=[^/]*geopf\.fr/)", "https://", url)
    return re.sub(r"(LHD_[A-Z]{3}_\d{4})-(\d{4}_)", r"\1_\2", url)


def _name(url: str) -> str:
    """The file's name: the query field FILENAME of a map request, else the end of the path."""
    fields = {key.upper(): values[0] for key, values in parse_qs(urlsplit(url).query).items()}
    return fields.get("FILENAME") or base_name(urlsplit(url).path)


def _day(properties: Mapping[str, Any], key: str) -> Any:
    value = properties.get(key)
    if value is None and isinstance(properties.get("metadata"), str):
        try:  # the older layers hold JSON in a text field
            value = json.loads(properties["metadata"]).get(key)
        except (ValueError, AttributeError):
            return None
    return parse_day(str(value)) if value else None


def _touches(name: str, feature: Mapping[str, Any], wish: Wish) -> bool:
    if wish.area is None:
        return True
    tile = read_name(name)
    if tile is not None:
        return bool(wish.area.to_crs(tile.crs).geometry.intersection(box(*tile.bounds)).area > 0)
    geometry = feature.get("geometry")
    if not geometry:
        return True
    outline = shape(geometry)
    swapped = shapely.transform(outline, lambda xy: xy[:, ::-1])
    return bool(wish.area.lonlat.intersects(outline) or wish.area.lonlat.intersects(swapped))
