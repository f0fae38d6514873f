"""Which of the area options was given: the rule shared by every command and by the Python API."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from canopy.errors import AreaError
from canopy.geo.aoi import AOI


def choose_area(
    *,
    bbox: str | Sequence[float] | None = None,
    size_m: float | None = None,
    bounds: str | Sequence[float] | None = None,
    bounds_crs: Any = None,
    aoi: str | Path | None = None,
) -> AOI | None:
    """The area of whichever option was given; None if none was.

    Raises:
        AreaError: two areas, an option without its partner, or an impossible area.
    """
    given = [
        name for name, value in (("--bbox", bbox), ("--bounds", bounds), ("--aoi", aoi)) if value is not None
    ]
    if len(given) > 1:
        raise AreaError(f"{' and '.join(given)} together", expected="one way to say the area")
    if size_m is not None and bbox is None:
        raise AreaError("a size without a point", where="--size-m", remedy="add --bbox LAT,LON")
    if bbox is not None:
        return AOI.from_bbox(bbox, size_m)
    if bounds is not None:
        return AOI.from_bounds(bounds, bounds_crs or "EPSG:4326")
    return AOI.from_file(aoi) if aoi is not None else None
