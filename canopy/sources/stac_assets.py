"""Files of a STAC API's items in an area, such as the point clouds of USGS 3DEP on the Planetary Computer."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from shapely.geometry import shape

from canopy.errors import AreaError, InputError
from canopy.sources import stac
from canopy.sources.imagery import ReadOptions
from canopy.sources.label_manifest import LabelManifest, Product
from canopy.sources.naming import base_name
from canopy.sources.remote_files import RemoteFile, Wish, checksum_of, whole_number
from canopy.sources.stac_items import resolve

_SHA256_MULTIHASH = re.compile(r"1220([0-9a-fA-F]{64})")


def plan_stac(manifest: LabelManifest, product: Product, wish: Wish) -> tuple[list[RemoteFile], list[str]]:
    """One file of every item whose footprint touches the area, and notes for the user.

    Raises:
        InputError: no area; AreaError: nothing there; FetchError: the host; MissingDependencyError.
    """
    if wish.area is None:
        raise InputError(f"{manifest.name} is found by area", expected="--bbox, --bounds or --aoi")
    options = ReadOptions(datetime=wish.datetime)
    found = stac.search_api(manifest.href, manifest.collection, wish.area, options)
    files: dict[str, RemoteFile] = {}
    for item, base in found:
        geometry = item.get("geometry")
        if geometry and not shape(geometry).intersects(wish.area.lonlat):
            continue
        file = _file(item, base, manifest, product)
        if file is not None and wish.names(file.name):
            files[file.name] = file
    if not files:
        raise AreaError(f"nothing there ({wish.area.describe()})", where=manifest.name)
    return [files[name] for name in sorted(files)], []


def _file(item: Mapping[str, Any], base: str, manifest: LabelManifest, product: Product) -> RemoteFile | None:
    asset = (item.get("assets") or {}).get(product.asset)
    if not asset or not asset.get("href"):
        return None
    url = resolve(str(asset["href"]), base)
    name = base_name(url)
    # Projects of different years reuse tile names: the item's id tells them apart.
    identity = re.sub(r"[^A-Za-z0-9._-]", "_", str(item.get("id", "")))
    stem = name.split(".")[0]
    properties = item.get("properties") or {}
    multihash = _SHA256_MULTIHASH.fullmatch(str(asset.get("file:checksum", "")))
    size = whole_number(asset.get("file:size"))
    return RemoteFile(
        url=url,
        name=name if not identity or stem in identity else f"{identity}-{name}",
        bytes=size if size is not None else product.about_bytes,
        about=size is None and product.about_bytes is not None,
        checksum=checksum_of("sha256", multihash[1]) if multihash else None,
        day=str(properties.get("datetime") or properties.get("end_datetime") or "")[:10] or None,
        sign=(lambda href, fresh: stac.planetary_computer_sign(href, fresh)) if manifest.signing else None,
    )
