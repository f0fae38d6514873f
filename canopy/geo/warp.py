"""Resampling that does not depend on the window asked for.

GDAL's warper chooses kernels, approximations and chunks from the window it is given, so the same pixel
can come out differently in two windows. Here every pixel's value is a function of the source and of
the pixel's place on the target's global lattice alone:

* positions: exact PROJ coordinates on every 16th lattice node, bilinear between them (the error is the
  projection's curvature over 16 px: microns at 0.6 m, below 0.005 px at 1 km);
* shrinking by more than 1.5: the mean over the target pixel, as a block mean on the source's own
  lattice followed by k x k bilinear samples;
* otherwise bilinear, Keys' cubic (a = -0.5), or nearest at the pixel's centre.

An output pixel is valid when its centre is within the source's frame and every source pixel that
enters its value is valid: nodata never bleeds into a value and never gets one. Beyond the frame's edge
the edge pixel is repeated, so that two files that touch leave no gap between them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from odc.geo import CRS

from canopy.errors import InputError
from canopy.geo.crs import METRES_PER_DEGREE, metres_per_unit, transformer, x_period
from canopy.geo.grid import Grid
from canopy.geo.opening import SourcePlace

NODE_PX = 16
RESAMPLING = ("nearest", "bilinear", "cubic", "average")
AVERAGE_ABOVE = 1.5
# A neighbour with less weight than this neither adds to a value nor makes it invalid (float noise).
WEIGHT_TOL = 1e-3
STRIP_SAMPLES = 1 << 15

# (row0, col0, height, width) of the source -> values (b, h, w) any dtype, valid (h, w)
Reader = Callable[[int, int, int, int], tuple[np.ndarray, np.ndarray]]


# source (b, h, w) float32, valid (h, w), rows, cols in source pixels -> values (b, ...), valid (...)
# (valid None: all of it is)
Kernel = Callable[[np.ndarray, np.ndarray | None, np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]


@dataclass(frozen=True)
class WarpPlan:
    """How one source goes onto one target lattice; the same for every window of that lattice.

    `block`: side of the source blocks averaged first (1 = none); `samples`: k of k x k samples per
    target pixel; `kernel`: nearest, bilinear or cubic, on the block means.
    """

    place: SourcePlace
    kernel: str
    block: int
    samples: int


def plan_warp(place: SourcePlace, grid: Grid, resampling: str | None) -> WarpPlan:
    """Choose the steps from the scale at the source's centre, never from the window.

    `resampling` None means average when shrinking by more than 1.5, else bilinear.
    """
    if resampling is not None and resampling not in RESAMPLING:
        raise InputError(f"resampling {resampling!r}", expected=" or ".join(RESAMPLING))
    kernel = resampling or "average"
    if kernel in ("nearest", "cubic"):
        return WarpPlan(place, kernel, 1, 1)
    shrink = shrink_factor(place, grid.crs, grid.pixel)
    if kernel == "bilinear" or shrink <= AVERAGE_ABOVE:
        return WarpPlan(place, "bilinear", 1, 1)
    block = max(1, int(shrink / 2 + 1e-6))
    return WarpPlan(place, "bilinear", block, int(np.ceil(shrink / block - 1e-6)))


@lru_cache(maxsize=1024)
def shrink_factor(place: SourcePlace, crs: CRS, pixel: tuple[float, float]) -> float:
    """Source pixels per target pixel (geometric mean of both axes) at the source's centre."""
    row, col = place.height / 2, place.width / 2
    x, y = place.xy(np.array([row, row, row + 1]), np.array([col, col + 1, col]))
    x, y = transformer(place.crs, crs).transform(x, y)
    jacobian = np.array([[x[1] - x[0], x[2] - x[0]], [y[1] - y[0], y[2] - y[0]]])
    area = abs(np.linalg.det(jacobian)) / (pixel[0] * pixel[1])
    if not np.isfinite(area) or area == 0:
        # A source so large that its centre is out of the target's domain: compare sizes on the ground.
        source_size = abs(place.transform.determinant) ** 0.5 * _metres_per_unit(place.crs)
        return float(round((pixel[0] * pixel[1]) ** 0.5 * _metres_per_unit(crs) / source_size, 6))
    return float(round(area**-0.5, 6))


def _metres_per_unit(crs: CRS) -> float:
    return metres_per_unit(crs) if crs.projected else METRES_PER_DEGREE


def warp_window(plan: WarpPlan, grid: Grid, read: Reader, bands: int) -> tuple[np.ndarray, np.ndarray]:
    """Values float32 (bands, h, w) and valid (h, w) of a target window; `read` gives source pixels.

    `read` is asked only for windows inside the source.
    """
    values = np.zeros((bands, *grid.shape), dtype=np.float32)
    valid = np.zeros(grid.shape, dtype=bool)
    step = _chunk_px(plan)
    for row in range(0, grid.height, step):
        for col in range(0, grid.width, step):
            part = grid.window(row, col, min(step, grid.height - row), min(step, grid.width - col))
            done = _warp_chunk(plan, part, read)
            if done is not None:
                here = np.s_[row : row + part.height, col : col + part.width]
                values[:, *here], valid[here] = done
    return values, valid


def _chunk_px(plan: WarpPlan) -> int:
    """Side of a target chunk whose source is about 2048 px wide: memory does not grow with windows."""
    return max(64, 2048 // (plan.block * plan.samples))


def _warp_chunk(plan: WarpPlan, grid: Grid, read: Reader) -> tuple[np.ndarray, np.ndarray] | None:
    """Values and valid of one chunk, or None when it lies outside the source."""
    rows, cols = source_positions(plan.place, grid, plan.samples)
    height, width = plan.place.height, plan.place.width
    with np.errstate(invalid="ignore"):
        inside = (rows >= 0) & (rows < height) & (cols >= 0) & (cols < width)
    if not inside.any():
        return None
    reach = 2 * plan.block + 2
    r0, r1 = _span(rows, height, reach, plan.block)
    c0, c1 = _span(cols, width, reach, plan.block)
    if r0 >= r1 or c0 >= c1:
        return None
    source, source_valid = read(r0, c0, r1 - r0, c1 - c0)
    source = np.where(source_valid, source, 0).astype(np.float32)
    if plan.block > 1:
        source, source_valid = block_mean(source, source_valid, plan.block)
    rows, cols = (rows - r0) / plan.block, (cols - c0) / plan.block
    all_or_mask = None if source_valid.all() else source_valid
    values, valid = _in_strips(_KERNELS[plan.kernel], source, all_or_mask, rows, cols)
    return _gather_samples(values, valid, inside, plan.samples)


def _in_strips(
    kernel: Kernel, source: np.ndarray, source_valid: np.ndarray | None, rows: np.ndarray, cols: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Run a kernel over a few rows at a time: its temporaries then stay in the processor's cache."""
    values = np.empty((source.shape[0], *rows.shape), dtype=np.float32)
    valid = np.empty(rows.shape, dtype=bool)
    step = max(1, STRIP_SAMPLES // rows.shape[1])
    for top in range(0, rows.shape[0], step):
        here = np.s_[top : top + step]
        values[:, here], valid[here] = kernel(source, source_valid, rows[here], cols[here])
    return values, valid


def _gather_samples(
    values: np.ndarray, valid: np.ndarray, inside: np.ndarray, k: int
) -> tuple[np.ndarray, np.ndarray]:
    """Mean of k x k samples; samples beyond the frame repeat its edge and have no say in validity."""
    if k == 1:
        valid = valid & inside
        return np.where(valid, values, 0), valid
    h, w = valid.shape[0] // k, valid.shape[1] // k
    centre = _centre_inside(inside.reshape(h, k, w, k), k)
    valid = (valid | ~inside).reshape(h, k, w, k).all(axis=(1, 3)) & centre
    mean = values.reshape(-1, h, k, w, k).mean(axis=(2, 4), dtype=np.float32)
    return np.where(valid, mean, 0), valid


def _centre_inside(inside: np.ndarray, k: int) -> np.ndarray:
    """Whether a pixel's centre is in the frame, told from its middle samples (h, k, w, k) -> (h, w)."""
    low, high = (k - 1) // 2, k // 2
    # For an even k the centre lies between four samples; the upper-left one stands for it, which
    # gives each pixel on a border between two files to exactly one of them or to both, never to none.
    return inside[:, low, :, low] | inside[:, high, :, high]


# ---- positions --------------------------------------------------------------------------------
def source_positions(place: SourcePlace, grid: Grid, k: int = 1) -> tuple[np.ndarray, np.ndarray]:
    """Source (row, col) of the centres of k x k sub-pixels, float64 (h*k, w*k); NaN where undefined.

    Corner convention: (0.5, 0.5) is the centre of the first source pixel.
    """
    row0, col0, row_phase, col_phase = grid.lattice
    sub_rows = row0 + (np.arange(grid.height * k) + 0.5) / k
    sub_cols = col0 + (np.arange(grid.width * k) + 0.5) / k
    node_rows = np.arange(row0 // NODE_PX, -(-(row0 + grid.height) // NODE_PX) + 1) * NODE_PX
    node_cols = np.arange(col0 // NODE_PX, -(-(col0 + grid.width) // NODE_PX) + 1) * NODE_PX
    px, py = grid.pixel
    x, y = np.meshgrid((node_cols + col_phase) * px, -(node_rows + row_phase) * py)
    if place.crs != grid.crs:
        x, y = transformer(grid.crs, place.crs).transform(x, y)
        x, y = np.where(np.isfinite(x), x, np.nan), np.where(np.isfinite(y), y, np.nan)
    ri, rf = _cells(sub_rows, node_rows[0])
    ci, cf = _cells(sub_cols, node_cols[0])
    period = x_period(place.crs)
    if period is None:
        nodes_r, nodes_c = place.rowcol(x, y)
        return _between(nodes_r, ri, rf, ci, cf), _between(nodes_c, ri, rf, ci, cf)
    # x jumps at the antimeridian: made continuous between nodes, then put where the source counts it.
    # Both by the source's own turn where they can be: the same sum, to the last bit, in every window.
    middle = place.xy(place.height / 2, place.width / 2)[0]
    finite = x[np.isfinite(x)]
    x = _in_turn(x, float(_in_turn(finite[:1], middle, period)[0]) if finite.size else middle, period)
    dense_x = _in_turn(_between(x, ri, rf, ci, cf), middle, period)
    return place.rowcol(dense_x, _between(y, ri, rf, ci, cf))


def _cells(position: np.ndarray, first_node: int) -> tuple[np.ndarray, np.ndarray]:
    """Node index and fraction of positions in lattice pixels."""
    in_nodes = position / NODE_PX
    whole = np.floor(in_nodes)
    return (whole - first_node // NODE_PX).astype(np.int64), in_nodes - whole


def _between(nodes: np.ndarray, ri: np.ndarray, rf: np.ndarray, ci: np.ndarray, cf: np.ndarray) -> np.ndarray:
    """Bilinear values between nodes, separably: rows first, then columns."""
    lines = nodes[ri] * (1 - rf)[:, None] + nodes[ri + 1] * rf[:, None]
    return lines[:, ci] * (1 - cf) + lines[:, ci + 1] * cf


def _in_turn(x: np.ndarray, middle: float, period: float) -> np.ndarray:
    """x moved by whole turns to within half a turn of `middle`."""
    return x - period * np.round((x - middle) / period)


def _span(position: np.ndarray, size: int, reach: int, block: int) -> tuple[int, int]:
    """Source interval that positions need, clipped to the source and widened to whole blocks."""
    finite = position[np.isfinite(position)]
    first = int(np.floor(np.clip(finite.min() - reach, 0, size))) // block * block
    last = int(np.ceil(np.clip(finite.max() + reach, 0, size)))
    return first, min(size, -(-last // block) * block)


# ---- kernels ----------------------------------------------------------------------------------
def block_mean(values: np.ndarray, valid: np.ndarray, block: int) -> tuple[np.ndarray, np.ndarray]:
    """Means (b, h, w) of block x block pixels and where all of a block is valid.

    The last row or column of blocks may be cut by the source's edge: their mean is over what exists.
    """
    _, h, w = values.shape
    pad_h, pad_w = -h % block, -w % block
    if pad_h or pad_w:  # repeat the means of what exists by padding with zero weight
        weight = np.pad(np.ones((h, w), np.float32), ((0, pad_h), (0, pad_w)))
        values = np.pad(values, ((0, 0), (0, pad_h), (0, pad_w)))
        valid = np.pad(valid, ((0, pad_h), (0, pad_w)), constant_values=True)
        count = _block_view(weight[None], block).sum(axis=(2, 4))
    else:
        count = np.float32(block * block)
    total = _block_view(values, block).sum(axis=(2, 4), dtype=np.float32)
    whole: np.ndarray = np.logical_and.reduce(_block_view(valid[None], block), axis=(2, 4))
    return total / count, whole[0]


def _block_view(array: np.ndarray, block: int) -> np.ndarray:
    b, h, w = array.shape
    return array.reshape(b, h // block, block, w // block, block)


def _taps(position: np.ndarray, size: int, count: int) -> tuple[np.ndarray, np.ndarray]:
    """First tap's index (of `count`) and the fraction past tap count//2 - 1; NaN positions give 0."""
    centred = np.nan_to_num(position - 0.5, nan=0.0)
    centred = np.clip(centred, 0.0, size - 1.0)  # beyond the frame the edge pixel repeats
    whole = np.floor(centred)
    return whole.astype(np.int64) - (count // 2 - 1), (centred - whole).astype(np.float32)


def _nearest(
    source: np.ndarray, source_valid: np.ndarray | None, rows: np.ndarray, cols: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    h, w = source.shape[1:]
    r = np.clip(np.floor(np.nan_to_num(rows)), 0, h - 1).astype(np.int64)
    c = np.clip(np.floor(np.nan_to_num(cols)), 0, w - 1).astype(np.int64)
    return source[:, r, c], np.ones(r.shape, dtype=bool) if source_valid is None else source_valid[r, c]


def _bilinear(
    source: np.ndarray, source_valid: np.ndarray | None, rows: np.ndarray, cols: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    r, fr = _taps(rows, source.shape[1], 2)
    c, fc = _taps(cols, source.shape[2], 2)
    return _weighted(source, source_valid, r, c, [1 - fr, fr], [1 - fc, fc])


def _cubic(
    source: np.ndarray, source_valid: np.ndarray | None, rows: np.ndarray, cols: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Keys (1981), a = -0.5; bilinear where one of the outer twelve neighbours is invalid."""
    r, fr = _taps(rows, source.shape[1], 4)
    c, fc = _taps(cols, source.shape[2], 4)
    values, valid = _weighted(source, source_valid, r, c, _keys(fr), _keys(fc))
    near, near_valid = _bilinear(source, source_valid, rows, cols)
    return np.where(valid, values, near), near_valid


def _keys(t: np.ndarray) -> list[np.ndarray]:
    return [
        ((-0.5 * t + 1.0) * t - 0.5) * t,
        (1.5 * t - 2.5) * t * t + 1.0,
        ((-1.5 * t + 2.0) * t + 0.5) * t,
        (0.5 * t - 0.5) * t * t,
    ]


def _weighted(
    source: np.ndarray,
    source_valid: np.ndarray | None,
    row: np.ndarray,
    col: np.ndarray,
    row_weights: list[np.ndarray],
    col_weights: list[np.ndarray],
) -> tuple[np.ndarray, np.ndarray]:
    """Sum of weighted taps, and where every tap that counts is valid."""
    h, w = source.shape[1:]
    flat = source.reshape(source.shape[0], -1)
    flat_valid = None if source_valid is None else source_valid.ravel()
    values = np.zeros((source.shape[0], *row.shape), dtype=np.float32)
    valid = np.ones(row.shape, dtype=bool)
    for i, row_weight in enumerate(row_weights):
        line = np.clip(row + i, 0, h - 1) * w
        for j, col_weight in enumerate(col_weights):
            index = line + np.clip(col + j, 0, w - 1)
            weight = row_weight * col_weight
            values += np.take(flat, index, axis=1) * weight
            if flat_valid is not None:
                valid &= flat_valid[index] | (np.abs(weight) < WEIGHT_TOL)
    return values, valid


_KERNELS = {"nearest": _nearest, "bilinear": _bilinear, "cubic": _cubic}
