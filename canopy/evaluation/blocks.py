"""The spatial blocks that are resampled: squares of whole 50 px cells, over all rasters of a judgement."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from canopy.geo.aoi import SCALE_SLACK
from canopy.geo.grid import Grid
from canopy.metrics import BLOCK_PX

# Heights of forests are alike over some hundred metres; larger blocks would leave too few in a small area.
WANTED_M = 250.0
LEAST_WANTED = 25
# Each block costs some kilobytes; more of them make intervals no truer.
MOST = 1600


@dataclass(frozen=True)
class BlockLayout:
    """Blocks of `side_px` x `side_px` pixels from the upper left of every grid, numbered through.

    Attributes:
        grids: one per raster; shapes: (rows, cols) of blocks of each; bases: number of the first block.
    """

    grids: tuple[Grid, ...]
    side_px: int
    shapes: tuple[tuple[int, int], ...]
    bases: tuple[int, ...]

    @classmethod
    def of(cls, grids: Sequence[Grid], side_m: float | None = None) -> BlockLayout:
        """The largest side up to 250 m (in steps of 50 px) that leaves 25 blocks; larger above 1,600 blocks.

        `side_m` asks for a side; it is rounded to whole cells of 50 px.
        """
        cell_m = BLOCK_PX * float(np.median([grid.gsd_m for grid in grids]))
        if side_m is not None:
            cells = max(1, round(side_m / cell_m))
        else:
            cells = max(1, math.floor(WANTED_M / cell_m * (1 + SCALE_SLACK)))
            while cells > 1 and _count(grids, cells * BLOCK_PX) < LEAST_WANTED:
                cells -= 1
        while _count(grids, cells * BLOCK_PX) > max(MOST, len(grids)):
            cells += 1
        side = cells * BLOCK_PX
        shapes = tuple((-(-g.height // side), -(-g.width // side)) for g in grids)
        sizes = [rows * cols for rows, cols in shapes]
        return cls(tuple(grids), side, shapes, tuple(int(x) for x in np.cumsum([0, *sizes[:-1]])))

    @property
    def count(self) -> int:
        """Blocks in all, also empty ones."""
        rows, cols = self.shapes[-1]
        return self.bases[-1] + rows * cols

    @property
    def side_m(self) -> float:
        """Side in ground metres (median over the rasters)."""
        return self.side_px * float(np.median([grid.gsd_m for grid in self.grids]))

    def local(self, raster: int, row: int, col: int, shape: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
        """Blocks of a window: local number of each pixel's block (h, w), and the blocks' numbers (local,)."""
        rows = (row + np.arange(shape[0])) // self.side_px
        cols = (col + np.arange(shape[1])) // self.side_px
        wide = int(cols[-1] - cols[0]) + 1
        inside = (rows - rows[0])[:, None] * wide + (cols - cols[0])
        r, c = np.arange(rows[0], rows[-1] + 1), np.arange(cols[0], cols[-1] + 1)
        numbers = self.bases[raster] + r[:, None] * self.shapes[raster][1] + c
        return inside, numbers.ravel()

    def outlines(self) -> Iterator[tuple[int, tuple[float, float, float, float]]]:
        """(raster, (west, south, east, north) in its CRS) of every block, by number."""
        for raster, (grid, (rows, cols)) in enumerate(zip(self.grids, self.shapes, strict=True)):
            for r in range(rows):
                for c in range(cols):
                    west, north = grid.xy(r * self.side_px, c * self.side_px)
                    bottom = min((r + 1) * self.side_px, grid.height)
                    east, south = grid.xy(bottom, min((c + 1) * self.side_px, grid.width))
                    yield raster, (west, south, east, north)


def _count(grids: Sequence[Grid], side: int) -> int:
    return sum(-(-g.height // side) * -(-g.width // side) for g in grids)


def cells_of(shape: tuple[int, int]) -> tuple[np.ndarray, int]:
    """50 px cells of a window that begins on a cell's corner: each pixel's cell (h, w), and how many."""
    rows, cols = (np.arange(n) // BLOCK_PX for n in shape)
    wide = int(cols[-1]) + 1
    return rows[:, None] * wide + cols, wide * (int(rows[-1]) + 1)
