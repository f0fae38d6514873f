"""A URL to a file: resumed where it was cut, checked, and only then under its name.

It goes to `NAME.part`, is checked for its length and by the caller, flushed to disk, and renamed. Of several
processes that want one file, one fetches it.
"""

from __future__ import annotations

import contextlib
import email.utils
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
from filelock import FileLock

from canopy import web
from canopy.errors import DataError
from canopy.files import flush, host_of, redact, told_as_output

# A try that brought this much starts the count anew: a slow line is not a dead one, but a host that sends a
# byte a try is.
_PROGRESS_BYTES = 1 << 14


def download(
    url: str,
    dest: Path | str,
    *,
    headers: web.Headers | None = None,
    sign: web.Signer | None = None,
    check: Callable[[Path], None] | None = None,
    overwrite: bool = False,
) -> Path:
    """Fetch a URL into a file.

    What a cut or an earlier run left of it is resumed, unless the host says that the file changed since.

    Args:
        url: http(s) address; its query is never shown or stored.
        dest: file to write.
        headers: gives request headers such as an access token (never logged); asked again after a refusal.
        sign: makes the URL readable; likewise.
        check: raises DataError for a complete file that is not what it should be (its size, its digest);
            called before the file gets its name, and on a file that is already there.
        overwrite: fetch again, from the first byte, although `dest` or a part of it exists.

    Returns:
        The path of the complete file.

    Raises:
        FetchError: the host did not deliver it; the `.part` file stays for the next try.
        DataError: of `check`; nothing that was fetched is kept, and a file that was there stays.
        OutputError: it cannot be written.
    """
    target = Path(dest)

    def is_there() -> bool:
        if overwrite or not target.is_file():
            return False
        if check is not None:
            check(target)
        return True

    if is_there():
        return target
    part = target.with_name(target.name + ".part")
    with told_as_output(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        with only_one(target):
            if is_there():
                return target  # another process was faster
            if overwrite:
                part.unlink(missing_ok=True)
            web.persist(url, lambda fresh: _grow(part, url, headers, sign, fresh))
            if check is not None:
                try:
                    check(part)
                except DataError:
                    part.unlink(missing_ok=True)
                    raise
            flush(part)
            os.replace(part, target)
    return target


@contextmanager
def only_one(target: Path) -> Iterator[None]:
    """Let one process at a time write `target`."""
    lock = target.with_name(f".{target.name}.lock")
    with FileLock(lock):
        try:
            yield
        finally:
            # Still held: who waits sees that the file is gone, and locks a new one.
            with contextlib.suppress(OSError):
                lock.unlink()


def _grow(part: Path, url: str, headers: web.Headers | None, sign: web.Signer | None, fresh: bool) -> None:
    """Append to `part` until it holds the whole body; raises `Again` where it does not yet."""

    def size() -> int:
        return part.stat().st_size if part.exists() else 0

    have, total = size(), None
    wanted = dict(headers(fresh)) if headers else {}
    if have:
        since = email.utils.formatdate(part.stat().st_mtime, usegmt=True)
        wanted |= {"Range": f"bytes={have}-", "If-Unmodified-Since": since}
    try:
        with web.stream(sign(url, fresh) if sign else url, wanted) as response:
            total = web.total(response)
            if response.status_code in (412, 416):
                if response.status_code == 416 and total == have:
                    return
                part.unlink()
                raise web.Again("the file changed at its source")
            body = response.iter_bytes()  # as they arrive: a cut loses nothing that came
            first, resumed = next(body, b""), response.status_code == 206
            shown = b"" if resumed else first[:64]
            web.check_answer(response, url, "the file", signed=bool(sign or headers), first=shown)
            with open(part, "ab" if resumed else "wb") as file:
                file.write(first)
                for chunk in body:
                    file.write(chunk)
    except httpx.RequestError as error:
        problem = f"{host_of(url)} cut the connection ({redact(error)})"
        raise web.Again(problem, moved=size() - have >= _PROGRESS_BYTES) from None
    if total is not None and size() != total:
        got, moved = size(), have + _PROGRESS_BYTES <= size() < total
        if got > total:
            part.unlink()
        raise web.Again(f"{host_of(url)} sent {got} of {total} bytes", moved=moved)
