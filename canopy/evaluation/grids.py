"""Bringing maps onto one grid, and adding up what lies there.

A height uses the finer side's pixels averaged to the coarser of two grids. One rule, in `read_on`:

* same lattice: pixels as they are;
* "mean", same CRS: exactly area-weighted, over the valid area, where at least half of the pixel
  is valid;
* "mean", another CRS: the window-independent average of `canopy.geo.reading` (bilinear where both pixels are
  of about the same size), where every source pixel touched is valid;
* "max" and "pNN": over points on a regular lattice in the pixel (exactly the source's pixels where they
  divide it, else at least two points per source pixel), where at least half of the points are
  valid.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import numpy as np
from affine import Affine
from scipy import sparse
from shapely.geometry.base import BaseGeometry

from canopy.errors import ConfigError, InputError
from canopy.evaluation.maps import REFERENCE_HIGHEST_M, REFERENCE_LOWEST_M, HeightMap, HeightWindow
from canopy.geo.area import AOI
from canopy.geo.crs import geod_of, to_crs, transformer
from canopy.geo.grid import Grid
from canopy.geo.place import lattice_ratio
from canopy.metrics import percent_of, statistic_of

# Pixel sizes that differ by less than this share count as one.
SAME_GSD = 0.01
MIN_VALID_SHARE = 0.5
# Source pixels held at once, per side: memory does not grow with the ratio of the two grids.
_SOURCE_PX = 3072

# Layers (bands, h, w) and valid (h, w) of a map on a grid of its own making.
Layers = tuple[np.ndarray, np.ndarray]
Read = Callable[[Grid, str | None], Layers]


# ---- which grid -----------------------------------------------------------------------------------
def shared_outline(a: HeightMap, b: HeightMap) -> BaseGeometry:
    """The ground both maps frame, EPSG:4326. Raises InputError when there is none."""
    shared = a.outline.intersection(b.outline)
    if shared.area == 0:
        raise InputError(
            "the two maps do not overlap", where=f"{a.name}, {b.name}", expected="maps of one place"
        )
    return shared


def common_grid(a: HeightMap, b: HeightMap, area: AOI | None = None, gsd: float | None = None) -> Grid:
    """The coarser map's own pixels over the ground both frame (A's where they are equally fine).

    `gsd`: pixels of that many metres in the area's UTM zone instead; also used, with the coarser side's gsd,
    where that map is rotated or south-up.

    Raises InputError when the maps, or they and `area`, do not overlap.
    """
    shared = shared_outline(a, b)
    if area is not None:
        shared = shared.intersection(area.lonlat)
        if shared.area == 0:
            raise InputError("the area is outside the maps", where=area.describe())
    aoi = AOI(shared, to_crs("EPSG:4326"), False)
    coarse, fine = (b, a) if b.gsd_m > a.gsd_m * (1 + SAME_GSD) else (a, b)
    if gsd is not None:
        if not (math.isfinite(gsd) and 0 < gsd <= 10_000):
            raise ConfigError(
                f"{gsd:g} is no ground sample distance", where="--gsd", expected="metres, above 0"
            )
        return aoi.grid(aoi.output_crs(), gsd)
    lattice = coarse.lattice
    if lattice is None and fine.lattice is not None and abs(fine.gsd_m / coarse.gsd_m - 1) <= SAME_GSD:
        lattice = fine.lattice
    if lattice is None:
        return aoi.grid(aoi.output_crs(), coarse.gsd_m)
    # A hair of tolerance: an area that is this lattice's own frame must not gain a row by rounding.
    return lattice.window_over(aoi.to_crs(lattice.crs).geometry.bounds, slack_px=1e-3)


def own_grid(heights: HeightMap) -> Grid:
    """A map's own pixels over all of its files; for a rotated map, pixels of its size in its UTM zone."""
    lattice = heights.lattice
    if lattice is not None and len(heights.tiles) == 1:
        return lattice
    aoi = AOI(heights.outline, to_crs("EPSG:4326"), False)
    if lattice is not None:
        return lattice.window_over(aoi.to_crs(lattice.crs).geometry.bounds, slack_px=1e-3)
    return aoi.grid(aoi.output_crs(), heights.gsd_m)


# ---- a map on a grid ------------------------------------------------------------------------------
def read_on(heights: HeightMap, grid: Grid, stat: str = "mean", *, interval: bool = False) -> HeightWindow:
    """A map's heights on `grid` by the rule above: float64 (h, w) metres, 0 where not valid.

    A reference's heights are clamped at 0, and what is beyond -3..120 m is not valid. `interval` also gives
    the means of the ends of the map's interval, None where it has none.
    """
    bounds = interval and heights.has_interval

    def read(window: Grid, resampling: str | None = None) -> Layers:
        got = heights.read(window, interval=bounds, resampling=resampling)
        layers = [got.height_m, got.lower_m, got.upper_m]
        return np.stack([layer for layer in layers if layer is not None]), got.valid

    values, valid = _layers(heights, grid, stat, read)
    low = high = None
    if bounds:
        low, high = values[1], values[2]
    height = values[0]
    if heights.reference:
        sane = (height >= REFERENCE_LOWEST_M) & (height <= REFERENCE_HIGHEST_M)
        heights.note_impossible(height, valid & ~sane)
        valid = valid & sane
        height = np.where(valid, np.maximum(height, 0), 0)
    return HeightWindow(height, valid, low, high)


def _layers(heights: HeightMap, grid: Grid, stat: str, read: Read) -> Layers:
    """Values float64 (bands, h, w) and valid (h, w)."""
    one = heights.is_one_lattice
    ratio = lattice_ratio(heights.tiles[0].place, grid) if one else None
    lattice = heights.lattice
    if ratio == 1:
        values, valid = read(grid, None)
    elif stat != "mean":
        n = ratio or max(2, math.ceil(2 * grid.gsd_m / heights.gsd_m - 1e-3))
        return _in_parts(grid, n, lambda part: _of_points(read, part, stat, n))
    elif one and lattice is not None and lattice.crs == grid.crs:
        shrink = max(a / b for a, b in zip(grid.pixel, lattice.pixel, strict=True))
        return _in_parts(grid, shrink, lambda part: _area_mean(read, lattice, part))
    else:
        values, valid = read(grid, None)
    return values.astype(np.float64), valid


def _in_parts(grid: Grid, shrink: float, read: Callable[[Grid], Layers]) -> Layers:
    """Read a grid in parts whose source stays small."""
    step = max(8, int(_SOURCE_PX / max(shrink, 1)))
    rows = []
    for top in range(0, grid.height, step):
        line = [
            read(grid.window(top, left, min(step, grid.height - top), min(step, grid.width - left)))
            for left in range(0, grid.width, step)
        ]
        rows.append([np.concatenate(parts, axis=-1) for parts in zip(*line, strict=True)])
    values, valid = (np.concatenate(parts, axis=-2) for parts in zip(*rows, strict=True))
    return values, valid


def _area_mean(read: Read, own: Grid, grid: Grid) -> Layers:
    """Exactly area-weighted mean; both grids are north-up in one CRS, so the weights are separable."""
    (top, left), (bottom, right) = own.rowcol(*grid.xy(0, 0)), own.rowcol(*grid.xy(*grid.shape))
    r0, c0, r1, c1 = math.floor(top), math.floor(left), math.ceil(bottom), math.ceil(right)
    values, valid = read(own.window(r0, c0, r1 - r0, c1 - c0), None)
    down = _shares(top - r0, (bottom - top) / grid.height, grid.height, r1 - r0)
    across = _shares(left - c0, (right - left) / grid.width, grid.width, c1 - c0)

    def pool(layer: np.ndarray) -> np.ndarray:
        return np.asarray((across @ (down @ layer).T).T)

    share = pool(valid.astype(np.float64))
    good = share >= MIN_VALID_SHARE - 1e-9
    known = np.where(valid, values, 0).astype(np.float64)
    means = [np.where(good, pool(band) / np.maximum(share, 1e-12), 0) for band in known]
    return np.stack(means), good


def _shares(start: float, step: float, cells: int, pixels: int) -> sparse.csr_array:
    """Share (cells, pixels) of cell i, start + i step to start + (i + 1) step, that pixel j covers."""
    low = start + step * np.arange(cells)
    j = np.floor(low).astype(np.int64)[:, None] + np.arange(math.ceil(step) + 2)
    length = np.minimum(low[:, None] + step, j + 1) - np.maximum(low[:, None], j)
    i = np.broadcast_to(np.arange(cells)[:, None], j.shape)
    keep = (length > 1e-12) & (j >= 0) & (j < pixels)
    return sparse.csr_array((length[keep] / step, (i[keep], j[keep])), shape=(cells, pixels))


def _of_points(read: Read, grid: Grid, stat: str, n: int) -> Layers:
    """Statistic of n x n points per pixel, each the source pixel it lies in."""
    px, py = (side / n for side in grid.pixel)
    x, y = grid.xy(0, 0)
    h, w = grid.shape
    values, valid = read(Grid.of(grid.crs, Affine(px, 0, x, 0, -py, y), (h * n, w * n)), "nearest")

    def cells(layer: np.ndarray) -> np.ndarray:
        return layer.reshape(h, n, w, n).swapaxes(1, 2).reshape(h, w, n * n)

    known = cells(valid)
    good = known.sum(axis=-1) >= max(1, MIN_VALID_SHARE * n * n)
    layers = [statistic_of(cells(band), known, percent_of(stat)) for band in values]
    return np.where(good, np.stack(layers), 0).astype(np.float64), good


# ---- ground ---------------------------------------------------------------------------------------
def pixel_metres(grid: Grid) -> tuple[float, float]:
    """Ground metres of a pixel's sides (x, y) at the grid's centre."""
    row, col = grid.height / 2, grid.width / 2
    ends = [grid.xy(row + dr, col + dc) for dr, dc in ((0, -0.5), (0, 0.5), (-0.5, 0), (0.5, 0))]
    x, y = (np.array(v) for v in zip(*ends, strict=True))
    lon, lat = transformer(grid.crs, "EPSG:4326").transform(x, y)
    across, down = geod_of(grid.crs).inv(lon[0::2], lat[0::2], lon[1::2], lat[1::2])[2]
    return float(across), float(down)


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


class BlockSums:
    """Sums of named quantities over squares of `side_px`, cut on the grid's global lattice.

    Blocks for tables, and small pictures of large maps.

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

    @classmethod
    def picture(cls, grid: Grid, names: Sequence[str], longest_px: int = 900) -> BlockSums:
        """Squares that make a picture of at most `longest_px`."""
        return cls(grid, max(1, -(-max(grid.shape) // longest_px)), names)

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
        corner = self._first[0] * side - self._row0, self._first[1] * side - self._col0
        west, north = self.grid.xy(*corner)
        px, py = self.grid.pixel
        return Grid.of(self.grid.crs, (px * side, 0.0, west, 0.0, -py * side, north), self.shape)
