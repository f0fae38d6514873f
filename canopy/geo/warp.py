"""Pixels of one grid on another, so that a pixel does not depend on the window it was asked in.

Left to itself GDAL chooses kernel widths, approximations and chunks from the window it is given. Here the way
from target to source is settled first, on 256 px cells of the target's global lattice: the affine through
exact positions of nine points. GDAL then only samples, with a fixed kernel, in pixel space. Where a cell is
bent (huge pixels, a pole, the antimeridian) SciPy samples, at the exact position of each pixel.

* shrinking by more than 1.5: the mean over the target pixel, as block means on the source's own lattice
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

import numpy as np
import rasterio.crs
import rasterio.warp
from affine import Affine
from rasterio.enums import Resampling

from canopy.errors import InputError
from canopy.geo.crs import transformer, x_period
from canopy.geo.grid import Grid
from canopy.geo.place import SourcePlace, lattice_ratio, shrink_factor

CELL_PX = 256
POSITION_TOL_PX = 0.002
AVERAGE_ABOVE = 1.5
KERNELS = {"bilinear": Resampling.bilinear, "nearest": Resampling.nearest}
# Source pixels are read and averaged in pieces of about this side: memory does not grow with the shrink.
PIECE_PX = 2048
# Neighbours that together have less weight than this do not make a value invalid (float noise).
WEIGHT_TOL = 1e-3
# A centre this close to the frame is inside: of two files that touch, at least one has the pixel.
FRAME_TOL_PX = 1e-5
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
    # From the scale at the source's centre, never from the window.
    shrink = shrink_factor(place, grid) if resampling is None else 1.0
    block = max(1, int(shrink / 2 + 1e-6)) if shrink > AVERAGE_ABOVE else 1
    samples = math.ceil(shrink / block - 1e-6) if shrink > AVERAGE_ABOVE else 1
    kernel = KERNELS[resampling or "bilinear"]
    for here, cell in _cells(grid):
        to_source = _ToSource(place, cell)
        for inside in to_source.inside(samples):
            low, means, good = _means_under(place, read, bands, to_source.centres, inside, block)
            got, full = to_source.sample(means, good, low, block, samples, kernel)
            full &= inside
            np.copyto(values[:, *here], got, where=full)
            valid[here] |= full
    return values, valid


def _cells(grid: Grid) -> Iterator[tuple[tuple[slice, slice], Grid]]:
    """What a window has of each cell of its lattice: where in the window, and its grid."""
    row0, col0 = grid.origin_rc
    for top in range(row0 // CELL_PX * CELL_PX, row0 + grid.height, CELL_PX):
        for left in range(col0 // CELL_PX * CELL_PX, col0 + grid.width, CELL_PX):
            r0, c0 = max(top - row0, 0), max(left - col0, 0)
            r1, c1 = min(top - row0 + CELL_PX, grid.height), min(left - col0 + CELL_PX, grid.width)
            yield np.s_[r0:r1, c0:c1], grid.window(r0, c0, r1 - r0, c1 - c0)


# ---- from target to source ------------------------------------------------------------------------
class _ToSource:
    """Where the pixels of a cell lie in the source.

    Attributes:
        centres: source (row, col) of the pixels' centres, (2, h, w); (0, 0) is the source's corner.
        affine: cell (col, row) -> source (col, row), corners; None where the way is not straight.
    """

    def __init__(self, place: SourcePlace, cell: Grid) -> None:
        self._place, self._cell = place, cell
        # Counted from the corner of the whole cell: the same numbers in every window.
        row, col = cell.origin_rc
        self._offset = row % CELL_PX, col % CELL_PX
        steps = np.array([0, CELL_PX / 2, CELL_PX])
        self.affine = _affine_through(self._exactly(steps - self._offset[0], steps - self._offset[1]), steps)
        rows, cols = np.arange(cell.height) + 0.5, np.arange(cell.width) + 0.5
        if self.affine is None:
            self.centres = self._exactly(rows, cols)
        else:
            x, y = np.meshgrid(cols + self._offset[1], rows + self._offset[0])
            self.centres = np.stack((self.affine @ (x, y))[::-1])

    def _exactly(self, rows: np.ndarray, cols: np.ndarray) -> np.ndarray:
        """Source (row, col) of the points of a mesh, in pixels from the window's corner: (2, rows, cols)."""
        row0, col0, row_phase, col_phase = self._cell.lattice
        px, py = self._cell.pixel
        x, y = np.meshgrid((col0 + cols + col_phase) * px, -(row0 + rows + row_phase) * py)
        place = self._place
        if place.crs != self._cell.crs:
            x, y = transformer(self._cell.crs, place.crs).transform(x, y)
        if (period := x_period(place.crs)) is not None:  # whole turns round the Earth do not count
            x = x - period * np.round((x - place.xy(place.height / 2, place.width / 2)[0]) / period)
        return np.stack(place.rowcol(x, y))

    def inside(self, k: int) -> list[np.ndarray]:
        """Which centres lie in the source's frame, (h, w); empty where none does.

        Among an even number of samples a centre lies between two: it is inside where one of them is. Of a
        source around the whole Earth its two halves apart, which may meet at the antimeridian.
        """
        place, (row, col), p = self._place, self.centres, self.affine
        inside = np.zeros(row.shape, dtype=bool)
        for shift in (0.0,) if k % 2 or p is None else (-0.5 / k, 0.5 / k):
            dr, dc = (shift * (p.d + p.e), shift * (p.a + p.b)) if p is not None else (0.0, 0.0)
            within = (row + dr >= -FRAME_TOL_PX) & (row + dr <= place.height + FRAME_TOL_PX)
            inside |= within & (col + dc >= -FRAME_TOL_PX) & (col + dc <= place.width + FRAME_TOL_PX)
        around = abs(place.transform.a) * place.width > 0.5 * (x_period(place.crs) or math.inf)
        west = col < place.width / 2
        return [part for part in ((inside & west, inside & ~west) if around else (inside,)) if part.any()]

    def sample(
        self, means: np.ndarray, good: np.ndarray, low: np.ndarray, block: int, k: int, kernel: Resampling
    ) -> tuple[np.ndarray, np.ndarray]:
        """Values (b, h, w) and validity (h, w): means of k x k samples of block means that begin at `low`."""
        clean = bool(good.all())
        source = means if clean else np.concatenate([means, good[None]], dtype=np.float32)
        h, w = self._cell.shape
        out: np.ndarray = np.zeros((len(source), h * k, w * k), dtype=np.float32)
        if self.affine is not None:
            offset = Affine.translation(self._offset[1], self._offset[0])
            straight = Affine.translation(-low[1], -low[0]) @ Affine.scale(1 / block) @ self.affine @ offset
            rasterio.warp.reproject(
                source,
                out,
                # Twice the pixel, which is as exact: GDAL takes the identity for a missing geotransform.
                src_transform=Affine.scale(2),
                dst_transform=Affine.scale(2) @ straight @ Affine.scale(1 / k),
                src_crs=_ANY_CRS,
                dst_crs=_ANY_CRS,
                resampling=kernel,
                init_dest_nodata=False,
                XSCALE="1",
                YSCALE="1",
            )
        else:
            from scipy import ndimage  # rarely needed, and slow to import

            at = self._exactly((np.arange(h * k) + 0.5) / k, (np.arange(w * k) + 0.5) / k) / block
            at = np.nan_to_num(at, posinf=0.0, neginf=0.0) - low[:, None, None] - 0.5
            order = 0 if kernel == Resampling.nearest else 1
            for band, into in zip(source, out, strict=True):
                ndimage.map_coordinates(band.astype(np.float32), at, into, order, "nearest", prefilter=False)
        full = np.ones(out.shape[1:], dtype=bool)
        if not clean:
            out, share = out[:-1], out[-1]
            full = share >= 1 - WEIGHT_TOL
            out /= np.where(full, share, 1)
        if k > 1:
            out, full = _block_sums(out, k) / np.float32(k * k), _all_good(full, k)
        return out, full


def _affine_through(nine: np.ndarray, steps: np.ndarray) -> Affine | None:
    """The affine from a cell's (col, row) to nine source (row, col), (2, 3, 3); None where none fits."""
    u, v = np.meshgrid(steps, steps)
    terms = np.stack([u.ravel(), v.ravel(), np.ones(9)], axis=1)
    if not np.isfinite(nine).all():
        return None
    found, *_ = np.linalg.lstsq(terms, nine.reshape(2, 9).T[:, ::-1], rcond=None)
    if np.abs(terms @ found - nine.reshape(2, 9).T[:, ::-1]).max() > POSITION_TOL_PX:
        return None
    # Rounded to 5e-7 px over a cell: whole pixels stay whole, and take nothing of their neighbours.
    return Affine(*np.round(found.T.ravel() * 2**29) / 2**29)


def _means_under(
    place: SourcePlace, read: Reader, bands: int, centres: np.ndarray, inside: np.ndarray, block: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Block (row, col) of the first, block means and their validity, under the `centres` that are inside.

    The frame's edge is repeated a little way, for kernels that reach beyond it.
    """
    reach, known = 4, [axis[inside] / block for axis in centres]
    blocks = -(-np.array([place.height, place.width]) // block)
    low = np.array([math.floor(axis.min()) - reach for axis in known])
    high = np.array([math.ceil(axis.max()) + reach for axis in known])
    first, last = np.maximum(low, 0), np.minimum(high, blocks)
    means, good = _block_means(place, read, bands, (*(first * block), *(last - first)), block)
    pads = tuple(zip(first - low, high - last, strict=True))
    if np.any(pads):
        means, good = np.pad(means, ((0, 0), *pads), mode="edge"), np.pad(good, pads, mode="edge")
    return low, means, good


# ---- whole pixels ---------------------------------------------------------------------------------
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
        return _framed(place, read, bands, window, outside=False)
    means = np.zeros((bands, height, width), dtype=np.float32)
    whole = np.zeros((height, width), dtype=bool)
    step = max(1, PIECE_PX // block)
    for i in range(0, height, step):
        for j in range(0, width, step):
            h, w = min(step, height - i), min(step, width - j)
            row, col, here = top + i * block, left + j * block, np.s_[i : i + h, j : j + w]
            got, good = _framed(place, read, bands, (row, col, h * block, w * block), outside=True)
            counts = _overlap(row, h, block, place.height)[:, None] * _overlap(col, w, block, place.width)
            means[:, *here] = _block_sums(got, block) / np.maximum(counts, 1)
            whole[here] = _all_good(good, block) & (counts > 0)
    return means, whole


def _framed(
    place: SourcePlace, read: Reader, bands: int, window: tuple[int, int, int, int], outside: bool
) -> tuple[np.ndarray, np.ndarray]:
    """Pixels of a window that may reach outside, 0 where not valid, and validity (there: `outside`)."""
    row, col, height, width = window
    top, bottom = (min(max(r, 0), place.height) for r in (row, row + height))
    left, right = (min(max(c, 0), place.width) for c in (col, col + width))
    if top >= bottom or left >= right:
        return np.zeros((bands, height, width), np.float32), np.full((height, width), outside)
    values, valid = read(top, left, bottom - top, right - left)
    values = values if valid.all() else np.where(valid, values, 0)
    edges = (top - row, row + height - bottom), (left - col, col + width - right)
    if np.any(edges):
        values, valid = np.pad(values, ((0, 0), *edges)), np.pad(valid, edges, constant_values=outside)
    return values, valid


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
