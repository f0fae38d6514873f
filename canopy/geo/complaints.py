"""What GDAL only mutters about: damaged JPEG data is decoded into wrong pixels and a log line.

libtiff's JPEG decoder reports damage as a warning, which neither GDAL's return codes nor
GDAL_ERROR_ON_LIBJPEG_WARNING (made for plain JPEG files) turn into an error. rasterio passes the
warning to its logger in the reading thread, and that is where it is caught here.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator
from contextlib import contextmanager

_LOGGER = logging.getLogger("rasterio._err")
_DAMAGE = ("JPEGLib", "Corrupt JPEG", "TIFFReadEncoded", "libjpeg:", "Read error at")
_local = threading.local()


def _listen(record: logging.LogRecord) -> bool:
    """Keep messages about damage for the thread that is listening; let others see what they asked for."""
    heard = getattr(_local, "heard", None)
    if heard is not None:
        message = record.getMessage()
        if any(sign in message for sign in _DAMAGE):
            heard.append(message)
    parent = _LOGGER.parent
    return parent is None or record.levelno >= parent.getEffectiveLevel()


@contextmanager
def gdal_complaints() -> Iterator[list[str]]:
    """A list that fills with this thread's messages about damaged data while the block runs."""
    if _listen not in _LOGGER.filters:
        _LOGGER.addFilter(_listen)
        # Errors that GDAL recovers from are logged at INFO; the filter hides them from everyone else.
        _LOGGER.setLevel(logging.INFO)
    before, _local.heard = getattr(_local, "heard", None), []
    try:
        yield _local.heard
    finally:
        _local.heard = before
