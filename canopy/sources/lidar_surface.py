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
from scipy import ndimage

from canopy.sources.lidar_points import BRIDGE, BUILDING, GROUND, WATER, WIRE

POLICIES = ("zero", "mask", "keep")
# Returns farther below the terrain are multipath; the tallest tree known is 116 m.
BELOW_M, ABOVE_M = 1.0, 130.0
# Pits are at least so deep and lie in vegetation at least so high; PIT_WIDTH_M is the widest one closed.
PIT_DEPTH_M, PIT_RIM_M, PIT_WIDTH_M = 1.0, 2.0, 2.0
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


def pit_reach(pixel: float) -> int:
    """Half length, in pixels, of the lines that close pits; 0 for pixels too coarse to have pits."""
    return round(PIT_WIDTH_M / 2 / pixel)


def close_pits(height: np.ndarray, fixed: np.ndarray, pixel: float) -> np.ndarray:
    """Metres (h, w) with pits raised to the level of their lowest rim; see the module's head.

    Never lowers a pixel and never touches one that is NaN or `fixed`. A pixel's result depends on those
    within twice `pit_reach`.
    """
    reach = pit_reach(pixel)
    if reach < 1:
        return height
    side = 2 * reach + 1
    lines = (
        np.ones((1, side), bool),
        np.ones((side, 1), bool),
        np.eye(side, dtype=bool),
        np.fliplr(np.eye(side, dtype=bool)),
    )
    low = np.where(np.isfinite(height), height, -np.inf)
    closed = np.full(height.shape, np.inf)
    for line in lines:
        wide = ndimage.maximum_filter(low, footprint=line, mode="constant", cval=-np.inf)
        closed = np.minimum(
            closed, ndimage.minimum_filter(wide, footprint=line, mode="constant", cval=-np.inf)
        )
    with np.errstate(invalid="ignore"):
        pit = np.isfinite(height) & ~fixed & (closed - height > PIT_DEPTH_M) & (closed >= PIT_RIM_M)
    return np.where(pit, closed, height)


def fill_gaps(height: np.ndarray, empty: np.ndarray, steps: int) -> np.ndarray:
    """Pixels without returns (`empty`) within `steps` of known ones get the mean of their known neighbours."""
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
