"""Files of a STAC API's items in an area, such as the point clouds of USGS 3DEP on the Planetary Computer.

Public S3 buckets over https: all objects by pages, with sizes and MD5 (ListObjectsV2).
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from urllib.parse import quote, urlencode
from xml.etree import ElementTree

import pystac
from shapely.geometry import shape

from canopy import download as http
from canopy.errors import AreaError, DataError, FetchError, InputError, refuse_options
from canopy.files import host_of, redact
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


_MOST_PAGES = 1000


def plan_s3(manifest: LabelManifest, product: Product, wish: Wish) -> tuple[list[RemoteFile], list[str]]:
    """Objects of a bucket whose names fit, and notes for the user.

    Raises:
        InputError: no --match, where names cannot be found by area, or --datetime, which they do not tell;
        DataError: nothing fits; FetchError: the host.
    """
    if wish.match is None:
        raise InputError(
            f"the names of {manifest.name} say no place that we can read",
            expected="--match NAME",
            remedy="see `canopy data describe " + manifest.name + "`",
        )
    refuse_options(
        {"--datetime": wish.datetime}, where=manifest.name, because="names say no date that we can read"
    )
    found = []
    for key, size, etag in _objects(manifest.href.rstrip("/")):
        name = base_name(key)
        if re.search(product.match or "", name) and wish.names(name):
            # An ETag is the MD5 only of an object that was uploaded in one piece.
            checksum = checksum_of("md5", etag) if len(etag.strip('"')) == 32 else None
            url = f"{manifest.href.rstrip('/')}/{quote(key)}"
            found.append(RemoteFile(url=url, name=name, bytes=size, checksum=checksum))
    if not found:
        raise DataError(f"no file of {manifest.name} matches", where=f"--match {wish.match}")
    notes = ["the area is not used: names say no place"] if wish.area is not None else []
    return sorted(found, key=lambda file: file.name), notes


def _objects(bucket: str) -> Iterator[tuple[str, int | None, str]]:
    """(key, bytes, ETag) of every object."""
    token: str | None = None
    for _ in range(_MOST_PAGES):
        query = {"list-type": "2", **({"continuation-token": token} if token else {})}
        root = _answer(f"{bucket}/?{urlencode(query)}")
        for entry in root.iterfind("{*}Contents"):
            key = entry.findtext("{*}Key", "")
            yield key, whole_number(entry.findtext("{*}Size")), entry.findtext("{*}ETag", "")
        token = root.findtext("{*}NextContinuationToken")
        if root.findtext("{*}IsTruncated") != "true" or not token:
            return
    raise DataError(f"more than {_MOST_PAGES} pages of names", where=redact(bucket))


def _answer(url: str) -> ElementTree.Element:
    content = http.get(url, what="the list of files").content
    try:
        if b"<!DOCTYPE" in content:
            raise ElementTree.ParseError("a document type")
        return ElementTree.fromstring(content)
    except ElementTree.ParseError:
        raise FetchError(f"{host_of(url)} answers no bucket listing", where=redact(url)) from None
