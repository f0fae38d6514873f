"""The ground a GEDI shot saw: its 25 m disc, and statistics of a raster over that disc.

Pixel rule: a pixel belongs to a disc when its centre lies within the radius of the shot's place, ground
distance, edge included; a disc so small that it holds no centre takes the pixel it lies in. Where a CRS's
length unit is true to within 1 % (UTM) it is taken as it is, elsewhere (Web Mercator, degrees) it is scaled
at the shot.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

from canopy.errors import DataError, InputError
from canopy.geo.area import SCALE_SLACK
from canopy.geo.crs import geod_of, metres_per_unit, to_crs, transformer
from canopy.geo.grid import Grid
from canopy.metrics import percent_of, statistic_of

if TYPE_CHECKING:
    import pandas

# Heights (h, w), NaN for missing, on a window of some grid.
ReadHeights = Callable[[Grid], np.ndarray]
DIAMETER_M = 25.0
# Pixels gathered at once, and the side of the windows in which a raster is read.
_GATHER_PX = 4_000_000
_WINDOW_PX = 1_024
# Distances are compared with this slack, so that a centre on the edge is in whatever the rounding.
_EDGE_M = 1e-6


def pool_over_disc(
    raster: np.ndarray | ReadHeights,
    shots: pandas.DataFrame,
    how: str = "mean",
    *,
    grid: Grid,
    diameter: float = DIAMETER_M,
    min_valid: float = 0.9,
) -> np.ndarray:
    """A statistic of a raster over every shot's disc, float32 (n,), NaN where the disc is not seen enough.

    Args:
        raster: an array (height, width) with NaN for missing, or a function that gives such arrays on windows
            of its grid, which is then read window by window.
        shots: table with columns lon and lat, degrees; see `read_shots`.
        how: "mean", "max", or "pNN", the NN-th percentile of the pixels (linear between ranks, as numpy's).
        diameter: of the disc, ground metres.
        min_valid: share of the disc's pixels that must be valid; pixels beyond the raster are not.

    Raises:
        InputError: an unknown `how`, an array of another shape than its grid.
    """
    import pandas

    percent, radius = percent_of(how), diameter / 2
    if not (math.isfinite(diameter) and diameter > 0):
        raise InputError(f"disc diameter {diameter:g} m", expected="a number above 0")
    read, grid = _reader(raster, grid)
    rows, cols, scale = _pixel_places(grid, shots)
    out = np.full(len(rows), np.nan, np.float32)
    reach = math.ceil(radius / float(np.nanmin(scale, initial=np.inf)) + 1)
    near = (rows > -reach) & (rows < grid.height + reach) & (cols > -reach) & (cols < grid.width + reach)
    chosen = np.flatnonzero(near)
    corners = pandas.DataFrame(np.column_stack([rows, cols])[chosen] // _WINDOW_PX * _WINDOW_PX).astype(int)
    for (row, col), which in corners.groupby([0, 1]).indices.items():
        # With room for the discs on the window's edges.
        top, left, side = row - reach, col - reach, _WINDOW_PX + 2 * reach
        values = read(grid.window(top, left, side, side))
        for at in np.array_split(chosen[which], len(which) * (2 * reach + 1) ** 2 // _GATHER_PX + 1):
            picked, size = _discs(values, rows[at] - top, cols[at] - left, scale[at], radius, reach)
            known = np.isfinite(picked)
            enough = known.sum(axis=1) >= np.maximum(min_valid * size - 1e-9, 1)
            out[at] = np.where(enough, statistic_of(picked, known, percent), np.nan)
    return out


def _reader(raster: np.ndarray | ReadHeights, grid: Grid) -> tuple[ReadHeights, Grid]:
    """What gives the heights of a window, and the grid that windows are cut from."""
    if callable(raster):
        return raster, grid
    array = np.asarray(raster, np.float32)
    if array.shape != grid.shape:
        raise InputError(f"array {array.shape} on {grid}", expected="an array and its grid")
    whole = grid

    def from_array(window: Grid) -> np.ndarray:
        row, col = whole.offset_of(window)
        inside = array[max(row, 0) : max(row + window.height, 0), max(col, 0) : max(col + window.width, 0)]
        values = np.full(window.shape, np.nan, np.float32)
        values[max(-row, 0) :, max(-col, 0) :][: inside.shape[0], : inside.shape[1]] = inside
        return values

    return from_array, grid


def _pixel_places(grid: Grid, shots: pandas.DataFrame) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Pixel-space (row, col) of shots, floats (n,), and ground metres per pixel there, (n, 2) as (x, y).

    NaN for shots that the grid's CRS cannot place.
    """
    missing = [name for name in ("lon", "lat") if name not in shots]
    if missing:
        raise DataError(f"no column {', '.join(missing)} in the shots", expected="columns lon and lat")
    lon, lat = (np.asarray(shots[name], np.float64) for name in ("lon", "lat"))
    x, y = (np.asarray(v) for v in transformer("EPSG:4326", grid.crs).transform(lon, lat))
    seen = np.isfinite(x) & np.isfinite(y)
    x, y = x[seen], y[seen]
    rows, cols = np.full(len(lon), np.nan), np.full(len(lon), np.nan)
    scale = np.full((len(lon), 2), np.nan)
    rows[seen], cols[seen] = grid.rowcol(x, y)
    back, geod = transformer(grid.crs, "EPSG:4326"), geod_of(to_crs("EPSG:4326"))
    unit = 0.0 if grid.crs.geographic else metres_per_unit(grid.crs)
    for axis, side in enumerate(grid.pixel):
        dx, dy = (side / 2, 0.0) if axis == 0 else (0.0, side / 2)
        metres = np.asarray(geod.inv(*back.transform(x - dx, y - dy), *back.transform(x + dx, y + dy))[2])
        true_to_scale = np.abs(metres - side * unit) < SCALE_SLACK * side * unit
        scale[seen, axis] = np.where(true_to_scale, side * unit, metres)
    return rows, cols, scale


def _discs(
    values: np.ndarray, rows: np.ndarray, cols: np.ndarray, scale: np.ndarray, radius: float, reach: int
) -> tuple[np.ndarray, np.ndarray]:
    """Pixels (n, m) of the discs round pixel-space places well inside an array (height, width), NaN for what
    is missing or not of the disc; and how many pixels each disc has, (n,)."""
    steps = np.arange(-reach, reach + 1)
    r, c = (np.floor(at).astype(np.int64)[:, None] + steps for at in (rows, cols))
    dy, dx = (r + 0.5 - rows[:, None]) * scale[:, 1:], (c + 0.5 - cols[:, None]) * scale[:, :1]
    disc = np.hypot(dx[:, None, :], dy[:, :, None]) <= radius + _EDGE_M
    # Coarse pixels: the one that holds the place.
    disc[~disc.any(axis=(1, 2)), reach, reach] = True
    window = values[r[:, :, None], c[:, None, :]]
    return np.where(disc, window, np.nan).reshape(len(rows), -1), disc.sum(axis=(1, 2))
