"""Which returns are noise, which are ground, and the terrain between them.

Each step looks no farther than a stated distance, so that neighbouring blocks agree on their common edge:
noise `NOISE_REACH_M`, the cloth `CLOTH_MARGIN_M` (run per block of the fixed lattice; a point's label is that
of its own block), the terrain `TERRAIN_REACH_M`.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import sys
from collections.abc import Iterator

import numpy as np

from canopy.errors import MissingDependencyError
from canopy.sources.lidar_points import BRIDGE, BUILDING, GROUND, WIRE
from canopy.sources.synth import hash01

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
