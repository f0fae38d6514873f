"""When an image was taken, from what files say about themselves.

Days are int32 counts since 1970-01-01; 0 means unknown (no aerial colour imagery is that old).
"""

from __future__ import annotations

import re
from calendar import monthrange
from collections.abc import Mapping
from datetime import date
from pathlib import PurePosixPath

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
_LAST_RESORT_TAGS = ("TIFFTAG_DATETIME",)

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
    return 0 if day is None else (day - _EPOCH).days


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
    by_name = {key.upper(): value for key, value in tags.items()}

    def tagged(names: tuple[str, ...]) -> date | None:
        return next((day for tag in names if (day := parse_day(by_name.get(tag, "")))), None)

    return tagged(_ACQUISITION_TAGS) or date_from_name(name) or tagged(_LAST_RESORT_TAGS)


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


def is_within(day: date | None, interval: str | None) -> bool:
    """Whether a day lies in an interval (see `parse_range`); an unknown day only where none is asked."""
    first, last = parse_range(interval)
    if first is None and last is None:
        return True
    return day is not None and (first or date.min) <= day <= (last or date.max)


def _edge(text: str, *, end: bool) -> date | None:
    text = text.strip()
    if text in ("", ".."):
        return None
    match = re.fullmatch(r"(\d{4})(?:-(\d{2}))?(?:-(\d{2})(?:[T ].*)?)?", text)
    if not match:
        raise ValueError(f"{text!r} is not a date like 2021, 2021-07 or 2021-07-04")
    year, month, day = int(match[1]), int(match[2] or (12 if end else 1)), match[3]
    return date(year, month, int(day) if day else monthrange(year, month)[1] if end else 1)
