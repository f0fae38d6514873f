"""Files: whole or not there, never over an input; which names are opened, and how they are shown.

GDAL gives meaning to names: inline XML, `/vsi...` file systems, `DRIVER:` prefixes. A name that comes
from a user or from a VRT must be a plain local file or an http(s) URL and nothing else. Only the standard
library is imported, so anything may use this.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import secrets
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit, urlunsplit

from canopy.errors import CanopyError, DataError, ImageryError, InputError, OutputError


@contextlib.contextmanager
def replacing(path: str | Path, what: str = "cannot be written", remedy: str | None = None) -> Iterator[Path]:
    """`with replacing(path) as part:` write to `part`; on success it is flushed and takes the name.

    `part` lies hidden beside `path`, under a name (`.NAME.*.part`) that nobody else uses, and is gone
    afterwards; `path` is as it was where anything goes wrong.

    Raises OutputError as `told_as_output` does.
    """
    path = Path(path)
    part = path.with_name(f".{path.name}.{secrets.token_hex(4)}.part")
    with told_as_output(path, what, remedy):
        try:
            yield part
            flush(part)
            os.replace(part, path)
        finally:
            part.unlink(missing_ok=True)


def write_json(path: str | Path, value: Mapping[str, Any]) -> None:
    """Write indented JSON, whole or not at all. NaN is refused rather than written; dates become texts."""
    text = json.dumps(value, indent=2, allow_nan=False, ensure_ascii=False, default=str)
    with replacing(path) as part:
        part.write_text(text + "\n", encoding="utf-8")


@contextlib.contextmanager
def told_as_output(
    where: object, what: str = "cannot be written", remedy: str | None = None
) -> Iterator[None]:
    """Any OSError of the body becomes one OutputError about `where`; canopy's own errors pass as they are."""
    try:
        yield
    except CanopyError:
        raise
    except OSError as error:
        raise OutputError(f"{what} ({error.strerror or error})", where=where, remedy=remedy) from error


def flush(path: str | Path) -> None:
    """Wait until a file's bytes are on the disk."""
    with open(path, "rb+") as file:
        os.fsync(file.fileno())


def file_sha256(path: str | Path) -> str:
    """SHA-256 of a file, lower-case hex."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def check_digest(kind: str, expected: str, path: Path) -> None:
    """Raises DataError for a file of another digest; `kind` is md5 or sha256, `expected` lower-case hex."""
    with open(path, "rb") as file:
        got = hashlib.file_digest(file, kind).hexdigest()
    if got != expected:
        raise DataError(
            f"{kind} is {got}", where=path, expected=expected,
            remedy="it changed at its source or was damaged on the way: fetch it again, with --overwrite or "
            "after removing it",
        )  # fmt: skip


# `replacing` writes beside the final name, under a name that is 15 bytes longer; file systems allow 255.
_LONGEST_NAME_BYTES = 240
_CATALOGS = ("catalog.json", "collection.json")
_SHAPEFILE = (".shp", ".shx", ".dbf", ".prj", ".cpg")


def check_output(
    out: str | Path | Sequence[str | Path],
    inputs: Iterable[object] = (),
    *,
    overwrite: bool,
    folder: bool = False,
    expected: str | None = None,
    suffixes: Sequence[str] = (),
) -> list[Path]:
    """THE check of outputs: refuses, before any work, names that exist, name an input, or cannot be written.

    Args:
        out: every file that will be written, the main one first, or one folder.
        inputs: whatever the command reads: files, folders, URLs, lists of them; None and objects that are
            no names (arrays, tables) are passed by. A folder stands for the files in it, a shapefile for its
            parts.
        overwrite: whether what exists may be replaced; an input never may.
        folder: `out` is a folder that will hold the results, and must be new or empty unless `overwrite`.
        expected: what to say is expected where a name does not fit, e.g. "a file name ending in .tif".
        suffixes: endings that the main file may have, lower case; () for any.

    Returns:
        The names as paths.

    Raises:
        InputError: says which name, and what to do.
    """
    outs = [Path(one).expanduser() for one in ([out] if isinstance(out, (str, Path)) else out)]
    if not folder and suffixes and outs[0].suffix.lower() not in suffixes:
        named = " or ".join(suffixes)
        raise InputError(
            f"its name does not end in {named}",
            where=outs[0],
            expected=expected or f"a file name ending in {named}",
        )
    taken = {path.resolve() for path in _input_files(inputs)}
    for path in outs:
        _check_one_output(path, taken, overwrite, folder, expected)
    return outs


def _check_one_output(
    path: Path, taken: set[Path], overwrite: bool, folder: bool, expected: str | None
) -> None:
    if len(os.fsencode(path.name)) > _LONGEST_NAME_BYTES:
        raise InputError(
            f"the name has {len(os.fsencode(path.name))} bytes",
            where=f"{path.name[:40]}...",
            expected=f"a name of at most {_LONGEST_NAME_BYTES} bytes",
        )
    full = path.resolve()
    if full in taken or (folder and any(full in one.parents for one in taken)):
        found = "holds one of the inputs" if full not in taken else "is one of the inputs"
        raise InputError(found, where=path, remedy="choose another name with -o")
    if path.is_dir() and not folder:
        raise InputError("is a directory", where=path, expected=expected or "a file name")
    if path.exists() and folder and not path.is_dir():
        raise InputError("is a file", where=path, expected=expected or "a directory, new or empty")
    if not overwrite and path.exists() and not (folder and not any(path.iterdir())):
        raise InputError(
            "exists already" if not folder else "is a directory that is not empty",
            where=path,
            remedy="add --overwrite, or choose another name with -o",
        )
    parent = path.absolute().parent
    if not folder and not parent.is_dir():
        raise InputError("no such directory", where=parent, remedy="create it first")
    if parent.is_dir() and not os.access(path if path.is_dir() else parent, os.W_OK):
        raise InputError("the directory cannot be written", where=parent)


def _input_files(inputs: Iterable[object]) -> Iterator[Path]:
    """The local files behind what a command reads."""
    for one in inputs:
        if isinstance(one, (list, tuple, set, frozenset)):
            yield from _input_files(one)
        if not isinstance(one, (str, Path)) or is_url(one) or not str(one).strip() or "\0" in str(one):
            continue
        path = Path(one).expanduser()
        if path.is_dir():
            yield path
            # Of a folder of images only those directly in it are read; of catalogs and geodatabases all.
            deep = path.suffix.lower() == ".gdb" or any((path / name).is_file() for name in _CATALOGS)
            yield from (
                inside for inside in (path.rglob("*") if deep else path.iterdir()) if inside.is_file()
            )
        elif path.suffix.lower() in _SHAPEFILE:
            yield from (path.with_suffix(suffix) for suffix in _SHAPEFILE)
        else:
            yield path


_PREFIX = re.compile(r"^[A-Za-z][A-Za-z0-9_+.-]+:")  # two letters or more: `C:` stays a drive


# Whose terms forbid what canopy would do with their pictures; other agencies' layers on hosts of the same
# companies (services.arcgis.com, storage.googleapis.com) are not meant.
_FORBIDDEN = {
    "Esri World Imagery and Wayback": r"arcgisonline\.com|(maptiles|ibasemaps-api)\.arcgis\.com",
    "Bing Maps": r"virtualearth\.net|bing\.com",
    "Google Maps": r"(mts?|khm?s?|maps|tile)\d*\.google(apis)?\.[a-z.]+",
    "Mapbox": r"mapbox\.com",
}


def is_url(name: str | Path) -> bool:
    """Whether a name is an http(s) URL."""
    return isinstance(name, str) and name.lower().startswith(("http://", "https://"))


def check_terms(url: str) -> None:
    """Refuse an address whose host forbids such use; asked before anything is opened, redirects included.

    Raises:
        InputError: says whose it is, and why.
    """
    host = host_of(url).partition(":")[0].lower()
    for whose, pattern in _FORBIDDEN.items():
        if re.search(rf"(^|\.)({pattern})$", host):
            raise InputError(
                f"{whose} may not be read: its terms forbid bulk use and data derived from the pictures",
                where=host,
                remedy="choose an open source: `canopy data list` shows them by country",
            )


def check_name(name: str | Path, error: type[InputError] = ImageryError) -> str:
    """The name as text when it is a plain path; raises `error` for names GDAL would interpret."""
    text = str(name)
    if not text.strip() or "\0" in text:
        raise error("an empty file name")
    if "<" in text:
        raise error("inline XML in place of a file name", where=f"{text[:40]}...")
    if re.match(r"^[\\/]+vsi", text, re.IGNORECASE):
        raise error("a GDAL virtual path", where=text, expected="a local file or an http(s) URL")
    if _PREFIX.match(text) and not Path(text).exists():
        kind = text.split(":", 1)[0]
        raise error(f"names beginning with {kind}: are not opened", where=text, expected="a local file")
    return text


def gdal_name(name: str | Path) -> str:
    """What to hand to GDAL for a user's name: an absolute path, or /vsicurl/ and the URL.

    Raises ImageryError for a missing file, a folder, or a name that is neither a path nor an http URL.
    """
    if is_url(name):
        if not urlsplit(str(name)).hostname or any(c in str(name) for c in "<>\"' \n\0"):
            raise ImageryError("not a usable URL", where=name)
        check_terms(str(name))
        return f"/vsicurl/{name}"
    path = Path(check_name(name))
    if path.is_dir():
        raise ImageryError("a folder, not a raster", where=name, expected="a raster file")
    if not path.is_file():
        what = "a link to a file that is not there" if path.is_symlink() else "no such file"
        raise ImageryError(what, where=name, remedy="check the spelling of the path")
    return str(path.absolute())


def public_name(name: str | Path) -> str:
    """A name fit for messages: URLs lose their query, which may hold a signature."""
    text = str(name).removeprefix("/vsicurl/")
    return text.split("?", 1)[0] if is_url(text) else text


RASTER_SUFFIXES = (".tif", ".tiff", ".vrt", ".jp2", ".png", ".jpg", ".jpeg")
DIRECTORY_SUFFIXES = (".tif", ".tiff", ".vrt", ".jp2")

_MAGIC = (
    *(b"II*\0", b"MM\0*", b"II+\0", b"MM\0+"),  # TIFF and BigTIFF, both byte orders
    *(b"\0\0\0\x0cjP  ", b"\xffO\xffQ", b"\x89PNG", b"\xff\xd8\xff"),
)
_TEMPLATE_FIELD = re.compile(r"\{(?:-?[xyz]|z:02|q|bbox)\}")


def is_template(text: str) -> bool:
    """True for a template of web tiles (`https://host/{z}/{x}/{y}.png`, `{q}`) or of boxes (`{bbox}`)."""
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
        if path.suffix.lower() in DIRECTORY_SUFFIXES and not path.is_dir() and not path.name.startswith(".")
    )
    if not found:
        raise ImageryError(
            "the directory holds no image",
            where=folder,
            expected="files ending in " + ", ".join(DIRECTORY_SUFFIXES),
            remedy="give the directory that holds the images themselves; subdirectories are not searched",
        )
    return found
