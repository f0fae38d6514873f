"""A map's statistic over discs and polygons, read in windows."""

from __future__ import annotations

import math

import numpy as np
import shapely

from canopy.errors import InputError
from canopy.evaluation.heights import HeightSide
from canopy.evaluation.pairing import own_grid
from canopy.evaluation.samples import SampleSet
from canopy.geo.coverage import coverage
from canopy.geo.crs import transformer
from canopy.geo.grid import Grid
from canopy.geo.raster import Raster
from canopy.geo.statistic import percent_of, statistic_of
from canopy.geo.tiles import tiles_over
from canopy.runtime import NoProgress, Progress
from canopy.sources.gedi_footprint import pool_over_disc

MIN_VALID_SHARE = 0.9
_WINDOW_PX = 1024
_MOST_PX = 30_000_000


def pool_map(side: HeightSide, samples: SampleSet, stat: str, progress: Progress | None = None) -> np.ndarray:
    """The map over every sample, float64 (n,), NaN where less than 90 % of it is valid.

    Discs take the pixels whose centres they hold (`pool_over_disc`); polygons every pixel by the share of it
    that they cover.
    """
    pool = _pool_polygons if samples.polygons is not None else _pool_discs
    return pool(side, own_grid(side.product), samples, stat, progress or NoProgress())


# ---- discs ----------------------------------------------------------------------------------------
def _pool_discs(
    side: HeightSide, grid: Grid, samples: SampleSet, stat: str, progress: Progress
) -> np.ndarray:
    import pandas

    out = np.full(len(samples), np.nan)
    x, y = transformer("EPSG:4326", grid.crs).transform(samples.lon, samples.lat)
    rows, cols = grid.rowcol(np.asarray(x), np.asarray(y))  # type: ignore[arg-type]
    known = np.isfinite(rows) & np.isfinite(cols)
    keys = np.column_stack([rows // _WINDOW_PX, cols // _WINDOW_PX])[known].astype(np.int64)
    windows, which = np.unique(keys, axis=0, return_inverse=True)
    # Twice the radius over the pixel: a web-Mercator pixel is smaller on the ground than its name.
    reach = math.ceil(2 * samples.radius_m / grid.gsd_m) + 2
    index = np.flatnonzero(known)
    progress.start(len(windows), "pooling")
    for k, (i, j) in enumerate(windows.tolist()):
        at = index[which.ravel() == k]
        size = _WINDOW_PX + 2 * reach
        window = grid.window(i * _WINDOW_PX - reach, j * _WINDOW_PX - reach, size, size)
        values, valid = side.read(window, "mean")
        if valid.any():
            shots = pandas.DataFrame({"lon": samples.lon[at], "lat": samples.lat[at]})
            raster = Raster(values[None].astype(np.float32), valid, window)
            out[at] = pool_over_disc(
                raster, shots, stat, diameter=2 * samples.radius_m, min_valid=MIN_VALID_SHARE
            )
        progress.advance()
    return out


# ---- polygons -------------------------------------------------------------------------------------
def _pool_polygons(
    side: HeightSide, grid: Grid, samples: SampleSet, stat: str, progress: Progress
) -> np.ndarray:
    assert samples.polygons is not None  # pool_map chose by it
    out = np.full(len(samples), np.nan)
    move = transformer("EPSG:4326", grid.crs).transform
    shapes = shapely.transform(
        shapely.segmentize(samples.polygons, 1e-3), lambda xy: np.column_stack(move(xy[:, 0], xy[:, 1]))
    )
    progress.start(len(shapes), "pooling")
    for k, shape in enumerate(shapes):
        if np.isfinite(shapely.get_coordinates(shape)).all() and shape.area > 0:
            out[k] = _pool_one(side, grid, shape, stat, k)
        progress.advance()
    return out


def _pool_one(side: HeightSide, grid: Grid, shape: shapely.Geometry, stat: str, number: int) -> float:
    window = grid.window_over(shape.bounds)
    if window.height * window.width > _MOST_PX:
        raise InputError(
            f"polygon {number + 1} holds {window.height * window.width} px", expected="plots, not regions"
        )
    values, valid = side.read(window, "mean")
    share = _shares(shape, window)
    area = share.sum()
    if area <= 0 or share[valid].sum() < MIN_VALID_SHARE * area:
        return float("nan")
    if stat == "mean":
        return float((values * share)[valid].sum() / share[valid].sum())
    # Highest and percentiles take pixels of which at least half is inside; if there are none, all touched.
    chosen = valid & (share >= min(0.5, float(share.max())))
    return float(statistic_of(values[chosen], np.ones(chosen.sum(), bool), percent_of(stat)))


def _shares(shape: shapely.Geometry, grid: Grid) -> np.ndarray:
    """Share (h, w) of every pixel that a polygon covers, found in tiles: only those on its edge cost time."""
    share = np.zeros(grid.shape)
    for tile in tiles_over(grid, _WINDOW_PX):
        part = coverage(shape, tile.core)
        if part is not None:
            row, col = grid.offset_of(tile.core)
            share[row : row + tile.core.height, col : col + tile.core.width] = part
    return share
