"""STAC: search an API or walk a static catalog, and mosaic the items it finds.

Items lie newest first, then least cloudy, then by id. One that lies wholly under newer outlines is kept in
reserve: it fills where those have no pixels. An item that cannot be read is an error that names it, never a
hole in the map.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import date
from pathlib import Path
from typing import Any

import pystac
import shapely
from shapely.geometry import Polygon, box
from shapely.geometry.base import BaseGeometry

from canopy import web
from canopy.errors import AreaError, FetchError, ImageryError, InputError, require
from canopy.files import host_of, is_url, redact
from canopy.geo.area import AOI
from canopy.imagery.bands import check_options
from canopy.imagery.base import SWAP_HINT, ReadOptions, swapped_area
from canopy.imagery.dates import is_within
from canopy.imagery.files import Mosaic
from canopy.imagery.scene import Handles, Scene, SceneRecord
from canopy.imagery.stac_items import record_of, resolve, signer, signing_of

MAX_DOCUMENTS = 20_000
MAX_ITEMS = 2000
_LEAST_NEW_AREA_DEG2 = 1e-10  # about one square metre
_ABSENT = (403, 404, 410)
_MOST_EMPTY_PAGES = 20  # in a row


class TooManyItemsError(InputError):
    """A search finds more items than one mosaic may have; smaller areas can be searched on their own."""


def open_stac(
    href: str,
    area: AOI | None,
    options: ReadOptions,
    *,
    name: str,
    collection: str | Sequence[str] | None = None,
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
        collection: limits an API search to one or several.
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
    href: str, collection: str | Sequence[str] | None, area: AOI | None, datetime: str | None
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


def search(
    href: str, collection: str | Sequence[str] | None, area: AOI | None, datetime: str | None
) -> list[pystac.Item]:
    """Items of a STAC API in an area and time.

    Raises:
        InputError: no area, or more than MAX_ITEMS items; FetchError: the host, or what it answers: no valid
            STAC, fewer items than it says it has; MissingDependencyError: pystac-client is not installed.
    """
    if area is None:
        raise InputError(
            "a STAC API is searched by area", where=redact(href), remedy="give --bbox, --bounds or --aoi"
        )
    require("STAC APIs", "canopy-height[stac]", "pystac_client")
    from pystac import Link
    from pystac_client import Client
    from pystac_client.exceptions import APIError
    from pystac_client.stac_api_io import StacApiIO
    from requests import RequestException
    from urllib3.util.retry import Retry

    rules = web.policy()
    retry = Retry(
        total=rules.attempts - 1, backoff_factor=rules.first_wait_s, backoff_max=rules.longest_wait_s,
        status_forcelist=sorted(web.TRANSIENT), allowed_methods=None,
    )  # fmt: skip

    class Pages(StacApiIO):
        """All pages: the library ends at an empty one, although it may name a next one."""

        promised = 0  # items that the host says it has

        def get_pages(
            self, url: str, method: str | None = None, parameters: dict[str, Any] | None = None
        ) -> Iterator[dict[str, Any]]:
            where: str | Link | None = url
            empty = 0
            while where is not None:
                page = self.read_json(where, method=method, parameters=parameters)
                said = page.get("numberMatched") or page.get("context", {}).get("matched")
                self.promised = int(said or self.promised)
                if page.get("features"):
                    yield page
                empty = 0 if page.get("features") else empty + 1
                if empty > _MOST_EMPTY_PAGES:
                    raise ValueError("page after page without items")
                more = [link for link in page.get("links", []) if link["rel"] == "next"]
                where, method = Link.from_dict(more[0]) if more else None, None

    io = Pages(max_retries=retry, timeout=rules.timeout_s)
    io.session.trust_env = not web.is_local(href)
    try:
        found = Client.open(href, stac_io=io).search(
            bbox=area.bounds_lonlat,
            collections=[collection] if isinstance(collection, str) else [*(collection or ())] or None,
            datetime=datetime,
            max_items=MAX_ITEMS + 1,
        )
        items = list(found.items())
    except (APIError, RequestException) as error:
        said = f"{host_of(href)} did not answer the search ({redact(error)[:200]})"
        raise FetchError(said, where=redact(href)) from None
    except (KeyError, TypeError, ValueError, AttributeError, pystac.STACError) as error:
        said = f"{host_of(href)} answers no valid STAC ({redact(error)[:200]})"
        raise FetchError(said, where=redact(href)) from None
    if len(items) > MAX_ITEMS:
        raise TooManyItemsError(
            f"more than {MAX_ITEMS} items there",
            where=redact(href),
            remedy="limit the dates with --datetime",
        )
    if len(items) < io.promised:
        raise FetchError(
            f"{host_of(href)} says it has {io.promised} items there and gives {len(items)}",
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
    with ThreadPoolExecutor(web.REQUESTS_PER_HOST) as pool:
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
            response = web.get(where, what="JSON", absent=_ABSENT)
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
        template = "a WMS or ImageServer is given as a template, see docs/predict.md"
        raise ImageryError(
            f"not readable as JSON ({error})",
            where=redact(where),
            expected="STAC",
            remedy=template if is_url(where) else None,
        ) from None
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
