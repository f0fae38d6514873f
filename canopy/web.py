"""Answers from hosts that fail: whole or not at all, patiently, with errors that say who did what.

`get` gives what fits into memory; `persist` tries anything again: with back-off, heeding Retry-After, and
renewing once what lets one in. A signature is never shown: what is said goes through `redact`. Files are the
business of `canopy.download`.

GDAL reads remote rasters itself; its HTTP options stand here too, and `diagnose` finds out why it failed.
"""

from __future__ import annotations

import contextlib
import email.utils
import functools
import logging
import os
import random
import re
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

import httpx

from canopy.errors import FetchError
from canopy.files import check_terms, host_of, redact
from canopy.runtime import log

TRANSIENT = frozenset({408, 425, 429, 500, 502, 503, 504})
REQUESTS_PER_HOST = 8
# How hosts refuse a signature that ran out: S3 and Azure with 403, Azure also 409, Google's storage 400.
UNSIGNED = frozenset({400, 401, 403, 409})
SECRET_HEADERS = ("x-api-token", "authorization")
_A_DATE_S = 1e9  # some hosts write the instant of a reset, in Unix seconds
# No network or a typing error: of no use in many retries.
_BUCKET = re.compile(r"(^|\.)s3[.-].*amazonaws\.com$")
_UNKNOWN_HOST = ("name or service not known", "nodename nor servname", "name resolution", "getaddrinfo")
T = TypeVar("T")

Signer = Callable[[str, bool], str]
"""`sign(url, fresh)` -> a URL that may be read now; `fresh`: the last one was refused."""
Headers = Callable[[bool], Mapping[str, str]]
"""`headers(fresh)` -> request headers that let one in, likewise."""


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
    timeout_s: float = 30.0


_policy = RetryPolicy()


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


# ---- connections --------------------------------------------------------------------------------
@functools.cache
def _client(process: int) -> httpx.Client:
    """A process's connection pool (thread-safe). Hosts on this machine never go through a proxy."""
    return httpx.Client(
        follow_redirects=True,
        mounts={"all://127.0.0.1": None, "all://localhost": None, "all://[::1]": None},
        headers={"User-Agent": "canopy-height"},
        event_hooks={"request": [lambda request: check_terms(str(request.url)), _keep_tokens_home]},
    )


def _keep_tokens_home(request: httpx.Request) -> None:
    """Drop an access token when a redirect leaves the host that it was meant for (httpx does so only for
    `Authorization`). Called before every request, redirected ones included."""
    home = request.extensions.setdefault("canopy_home", request.url.netloc)
    if request.url.netloc != home:
        for name in SECRET_HEADERS:
            request.headers.pop(name, None)


def _hide_queries(record: logging.LogRecord) -> bool:
    """The HTTP library's own log writes whole URLs, signatures included: drop their queries."""
    record.msg, record.args = redact(record.getMessage()), ()
    return True


for _name in ("httpx", "httpcore.connection", "httpcore.http11", "httpcore.http2", "httpcore.proxy"):
    logging.getLogger(_name).addFilter(_hide_queries)


@contextmanager
def stream(url: str, headers: Mapping[str, str]) -> Iterator[httpx.Response]:
    """A host's answer, its body not yet read; `identity`, so that lengths count the bytes that arrive."""
    wanted = {**headers, "Accept-Encoding": "identity"}
    client = _client(os.getpid())
    with client.stream("GET", url, headers=wanted, timeout=_policy.timeout_s) as response:
        yield response


def gdal_options(url: str = "") -> dict[str, str]:
    """GDAL configuration for HTTP: few and large requests, no directory listings, no stale errors.

    A whole request may take four times the silence that counts as a failure. Requests to this machine are
    kept away from a proxy set in the environment.
    """
    silence_s = _policy.timeout_s
    options = {
        "GDAL_DISABLE_READDIR_ON_OPEN": "EMPTY_DIR",
        "GDAL_HTTP_CONNECTTIMEOUT": "15",
        "GDAL_HTTP_TIMEOUT": str(round(4 * silence_s)),
        "GDAL_HTTP_LOW_SPEED_TIME": str(round(silence_s)),
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
    return options | ({"GDAL_HTTP_PROXY": ""} if is_local(url) else {})


def is_local(url: str) -> bool:
    """Whether a URL leads to this machine."""
    return httpx.URL(url).host in ("127.0.0.1", "localhost", "::1")


# ---- patience -----------------------------------------------------------------------------------
class Again(Exception):  # noqa: N818  (no error yet)
    """A try that failed in a way that may pass; `moved`: it brought something, `refused`: let nobody in."""

    def __init__(
        self, problem: str, wait_s: float | None = None, moved: bool = False, refused: bool = False
    ) -> None:
        super().__init__(problem)
        self.problem, self.wait_s, self.moved, self.refused = redact(problem), wait_s, moved, refused


def persist(url: str, one_try: Callable[[bool], T]) -> T:
    """What `one_try(fresh)` returns, tried until it raises neither `Again` nor a connection's fault.

    `fresh`: the host has just refused what let one in (a signature, a token). It is renewed once: a host that
    refuses a new one, too, is believed.

    Raises:
        FetchError: all attempts failed, a refusal, or the host asks for more patience than the policy has.
    """
    failures = number = 0
    fresh = False
    while True:
        try:
            return one_try(fresh)
        except httpx.InvalidURL as error:
            raise FetchError(f"not a usable URL ({redact(error)})", where=redact(url)) from None
        except httpx.RequestError as error:
            again = Again(f"{host_of(url)} did not answer ({redact(error).strip() or type(error).__name__})")
        except Again as error:
            again = error
        if fresh and again.refused:
            raise FetchError(
                f"{again.problem}, also with a new signature or login",
                where=redact(url),
                remedy="check the address, and your account's rights at that host",
            )
        fresh = again.refused
        number += 1
        failures = 1 if again.moved else failures + 1
        unknown = any(words in again.problem.lower() for words in _UNKNOWN_HOST)
        if failures >= _policy.attempts or (failures > 1 and unknown):
            raise FetchError(
                f"{again.problem}; gave up after {number} attempts",
                where=redact(url),
                remedy="check the network and the address, or try again later",
            )
        if again.wait_s is not None and again.wait_s > _policy.longest_wait_s:
            raise FetchError(
                f"{host_of(url)} asks to wait {again.wait_s:.0f} s",
                where=redact(url),
                remedy="try again later, with fewer workers",
            )
        wait_s = _policy.first_wait_s * 2 ** (failures - 1) * random.uniform(0.75, 1.25)
        wait_s = min(max(wait_s, again.wait_s or 0.0), _policy.longest_wait_s)
        log.debug("%s; trying again in %.1f s", again.problem, wait_s)
        time.sleep(wait_s)


def check_answer(response: httpx.Response, url: str, what: str, *, signed: bool, first: bytes = b"") -> None:
    """`Again` for a status that may pass; FetchError for a refusal, or a web page in place of data."""
    status, host = response.status_code, host_of(url)
    refused = signed and status in UNSIGNED
    if status in TRANSIENT or refused:
        problem = f"{host} answered {status} {response.reason_phrase}"
        raise Again(problem, _retry_after_s(response), refused=refused)
    if status in (401, 403):
        paid = "; of a bucket whose requester pays, copy it first: aws s3 cp --request-payer requester"
        raise FetchError(
            f"{host} refuses {what} ({status})",
            where=redact(url),
            remedy="check the address and your access rights" + (paid if _BUCKET.search(host) else ""),
        )
    if status in (404, 410):
        raise FetchError(f"{host} has no such file ({status})", where=redact(url), remedy="check the address")
    if not response.is_success:
        raise FetchError(f"{host} answered {status} {response.reason_phrase}", where=redact(url))
    page = first.lstrip()[:15].lower().startswith((b"<!doctype html", b"<html"))
    if page or (first and "html" in response.headers.get("content-type", "")):
        raise FetchError(
            f"{host} sent a web page instead of {what}",
            where=redact(url),
            remedy="a login, an error page or a network portal is in the way: open the address in a browser",
        )


def _retry_after_s(response: httpx.Response) -> float | None:
    """Seconds asked for by a Retry-After header (a number or a date) or a rate limit's reset, or None."""
    text = response.headers.get("retry-after")
    if not text and response.status_code == 429:
        text = response.headers.get("x-ratelimit-reset")
    with contextlib.suppress(TypeError, ValueError):
        seconds = float(text)
        return max(0.0, seconds - time.time() if seconds > _A_DATE_S else seconds)
    with contextlib.suppress(TypeError, ValueError):
        return max(0.0, email.utils.parsedate_to_datetime(text).timestamp() - time.time())
    return None


# ---- asking -------------------------------------------------------------------------------------
def get(
    url: str,
    *,
    headers: Mapping[str, str] | None = None,
    what: str = "the file",
    absent: tuple[int, ...] = (),
) -> httpx.Response:
    """GET with retries; the body is read whole and is complete.

    Args:
        url: where from; shown without its query.
        headers: extra request headers.
        what: the thing asked for, for messages.
        absent: statuses returned to the caller instead of raised (a tile server's 404).

    Raises:
        FetchError: no answer, a refusal, or a web page instead of data, after the retries.
    """

    def one_try(_: bool) -> httpx.Response:
        response = _client(os.getpid()).get(url, headers=headers, timeout=_policy.timeout_s)
        if response.status_code not in absent:
            check_answer(response, url, what, signed=False, first=response.content[:64])
        return response

    return persist(url, one_try)


def peek(url: str, count: int = 64, *, headers: Mapping[str, str] | None = None) -> tuple[bytes, int | None]:
    """The beginning of what a URL gives, and the size of the whole where the host says it.

    Nothing and None where it does not answer well; never an error.
    """
    wanted = {**(headers or {}), "Range": f"bytes=0-{count - 1}"}
    try:
        with stream(url, wanted) as response:
            good = response.is_success
            return (next(response.iter_bytes(count), b""), total(response)) if good else (b"", None)
    except (httpx.RequestError, httpx.InvalidURL):
        return b"", None


def diagnose(url: str, *, what: str = "the image", signed: bool = False) -> None:
    """Ask a host for the first bytes of a URL that GDAL could not read, to learn why: inside `persist`.

    Raises:
        Again: it may answer later; FetchError: retrying cannot help: no such file, a web page, no range
            requests, no access.
    """
    with stream(url, {"Range": "bytes=0-63"}) as response:
        check_answer(response, url, what, signed=signed, first=next(response.iter_bytes(64), b""))
    if response.status_code != 206:
        raise FetchError(
            f"{host_of(url)} does not answer range requests",
            where=redact(url),
            remedy="download the file and give its path",
        )


def total(response: httpx.Response) -> int | None:
    """Bytes of the whole body, of which a part may have been asked for."""
    partial = response.status_code in (206, 416)
    text = response.headers.get("content-range" if partial else "content-length", "").rpartition("/")[2]
    return int(text) if text.isdigit() else None
