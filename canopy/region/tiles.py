"""Cutting a region into work tiles whose cores partition the map of the region.

Tiles are squares of `tile_px` on the global lattice of the map's grid, clipped to the region. On the grid of
quadkeys `tile_px` is a power of two, and every tile lies in exactly one quadkey, whose name it has.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import shapely

from canopy.errors import ConfigError
from canopy.geo.area import AOI
from canopy.geo.grid import Grid
from canopy.geo.tiles import HALF_WORLD_M, quadkey_at

KINDS = ("quadkey", "utm")
# A UTM tile of zoom 10 is a square of this side, about what a quadkey of zoom 10 is at the equator.
UTM_ZOOM_10_M = 40_960.0
LEAST_TILE_PX = 16


@dataclass(frozen=True)
class TileTask:
    """One unit of work: `ordinal` counts the region's tiles, (row, col) is its place on the tile lattice."""

    ordinal: int
    id: str
    row: int
    col: int
    km2: float = 0.0


@dataclass(frozen=True)
class Tiling:
    """How a region is cut.

    Attributes:
        kind: `quadkey` or `utm` (squares of any projected CRS).
        area: the grid of the whole map; tiles partition it.
        tile_px: side of a tile that is not clipped.
    """

    kind: str
    area: Grid
    tile_px: int

    @property
    def quadkey_zoom(self) -> int:
        """Zoom of the quadkeys that are the tiles (kind `quadkey`)."""
        world_px = 2 * HALF_WORLD_M / self.area.pixel[0]
        return round(math.log2(world_px / self.tile_px))

    @property
    def rows(self) -> range:
        """Tile rows that the region touches, from north to south."""
        first = self.area.origin_rc[0]
        return range(first // self.tile_px, -(-(first + self.area.height) // self.tile_px))

    @property
    def cols(self) -> range:
        """Tile columns that the region touches, from west to east."""
        first = self.area.origin_rc[1]
        return range(first // self.tile_px, -(-(first + self.area.width) // self.tile_px))

    def offset(self, row: int, col: int) -> tuple[int, int, int, int]:
        """(row, col, height, width) of a tile in the map of the region, in pixels."""
        row0, col0 = self.area.origin_rc
        top, left = max(row * self.tile_px - row0, 0), max(col * self.tile_px - col0, 0)
        bottom = min((row + 1) * self.tile_px - row0, self.area.height)
        right = min((col + 1) * self.tile_px - col0, self.area.width)
        return top, left, bottom - top, right - left

    def window(self, row: int, col: int) -> Grid:
        """The pixels that a tile writes."""
        return self.area.window(*self.offset(row, col))

    def cell(self, row: int, col: int, tiles: int) -> Grid:
        """The square of `tiles` x `tiles` tiles that a tile is in, with half a tile around it."""
        row0, col0 = self.area.origin_rc
        side, margin = tiles * self.tile_px, self.tile_px // 2 + 512
        top, left = row // tiles * side - row0 - margin, col // tiles * side - col0 - margin
        return self.area.window(top, left, side + 2 * margin, side + 2 * margin)

    def name(self, row: int, col: int) -> str:
        """A tile's id: its quadkey, or the CRS and its place on the tile lattice."""
        if self.kind != "quadkey":
            return f"{self.area.crs.epsg or 'grid'}_r{row}_c{col}"
        zoom = self.quadkey_zoom
        half = 1 << zoom >> 1
        return quadkey_at(row + half, col + half, zoom)

    def tiles(self, aoi: AOI) -> Iterator[TileTask]:
        """The tiles that share ground with the area, from north-west to south-east."""
        shape = None
        if not aoi.is_box:
            shape = aoi.to_crs(self.area.crs).geometry
            shapely.prepare(shape)
        ordinal = 0
        for row in self.rows:
            km2 = self._km2_of(row)
            for col in self._cols_hit(row, shape):
                _, _, height, width = self.offset(row, col)
                yield TileTask(ordinal, self.name(row, col), row, col, km2 * height * width)
                ordinal += 1

    def count(self, aoi: AOI) -> int:
        """How many tiles `tiles` gives."""
        if aoi.is_box:
            return len(self.rows) * len(self.cols)
        shape = aoi.to_crs(self.area.crs).geometry
        shapely.prepare(shape)
        return sum(len(self._cols_hit(row, shape)) for row in self.rows)

    def _cols_hit(self, row: int, shape: shapely.Geometry | None) -> list[int]:
        cols = np.arange(self.cols.start, self.cols.stop)
        if shape is None:
            return [int(col) for col in cols]
        west, _, _, north = self.area.bounds
        px, py = self.area.pixel
        row0, col0 = self.area.origin_rc
        side = self.tile_px
        left, top = west + (cols * side - col0) * px, north - (row * side - row0) * py
        boxes = shapely.box(left, top - side * py, left + side * px, top)
        return [int(col) for col in cols[shapely.intersects(shape, boxes)]]

    def _km2_of(self, row: int) -> float:
        """Square kilometres of ground in one pixel of a tile row (at the region's middle column)."""
        top, _, height, _ = self.offset(row, self.cols.start)
        middle = self.area.window(top + height // 2, self.area.width // 2, 1, 1)
        return middle.gsd_m**2 / 1e6


def side_px(kind: str, pixel_m: float, zoom: int, most_px: int) -> int:
    """Side of a work tile: that of `zoom`, halved until it is at most `most_px`.

    Args:
        kind: `quadkey` or `utm`.
        pixel_m: the map's pixel, metres of its CRS (for quadkeys the world divided by a power of two).
        zoom: zoom of the tiles that were asked for; each step halves the side.
        most_px: what one task may take on; a power of two.

    Raises:
        ConfigError: tiles without pixels.
    """
    if kind == "quadkey":
        side = 2 * HALF_WORLD_M / pixel_m / (1 << zoom)
    else:
        side = UTM_ZOOM_10_M / pixel_m / 2.0 ** (zoom - 10)
    side = float(round(side)) if kind == "quadkey" else side
    while side > most_px:
        side /= 2
    if side < LEAST_TILE_PX:
        raise ConfigError(
            f"zoom {zoom} makes tiles of {side:.0f} px", where="--zoom",
            expected=f"at least {LEAST_TILE_PX} px at this ground sample distance",
        )  # fmt: skip
    return round(side)
