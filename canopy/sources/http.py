"""Talking to hosts that fail: retries with back-off, a cap per host, and errors that say who did what.

GDAL's own retry covers a few statuses and no cut connections, so the application retries too: `get` for plain
requests, and `diagnose` to find out why GDAL could not read a URL and how long to wait before trying again.
Signed URLs never reach a message: everything shown goes through `redact`.
"""

from __future__ import annotations

import email.utils
import logging
import os
import random
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import httpx

from canopy.errors import FetchError
from canopy.geo.gdal_http import HTTP_TIMEOUT_S, http_options
from canopy.runtime import log
from canopy.sources.paths import host_of, redact

TRANSIENT = frozenset({408, 425, 429, 500, 502, 503, 504})
REQUESTS_PER_HOST = 8
SECRET_HEADERS = ("x-api-token", "authorization")

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


def gdal_options() -> dict[str, str]:
    """GDAL configuration for HTTP with the patience of the policy in force."""
    return http_options(_policy.timeout_s)


def local_proxy_options(url: str) -> dict[str, Any]:
    """GDAL options that keep requests to this machine away from a proxy set in the environment."""
    host = host_of(url).rpartition(":")[0] or host_of(url)
    return {"GDAL_HTTP_PROXY": ""} if host in ("127.0.0.1", "localhost", "[::1]") else {}


def retry_after_s(response: httpx.Response) -> float | None:
    """Seconds asked for by a Retry-After header (a number or a date), or None."""
    text = response.headers.get("retry-after")
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
        sign: makes the URL readable; asked for a fresh signature after a 401 or 403.
        what: the thing asked for, for messages.
        absent: statuses returned to the caller instead of raised (a tile server's 404).

    Raises:
        FetchError: no answer, a refusal, or a web page instead of data, after the retries.
    """
    problem, retry_after = "", None
    for attempt in range(_policy.attempts):
        if attempt:
            pause(url, attempt - 1, problem, retry_after)
        retry_after = None
        try:
            with host_slot(url):
                target = sign(url, attempt > 0) if sign else url
                response = client().get(target, headers=headers, timeout=_policy.timeout_s)
        except httpx.InvalidURL as error:
            raise FetchError(f"not a usable URL ({redact(error)})", where=redact(url)) from None
        except httpx.RequestError as error:
            problem = f"{host_of(url)} did not answer ({_reason(error)})"
            if attempt and is_unknown_host(error):
                raise gave_up(url, problem, attempt + 1) from None
            continue
        if response.status_code in absent:
            return response
        if response.status_code in TRANSIENT or (sign and response.status_code in (401, 403)):
            problem = f"{host_of(url)} answered {response.status_code} {response.reason_phrase}"
            retry_after = retry_after_s(response)
            continue
        raise_if_refused(response, url, what)
        if is_html(response, response.content[:64]):
            raise html_error(url, what)
        return response
    raise gave_up(url, problem)


def _reason(error: Exception) -> str:
    return redact(error).strip() or type(error).__name__


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


def gave_up(url: str, problem: str, attempts: int | None = None) -> FetchError:
    """All attempts failed."""
    return FetchError(
        f"{redact(problem)}; gave up after {attempts or _policy.attempts} attempts",
        where=redact(url),
        remedy="check the network and the address, or try again later",
    )


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


def size_of(url: str, *, headers: Mapping[str, str] | None = None, sign: Signer | None = None) -> int | None:
    """Bytes of what a URL gives, asked with a one-byte range request; None where the host does not say."""
    try:
        with (
            host_slot(url),
            client().stream(
                "GET",
                sign(url, False) if sign else url,
                headers={**(headers or {}), "Range": "bytes=0-0", "Accept-Encoding": "identity"},
                timeout=_policy.timeout_s,
            ) as response,
        ):
            if not response.is_success:
                return None
            named = "content-range" if response.status_code == 206 else "content-length"
            total = response.headers.get(named, "").rpartition("/")[2]
            return int(total) if total.isdigit() else None
    except (httpx.TransportError, httpx.InvalidURL):
        return None


def first_bytes(url: str, count: int = 64) -> bytes:
    """The beginning of what a URL gives, or nothing where it does not answer well; never an error."""
    try:
        with (
            host_slot(url),
            client().stream(
                "GET", url, headers={"Range": f"bytes=0-{count - 1}"}, timeout=_policy.timeout_s
            ) as response,
        ):
            return next(response.iter_bytes(count), b"") if response.is_success else b""
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
        with (
            host_slot(url),
            client().stream(
                "GET", url, headers={"Range": "bytes=0-63"}, timeout=_policy.timeout_s
            ) as response,
        ):
            first = next(response.iter_bytes(64), b"")
    except httpx.InvalidURL as error:
        raise FetchError(f"not a usable URL ({redact(error)})", where=redact(url)) from None
    except httpx.RequestError as error:
        return f"{host_of(url)} did not answer ({_reason(error)})", None
    if response.status_code in TRANSIENT or (can_sign and response.status_code in (401, 403)):
        return f"{host_of(url)} answered {response.status_code} {response.reason_phrase}", retry_after_s(
            response
        )
    raise_if_refused(response, url, what)
    if is_html(response, first):
        raise html_error(url, what)
    if response.status_code != 206:
        raise FetchError(
            f"{host_of(url)} does not answer range requests",
            where=redact(url),
            remedy="download the file and give its path",
        )
    return "", None
