"""Files and answers from hosts that fail: whole or not at all, patiently, with errors that say who did what.

`download` fetches a URL into a file: it goes to `NAME.part`, resumes there after an interruption if the host
still has the same version, is checked for length and digest, flushed to disk, and only then gets its name.
`get` is the same patience for answers that fit into memory. Both retry with back-off, heed Retry-After, ask a
host few things at a time, and never show a signature: what is said goes through `redact`.

GDAL reads remote rasters itself; its HTTP options stand here too, and `diagnose` finds out why it failed.
"""

from __future__ import annotations

import contextlib
import email.utils
import logging
import os
import random
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeVar

import httpx
import numpy as np
from filelock import FileLock

from canopy.errors import DataError, FetchError
from canopy.files import file_sha256, flush, host_of, redact, told_as_output
from canopy.runtime import log

HTTP_TIMEOUT_S = 30.0
TRANSIENT = frozenset({408, 425, 429, 500, 502, 503, 504})
REQUESTS_PER_HOST = 8
# How hosts refuse a signature that ran out: S3 and Azure with 403, Azure also 409, Google's storage 400.
UNSIGNED = frozenset({400, 401, 403, 409})
SECRET_HEADERS = ("x-api-token", "authorization")
# A try that brought this much starts the count anew: a slow line is not a dead one, but a host that sends a
# byte a try is.
_PROGRESS_BYTES = 1 << 14
T = TypeVar("T")

Signer = Callable[[str, bool], str]
"""`sign(url, fresh)` -> a URL that may be read now; `fresh` asks for a new signature."""


@dataclass(frozen=True)
class RetryPolicy:
    """How often and how patiently to try.

    Attributes:
        attempts: tries in all.
        first_wait_s: wait after the first failure; doubles each time, with +-25 % jitter so that workers
            spread.
        longest_wait_s: no single wait is longer; a host whose Retry-After asks for more is given up on.
        timeout_s: silence on a connection that counts as a failure.
    """

    attempts: int = 6
    first_wait_s: float = 0.5
    longest_wait_s: float = 120.0
    timeout_s: float = HTTP_TIMEOUT_S

    def wait_s(self, attempt: int, retry_after_s: float | None = None) -> float:
        """Seconds to wait after failure number `attempt` (0 = the first)."""
        wait = self.first_wait_s * 2**attempt * random.uniform(0.75, 1.25)
        return min(max(wait, retry_after_s or 0.0), self.longest_wait_s)


_policy = RetryPolicy()
_client: tuple[int, httpx.Client] | None = None
_slots: dict[str, threading.BoundedSemaphore] = {}
_slots_lock = threading.Lock()


def policy() -> RetryPolicy:
    """The policy in force."""
    return _policy


@contextmanager
def use_policy(other: RetryPolicy) -> Iterator[None]:
    """Another policy for the duration of a block (the whole process, not only this thread)."""
    global _policy
    previous, _policy = _policy, other
    try:
        yield
    finally:
        _policy = previous


@contextmanager
def host_slot(url: str) -> Iterator[None]:
    """Hold one of the few requests that may run against a host at a time."""
    with _slots_lock:
        slot = _slots.setdefault(host_of(url), threading.BoundedSemaphore(REQUESTS_PER_HOST))
    with slot:
        yield


def client() -> httpx.Client:
    """The process's connection pool (thread-safe). Hosts on this machine never go through a proxy."""
    global _client
    with _slots_lock:
        if _client is None or _client[0] != os.getpid() or _client[1].is_closed:
            direct = {"all://127.0.0.1": None, "all://localhost": None, "all://[::1]": None}
            made = httpx.Client(
                follow_redirects=True,
                mounts=direct,
                headers={"User-Agent": "canopy-height"},
                event_hooks={"request": [_keep_tokens_home]},
            )
            _client = (os.getpid(), made)
        return _client[1]


def _hide_queries(record: logging.LogRecord) -> bool:
    """The HTTP library's own log writes whole URLs, signatures included: drop their queries."""
    record.msg, record.args = redact(record.getMessage()), ()
    return True


for _name in ("httpx", "httpcore.connection", "httpcore.http11", "httpcore.http2", "httpcore.proxy"):
    logging.getLogger(_name).addFilter(_hide_queries)


def _keep_tokens_home(request: httpx.Request) -> None:
    """Drop an access token when a redirect leaves the host that it was meant for (httpx does so only for
    `Authorization`). Called before every request, redirected ones included."""
    home = request.extensions.setdefault("canopy_home", request.url.netloc)
    if request.url.netloc != home:
        for name in SECRET_HEADERS:
            request.headers.pop(name, None)


# ---- GDAL ---------------------------------------------------------------------------------------
def http_options(timeout_s: float = HTTP_TIMEOUT_S) -> dict[str, str]:
    """GDAL configuration for HTTP: few and large requests, no directory listings, no stale errors.

    `timeout_s`: silence on a connection that counts as a failure; a whole request may take four times that.
    """
    return {
        "GDAL_DISABLE_READDIR_ON_OPEN": "EMPTY_DIR",
        "GDAL_HTTP_CONNECTTIMEOUT": "15",
        "GDAL_HTTP_TIMEOUT": str(round(4 * timeout_s)),
        "GDAL_HTTP_LOW_SPEED_TIME": str(round(timeout_s)),
        "GDAL_HTTP_LOW_SPEED_LIMIT": "1",
        # The application retries: only it sees Retry-After and cut bodies.
        "GDAL_HTTP_MAX_RETRY": "0",
        "GDAL_HTTP_MERGE_CONSECUTIVE_RANGES": "YES",
        "GDAL_HTTP_USERAGENT": "canopy-height",
        "GDAL_INGESTED_BYTES_AT_OPEN": "32768",
        "CPL_VSIL_CURL_USE_HEAD": "NO",
        # GDAL remembers a failed request and would answer a retry from memory without asking the host again.
        "CPL_VSIL_CURL_NON_CACHED": "/vsicurl/",
        "VSI_CACHE": "TRUE",
        "VSI_CACHE_SIZE": str(8 * 2**20),
    }


def gdal_options() -> dict[str, str]:
    """GDAL configuration for HTTP with the patience of the policy in force."""
    return http_options(_policy.timeout_s)


def local_proxy_options(url: str) -> dict[str, Any]:
    """GDAL options that keep requests to this machine away from a proxy set in the environment."""
    host = host_of(url).rpartition(":")[0] or host_of(url)
    return {"GDAL_HTTP_PROXY": ""} if host in ("127.0.0.1", "localhost", "[::1]") else {}


# ---- what a host said ---------------------------------------------------------------------------
def retry_after_s(response: httpx.Response) -> float | None:
    """Seconds asked for by a Retry-After header (a number or a date) or a rate limit's reset, or None."""
    text = response.headers.get("retry-after")
    if not text and response.status_code == 429:
        text = response.headers.get("x-ratelimit-reset")
    if not text:
        return None
    try:
        return max(0.0, float(text))
    except ValueError:
        pass
    try:
        return max(0.0, email.utils.parsedate_to_datetime(text).timestamp() - time.time())
    except (TypeError, ValueError):
        return None


def is_html(response: httpx.Response, body: bytes) -> bool:
    """True for a web page where data was asked for: a login, an error page, a captive portal."""
    if "html" in response.headers.get("content-type", ""):
        return True
    return body.lstrip()[:15].lower().startswith((b"<!doctype html", b"<html"))


def is_unknown_host(error: BaseException | str) -> bool:
    """True when the host's name leads nowhere: no network or a typing error, and no use in many retries."""
    words = ("name or service not known", "nodename nor servname", "name resolution", "getaddrinfo")
    return any(word in str(error).lower() for word in words)


def raise_if_refused(response: httpx.Response, url: str, what: str) -> None:
    """Turn a refusal that no retry can change into an error that names the host."""
    if response.is_success:
        return
    status, host = response.status_code, host_of(url)
    if status in (401, 403):
        raise FetchError(
            f"{host} refuses {what} ({status})",
            where=redact(url),
            remedy="check the address and your access rights",
        )
    if status in (404, 410):
        raise FetchError(f"{host} has no such file ({status})", where=redact(url), remedy="check the address")
    raise FetchError(f"{host} answered {status} {response.reason_phrase}", where=redact(url))


def html_error(url: str, what: str) -> FetchError:
    """The host sent a web page where data was asked for."""
    return FetchError(
        f"{host_of(url)} sent a web page instead of {what}",
        where=redact(url),
        remedy="a login, an error page or a network portal is in the way: open the address in a browser",
    )


def gave_up(url: str, problem: str, attempts: int) -> FetchError:
    """All attempts failed."""
    return FetchError(
        f"{redact(problem)}; gave up after {attempts} attempts",
        where=redact(url),
        remedy="check the network and the address, or try again later",
    )


class _Again(Exception):  # noqa: N818  (no error yet)
    """A try that failed in a way that may pass; `moved`: it brought something."""

    def __init__(self, problem: str, retry_after_s: float | None = None, moved: bool = False) -> None:
        super().__init__(problem)
        self.problem, self.retry_after_s, self.moved = problem, retry_after_s, moved


def _raise_for_status(
    response: httpx.Response, url: str, what: str, *, signed: bool, first: bytes | None = None
) -> None:
    """`_Again` for a status that may pass, FetchError for a refusal or a web page in place of data."""
    if response.status_code in TRANSIENT or (signed and response.status_code in UNSIGNED):
        said = f"{host_of(url)} answered {response.status_code} {response.reason_phrase}"
        raise _Again(said, retry_after_s(response))
    raise_if_refused(response, url, what)
    if first is not None and is_html(response, first):
        raise html_error(url, what)


def _persist(url: str, one_try: Callable[[int], T]) -> T:
    """What `one_try(number)` returns, tried until it raises neither `_Again` nor a connection's fault."""
    failures = number = 0
    while True:
        try:
            with host_slot(url):
                return one_try(number)
        except httpx.InvalidURL as error:
            raise FetchError(f"not a usable URL ({redact(error)})", where=redact(url)) from None
        except httpx.RequestError as error:
            again = _Again(f"{host_of(url)} did not answer ({redact(error).strip() or type(error).__name__})")
        except _Again as error:
            again = error
        number += 1
        failures = 1 if again.moved else failures + 1
        if failures >= _policy.attempts or (failures > 1 and is_unknown_host(again.problem)):
            raise gave_up(url, again.problem, number)
        pause(url, failures - 1, again.problem, again.retry_after_s)


def pause(url: str, attempt: int, problem: str, retry_after: float | None = None) -> None:
    """Wait before the next attempt, or give up when the host asks for more patience than the policy has."""
    if retry_after is not None and retry_after > _policy.longest_wait_s:
        raise FetchError(
            f"{host_of(url)} asks to wait {retry_after:.0f} s",
            where=redact(url),
            remedy="try again later, with fewer workers",
        )
    wait = _policy.wait_s(attempt, retry_after)
    log.debug("%s; trying again in %.1f s", redact(problem), wait)
    time.sleep(wait)


# ---- asking -------------------------------------------------------------------------------------
def get(
    url: str,
    *,
    headers: Mapping[str, str] | None = None,
    sign: Signer | None = None,
    what: str = "the file",
    absent: tuple[int, ...] = (),
) -> httpx.Response:
    """GET with retries; the body is read whole and is complete.

    Args:
        url: where from; shown without its query.
        headers: extra request headers.
        sign: makes the URL readable; asked for a fresh signature after a refusal.
        what: the thing asked for, for messages.
        absent: statuses returned to the caller instead of raised (a tile server's 404).

    Raises:
        FetchError: no answer, a refusal, or a web page instead of data, after the retries.
    """

    def one_try(number: int) -> httpx.Response:
        target = sign(url, number > 0) if sign else url
        response = client().get(target, headers=headers, timeout=_policy.timeout_s)
        if response.status_code not in absent:
            _raise_for_status(response, url, what, signed=sign is not None, first=response.content[:64])
        return response

    return _persist(url, one_try)


@contextmanager
def _beginning(
    url: str, count: int, headers: Mapping[str, str] | None = None
) -> Iterator[tuple[httpx.Response, bytes]]:
    """A host's answer to being asked for the first bytes of a URL, and those bytes."""
    wanted = {**(headers or {}), "Range": f"bytes=0-{count - 1}", "Accept-Encoding": "identity"}
    request = client().stream("GET", url, headers=wanted, timeout=_policy.timeout_s)
    with host_slot(url), request as response:
        yield response, next(response.iter_bytes(count), b"")


def size_of(url: str, *, headers: Mapping[str, str] | None = None, sign: Signer | None = None) -> int | None:
    """Bytes of what a URL gives; None where the host does not say."""
    try:
        with _beginning(sign(url, False) if sign else url, 1, headers) as (response, _):
            if not response.is_success:
                return None
            return _total(response)
    except (httpx.TransportError, httpx.InvalidURL):
        return None


def first_bytes(url: str, count: int = 64) -> bytes:
    """The beginning of what a URL gives, or nothing where it does not answer well; never an error."""
    try:
        with _beginning(url, count) as (response, first):
            return first if response.is_success else b""
    except (httpx.RequestError, httpx.InvalidURL):
        return b""


def diagnose(url: str, *, what: str = "the image", can_sign: bool = False) -> tuple[str, float | None]:
    """Ask a host for the first bytes of a URL that GDAL could not read, to learn why.

    Returns:
        What the host did, in words, and the seconds it asks to wait (None: it did not say). An empty text
        means that the host answers well now.

    Raises:
        FetchError: retrying cannot help: no such file, a web page, no range requests, no access.
    """
    try:
        with _beginning(url, 64) as (response, first):
            _raise_for_status(response, url, what, signed=can_sign, first=first)
    except _Again as again:
        return again.problem, again.retry_after_s
    except httpx.InvalidURL as error:
        raise FetchError(f"not a usable URL ({redact(error)})", where=redact(url)) from None
    except httpx.RequestError as error:
        return f"{host_of(url)} did not answer ({redact(error).strip() or type(error).__name__})", None
    if response.status_code != 206:
        raise FetchError(
            f"{host_of(url)} does not answer range requests",
            where=redact(url),
            remedy="download the file and give its path",
        )
    return "", None


# ---- files --------------------------------------------------------------------------------------
def download(
    url: str,
    dest: Path | str,
    *,
    sha256: str | None = None,
    headers: Mapping[str, str] | None = None,
    sign: Signer | None = None,
    check: Callable[[Path], None] | None = None,
    overwrite: bool = False,
) -> Path:
    """Fetch a URL into a file.

    Args:
        url: http(s) address; its query is never shown or stored.
        dest: file to write.
        sha256: expected digest, lower-case hex; checked also on a file that is already there.
        headers: extra request headers, such as an access token (never logged).
        sign: makes the URL readable; asked again after a refusal.
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
            _persist(url, lambda number: _one_try(url, part, headers or {}, sign, number > 0))
            try:
                _check_digest(part.path, sha256, url)
                if check is not None:
                    check(part.path)
            except DataError:
                part.drop()
                raise
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


def _check_digest(path: Path, expected: str | None, url: str) -> None:
    if expected is None or (got := file_sha256(path)) == expected.lower():
        return
    raise DataError(
        f"sha256 is {got}",
        where=redact(url),
        expected=expected.lower(),
        remedy="the file changed at its source or was damaged on the way; the download was discarded",
    )


def _one_try(url: str, part: _Part, headers: Mapping[str, str], sign: Signer | None, fresh: bool) -> None:
    """Append to `part` until it holds the whole body; raises `_Again` where it does not yet."""
    have, version = part.size(), part.version()
    # `identity`: Content-Length must count the bytes that reach the file.
    wanted = {**headers, "Accept-Encoding": "identity"}
    if have:
        wanted |= {"Range": f"bytes={have}-"} | ({"If-Range": version} if version else {})
    target = sign(url, fresh) if sign else url
    try:
        with client().stream("GET", target, headers=wanted, timeout=_policy.timeout_s) as response:
            if response.status_code == 416 and _total(response) == have:
                return
            if response.status_code != 416:
                _raise_for_status(response, url, "the file", signed=sign is not None)
            resumed = response.status_code == 206
            another = resumed and version and _version_of(response) not in (None, version)
            if another or response.status_code == 416:  # the first: by a host that knows no If-Range
                part.drop()
                raise _Again("the file changed at its source")
            total = _total(response)
            _append(response, part, have if resumed else 0, url)
    except httpx.RequestError as error:
        moved = part.size() - have >= _PROGRESS_BYTES
        raise _Again(f"{host_of(url)} cut the connection ({redact(error)})", moved=moved) from None
    size = part.size()
    if total is not None and size != total:
        if size > total:
            part.drop()
        moved = size - have >= _PROGRESS_BYTES and size < total
        raise _Again(f"{host_of(url)} sent {size} of {total} bytes", moved=moved)


def _append(response: httpx.Response, part: _Part, offset: int, url: str) -> None:
    if not offset:
        part.begin(response)
    with open(part.path, "ab" if offset else "wb") as file:
        first = True
        for chunk in response.iter_bytes():  # as they arrive: a cut loses nothing that came
            if first and offset == 0 and is_html(response, chunk[:64]):
                with contextlib.suppress(OSError):
                    part.drop()
                raise html_error(url, "the file")
            first = False
            file.write(chunk)


def _total(response: httpx.Response) -> int | None:
    """Bytes of the whole body, of which a part may have been asked for."""
    partial = response.status_code in (206, 416)
    text = response.headers.get("content-range" if partial else "content-length", "").rpartition("/")[2]
    return int(text) if text.isdigit() else None


# ---- CRC-32C ------------------------------------------------------------------------------------
# The checksum that Google's storage, and so NEON, publish. Python's `zlib` has only the other CRC-32, and a
# plain loop over bytes would run at 5 MB/s: many equal slices of the data go through the byte-wise table in
# step, as one NumPy array, and their remainders are joined at the end. The remainder of `A + B` is that of A
# pushed through len(B) zero bytes, xor that of B; pushing is linear over GF(2), kept as four tables of 256.
_POLYNOMIAL = 0x82F63B78  # RFC 3720 (iSCSI), bits reversed
_LANES = 4096
_BLOCK = 8 << 20


@lru_cache(maxsize=1)
def _table() -> np.ndarray:
    """Remainder of each byte, uint32 (256,)."""
    table = np.arange(256, dtype=np.uint32)
    for _ in range(8):
        table = np.where(table & 1, (table >> 1) ^ np.uint32(_POLYNOMIAL), table >> 1).astype(np.uint32)
    return table


@lru_cache(maxsize=64)
def _push(length: int) -> np.ndarray:
    """Tables uint32 (4, 256) that push a remainder through `length` zero bytes, one row per byte of it."""
    if length == 1:
        bits = np.uint32(1) << np.arange(32, dtype=np.uint32)
        return _as_tables((bits >> 8) ^ _table()[bits & 0xFF])
    half = _push(length // 2)
    bits = _apply(half, _apply(half, np.uint32(1) << np.arange(32, dtype=np.uint32)))
    return _as_tables(_apply(_push(1), bits) if length % 2 else bits)


def _as_tables(images: np.ndarray) -> np.ndarray:
    """Images of the 32 unit vectors -> tables of all values of each byte, uint32 (4, 256)."""
    tables = np.zeros((4, 256), np.uint32)
    for byte in range(4):
        for bit in range(8):
            tables[byte, 1 << bit : 2 << bit] = tables[byte, : 1 << bit] ^ images[8 * byte + bit]
    return tables


def _apply(tables: np.ndarray, remainders: np.ndarray) -> np.ndarray:
    """Push an array of remainders through the zeros of `tables`."""
    parts = [tables[byte][(remainders >> (8 * byte)) & 0xFF] for byte in range(4)]
    return parts[0] ^ parts[1] ^ parts[2] ^ parts[3]


def crc32c(data: bytes, start: int = 0) -> int:
    """CRC-32C of `data`, continuing from the CRC `start` of what came before.

    >>> hex(crc32c(b"123456789"))
    '0xe3069283'
    """
    values = np.frombuffer(data, np.uint8)
    state = np.uint32(start ^ 0xFFFFFFFF)
    step = values.size // _LANES
    if step:
        state = _many(values[: step * _LANES].reshape(_LANES, step), state)
    table = _table()
    for value in values[step * _LANES :]:
        state = (state >> np.uint32(8)) ^ table[(state ^ value) & 0xFF]
    return int(state) ^ 0xFFFFFFFF


def _many(lanes: np.ndarray, state: np.uint32) -> np.uint32:
    """Remainder after all bytes of `lanes`, uint8 (lanes, length), read row by row."""
    table, length = _table(), lanes.shape[1]
    columns = np.ascontiguousarray(lanes.T)
    remainders = np.zeros(len(lanes), np.uint32)
    remainders[0] = state
    for column in columns:
        remainders = (remainders >> 8) ^ table[(remainders ^ column) & 0xFF]
    while len(remainders) > 1:  # neighbours joined, pair by pair
        remainders = _apply(_push(length), remainders[0::2]) ^ remainders[1::2]
        length *= 2
    return np.uint32(remainders[0])


def file_crc32c(path: Path | str) -> str:
    """CRC-32C of a file as 8 lower-case hex digits."""
    value = 0
    with open(path, "rb") as file:
        while block := file.read(_BLOCK):
            value = crc32c(block, value)
    return f"{value:08x}"
