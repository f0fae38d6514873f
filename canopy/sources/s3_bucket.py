"""Public S3 buckets over https: all objects by pages, with sizes and MD5 (ListObjectsV2)."""

from __future__ import annotations

import re
from collections.abc import Iterator
from urllib.parse import quote, urlencode
from xml.etree import ElementTree

from canopy.errors import DataError, FetchError, InputError, refuse_options
from canopy.sources import http
from canopy.sources.label_manifest import LabelManifest, Product
from canopy.sources.naming import base_name
from canopy.sources.paths import host_of, redact
from canopy.sources.remote_files import RemoteFile, Wish, checksum_of, whole_number

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
