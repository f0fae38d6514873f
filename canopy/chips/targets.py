"""Labels on an image's grid: canopy height, where it is known, and how much each pixel is worth.

A label is what was measured (a lidar height model, GEDI shots); a target is what training sees. Importing
this module needs no geo library; the functions that read files do.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from canopy.errors import DataError, MissingDependencyError

if TYPE_CHECKING:
    from canopy.geo.grid import Grid
    from canopy.geo.place import SourcePlace

UNKNOWN_GAP_WEIGHT = 0.7  # as if about a year and three quarters lay between image and lidar
_GAP_SCALE_YEARS = 5.0
_LOWEST_M, _HIGHEST_M = -3.0, 120.0  # outside: an undeclared nodata value, a bird, a pylon
FOOTPRINT_RADIUS_M = 12.5


def gap_weight(years: float | None) -> float:
    """Worth (0..1) of a label taken `years` before or after the image; None = unknown, 0.7.

    Trees grow half a metre a year and are felled in a day: exp(-years / 5).
    """
    return UNKNOWN_GAP_WEIGHT if years is None else float(np.exp(-abs(years) / _GAP_SCALE_YEARS))


def pixel_weight(height_m: np.ndarray, weight: float, floor_m: float) -> np.ndarray:
    """Weight per pixel, float32: that of the label, less where only 0..floor is known, 0 where NaN.

    A height in 0..floor is uncertain by the floor, on top of a lidar model's usual metre: 1 / (1 + floor).
    """
    low = height_m < floor_m
    known = np.isfinite(height_m)
    return np.where(known, np.where(low, weight / (1 + floor_m), weight), 0).astype(np.float32)


def chm_target(
    path: str | Path, grid: Grid, rule: str = "mean", moved_m: tuple[float, float] = (0.0, 0.0)
) -> np.ndarray:
    """A canopy height raster of any CRS and pixel size on `grid`: float32 (h, w) metres, NaN where unknown.

    Which band is the height, in which unit, is `geo.heights`' rule. Impossible heights become unknown, small
    negative ones 0.

    Args:
        path: a height raster.
        grid: where the target is wanted.
        rule: what a pixel takes from several label pixels: their "mean" (as `canopy evaluate` compares)
            or their "max" (the highest return). Pixels of about the same size are taken as they are, never
            interpolated; coarser labels are interpolated by "mean" and repeated by "max".
        moved_m: (down, right) where the label lies relative to the image, as `register.image_shift`
            says it; the label is read from there, which undoes it.

    Raises:
        ImageryError: the file is missing, damaged, or has no place.
    """
    from canopy.geo.grid import Grid
    from canopy.geo.heights import height_bands
    from canopy.geo.place import SourcePlace
    from canopy.geo.reading import open_raster, read_window

    if moved_m != (0.0, 0.0):
        px, py = grid.pixel
        x, y = grid.xy(moved_m[0] / grid.gsd_m, moved_m[1] / grid.gsd_m)
        grid = Grid.of(grid.crs, (px, 0, x, 0, -py, y), grid.shape)
    with open_raster(path) as dataset:
        bands = height_bands(dataset)

        def sane(raw: np.ndarray, valid: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
            heights = bands.metres(raw)
            return np.maximum(heights, 0), valid & (heights[0] > _LOWEST_M) & (heights[0] < _HIGHEST_M)

        def read(where: Grid, resampling: str | None) -> tuple[np.ndarray, np.ndarray]:
            return read_window(dataset, where, bands.indexes[:1], resampling=resampling, decode=sane)

        heights, good = _pooled(read, SourcePlace.of(dataset).north_up(), grid, rule)
    return np.where(good, heights, np.nan).astype(np.float32)


def _pooled(read: Any, place: SourcePlace, grid: Grid, rule: str) -> tuple[np.ndarray, np.ndarray]:
    from canopy.geo.grid import Grid

    ratio = grid.gsd_m / place.gsd_m
    if rule == "mean" or ratio <= 1.5:
        as_is = 1 / 1.5 <= ratio <= 1.5 or rule == "max"
        values, valid = read(grid, "nearest" if as_is else None)
        return values[0], valid
    n = int(np.ceil(ratio))
    px, py = (side / n for side in grid.pixel)
    (x, y), (h, w) = grid.xy(0, 0), grid.shape
    fine = Grid.of(grid.crs, (px, 0, x, 0, -py, y), (h * n, w * n))
    values, valid = read(fine, "nearest")
    blocks = np.where(valid, values[0], -np.inf).reshape(h, n, w, n)
    known = valid.reshape(h, n, w, n).mean(axis=(1, 3)) >= 0.5
    return np.where(known, blocks.max(axis=(1, 3)), 0), known


def shots_on(path: str | Path, grid: Grid, *, rh: int = 98) -> np.ndarray:
    """GEDI shots whose disc lies wholly on `grid`: float32 (n, 4) of row, col, height in metres, weight.

    Args:
        path: a table of `canopy data gedi` (columns lat, lon, rh_NN and, if there, weight).
        grid: pixel-space (row, col) refer to it; (0, 0) is its upper-left corner.
        rh: which relative height to take.

    Raises:
        DataError: the file is missing, is no table, or lacks the columns.
    """
    from canopy.geo.crs import transformer

    lat, lon, height, weight = _shot_table(str(path), rh)
    x, y = transformer("EPSG:4326", grid.crs).transform(lon, lat)
    row, col = grid.rowcol(np.asarray(x), np.asarray(y))  # type: ignore[arg-type]
    reach = FOOTPRINT_RADIUS_M / grid.gsd_m
    inside = (row >= reach) & (row <= grid.height - reach) & (col >= reach) & (col <= grid.width - reach)
    inside &= np.isfinite(height) & (weight > 0)
    return np.stack([row, col, height, weight], axis=1)[inside].astype(np.float32)


@functools.lru_cache(maxsize=4)  # one table serves all chips of its pair
def _shot_table(path: str, rh: int) -> np.ndarray:
    """Rows lat, lon, height, weight of a shots file, float64 (4, n)."""
    try:
        from pyarrow import parquet
    except ImportError as error:
        raise MissingDependencyError(
            "reading GEDI tables needs pyarrow", remedy="pip install 'canopy-height[gedi]'"
        ) from error
    try:
        names = parquet.read_schema(path).names
    except FileNotFoundError as error:
        raise DataError("no such file", where=path) from error
    except (ValueError, OSError) as error:
        raise DataError(
            "is not a Parquet table", where=path, remedy="make it with canopy data gedi"
        ) from error
    wanted = ["lat", "lon", f"rh_{rh}"]
    missing = [name for name in wanted if name not in names]
    if missing:
        raise DataError(f"lacks the columns {', '.join(missing)}", where=path)
    table = parquet.read_table(path, columns=[n for n in (*wanted, "weight") if n in names]).to_pandas()
    table["weight"] = table.get("weight", 1.0)
    return table[[*wanted, "weight"]].to_numpy(np.float64).T
