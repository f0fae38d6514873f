"""Cutting an area into units of work: square tiles on the global lattice, or Web-Mercator quadkeys."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from affine import Affine
from shapely.geometry import box

from canopy.errors import InputError
from canopy.geo.area import AOI
from canopy.geo.grid import Grid

WEB_MERCATOR = "EPSG:3857"
# Half the side of the Web-Mercator square: pi times the WGS84 semi-major axis.
HALF_WORLD_M = math.pi * 6378137.0
MAX_ZOOM = 30


@dataclass(frozen=True)
class Tile:
    """One unit of work. `core` is what it writes, `read` (core + halo) is what it needs to see."""

    id: str
    core: Grid
    read: Grid


def tiles_over(grid: Grid, tile_px: int, halo_px: int = 0) -> list[Tile]:
    """Tiles whose cores partition `grid`, row by row from the upper left.

    Cores are cut at multiples of `tile_px` counted on the GLOBAL lattice, then clipped to the grid, so
    overlapping areas share tiles. `read` reaches `halo_px` beyond its core on every side, also beyond
    the grid. The id is the lattice tile, `r{row}_c{col}`.
    """
    if tile_px < 1 or halo_px < 0:
        raise InputError(f"tiles of {tile_px} px with a halo of {halo_px} px", expected="at least 1 and 0")
    row0, col0 = grid.origin_rc
    tiles = []
    for i, top, bottom in _cuts(row0, grid.height, tile_px):
        for j, left, right in _cuts(col0, grid.width, tile_px):
            core = grid.window(top - row0, left - col0, bottom - top, right - left)
            tiles.append(Tile(f"r{i}_c{j}", core, core.pad(halo_px) if halo_px else core))
    return tiles


def _cuts(start: int, length: int, step: int) -> Iterator[tuple[int, int, int]]:
    """(index, from, to) of the pieces of [start, start + length) cut at multiples of step."""
    for index in range(start // step, -(-(start + length) // step)):
        yield index, max(start, index * step), min(start + length, (index + 1) * step)


# ---- quadkeys (Bing's naming of the Web-Mercator pyramid: one digit of 0-3 per zoom level) --------
def quadkey_of(lon: float, lat: float, zoom: int) -> str:
    """Quadkey of the tile that holds a point, in degrees; latitudes are clipped to the square's edge."""
    _check_zoom(zoom)
    count = 1 << zoom
    sine = math.sin(math.radians(max(-85.06, min(85.06, lat))))
    x = (lon + 180.0) / 360.0
    x = x if 0.0 <= x <= 1.0 else x % 1.0  # 180 E is the east edge of the last column
    y = 0.5 - math.log((1 + sine) / (1 - sine)) / (4 * math.pi)
    col, row = (min(count - 1, max(0, int(v * count))) for v in (x, y))
    return quadkey_at(row, col, zoom)


def quadkey_at(row: int, col: int, zoom: int) -> str:
    """Quadkey of a tile by its place on a zoom level, from the north-west corner; undoes `quadkey_rc`.

    >>> quadkey_at(5, 3, 3)
    '213'
    """
    return "".join(str((row >> z & 1) * 2 + (col >> z & 1)) for z in reversed(range(zoom)))


def quadkey_rc(quadkey: str) -> tuple[int, int]:
    """(row, col) of a quadkey on its zoom level, from the north-west corner. Raises InputError."""
    if not quadkey or len(quadkey) > MAX_ZOOM or set(quadkey) - set("0123"):
        raise InputError(f"quadkey {quadkey!r}", expected=f"1 to {MAX_ZOOM} digits of 0, 1, 2, 3")
    row = int("".join(str(int(d) >> 1) for d in quadkey), 2)
    col = int("".join(str(int(d) & 1) for d in quadkey), 2)
    return row, col


def quadkey_bounds(quadkey: str) -> tuple[float, float, float, float]:
    """(west, south, east, north) of a quadkey in EPSG:3857 metres."""
    row, col = quadkey_rc(quadkey)
    size = 2 * HALF_WORLD_M / (1 << len(quadkey))
    west, north = col * size - HALF_WORLD_M, HALF_WORLD_M - row * size
    return west, north - size, west + size, north


def quadkeys(aoi: AOI, zoom: int) -> list[str]:
    """Quadkeys of a zoom level that share some area with an AOI, sorted; right across the antimeridian."""
    _check_zoom(zoom)
    found: set[str] = set()
    lonlat = aoi.lonlat
    for part in getattr(lonlat, "geoms", [lonlat]):
        west, south, east, north = part.bounds
        r0, c0 = quadkey_rc(quadkey_of(west, north, zoom))
        r1, c1 = quadkey_rc(quadkey_of(east, south, zoom))
        for row in range(r0, r1 + 1):
            for col in range(c0, c1 + 1):
                if _lonlat_box(row, col, zoom).intersection(part).area > 0:
                    found.add(quadkey_at(row, col, zoom))
    return sorted(found)


def quadkey_grid(quadkey: str, px: int) -> Grid:
    """The EPSG:3857 grid of px x px pixels that fills a quadkey (32768 at zoom 10: 1.19433 m)."""
    if px < 1:
        raise InputError(f"{px} px per quadkey", expected="at least 1")
    west, _, east, north = quadkey_bounds(quadkey)
    size = (east - west) / px
    return Grid.of(WEB_MERCATOR, Affine(size, 0, west, 0, -size, north), (px, px))


def _lonlat_box(row: int, col: int, zoom: int):  # type: ignore[no-untyped-def]  # -> shapely Polygon
    """A quadkey's rectangle in degrees: Web-Mercator edges are parallels and meridians."""
    count = 1 << zoom
    west, east = (c / count * 360.0 - 180.0 for c in (col, col + 1))
    north, south = (math.degrees(math.atan(math.sinh(math.pi * (1 - 2 * r / count)))) for r in (row, row + 1))
    return box(west, south, east, north)


def _check_zoom(zoom: int) -> None:
    if not 1 <= zoom <= MAX_ZOOM:
        raise InputError(f"zoom {zoom}", where="--zoom", expected=f"1 to {MAX_ZOOM}")
