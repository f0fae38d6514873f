"""Coordinate reference systems: reading them, choosing one for an output, moving shapes between them.

Everything here is in x, y order (longitude first). The order of users' texts is settled in `area`.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Any

import numpy as np
import pyproj
import shapely
from odc.geo import CRS
from pyproj.exceptions import CRSError, ProjError
from shapely.geometry import MultiPolygon, Polygon, box
from shapely.geometry.base import BaseGeometry

from canopy.errors import AreaError, InputError

# Straight edges are cut into this many pieces before they are bent by a projection.
EDGE_PIECES = 64
# Of latitude, on the mean sphere.
METRES_PER_DEGREE = 111_195.0


@lru_cache(maxsize=256)
def _flat(text: str) -> CRS:
    """The horizontal part of a CRS, by its EPSG code where it has one: files spell one CRS in many ways."""
    found = pyproj.CRS(text).to_2d()
    code = found.to_epsg()
    named = CRS(f"EPSG:{code}") if code is not None else None
    return named if named is not None and named.proj == found else CRS(found.to_wkt())


def to_crs(value: Any) -> CRS:
    """Anything that names a CRS -> a horizontal odc `CRS`.

    Accepts odc, pyproj and rasterio objects, EPSG codes and texts. A CRS with heights, compound or of three
    axes, gives its horizontal part: this is the one place where that happens, and no map is written with
    another. Raises InputError when there is none or it cannot be read.
    """
    if value is None or value == "":
        raise InputError("no coordinate reference system", remedy="name one with --crs, e.g. EPSG:32610")
    try:
        if isinstance(value, int):
            return _flat(f"EPSG:{value}")
        # Of odc's own the text is at hand; making WKT, or a hash, of a CRS takes long.
        plain = isinstance(value, CRS) or not hasattr(value, "to_wkt")
        return _flat(str(value) if plain else value.to_wkt())
    except (CRSError, ValueError, TypeError) as error:
        raise InputError(
            f"unreadable coordinate reference system {str(value)[:80]!r}",
            expected="a code such as EPSG:32610, or WKT",
        ) from error


def ground_crs(value: Any, where: object) -> CRS:
    """`to_crs` for pixels: vertical, geocentric and local ones, which place none, raise InputError."""
    crs = to_crs(value)
    if not (crs.proj.is_projected or crs.proj.is_geographic):
        raise InputError(
            f"{crs.proj.name} is a {crs.proj.type_name}, which places nothing on a map",
            where=where,
            expected="a projected or geographic CRS such as EPSG:32610",
        )
    return crs


def transformer(source: Any, target: Any) -> pyproj.Transformer:
    """The cached x, y ordered transformer between two CRSs (pyproj keeps one state per thread)."""
    return _transformer(to_crs(source), to_crs(target))


@lru_cache(maxsize=256)
def _transformer(source: CRS, target: CRS) -> pyproj.Transformer:
    try:
        return pyproj.Transformer.from_crs(source.proj, target.proj, always_xy=True)
    except ProjError as error:
        raise InputError(f"no way from {str(source)[:60]} to {str(target)[:60]}") from error


@lru_cache(maxsize=64)
def x_period(crs: CRS) -> float | None:
    """One turn around the Earth in units of x, for CRSs whose x jumps at the antimeridian; else None."""
    proj = crs.proj
    if proj.is_geographic:
        return 2 * math.pi / proj.axis_info[0].unit_conversion_factor
    operation = proj.coordinate_operation
    if operation is not None and "Pseudo Mercator" in operation.method_name:
        return 2 * math.pi * geod_of(crs).a
    return None


@lru_cache(maxsize=64)
def geod_of(crs: CRS) -> pyproj.Geod:
    """The ellipsoid of a CRS, WGS84 where it has none."""
    return crs.proj.get_geod() or pyproj.Geod(ellps="WGS84")


def metres_per_unit(crs: Any) -> float:
    """Metres in one unit of a projected CRS (0.3048... for feet). Raises AreaError for a geographic CRS."""
    crs = to_crs(crs)
    if not crs.proj.is_projected:
        raise AreaError(
            f"{crs} is not a projected CRS",
            expected="a CRS in metres or feet",
            remedy="leave --crs out for the area's UTM zone",
        )
    return float(crs.proj.axis_info[0].unit_conversion_factor)


# ---- choosing a CRS ---------------------------------------------------------------------------
def utm_crs(lon: float, lat: float) -> CRS:
    """WGS84 UTM zone of a point in degrees; polar stereographic (UPS) beyond 84 N and 80 S.

    The plain six-degree zones, as EPSG's areas of use have them (no Norway or Svalbard exceptions).
    """
    if not (math.isfinite(lon) and abs(lat) <= 90):
        raise AreaError(f"no UTM zone for latitude {lat:g}, longitude {lon:g}")
    if lat > 84 or lat < -80:
        return to_crs(32661 if lat > 0 else 32761)
    return to_crs((32600 if lat >= 0 else 32700) + _zone_of(lon))


def _zone_of(lon: float) -> int:
    return int((lon + 180.0) % 360.0 // 6.0) + 1


@lru_cache(maxsize=64)
def utm_zone(crs: CRS) -> int | None:
    """Zone number when a CRS is a UTM zone of any datum in metres, else None."""
    zone = crs.proj.utm_zone if crs.proj.is_projected and metres_per_unit(crs) == 1 else None
    return int(zone[:-1]) if zone else None


def output_crs(area_lonlat: BaseGeometry, native_crs: Any | None = None) -> CRS:
    """The default CRS of a map of an area given in longitude and latitude.

    The imagery's own CRS when it is a UTM zone of any datum, of the area's centre or next to it: no
    needless resampling. Otherwise the WGS84 zone of the centre, or UPS beyond 84 N and 80 S.
    """
    lon, lat = centre_lonlat(area_lonlat)
    if native_crs is not None and -80 <= lat <= 84:
        native = to_crs(native_crs)
        zone = utm_zone(native)
        if zone is not None and (zone - _zone_of(lon)) % 60 in (0, 1, 59):
            return native
    return utm_crs(lon, lat)


def centre_lonlat(area_lonlat: BaseGeometry) -> tuple[float, float]:
    """(lon, lat) of the middle of an area's bounding box, right across the antimeridian too."""
    west, south, east, north = lonlat_bounds(area_lonlat)
    width = (east - west) % 360.0 or (360.0 if east != west else 0.0)
    return (west + width / 2 + 180.0) % 360.0 - 180.0, (south + north) / 2


def lonlat_bounds(area_lonlat: BaseGeometry) -> tuple[float, float, float, float]:
    """(west, south, east, north) in degrees; west > east when the area crosses the antimeridian.

    Of the gaps between the parts' longitudes, the widest one is taken to be outside.
    """
    if area_lonlat.is_empty:
        raise AreaError("the area is empty, or nowhere on the Earth")
    parts = shapely.get_parts(area_lonlat)
    _, south, _, north = area_lonlat.bounds
    spans = sorted((p.bounds[0], p.bounds[2]) for p in parts)
    west, east = spans[0][0], max(e for _, e in spans)
    widest, reach = west + 360.0 - east, spans[0][1]
    result = west, east
    # The margin keeps equal gaps (two points opposite each other) on the plain, uncrossed reading.
    for start, end in spans[1:]:
        if start - reach > widest + 1e-9:
            widest, result = start - reach, (start, reach)
        reach = max(reach, end)
    return result[0], south, result[1], north


# ---- moving shapes ----------------------------------------------------------------------------
def project(geometry: BaseGeometry, source: Any, target: Any) -> BaseGeometry:
    """Move a shape between CRSs, its edges bent. Raises AreaError where it leaves the target's domain."""
    source, target = to_crs(source), to_crs(target)
    if source == target:
        return geometry
    west, south, east, north = geometry.bounds
    dense = shapely.segmentize(geometry, max(east - west, north - south) / EDGE_PIECES or 1.0)
    move = transformer(source, target).transform
    moved = shapely.transform(dense, lambda xy: np.column_stack(move(xy[:, 0], xy[:, 1])))
    if not np.isfinite(shapely.get_coordinates(moved)).all():
        raise AreaError(
            f"the area is outside the domain of {target}", remedy="choose another --crs or leave it out"
        )
    return moved


def to_lonlat(geometry: BaseGeometry, source: Any, target: Any = "EPSG:4326") -> Polygon | MultiPolygon:
    """Polygons moved to `target`; when that is geographic they are cut at the antimeridian.

    Longitudes come out in -180..180. A polygon around a pole gets an edge along that pole.
    """
    target = to_crs(target)
    moved = project(geometry, source, target)
    if not target.geographic:
        return _as_polygons(moved)
    pieces = [q for p in shapely.get_parts(moved) for q in _cut_at_antimeridian(_unwrap(p))]
    return _as_polygons(shapely.union_all(pieces)) if len(pieces) != 1 else pieces[0]


def _as_polygons(geometry: BaseGeometry) -> Polygon | MultiPolygon:
    """Only the areas of a repaired geometry."""
    if not geometry.is_valid:
        geometry = shapely.make_valid(geometry)
    if isinstance(geometry, Polygon | MultiPolygon):
        return geometry
    parts = [p for p in shapely.get_parts(geometry) if isinstance(p, Polygon | MultiPolygon)]
    return shapely.union_all(parts)


def _unwrap(polygon: Polygon) -> Polygon:
    """A polygon in degrees whose rings jump at 180 -> one with continuous longitudes."""
    rings = [np.asarray(r.coords)[:, :2].copy() for r in (polygon.exterior, *polygon.interiors)]
    if all(np.abs(np.diff(r[:, 0])).max() <= 180.0 for r in rings):
        return polygon
    for ring in rings:
        ring[:, 0] = np.unwrap(ring[:, 0], period=360.0)
        # Holes are brought next to the outer ring, which was unwrapped from its own first point.
        ring[:, 0] += 360.0 * np.round((rings[0][:, 0].mean() - ring[:, 0].mean()) / 360.0)
    outer = rings[0]
    if abs(outer[-1, 0] - outer[0, 0]) > 180.0:  # winds around the globe: a pole is inside
        pole = math.copysign(90.0, outer[:, 1].mean())
        outer = np.vstack([outer, [(outer[-1, 0], pole), (outer[0, 0], pole)]])
    return Polygon(outer, rings[1:])


def _cut_at_antimeridian(polygon: Polygon) -> list[BaseGeometry]:
    """Pieces of a polygon with continuous longitudes, each moved into -180..180."""
    west, _, east, _ = polygon.bounds
    if west >= -180.0 and east <= 180.0:
        return [polygon]
    if not polygon.is_valid:
        polygon = shapely.make_valid(polygon)
    pieces = []
    for turn in range(math.floor((west + 180) / 360), math.ceil((east + 180) / 360)):
        shift = 360.0 * turn
        piece = polygon.intersection(box(shift - 180, -90, shift + 180, 90))
        piece = shapely.transform(piece, lambda xy, by=shift: xy - (by, 0.0))
        pieces += [p for p in shapely.get_parts(piece) if isinstance(p, Polygon) and p.area > 0]
    return pieces
