"""Trees in a height map: tops in a window that grows with height, crowns by a watershed from them.

A pixel is a top where none within half the crown width of a tree of its height is higher; the width is
that of Popescu and Wynne (2004, Photogrammetric Engineering & Remote Sensing 70:589), a quadratic in height.
Crowns are scikit-image's marker-controlled watershed of the upturned heights (Meyer and Beucher 1990), cut
where a tree ends. The map is walked in blocks that overlap by several crowns: each pixel is judged a top
once, in the block it lies in and with all its window, so that no tree is lost or found twice at an edge.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import rasterio.features
import shapely
from rasterio.transform import Affine
from scipy import ndimage
from shapely.geometry import shape

from canopy.evaluation.grids import pixel_areas_m2, pixel_metres
from canopy.evaluation.maps import HeightMap
from canopy.geo.grid import Grid, tiles_over

BLOCK_PX = 1024
# Crown widths beyond these are of no tree that the rule was fitted to.
NARROWEST_M, WIDEST_M = 1.0, 20.0
# A crown reaches down to this share of its tree's height: what is lower is a gap, or what grows in it.
CROWN_SHARE = 0.4
# How far a block reads beyond its edge: a tree there, its crown, and the window of its neighbours.
HALO_M = 3 * WIDEST_M


@dataclass(frozen=True)
class Rule:
    """What is a tree.

    Attributes:
        lowest_m: trees are at least this high, and crowns reach no lower.
        width: crown width in metres of a tree of height h: width[0] + width[1] h + width[2] h^2 + ...
        smooth_m: standard deviation of the Gaussian that levels twigs and noise before tops are looked for.
        pixel_m: ground metres of a pixel's sides (down, across): one pair for a whole map, so that a tree
            does not depend on the block it is met in.
    """

    lowest_m: float
    width: tuple[float, ...]
    smooth_m: float
    pixel_m: tuple[float, float]

    def width_m(self, height_m: np.ndarray) -> np.ndarray:
        """Crown widths of trees of these heights."""
        return np.clip(np.polynomial.Polynomial(self.width)(height_m), NARROWEST_M, WIDEST_M)

    def disc(self, radius_m: float) -> np.ndarray:
        """Offsets (2, n) in rows and columns of the pixels within a radius, and of the eight neighbours."""
        down, across = (max(1, math.floor(radius_m / side)) for side in self.pixel_m)
        rows, cols = np.mgrid[-down : down + 1, -across : across + 1]
        away = np.hypot(rows * self.pixel_m[0], cols * self.pixel_m[1])
        near = (away <= radius_m) | (np.maximum(abs(rows), abs(cols)) <= 1)
        return np.stack([rows[near], cols[near]])

    def smoothed(self, height_m: np.ndarray, valid: np.ndarray) -> np.ndarray:
        """Heights (h, w) levelled over valid pixels alone, 0 at the others."""
        if not self.smooth_m:
            return np.where(valid, height_m, 0.0)
        sigma = [self.smooth_m / side for side in self.pixel_m]
        total = ndimage.gaussian_filter(np.where(valid, height_m, 0.0).astype(np.float64), sigma)
        weight = ndimage.gaussian_filter(valid.astype(np.float64), sigma)
        return np.divide(total, weight, out=np.zeros_like(total), where=valid)

    def tops(self, surface: np.ndarray) -> np.ndarray:
        """Rows and columns (2, n) of the tops of a levelled surface (h, w), row by row.

        Of equally high pixels that see each other the first counts.
        """
        peaks = (surface >= self.lowest_m) & (surface == ndimage.maximum_filter(surface, 3))
        found = np.stack(np.nonzero(peaks))
        heights = surface[tuple(found)]
        # Steps of a quarter of a pixel: every window of one step is looked through at once.
        step = min(self.pixel_m) / 4
        steps = np.rint(self.width_m(heights) / 2 / step).astype(int)
        keep = np.ones(heights.size, bool)
        pad = max(math.ceil(WIDEST_M / 2 / side) for side in self.pixel_m) + 1
        padded = np.pad(surface, pad)
        for one in np.unique(steps):
            disc, here = self.disc(one * step), steps == one
            rows, cols = (found[axis, here, None] + pad + disc[axis] for axis in (0, 1))
            around, own = padded[rows, cols], heights[here, None]
            first = (disc[0] < 0) | ((disc[0] == 0) & (disc[1] < 0))
            keep[here] = ~((around > own) | ((around == own) & first)).any(axis=1)
        return found[:, keep]

    def crowns(self, surface: np.ndarray, valid: np.ndarray, tops: np.ndarray) -> np.ndarray:
        """Crown of each pixel (h, w): 1 + the index of its top (2, n), or 0. A crown is in one piece."""
        from skimage.measure import label
        from skimage.segmentation import watershed

        markers = np.zeros(surface.shape, np.int32)
        markers[tuple(tops)] = np.arange(1, tops.shape[1] + 1)
        crowns = watershed(-surface, markers, mask=valid & (surface >= self.lowest_m))
        rows, cols = np.nonzero(crowns)
        of = crowns[rows, cols] - 1
        top_m = surface[tuple(tops)]
        away = np.hypot((rows - tops[0, of]) * self.pixel_m[0], (cols - tops[1, of]) * self.pixel_m[1])
        beyond = (away > self.width_m(top_m)[of]) | (surface[rows, cols] < CROWN_SHARE * top_m[of])
        crowns[rows[beyond], cols[beyond]] = 0
        pieces = label(crowns, connectivity=1)
        crowns[~np.isin(pieces, pieces[tuple(tops)])] = 0
        return crowns


@dataclass(frozen=True)
class Found:
    """Trees of one block: place of the top on the map's grid (2, n), heights (bands, n) in metres there, and
    crowns: polygons (n,) in the grid's CRS, ground area (n,) in square metres."""

    row_col: np.ndarray
    height_m: np.ndarray
    crowns: list[shapely.Polygon]
    area_m2: np.ndarray


def blocks_of(grid: Grid) -> list[Grid]:
    """The blocks that a map is walked in, without their overlap."""
    return tiles_over(grid, BLOCK_PX)


def find_trees(
    heights: HeightMap, grid: Grid, lowest_m: float, width: tuple[float, ...], smooth_m: float
) -> Iterator[Found]:
    """The trees of a map's own grid, block by block; see `Rule`."""
    across, down = pixel_metres(grid)
    rule = Rule(lowest_m, width, smooth_m, (down, across))
    halo = math.ceil(HALO_M / min(rule.pixel_m))
    row_areas = pixel_areas_m2(grid)
    for block in blocks_of(grid):
        top, left = grid.offset_of(block)
        # Never beyond the map, where a degree may be none.
        first = max(top - halo, 0), max(left - halo, 0)
        last = min(top + block.height + halo, grid.height), min(left + block.width + halo, grid.width)
        wide = grid.window(*first, last[0] - first[0], last[1] - first[1])
        values, valid = heights.read(wide, interval=True)
        yield _in_block(rule, wide, values, valid, block, first, row_areas[first[0] : last[0]])


def _in_block(
    rule: Rule,
    wide: Grid,
    values: np.ndarray,
    valid: np.ndarray,
    block: Grid,
    first: tuple[int, int],
    row_areas: np.ndarray,
) -> Found:
    """The trees whose top lies in `block`, of a window that reaches further and begins at `first`."""
    surface = rule.smoothed(values[0], valid)
    tops = rule.tops(surface)
    row, col = wide.offset_of(block)
    own = (tops[0] >= row) & (tops[0] < row + block.height)
    own &= (tops[1] >= col) & (tops[1] < col + block.width)
    if not own.any():
        return Found(np.zeros((2, 0), int), np.zeros((len(values), 0)), [], np.zeros(0))
    crowns = rule.crowns(surface, valid, tops)
    counted = np.bincount(
        crowns.ravel(), np.broadcast_to(row_areas[:, None], wide.shape).ravel(), tops.shape[1] + 1
    )
    crowns[~np.isin(crowns, 1 + np.flatnonzero(own))] = 0
    outlines = {
        int(number): shape(outline)
        for outline, number in rasterio.features.shapes(
            crowns.astype(np.int32), crowns > 0, 4, Affine(*wide.transform[:6])
        )
    }
    tops = tops[:, own]
    # Levelling moves a top by a pixel: it stands on the highest of the nine.
    raw = np.pad(np.where(valid, values[0], -np.inf), 1, constant_values=-np.inf)
    around = np.stack([np.repeat([-1, 0, 1], 3), np.tile([-1, 0, 1], 3)])
    best = raw[tops[0, :, None] + around[0] + 1, tops[1, :, None] + around[1] + 1].argmax(axis=1)
    tops = tops + around[:, best]
    return Found(
        tops + np.array(first)[:, None],
        values[:, tops[0], tops[1]].astype(np.float64),
        [outlines[1 + int(index)] for index in np.flatnonzero(own)],
        counted[1:][own],
    )
