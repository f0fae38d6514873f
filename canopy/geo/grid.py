"""Grid: the north-up pixel grid that every raster of canopy lives on.

A `Grid` is a CRS, an affine transform and a shape, around odc-geo's `GeoBox`. All grids that share a
CRS, a pixel size and a phase lie on one *global lattice*; `origin_rc` is a grid's place on it. Results
are cut along that lattice, never along a file or an area, so that they do not depend on the cutting.

Axis order is always x (east or longitude) first in coordinates, and (row, col) or (height, width) in
array space, whatever the CRS's authority says.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from affine import Affine
from odc.geo import CRS
from odc.geo.geobox import GeoBox
from shapely.geometry import MultiPolygon, Polygon, box

from canopy.errors import InputError
from canopy.geo.crs import geod_of, to_crs, to_lonlat, transformer

WEB_MERCATOR = "EPSG:3857"
# Half the side of the Web-Mercator square: pi times the WGS84 semi-major axis.
HALF_WORLD_M = math.pi * 6378137.0
# Two grids share a lattice when their pixel corners agree to this fraction of a pixel.
PHASE_TOL_PX = 1e-3
PIXEL_RTOL = 1e-9
# Bounds this close to a pixel edge do not claim one more column (decimal noise in texts and files).
SNAP_TOL_PX = 1e-6


@dataclass(frozen=True)
class Grid:
    """A north-up pixel grid: CRS + affine + (height, width). Immutable, hashable, picklable."""

    geobox: GeoBox

    # ---- making -------------------------------------------------------------------------------
    @classmethod
    def of(cls, crs: Any, transform: Affine | Sequence[float], shape: tuple[int, int]) -> Grid:
        """Build from a CRS (anything pyproj reads), a pixel-to-world affine and (height, width).

        Raises InputError for no CRS, a rotated, sheared or south-up transform, or an empty shape.
        """
        affine = transform if isinstance(transform, Affine) else Affine(*transform[:6])
        values = (affine.a, affine.c, affine.e, affine.f)
        straight = abs(affine.b) <= 1e-9 * abs(affine.a) and abs(affine.d) <= 1e-9 * abs(affine.e)
        if not (all(map(math.isfinite, values)) and straight and affine.a > 0 and affine.e < 0):
            raise InputError(
                f"geotransform {tuple(affine)[:6]} is not north-up",
                expected="x size > 0, y size < 0, neither rotation nor shear",
                remedy="read it through canopy.geo.reading.read_window, which warps it",
            )
        height, width = (int(n) for n in shape)
        if height < 1 or width < 1:
            raise InputError(f"grid of {width} x {height} pixels is empty")
        north_up = Affine(affine.a, 0.0, affine.c, 0.0, affine.e, affine.f)
        return cls(GeoBox((height, width), north_up, to_crs(crs)))

    @classmethod
    def from_bounds(cls, bounds: Sequence[float], crs: Any, pixel: float | tuple[float, float]) -> Grid:
        """Smallest grid of `pixel`-sized pixels that holds `bounds` = (west, south, east, north).

        Edges are integer multiples of the pixel counted from the CRS origin, so that all such grids of
        one CRS and pixel share a lattice. `pixel` is in CRS units, one number or (x size, y size).
        """
        px, py = pixel if isinstance(pixel, tuple) else (pixel, pixel)
        west, south, east, north = (float(v) for v in bounds)
        c0, c1 = _snap_out(west / px, east / px)
        r0, r1 = _snap_out(-north / py, -south / py)
        return cls.of(crs, Affine(px, 0, c0 * px, 0, -py, -r0 * py), (r1 - r0, c1 - c0))

    # ---- plain facts --------------------------------------------------------------------------
    @property
    def crs(self) -> CRS:
        """The CRS, always read in x, y order."""
        assert self.geobox.crs is not None  # Grid.of refuses a grid without one
        return self.geobox.crs

    @property
    def transform(self) -> Affine:
        """Pixel (col, row) to world (x, y); (0, 0) is the upper-left corner of the first pixel."""
        return self.geobox.transform

    @property
    def height(self) -> int:
        """Rows."""
        return int(self.geobox.shape[0])

    @property
    def width(self) -> int:
        """Columns."""
        return int(self.geobox.shape[1])

    @property
    def shape(self) -> tuple[int, int]:
        """(height, width)."""
        return self.height, self.width

    @property
    def pixel(self) -> tuple[float, float]:
        """(x size, y size) of a pixel in CRS units, both positive."""
        return self.transform.a, -self.transform.e

    @property
    def bounds(self) -> tuple[float, float, float, float]:
        """(west, south, east, north) in CRS units."""
        west, north = self.xy(0, 0)
        east, south = self.xy(self.height, self.width)
        return west, south, east, north

    @property
    def gsd_m(self) -> float:
        """Ground sample distance in metres at the centre: the geometric mean of both pixel sides.

        Measured on the CRS's ellipsoid, so a Web-Mercator pixel shrinks by cos(latitude), degrees and
        feet become metres. Raises InputError where the CRS cannot place the centre on the Earth.
        """
        row, col = self.height / 2, self.width / 2
        ends = [self.xy(row + dr, col + dc) for dr, dc in ((0, -0.5), (0, 0.5), (-0.5, 0), (0.5, 0))]
        x, y = zip(*ends, strict=True)
        lons, lats = transformer(self.crs, "EPSG:4326").transform(x, y)
        if not all(math.isfinite(v) for v in (*lons, *lats)):
            raise InputError("the grid's centre is outside the domain of its CRS", where=str(self.crs))
        geod = geod_of(self.crs)
        _, _, side_x = geod.inv(lons[0], lats[0], lons[1], lats[1])
        _, _, side_y = geod.inv(lons[2], lats[2], lons[3], lats[3])
        return math.sqrt(side_x * side_y)

    # ---- the global lattice -------------------------------------------------------------------
    @property
    def lattice(self) -> tuple[int, int, float, float]:
        """(row, col, row phase, col phase): upper-left corner = (row + phase) pixels from the CRS origin.

        Rows grow southward. Phases are in about -0.5..0.5 px, rounded so that every window of one
        lattice gives the same pair.
        """
        px, py = self.pixel
        row, row_phase = _split_phase(-self.transform.f / py)
        col, col_phase = _split_phase(self.transform.c / px)
        return row, col, row_phase, col_phase

    @property
    def origin_rc(self) -> tuple[int, int]:
        """(row, col) of the upper-left pixel on the global lattice; row grows southward."""
        return self.lattice[:2]

    def is_aligned(self, other: Grid) -> bool:
        """Whether both lie on one lattice: same CRS, pixel size and phase."""
        try:
            self.offset_of(other)
        except InputError:
            return False
        return True

    def offset_of(self, other: Grid) -> tuple[int, int]:
        """(row, col) of `other`'s upper-left pixel in this grid. Raises InputError if not aligned."""
        sizes = zip(self.pixel, other.pixel, strict=True)
        row, col = self.rowcol(*other.xy(0, 0))
        apart = max(abs(row - round(row)), abs(col - round(col)))
        same_size = all(abs(ours - theirs) <= PIXEL_RTOL * ours for ours, theirs in sizes)
        if not same_size or apart > PHASE_TOL_PX or self.crs != other.crs:
            raise InputError(
                f"grids do not share a lattice: {other} against {self}",
                expected="the same CRS, pixel size and phase",
            )
        return round(row), round(col)

    # ---- derived grids ------------------------------------------------------------------------
    def window(self, row: int, col: int, height: int, width: int) -> Grid:
        """The grid of a window of this one; it may lie partly or wholly outside and never shrinks."""
        west, north = self.xy(row, col)
        px, py = self.pixel
        return Grid.of(self.crs, Affine(px, 0.0, west, 0.0, -py, north), (height, width))

    def window_over(self, bounds: Sequence[float], slack_px: float = SNAP_TOL_PX) -> Grid:
        """The smallest window, at least one pixel, whose pixels hold (west, south, east, north) of its CRS.

        It may lie outside. Bounds that reach less than `slack_px` into a pixel do not ask for it.
        """
        west, south, east, north = bounds
        (top, left), (bottom, right) = self.rowcol(west, north), self.rowcol(east, south)
        r0, r1 = _snap_out(top, bottom, slack_px)
        c0, c1 = _snap_out(left, right, slack_px)
        return self.window(r0, c0, r1 - r0, c1 - c0)

    def pad(self, px: int) -> Grid:
        """This grid with `px` more pixels on every side (fewer if negative)."""
        return self.window(-px, -px, self.height + 2 * px, self.width + 2 * px)

    # ---- coordinates --------------------------------------------------------------------------
    def xy(self, row: float, col: float) -> tuple[float, float]:
        """World (x, y) of a pixel-space point; (0, 0) is the upper-left CORNER, (0.5, 0.5) a centre."""
        t = self.transform
        return t.c + t.a * col, t.f + t.e * row

    def rowcol(self, x: float, y: float) -> tuple[float, float]:
        """Pixel-space (row, col), as floats, of a world point: the inverse of `xy`."""
        t = self.transform
        return (y - t.f) / t.e, (x - t.c) / t.a

    def outline(self, crs: Any = "EPSG:4326") -> Polygon | MultiPolygon:
        """The grid's edge as a polygon in `crs`, densified; split at the antimeridian when geographic."""
        return to_lonlat(box(*self.bounds), self.crs, crs)

    def __str__(self) -> str:
        west, south, east, north = self.bounds
        return (
            f"{self.width} x {self.height} px of {self.pixel[0]:g} in {self.crs}, "
            f"x {west:.10g} to {east:.10g}, y {south:.10g} to {north:.10g}"
        )


def _snap_out(low: float, high: float, slack: float = SNAP_TOL_PX) -> tuple[int, int]:
    """Integer interval that holds [low, high], at least one wide."""
    first = math.floor(low + slack)
    return first, max(math.ceil(high - slack), first + 1)


def _split_phase(position: float) -> tuple[int, float]:
    """Position in pixels -> (nearest integer, rest). The cut is a little off one half on purpose:
    half-pixel phases are common in files and must not flip between neighbours on float noise."""
    whole = math.floor(position + 0.5078125)
    return whole, round(position - whole, 6) + 0.0


# ---- cutting --------------------------------------------------------------------------------------
def tiles_over(grid: Grid, tile_px: int) -> list[Grid]:
    """Windows that partition `grid`, row by row from the upper left.

    They are cut at multiples of `tile_px` counted on the GLOBAL lattice: overlapping areas share tiles.
    """
    row0, col0 = grid.origin_rc
    return [
        grid.window(top - row0, left - col0, bottom - top, right - left)
        for top, bottom in _cuts(row0, grid.height, tile_px)
        for left, right in _cuts(col0, grid.width, tile_px)
    ]


def _cuts(start: int, length: int, step: int) -> list[tuple[int, int]]:
    """(from, to) of the pieces of [start, start + length) cut at multiples of step."""
    edges = [start, *range((start // step + 1) * step, start + length, step), start + length]
    return list(itertools.pairwise(edges))


# Quadkeys: Bing's naming of the tiles of the Web-Mercator pyramid, one digit of 0-3 per zoom level.
def quadkey_at(row: int, col: int, zoom: int) -> str:
    """Quadkey of a tile by its place on a zoom level, from the north-west corner.

    >>> quadkey_at(5, 3, 3)
    '213'
    """
    return "".join(str((row >> z & 1) * 2 + (col >> z & 1)) for z in reversed(range(zoom)))


def quadkey_bounds(quadkey: str) -> tuple[float, float, float, float]:
    """(west, south, east, north) of a quadkey in EPSG:3857 metres. Raises InputError for other digits."""
    if not quadkey or set(quadkey) - set("0123"):
        raise InputError(f"quadkey {quadkey!r}", expected="digits of 0, 1, 2, 3")
    row, col = (int("".join(str(int(d) >> bit & 1) for d in quadkey), 2) for bit in (1, 0))
    size = 2 * HALF_WORLD_M / (1 << len(quadkey))
    west, north = col * size - HALF_WORLD_M, HALF_WORLD_M - row * size
    return west, north - size, west + size, north
