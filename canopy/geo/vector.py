"""Polygons out of any vector file, checked and repaired."""

from __future__ import annotations

from pathlib import Path

import shapely
from odc.geo import CRS
from shapely.geometry import MultiPolygon, Polygon
from shapely.geometry.base import BaseGeometry

from canopy.errors import AreaError
from canopy.geo.crs import to_crs, to_lonlat
from canopy.geo.paths import check_name

PARQUET = {".parquet", ".geoparquet", ".pq"}
GEOJSON = {".json", ".geojson"}


def read_polygons(path: str | Path) -> tuple[Polygon | MultiPolygon, CRS]:
    """Union of the polygons of a file and their CRS (x, y order).

    Holes and several parts are kept; self-crossing rings are repaired; points and lines are left out.
    Raises AreaError for a missing, unreadable or empty file, no polygons, no CRS, or coordinates in
    degrees that only make sense with latitude and longitude swapped. Longitudes come out in -180..180.
    """
    where = check_name(path, AreaError)
    if not Path(where).is_file():
        raise AreaError("no such file", where=path, expected="a vector file such as GeoJSON or GeoPackage")
    frame = _read(Path(where))
    shapes = [g for g in frame.geometry if g is not None and not g.is_empty]
    if not shapes:
        raise AreaError("the file has no features", where=path, expected="at least one polygon")
    crs = _crs_of(frame, Path(where))
    parts = [p for shape in shapes for p in _polygons(shape)]
    if not parts:
        kinds = sorted({g.geom_type for g in shapes})
        raise AreaError(f"only {', '.join(kinds)} in the file", where=path, expected="polygons with an area")
    area = shapely.force_2d(shapely.union_all(parts))
    return _in_degrees(area, crs, where), crs


def read_zones(path: str | Path):  # type: ignore[no-untyped-def]  # -> tuple[GeoDataFrame, CRS, list]
    """Every feature of a file: its table, its CRS, and one repaired 2-D area per row (None without one).

    Raises AreaError as `read_polygons` does.
    """
    where = check_name(path, AreaError)
    if not Path(where).is_file():
        raise AreaError("no such file", where=path, expected="a vector file such as GeoJSON or GeoPackage")
    frame = _read(Path(where))
    if not len(frame):
        raise AreaError("the file has no features", where=path, expected="at least one polygon")
    crs = _crs_of(frame, Path(where))
    areas = []
    for shape in frame.geometry:
        parts = [] if shape is None or shape.is_empty else _polygons(shape)
        area = shapely.force_2d(shapely.union_all(parts)) if parts else None
        areas.append(None if area is None else _in_degrees(area, crs, where))
    if all(area is None for area in areas):
        raise AreaError("no polygons in the file", where=path, expected="polygons with an area")
    return frame, crs, areas


def _read(path: Path):  # type: ignore[no-untyped-def]  # -> geopandas.GeoDataFrame, imported late
    import geopandas

    try:
        if path.suffix.lower() in PARQUET:
            return geopandas.read_parquet(path)
        return geopandas.read_file(path, layer=_layer(path))
    except AreaError:
        raise
    except Exception as error:  # each driver has its own kind of exception
        raise AreaError(
            f"not a readable vector file ({type(error).__name__})",
            where=path,
            expected="GeoJSON, GeoPackage, Shapefile, KML or GeoParquet",
        ) from error


def _layer(path: Path) -> str | None:
    """The only layer that can hold polygons; None where there is but one of any kind."""
    import geopandas

    layers = geopandas.list_layers(path)
    if len(layers) < 2:
        return None
    kinds = layers["geometry_type"].fillna("None")
    named = layers["name"][kinds.str.contains("Polygon|Unknown|Collection")].tolist()
    if len(named) == 1:
        return str(named[0])
    raise AreaError(
        f"holds {len(layers)} layers ({', '.join(map(str, layers['name']))})",
        where=path,
        expected="one layer of polygons",
        remedy=f"save the one that is meant alone: ogr2ogr one.gpkg {path.name} LAYER",
    )


def _crs_of(frame, path: Path) -> CRS:  # type: ignore[no-untyped-def]
    if frame.crs is not None:
        return to_crs(frame.crs)
    if path.suffix.lower() in GEOJSON:  # RFC 7946: longitude and latitude on WGS84
        return to_crs("EPSG:4326")
    raise AreaError(
        "the file names no coordinate reference system",
        where=path,
        remedy="add one (a .prj file, or save it as GeoPackage)",
    )


def _polygons(shape: BaseGeometry) -> list[BaseGeometry]:
    """The parts with an area, self-crossing ones repaired."""
    if not shape.is_valid:
        shape = shapely.make_valid(shape)
    if isinstance(shape, Polygon | MultiPolygon):
        return [shape] if shape.area > 0 else []
    return [q for p in getattr(shape, "geoms", ()) for q in _polygons(p)]


def _in_degrees(area: BaseGeometry, crs: CRS, path: str) -> BaseGeometry:
    """The area; in degrees with longitudes in -180..180 and cut there (some data count from 0 to 360)."""
    west, south, east, north = area.bounds
    if not crs.geographic:
        return area
    if max(abs(south), abs(north)) > 90:
        wrong = south if abs(south) > 90 else north
        swapped = max(abs(west), abs(east)) <= 90
        raise AreaError(
            f"latitude {wrong:g} is beyond 90 degrees",
            where=path,
            expected="longitude first, then latitude",
            remedy="the two look swapped: exchange them in the file"
            if swapped
            else "name the file's CRS in it",
        )
    if max(abs(west), abs(east)) > 360:
        raise AreaError(f"longitude {max(west, east, key=abs):g} is beyond 360 degrees", where=path)
    return to_lonlat(area, crs, crs) if max(abs(west), abs(east)) > 180 else area
