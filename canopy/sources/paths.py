"""Names of image sources: what is a URL or a tile template, and how to show a URL without its secrets."""

from __future__ import annotations

import re
from pathlib import Path
from urllib.parse import urlsplit, urlunsplit

from canopy.errors import ImageryError
from canopy.geo.paths import is_url

__all__ = [
    "DIRECTORY_SUFFIXES",
    "RASTER_SUFFIXES",
    "host_of",
    "is_template",
    "is_url",
    "list_directory",
    "looks_like_raster",
    "redact",
]

RASTER_SUFFIXES = (".tif", ".tiff", ".vrt", ".jp2", ".png", ".jpg", ".jpeg")
DIRECTORY_SUFFIXES = (".tif", ".tiff", ".vrt", ".jp2")

_MAGIC = (
    *(b"II*\0", b"MM\0*", b"II+\0", b"MM\0+"),  # TIFF and BigTIFF, both byte orders
    *(b"\0\0\0\x0cjP  ", b"\xffO\xffQ", b"\x89PNG", b"\xff\xd8\xff"),
)
_TEMPLATE_FIELD = re.compile(r"\{-?(?:z|x|y|q)\}")


def is_template(text: str) -> bool:
    """True for a web-tile template such as `https://host/{z}/{x}/{y}.png` or one with a `{q}` quadkey."""
    return bool(_TEMPLATE_FIELD.search(text))


def looks_like_raster(first: bytes) -> bool:
    """True when a file that begins so is a TIFF, JPEG 2000, PNG or JPEG."""
    return first.startswith(_MAGIC)


def redact(text: object) -> str:
    """Drop user names, passwords and query strings, which may hold keys, from every URL in `text`.

    >>> redact("cannot open https://me:pw@host.org/a.tif?sig=abc")
    'cannot open https://host.org/a.tif'
    """
    bare = re.sub(r"https?://[^\s'\"<>]+", lambda match: _bare_url(match.group(0)), str(text))
    # GDAL's messages also name files without their host: `a.tif?sig=...`.
    return re.sub(r"\?[^\s'\"<>]*=[^\s'\"<>]*", "", bare)


def _bare_url(url: str) -> str:
    parts = urlsplit(url)
    return urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], parts.path, "", ""))


def host_of(url: str) -> str:
    """Host (with port, if one is given) of a URL, for messages and for per-host limits."""
    return urlsplit(url).netloc.rpartition("@")[2] or url


def list_directory(folder: Path) -> list[Path]:
    """Images of a directory (not of its subdirectories), sorted by name.

    Raises:
        ImageryError: it holds none.
    """
    found = sorted(
        path
        for path in folder.iterdir()
        if path.suffix.lower() in DIRECTORY_SUFFIXES and path.is_file() and not path.name.startswith(".")
    )
    if not found:
        raise ImageryError(
            "the directory holds no image",
            where=folder,
            expected="files ending in " + ", ".join(DIRECTORY_SUFFIXES),
            remedy="give the directory that holds the images themselves; subdirectories are not searched",
        )
    return found
