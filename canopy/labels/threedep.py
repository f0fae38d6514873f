"""Files of a STAC API's items in an area, such as the point clouds of USGS 3DEP on the Planetary Computer."""

from __future__ import annotations

import re

import pystac
from shapely.geometry import shape

from canopy.errors import AreaError, InputError
from canopy.imagery.base import ReadOptions
from canopy.imagery.signing import signer
from canopy.imagery.stac import resolve, search
from canopy.labels.catalog import LabelManifest, Product, RemoteFile, Wish, checksum_of, whole_number
from canopy.labels.names import base_name

_SHA256_MULTIHASH = re.compile(r"1220([0-9a-fA-F]{64})")


def plan_stac(manifest: LabelManifest, product: Product, wish: Wish) -> tuple[list[RemoteFile], list[str]]:
    """One file of every item whose footprint touches the area, and notes for the user.

    Raises:
        InputError: no area; AreaError: nothing there; FetchError: the host; MissingDependencyError.
    """
    if wish.area is None:
        raise InputError(f"{manifest.name} is found by area", expected="--bbox, --bounds or --aoi")
    options = ReadOptions(datetime=wish.datetime)
    files: dict[str, RemoteFile] = {}
    for item in search(manifest.href, manifest.collection, wish.area, options):
        if item.geometry and not shape(item.geometry).intersects(wish.area.lonlat):
            continue
        file = _file(item, manifest, product)
        if file is not None and wish.names(file.name):
            files[file.name] = file
    if not files:
        raise AreaError(f"nothing there ({wish.area.describe()})", where=manifest.name)
    return [files[name] for name in sorted(files)], []


def _file(item: pystac.Item, manifest: LabelManifest, product: Product) -> RemoteFile | None:
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
