"""Files that are whole or not there, and their hashes. The standard library alone, so anything may use it."""

from __future__ import annotations

import contextlib
import hashlib
import os
import secrets
from collections.abc import Iterator
from pathlib import Path

from canopy.errors import CanopyError, OutputError


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
