"""Catalogues that are searched by area: STAC APIs (USGS 3DEP) and NASA's CMR (GEDI and others on Earthdata).

Earthdata is asked through `earthaccess`. Searching is anonymous; a login is made when the first file is
fetched: EARTHDATA_TOKEN, or EARTHDATA_USERNAME and EARTHDATA_PASSWORD, or a netrc file. Files come through
canopy's own downloader, so they resume and are checked; the token is dropped when the archive redirects to
its storage.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

import pystac
from shapely.geometry import shape

from canopy.errors import AreaError, FetchError, InputError, MissingDependencyError
from canopy.files import redact
from canopy.imagery.stac import resolve, search, signer
from canopy.labels.catalog import LabelManifest, Product, RemoteFile, Wish, checksum_of, whole_number
from canopy.labels.names import base_name

_SHA256_MULTIHASH = re.compile(r"1220([0-9a-fA-F]{64})")
_ALGORITHMS = {"md5": "md5", "sha-256": "sha256", "sha256": "sha256"}
_UNITS = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
_LOGIN = (
    "set EARTHDATA_TOKEN, or EARTHDATA_USERNAME and EARTHDATA_PASSWORD, or write ~/.netrc "
    "(accounts: urs.earthdata.nasa.gov)"
)


def plan_stac(manifest: LabelManifest, product: Product, wish: Wish) -> tuple[list[RemoteFile], list[str]]:
    """One file of every item whose footprint touches the area, and notes for the user.

    Raises:
        InputError: no area; AreaError: nothing there; FetchError: the host; MissingDependencyError.
    """
    if wish.area is None:
        raise InputError(f"{manifest.name} is found by area", expected="--bbox, --bounds or --aoi")
    files: dict[str, RemoteFile] = {}
    for item in search(manifest.href, manifest.collection, wish.area, wish.datetime):
        if item.geometry and not shape(item.geometry).intersects(wish.area.lonlat):
            continue
        file = _item_file(item, manifest, product)
        if file is not None and wish.names(file.name):
            files[file.name] = file
    if not files:
        raise AreaError(f"nothing there ({wish.area.describe()})", where=manifest.name)
    return [files[name] for name in sorted(files)], []


def _item_file(item: pystac.Item, manifest: LabelManifest, product: Product) -> RemoteFile | None:
    asset = item.assets.get(product.asset or "")
    if asset is None:
        return None
    url = resolve(asset.href, item.get_self_href() or manifest.href)
    name = base_name(url)
    # Projects of different years reuse tile names: the item's id tells them apart.
    identity = re.sub(r"[^A-Za-z0-9._-]", "_", item.id)
    stem = name.split(".")[0]
    properties, more = item.properties, asset.extra_fields
    multihash = _SHA256_MULTIHASH.fullmatch(str(more.get("file:checksum", "")))
    size = whole_number(more.get("file:size"))
    return RemoteFile(
        url=url,
        name=name if not identity or stem in identity else f"{identity}-{name}",
        bytes=size if size is not None else product.about_bytes,
        about=size is None and product.about_bytes is not None,
        checksum=checksum_of("sha256", multihash[1]) if multihash else None,
        day=str(properties.get("datetime") or properties.get("end_datetime") or "")[:10] or None,
        sign=signer(manifest.signing),
    )


# ---- Earthdata -------------------------------------------------------------------------------
def plan_earthdata(
    manifest: LabelManifest, product: Product, wish: Wish
) -> tuple[list[RemoteFile], list[str]]:
    """Granules of a product that touch the area's bounding box, and notes for the user.

    Raises:
        InputError: no area; AreaError: nothing there; FetchError: the host; MissingDependencyError.
    """
    if wish.area is None:
        raise InputError(f"{manifest.name} is found by area", expected="--bbox, --bounds or --aoi")
    earthaccess = _earthaccess()
    query: dict[str, Any] = {"short_name": product.code, "bounding_box": wish.area.bounds_lonlat}
    if product.version:
        query["version"] = product.version
    if wish.datetime:
        first, slash, last = wish.datetime.partition("/")
        query["temporal"] = tuple(
            None if edge in ("", "..") else edge for edge in (first, last if slash else first)
        )
    try:
        granules = earthaccess.search_data(**query)
    except Exception as error:  # earthaccess passes on whatever its HTTP library raises
        raise FetchError(
            f"Earthdata did not answer the search ({redact(error)[:200]})", where=manifest.name
        ) from None
    files = [
        _granule_file(granule, url, product)
        for granule in granules
        for url in granule.data_links(access="external")
    ]
    wanted = {f.name: f for f in files if re.search(product.match or "", f.name) and wish.names(f.name)}
    if not wanted:
        raise AreaError(f"nothing there ({wish.area.describe()})", where=manifest.name)
    return [wanted[name] for name in sorted(wanted)], []


def _earthaccess() -> Any:
    try:
        import earthaccess
    except ImportError:
        raise MissingDependencyError(
            "Earthdata needs earthaccess", remedy="install it: pip install earthaccess"
        ) from None
    return earthaccess


def _granule_file(granule: Mapping[str, Any], url: str, product: Product) -> RemoteFile:
    name = base_name(url)
    umm = granule.get("umm") or {}
    parts = (umm.get("DataGranule") or {}).get("ArchiveAndDistributionInformation") or []
    facts = next((part for part in parts if part.get("Name") == name), parts[0] if len(parts) == 1 else {})
    checksum = facts.get("Checksum") or {}
    kind = _ALGORITHMS.get(str(checksum.get("Algorithm", "")).lower())
    size, about = _size(facts)
    times = (umm.get("TemporalExtent") or {}).get("RangeDateTime") or {}
    return RemoteFile(
        url=url,
        name=name,
        bytes=size if size is not None else product.about_bytes,
        about=about or (size is None and product.about_bytes is not None),
        checksum=checksum_of(kind, checksum.get("Value")) if kind else None,
        day=str(times.get("BeginningDateTime", ""))[:10] or None,
        headers=_bearer,
    )


def _size(facts: Mapping[str, Any]) -> tuple[int | None, bool]:
    """Bytes of a file as CMR has it, and whether the number is rounded."""
    exact = whole_number(facts.get("SizeInBytes"))
    unit = _UNITS.get(str(facts.get("SizeUnit", "")).upper())
    if exact is not None or unit is None or not isinstance(facts.get("Size"), (int, float)):
        return exact, False
    return int(facts["Size"] * unit), unit > 1


@lru_cache(maxsize=1)
def _bearer() -> Mapping[str, str]:
    """The header of a logged-in session. Raises FetchError with how to log in."""
    earthaccess = _earthaccess()
    named = os.environ.get("EARTHDATA_USERNAME") and os.environ.get("EARTHDATA_PASSWORD")
    strategy = "environment" if os.environ.get("EARTHDATA_TOKEN") or named else "netrc"
    try:
        auth = earthaccess.login(strategy=strategy)
        token = auth.token["access_token"] if auth.authenticated else None
    except Exception as error:  # of many kinds, some with the answer of the login host in their text
        raise FetchError(
            f"no Earthdata login ({type(error).__name__})", where=strategy, remedy=_LOGIN
        ) from None
    if not token:
        raise FetchError("no Earthdata login", where=strategy, remedy=_LOGIN)
    return {"Authorization": f"Bearer {token}"}
