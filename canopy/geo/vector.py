"""Vector files: one reader with few drivers, and polygons out of it, checked and repaired.

A file says by its name and its first bytes which of the known formats it is. Everything else stays closed: an
OGR VRT, whatever it is called, can name any file, database or address.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import shapely
from odc.geo import CRS
from shapely.geometry import MultiPolygon, Polygon
from shapely.geometry.base import BaseGeometry

from canopy.errors import AreaError
from canopy.files import check_name
from canopy.geo.crs import ground_crs, to_lonlat

if TYPE_CHECKING:
    import geopandas

FORMATS = "GeoPackage, GeoJSON, Shapefile, FlatGeobuf, KML, GeoParquet or a file geodatabase (.gdb)"
# What a file of each suffix begins with.
FIRST_BYTES = {
    ".gpkg": b"SQLite format 3",
    ".geojson": b"{",
    ".json": b"{",
    ".shp": b"\x00\x00\x27\x0a",
    ".fgb": b"fgb",
    ".kml": b"<",
    ".parquet": b"PAR1",
    ".geoparquet": b"PAR1",
    ".pq": b"PAR1",
}
_DRIVERS = {"GPKG", "GeoJSON", "ESRI Shapefile", "FlatGeobuf", "KML", "LIBKML", "OpenFileGDB"}
# Signs, in the first bytes, of files that tell GDAL what else to open.
_PROGRAMS = (b"OGRVRT", b"gdal_streamed_alg")


def read_vector(
    path: str | Path, layer: str | None = None, *, polygons: bool = False
) -> geopandas.GeoDataFrame:
    """Every feature of a vector file, or of one of its layers, with the file's CRS (None: it names none).

    Args:
        path: GeoPackage, GeoJSON, Shapefile, FlatGeobuf, KML, GeoParquet or a .gdb folder.
        layer: its name; needed where several layers can hold what is wanted.
        polygons: only layers that can hold polygons are wanted; otherwise points do too.

    Raises:
        AreaError: no such file, another format, no such layer, several layers, no features.
    """
    import geopandas
    import pyogrio

    where = Path(check_name(path, AreaError))
    _check_format(where)
    parquet = FIRST_BYTES.get(where.suffix.lower()) == b"PAR1"
    if parquet and layer is not None:
        raise AreaError(f"has no layer {layer!r}", where=path, remedy="leave --layer out")
    try:
        if parquet:
            frame = geopandas.read_parquet(where)
        else:
            layer = layer_of(where, layer, polygons)
            driver = pyogrio.read_info(where, layer=layer)["driver"]
            if driver not in _DRIVERS:
                raise _unreadable(where, str(driver))
            frame = geopandas.read_file(where, layer=layer, engine="pyogrio")
    except AreaError:
        raise
    except Exception as error:  # each driver has its own kind of exception
        raise _unreadable(where, " ".join(str(error).split())[:160]) from error
    if not len(frame) or "geometry" not in frame:
        raise AreaError("the file has no features", where=path, expected="at least one polygon or point")
    if frame.crs is None and where.suffix.lower() in (".json", ".geojson"):
        frame = frame.set_crs("EPSG:4326")  # RFC 7946: longitude and latitude on WGS84
    return frame


def _check_format(path: Path) -> None:
    """Refuse a file that is not what its name says, before any driver sees it."""
    suffix = path.suffix.lower()
    if path.is_dir() and suffix == ".gdb":
        return
    if not path.is_file():
        raise AreaError("no such file", where=path, expected="a vector file such as GeoJSON or GeoPackage")
    with open(path, "rb") as file:
        first = file.read(1 << 16).removeprefix(b"\xef\xbb\xbf")
    if suffix == ".zip":
        raise AreaError("a zip archive", where=path, expected=FORMATS, remedy="unpack it first")
    if suffix not in FIRST_BYTES or any(program in first for program in _PROGRAMS):
        raise _unreadable(path, "another format")
    sign = FIRST_BYTES[suffix]
    if not (first.lstrip() if sign in (b"{", b"<") else first).startswith(sign):
        raise _unreadable(path, f"not what its name says: {path.suffix}")


def _unreadable(path: Path, reason: str) -> AreaError:
    return AreaError(f"not a readable vector file ({reason})", where=path, expected=FORMATS)


def layer_of(path: Path, layer: str | None, polygons: bool) -> str:
    """The layer to read: the one named, or the only one that can hold what is wanted."""
    import pyogrio

    layers = {str(name): str(of) for name, of in pyogrio.list_layers(path)}
    if not layers:
        raise _unreadable(path, "no layer in it, or truncated")
    if layer is not None:
        if layer not in layers:
            raise AreaError(f"has no layer {layer!r}", where=path, expected="one of " + ", ".join(layers))
        return layer
    kinds = ("Polygon", "Unknown", "Collection") if polygons else ("Polygon", "Point", "Unknown")
    fitting = [name for name, of in layers.items() if any(kind in of for kind in kinds)]
    if len(layers) == 1 or len(fitting) == 1:
        return fitting[0] if fitting else next(iter(layers))
    raise AreaError(
        f"holds {len(layers)} layers ({', '.join(layers)})",
        where=path,
        expected="one layer of a fitting kind",
        remedy="name one with --layer",
    )


# ---- polygons -----------------------------------------------------------------------------------
def read_zones(
    path: str | Path | geopandas.GeoDataFrame, layer: str | None = None
) -> tuple[geopandas.GeoDataFrame, CRS, list[BaseGeometry | None]]:
    """Every feature of a file or table: the table, its CRS, and one repaired 2-D area per row (or None).

    Holes and several parts are kept; self-crossing rings are repaired; points and lines are left out.
    Raises AreaError as `read_vector` does, and for no polygons, no CRS, or coordinates in degrees that only
    make sense with latitude and longitude swapped. Longitudes come out in -180..180.
    """
    if isinstance(path, str | Path):
        frame, where = read_vector(path, layer, polygons=True), path
    else:
        frame, where = path, "the polygons given"
    if frame.crs is None:
        raise AreaError(
            "the file names no coordinate reference system",
            where=where,
            remedy="add one (a .prj file, or save it as GeoPackage)",
        )
    crs = ground_crs(frame.crs, where)
    areas: list[BaseGeometry | None] = []
    for shape in frame.geometry:
        parts = [] if shape is None else _polygons(shape)
        areas.append(_in_degrees(shapely.force_2d(shapely.union_all(parts)), crs, where) if parts else None)
    if all(area is None for area in areas):
        kinds = sorted({g.geom_type for g in frame.geometry if g is not None})
        raise AreaError(
            f"only {', '.join(kinds) or 'empty features'} in the file",
            where=where,
            expected="polygons with an area",
        )
    return frame, crs, areas


def _polygons(shape: BaseGeometry) -> list[BaseGeometry]:
    """The parts with an area, self-crossing ones repaired."""
    if not shape.is_valid:
        shape = shapely.make_valid(shape)
    if isinstance(shape, Polygon | MultiPolygon):
        return [shape] if shape.area > 0 else []
    return [q for p in getattr(shape, "geoms", ()) for q in _polygons(p)]


def _in_degrees(area: BaseGeometry, crs: CRS, path: object) -> BaseGeometry:
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
