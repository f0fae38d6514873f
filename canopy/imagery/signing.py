"""URLs that have to be signed just before they are read: the Planetary Computer's storage.

A signature lasts about 45 minutes and is never stored; a refused one is made again, by one thread at a time.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from urllib.parse import urlsplit

from canopy import download
from canopy.errors import FetchError, MissingDependencyError
from canopy.files import host_of, is_url
from canopy.runtime import log

PLANETARY_COMPUTER = "planetary-computer"
_HOST = "planetarycomputer.microsoft.com"
# A token younger than this was refused for another reason than its age: a new one would be refused, too.
_YOUNG_S = 30.0
_lock = threading.Lock()
_made: dict[str, float] = {}


def signer(signing: str | None) -> Callable[[str, bool], str] | None:
    """The function that signs URLs of a source: `sign(url, fresh)`; None where nothing is signed."""
    return planetary_computer_sign if signing == PLANETARY_COMPUTER else None


def signing_of(catalog: str) -> str | None:
    """Who signs the URLs that a catalog gives, by its host."""
    host = urlsplit(catalog).hostname or ""
    return PLANETARY_COMPUTER if host == _HOST or host.endswith("." + _HOST) else None


def planetary_computer_sign(href: str, fresh: bool) -> str:
    """A Planetary Computer URL that may be read for about 45 minutes; `fresh`: the last one was refused.

    Some containers may be read by anybody: where the token service fails, the URL is left as it is.

    Raises:
        MissingDependencyError: the library is not installed.
    """
    if not is_url(href):
        return href
    try:
        import planetary_computer
        from planetary_computer import sas
    except ImportError:
        raise MissingDependencyError(
            "Planetary Computer imagery needs planetary-computer",
            where=host_of(href),
            remedy="install it: pip install 'canopy-height[stac]'",
        ) from None
    parts = urlsplit(href)
    container = parts.path.lstrip("/").split("/", 1)[0]
    account, _, rest = (parts.hostname or "").partition(".")
    if rest != sas.BLOB_STORAGE_DOMAIN.lstrip(".") or account == "ai4edatasetspublicassets":
        return href
    try:
        _renew(f"{account}/{container}", fresh)
        return str(planetary_computer.sign(href))
    except (FetchError, ValueError, KeyError, TypeError) as error:
        log.warning("%s: no signature (%s); trying without one", host_of(href), error)
        return href


def _renew(container: str, fresh: bool) -> None:
    """Leave a valid token in the library's cache. (Its own request has no timeout and no lock.)"""
    from planetary_computer import sas
    from planetary_computer.settings import Settings

    settings = Settings.get()
    address = f"{settings.sas_url}/{container}"
    with _lock:
        token = sas.TOKEN_CACHE.get(address)
        young = time.monotonic() - _made.get(address, -_YOUNG_S) < _YOUNG_S
        if token and token.ttl() > 120 and (young or not fresh):
            return
        key = settings.subscription_key
        headers = {"Ocp-Apim-Subscription-Key": key} if key else None
        answer = download.get(address, headers=headers, what="a signature").json()
        sas.TOKEN_CACHE[address] = sas.SASToken(**answer)
        _made[address] = time.monotonic()
