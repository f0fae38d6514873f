"""From returns to ground, terrain and the canopy's surface: the arithmetic on the points of one block.

Each step looks no farther than a stated distance (noise `NOISE_REACH_M`, the cloth `CLOTH_MARGIN_M`, the
terrain `TERRAIN_REACH_M`), so that a block read with that margin equals the whole to within a centimetre.

A pit is a pixel whose pulses all slipped through the crown. Khosravipour et al. (2014,
doi:10.14358/PERS.80.9.863) close pits by triangulating, height level by height level, the returns above it
and dropping triangles with long sides. A grey-scale closing does the same at every level at once; here it is
the least of four closings by short lines (row, column, both diagonals), so that only what is narrow in EVERY
direction is closed: a hole in a crown, but not the gap between two rows of trees.
"""

from __future__ import annotations

import contextlib
import ctypes
import itertools
import os
import sys
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from scipy import ndimage

from canopy.geo.grid import Grid

# What a return is to a canopy model. ASPRS LAS 1.4 classes; 64-67 as IGN's LiDAR HD uses them.
OTHER, GROUND, BUILDING, WATER, BRIDGE, WIRE, NOISE = range(7)
KIND_OF_CLASS = np.full(256, OTHER, np.uint8)
for _kind, _classes in {
    GROUND: (2,),
    BUILDING: (6, 64, 67),  # 64, 67: lasting structures that are no building
    WATER: (9,),
    BRIDGE: (17, 19),  # 19: overhead structure, e.g. a gantry or conveyor
    WIRE: (13, 14, 15, 16),
    NOISE: (7, 18, 65, 66),  # 65: artefact, 66: virtual point that no pulse returned
}.items():
    KIND_OF_CLASS[list(_classes)] = _kind
# Returns farther below the terrain are multipath; the tallest tree known is 116 m.
BELOW_M, ABOVE_M = 1.0, 130.0

# A return with at most MAX_LONELY returns (itself included) in the 3 x 3 x 3 voxels around it is noise:
# birds, cloud, multipath. At one return per square metre a tree top of three metres still has more company.
VOXEL_XY_M, VOXEL_Z_M, MAX_LONELY = 4.0, 3.0, 3
NOISE_REACH_M = 2 * VOXEL_XY_M
# Ground gaps wider than twice this have no terrain: a 60 m disc without one ground return is a lake or a
# roof, or a canopy under which the ground is a guess.
MAX_CIRCUMRADIUS_M = 30.0
TERRAIN_REACH_M = 2 * MAX_CIRCUMRADIUS_M
# Ground returns are averaged in cells of about this side before they are triangulated.
THIN_M = 1.0
EDGE_PX = 3
# The cloth: Zhang et al. 2016, doi:10.3390/rs8060501, with their values for steep terrain.
# Stiffer cloth leaves a quarter of a mountain forest without ground, and gains nothing on the flat.
CLOTH_M, CLOTH_RIGIDNESS, CLOTH_STEPS, CLOTH_TOUCH_M = 1.0, 1, 500, 0.5
CLOTH_MARGIN_M = 40.0


def lonely(points: np.ndarray) -> np.ndarray:
    """Bool of the points' length: noise by isolation. Returns near the edge lack company: bring a margin."""
    if not len(points):
        return np.zeros(0, bool)
    steps = (VOXEL_XY_M, VOXEL_XY_M, VOXEL_Z_M)
    axes = np.column_stack(
        [
            np.floor(points[a].astype(np.float64) / s).astype(np.int64)
            for a, s in zip("xyz", steps, strict=True)
        ]
    )
    axes -= axes.min(axis=0) - 1
    # One number a voxel, with a free voxel between rows, so that steps never lead into another row.
    strides = np.array([(axes[:, 1].max() + 2) * (axes[:, 2].max() + 2), axes[:, 2].max() + 2, 1])
    voxels, index, counts = np.unique(axes @ strides, return_inverse=True, return_counts=True)
    total = np.zeros(len(voxels), np.int64)
    for step in itertools.product((-1, 0, 1), repeat=3):
        wanted = voxels + np.dot(step, strides)
        at = np.minimum(np.searchsorted(voxels, wanted), len(voxels) - 1)
        total += np.where(voxels[at] == wanted, counts[at], 0)
    return total[index] <= MAX_LONELY


# ---- ground returns ---------------------------------------------------------------------------
def classified_ground(points: np.ndarray, pixel: float) -> np.ndarray:
    """(n, 3) float64 mean x, y, z of the ground-class returns of each thinning cell."""
    ground = points[points["kind"] == GROUND]
    _, index, counts = np.unique(_thin_cells(ground, pixel), return_inverse=True, return_counts=True)
    # bincount adds in the points' order, which is that of the input: the same in every cutting.
    sums = [np.bincount(index, ground[a].astype(np.float64), len(counts)) for a in "xyz"]
    return np.column_stack(sums) / counts[:, None] if len(counts) else np.zeros((0, 3))


def cloth_ground(points: np.ndarray, pixel: float) -> np.ndarray:
    """(n, 3) float64 ground returns, found by a cloth laid under the lowest return of every thinning cell.

    Structures that the file names take no part.
    """
    points = points[~np.isin(points["kind"], (BUILDING, BRIDGE, WIRE))]
    if len(points) < 3:
        return np.zeros((0, 3))
    cells = _thin_cells(points, pixel)
    order = np.lexsort((points["y"], points["x"], points["z"], cells))
    low = points[order[np.r_[True, np.diff(cells[order]) > 0]]]
    xyz = np.column_stack([low[a].astype(np.float64) for a in "xyz"])
    # Near the origin: the library keeps its own arithmetic from there.
    return xyz[_drape(xyz - np.floor(xyz.min(axis=0)))]


def _drape(xyz: np.ndarray) -> np.ndarray:
    """Bool (n,): which points the cloth touches."""
    import _CSF
    import CSF

    # Its threads race for the cloth's nodes; one thread gives one answer.
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(_CSF.__file__).omp_set_num_threads(1)
    cloth = CSF.CSF()
    cloth.params.bSloopSmooth = True
    cloth.params.cloth_resolution = CLOTH_M
    cloth.params.rigidness = CLOTH_RIGIDNESS
    cloth.params.interations = CLOTH_STEPS
    cloth.params.class_threshold = CLOTH_TOUCH_M
    touched, rest = CSF.VecInt(), CSF.VecInt()
    with _silent_stdout():
        cloth.setPointCloud(np.ascontiguousarray(xyz))
        cloth.do_filtering(touched, rest, False)
    found = np.zeros(len(xyz), bool)
    found[np.array(touched, np.int64)] = True
    return found


@contextlib.contextmanager
def _silent_stdout() -> Iterator[None]:
    """Keep a C++ library from talking on our stdout, which belongs to results."""
    sys.stdout.flush()
    saved, nowhere = os.dup(1), os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 1)
        yield
    finally:
        os.dup2(saved, 1)
        os.close(saved)
        os.close(nowhere)


def _thin_cells(points: np.ndarray, pixel: float) -> np.ndarray:
    """One int64 per point: its thinning cell, a whole number of pixels on the global lattice."""
    side = max(1, round(THIN_M / pixel)) * pixel
    row = np.floor(-points["y"] / side).astype(np.int64)
    col = np.floor(points["x"] / side).astype(np.int64)
    return row * 2**28 + col


# ---- terrain ----------------------------------------------------------------------------------
def terrain(ground: np.ndarray, grid: Grid) -> np.ndarray:
    """Elevation in metres at the pixel centres of a grid, float64 (height, width); NaN where unknown.

    Linear on the Delaunay triangles of the ground points (n, 3), of which only those with a circumradius of
    at most `MAX_CIRCUMRADIUS_M` count. Such a triangle is Delaunay if and only if its circumcircle is empty,
    and the circle of one that covers a pixel lies within `TERRAIN_REACH_M` of it: so the points farther away
    cannot matter. Beyond the outermost ground points the slope goes on for `EDGE_PX`.
    """
    plane = np.full(grid.shape, np.nan)
    if len(ground) >= 3:
        # Near the origin: circles through points at seven digits lose theirs.
        origin = np.floor(grid.bounds[:2])
        centres: Any = np.mgrid[: grid.height, : grid.width].reshape(2, -1) + 0.5
        at = np.column_stack(grid.xy(*centres)) - origin
        plane = _linear(ground[:, :2] - origin, ground[:, 2], at).reshape(grid.shape)
    for _ in range(EDGE_PX):
        plane = _grow(plane)
    return plane


def _linear(xy: np.ndarray, z: np.ndarray, at: np.ndarray) -> np.ndarray:
    """Elevation at places (m, 2); NaN where no fit triangle covers them."""
    from scipy.interpolate import LinearNDInterpolator
    from scipy.spatial import Delaunay, QhullError

    try:
        mesh = Delaunay(xy)
    except QhullError:  # fewer than three points that are not on one line
        return np.full(len(at), np.nan)
    a, b, c = (xy[mesh.simplices[:, k]] for k in range(3))
    sides = [np.hypot(*(p - q).T) for p, q in ((a, b), (b, c), (c, a))]
    (ux, uy), (vx, vy) = (b - a).T, (c - a).T
    area = np.abs(ux * vy - uy * vx) / 2
    with np.errstate(divide="ignore", invalid="ignore"):
        fit = sides[0] * sides[1] * sides[2] / (4 * area) <= MAX_CIRCUMRADIUS_M
    found = mesh.find_simplex(at)
    return np.where((found >= 0) & fit[found], LinearNDInterpolator(mesh, z)(at), np.nan)


def _grow(plane: np.ndarray) -> np.ndarray:
    """One more pixel around what is known: the mean, over eight directions, of the line through two."""
    h, w = plane.shape
    wide = np.pad(plane, 2, constant_values=np.nan)
    total, count = np.zeros((h, w)), np.zeros((h, w))
    for dy in (-1, 0, 1):
        for dx in (-1, 0, 1):
            if dy or dx:
                near = wide[2 + dy : 2 + dy + h, 2 + dx : 2 + dx + w]
                far = wide[2 + 2 * dy : 2 + 2 * dy + h, 2 + 2 * dx : 2 + 2 * dx + w]
                line = 2 * near - far
                good = np.isfinite(line)
                total += np.where(good, line, 0)
                count += good
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(np.isfinite(plane), plane, total / count)


def elevation_at(plane: np.ndarray, grid: Grid, x: Any, y: Any) -> np.ndarray:
    """Terrain under points, metres: bilinear between pixel centres, among those that are known; else NaN."""
    known = np.isfinite(plane)
    at = [axis - 0.5 for axis in grid.rowcol(x, y)]
    total = ndimage.map_coordinates(np.where(known, plane, 0.0), at, order=1, mode="grid-constant")
    weight = ndimage.map_coordinates(known.astype(np.float64), at, order=1, mode="grid-constant")
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(weight > 1e-9, total / weight, np.nan)


# Pits are at least so deep and lie in vegetation at least so high.
PIT_DEPTH_M, PIT_RIM_M = 1.0, 2.0
# Returns without a class that stand on a named roof or bridge and rise less above it belong to it.
ON_TOP_M = 2.0


def highest(
    kinds: np.ndarray, above: np.ndarray, cell: np.ndarray, shape: tuple[int, int],
    policies: Mapping[int, str], classified: bool,
) -> tuple[np.ndarray, np.ndarray, np.ndarray, int]:  # fmt: skip
    """Highest canopy return per pixel.

    A pixel is a structure's where the structure is its highest return; a crown that overhangs a roof by more
    than `ON_TOP_M` counts as a crown. Wires hide nothing: zeroed, they leave what stands below them.

    Args:
        kinds, above, cell: of each return its kind, its height above the terrain (metres, NaN where there is
            none) and its flat pixel index.
        shape: (height, width) of the window.
        policies: what becomes of BUILDING, WATER, BRIDGE, WIRE: `zero` (0 m of canopy), `mask` (nodata) or
            `keep` (as canopy).
        classified: ground-class returns are ground by definition and have height 0.

    Returns:
        Arrays (height, width): metres, NaN unknown; returns per pixel; structures, not to be closed as pits.
        And how many returns were impossible.
    """
    known = np.isfinite(above)
    wrong = known & ((above < -BELOW_M) | (above > ABOVE_M))
    kinds, above, cell, known = (a[~wrong] for a in (kinds, above, cell, known))
    size = shape[0] * shape[1]
    count = np.bincount(cell, minlength=size)
    above = np.maximum(above, 0.0)
    if classified:
        above = np.where(kinds == GROUND, 0.0, above)
    canopy, solid, masked = (np.full(size, -np.inf) for _ in range(3))
    plain = known.copy()
    for kind, policy in policies.items():
        of_kind = kinds == kind
        if policy == "keep" or not of_kind.any():
            continue
        plain &= ~of_kind
        # Without terrain below (a large roof, a lake) the structure is still known to be one.
        tops = np.where(known[of_kind], above[of_kind], np.inf)
        if kind != WIRE:
            np.maximum.at(solid, cell[of_kind], tops)
        elif policy == "zero":
            np.maximum.at(canopy, cell[of_kind], 0.0)
        if policy == "mask":
            np.maximum.at(masked, cell[of_kind], tops)
    np.maximum.at(canopy, cell[plain], above[plain])
    hidden = (solid > -np.inf) & (canopy <= solid + ON_TOP_M)
    canopy = np.where(hidden, 0.0, canopy)
    gone = (masked > -np.inf) & (hidden | (canopy <= masked))
    height = np.where(gone | ~np.isfinite(canopy), np.nan, canopy)
    fixed = (hidden | gone).reshape(shape)
    return height.reshape(shape), count.reshape(shape), fixed, int(wrong.sum())


def close_pits(height: np.ndarray, fixed: np.ndarray, widest: int) -> np.ndarray:
    """Metres (h, w) with pits of up to `widest` pixels raised to their lowest rim; see the module's head.

    Never lowers a pixel and never touches one that is NaN or `fixed`. A pixel's result depends on those
    within `widest` of it.
    """
    if widest < 1:
        return height
    # Beyond the window nothing is known.
    low = np.pad(np.where(np.isfinite(height), height, -np.inf), 2 * widest, constant_values=-np.inf)
    line = np.ones((1, widest + 1), bool)
    slant = np.eye(widest + 1, dtype=bool)
    lines = (line, line.T, slant, slant[::-1])
    closed = np.min([ndimage.grey_closing(low, footprint=one) for one in lines], axis=0)
    closed = closed[2 * widest : -2 * widest, 2 * widest : -2 * widest]
    with np.errstate(invalid="ignore"):
        pit = np.isfinite(height) & ~fixed & (closed - height > PIT_DEPTH_M) & (closed >= PIT_RIM_M)
    return np.where(pit, closed, height)


def fill_gaps(height: np.ndarray, empty: np.ndarray, steps: int) -> np.ndarray:
    """Pixels without returns (`empty`) within `steps` of known ones get the mean of known neighbours."""
    around = np.ones((3, 3))
    for _ in range(steps):
        known = np.isfinite(height)
        total = ndimage.convolve(np.where(known, height, 0.0), around, mode="constant")
        count = ndimage.convolve(known.astype(np.float64), around, mode="constant")
        with np.errstate(invalid="ignore", divide="ignore"):
            height = np.where(empty & ~known, total / count, height)
    return height
