"""Web-Mercator tiles: which there are, how coarse ones are made of finer ones, and how they are stored.

Heights travel in PNGs of the terrarium encoding (https://github.com/tilezen/joerd/blob/master/docs/formats.md),
metres = red * 256 + green + blue / 256 - 32768, so that the page can colour them anew at once and a page
without a server can still tell a height. Images are WebP with transparency.
"""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache

import numpy as np
from PIL import Image

from canopy.geo.grid import HALF_WORLD_M, WEB_MERCATOR, Grid

TILE_PX = 256
MAX_ZOOM = 24
# Of an image 850 kB each.
KEPT_TILES = 256
Pixels = tuple[np.ndarray, np.ndarray]
"""float32 (bands, 256, 256) and valid (256, 256)."""


def tile_grid(zoom: int, x: int, y: int) -> Grid:
    """The pixels of a tile; x counts from the west, y from the north."""
    side = 2 * HALF_WORLD_M / 2**zoom
    pixel = side / TILE_PX
    return Grid.of(
        WEB_MERCATOR,
        (pixel, 0, x * side - HALF_WORLD_M, 0, -pixel, HALF_WORLD_M - y * side),
        (TILE_PX, TILE_PX),
    )


def tile_at(lon: float, lat: float, zoom: int) -> tuple[int, int]:
    """(x, y) of the tile that holds a point."""
    y = math.asinh(math.tan(math.radians(min(max(lat, -85.05), 85.05)))) / math.pi
    last = 2**zoom - 1
    found = ((lon + 180) / 360 * 2**zoom, (1 - y) / 2 * 2**zoom)
    return min(max(int(found[0]), 0), last), min(max(int(found[1]), 0), last)


def tiles_in(bounds: Sequence[float], zoom: int) -> Iterator[tuple[int, int]]:
    """(x, y) of the tiles that touch (west, south, east, north) in degrees."""
    (left, top), (right, bottom) = (tile_at(*corner, zoom) for corner in _corners(bounds))
    yield from ((x, y) for y in range(top, bottom + 1) for x in range(left, right + 1))


def _corners(bounds: Sequence[float]) -> tuple[tuple[float, float], tuple[float, float]]:
    west, south, east, north = bounds
    return (west, north), (east, south)


def native_zoom(gsd_m: float, latitude: float) -> int:
    """The coarsest zoom whose ground pixels are no larger than `gsd_m`: every source pixel has its own."""
    widest = 2 * HALF_WORLD_M / TILE_PX * math.cos(math.radians(latitude))
    return min(max(math.ceil(math.log2(widest / gsd_m) - 1e-6), 0), MAX_ZOOM)


class Pyramid:
    """Tiles of all zooms, of which the latest are kept.

    Args:
        read: pixels on a tile's grid.
        is_cheap: whether a tile can be read as such; the others are put together from the four below them.
        deepest: zoom of the finest pixels, from which on tiles are always read.
        bounds: west, south, east, north in degrees; tiles outside are empty.
    """

    def __init__(
        self, read: Callable[[Grid], Pixels], is_cheap: Callable[[Grid], bool], deepest: int,
        bounds: Sequence[float],
    ) -> None:  # fmt: skip
        self._read, self._is_cheap, self.deepest, self.bounds = read, is_cheap, deepest, tuple(bounds)
        self.tile = lru_cache(KEPT_TILES)(self._tile)

    def _tile(self, zoom: int, x: int, y: int) -> Pixels | None:
        """The pixels of a tile; None where none is valid."""
        (left, top), (right, bottom) = (tile_at(*corner, zoom) for corner in _corners(self.bounds))
        if not (left <= x <= right and top <= y <= bottom):
            return None
        grid = tile_grid(zoom, x, y)
        if zoom >= self.deepest or self._is_cheap(grid):
            values, valid = self._read(grid)
            return (values, valid) if valid.any() else None
        below = [self.tile(zoom + 1, 2 * x + right, 2 * y + down) for down in (0, 1) for right in (0, 1)]
        return _mean_of_four(below) if any(below) else None


def _mean_of_four(below: Sequence[Pixels | None]) -> Pixels:
    """A tile of the means of 2 x 2 pixels of the tiles below it: upper left, upper right, lower left, ..."""
    half = TILE_PX // 2
    bands = next(len(tile[0]) for tile in below if tile is not None)
    sums = np.zeros((bands, TILE_PX, TILE_PX), np.float32)
    counts = np.zeros((TILE_PX, TILE_PX), np.float32)
    for number, tile in enumerate(below):
        if tile is not None:
            row, col = number // 2 * half, number % 2 * half
            here = np.s_[row : row + half, col : col + half]
            values, valid = tile
            sums[:, *here] = np.where(valid, values, 0).reshape(bands, half, 2, half, 2).sum((2, 4))
            counts[here] = valid.reshape(half, 2, half, 2).sum((1, 3))
    return sums / np.maximum(counts, 1), counts > 0


# ---- as files -------------------------------------------------------------------------------------
def height_png(tile: Pixels | None) -> bytes:
    """Heights to the centimetre, transparent where there is none."""
    rgba = np.zeros((TILE_PX, TILE_PX, 4), np.uint8)
    if tile is not None:
        values, valid = tile
        # Whole centimetres take fewer bytes, and survive the 1/256 m of the encoding.
        steps = np.rint((np.rint(values[0] * 100) / 100 + 32768) * 256).astype(np.int64)
        for channel, shift in enumerate((16, 8, 0)):
            rgba[..., channel] = np.where(valid, steps >> shift & 255, 0)
        rgba[..., 3] = np.where(valid, 255, 0)
    return _encoded(rgba, "PNG", optimize=False)


def image_webp(tile: Pixels | None) -> bytes:
    """Colours 0..1 as a picture, transparent where there is none."""
    rgba = np.zeros((TILE_PX, TILE_PX, 4), np.uint8)
    if tile is not None:
        rgba[..., :3] = np.moveaxis(np.rint(np.clip(tile[0], 0, 1) * 255), 0, -1)
        rgba[..., 3] = np.where(tile[1], 255, 0)
    return _encoded(rgba, "WEBP", quality=85)


def _encoded(rgba: np.ndarray, kind: str, **options: object) -> bytes:
    file = io.BytesIO()
    Image.fromarray(rgba).save(file, kind, **options)
    return file.getvalue()
