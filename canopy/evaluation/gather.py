"""Sums over squares of a grid, filled window by window: blocks for tables, and small pictures of large
maps.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from canopy.geo.crs import geod_of, transformer
from canopy.geo.grid import Grid


class BlockSums:
    """Sums of named quantities over squares of `side_px`, cut on the grid's global lattice.

    Attributes:
        shape: (rows, cols) of squares. count: valid pixels; sums[name]: float64, both of that shape.
    """

    def __init__(self, grid: Grid, side_px: int, names: Sequence[str]) -> None:
        self.grid, self.side_px = grid, side_px
        self._row0, self._col0 = grid.origin_rc
        self._first = self._row0 // side_px, self._col0 // side_px
        self.shape = (
            (self._row0 + grid.height - 1) // side_px - self._first[0] + 1,
            (self._col0 + grid.width - 1) // side_px - self._first[1] + 1,
        )
        self.count = np.zeros(self.shape)
        self.sums = {name: np.zeros(self.shape) for name in names}

    def add(self, row_off: int, col_off: int, valid: np.ndarray, values: Mapping[str, np.ndarray]) -> None:
        """Add a window (h, w) at (row_off, col_off) of the grid; pixels that are not valid do not count."""
        rows, row_cuts = self._cuts(self._row0 + row_off, valid.shape[0], self._first[0])
        cols, col_cuts = self._cuts(self._col0 + col_off, valid.shape[1], self._first[1])
        here = np.s_[rows[0] : rows[1], cols[0] : cols[1]]

        def total(array: np.ndarray) -> np.ndarray:
            # float64 before summing: float32 loses centimetres over a million pixels
            by_row = np.add.reduceat(array, row_cuts, axis=0, dtype=np.float64)
            return np.add.reduceat(by_row, col_cuts, axis=1)

        self.count[here] += total(valid)
        for name, value in values.items():
            self.sums[name][here] += total(np.where(valid, value, 0))

    def _cuts(self, start: int, length: int, first: int) -> tuple[tuple[int, int], np.ndarray]:
        """Range of squares that a span touches, and where in the span each begins."""
        index = (start + np.arange(length)) // self.side_px - first
        cuts = np.flatnonzero(np.diff(index, prepend=index[0] - 1))
        return (int(index[0]), int(index[-1]) + 1), cuts

    def mean(self, name: str) -> np.ndarray:
        """Mean over the valid pixels of each square, NaN where there is none."""
        with np.errstate(invalid="ignore", divide="ignore"):
            return self.sums[name] / np.where(self.count > 0, self.count, np.nan)

    def block_grid(self) -> Grid:
        """The grid of the squares (whole ones, so it may reach beyond the map)."""
        side = self.side_px
        window = self.grid.window(
            self._first[0] * side - self._row0, self._first[1] * side - self._col0, 1, 1
        )
        px, py = self.grid.pixel
        t = window.transform
        return Grid.of(self.grid.crs, (px * side, 0.0, t.c, 0.0, -py * side, t.f), self.shape)

    def centres_lonlat(self) -> tuple[np.ndarray, np.ndarray]:
        """Longitude and latitude of each square's centre, (rows, cols)."""
        grid = self.block_grid()
        cols, rows = np.meshgrid(np.arange(grid.width) + 0.5, np.arange(grid.height) + 0.5)
        t = grid.transform
        lon, lat = transformer(grid.crs, "EPSG:4326").transform(t.c + t.a * cols, t.f + t.e * rows)
        return np.asarray(lon), np.asarray(lat)


def preview_side(grid: Grid, longest_px: int = 900) -> int:
    """Side of the squares that make a picture of at most `longest_px`."""
    return max(1, -(-max(grid.shape) // longest_px))


def pixel_areas_m2(grid: Grid) -> np.ndarray:
    """Ground area of a pixel in each row (height,), square metres, at the grid's middle column.

    Measured on the ellipsoid, so that Web-Mercator and degree grids count what is there: the parallelogram
    of a pixel's two mid-lines.
    """
    rows, col = np.arange(grid.height) + 0.5, grid.width / 2
    t = grid.transform
    x, y = t.c + t.a * col, t.f + t.e * rows
    to_degrees = transformer(grid.crs, "EPSG:4326").transform
    west = to_degrees(np.full_like(y, x - t.a / 2), y)
    east = to_degrees(np.full_like(y, x + t.a / 2), y)
    north = to_degrees(np.full_like(y, x), y - t.e / 2)
    south = to_degrees(np.full_like(y, x), y + t.e / 2)
    geod = geod_of(grid.crs)
    azimuth_x, _, side_x = geod.inv(*west, *east)
    azimuth_y, _, side_y = geod.inv(*south, *north)
    return np.asarray(side_x * side_y * np.abs(np.sin(np.radians(np.asarray(azimuth_x) - azimuth_y))))
