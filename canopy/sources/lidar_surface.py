"""From returns above the terrain to the canopy's surface: highest return per pixel, structures, pits.

A pit is a pixel whose pulses all slipped through the crown. Khosravipour et al. (2014,
doi:10.14358/PERS.80.9.863) close pits by triangulating, height level by height level, the returns above it
and dropping triangles with long sides. A grey-scale closing does the same at every level at once; here it is
the least of four closings by short lines (row, column, both diagonals), so that only what is narrow in EVERY
direction is closed: a hole in a crown, but not the gap between two rows of trees.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from canopy.sources.lidar_points import BRIDGE, BUILDING, GROUND, WATER, WIRE

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
