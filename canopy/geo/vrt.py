"""What a VRT may refer to. A VRT is a program for GDAL: it can name any file and any driver."""

from __future__ import annotations

import os
import re
from pathlib import Path
from xml.etree import ElementTree

from canopy.errors import ImageryError
from canopy.geo.paths import check_name, is_url

_SOURCE_TAGS = {"sourcefilename", "sourcedataset", "datasetname", "filename"}
_REFUSED_TAGS = {"pixelfunctioncode", "gdalwarpkernel", "processingsteps"}
MAX_BYTES = 256 * 2**20
MAX_DEPTH = 4


def check_vrt(path: Path, _depth: int = 0, _root: Path | None = None) -> None:
    """Raise ImageryError unless a VRT names only plain rasters beside or below it, or http(s) URLs.

    Refused: document types and entities, pixel functions with code, raw bands, absolute or `..` paths
    that leave the VRT's folder, `/vsi...` (but /vsicurl/http...), and VRTs nested deeper than four.
    """
    root = _root or path.resolve().parent
    if _depth > MAX_DEPTH:
        raise ImageryError(f"VRTs nested deeper than {MAX_DEPTH}", where=path)
    for element in _parse(path).iter():
        tag = element.tag.lower()
        kind = element.get("subClass", "")
        if tag in _REFUSED_TAGS or kind == "VRTRawRasterBand":
            raise ImageryError(f"a VRT with {kind or element.tag}", where=path, expected="plain sources")
        text = (element.text or "").strip()
        if tag in _SOURCE_TAGS and text:
            relative = element.get("relativeToVRT", element.get("relativetoVRT", "0")) == "1"
            source = _check_source(text, relative, path, root)
            if source is not None and source.suffix.lower() == ".vrt":
                check_vrt(source, _depth + 1, root)


def _parse(path: Path) -> ElementTree.Element:
    try:
        if path.stat().st_size > MAX_BYTES:
            raise ImageryError("a VRT above 256 MiB", where=path)
        data = path.read_bytes()
        # Entities are how a small XML file becomes a large one, or reads other files.
        if re.search(rb"<!\s*(DOCTYPE|ENTITY)", data, re.IGNORECASE) or b"\0" in data:
            raise ImageryError("a VRT with a document type or entities", where=path)
        root = ElementTree.fromstring(data)
    except (OSError, ElementTree.ParseError) as error:
        raise ImageryError("not a readable VRT", where=path, expected="GDAL's XML") from error
    if root.tag != "VRTDataset":
        raise ImageryError(f"XML of kind {root.tag}", where=path, expected="VRTDataset")
    return root


def _check_source(text: str, relative: bool, vrt: Path, root: Path) -> Path | None:
    """A source's resolved path, None for a URL. Raises ImageryError when it is not allowed."""
    if is_url(text.removeprefix("/vsicurl/")):
        if text.lower().split("?", 1)[0].endswith(".vrt"):
            raise ImageryError("the VRT refers to a remote VRT", where=vrt)
        return None
    try:
        name = check_name(text)
    except ImageryError as error:
        raise ImageryError(f"the VRT refers to {error}", where=vrt) from error
    source = Path(os.path.realpath((vrt.parent if relative else Path.cwd()) / name))
    if not source.is_relative_to(root):
        raise ImageryError(
            f"the VRT refers to {name}, outside its own folder",
            where=vrt,
            expected="rasters beside or below the VRT, or http(s) URLs",
            remedy="move the VRT above its rasters",
        )
    if not source.is_file():
        # GDAL complains at the first read only, and gives zeros from then on.
        raise ImageryError(f"the VRT refers to {name}, which is not there", where=vrt)
    return source
