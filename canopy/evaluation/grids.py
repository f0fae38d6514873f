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
from collections.abc import Mapping, Sequence

import numpy as np
import rasterio.crs
import rasterio.warp
from rasterio.enums import Resampling

from canopy.errors import ConfigError, InputError
from canopy.evaluation.maps import HeightMap
from canopy.geo.area import AOI
from canopy.geo.crs import geod_of, to_crs, transformer
from canopy.geo.grid import Grid, tiles_over
from canopy.geo.place import lattice_ratio
from canopy.metrics import percent_of, statistic_of

# Pixel sizes that differ by less than this share count as one.
SAME_GSD = 0.01
MIN_VALID_SHARE = 0.5
# A reference beyond these is no measurement.
REFERENCE_LOWEST_M, REFERENCE_HIGHEST_M = -3.0, 120.0
# Source pixels held at once, per side: memory does not grow with the ratio of the two grids.
_SOURCE_PX = 3072


# ---- which grid -----------------------------------------------------------------------------------
def common_grid(a: HeightMap, b: HeightMap, area: AOI | None = None, gsd: float | None = None) -> Grid:
    """The coarser map's own pixels over the ground both frame (A's where they are equally fine).

    `gsd`: pixels of that many metres in the area's UTM zone instead; also used, with the coarser side's gsd,
    where that map is rotated or south-up.

    Raises InputError when the maps, or they and `area`, do not overlap.
    """
    shared = a.outline.intersection(b.outline)
    if shared.area == 0:
        raise InputError(
            "the two maps do not overlap", where=f"{a.name}, {b.name}", expected="maps of one place"
        )
    if area is not None:
        shared = shared.intersection(area.lonlat)
        if shared.area == 0:
            raise InputError("the area is outside the maps", where=area.describe())
    aoi = AOI(shared, to_crs("EPSG:4326"), False)
    coarse, fine = (b, a) if b.gsd_m > a.gsd_m * (1 + SAME_GSD) else (a, b)
    if gsd is not None:
        if not 0 < gsd <= 10_000:
            raise ConfigError(f"{gsd:g} m", where="--gsd", expected="metres per pixel, above 0")
        return aoi.grid(aoi.output_crs(), gsd)
    lattice = coarse.lattice
    if lattice is None and abs(fine.gsd_m / coarse.gsd_m - 1) <= SAME_GSD:
        lattice = fine.lattice
    return _over(aoi, lattice, coarse.gsd_m)


def own_grid(heights: HeightMap) -> Grid:
    """A map's own pixels over all of its files; for a rotated map, pixels of its size in its UTM zone."""
    if heights.lattice is not None and len(heights.tiles) == 1:
        return heights.lattice
    return _over(AOI(heights.outline, to_crs("EPSG:4326"), False), heights.lattice, heights.gsd_m)


def _over(aoi: AOI, lattice: Grid | None, gsd_m: float) -> Grid:
    if lattice is None:
        return aoi.grid(aoi.output_crs(), gsd_m)
    # A hair of tolerance: an area that is this lattice's own frame must not gain a row by rounding.
    return lattice.window_over(aoi.to_crs(lattice.crs).geometry.bounds, slack_px=1e-3)


# ---- a map on a grid ------------------------------------------------------------------------------
def read_on(
    heights: HeightMap, grid: Grid, stat: str = "mean", *, interval: bool = False
) -> tuple[np.ndarray, np.ndarray]:
    """A map's heights on `grid` by the rule above: float64 (1, h, w) metres, and valid (h, w).

    `interval` with "mean" also gives the means of the ends of the map's interval, (3, h, w), where it has
    one. A reference's heights are clamped at 0, and what is beyond -3..120 m is not valid.
    """
    own, one = heights.lattice, heights.is_one_lattice
    ratio = lattice_ratio(heights.tiles[0].place.north_up(), grid) if one else None
    bands = 3 if interval and heights.has_interval and stat == "mean" else 1
    values, valid = np.zeros((bands, *grid.shape)), np.zeros(grid.shape, bool)
    points = ratio or max(2, math.ceil(2 * grid.gsd_m / heights.gsd_m - 1e-3))
    by_area = own is not None and one and own.crs == grid.crs
    shrink = grid.pixel[0] / own.pixel[0] if by_area and own is not None else 1.0
    step = max(8, int(_SOURCE_PX / max(shrink if stat == "mean" else points, 1)))
    for part in tiles_over(grid, step):
        if ratio == 1 or (stat == "mean" and not by_area):
            got, good = heights.read(part, interval=interval)
        elif stat == "mean":
            assert own is not None  # by_area says so
            got, good = _area_mean(heights, own, part, interval)
        else:
            got, good = _of_points(heights, part, stat, points)
        row, col = grid.offset_of(part)
        here = np.s_[row : row + part.height, col : col + part.width]
        values[:, *here], valid[here] = got[:bands], good
    if heights.reference:
        valid = heights.without_impossible(values[0], valid, REFERENCE_LOWEST_M, REFERENCE_HIGHEST_M)
        values[0] = np.where(valid, np.maximum(values[0], 0), 0)
    return values, valid


def _area_mean(heights: HeightMap, own: Grid, grid: Grid, interval: bool) -> tuple[np.ndarray, np.ndarray]:
    """Area-weighted mean over what is valid, by GDAL; both grids are north-up in one CRS."""
    window = own.window_over(grid.bounds).pad(1)
    values, valid = heights.read(window, interval=interval)
    layers = np.concatenate([np.where(valid, values, 0), valid[None]], dtype=np.float64)
    out = np.zeros((len(layers), *grid.shape))
    crs = rasterio.crs.CRS.from_wkt(grid.crs.to_wkt())
    rasterio.warp.reproject(
        layers, out, src_transform=window.transform, dst_transform=grid.transform, src_crs=crs, dst_crs=crs,
        resampling=Resampling.average, init_dest_nodata=False,
    )  # fmt: skip
    share = out[-1]
    good = share >= MIN_VALID_SHARE - 1e-9
    return np.where(good, out[:-1] / np.maximum(share, 1e-12), 0), good


def _of_points(heights: HeightMap, grid: Grid, stat: str, n: int) -> tuple[np.ndarray, np.ndarray]:
    """Statistic of n x n points per pixel, each the source pixel it lies in."""
    px, py = (side / n for side in grid.pixel)
    x, y = grid.xy(0, 0)
    h, w = grid.shape
    fine = Grid.of(grid.crs, (px, 0, x, 0, -py, y), (h * n, w * n))
    values, valid = heights.read(fine, resampling="nearest")
    cells, known = (
        layer.reshape(h, n, w, n).swapaxes(1, 2).reshape(h, w, n * n) for layer in (values[0], valid)
    )
    good = known.sum(axis=-1) >= max(1, MIN_VALID_SHARE * n * n)
    return np.where(good, statistic_of(cells, known, percent_of(stat)), 0)[None], good


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
    t = grid.transform
    x, y = grid.xy(np.arange(grid.height) + 0.5, grid.width / 2)  # type: ignore[arg-type]  # arrays too
    to_degrees = transformer(grid.crs, "EPSG:4326").transform
    west, east = (to_degrees(np.full_like(y, x + dx), y) for dx in (-t.a / 2, t.a / 2))
    north, south = (to_degrees(np.full_like(y, x), y + dy) for dy in (-t.e / 2, t.e / 2))
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
        self._origin = grid.origin_rc
        self._first = [start // side_px for start in self._origin]
        row, col = (
            (start + n - 1) // side_px - first + 1
            for start, n, first in zip(self._origin, grid.shape, self._first, strict=True)
        )
        self.shape = row, col
        self.count = np.zeros(self.shape)
        self.sums = {name: np.zeros(self.shape) for name in names}

    @classmethod
    def picture(cls, grid: Grid, names: Sequence[str], longest_px: int = 900) -> BlockSums:
        """Squares that make a picture of at most `longest_px`."""
        return cls(grid, max(1, -(-max(grid.shape) // longest_px)), names)

    def add(self, row: int, col: int, valid: np.ndarray, values: Mapping[str, np.ndarray]) -> None:
        """Add a window (h, w) at (row, col) of the grid; pixels that are not valid do not count."""
        rows, cols = (
            (start + at + np.arange(n)) // self.side_px - first
            for start, at, n, first in zip(self._origin, (row, col), valid.shape, self._first, strict=True)
        )
        here = np.s_[rows[0] : rows[-1] + 1, cols[0] : cols[-1] + 1]
        shape = self.count[here].shape
        square = ((rows - rows[0])[:, None] * shape[1] + cols - cols[0])[valid]
        self.count[here] += np.bincount(square, minlength=shape[0] * shape[1]).reshape(shape)
        for name, value in values.items():
            total = np.bincount(square, value[valid], shape[0] * shape[1])
            self.sums[name][here] += total.reshape(shape)

    def mean(self, name: str) -> np.ndarray:
        """Mean over the valid pixels of each square, NaN where there is none."""
        with np.errstate(invalid="ignore", divide="ignore"):
            return self.sums[name] / np.where(self.count > 0, self.count, np.nan)

    def block_grid(self) -> Grid:
        """The grid of the squares (whole ones, so it may reach beyond the map)."""
        side = self.side_px
        row, col = (f * side - start for f, start in zip(self._first, self._origin, strict=True))
        west, north = self.grid.xy(row, col)
        px, py = self.grid.pixel
        return Grid.of(self.grid.crs, (px * side, 0.0, west, 0.0, -py * side, north), self.shape)
