"""Imagery that is made or fetched on one fixed lattice, read on any grid.

Web tiles and the synthetic scene exist on a lattice of their own. On that lattice pixels are taken as
they are; on any other grid the needed parts go through the warper of `canopy.geo`, whose values do not
depend on windows.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from canopy.geo.grid import Grid
from canopy.geo.opening import SourcePlace
from canopy.geo.warp import plan_warp, warp_window
from canopy.geo.window import lattice_ratio

Render = Callable[[Grid], tuple[NDArray[np.uint8], NDArray[np.bool_]]]
"""`render(window)` -> uint8 RGB (3, height, width) and validity (height, width) of a lattice window."""


def read_lattice(render: Render, lattice: Grid, grid: Grid) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
    """Pixels of a lattice on any grid.

    Args:
        render: gives uint8 pixels of any window of the lattice; asked only for windows wholly inside it.
        lattice: all there is; nothing outside is valid.
        grid: where the pixels are wanted.

    Returns:
        RGB float32 (3, height, width) in 0..255, 0 where not valid, and validity (height, width).
    """
    place = SourcePlace(lattice.transform, lattice.crs, lattice.height, lattice.width)
    if lattice_ratio(place, grid) == 1:
        return _copy(render, lattice, grid)

    def read(row: int, col: int, height: int, width: int) -> tuple[np.ndarray, np.ndarray]:
        return render(lattice.window(row, col, height, width))

    return warp_window(plan_warp(place, grid, None), grid, read, 3)


def _copy(render: Render, lattice: Grid, grid: Grid) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
    rgb = np.zeros((3, *grid.shape), np.float32)
    valid = np.zeros(grid.shape, bool)
    row, col = (round(place) for place in lattice.rowcol(*grid.xy(0, 0)))
    top, left = max(row, 0), max(col, 0)
    bottom, right = min(row + grid.height, lattice.height), min(col + grid.width, lattice.width)
    if bottom <= top or right <= left:
        return rgb, valid
    pixels, mask = render(lattice.window(top, left, bottom - top, right - left))
    here = (slice(top - row, bottom - row), slice(left - col, right - col))
    rgb[:, *here] = np.where(mask, pixels, 0)
    valid[here] = mask
    return rgb, valid
