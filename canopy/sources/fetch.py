"""Download files once, completely, and verified.

A download goes to `NAME.part`, resumes there after an interruption, is checked for length and sha256,
flushed to disk, and only then gets its name. Whoever sees the name sees the whole file.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from urllib.parse import unquote, urlsplit

import httpx

from canopy.errors import DataError, FetchError
from canopy.files import file_sha256, flush, told_as_output
from canopy.runtime import cache_dir
from canopy.sources import http
from canopy.sources.paths import host_of, redact

_CHUNK = 1 << 20


def download(
    url: str,
    dest: Path | str | None = None,
    *,
    sha256: str | None = None,
    headers: Mapping[str, str] | None = None,
    sign: http.Signer | None = None,
    check: Callable[[Path], None] | None = None,
    overwrite: bool = False,
) -> Path:
    """Fetch a URL into a file.

    Args:
        url: http(s) address; its query is never shown or stored.
        dest: file to write; default: under the cache directory, by host and path.
        sha256: expected digest, lower-case hex; checked also on a file that is already there.
        headers: extra request headers, such as an access token (never logged).
        sign: makes the URL readable; asked again after a 401 or 403.
        check: raises DataError for a complete file that is not what it should be (another kind of checksum);
            called before the file gets its name, and on a file that is already there.
        overwrite: fetch again although `dest` exists.

    Returns:
        The path of the complete file.

    Raises:
        FetchError: the host did not deliver it; the `.part` file stays for the next try.
        DataError: the digest is not the expected one; nothing is kept.
        OutputError: it cannot be written.
    """
    target = Path(dest) if dest is not None else cached_path(url)
    if target.is_file() and not overwrite:
        if sha256 is None or file_sha256(target) == sha256.lower():
            if check is not None:
                check(target)
            return target
        if dest is not None:
            raise DataError(
                "exists with another sha256 than expected",
                where=target,
                remedy="move it away or overwrite it",
            )
    part = target.with_name(target.name + ".part")
    with told_as_output(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        with only_one(target):
            if target.is_file() and not overwrite:
                return target  # another process was faster
            _fetch_into(url, part, headers or {}, sign)
            if sha256 is not None:
                _check_digest(part, sha256.lower(), url)
            if check is not None:
                _discard_unless(check, part)
            flush(part)
            os.replace(part, target)
    return target


@contextlib.contextmanager
def only_one(target: Path) -> Iterator[None]:
    """Let one process at a time write `target`'s .part file (on systems that have flock)."""
    try:
        import fcntl
    except ImportError:
        yield
        return
    lock = target.with_name(f".{target.name}.lock")
    while True:
        with open(lock, "w") as handle:
            fcntl.flock(handle, fcntl.LOCK_EX)
            # Who waited may hold the lock of a file that its owner has removed since: then try anew.
            try:
                if not os.path.samestat(os.fstat(handle.fileno()), lock.stat()):
                    continue
            except FileNotFoundError:
                continue
            try:
                yield
            finally:
                lock.unlink(missing_ok=True)
            return


def cached_path(url: str) -> Path:
    """Where a URL's file lives in the cache: host and path, without its query.

    Two URLs that differ only in their query (a signature, say) share a file; a short digest of the path keeps
    names that differ only in odd characters apart.
    """
    parts = urlsplit(url)
    clean = [p for p in unquote(parts.path).replace("\\", "/").split("/") if p not in ("", ".", "..")]
    digest = hashlib.sha256(parts.path.encode()).hexdigest()[:8]
    name = f"{digest}-{clean[-1]}" if clean else digest
    return cache_dir().joinpath("http", host_of(url).replace(":", "_"), *clean[:-1], name)


def _check_digest(part: Path, expected: str, url: str) -> None:
    got = file_sha256(part)
    if got == expected:
        return
    part.unlink()
    raise DataError(
        f"sha256 is {got}",
        where=redact(url),
        expected=expected,
        remedy="the file changed at its source or was damaged on the way; the download was discarded",
    )


def _discard_unless(check: Callable[[Path], None], part: Path) -> None:
    try:
        check(part)
    except DataError:
        part.unlink()
        raise


def _fetch_into(url: str, part: Path, headers: Mapping[str, str], sign: http.Signer | None) -> None:
    """Append to `part` until it holds the whole body."""
    rules, problem, retry_after, failures = http.policy(), "", None, 0
    signed_anew = False
    while failures < rules.attempts:
        if failures:
            http.pause(url, failures - 1, problem, retry_after)
        have = part.stat().st_size if part.exists() else 0
        try:
            with http.host_slot(url):
                target = sign(url, signed_anew) if sign else url
                problem, retry_after = _one_try(url, target, part, have, headers, sign is not None)
        except httpx.InvalidURL as error:
            raise FetchError(f"not a usable URL ({redact(error)})", where=redact(url)) from None
        except httpx.RequestError as error:
            problem, retry_after = f"{host_of(url)} cut the connection ({redact(error)})", None
        if not problem:
            return
        signed_anew = sign is not None
        # A try that moved the file forward starts the count anew: a slow line is not a dead one.
        grown = (part.stat().st_size if part.exists() else 0) > have
        failures = 1 if grown else failures + 1
    raise http.gave_up(url, problem)


def _one_try(
    url: str, target: str, part: Path, have: int, headers: Mapping[str, str], can_sign: bool
) -> tuple[str, float | None]:
    """One request: a problem worth another try (empty: the file is complete) and the wait asked for."""
    # `identity`: Content-Length must count the bytes that reach the file.
    wanted = {**headers, "Accept-Encoding": "identity"} | ({"Range": f"bytes={have}-"} if have else {})
    request = http.client().stream("GET", target, headers=wanted, timeout=http.policy().timeout_s)
    with request as response:
        if response.status_code in http.TRANSIENT or (can_sign and response.status_code in (401, 403)):
            return f"{host_of(url)} answered {response.status_code}", http.retry_after_s(response)
        if response.status_code == 416:
            total = _total(response.headers.get("content-range", ""))
            if total == have:
                return "", None
            part.unlink(missing_ok=True)
            return "the file changed at its source", None
        http.raise_if_refused(response, url, "the file")
        resumed = response.status_code == 206
        total = _total(response.headers.get("content-range", "")) if resumed else _length(response)
        _append(response, part, have if resumed else 0, url)
    size = part.stat().st_size
    if total is not None and size != total:
        if size > total:
            part.unlink()
        return f"{host_of(url)} sent {size} of {total} bytes", None
    return "", None


def _append(response: httpx.Response, part: Path, offset: int, url: str) -> None:
    with open(part, "ab" if offset else "wb") as file:
        first = True
        for chunk in response.iter_bytes():  # as they arrive: a cut loses nothing that came
            if first and offset == 0 and http.is_html(response, chunk[:64]):
                with contextlib.suppress(OSError):
                    part.unlink()
                raise http.html_error(url, "the file")
            first = False
            file.write(chunk)


def _total(content_range: str) -> int | None:
    total = content_range.rpartition("/")[2]
    return int(total) if total.isdigit() else None


def _length(response: httpx.Response) -> int | None:
    text = response.headers.get("content-length", "")
    return int(text) if text.isdigit() else None
