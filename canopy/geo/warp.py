"""Pixels of one grid on another, by GDAL's warper, so that a pixel never depends on the window asked for.

Left to itself GDAL chooses kernel widths, approximations and chunks from the window it is given. Here the way
from target to source is settled first, on 512 px cells of the target's global lattice: exact PROJ coordinates
of nine points, and the affine through them (cells are quartered until it holds to 0.01 px). GDAL then only
samples, with a fixed kernel, in pixel space:

* shrinking by more than 1.5: the mean over the target pixel, as a block mean on the source's own lattice
  followed by k x k bilinear samples;
* otherwise bilinear, or nearest on request;
* grids that share pixels, or blocks of them, are copied or averaged without any warp.

An output pixel is valid when its centre is within the source's frame and every source pixel that enters its
value is valid: nodata never bleeds into a value and never gets one. Beyond the frame's edge the edge pixel is
repeated, so that two files that touch leave no gap between them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import rasterio.crs
import rasterio.warp
from affine import Affine
from rasterio.enums import Resampling

from canopy.errors import InputError
from canopy.geo.crs import transformer, x_period
from canopy.geo.grid import Grid
from canopy.geo.place import SourcePlace, lattice_ratio, shrink_factor

CELL_PX, LEAST_CELL_PX = 512, 16
POSITION_TOL_PX = 0.01
AVERAGE_ABOVE = 1.5
KERNELS = {"bilinear": Resampling.bilinear, "nearest": Resampling.nearest}
# Source pixels are read and averaged in pieces of about this side: memory does not grow with the shrink.
PIECE_PX = 2048
# Neighbours that together have less weight than this do not make a value invalid (float noise).
WEIGHT_TOL = 1e-3
# A centre this close to the frame is inside: of two files that touch, at least one has the pixel.
FRAME_TOL_PX = 1e-5
# Coefficients are multiples of 2^-29: every position is then an exact float64, whatever the window's corner.
_STEPS_PER_PX = 2.0**29
# Both sides of a warp are in pixels; GDAL wants a CRS all the same.
_ANY_CRS = rasterio.crs.CRS.from_epsg(3857)

# (row0, col0, height, width) within the source -> values (b, h, w) of any dtype, valid (h, w)
Reader = Callable[[int, int, int, int], tuple[np.ndarray, np.ndarray]]


def resample(
    place: SourcePlace, grid: Grid, read: Reader, bands: int, resampling: str | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Values float32 (bands, h, w) and valid (h, w) of a source on `grid`; 0 where not valid.

    Args:
        place: where the source's pixels are.
        grid: where they are wanted; may lie partly or wholly outside.
        read: gives source pixels; asked only for windows inside the source.
        bands: how many bands `read` gives.
        resampling: None (average when shrinking by more than 1.5, else bilinear), "bilinear" or "nearest".
    """
    if resampling is not None and resampling not in KERNELS:
        raise InputError(f"resampling {resampling!r}", expected=" or ".join(KERNELS))
    ratio = lattice_ratio(place, grid)
    if ratio == 1 or (ratio is not None and resampling is None):
        return _copy(place, grid, read, bands, ratio)
    values = np.zeros((bands, *grid.shape), dtype=np.float32)
    valid = np.zeros(grid.shape, dtype=bool)
    warp = _Warp(place, grid, read, bands, resampling)
    row0, col0 = grid.origin_rc
    for top in range(row0 // CELL_PX * CELL_PX, row0 + grid.height, CELL_PX):
        for left in range(col0 // CELL_PX * CELL_PX, col0 + grid.width, CELL_PX):
            warp.cell(top, left, values, valid)
    return values, valid


def _copy(
    place: SourcePlace, grid: Grid, read: Reader, bands: int, ratio: int
) -> tuple[np.ndarray, np.ndarray]:
    """Pixels, or means of ratio x ratio of them, of a shared lattice.

    A coarse pixel cut by the source's edge counts when its centre is inside, as everywhere in canopy.
    """
    row, col = (round(v) for v in place.rowcol(*grid.xy(0, 0)))
    values, valid = _block_means(place, read, bands, (row, col, *grid.shape), ratio)
    if ratio == 1:
        # What `read` gave may be its own: here it becomes the caller's.
        return values.astype(np.float32), valid.copy()
    rows = row + (np.arange(grid.height) + 0.5) * ratio
    cols = col + (np.arange(grid.width) + 0.5) * ratio
    valid &= ((rows >= 0) & (rows <= place.height))[:, None] & (cols >= 0) & (cols <= place.width)
    values[:, ~valid] = 0
    return values, valid


def _block_means(
    place: SourcePlace, read: Reader, bands: int, window: tuple[int, int, int, int], block: int
) -> tuple[np.ndarray, np.ndarray]:
    """Means (b, h, w) over block x block source pixels, and where all that exist of them are valid.

    `window` is the source row and column of the first block (they may lie outside), and height and width in
    blocks. A block cut by the source's edge has the mean of what exists; one that does not exist is 0 and
    not valid. With `block` 1 these are the pixels, in whatever dtype `read` gives them.
    """
    top, left, height, width = window
    if block == 1:
        got, good, edges = _framed(place, read, bands, window)
        return (np.pad(got, ((0, 0), *edges)), np.pad(good, edges)) if np.any(edges) else (got, good)
    means = np.zeros((bands, height, width), dtype=np.float32)
    whole = np.zeros((height, width), dtype=bool)
    step = max(1, PIECE_PX // block)
    for i in range(0, height, step):
        for j in range(0, width, step):
            h, w = min(step, height - i), min(step, width - j)
            piece = (top + i * block, left + j * block, h * block, w * block)
            got, good, edges = _framed(place, read, bands, piece)
            if np.any(edges):
                got, good = np.pad(got, ((0, 0), *edges)), np.pad(good, edges, constant_values=True)
            rows = _overlap(piece[0], h, block, place.height)
            cols = _overlap(piece[1], w, block, place.width)
            counts, here = rows[:, None] * cols, np.s_[i : i + h, j : j + w]
            means[:, *here] = _block_sums(got, block) / np.maximum(counts, 1)
            whole[here] = _all_good(good, block) & (counts > 0)
    return means, whole


def _framed(
    place: SourcePlace, read: Reader, bands: int, window: tuple[int, int, int, int]
) -> tuple[np.ndarray, np.ndarray, tuple[tuple[int, int], tuple[int, int]]]:
    """What exists of a source window, 0 where not valid, and how many pixels are missing on each side."""
    row, col, height, width = window
    top, bottom = (min(max(r, 0), place.height) for r in (row, row + height))
    left, right = (min(max(c, 0), place.width) for c in (col, col + width))
    if top >= bottom or left >= right:
        empty = np.zeros((bands, 0, 0), np.float32), np.zeros((0, 0), bool)
        return *empty, ((0, height), (0, width))
    values, valid = read(top, left, bottom - top, right - left)
    edges = (top - row, row + height - bottom), (left - col, col + width - right)
    return values if valid.all() else np.where(valid, values, 0), valid, edges


def _block_sums(values: np.ndarray, block: int) -> np.ndarray:
    """Sums float32 (b, h, w) over block x block pixels of (b, h * block, w * block)."""
    b, h, w = values.shape
    rows = values.reshape(b, h // block, block, w).sum(axis=2, dtype=np.float32)
    if block > 8:
        return rows.reshape(b, h // block, w // block, block).sum(axis=3)
    total = rows[..., ::block].copy()  # NumPy is slow at sums over a few neighbours
    for i in range(1, block):
        total += rows[..., i::block]
    return total


def _all_good(valid: np.ndarray, block: int) -> np.ndarray:
    """Where all of block x block pixels are valid."""
    h, w = valid.shape
    return np.asarray(valid.reshape(h // block, block, w // block, block).all(axis=(1, 3)))


def _overlap(start: int, count: int, block: int, size: int) -> np.ndarray:
    """How many pixels of each of `count` blocks from `start` on lie in [0, size), float32."""
    first = start + np.arange(count) * block
    return np.clip(np.minimum(first + block, size) - np.maximum(first, 0), 0, None).astype(np.float32)


@dataclass(frozen=True)
class _Leaf:
    """A part of a cell on which the way to the source is affine.

    Attributes:
        top, left, height, width: the part of the window in it, in pixels of the target's lattice.
        position: (col, row) counted from `origin` on the target's lattice -> source (col, row), corners.
        origin: (row, col) of the leaf's own corner.
    """

    top: int
    left: int
    height: int
    width: int
    position: Affine
    origin: tuple[int, int]


class _Warp:
    """One source on one window, cell by cell."""

    def __init__(
        self, place: SourcePlace, grid: Grid, read: Reader, bands: int, resampling: str | None
    ) -> None:
        self._place, self._grid, self._read, self._bands = place, grid, read, bands
        self._period = x_period(place.crs)
        # From the scale at the source's centre, never from the window.
        shrink = shrink_factor(place, grid.crs, grid.pixel) if resampling is None else 1.0
        self._kernel = KERNELS[resampling or "bilinear"]
        self._block = max(1, int(shrink / 2 + 1e-6)) if shrink > AVERAGE_ABOVE else 1
        self._samples = math.ceil(shrink / self._block - 1e-6) if shrink > AVERAGE_ABOVE else 1

    def cell(self, top: int, left: int, values: np.ndarray, valid: np.ndarray) -> None:
        """Fill in what the window has of the cell at (top, left) of the lattice."""
        leaves: dict[int, list[_Leaf]] = {}
        for turn, leaf in self._leaves(top, left, CELL_PX):
            leaves.setdefault(turn, []).append(leaf)
        row0, col0 = self._grid.origin_rc
        # Two turns round the Earth meet in a cell on the antimeridian of the source's own counting.
        for turn in sorted(leaves, key=abs):
            source = self._source_under(leaves[turn])
            if source is None:
                continue
            for leaf in leaves[turn]:
                got, good = self._sample(leaf, *source)
                r, c = leaf.top - row0, leaf.left - col0
                here = np.s_[r : r + leaf.height, c : c + leaf.width]
                if good is None:
                    values[:, *here], valid[here] = got, True
                else:
                    np.copyto(values[:, *here], got, where=good)
                    valid[here] |= good

    def _leaves(self, top: int, left: int, size: int) -> Iterator[tuple[int, _Leaf]]:
        """Turn and leaf of the parts of a cell that lie in the window and may touch the source."""
        row0, col0 = self._grid.origin_rc
        first_r, first_c = max(top, row0), max(left, col0)
        height = min(top + size, row0 + self._grid.height) - first_r
        width = min(left + size, col0 + self._grid.width) - first_c
        if height <= 0 or width <= 0:
            return
        x, y = self._nine_points(top, left, size)
        known = np.isfinite(x) & np.isfinite(y)
        if known.all():
            turns = self._turns(x, y)
            if not turns:
                return
            position, error = self._affine(x, y, size)
            if error <= POSITION_TOL_PX or size <= LEAST_CELL_PX:
                for turn in turns:
                    moved = position if not turn else self._affine(x + turn * (self._period or 0), y, size)[0]
                    yield turn, _Leaf(first_r, first_c, height, width, moved, (top, left))
                return
        elif size <= (LEAST_CELL_PX if known.any() else CELL_PX // 4):
            return  # beyond the domain of one of the two projections
        half = size // 2
        for r, c in ((top, left), (top, left + half), (top + half, left), (top + half, left + half)):
            yield from self._leaves(r, c, half)

    def _nine_points(self, top: int, left: int, size: int) -> tuple[np.ndarray, np.ndarray]:
        """x, y in the source's CRS of 3 x 3 points of a cell, (3, 3) each; x without jumps."""
        _, _, row_phase, col_phase = self._grid.lattice
        px, py = self._grid.pixel
        steps = np.array([0.0, size / 2, size])
        x, y = np.meshgrid((left + steps + col_phase) * px, -(top + steps + row_phase) * py)
        if self._place.crs != self._grid.crs:
            x, y = transformer(self._grid.crs, self._place.crs).transform(x, y)
        if self._period is not None and np.isfinite(x).all():
            x = x - self._period * np.round((x - x[1, 1]) / self._period)
        return x, y

    def _turns(self, x: np.ndarray, y: np.ndarray) -> list[int]:
        """Whole turns round the Earth that take a cell to touch the source; none: it never does."""
        turns = range(1)
        if self._period is not None:
            height, width = self._place.height, self._place.width
            frame, _ = self._place.xy(np.array([0, 0, height, height]), np.array([0, width, 0, width]))
            reach = np.ptp(x)
            first = math.ceil((frame.min() - x.max() - reach) / self._period)
            turns = range(first, math.floor((frame.max() - x.min() + reach) / self._period) + 1)
        return [turn for turn in turns if self._touches(x + turn * (self._period or 0), y)]

    def _touches(self, x: np.ndarray, y: np.ndarray) -> bool:
        """Whether a cell through these nine points can hold source pixels."""
        for at, size in zip(self._place.rowcol(x, y), (self._place.height, self._place.width), strict=True):
            # What bends between the nine points stays within half the cell's extent.
            reach = np.ptp(at) / 2 + 2
            if at.max() + reach < 0 or at.min() - reach > size:
                return False
        return True

    def _affine(self, x: np.ndarray, y: np.ndarray, size: int) -> tuple[Affine, float]:
        """The affine from a cell's (col, row) to source (col, row), and its largest error at those points."""
        u, v = np.meshgrid([-size / 2, 0, size / 2], [-size / 2, 0, size / 2])
        terms, worst = [], 0.0
        for position in self._place.rowcol(x, y)[::-1]:
            a, b = (position * u).sum() / (u * u).sum(), (position * v).sum() / (v * v).sum()
            rest = position - a * u - b * v
            terms += [a, b, (rest.max() + rest.min()) / 2 - (a + b) * size / 2]
            worst = max(worst, float(np.ptp(rest)) / 2)
        return _rounded(Affine(*terms)), worst

    def _source_under(self, leaves: list[_Leaf]) -> tuple[np.ndarray, np.ndarray | None, int, int] | None:
        """Block means under leaves, where they are valid (None: everywhere), and the block row and column of
        the first. The frame's edge is repeated a little way, for kernels that reach beyond it."""
        corners = []
        for leaf in leaves:
            r, c = leaf.top - leaf.origin[0], leaf.left - leaf.origin[1]
            corners += [leaf.position @ (c + i, r + j) for i in (0, leaf.width) for j in (0, leaf.height)]
        cols, rows = (np.array(v) / self._block for v in zip(*corners, strict=True))
        height, width = -(-self._place.height // self._block), -(-self._place.width // self._block)
        reach = 2
        r0, r1 = max(0, math.floor(rows.min()) - reach), min(height, math.ceil(rows.max()) + reach)
        c0, c1 = max(0, math.floor(cols.min()) - reach), min(width, math.ceil(cols.max()) + reach)
        if r0 >= r1 or c0 >= c1:
            return None
        window = (r0 * self._block, c0 * self._block, r1 - r0, c1 - c0)
        means, good = _block_means(self._place, self._read, self._bands, window, self._block)
        edge = math.ceil(self._samples) + 2
        pads = [
            (edge if at_start else 0, edge if at_end else 0)
            for at_start, at_end in ((r0 == 0, r1 == height), (c0 == 0, c1 == width))
        ]
        if any(map(any, pads)):
            means, good = np.pad(means, ((0, 0), *pads), mode="edge"), np.pad(good, pads, mode="edge")
        return means, None if good.all() else good, r0 - pads[0][0], c0 - pads[1][0]

    def _sample(
        self, leaf: _Leaf, means: np.ndarray, good: np.ndarray | None, r0: int, c0: int
    ) -> tuple[np.ndarray, np.ndarray | None]:
        """Values (b, h, w) of a leaf, and where they are valid (None: everywhere)."""
        k, block = self._samples, self._block
        h, w = leaf.height, leaf.width
        source = means if good is None else np.concatenate([means, good[None]], dtype=np.float32)
        out = np.zeros((len(source), h * k, w * k), dtype=np.float32)
        p = leaf.position
        row, col = leaf.top - leaf.origin[0], leaf.left - leaf.origin[1]
        # From samples to block means.
        scaled = _rounded(Affine.scale(1 / block) @ p @ Affine.scale(1 / k))
        shifted = Affine.translation(-c0, -r0) @ scaled @ Affine.translation(col * k, row * k)
        rasterio.warp.reproject(
            source,
            out,
            # Twice the pixel, which is as exact: GDAL takes the identity for a missing geotransform.
            src_transform=Affine.scale(2),
            dst_transform=Affine.scale(2) @ shifted,
            src_crs=_ANY_CRS,
            dst_crs=_ANY_CRS,
            resampling=self._kernel,
            init_dest_nodata=False,
            XSCALE="1",
            YSCALE="1",
        )
        inside = self._inside(leaf)
        if good is not None:
            share, out = out[-1], out[:-1]
            full = share >= 1 - WEIGHT_TOL
            if not full.all():
                full = full if k == 1 else _all_good(full, k)
                inside = full if inside is None else inside & full
            nearly = np.nonzero((share < 1 - 1e-6) & (share >= 1 - WEIGHT_TOL))
            for band in out:
                band[nearly] /= share[nearly]
        return (out if k == 1 else _block_sums(out, k) / np.float32(k * k)), inside

    def _inside(self, leaf: _Leaf) -> np.ndarray | None:
        """Where the centres of a leaf's pixels lie within the source's frame (None: everywhere).

        Among an even number of samples a centre lies between two: it is inside where one of them is.
        """
        p = leaf.position
        row = leaf.top - leaf.origin[0] + np.arange(leaf.height)[:, None] + 0.5
        col = leaf.left - leaf.origin[1] + np.arange(leaf.width) + 0.5
        corners = [p @ (col[i], row[j, 0]) for i in (0, -1) for j in (0, -1)]
        sizes, reach = (self._place.width, self._place.height), abs(p.a) + abs(p.b) + abs(p.d) + abs(p.e)
        if all(
            min(v) >= reach and max(v) <= n - reach
            for v, n in zip(zip(*corners, strict=True), sizes, strict=True)
        ):
            return None
        inside = np.zeros((leaf.height, leaf.width), dtype=bool)
        for shift in (0.0,) if self._samples % 2 else (-0.5 / self._samples, 0.5 / self._samples):
            x = p.a * (col + shift) + p.b * (row + shift) + p.c
            y = p.d * (col + shift) + p.e * (row + shift) + p.f
            within = (x >= -FRAME_TOL_PX) & (x <= sizes[0] + FRAME_TOL_PX)
            inside |= within & (y >= -FRAME_TOL_PX) & (y <= sizes[1] + FRAME_TOL_PX)
        return inside


def _rounded(affine: Affine) -> Affine:
    """Coefficients as multiples of 2^-29 px (5e-7 px over a cell)."""
    return Affine(*(round(v * _STEPS_PER_PX) / _STEPS_PER_PX for v in affine[:6]))
