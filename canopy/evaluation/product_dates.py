"""When a height map's imagery was taken: from canopy's tags, or from the files beside the published tiles."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np

from canopy.errors import CanopyError
from canopy.geo.opening import open_raster
from canopy.geo.paths import is_url

_DAY = re.compile(r"(\d{4})-?(\d\d)?-?(\d\d)?")
# v2's date rasters hold years since 2000; a sample of them tells the span.
_SAMPLE_PX = 512


def map_dates(files: Sequence[tuple[str, str | None, Mapping[str, str]]]) -> tuple[str, ...]:
    """Distinct first and last dates of (path, published version, tags) of a map's files, sorted; ()
    unknown.
    """
    found: set[str] = set()
    for path, published, tags in files:
        found.update(_from_tags(tags))
        if published and not is_url(path):
            found.update(_beside(Path(path), published))
    days = sorted(found)
    return tuple(days if len(days) < 3 else (days[0], days[-1]))


def dates_text(dates: Sequence[str]) -> str:
    """ "2019-06-01", "2018/2020" or "unknown"."""
    return "/".join(dict.fromkeys((dates[0], dates[-1]))) if dates else "unknown"


def years_apart(a: Sequence[str], b: Sequence[str]) -> float | None:
    """Years between the middles of two date ranges (b minus a), None where one is unknown."""
    if not a or not b:
        return None
    return (_decimal(b[0]) + _decimal(b[-1])) / 2 - (_decimal(a[0]) + _decimal(a[-1])) / 2


def _decimal(text: str) -> float:
    match = _DAY.match(text)
    if match is None:
        return float("nan")
    year, month, day = (int(part) if part else None for part in match.groups())
    return float(year or 0) + (0.5 if month is None else (month - 1 + ((day or 15) - 1) / 31) / 12)


def _from_tags(tags: Mapping[str, str]) -> Iterator[str]:
    for part in tags.get("CANOPY_DATES", tags.get("TIFFTAG_DATETIME", "")).split("/"):
        match = _DAY.match(part.strip().replace(":", "-", 2))
        if match:
            yield "-".join(piece for piece in match.groups() if piece)


def _beside(tile: Path, published: str) -> Iterator[str]:
    """Dates in `../metadata/NAME.geojson` (v1: acq_date) or `../metadata/NAME.tif` (v2: year - 2000)."""
    stem = tile.name.split(".", 1)[0]
    for folder in (tile.parent.parent / "metadata", tile.parent):
        if published == "v1" and (folder / f"{stem}.geojson").is_file():
            yield from _from_geojson(folder / f"{stem}.geojson")
            return
        if published == "v2" and folder != tile.parent and (folder / tile.name).is_file():
            yield from _from_years(folder / tile.name)
            return


def _from_geojson(path: Path) -> Iterator[str]:
    try:
        features = json.loads(path.read_text()).get("features", [])
    except (OSError, ValueError, AttributeError):
        return  # a date that cannot be read is an unknown date, not a reason to refuse the heights
    for feature in features:
        match = _DAY.match(str((feature.get("properties") or {}).get("acq_date", "")))
        if match:
            yield "-".join(piece for piece in match.groups() if piece)


def _from_years(path: Path) -> Iterator[str]:
    try:
        with open_raster(path, georeferenced=False) as dataset:
            shape = (min(_SAMPLE_PX, dataset.height), min(_SAMPLE_PX, dataset.width))
            years = np.unique(dataset.read(1, out_shape=shape))
    except CanopyError:
        return
    for year in years:
        if 0 < year < 100:
            yield str(2000 + int(year))
