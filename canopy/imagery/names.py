"""When an image was taken, from what files say about themselves.

Days are int32 counts since 1970-01-01; 0 means unknown (no aerial colour imagery is that old).
"""

from __future__ import annotations

import re
from calendar import monthrange
from collections.abc import Mapping
from datetime import date
from pathlib import PurePosixPath

UNKNOWN = 0
_EPOCH = date(1970, 1, 1)
_EARLIEST, _LATEST = 1930, 2100

# Tags in order of trust. TIFFTAG_DATETIME comes last: it is often the time of processing, not of the flight.
_ACQUISITION_TAGS = (
    "ACQUISITION_DATE",
    "ACQUISITIONDATETIME",
    "ACQUISITION_DATETIME",
    "CANOPY_IMAGERY_DATE",
    "IMAGE_DATE",
    "DATE_ACQUIRED",
)
_LAST_RESORT_TAG = "TIFFTAG_DATETIME"

_NAIP_NAME = re.compile(
    r"^m_\d{7}_[ns][ew]_\d{1,2}_(?:\d+_)?(?P<date>\d{8})(?:_\d{8})?(?:\D|$)", re.IGNORECASE
)
_ISO_NAME = re.compile(
    r"(?<!\d)(?P<date>(?:19|20)\d{2}[-_](?:0[1-9]|1[0-2])[-_](?:0[1-9]|[12]\d|3[01]))(?!\d)"
)
_COMPACT_NAME = re.compile(r"(?<!\d)(?P<date>(?:19|20)\d{2}(?:0[1-9]|1[0-2])(?:0[1-9]|[12]\d|3[01]))(?!\d)")


def days_since_epoch(day: date | None) -> int:
    """Days since 1970-01-01, or 0 where the date is unknown.

    >>> days_since_epoch(date(1970, 1, 2))
    1
    """
    return UNKNOWN if day is None else (day - _EPOCH).days


def parse_day(text: str) -> date | None:
    """A day out of the ways that tags write it: `2021-07-04T...`, `2021:07:04 12:00:00`, `20210704`."""
    match = re.match(r"\s*(\d{4})[-:/]?(\d{2})[-:/]?(\d{2})", text)
    if not match:
        return None
    try:
        day = date(*(int(part) for part in match.groups()))
    except ValueError:
        return None
    return day if _EARLIEST <= day.year <= _LATEST else None


def date_from_tags(tags: Mapping[str, str], *, last_resort: bool = False) -> date | None:
    """Acquisition day in a raster's metadata tags, or None."""
    by_name = {key.upper(): value for key, value in tags.items()}
    names = (_LAST_RESORT_TAG,) if last_resort else _ACQUISITION_TAGS
    days = (parse_day(by_name[name]) for name in names if name in by_name)
    return next((day for day in days if day), None)


def date_from_name(name: str) -> date | None:
    """Acquisition day in a file name, or None.

    NAIP's `m_{quad}_{quarter}_{zone}_{res}_{acquired}[_{published}].tif` carries two dates: the first counts.
    Any other name counts only if it holds exactly one date.

    >>> date_from_name("m_4407131_ne_19_060_20210826_20211201.tif")
    datetime.date(2021, 8, 26)
    """
    base = PurePosixPath(name.replace("\\", "/").split("?")[0]).name
    naip = _NAIP_NAME.match(base)
    if naip:
        return parse_day(naip["date"])
    for pattern in (_ISO_NAME, _COMPACT_NAME):
        found = {match["date"] for match in pattern.finditer(base)}
        if len(found) == 1:
            return parse_day(found.pop().replace("_", "-"))
    return None


def acquisition_date(tags: Mapping[str, str], name: str) -> date | None:
    """Best known acquisition day of an image file: acquisition tags, then the name, then TIFFTAG_DATETIME."""
    return date_from_tags(tags) or date_from_name(name) or date_from_tags(tags, last_resort=True)


def parse_range(text: str | None) -> tuple[date | None, date | None]:
    """First and last day of a STAC-style interval.

    Such as `2021`, `2021-07`, `2021-06-01/2021-09-30` or `../2021-01-01`.

    Raises:
        ValueError: the text is not a date or an interval of dates.
    """
    if text is None:
        return None, None
    first, slash, last = text.partition("/")
    bounds = (_edge(first, end=False), _edge(last if slash else first, end=True))
    if bounds[0] and bounds[1] and bounds[0] > bounds[1]:
        raise ValueError(f"the interval {text!r} ends before it begins")
    return bounds


def _edge(text: str, *, end: bool) -> date | None:
    text = text.strip()
    if text in ("", ".."):
        return None
    match = re.fullmatch(r"(\d{4})(?:-(\d{2}))?(?:-(\d{2})(?:[T ].*)?)?", text)
    if not match:
        raise ValueError(f"{text!r} is not a date like 2021, 2021-07 or 2021-07-04")
    year, month, day = (int(part) if part else None for part in match.groups())
    assert year is not None  # the pattern requires it
    if day is not None and month is not None:
        return date(year, month, day)
    if not end:
        return date(year, month or 1, 1)
    return date(year, month or 12, monthrange(year, month or 12)[1])
