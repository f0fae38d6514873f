"""Which names of files and URLs canopy opens.

GDAL gives meaning to names: inline XML, `/vsi...` file systems, `DRIVER:` prefixes. A name that comes
from a user or from a VRT must be a plain local file or an http(s) URL and nothing else.
"""

from __future__ import annotations

import re
from pathlib import Path
from urllib.parse import urlsplit

from canopy.errors import ImageryError, InputError

_PREFIX = re.compile(r"^[A-Za-z][A-Za-z0-9_+.-]+:")  # two letters or more: `C:` stays a drive


def is_url(name: str | Path) -> bool:
    """Whether a name is an http(s) URL."""
    return isinstance(name, str) and name.lower().startswith(("http://", "https://"))


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
        return f"/vsicurl/{name}"
    path = Path(check_name(name))
    if path.is_dir():
        raise ImageryError("a folder, not a raster", where=name, expected="a raster file")
    if not path.is_file():
        raise ImageryError("no such file", where=name, remedy="check the spelling of the path")
    return str(path.absolute())


def public_name(name: str | Path) -> str:
    """A name fit for messages: URLs lose their query, which may hold a signature."""
    text = str(name).removeprefix("/vsicurl/")
    return text.split("?", 1)[0] if is_url(text) else text
