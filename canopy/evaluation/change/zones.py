"""Change inside polygons between two maps, with its interval by the area rule of `canopy stats`."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from canopy.evaluation.areas import AreaModel
from canopy.evaluation.change.rules import change_reach, square_models
from canopy.evaluation.grids import read_on
from canopy.evaluation.maps import HeightMap
from canopy.evaluation.zones import (
    Pixels,
    check_meeting,
    geodesic_area_m2,
    joined,
    pixels_in,
    with_total,
)
from canopy.geo.area import AOI
from canopy.geo.grid import Grid
from canopy.geo.vector import read_zones
from canopy.runtime import NoProgress, Progress

if TYPE_CHECKING:
    import geopandas

COLUMNS = (
    "n", "area_ha", "valid_ha", "mean_a_m", "mean_b_m", "change_m", "change_lower_m", "change_upper_m",
    "significant", "cover_a", "cover_b", "canopy_lost_ha", "canopy_gained_ha",
)  # fmt: skip
_NO_INTERVAL = (
    "no intervals of the zones' change: they need two maps that say how alike their errors are (canopy "
    "predict --interval 0.9 with a calibrated model)"
)


def zone_changes(
    a: HeightMap,
    b: HeightMap,
    grid: Grid,
    zones: str | Path | geopandas.GeoDataFrame,
    layer: str | None = None,
    *,
    cover_m: float,
    confidence: float,
    area: AOI | None = None,
    progress: Progress | None = None,
) -> geopandas.GeoDataFrame:
    """The polygons' own columns, then `COLUMNS`; a last row for all of them, their common ground once.

    Over the ground that is valid in both maps: means of A and B, their difference B - A with the ends of its
    interval, whether that leaves out 0, the share of canopy in both, and hectares where it was lost and
    gained, pixel by pixel and significant or not. Maps without area models have no interval, and a note says
    so in `attrs["notes"]`.

    Raises InputError: zones that cannot be read or do not meet the compared ground.
    """
    frame, crs, shapes = read_zones(zones, layer)
    check_meeting(shapes, crs, grid.outline(), zones)
    frame, shapes = with_total(frame, shapes)
    models, progress = square_models(a, b), progress or NoProgress()

    def read(tile: Grid) -> tuple[np.ndarray, np.ndarray]:
        (one, in_a), (two, in_b) = (read_on(side, tile, interval=models is not None) for side in (a, b))
        valid = in_a & in_b
        return np.concatenate([one, two]), valid if area is None or area.is_box else valid & area.mask(tile)

    progress.start(len(shapes), "polygons")
    rows = []
    for shape in shapes:
        zone_m2 = 0.0 if shape is None else geodesic_area_m2(shape, crs)
        rows.append(_row(pixels_in(read, grid, shape, crs), zone_m2, cover_m, confidence, models))
        progress.advance()
    table = joined(frame, rows)
    table.attrs["notes"] = [] if models else [_NO_INTERVAL]
    return table


def _row(
    pixels: Iterable[Pixels], zone_m2: float, cover_m: float, confidence: float,
    models: tuple[AreaModel, AreaModel] | None,
) -> dict[str, Any]:  # fmt: skip
    """`COLUMNS` of one polygon, NaN where nothing is valid."""
    n, ground, sums, part = 0, 0.0, np.zeros(1), None
    cover = np.zeros((2, 2))  # square metres by canopy in A, in B
    for part in pixels:
        n, ground, sums = n + part.weight.size, ground + part.weight.sum(), sums + part.values @ part.weight
        before, after = (part.values[k] > cover_m for k in (0, len(part.values) // 2))
        cover += np.bincount(2 * before + after, part.weight, 4).reshape(2, 2)
    whole: dict[str, Any] = {"n": n, "area_ha": zone_m2 / 1e4, "valid_ha": ground / 1e4}
    if part is None:
        return dict.fromkeys(COLUMNS, float("nan")) | whole | {"significant": False}
    one, two = np.split(sums / ground, 2)
    reach = float("nan")
    if models is not None:
        halves = [(side[2] - side[1]) / 2 for side in (one, two)]
        rho = [part.drawing.correlation(model) for model in models]
        reach = float(change_reach(models, halves, rho, ground, confidence))
    change, ((_, gained), (lost, _)) = float(two[0] - one[0]), cover / 1e4
    return whole | {
        "mean_a_m": one[0],
        "mean_b_m": two[0],
        "change_m": change,
        "change_lower_m": change - reach,
        "change_upper_m": change + reach,
        "significant": abs(change) > reach,
        "cover_a": cover[1].sum() / ground,
        "cover_b": cover[:, 1].sum() / ground,
        "canopy_lost_ha": lost,
        "canopy_gained_ha": gained,
    }
