"""Small readers for a judgement: tables with places, rasters at places, pixels in metres."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from canopy.errors import DataError, InputError
from canopy.geo.crs import geod_of, transformer
from canopy.geo.grid import Grid
from canopy.geo.raster import SourcePlace


def pixel_metres(grid: Grid) -> tuple[float, float]:
    """Ground metres of a pixel's sides (x, y) at the grid's centre."""
    row, col = grid.height / 2, grid.width / 2
    ends = [grid.xy(row + dr, col + dc) for dr, dc in ((0, -0.5), (0, 0.5), (-0.5, 0), (0.5, 0))]
    x, y = (np.array(v) for v in zip(*ends, strict=True))
    lon, lat = transformer(grid.crs, "EPSG:4326").transform(x, y)
    geod = geod_of(grid.crs)
    return (
        float(geod.inv(lon[0], lat[0], lon[1], lat[1])[2]),
        float(geod.inv(lon[2], lat[2], lon[3], lat[3])[2]),
    )


def sample_raster(dataset: Any, lon: np.ndarray, lat: np.ndarray) -> np.ndarray:
    """First band of an open dataset at places in degrees, float64 (n,), NaN where there is nothing."""
    place = SourcePlace.of(dataset)
    x, y = transformer("EPSG:4326", place.crs).transform(lon, lat)
    order = np.lexsort((x, -np.asarray(y) // 1e3))  # near ones together: they share blocks of the file
    out = np.full(len(x), np.nan)
    picked = dataset.sample(zip(np.asarray(x)[order], np.asarray(y)[order], strict=True), 1, masked=True)
    for i, value in zip(order, picked, strict=True):
        out[i] = np.nan if np.ma.getmaskarray(value)[0] else float(value[0])
    return out * dataset.scales[0] + dataset.offsets[0]


def read_table(path: str | Path) -> Any:
    """A vector file, or a CSV or Parquet table with lon and lat, as a GeoDataFrame with a CRS. DataError."""
    import geopandas
    import pandas

    path = Path(path)
    if not path.is_file():
        raise DataError("no such file", where=path, remedy="check the spelling of the path")
    suffix = path.suffix.lower()
    try:
        if suffix in (".csv", ".txt"):
            frame = _with_points(pandas.read_csv(path), path)
        elif suffix in (".parquet", ".geoparquet", ".pq"):
            try:
                frame = geopandas.read_parquet(path)
            except ValueError:  # a table without geometry
                frame = _with_points(pandas.read_parquet(path), path)
        else:
            frame = geopandas.read_file(path)
    except DataError:
        raise
    except Exception as error:  # each driver has its own kind of exception
        raise DataError(
            f"not a readable vector file ({type(error).__name__})", where=path,
            expected="GeoPackage, GeoJSON, Shapefile, GeoParquet, or CSV with lon and lat",
        ) from error  # fmt: skip
    if not len(frame):
        raise DataError("no rows in the file", where=path)
    if frame.crs is None:
        raise DataError("the file names no coordinate reference system", where=path, remedy="add one to it")
    return frame


def _with_points(table: Any, path: Path) -> Any:
    import geopandas

    names = {str(name).lower(): name for name in table.columns}
    lon = next((names[n] for n in ("lon", "longitude", "long", "lon_lowestmode") if n in names), None)
    lat = next((names[n] for n in ("lat", "latitude", "lat_lowestmode") if n in names), None)
    if lon is None or lat is None:
        raise DataError("no columns lon and lat", where=path, expected="places in degrees")
    points = geopandas.points_from_xy(table[lon], table[lat], crs="EPSG:4326")
    return geopandas.GeoDataFrame(table, geometry=points)


def missing_column(column: str, columns: Sequence[Any], path: object) -> InputError:
    """The error for a column that is not there; names those that are."""
    there = [str(c) for c in columns if str(c) != "geometry"]
    shown = ", ".join(there[:20]) + (", ..." if len(there) > 20 else "")
    return InputError(f"no column {column!r}", where=path, expected=f"one of {shown}")
