"""Download files once, completely, and verified.

A download goes to `NAME.part`, resumes there after an interruption if the host still has the same version,
is checked for length and sha256, flushed to disk, and only then gets its name. Whoever sees the name sees the
whole file.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import httpx

from canopy.errors import DataError, FetchError
from canopy.files import file_sha256, flush, told_as_output
from canopy.sources import http
from canopy.sources.paths import host_of, redact


def download(
    url: str,
    dest: Path | str,
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
        dest: file to write.
        sha256: expected digest, lower-case hex; checked also on a file that is already there.
        headers: extra request headers, such as an access token (never logged).
        sign: makes the URL readable; asked again after a 401 or 403.
        check: raises DataError for a complete file that is not what it should be (another kind of checksum);
            called before the file gets its name, and on a file that is already there.
        overwrite: fetch again, from the first byte, although `dest` or a part of it exists.

    Returns:
        The path of the complete file.

    Raises:
        FetchError: the host did not deliver it; the `.part` file stays for the next try.
        DataError: the digest is not the expected one; nothing that was fetched is kept, and a file that was
            there stays.
        OutputError: it cannot be written.
    """
    target = Path(dest)
    if not overwrite and _is_there(target, sha256, check):
        return target
    part = _Part(target.with_name(target.name + ".part"))
    with told_as_output(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        with only_one(target):
            if not overwrite and _is_there(target, sha256, check):
                return target  # another process was faster
            if overwrite or (sha256 is None and part.version() is None):
                part.drop()  # nothing could tell that the rest belongs to it
            _fetch_into(url, part, headers or {}, sign)
            if sha256 is not None:
                _check_digest(part, sha256.lower(), url)
            if check is not None:
                _discard_unless(check, part)
            flush(part.path)
            os.replace(part.path, target)
            part.drop()
    return target


def _is_there(target: Path, sha256: str | None, check: Callable[[Path], None] | None) -> bool:
    """Whether the file is there; DataError where it is another one than expected."""
    if not target.is_file():
        return False
    if sha256 is not None and file_sha256(target) != sha256.lower():
        raise DataError(
            "exists with another sha256 than expected", where=target, remedy="move it away or overwrite it"
        )
    if check is not None:
        check(target)
    return True


@dataclass(frozen=True)
class _Part:
    """A file on its way, and beside it the version of which it is a part: an ETag or a date."""

    path: Path

    @property
    def _version_path(self) -> Path:
        return self.path.with_name(self.path.name + ".version")

    def size(self) -> int:
        return self.path.stat().st_size if self.path.exists() else 0

    def version(self) -> str | None:
        """What `If-Range` asks for; None where the host said nothing that could be asked for."""
        with contextlib.suppress(OSError, UnicodeDecodeError):
            return self._version_path.read_text(encoding="latin-1") or None
        return None

    def begin(self, response: httpx.Response) -> None:
        """A new body: forget the old one."""
        self.drop()
        version = _version_of(response)
        if version is not None:
            self._version_path.write_text(version, encoding="latin-1")

    def drop(self) -> None:
        self.path.unlink(missing_ok=True)
        self._version_path.unlink(missing_ok=True)


def _version_of(response: httpx.Response) -> str | None:
    """A strong ETag, else the date of change (a weak ETag must not join bytes, RFC 9110, 13.1.5)."""
    etag = response.headers.get("etag", "")
    return etag if etag.startswith('"') else response.headers.get("last-modified")


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


def _check_digest(part: _Part, expected: str, url: str) -> None:
    got = file_sha256(part.path)
    if got == expected:
        return
    part.drop()
    raise DataError(
        f"sha256 is {got}",
        where=redact(url),
        expected=expected,
        remedy="the file changed at its source or was damaged on the way; the download was discarded",
    )


def _discard_unless(check: Callable[[Path], None], part: _Part) -> None:
    try:
        check(part.path)
    except DataError:
        part.drop()
        raise


def _fetch_into(url: str, part: _Part, headers: Mapping[str, str], sign: http.Signer | None) -> None:
    """Append to `part` until it holds the whole body."""
    rules, problem, retry_after, failures = http.policy(), "", None, 0
    signed_anew = False
    while failures < rules.attempts:
        if failures:
            http.pause(url, failures - 1, problem, retry_after)
        have = part.size()
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
        grown = part.size() > have
        failures = 1 if grown else failures + 1
    raise http.gave_up(url, problem)


def _one_try(
    url: str, target: str, part: _Part, have: int, headers: Mapping[str, str], can_sign: bool
) -> tuple[str, float | None]:
    """One request: a problem worth another try (empty: the file is complete) and the wait asked for."""
    # `identity`: Content-Length must count the bytes that reach the file.
    wanted, version = {**headers, "Accept-Encoding": "identity"}, part.version()
    if have:
        wanted |= {"Range": f"bytes={have}-"} | ({"If-Range": version} if version else {})
    request = http.client().stream("GET", target, headers=wanted, timeout=http.policy().timeout_s)
    with request as response:
        if response.status_code in http.TRANSIENT or (can_sign and response.status_code in (401, 403)):
            return f"{host_of(url)} answered {response.status_code}", http.retry_after_s(response)
        if response.status_code == 416:
            total = _total(response.headers.get("content-range", ""))
            if total == have:
                return "", None
            part.drop()
            return "the file changed at its source", None
        http.raise_if_refused(response, url, "the file")
        resumed = response.status_code == 206
        if resumed and version and _version_of(response) not in (None, version):
            part.drop()  # a host that knows no If-Range
            return "the file changed at its source", None
        total = _total(response.headers.get("content-range", "")) if resumed else _length(response)
        _append(response, part, have if resumed else 0, url)
    size = part.size()
    if total is not None and size != total:
        if size > total:
            part.drop()
        return f"{host_of(url)} sent {size} of {total} bytes", None
    return "", None


def _append(response: httpx.Response, part: _Part, offset: int, url: str) -> None:
    if not offset:
        part.begin(response)
    with open(part.path, "ab" if offset else "wb") as file:
        first = True
        for chunk in response.iter_bytes():  # as they arrive: a cut loses nothing that came
            if first and offset == 0 and http.is_html(response, chunk[:64]):
                with contextlib.suppress(OSError):
                    part.drop()
                raise http.html_error(url, "the file")
            first = False
            file.write(chunk)


def _total(content_range: str) -> int | None:
    total = content_range.rpartition("/")[2]
    return int(total) if total.isdigit() else None


def _length(response: httpx.Response) -> int | None:
    text = response.headers.get("content-length", "")
    return int(text) if text.isdigit() else None
