"""The ground a GEDI shot saw: its 25 m disc, and statistics of a raster over that disc.

Pixel rule: a pixel belongs to a disc when its centre lies within the radius of the shot's place, ground
distance, edge included; a disc so small that it holds no centre takes the pixel it lies in. Where a CRS's
length unit is true to within 1 % (UTM) it is taken as it is, elsewhere (Web Mercator, degrees) it is scaled
at the shot.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from canopy.errors import DataError, InputError
from canopy.geo.area import SCALE_SLACK
from canopy.geo.crs import geod_of, to_crs, transformer
from canopy.geo.grid import Grid
from canopy.geo.place import SourcePlace
from canopy.geo.reading import Raster, open_raster, read_raster
from canopy.metrics import percent_of, statistic_of

if TYPE_CHECKING:
    import pandas


# Heights (h, w), NaN for missing, on a window of some grid.
ReadHeights = Callable[[Grid], np.ndarray]
DIAMETER_M = 25.0
_DISC_POINTS = 64
# Pixels gathered at once, and the side of the windows in which a file is read.
_GATHER_PX = 4_000_000
_WINDOW_PX = 1_024
# Distances are compared with this slack, so that a centre on the edge is in whatever the rounding.
_EDGE_M = 1e-6


@dataclass(frozen=True)
class _Rule:
    """How pixels of a disc become a number; `percent`: see `statistic_of`."""

    percent: float | None
    radius: float
    min_valid: float


def pool_over_disc(
    raster: Raster | np.ndarray | str | Path | ReadHeights,
    shots: pandas.DataFrame,
    how: str = "mean",
    *,
    grid: Grid | None = None,
    diameter: float = DIAMETER_M,
    min_valid: float = 0.9,
    band: int = 1,
) -> np.ndarray:
    """A statistic of a raster over every shot's disc, float32 (n,), NaN where the disc is not seen enough.

    Args:
        raster: a `Raster`; an array (height, width) with NaN for missing and its `grid`; a GeoTIFF's path, or
            a function that gives such arrays on windows of `grid`: these two are read in windows.
        shots: table with columns lon and lat, degrees; see `read_shots`.
        how: "mean", "max", or "pNN", the NN-th percentile of the pixels (linear between ranks, as numpy's).
        diameter: of the disc, ground metres.
        min_valid: share of the disc's pixels that must be valid; pixels beyond the raster are not.
        band: which band of a `Raster` or file, from 1.

    Raises:
        InputError: an unknown `how`, an array without a grid or of another shape.
    """
    rule = _Rule(percent_of(how), _radius(diameter), min_valid)
    if not 0 < min_valid <= 1:
        raise InputError(f"share of valid pixels {min_valid:g}", expected="above 0, at most 1")
    lon, lat = _places(shots)
    if isinstance(raster, str | Path):
        path = Path(raster)

        def read(window: Grid) -> np.ndarray:
            part = read_raster(path, window, bands=[band])
            return np.where(part.valid, part.values[0], np.nan)

        return _pool_windows(read, _grid_of(path), lon, lat, rule)
    if callable(raster):
        if grid is None:
            raise InputError("a function without a grid", expected="the grid of what it reads")
        return _pool_windows(raster, grid, lon, lat, rule)
    if isinstance(raster, Raster):
        if not 1 <= band <= len(raster.values):
            raise InputError(f"band {band} of {len(raster.values)}")
        values = np.where(raster.valid, raster.values[band - 1], np.nan)
        grid = raster.grid
    else:
        values = np.asarray(raster, np.float32)
        if grid is None or values.shape != grid.shape:
            raise InputError(f"array {values.shape} on {grid}", expected="an array and its grid")
    rows, cols, scale = _pixel_places(grid, lon, lat)
    return _pool(values, rows, cols, scale, rule)


# --- places -------------------------------------------------------------------------------------------


def _places(shots: pandas.DataFrame) -> tuple[np.ndarray, np.ndarray]:
    """Longitudes and latitudes, float64 (n,)."""
    missing = [name for name in ("lon", "lat") if name not in shots]
    if missing:
        raise DataError(f"no column {', '.join(missing)} in the shots", expected="columns lon and lat")
    return np.asarray(shots["lon"], np.float64), np.asarray(shots["lat"], np.float64)


def _radius(diameter: float) -> float:
    if not (math.isfinite(diameter) and diameter > 0):
        raise InputError(f"disc diameter {diameter:g} m", expected="a number above 0")
    return diameter / 2


def _pixel_places(grid: Grid, lon: np.ndarray, lat: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Pixel-space (row, col) of places, floats (n,), and ground metres per pixel there, (n, 2) as (x, y)."""
    move = transformer("EPSG:4326", grid.crs)
    x, y = (np.asarray(v) for v in move.transform(lon, lat))
    rows, cols = (y - grid.transform.f) / grid.transform.e, (x - grid.transform.c) / grid.transform.a
    px, py = grid.pixel
    scale = np.tile([px, py], (len(lon), 1))
    seen = np.isfinite(x) & np.isfinite(y)
    if not seen.any():
        return np.where(seen, rows, np.nan), np.where(seen, cols, np.nan), scale
    back = transformer(grid.crs, "EPSG:4326")
    geod = geod_of(to_crs("EPSG:4326"))
    for axis, step in enumerate(((px / 2, 0.0), (0.0, py / 2))):
        one = back.transform(x[seen] - step[0], y[seen] - step[1])
        two = back.transform(x[seen] + step[0], y[seen] + step[1])
        metres = np.asarray(geod.inv(*one, *two)[2])
        nominal = (px, py)[axis]
        unit = 1.0 if grid.crs.geographic else float(grid.crs.proj.axis_info[0].unit_conversion_factor)
        round_m = np.abs(metres / (nominal * unit) - 1) < SCALE_SLACK
        scale[seen, axis] = np.where(round_m & (not grid.crs.geographic), nominal * unit, metres)
    return np.where(seen, rows, np.nan), np.where(seen, cols, np.nan), scale


# --- pooling ------------------------------------------------------------------------------------------


def _pool(
    values: np.ndarray,
    rows: np.ndarray,
    cols: np.ndarray,
    scale: np.ndarray,
    rule: _Rule,
) -> np.ndarray:
    """Statistics over discs round pixel-space places in an array (height, width) with NaN for missing."""
    out = np.full(len(rows), np.nan, np.float32)
    near = np.isfinite(rows) & np.isfinite(cols)
    if not near.any():
        return out
    reach = math.ceil(rule.radius / float(scale[near].min()) + 1)
    height, width = values.shape
    near &= (rows > -reach) & (rows < height + reach) & (cols > -reach) & (cols < width + reach)
    chosen = np.flatnonzero(near)
    steps = np.arange(-reach, reach + 1)
    per = max(1, _GATHER_PX // len(steps) ** 2)
    for begin in range(0, len(chosen), per):
        at = chosen[begin : begin + per]
        row0, col0 = np.floor(rows[at]).astype(np.int64), np.floor(cols[at]).astype(np.int64)
        r, c = row0[:, None] + steps, col0[:, None] + steps
        dy = (r + 0.5 - rows[at, None]) * scale[at, 1:]
        dx = (c + 0.5 - cols[at, None]) * scale[at, :1]
        disc = np.hypot(dx[:, None, :], dy[:, :, None]) <= rule.radius + _EDGE_M
        # Coarse pixels: the one that holds the place.
        disc[~disc.any(axis=(1, 2)), reach, reach] = True
        inside = ((r >= 0) & (r < height))[:, :, None] & ((c >= 0) & (c < width))[:, None, :]
        window = values[np.clip(r, 0, height - 1)[:, :, None], np.clip(c, 0, width - 1)[:, None, :]]
        picked = np.where(disc & inside, window, np.nan).reshape(len(at), -1)
        out[at] = _statistic(picked, disc.sum(axis=(1, 2)), rule)
    return out


def _statistic(picked: np.ndarray, size: np.ndarray, rule: _Rule) -> np.ndarray:
    """Per row of (n, m), NaN for what does not count; NaN where fewer of `size` count than the rule asks."""
    known = np.isfinite(picked)
    enough = known.sum(axis=1) >= np.maximum(rule.min_valid * size - 1e-9, 1)
    return np.where(enough, statistic_of(picked, known, rule.percent), np.nan).astype(np.float32)


def _pool_windows(read: ReadHeights, grid: Grid, lon: np.ndarray, lat: np.ndarray, rule: _Rule) -> np.ndarray:
    """The same window by window; the windows are read with room for the discs on their edges."""
    rows, cols, scale = _pixel_places(grid, lon, lat)
    out = np.full(len(lon), np.nan, np.float32)
    near = np.isfinite(rows) & np.isfinite(cols)
    if not near.any():
        return out
    reach = math.ceil(rule.radius / float(scale[near].min()) + 1)
    height, width = grid.shape
    near &= (rows > -reach) & (rows < height + reach) & (cols > -reach) & (cols < width + reach)
    for i, j, at in _by_window(rows, cols, np.flatnonzero(near)):
        row, col = i * _WINDOW_PX - reach, j * _WINDOW_PX - reach
        side = _WINDOW_PX + 2 * reach
        values = read(grid.window(row, col, side, side))
        out[at] = _pool(values, rows[at] - row, cols[at] - col, scale[at], rule)
    return out


def _by_window(
    rows: np.ndarray, cols: np.ndarray, chosen: np.ndarray
) -> Iterator[tuple[int, int, np.ndarray]]:
    """Which of the chosen places lie in which window of `_WINDOW_PX`."""
    keys = np.column_stack([rows[chosen] // _WINDOW_PX, cols[chosen] // _WINDOW_PX]).astype(np.int64)
    if not len(keys):
        return
    windows, which = np.unique(keys, axis=0, return_inverse=True)
    order = np.argsort(which.ravel(), kind="stable")
    parts = np.split(chosen[order], np.cumsum(np.bincount(which.ravel()))[:-1])
    for (i, j), part in zip(windows.tolist(), parts, strict=True):
        yield i, j, part


def _grid_of(path: Path) -> Grid:
    with open_raster(path) as dataset:
        return SourcePlace.of(dataset).grid()
