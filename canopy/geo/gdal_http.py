"""How GDAL speaks HTTP: the one place where its options stand. Light, because downloads need no GDAL."""

from __future__ import annotations

HTTP_TIMEOUT_S = 30.0


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
