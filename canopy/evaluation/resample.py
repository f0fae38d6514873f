"""One statistic of a raster over every pixel of another grid: area-weighted mean, highest, or a percentile.

The reader of `canopy.geo` is made for images; a judge needs rules that can be stated in one sentence:

* same lattice: pixels as they are;
* "mean", same CRS: exactly area-weighted, over the valid area, where at least half of the pixel is valid;
* "mean", another CRS: the window-independent average of `canopy.geo.warp` (bilinear where both pixels are of
  about the same size), where every source pixel touched is valid;
* "max" and "pNN": over points on a regular lattice in the pixel (exactly the source's pixels where they
  divide it, else at least two points per source pixel), where at least half of the points are valid.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Protocol

import numpy as np
from affine import Affine
from scipy import sparse

from canopy.evaluation.products import HeightProduct, HeightWindow
from canopy.geo.grid import Grid
from canopy.geo.statistic import percent_of, statistic_of
from canopy.geo.window import lattice_ratio

MIN_VALID_SHARE = 0.5
# Source pixels held at once, per side: memory does not grow with the ratio of the two grids.
_SOURCE_PX = 3072


class Read(Protocol):
    """Layers (bands, h, w) and valid (h, w) of a source on a grid."""

    def __call__(self, window: Grid, resampling: str | None = None) -> tuple[np.ndarray, np.ndarray]: ...


def read_stat(product: HeightProduct, grid: Grid, stat: str) -> tuple[np.ndarray, np.ndarray]:
    """A product's heights on `grid` by the rules above.

    Returns:
        metres float64 (h, w), 0 where not valid; valid bool (h, w).
    """
    return _read(product, grid, stat, lambda window: (window.height_m[None], window.valid))


def read_mean_bounds(product: HeightProduct, grid: Grid) -> tuple[np.ndarray, np.ndarray] | None:
    """Means of the ends of a map's interval, float64 (h, w), NaN where unknown; None for a map without."""
    if not product.has_interval:
        return None

    def ends(window: HeightWindow) -> tuple[np.ndarray, np.ndarray]:
        assert window.lower_m is not None and window.upper_m is not None  # it was asked for
        return np.stack([window.lower_m, window.upper_m]), window.valid

    values, valid = _layers(product, grid, "mean", ends, interval=True)
    low, high = np.where(valid, values, np.nan)
    return low, high


Layers = Callable[[HeightWindow], tuple[np.ndarray, np.ndarray]]


def _read(product: HeightProduct, grid: Grid, stat: str, layers: Layers) -> tuple[np.ndarray, np.ndarray]:
    values, valid = _layers(product, grid, stat, layers, interval=False)
    return values[0], valid


def _layers(
    product: HeightProduct, grid: Grid, stat: str, layers: Layers, interval: bool
) -> tuple[np.ndarray, np.ndarray]:
    """Values float64 (bands, h, w) and valid (h, w)."""

    def read(window: Grid, resampling: str | None = None) -> tuple[np.ndarray, np.ndarray]:
        return layers(product.read(window, interval=interval, resampling=resampling))

    ratio = lattice_ratio(product.tiles[0].place, grid) if _on_one_lattice(product) else None
    if ratio == 1:
        values, valid = read(grid)
    elif stat != "mean":
        n = ratio or max(2, math.ceil(2 * grid.gsd_m / product.gsd_m - 1e-3))
        return _in_parts(grid, n, lambda part: _of_points(read, part, stat, n))
    elif product.lattice is not None and product.lattice.crs == grid.crs and _on_one_lattice(product):
        lattice = product.lattice
        shrink = max(a / b for a, b in zip(grid.pixel, lattice.pixel, strict=True))
        return _in_parts(grid, shrink, lambda part: _area_mean(read, lattice, part))
    else:
        values, valid = read(grid)
    return values.astype(np.float64), valid


def _on_one_lattice(product: HeightProduct) -> bool:
    lattice = product.lattice
    places = [tile.place for tile in product.tiles]
    return lattice is not None and all(p.is_north_up and p.grid().is_aligned(lattice) for p in places)


def _in_parts(
    grid: Grid, shrink: float, read: Callable[[Grid], tuple[np.ndarray, np.ndarray]]
) -> tuple[np.ndarray, np.ndarray]:
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


# ---- the mean over an area ------------------------------------------------------------------------
def _area_mean(read: Read, own: Grid, grid: Grid) -> tuple[np.ndarray, np.ndarray]:
    """Exactly area-weighted mean; both grids are north-up in one CRS, so the weights are separable."""
    (top, left), (bottom, right) = own.rowcol(*grid.xy(0, 0)), own.rowcol(*grid.xy(*grid.shape))
    r0, c0, r1, c1 = math.floor(top), math.floor(left), math.ceil(bottom), math.ceil(right)
    values, valid = read(own.window(r0, c0, r1 - r0, c1 - c0))
    down = _weights(top - r0, (bottom - top) / grid.height, grid.height, r1 - r0)
    across = _weights(left - c0, (right - left) / grid.width, grid.width, c1 - c0)

    def pool(layer: np.ndarray) -> np.ndarray:
        return np.asarray((across @ (down @ layer).T).T)

    share = pool(valid.astype(np.float64))
    good = share >= MIN_VALID_SHARE - 1e-9
    known = np.where(valid, values, 0).astype(np.float64)
    means = [np.where(good, pool(band) / np.maximum(share, 1e-12), 0) for band in known]
    return np.stack(means), good


def _weights(start: float, step: float, cells: int, pixels: int) -> sparse.csr_array:
    """Share (cells, pixels) of cell i, start + i step to start + (i + 1) step, that pixel j covers."""
    low = start + step * np.arange(cells)
    reach = math.ceil(step) + 1
    j = np.floor(low).astype(np.int64)[:, None] + np.arange(reach + 1)
    length = np.minimum(low[:, None] + step, j + 1) - np.maximum(low[:, None], j)
    i = np.broadcast_to(np.arange(cells)[:, None], j.shape)
    keep = (length > 1e-12) & (j >= 0) & (j < pixels)
    return sparse.csr_array((length[keep] / step, (i[keep], j[keep])), shape=(cells, pixels))


# ---- highest and percentiles ----------------------------------------------------------------------
def _of_points(read: Read, grid: Grid, stat: str, n: int) -> tuple[np.ndarray, np.ndarray]:
    """Statistic of n x n points per pixel, each the source pixel it lies in."""
    px, py = (side / n for side in grid.pixel)
    x, y = grid.xy(0, 0)
    h, w = grid.shape
    fine = Grid.of(grid.crs, Affine(px, 0, x, 0, -py, y), (h * n, w * n))
    values, valid = read(fine, "nearest")

    def cells(layer: np.ndarray) -> np.ndarray:
        return layer.reshape(h, n, w, n).swapaxes(1, 2).reshape(h, w, n * n)

    known = cells(valid)
    count = known.sum(axis=-1)
    good = count >= max(1, MIN_VALID_SHARE * n * n)
    layers = [statistic_of(cells(band), known, percent_of(stat)) for band in values]
    return np.where(good, np.stack(layers), 0).astype(np.float64), good
