"""Which returns are noise, which are ground, and the terrain between them.

Each step looks no farther than a stated distance, so that neighbouring blocks agree on their common edge:
noise `NOISE_REACH_M`, the cloth `CLOTH_MARGIN_M` (run per block of the fixed lattice; a point's label is that
of its own block), the terrain `TERRAIN_REACH_M`.

From returns above the terrain to the canopy's surface: highest return per pixel, structures, pits.

A pit is a pixel whose pulses all slipped through the crown. Khosravipour et al. (2014,
doi:10.14358/PERS.80.9.863) close pits by triangulating, height level by height level, the returns above it
and dropping triangles with long sides. A grey-scale closing does the same at every level at once; here it is
the least of four closings by short lines (row, column, both diagonals), so that only what is narrow in EVERY
direction is closed: a hole in a crown, but not the gap between two rows of trees.

The two passes over the blocks of a point cloud, in this process or in several.

Pass one finds noise and ground, block by block; pass two lays the terrain and the canopy's surface. Blocks
are squares of a fixed global lattice, and each step reads as far beyond its block as it looks, so a pixel
does not depend on the area that was asked for, on the order of the work, or on who did it.

What CHM to make: the options, and the CRS and grid that follow from them and from the input.

Lidar to canopy height: point clouds, or a surface and a terrain raster, to a CHM in metres.

`chm_from_points` is the job behind `canopy data chm`. Points are streamed once into blocks on disk
(`lidar_points`), noise and ground are found (`lidar_ground`), and each block's surface is made
(`lidar_blocks`, `lidar_surface`). Memory holds one chunk of input and, per worker, one block with its margin.

A surface model minus a terrain model: the CHM of lidar that somebody else has already gridded.
"""

from __future__ import annotations

import contextlib
import ctypes
import math
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import shapely
from odc.geo import CRS
from rasterio.io import DatasetReader

from canopy import __version__
from canopy.errors import AreaError, CanopyError, DataError, InputError, MissingDependencyError, OutputError
from canopy.geo.area import AOI
from canopy.geo.cog import CogWriter
from canopy.geo.crs import metres_per_unit, output_crs, project, to_crs, to_lonlat
from canopy.geo.encoding import BandSpec
from canopy.geo.grid import Grid
from canopy.geo.raster import SourcePlace, open_raster, read_window
from canopy.geo.tiles import tiles_over
from canopy.labels.points import (
    BRIDGE,
    BUILDING,
    GROUND,
    METRES,
    RECORD,
    WATER,
    WIRE,
    Blocks,
    LidarFile,
    Spool,
    Tally,
    bounds_in,
    fill,
    open_lidar,
)
from canopy.runtime import NoProgress, Progress, log
from canopy.synth.forest import hash01

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
_JITTER_M = 0.004


def lonely(points: np.ndarray, own: np.ndarray) -> np.ndarray:
    """Bool of the points' length: noise by isolation. Only `own` ones are judged; the others are company.

    Points are RECORDs; every return within `NOISE_REACH_M` of the own ones must be among them.
    """
    steps = (VOXEL_XY_M, VOXEL_XY_M, VOXEL_Z_M)
    axes = [
        np.floor(points[a].astype(np.float64) / s).astype(np.int64) for a, s in zip("xyz", steps, strict=True)
    ]
    axes = [a - a.min() + 1 for a in axes] if len(points) else axes
    spans = [int(a.max()) + 2 if len(a) else 1 for a in axes]
    key = (axes[0] * spans[1] + axes[1]) * spans[2] + axes[2]
    voxels, index, counts = np.unique(key, return_inverse=True, return_counts=True)
    total = np.zeros(len(voxels), np.int64)
    for dx in (-1, 0, 1):
        for dy in (-1, 0, 1):
            for dz in (-1, 0, 1):
                wanted = voxels + (dx * spans[1] + dy) * spans[2] + dz
                at = np.minimum(np.searchsorted(voxels, wanted), len(voxels) - 1)
                total += np.where(voxels[at] == wanted, counts[at], 0)
    return own & (total[index] <= MAX_LONELY)


# ---- ground returns ---------------------------------------------------------------------------
def classified_ground(points: np.ndarray, pixel: float) -> np.ndarray:
    """(n, 3) float64 mean x, y, z of the ground-class returns of each thinning cell."""
    ground = points[points["kind"] == GROUND]
    _, index, counts = np.unique(_thin_cells(ground, pixel), return_inverse=True, return_counts=True)
    # bincount adds in the points' order, which is that of the input: the same in every cutting.
    sums = [np.bincount(index, ground[a].astype(np.float64), len(counts)) for a in "xyz"]
    return np.column_stack(sums) / counts[:, None] if len(counts) else np.zeros((0, 3))


def cloth_ground(points: np.ndarray, own: np.ndarray, pixel: float) -> np.ndarray:
    """(n, 3) float64 ground returns of the own points' cells, found by a cloth laid under the cloud.

    The lowest return of every cell takes part, own or not; structures that the file names do not.
    """
    known = (points["kind"] == BUILDING) | (points["kind"] == BRIDGE) | (points["kind"] == WIRE)
    points, own = points[~known], own[~known]
    if len(points) < 3 or not own.any():
        return np.zeros((0, 3))
    cells = _thin_cells(points, pixel)
    order = np.lexsort((points["y"], points["x"], points["z"], cells))
    first = order[np.r_[True, np.diff(cells[order]) > 0]]
    low, low_own = points[first], own[first]
    xyz = np.column_stack([low[a].astype(np.float64) for a in "xyz"])
    # Near the origin: the library keeps its own arithmetic from there.
    ground = _drape(xyz - np.floor(xyz.min(axis=0)))
    return xyz[ground & low_own]


def require_cloth() -> None:
    """Raises MissingDependencyError where the cloth simulation filter is not installed."""
    try:
        import CSF  # noqa: F401
    except ImportError as error:
        raise MissingDependencyError(
            "a point cloud without ground classes needs cloth-simulation-filter",
            remedy="run: pip install 'canopy-height[lidar]'",
        ) from error


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
def terrain(ground: np.ndarray, pixel: float, window: tuple[int, int, int, int]) -> np.ndarray:
    """Elevation in metres at the pixel centres of `window` (global row, col, height, width); NaN unknown.

    Linear on the Delaunay triangles of the ground points (n, 3), of which only those with a circumradius of
    at most `MAX_CIRCUMRADIUS_M` count. Such a triangle is Delaunay if and only if its circumcircle is empty,
    and the circle of one that covers a pixel lies within `TERRAIN_REACH_M` of it: so the points farther away
    cannot matter, and windows agree. Beyond the outermost ground points the slope goes on for `EDGE_PX`.
    """
    row, col, height, width = window
    # Exact arithmetic: whole metres as origin, coordinates in 2^-16 m, differences without rounding.
    origin = np.floor([col * pixel, -(row + height) * pixel])
    plane = np.full((height, width), np.nan)
    if len(ground) >= 3:
        centres = [
            (col + np.arange(width) + 0.5) * pixel - origin[0],
            -(row + np.arange(height) + 0.5) * pixel - origin[1],
        ]
        at = np.column_stack([a.ravel() for a in np.meshgrid(*centres)])
        plane = _linear(_canonical(ground), origin, at).reshape(height, width)
    for _ in range(EDGE_PX):
        plane = _grow(plane)
    return plane


def _canonical(ground: np.ndarray) -> np.ndarray:
    """The points in an order and on a fine lattice of their own, no four of them on a circle by chance.

    Four points on one circle have two triangulations; millimetres hashed from the place break the tie.
    """
    xy = np.rint(ground[:, :2] * 1024).astype(np.int64)
    moved = [xy[:, k] / 1024 + (hash01(0, 911 + k, xy[:, 0], xy[:, 1]) - 0.5) * _JITTER_M for k in (0, 1)]
    x, y = (np.rint(v * 65536) / 65536 for v in moved)
    order = np.lexsort((ground[:, 2], y, x))
    return np.column_stack([x, y, ground[:, 2]])[order]


def _linear(ground: np.ndarray, origin: np.ndarray, at: np.ndarray) -> np.ndarray:
    """Elevation at places (m, 2) relative to `origin`; NaN where no fit triangle covers them."""
    from scipy.spatial import Delaunay, QhullError

    xy = ground[:, :2] - origin
    try:
        mesh = Delaunay(xy)
    except QhullError:  # fewer than three points that are not on one line
        return np.full(len(at), np.nan)
    corners = np.sort(mesh.simplices, axis=1)
    p0, e1, e2 = (
        xy[corners[:, 0]],
        xy[corners[:, 1]] - xy[corners[:, 0]],
        xy[corners[:, 2]] - xy[corners[:, 0]],
    )
    twice = e1[:, 0] * e2[:, 1] - e1[:, 1] * e2[:, 0]
    sides = [np.hypot(*v.T) for v in (e1, e2, e2 - e1)]
    with np.errstate(divide="ignore", invalid="ignore"):
        radius = sides[0] * sides[1] * sides[2] / (2 * np.abs(twice))
        fit = radius <= MAX_CIRCUMRADIUS_M
    found = mesh.find_simplex(at)
    inside = (found >= 0) & fit[found]
    t = found[inside]
    d = at[inside] - p0[t]
    u = (d[:, 0] * e2[t, 1] - d[:, 1] * e2[t, 0]) / twice[t]
    v = (e1[t, 0] * d[:, 1] - e1[t, 1] * d[:, 0]) / twice[t]
    z = ground[:, 2][corners[t]]
    result = np.full(len(at), np.nan)
    result[inside] = z[:, 0] + u * (z[:, 1] - z[:, 0]) + v * (z[:, 2] - z[:, 0])
    return result


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


def elevation_at(
    plane: np.ndarray, pixel: float, window: tuple[int, int, int, int], x: np.ndarray, y: np.ndarray
) -> np.ndarray:
    """Terrain under points, metres: bilinear between pixel centres, among those that are known; else NaN."""
    row, col, height, width = window
    v, u = -y / pixel - row - 0.5, x / pixel - col - 0.5
    r, c = np.floor(v).astype(np.int64), np.floor(u).astype(np.int64)
    fv, fu = v - r, u - c
    total, weight = np.zeros(len(x)), np.zeros(len(x))
    for dr, dc in ((0, 0), (0, 1), (1, 0), (1, 1)):
        rr, cc = r + dr, c + dc
        inside = (rr >= 0) & (rr < height) & (cc >= 0) & (cc < width)
        z = np.where(inside, plane[np.clip(rr, 0, height - 1), np.clip(cc, 0, width - 1)], np.nan)
        share = np.where(np.isfinite(z), (fv if dr else 1 - fv) * (fu if dc else 1 - fu), 0.0)
        total += np.where(share > 0, z, 0.0) * share
        weight += share
    with np.errstate(invalid="ignore", divide="ignore"):
        return total / weight


POLICIES = ("zero", "mask", "keep")
# Returns farther below the terrain are multipath; the tallest tree known is 116 m.
BELOW_M, ABOVE_M = 1.0, 130.0
# Pits are at least so deep and lie in vegetation at least so high.
PIT_DEPTH_M, PIT_RIM_M = 1.0, 2.0
# Returns without a class that stand on a named roof or bridge and rise less above it belong to it.
ON_TOP_M = 2.0


@dataclass(frozen=True)
class Policy:
    """What becomes of structures and water: `zero` (0 m of canopy), `mask` (nodata) or `keep` (as canopy).

    A pixel is a structure's where the structure is its highest return; a crown that overhangs a roof by more
    than `ON_TOP_M` counts as a crown. Wires hide nothing: zeroed, they leave what stands below them.
    """

    buildings: str = "zero"
    water: str = "zero"
    bridges: str = "zero"
    wires: str = "zero"

    def of(self, kind: int) -> str:
        """The policy of a kind of return; `keep` for vegetation."""
        named = {BUILDING: self.buildings, WATER: self.water, BRIDGE: self.bridges, WIRE: self.wires}
        return named.get(kind, "keep")


@dataclass(frozen=True)
class Surface:
    """height: metres, NaN unknown; count: returns per pixel; fixed: structures, not to be closed as pits."""

    height: np.ndarray
    count: np.ndarray
    fixed: np.ndarray
    dropped: int


def highest(
    kinds: np.ndarray, above: np.ndarray, cell: np.ndarray, shape: tuple[int, int], policy: Policy,
    classified: bool,
) -> Surface:  # fmt: skip
    """Highest canopy return per pixel.

    Args:
        kinds, above, cell: of each return its kind, its height above the terrain (metres, NaN where there is
            none) and its flat pixel index.
        shape: (height, width) of the window.
        policy: what to do with structures.
        classified: ground-class returns are ground by definition and have height 0.
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
    plain = np.ones(len(kinds), bool)
    for kind in (BUILDING, WATER, BRIDGE, WIRE):
        chosen = policy.of(kind)
        of_kind = kinds == kind
        if chosen == "keep" or not of_kind.any():
            continue
        plain &= ~of_kind
        # Without terrain below (a large roof, a lake) the structure is still known to be one.
        tops = np.where(known[of_kind], above[of_kind], np.inf)
        if kind != WIRE:
            np.maximum.at(solid, cell[of_kind], tops)
        elif chosen == "zero":
            np.maximum.at(canopy, cell[of_kind], 0.0)
        if chosen == "mask":
            np.maximum.at(masked, cell[of_kind], tops)
    np.maximum.at(canopy, cell[plain & known], above[plain & known])
    hidden = (solid > -np.inf) & (canopy <= solid + ON_TOP_M)
    canopy = np.where(hidden, 0.0, canopy)
    gone = (masked > -np.inf) & (hidden | (canopy <= masked))
    height = np.where(gone | ~np.isfinite(canopy), np.nan, canopy)
    fixed = hidden | gone
    return Surface(height.reshape(shape), count.reshape(shape), fixed.reshape(shape), int(wrong.sum()))


def pit_px(width_m: float, pixel: float) -> int:
    """Width, in pixels, of the widest pit that is closed; 0 where pixels are too coarse to have such pits."""
    return int(width_m / pixel + 1e-9)


def close_pits(height: np.ndarray, fixed: np.ndarray, widest: int) -> np.ndarray:
    """Metres (h, w) with pits of up to `widest` pixels raised to their lowest rim; see the module's head.

    Never lowers a pixel and never touches one that is NaN or `fixed`. A pixel's result depends on those
    within `widest` of it.
    """
    if widest < 1:
        return height
    low = np.where(np.isfinite(height), height, -np.inf)
    closed = np.full(height.shape, np.inf)
    for direction in ((0, 1), (1, 0), (1, 1), (1, -1)):
        closed = np.minimum(closed, _close_along(low, direction, widest))
    with np.errstate(invalid="ignore"):
        pit = np.isfinite(height) & ~fixed & (closed - height > PIT_DEPTH_M) & (closed >= PIT_RIM_M)
    return np.where(pit, closed, height)


def _close_along(low: np.ndarray, direction: tuple[int, int], widest: int) -> np.ndarray:
    """Closing by a line of `widest` + 1 pixels: the least, over all such lines through a pixel, of their
    greatest value. Beyond the window nothing is known (-inf)."""
    (h, w), n = low.shape, widest
    wide = np.pad(low, 2 * n, constant_values=-np.inf)

    def window(array: np.ndarray, step: int, margin: int) -> np.ndarray:
        row, col = n + step * direction[0], n + step * direction[1]
        return array[row : row + h + 2 * margin, col : col + w + 2 * margin]

    greatest = window(wide, 0, n)
    for step in range(1, n + 1):
        greatest = np.maximum(greatest, window(wide, step, n))
    least = window(greatest, 0, 0)
    for step in range(1, n + 1):
        least = np.minimum(least, window(greatest, -step, 0))
    return least


def fill_gaps(height: np.ndarray, empty: np.ndarray, steps: int) -> np.ndarray:
    """Pixels without returns (`empty`) within `steps` of known ones get the mean of known neighbours."""
    for _ in range(steps):
        known = np.isfinite(height)
        wide = np.pad(np.where(known, height, 0.0), 1)
        mark = np.pad(known.astype(np.float64), 1)
        h, w = height.shape
        total, count = np.zeros((h, w)), np.zeros((h, w))
        for dy in range(3):
            for dx in range(3):
                total += wide[dy : dy + h, dx : dx + w]
                count += mark[dy : dy + h, dx : dx + w]
        with np.errstate(invalid="ignore", divide="ignore"):
            height = np.where(empty & ~known, total / count, height)
    return height


Block = tuple[int, int]
Window = tuple[int, int, int, int]


@dataclass(frozen=True)
class Plan:
    """Everything a worker needs to know. `window` is the output grid in global pixels (row, col, h, w)."""

    folder: Path
    blocks: Blocks
    window: Window
    classified: bool
    policy: Policy
    pit_width_m: float
    fill_px: int

    @property
    def spool(self) -> Spool:
        """The points on disk."""
        return Spool(self.folder, self.blocks)

    @property
    def pad_px(self) -> int:
        """How far the canopy's surface looks beyond a window."""
        return self.pit_px + self.fill_px + 1

    @property
    def pit_px(self) -> int:
        """Width, in pixels, of the widest pit that is closed."""
        return pit_px(self.pit_width_m, self.blocks.pixel)

    @property
    def terrain_px(self) -> int:
        """How far the terrain's raster reaches beyond the canopy's: bilinear, and growing at its edge."""
        return 1 + 2 * EDGE_PX

    def surface_blocks(self) -> list[Block]:
        """Blocks that meet the output, from the north-west."""
        r0, c0, r1, c1 = self.blocks.over(*self.window)
        return [(i, j) for i in range(r0, r1 + 1) for j in range(c0, c1 + 1)]

    def ground_limits(self) -> tuple[int, int, int, int]:
        """(first row, first col, last row, last col) of the blocks whose ground the output needs."""
        far = math.ceil(TERRAIN_REACH_M / self.blocks.pixel) + self.pad_px + self.terrain_px
        row, col, height, width = self.window
        return self.blocks.over(row - far, col - far, height + 2 * far, width + 2 * far)

    def point_limits(self) -> tuple[int, int, int, int]:
        """The same for blocks whose points it needs."""
        margin = NOISE_REACH_M if self.classified else CLOTH_MARGIN_M
        more = math.ceil(margin / self.blocks.side_m)
        r0, c0, r1, c1 = self.ground_limits()
        return r0 - more, c0 - more, r1 + more, c1 + more


@dataclass(frozen=True)
class Done:
    """What a block's pass reports: counts, or the error that stopped it."""

    points: int = 0
    noise: int = 0
    ground: int = 0
    error: CanopyError | None = None


# ---- pass one ---------------------------------------------------------------------------------
def find_ground(plan: Plan, block: Block) -> Done:
    """Judge a block's returns: writes which to keep (bits) and its ground points (n, 3)."""
    spool, pixel = plan.spool, plan.blocks.pixel
    if not spool.path(block).exists():
        return Done()
    margin = NOISE_REACH_M if plan.classified else CLOTH_MARGIN_M
    points, own = spool.load(block, margin)
    if plan.classified:
        noise = lonely(points, own)
        ground = classified_ground(points[own & ~noise], pixel)
    else:
        noise = lonely(points, np.ones(len(points), bool))
        ground = cloth_ground(points[~noise], own[~noise], pixel)
    np.packbits(~noise[own]).tofile(spool.path(block, "keep"))
    if len(ground):
        ground.tofile(spool.path(block, "ground"))
    return Done(int(own.sum()), int((noise & own).sum()), len(ground))


# ---- pass two ---------------------------------------------------------------------------------
def make_surface(plan: Plan, block: Block) -> Done:
    """Heights and return counts of a block's part of the output: writes float32 (2, h, w), NaN = nodata."""
    row, col, height, width = core_of(plan, block)
    pad, more = plan.pad_px, plan.terrain_px
    window = row - pad, col - pad, height + 2 * pad, width + 2 * pad
    points = _kept(plan, block, pad)
    if not len(points):
        return Done()
    wide = window[0] - more, window[1] - more, window[2] + 2 * more, window[3] + 2 * more
    pixel = plan.blocks.pixel
    plane = terrain(_ground_around(plan, wide), pixel, wide)
    rows, cols = plan.blocks.cells(points["x"], points["y"])
    rows, cols = rows - window[0], cols - window[1]
    inside = (rows >= 0) & (cols >= 0) & (rows < window[2]) & (cols < window[3])
    points, cell = points[inside], (rows * window[3] + cols)[inside]
    above = points["z"] - elevation_at(plane, pixel, wide, points["x"], points["y"])
    made = highest(points["kind"], above, cell, (window[2], window[3]), plan.policy, plan.classified)
    heights = close_pits(made.height, made.fixed, plan.pit_px)
    heights = fill_gaps(heights, made.count == 0, plan.fill_px)
    inner = np.s_[pad : pad + height, pad : pad + width]
    # Whole millimetres: finer than any lidar, and files compress.
    bands = np.stack([np.round(heights[inner], 3), made.count[inner]]).astype(np.float32)
    _save(plan.spool.path(block, "chm"), bands)
    return Done(int(made.count[inner].sum()), made.dropped, 0)


def core_of(plan: Plan, block: Block) -> Window:
    """A block's part of the output: global (row, col, height, width)."""
    row, col, side, _ = plan.blocks.window(block)
    r0, c0, h, w = plan.window
    top, left = max(row, r0), max(col, c0)
    return top, left, min(row + side, r0 + h) - top, min(col + side, c0 + w) - left


def surface_of(plan: Plan, block: Block) -> np.ndarray:
    """What `make_surface` wrote, float32 (2, h, w) height and count; NaN and 0 where no return was."""
    _, _, height, width = core_of(plan, block)
    path = plan.spool.path(block, "chm")
    if not path.exists():
        return np.stack([np.full((height, width), np.nan), np.zeros((height, width))]).astype(np.float32)
    return np.fromfile(path, np.float32).reshape(2, height, width)


def _kept(plan: Plan, block: Block, pad_px: int) -> np.ndarray:
    """RECORDs of a block and `pad_px` around it that pass one kept, in a fixed order."""
    spool = plan.spool
    row, col, side, _ = plan.blocks.window(block)
    r0, c0, r1, c1 = plan.blocks.over(row - pad_px, col - pad_px, side + 2 * pad_px, side + 2 * pad_px)
    parts = []
    for i in range(r0, r1 + 1):
        for j in range(c0, c1 + 1):
            points, _ = spool.load((i, j))
            if not len(points):
                continue
            bits = np.fromfile(spool.path((i, j), "keep"), np.uint8)
            points = points[np.unpackbits(bits, count=len(points)).astype(bool)]
            if (i, j) != block:
                rows, cols = plan.blocks.cells(points["x"], points["y"])
                near = (rows >= row - pad_px) & (rows < row + side + pad_px)
                near &= (cols >= col - pad_px) & (cols < col + side + pad_px)
                points = points[near]
            parts.append(points)
    return np.concatenate(parts) if parts else spool.load(block)[0]


def _ground_around(plan: Plan, window: Window) -> np.ndarray:
    """Ground points (n, 3) within reach of a window's pixels."""
    far = math.ceil(TERRAIN_REACH_M / plan.blocks.pixel) + 1
    row, col, height, width = window
    r0, c0, r1, c1 = plan.blocks.over(row - far, col - far, height + 2 * far, width + 2 * far)
    parts = [np.zeros((0, 3))]
    for i in range(r0, r1 + 1):
        for j in range(c0, c1 + 1):
            path = plan.spool.path((i, j), "ground")
            if path.exists():
                parts.append(np.fromfile(path, np.float64).reshape(-1, 3))
    ground = np.concatenate(parts)
    rows, cols = plan.blocks.cells(ground[:, 0], ground[:, 1])
    near = (
        (rows >= row - far) & (rows < row + height + far) & (cols >= col - far) & (cols < col + width + far)
    )
    return ground[near]


def _save(path: Path, bands: np.ndarray) -> None:
    with path.open("wb") as file:
        bands.tofile(file)


# ---- who does it ------------------------------------------------------------------------------
def _guarded(work: Callable[[Plan, Block], Done], plan: Plan, block: Block) -> Done:
    """A block's pass whose foreseeable troubles come back as values: they must survive the way home."""
    try:
        return work(plan, block)
    except CanopyError as error:
        return Done(error=error)
    except OSError as error:
        reason = error.strerror or str(error)
        return Done(error=OutputError(f"the scratch folder failed ({reason})", where=plan.folder.parent))
    except MemoryError:
        return Done(error=CanopyError("out of memory", remedy="use fewer --workers"))


def run_blocks(
    work: Callable[[Plan, Block], Done],
    plan: Plan,
    blocks: Iterable[Block],
    workers: int,
    progress: Progress,
) -> Done:
    """Do a pass over blocks with dask, in `workers` spawned processes or, for one, in this process.

    Results travel through files; what comes back are counts, summed. Raises the first error.
    """
    blocks = list(blocks)
    job = partial(_guarded, work, plan)
    results: list[Done]
    if workers == 1 or len(blocks) == 1:
        results = []
        for block in blocks:
            results.append(job(block))
            progress.advance()
            if results[-1].error:
                break
    else:
        results = _with_dask(job, blocks, workers, progress)
    for done in results:
        if done.error:
            raise done.error
    totals = (sum(getattr(d, name) for d in results) for name in ("points", "noise", "ground"))
    return Done(*totals)


def _with_dask(job: Callable[[Block], Done], blocks: list[Block], workers: int, progress: Progress) -> Any:
    from concurrent.futures import ProcessPoolExecutor
    from concurrent.futures.process import BrokenProcessPool
    from multiprocessing import get_context

    import dask
    from dask.callbacks import Callback

    def step(*_: object) -> None:
        progress.advance()

    tasks = [dask.delayed(job, pure=False)(block) for block in blocks]
    # Spawned, never forked: GDAL and thread pools do not survive a fork.
    try:
        with (
            ProcessPoolExecutor(min(workers, len(blocks)), mp_context=get_context("spawn")) as pool,
            Callback(posttask=step),
        ):
            return list(dask.compute(*tasks, scheduler="processes", pool=pool, chunksize=1))
    except BrokenProcessPool as error:
        raise CanopyError(
            "a worker process died, probably for want of memory", remedy="use fewer --workers"
        ) from error


Bounds = tuple[float, float, float, float]
GROUNDS = ("auto", "class", "csf")
BLOCK_M = 256.0
GSD_RANGE_M = (0.1, 30.0)
MAX_FILL_PX, MAX_PIT_M, MAX_PIXELS = 10, 10.0, 4e9


@dataclass(frozen=True)
class ChmOptions:
    """How to make a CHM; the names are those of `canopy data chm`'s options.

    Attributes:
        gsd: ground metres per pixel.
        crs: CRS of the CHM, in metres; also that of files without one, unless `input_crs` is given. By
            default the files' own where it is true to scale in metres, else the area's UTM zone.
        ground: `class` (LAS class 2), `csf` (cloth simulation), or `auto`: class where files have classes.
        policy: what becomes of buildings, water, bridges and wires.
        units: unit of elevations: `auto`, `m`, `ft` or `us-ft`.
        pit_width_m: holes in crowns up to this wide are closed; 0 leaves them.
        fill_px: pixels without returns this near to known ones are interpolated; 0 leaves them nodata.
        block_m: side of a block of work; results do not depend on it where ground is classified.
    """

    gsd: float = 1.0
    crs: str | None = None
    input_crs: str | None = None
    ground: str = "auto"
    policy: Policy = field(default_factory=Policy)
    units: str = "auto"
    pit_width_m: float = 1.0
    fill_px: int = 0
    workers: int = 1
    overwrite: bool = False
    block_m: float = BLOCK_M

    def check(self) -> None:
        """Raises InputError for an option out of range."""
        if not GSD_RANGE_M[0] <= self.gsd <= GSD_RANGE_M[1]:
            raise InputError(f"{self.gsd:g} m", where="--gsd", expected="0.1 to 30 metres")
        if self.ground not in GROUNDS:
            raise InputError(f"{self.ground!r}", where="--ground", expected=" or ".join(GROUNDS))
        for name, value in asdict(self.policy).items():
            if value not in POLICIES:
                raise InputError(f"{value!r}", where=f"--{name}", expected=" or ".join(POLICIES))
        if not 0 <= self.pit_width_m <= MAX_PIT_M:
            raise InputError(f"{self.pit_width_m:g} m", where="--pit-width-m", expected=f"0 to {MAX_PIT_M:g}")
        if not 0 <= self.fill_px <= MAX_FILL_PX:
            raise InputError(f"{self.fill_px}", where="--fill-px", expected=f"0 to {MAX_FILL_PX}")
        if self.workers < 1:
            raise InputError(f"{self.workers}", where="--workers", expected="1 or more")


def choose_crs(inputs: Sequence[tuple[CRS, Bounds]], options: ChmOptions) -> CRS:
    """The CHM's CRS, projected and in metres, for inputs with their bounds in it; see `ChmOptions`."""
    asked = options.crs
    if asked is not None:
        crs = to_crs(asked)
        if crs.proj.is_projected and abs(metres_per_unit(crs) - 1) < 1e-9:
            return crs
        # It named the CRS of files without one: those may well be in feet. Elsewhere it is a mistake.
        if options.input_crs is not None or any(own != crs for own, _ in inputs):
            raise InputError(
                f"{asked} is not in metres", where="--crs", expected="a projected CRS in metres for the CHM"
            )
    own, bounds = inputs[0]
    centre = shapely.box(*bounds).centroid
    if own.proj.is_projected and abs(metres_per_unit(own) - 1) < 1e-9:
        probe = Grid.of(own, (1, 0, centre.x, 0, -1, centre.y), (1, 1))
        if abs(probe.gsd_m - 1) < 0.01:
            return own
    return output_crs(to_lonlat(shapely.box(*_some_extent(bounds)), own))


def _some_extent(bounds: Bounds) -> Bounds:
    """Bounds with an inside, also for a single point."""
    west, south, east, north = bounds
    return west - 1e-6, south - 1e-6, east + 1e-6, north + 1e-6


def choose_grid(inputs: Sequence[Bounds], crs: CRS, gsd: float, area: AOI | None) -> Grid:
    """The pixels to make: the rectangle of the inputs' bounds in `crs`, cut to the area, on the lattice."""
    rects = np.array(inputs)
    (w, s), (e, n) = rects[:, :2].min(axis=0).tolist(), rects[:, 2:].max(axis=0).tolist()
    e, n = max(e, w + 1e-3), max(n, s + 1e-3)
    grid = AOI(shapely.box(w, s, e, n), crs, is_box=True).grid(crs, gsd)
    if area is not None:
        wanted = area.grid(crs, gsd).bounds
        cut = (max(w, wanted[0]), max(s, wanted[1]), min(e, wanted[2]), min(n, wanted[3]))
        if cut[0] >= cut[2] or cut[1] >= cut[3]:
            raise AreaError(
                f"no data in the area {area.describe()}",
                expected=f"an area within x {w:.10g} to {e:.10g}, y {s:.10g} to {n:.10g} of {crs}",
            )
        grid = Grid.from_bounds(cut, crs, grid.pixel)
    if grid.height * grid.width > MAX_PIXELS:
        raise InputError(
            f"a CHM of {grid.width} x {grid.height} px", remedy="give an area, or a larger --gsd"
        )
    return grid


def check_out(out: Path, overwrite: bool) -> None:
    """What `CogWriter` would refuse at the end is refused before hours of work."""
    if out.exists() and not (overwrite and out.is_file()):
        raise InputError("the file exists", where=out, remedy="use --overwrite to replace it")
    if not out.parent.is_dir():
        raise InputError("no such folder", where=out.parent, remedy="create it first")


BANDS = (BandSpec("canopy_height"), BandSpec("point_density", "1/m2"), BandSpec("valid", "1"))
# Heights beyond any tree in a file said to be in metres are most often feet.
_SUSPECT_M = 100.0
_GPS_EPOCH = datetime(1980, 1, 6, tzinfo=UTC) + timedelta(seconds=1e9)


def chm_from_points(
    files: Sequence[str | Path],
    out: str | Path,
    options: ChmOptions | None = None,
    *,
    area: AOI | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Write the CHM of point clouds as a COG of float32; returns what was done.

    Bands: `canopy_height` (metres above the terrain; NaN where there was no return, no terrain within reach,
    or a masked structure), `point_density` (returns kept per square metre; 0 where none), `valid` (1 or 0).

    Args:
        files: LAS, LAZ or COPC files; neighbours are processed as one cloud.
        out: the .tif to make.
        area: what to map; by default all the points. Outside polygons is nodata.

    Raises:
        InputError: bad options or files; nothing was written.
        OutputError: the folder or disk does not take the result.
    """
    options, progress, out = options or ChmOptions(), progress or NoProgress(), Path(out)
    options.check()
    check_out(out, options.overwrite)
    clouds = _open_all(files, options)
    crs = choose_crs([(c.crs, c.bounds) for c in clouds], options)
    grid = choose_grid([bounds_in(c, crs) for c in clouds], crs, options.gsd, area)
    for note in (n for c in clouds for n in c.notes):
        log.warning(f"note: {note}")
    with _scratch_beside(out) as folder:
        _check_space(folder, clouds)
        plan, tally = _read(folder, clouds, grid, options, progress)
        limits = plan.ground_limits()
        blocks = [(i, j) for i in range(limits[0], limits[2] + 1) for j in range(limits[1], limits[3] + 1)]
        blocks = [b for b in blocks if plan.spool.path(b).exists()]
        progress.start(len(blocks), "ground")
        found = run_blocks(find_ground, plan, blocks, options.workers, progress)
        if found.ground < 3:
            raise DataError(
                f"no ground found among {found.points} points of {_names(clouds)}",
                remedy="the area may be too small, or all water; try --ground csf"
                if plan.classified
                else "the area may be too small, or all water",
            )
        cores = plan.surface_blocks()
        progress.start(len(cores), "canopy surface")
        run_blocks(make_surface, plan, cores, options.workers, progress)
        return _write(out, plan, grid, area, clouds, options, tally, found.noise)


# ---- before -----------------------------------------------------------------------------------
def _open_all(files: Sequence[str | Path], options: ChmOptions) -> list[LidarFile]:
    if not files:
        raise InputError("no point cloud named", expected="LAS, LAZ or COPC files, or --dsm and --dtm")
    if len({Path(f).resolve() for f in files}) < len(files):
        raise InputError("a file is named twice", where=files[0])
    given = options.input_crs if options.input_crs is not None else options.crs
    return [open_lidar(f, crs=given, units=options.units) for f in files]


@contextlib.contextmanager
def _scratch_beside(out: Path) -> Iterator[Path]:
    """A hidden folder beside the output, gone afterwards whatever happens."""
    try:
        folder = Path(tempfile.mkdtemp(prefix=f".{out.name}.", suffix=".partial", dir=out.parent.absolute()))
    except OSError as error:
        raise OutputError(f"the folder cannot be written to ({error.strerror})", where=out.parent) from error
    try:
        yield folder
    except OSError as error:
        if isinstance(error, CanopyError):
            raise
        raise OutputError(f"cannot be made ({error.strerror or error})", where=out) from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _check_space(folder: Path, clouds: Sequence[LidarFile]) -> None:
    needed = sum(c.points for c in clouds) * (RECORD.itemsize + 1) + 2**26
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise OutputError(
            f"{free / 1e9:.1f} GB free on the disk, {needed / 1e9:.1f} GB needed for the points",
            where=folder.parent,
            remedy="make room, write to another disk, or give fewer files",
        )


# ---- the points -------------------------------------------------------------------------------
def _read(
    folder: Path, clouds: Sequence[LidarFile], grid: Grid, options: ChmOptions, progress: Progress
) -> tuple[Plan, Tally]:
    """Spool the points and decide where ground comes from."""
    blocks = Blocks(grid.pixel[0], max(8, round(options.block_m / grid.pixel[0])))
    row, col = grid.origin_rc
    window = (row, col, grid.height, grid.width)
    # Points for the cloth are spooled first: whether it is needed is known only when they are read.
    plan = Plan(folder, blocks, window, False, options.policy, options.pit_width_m, options.fill_px)
    progress.start(sum(c.points for c in clouds), "reading points")
    tally = fill(Spool(folder, blocks), clouds, grid.crs, plan.point_limits(), progress)
    classified = _is_classified(options.ground, tally, clouds)
    if not classified:
        require_cloth()
    made = Plan(folder, blocks, window, classified, options.policy, options.pit_width_m, options.fill_px)
    return made, tally


def _is_classified(ground: str, tally: Tally, clouds: Sequence[LidarFile]) -> bool:
    """Whether ground is taken from class 2. Raises DataError where that was asked and there is none."""
    if ground == "class" and not tally.ground:
        raise DataError(
            f"no ground points (class 2) in {_names(clouds)}",
            where="--ground class",
            remedy="use --ground csf to find the ground",
        )
    if ground != "auto":
        return ground == "class"
    if tally.ground and all(tally.classified):
        return True
    which = "some files carry" if tally.ground else "the points carry"
    log.warning(f"note: {which} no ground class; ground is found with a cloth simulation")
    return False


def _names(clouds: Sequence[LidarFile]) -> str:
    return clouds[0].path.name + (f" and {len(clouds) - 1} more" if len(clouds) > 1 else "")


# ---- after ------------------------------------------------------------------------------------
def _write(
    out: Path, plan: Plan, grid: Grid, area: AOI | None, clouds: Sequence[LidarFile], options: ChmOptions,
    tally: Tally, noise: int,
) -> dict[str, Any]:  # fmt: skip
    """Put the blocks together; returns the facts of the job."""
    facts: dict[str, Any] = {"valid_px": 0, "sum_mm": 0, "highest_m": 0.0, "over_2m": 0, "returns": 0}
    dates = _dates(tally)
    with CogWriter(
        out, grid, list(BANDS), tags=_tags(plan, clouds, options, dates), overwrite=options.overwrite
    ) as writer:
        for block in plan.surface_blocks():
            row, col, height, width = core_of(plan, block)
            window = grid.window(row - plan.window[0], col - plan.window[1], height, width)
            heights, count = surface_of(plan, block)
            if area is not None:
                inside = area.mask(window)
                heights, count = np.where(inside, heights, np.nan), np.where(inside, count, 0)
            valid = np.isfinite(heights)
            bands = np.stack([heights, count / np.prod(grid.pixel), valid]).astype(np.float32)
            always = np.ones_like(valid)
            writer.write(bands, np.stack([valid, always, always]), row - plan.window[0], col - plan.window[1])
            _count(facts, heights[valid], int(count.sum()))
        if not facts["valid_px"]:
            raise DataError(
                f"no pixel with a known height in {_names(clouds)}",
                remedy="no return has ground near it, or all of them are masked structures",
            )
    if facts["highest_m"] > _SUSPECT_M and options.units == "auto":
        log.warning(
            f"note: heights up to {facts['highest_m']:.0f} m; if elevations are in feet say --units ft"
        )
    return {"file": str(out), "sha256": writer.sha256, **_summary(facts, grid, plan, tally, noise, dates)}


def _count(facts: dict[str, Any], heights: np.ndarray, returns: int) -> None:
    facts["returns"] += returns
    facts["valid_px"] += len(heights)
    if len(heights):
        # Whole millimetres: the sum does not depend on the order of the blocks.
        facts["sum_mm"] += int(np.rint(heights.astype(np.float64) * 1000).sum())
        facts["highest_m"] = max(facts["highest_m"], float(heights.max()))
        facts["over_2m"] += int((heights >= 2).sum())


def _summary(
    facts: dict[str, Any], grid: Grid, plan: Plan, tally: Tally, noise: int, dates: str | None
) -> dict[str, Any]:
    pixels = grid.height * grid.width
    return {
        "crs": str(grid.crs),
        "bounds": list(grid.bounds),
        "width_px": grid.width,
        "height_px": grid.height,
        "gsd_m": round(grid.gsd_m, 4),
        "ground": "class" if plan.classified else "csf",
        "points_read": tally.points,
        "points_noise": tally.dropped + noise,
        "points_per_m2": round(facts["returns"] / (pixels * float(np.prod(grid.pixel))), 2),
        "valid_fraction": round(facts["valid_px"] / pixels, 6),
        "mean_height_m": round(facts["sum_mm"] / facts["valid_px"] / 1000, 3),
        "highest_m": round(facts["highest_m"], 3),
        "cover_2m": round(facts["over_2m"] / facts["valid_px"], 4),
        "dates": dates,
    }


def _dates(tally: Tally) -> str | None:
    """First/last day of the pulses, where their GPS times have dates."""
    if not (np.isfinite(tally.first_s) and tally.last_s > -1e9 and tally.first_s != 0):
        return None
    days = [(_GPS_EPOCH + timedelta(seconds=s)).date().isoformat() for s in (tally.first_s, tally.last_s)]
    return days[0] if days[0] == days[1] else "/".join(days)


def _tags(
    plan: Plan, clouds: Sequence[LidarFile], options: ChmOptions, dates: str | None
) -> dict[str, object]:
    names = ",".join(sorted(c.path.name for c in clouds)[:20])
    tags: dict[str, object] = {
        "CANOPY_VERSION": __version__,
        "CANOPY_SOURCE": f"lidar: {names}{',...' if len(clouds) > 20 else ''}",
        "CANOPY_GROUND": "class 2" if plan.classified else "cloth simulation",
        "CANOPY_STRUCTURES": ",".join(f"{k}={v}" for k, v in asdict(options.policy).items()),
        "CANOPY_PITS": f"closed up to {options.pit_width_m:g} m" if options.pit_width_m else "kept",
    }
    return tags | ({"ACQUISITION_DATE": dates} if dates else {})


_TILE_PX = 1024
_UNIT_NAMES = {
    "m": "m", "metre": "m", "meter": "m", "metres": "m", "meters": "m",
    "ft": "ft", "foot": "ft", "feet": "ft",
    "us-ft": "us-ft", "us survey foot": "us-ft", "us_survey_foot": "us-ft", "ftus": "us-ft",
}  # fmt: skip


def chm_from_rasters(
    dsm: str | Path,
    dtm: str | Path,
    out: str | Path,
    options: ChmOptions | None = None,
    *,
    area: AOI | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Write `dsm - dtm` in metres as a COG with the bands of `chm_from_points`; returns what was done.

    The CHM lies on the DSM's own grid where that is metric and of the asked pixel; otherwise both are brought
    to the asked grid first, averaged where it is coarser. Below 0 becomes 0 down to -1 m; lower, or higher
    than 130 m, is nodata. `point_density` is nodata everywhere: rasters do not tell it.

    Raises InputError for rasters that do not overlap, have no CRS, or are not a surface and its terrain.
    """
    options, progress, out = options or ChmOptions(), progress or NoProgress(), Path(out)
    options.check()
    check_out(out, options.overwrite)
    with contextlib.ExitStack() as stack:
        pair = [stack.enter_context(open_raster(path)) for path in (dsm, dtm)]
        given = options.input_crs if options.input_crs is not None else options.crs
        crss = [_crs_of(ds, given) for ds in pair]
        units = [_unit_of(ds, crs, options.units) for ds, crs in zip(pair, crss, strict=True)]
        grid = _grid_of(pair, crss, options, area)
        tags = {
            "CANOPY_VERSION": __version__,
            "CANOPY_SOURCE": f"DSM {Path(dsm).name} minus DTM {Path(dtm).name}",
        }
        with CogWriter(out, grid, list(BANDS), tags=tags, overwrite=options.overwrite) as writer:
            facts = _subtract(writer, pair, crss, units, area, progress)
            _judge(facts, dsm, dtm)
    return {
        "file": str(out), "sha256": writer.sha256, "crs": str(grid.crs), "bounds": list(grid.bounds),
        "width_px": grid.width, "height_px": grid.height, "gsd_m": round(grid.gsd_m, 4),
        "valid_fraction": round(facts["valid"] / (grid.width * grid.height), 6),
        "mean_height_m": round(facts["sum_mm"] / facts["valid"] / 1000, 3),
        "highest_m": round(facts["highest_m"], 3), "cover_2m": round(facts["over_2m"] / facts["valid"], 4),
    }  # fmt: skip


def _crs_of(ds: DatasetReader, given: Any) -> CRS:
    if ds.crs is None and given is None:
        raise DataError(
            "no coordinate reference system in the file",
            where=ds.name,
            remedy="name it with --crs, e.g. --crs EPSG:26917",
        )
    return to_crs(given if ds.crs is None else ds.crs)


def _unit_of(ds: DatasetReader, crs: CRS, units: str) -> float:
    """Metres per stored elevation unit: as asked, as the band says, else as x and y are counted."""
    if units != "auto":
        return METRES[units]
    told = (ds.units[0] or "").strip().lower()
    if told in _UNIT_NAMES:
        return METRES[_UNIT_NAMES[told]]
    factor = float(crs.proj.axis_info[0].unit_conversion_factor) if crs.proj.is_projected else 1.0
    if abs(factor - 1) > 1e-9:
        log.warning(
            f"note: {Path(ds.name).name}: no unit for z, read in the unit of x and y; else use --units"
        )
    return factor


def _grid_of(pair: list[DatasetReader], crss: list[CRS], options: ChmOptions, area: AOI | None) -> Grid:
    """The grid where both rasters lie, or the part of it that was asked for."""
    places = [SourcePlace.of(ds, crs) for ds, crs in zip(pair, crss, strict=True)]
    rects = [AOI.from_grid(p.grid()) if p.is_north_up else None for p in places]
    if None in rects:
        raise InputError("a rotated raster", where=pair[rects.index(None)].name, expected="north-up")
    out_crs = choose_crs([(a.crs, a.geometry.bounds) for a in rects if a], options)
    shapes = [project(a.geometry, a.crs, out_crs) for a in rects if a]
    both = shapes[0].intersection(shapes[1])
    if both.area <= 0:
        raise AreaError("the DSM and the DTM do not overlap", where=pair[0].name)
    grid = choose_grid([both.bounds], out_crs, options.gsd, area)
    own = places[0].grid()
    same = own.crs == out_crs and all(abs(side / options.gsd - 1) < 1e-6 for side in own.pixel)
    if not same:
        return grid
    # On the DSM's own lattice pixels are copied, whatever its phase.
    west, south, east, north = grid.bounds
    r0, c0 = (round(v) for v in own.rowcol(west, north))
    r1, c1 = (round(v) for v in own.rowcol(east, south))
    r0, c0, r1, c1 = max(r0, 0), max(c0, 0), min(r1, own.height), min(c1, own.width)
    return own.window(r0, c0, r1 - r0, c1 - c0) if r1 > r0 and c1 > c0 else grid


def _subtract(
    writer: CogWriter, pair: list[DatasetReader], crss: list[CRS], units: list[float], area: AOI | None,
    progress: Progress,
) -> dict[str, Any]:  # fmt: skip
    facts: dict[str, Any] = {
        "both": 0,
        "low": 0,
        "high": 0,
        "valid": 0,
        "sum_mm": 0,
        "highest_m": 0.0,
        "over_2m": 0,
    }
    tiles = tiles_over(writer.grid, _TILE_PX)
    progress.start(len(tiles), "surface minus terrain")
    for tile in tiles:
        top, ok_top = _metres(pair[0], crss[0], units[0], tile.core)
        ground, ok_ground = _metres(pair[1], crss[1], units[1], tile.core)
        both = ok_top & ok_ground
        if area is not None:
            both &= area.mask(tile.core)
        height = top - ground
        low, high = both & (height < -BELOW_M), both & (height > ABOVE_M)
        valid = both & ~low & ~high
        height = np.round(np.maximum(height, 0), 3).astype(np.float32)
        marks = np.stack([height, np.zeros_like(height), valid.astype(np.float32)])
        present = np.stack([valid, np.zeros_like(valid), np.ones_like(valid)])
        writer.write(marks, present, *writer.grid.offset_of(tile.core))
        seen = height[valid].astype(np.float64)
        for name, mask in (("both", both), ("low", low), ("high", high), ("valid", valid)):
            facts[name] += int(mask.sum())
        facts["sum_mm"] += int(np.rint(seen * 1000).sum())
        facts["over_2m"] += int((seen >= 2).sum())
        facts["highest_m"] = max(facts["highest_m"], float(seen.max(initial=0)))
        progress.advance()
    return facts


def _metres(ds: DatasetReader, crs: CRS, unit: float, grid: Grid) -> tuple[np.ndarray, np.ndarray]:
    """Elevation float64 (h, w) in metres and valid (h, w) on a grid."""
    values, valid = read_window(ds, grid, [1], crs=crs)
    return (values[0].astype(np.float64) * ds.scales[0] + ds.offsets[0]) * unit, valid


def _judge(facts: dict[str, Any], dsm: str | Path, dtm: str | Path) -> None:
    """Refuse pairs that cannot be a surface and its terrain."""
    if not facts["both"]:
        raise DataError("no pixel where both rasters have data", where=dsm)
    for name, where in (("low", "below"), ("high", f"more than {ABOVE_M:g} m above")):
        if facts[name] > facts["both"] / 2:
            raise DataError(
                f"lies {where} {Path(dtm).name} in {facts[name] / facts['both']:.0%} of the pixels",
                where=dsm,
                expected="a surface (DSM) and its terrain (DTM) in the same unit and vertical datum",
                remedy="swap --dsm and --dtm, or see --units",
            )
