"""AOI: the area to map, and the only place where latitude and longitude can be told apart.

`--bbox` is LAT,LON because that is how people write places; `--bounds` is west, south, east, north as GDAL,
rasterio and STAC have it. Everywhere else in canopy coordinates are x, y. `choose_area` holds the rule of
which option may be given, shared by every command and by the Python API.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import shapely
from affine import Affine
from odc.geo import CRS
from rasterio.features import geometry_mask
from shapely.geometry import MultiPolygon, Polygon, box

from canopy.errors import AreaError
from canopy.geo.crs import (
    centre_lonlat,
    geod_of,
    ground_crs,
    lonlat_bounds,
    metres_per_unit,
    output_crs,
    project,
    to_crs,
    to_lonlat,
    transformer,
    utm_crs,
)
from canopy.geo.grid import Grid
from canopy.geo.vector import read_zones

WGS84 = "EPSG:4326"
# Side of the square around a single point when nothing else is said: a square kilometre.
DEFAULT_SIZE_M = 1000.0
# A grid whose ground distance is this close to its nominal one keeps round pixel sizes (UTM: 0.04 %).
SCALE_SLACK = 0.01
# No raster of canopy is wider than this; wider means an area torn apart by its projection.
MAX_WIDTH_M = 1.5e7


@dataclass(frozen=True)
class AOI:
    """An area: polygons in a CRS (x, y order). A box is mapped as a whole rectangle, never masked."""

    geometry: Polygon | MultiPolygon
    crs: CRS
    is_box: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "crs", to_crs(self.crs))

    # ---- making -------------------------------------------------------------------------------
    @classmethod
    def from_bbox(cls, bbox: str | Sequence[float], size_m: float | None = None) -> AOI:
        """'LAT,LON' (a square of side `size_m`, by default 1000, around the point), or 'LAT,LON,LAT,LON'.

        Two corners may be any opposite ones; when their longitudes are more than 180 degrees apart the
        box is the short way round, across the antimeridian. Raises AreaError.
        """
        numbers = _numbers(bbox, "--bbox", "LAT,LON or LAT,LON,LAT,LON")
        if len(numbers) not in (2, 4):
            raise AreaError(f"{len(numbers)} numbers", where="--bbox", expected="LAT,LON or LAT,LON,LAT,LON")
        _check_latitudes(numbers)
        if len(numbers) == 2:
            size_m = DEFAULT_SIZE_M if size_m is None else size_m
            return cls._around(numbers[0], _wrap(numbers[1], "--bbox"), size_m)
        if size_m is not None:
            raise AreaError(
                "two corners and a size",
                where="--bbox",
                expected="--size-m only with one point",
                remedy="leave --size-m out, or give one point as LAT,LON",
            )
        lats = sorted(numbers[0::2])
        west, east = sorted(_wrap(v, "--bbox") for v in numbers[1::2])
        if east - west > 180.0:
            west, east = east, west
        return cls._lonlat_box((west, lats[0], east, lats[1]), to_crs(WGS84), "--bbox")

    @classmethod
    def from_bounds(cls, bounds: str | Sequence[float], crs: Any = WGS84) -> AOI:
        """West, south, east, north in `crs`. In degrees west > east crosses the antimeridian.

        Raises AreaError for a crossed, empty, or impossible box.
        """
        numbers = _numbers(bounds, "--bounds", "W,S,E,N")
        if len(numbers) != 4:
            raise AreaError(f"{len(numbers)} numbers", where="--bounds", expected="W,S,E,N")
        crs = ground_crs(crs, "--bounds-crs")
        west, south, east, north = numbers
        if crs.geographic:
            if max(abs(south), abs(north)) > 90:
                raise AreaError(
                    f"latitude {south if abs(south) > 90 else north:g} is beyond 90 degrees",
                    where="--bounds",
                    expected="the order W,S,E,N (longitude first)",
                )
            wrapped = (_wrap(west, "--bounds"), south, _wrap(east, "--bounds"), north)
            return cls._lonlat_box(wrapped, crs, "--bounds")
        if west >= east or south >= north:
            raise _no_area("--bounds", numbers)
        return cls(box(west, south, east, north), crs, is_box=True)

    @classmethod
    def from_file(cls, path: str | Path, layer: str | None = None) -> AOI:
        """Every polygon of a vector file (of one of its layers), united. Raises AreaError as `read_zones`."""
        _, crs, areas = read_zones(path, layer)
        return cls(shapely.union_all([area for area in areas if area is not None]), crs)

    @classmethod
    def from_grid(cls, grid: Grid) -> AOI:
        """The rectangle of a grid, in its CRS."""
        return cls(box(*grid.bounds), grid.crs, is_box=True)

    @classmethod
    def _around(cls, lat: float, lon: float, size_m: float) -> AOI:
        """A square in the point's own UTM zone."""
        if not (math.isfinite(size_m) and size_m > 0):
            raise AreaError(f"size of {size_m:g} m", where="--size-m", expected="a number above 0")
        crs = utm_crs(lon, lat)
        point = project(shapely.Point(lon, lat), WGS84, crs)
        half = size_m / 2
        return cls(box(point.x - half, point.y - half, point.x + half, point.y + half), crs, is_box=True)

    @classmethod
    def _lonlat_box(cls, bounds: tuple[float, float, float, float], crs: CRS, where: str) -> AOI:
        west, south, east, north = bounds
        if south >= north or west == east:
            raise _no_area(where, bounds)
        if west < east:
            return cls(box(west, south, east, north), crs, is_box=True)
        parts = [box(a, south, b, north) for a, b in ((west, 180.0), (-180.0, east)) if a < b]
        return cls(parts[0] if len(parts) == 1 else MultiPolygon(parts), crs, is_box=True)

    # ---- facts --------------------------------------------------------------------------------
    def to_crs(self, crs: Any) -> AOI:
        """The same area in another CRS; in degrees it is cut at the antimeridian."""
        crs = to_crs(crs)
        return self if crs == self.crs else AOI(_project(self.geometry, self.crs, crs), crs, self.is_box)

    @property
    def lonlat(self) -> Polygon | MultiPolygon:
        """The area in longitude and latitude (EPSG:4326), cut at the antimeridian."""
        return self.to_crs(WGS84).geometry

    @property
    def bounds_lonlat(self) -> tuple[float, float, float, float]:
        """(west, south, east, north) in degrees; west > east across the antimeridian."""
        return lonlat_bounds(self.lonlat)

    @property
    def centroid_lonlat(self) -> tuple[float, float]:
        """(lon, lat) of the middle of the area's bounding box, right across the antimeridian."""
        return centre_lonlat(self.lonlat)

    @property
    def size_m(self) -> tuple[float, float]:
        """(east-west, north-south) ground extent in metres, through the middle of the bounding box.

        The box is the CRS's own: a square in UTM keeps its size, though it is not square in degrees.
        """
        west, south, east, north = self.geometry.bounds
        if self.crs.geographic:
            west, south, east, north = self.bounds_lonlat
            east += 360.0 if east < west else 0.0
        # In pieces: the geodesic between two far points of a parallel is not the parallel.
        x, y, steps = (west + east) / 2, (south + north) / 2, np.linspace(0, 1, 17)
        across = west + steps * (east - west), np.full(17, y)
        along = np.full(17, x), south + steps * (north - south)
        geod, move = geod_of(to_crs(WGS84)), transformer(self.crs, WGS84).transform
        width, height = (float(geod.line_length(*move(*line))) for line in (across, along))
        return width, height

    def describe(self) -> str:
        """The echo before work, e.g. `23.65-23.55 S, 46.70-46.60 W, 10.2 x 11.1 km`."""
        west, south, east, north = self.bounds_lonlat
        narrowest = min(north - south, (east - west) % 360.0 or 360.0)
        digits = 2 if narrowest >= 0.05 else min(6, 1 - math.floor(math.log10(max(narrowest, 1e-5))))
        width, height = self.size_m
        if max(width, height) < 950:
            extent = f"{width:.0f} x {height:.0f} m"
        else:
            extent = f"{width / 1000:.1f} x {height / 1000:.1f} km"
        lats, lons = _range(south, north, "NS", digits), _range(west, east, "EW", digits)
        return f"{lats}, {lons}, {extent}"

    # ---- pixels -------------------------------------------------------------------------------
    def output_crs(self, native_crs: Any | None = None) -> CRS:
        """The default CRS of a map of this area: `canopy.geo.crs.output_crs`, but a square that was
        built in a UTM zone stays in it, also where its middle falls into the next one."""
        for candidate in (native_crs, self.crs):
            if candidate is not None and output_crs(self.lonlat, candidate) == to_crs(candidate):
                return to_crs(candidate)
        return output_crs(self.lonlat)

    def grid(self, crs: Any, gsd_m: float) -> Grid:
        """The grid in `crs` (projected) that holds the area, its pixel worth `gsd_m` GROUND metres.

        Where the CRS stretches the ground by more than 1 % (Web Mercator) the pixel is enlarged by the
        stretch at the area's centre. Edges are multiples of the pixel from the CRS origin. Raises
        AreaError for a geographic CRS, a bad `gsd_m`, or an area the CRS cannot hold.
        """
        crs = to_crs(crs)
        if not (math.isfinite(gsd_m) and gsd_m > 0):
            raise AreaError(f"ground sample distance of {gsd_m} m", expected="a number above 0")
        unit_m = metres_per_unit(crs)
        west, south, east, north = self.to_crs(crs).geometry.bounds
        if max(east - west, north - south) * unit_m > MAX_WIDTH_M:
            raise AreaError(
                f"the area spans {(east - west) * unit_m / 1000:.0f} km in {crs}",
                remedy="choose another --crs: this one tears the area apart at the antimeridian or a pole",
            )
        pixel = gsd_m / unit_m
        nominal = Grid.of(crs, (pixel, 0, (west + east) / 2, 0, -pixel, (south + north) / 2), (1, 1))
        stretch = nominal.gsd_m / gsd_m
        return Grid.from_bounds(
            (west, south, east, north), crs, pixel if abs(stretch - 1) < SCALE_SLACK else pixel / stretch
        )

    def mask(self, grid: Grid) -> np.ndarray:
        """Bool (height, width): True where a pixel's centre is inside; all True for a box.

        A pixel's answer is the same in every window of one lattice.
        """
        if self.is_box:
            return np.ones(grid.shape, dtype=bool)
        # In lattice pixels counted from the window: shifts by whole numbers, so ties do not flip.
        row0, col0, row_phase, col_phase = grid.lattice
        phase, size = np.array([col_phase, -row_phase]), np.array(grid.pixel)
        corner = np.array([col0, -row0], dtype=float)
        shape = shapely.transform(
            self.to_crs(grid.crs).geometry, lambda xy: np.round(xy / size - phase, 6) - corner
        )
        return np.asarray(geometry_mask([shape], grid.shape, Affine.scale(1, -1), invert=True))


@lru_cache(maxsize=64)
def _project(geometry: Polygon | MultiPolygon, source: CRS, target: CRS) -> Polygon | MultiPolygon:
    return to_lonlat(geometry, source, target)


# ---- texts ------------------------------------------------------------------------------------
def _numbers(value: str | Sequence[float], where: str, expected: str) -> list[float]:
    """Numbers separated by commas and/or spaces; words, NaN and infinity are refused."""
    parts: Sequence[Any] = re.split(r"[\s,;]+", value.strip(" ,;\t\n")) if isinstance(value, str) else value
    try:
        numbers = [float(p) for p in parts]
    except (TypeError, ValueError) as error:
        raise AreaError(f"{value!r} is not a list of numbers", where=where, expected=expected) from error
    if not all(math.isfinite(n) for n in numbers):
        raise AreaError(f"{value!r} holds a number that is not finite", where=where, expected=expected)
    return numbers


def _check_latitudes(numbers: list[float]) -> None:
    """Refuse |lat| > 90; show the swapped text when that would be legal."""
    wrong = [n for n in numbers[0::2] if abs(n) > 90]
    if not wrong:
        return
    remedy = None
    if all(abs(n) <= 90 for n in numbers[1::2]):
        swapped = [n for pair in zip(numbers[1::2], numbers[0::2], strict=True) for n in pair]
        remedy = f"did you mean --bbox {','.join(f'{n:.10g}' for n in swapped)} ?"
    raise AreaError(
        f"latitude {wrong[0]:g} is beyond 90 degrees",
        where="--bbox",
        expected="the order LAT,LON",
        remedy=remedy,
    )


def _wrap(lon: float, where: str) -> float:
    """Longitudes of -360..360 degrees to -180..180 (some data count from 0 to 360)."""
    if abs(lon) > 360:
        raise AreaError(f"longitude {lon:g} is beyond 360 degrees", where=where)
    return lon if -180 <= lon <= 180 else (lon + 180.0) % 360.0 - 180.0


def _no_area(where: str, numbers: Sequence[float]) -> AreaError:
    text = ",".join(f"{n:g}" for n in numbers)
    return AreaError(f"the area {text} is empty or crossed", where=where)


def _range(low: float, high: float, letters: str, digits: int) -> str:
    """'23.65-23.55 S' or '0.10 S-0.05 N'; letters are the positive and the negative side."""
    sides = [letters[0] if v > 0 or (v == 0 and max(low, high) > 0) else letters[1] for v in (low, high)]
    texts = [f"{abs(v):.{digits}f}" for v in (low, high)]
    if sides[0] == sides[1]:
        return f"{texts[0]}-{texts[1]} {sides[0]}"
    return f"{texts[0]} {sides[0]}-{texts[1]} {sides[1]}"


def choose_area(
    *,
    bbox: str | Sequence[float] | None = None,
    size_m: float | None = None,
    bounds: str | Sequence[float] | None = None,
    bounds_crs: Any = None,
    aoi: str | Path | None = None,
    layer: str | None = None,
) -> AOI | None:
    """The area of whichever option was given; None if none was.

    Raises:
        AreaError: two areas, an option without its partner, or an impossible area.
    """
    given = [
        name for name, value in (("--bbox", bbox), ("--bounds", bounds), ("--aoi", aoi)) if value is not None
    ]
    if len(given) > 1:
        raise AreaError(f"{' and '.join(given)} together", expected="one way to say the area")
    if size_m is not None and bbox is None:
        raise AreaError("a size without a point", where="--size-m", remedy="add --bbox LAT,LON")
    if bbox is not None:
        return AOI.from_bbox(bbox, size_m)
    if bounds is not None:
        return AOI.from_bounds(bounds, bounds_crs or "EPSG:4326")
    return AOI.from_file(aoi, layer) if aoi is not None else None
