"""Intervals of polygon means for `canopy stats --interval`, from a map that was predicted with bands."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from canopy.calibration.area import AREA_LEVELS, AreaModel, area_model_of
from canopy.calibration.gedi import map_grid
from canopy.errors import ConfigError, DataError, InputError
from canopy.geo.crs import to_lonlat
from canopy.geo.grid import Grid, tiles_over
from canopy.geo.vector import read_zones
from canopy.runtime import NoProgress, Progress

if TYPE_CHECKING:
    import geopandas
    import pandas
    from shapely.geometry.base import BaseGeometry


BANDS = ("canopy_height", "height_lower", "height_upper")
_TILE_PX = 1024
# A polygon's shape is drawn with at most this many pixels a side to measure distances within it.
_SHAPE_PX = 256


def zone_intervals(
    map_path: str | Path,
    zones: str | Path | geopandas.GeoDataFrame,
    level: float = 0.9,
    *,
    progress: Progress | None = None,
) -> pandas.DataFrame:
    """Columns mean_lower_m, mean_upper_m and mean_sd_m, one row per feature of `zones`, in its order.

    The means are over the polygon's pixels of the map, weighted by the share of each that it covers; errors
    are taken as correlated over distance (`canopy.calibration.area`). NaN where the polygon has no pixel.

    Raises:
        ConfigError: a level outside `AREA_LEVELS`. DataError: a map without 90 % bands and area model.
        InputError: a map that is no file, unreadable zones.
    """
    import pandas

    if not AREA_LEVELS[0] <= level <= AREA_LEVELS[-1]:
        raise ConfigError(
            f"an area interval of {level:g}", where="--interval",
            expected=f"{AREA_LEVELS[0]:g} to {AREA_LEVELS[-1]:g}",
        )  # fmt: skip
    path = Path(map_path)
    if not path.is_file():
        raise InputError("intervals need one map file", where=path, expected="a GeoTIFF of canopy predict")
    model, bands = _open(path)
    grid = map_grid(path)
    frame, crs, shapes = read_zones(zones)
    progress = progress or NoProgress()
    progress.start(len(shapes), "intervals")
    rows: list[dict[str, float]] = []
    for shape in shapes:
        there = None if shape is None else to_lonlat(shape, crs, grid.crs)
        rows.append(_one(path, grid, bands, there, model, level))
        progress.advance()
    return pandas.DataFrame(rows, index=frame.index)


def _open(path: Path) -> tuple[AreaModel, list[int]]:
    """The map's area model and the numbers of its three height bands."""
    from canopy.geo.reading import open_raster

    with open_raster(path) as dataset:
        tags, names = dataset.tags(), list(dataset.descriptions)
    model = area_model_of(tags)
    missing = [name for name in BANDS if name not in names]
    if missing:
        raise DataError(f"no band {', '.join(missing)}", where=path, remedy="predict it with --interval 0.9")
    return model, [names.index(name) + 1 for name in BANDS]


def _one(
    path: Path, grid: Grid, bands: list[int], shape: BaseGeometry | None, model: AreaModel, level: float
) -> dict[str, float]:
    """The interval of one polygon in the map's CRS."""
    from canopy.evaluation.zones import coverage, window_of
    from canopy.geo.reading import read_raster

    nothing = dict.fromkeys(("mean_lower_m", "mean_upper_m", "mean_sd_m"), float("nan"))
    window = None if shape is None or shape.is_empty else window_of(grid, shape, grid.bounds)
    if window is None or shape is None:
        return nothing
    step = max(1, -(-max(window.shape) // _SHAPE_PX))
    drawn = np.zeros(tuple(-(-n // step) for n in window.shape))
    sums, weight = np.zeros(3), 0.0
    for tile in tiles_over(window, _TILE_PX):
        share = coverage(shape, tile)
        if share is None:
            continue
        raster = read_raster(path, tile, bands=bands)
        share = np.where(raster.valid, share, 0.0)
        sums += (np.where(raster.valid, raster.values, 0) * share).sum(axis=(1, 2), dtype=np.float64)
        weight += float(share.sum())
        top, left = window.offset_of(tile)
        rows, cols = np.nonzero(share > 0)
        np.add.at(drawn, ((rows + top) // step, (cols + left) // step), share[rows, cols])
    if weight <= 0:
        return nothing
    mean, low, high = (sums / weight).tolist()
    # Partly covered pixels of the drawing count where the polygon has at least half of the fullest.
    inside = drawn >= 0.5 * min(drawn.max(), step * step)
    rho = model.mean_correlation(inside, grid.gsd_m * step)
    made = model.interval(mean, low, high, rho, weight * grid.gsd_m**2, level)
    return {"mean_lower_m": made.lower_m, "mean_upper_m": made.upper_m, "mean_sd_m": made.sd_m}
