"""Tables of GEDI shots: written as GeoParquet or GeoPackage, read back from ours and from anybody's.

The GeoParquet holds a point per shot in EPSG:4326 (the place of the lowest mode); the filter and the granules
it was made of stand under the key `canopy` of its metadata. There is no wall-clock time in it: the same
granules and options give the same table.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from canopy.errors import DataError, MissingDependencyError
from canopy.files import check_output, replacing

if TYPE_CHECKING:
    import geopandas
    import pandas

SUFFIXES = (".parquet", ".geoparquet", ".gpkg")
# Seconds of `delta_time` are counted from 2018-01-01T00:00:00 UTC; this is that instant in Unix seconds.
EPOCH_UNIX_S = 1_514_764_800
# Other spellings of our columns, lower case.
_SPELLINGS = {
    "lat_lowestmode": "lat",
    "latitude": "lat",
    "lon_lowestmode": "lon",
    "longitude": "lon",
    "delta_time": "time",
    "elev_lowestmode_m": "elev_lowestmode",
    "digital_elevation_model": "dem",
    "l2a_quality_flag_rel3": "quality_flag",
}


def require_gedi() -> None:
    """Raises MissingDependencyError where HDF5 cannot be read or Parquet not be written."""
    try:
        import h5py  # noqa: F401
        import pyarrow.parquet  # noqa: F401
    except ImportError as error:
        raise MissingDependencyError(
            f"GEDI files need {(error.name or 'h5py').split('.')[0]}",
            remedy="run: pip install 'canopy-height[gedi]'",
        ) from error


def rh_column(percent: int) -> str:
    """Name of the column of a relative height: rh_95, rh_98."""
    return f"rh_{percent}"


def check_shots_name(out: str | Path, inputs: Iterable[object], overwrite: bool) -> Path:
    """The name of a table that may be written. Raises InputError."""
    return check_output(out, inputs, overwrite=overwrite, suffixes=SUFFIXES)[0]


def write_shots(shots: pandas.DataFrame, out: Path, facts: Mapping[str, object]) -> None:
    """Write a table with `lon` and `lat` under its final name, whole or not at all.

    Raises OutputError where the disk does not take it or it reads back differently.
    """
    import geopandas
    import pyarrow.parquet as pq

    points = geopandas.points_from_xy(shots["lon"], shots["lat"], crs="EPSG:4326")
    table = geopandas.GeoDataFrame(shots, geometry=points)
    with replacing(out) as part:
        if out.suffix.lower() == ".gpkg":
            # SQLite has no unsigned numbers of 64 bits.
            named = part.with_suffix(".gpkg")  # GDAL warns of other endings
            table.assign(shot_number=table["shot_number"].astype(str)).to_file(
                named, driver="GPKG", layer="shots", engine="pyogrio"
            )
            named.rename(part)
            return
        table.to_parquet(part, index=False, compression="zstd")
        whole = pq.read_table(part)
        facts_text = {b"canopy": json.dumps(facts, sort_keys=True).encode()}
        pq.write_table(
            whole.replace_schema_metadata({**whole.schema.metadata, **facts_text}), part, compression="zstd"
        )
        if pq.read_table(part) != whole:
            raise OSError("it read back differently; check the disk")


def read_shots(path: str | Path, columns: Sequence[str] | None = None) -> geopandas.GeoDataFrame:
    """Shots of a GeoParquet, plain Parquet, GeoPackage or CSV file as points in EPSG:4326.

    Needs `shot_number`, a place (`lat` and `lon`, their GEDI names, or a point geometry) and at least one
    relative height (`rh_95`, or `rh95`); GEDI's and our own spellings are accepted and ours returned. Shot
    numbers stay exact uint64. `columns` limits the others.

    Raises DataError for a file that is not such a table.
    """
    require_gedi()
    path = Path(path)
    if not path.is_file():
        raise DataError("no such file", where=path, remedy="check the spelling of the path")
    readers = {".csv": _read_csv, ".txt": _read_csv, ".gpkg": _read_geopackage}
    table = readers.get(path.suffix.lower(), _read_parquet)(path)
    return _as_shots(table.rename(columns=_our_name), path, columns)


def _our_name(name: str) -> str:
    height = re.fullmatch(r"rh_?(\d{1,3})(?:_m)?", name.lower())
    return rh_column(int(height[1])) if height else _SPELLINGS.get(name, name)


def _read_csv(path: Path) -> pandas.DataFrame:
    import pandas

    try:
        # Through text: a column of whole numbers with a gap in it would be read as floats.
        return pandas.read_csv(path, dtype={"shot_number": str})
    except (ValueError, UnicodeDecodeError) as error:
        raise DataError(f"not a table of shots ({_short(error)})", where=path) from error


def _read_geopackage(path: Path) -> pandas.DataFrame:
    import geopandas

    try:
        table = geopandas.read_file(path, engine="pyogrio")
    except Exception as error:  # pyogrio's own errors have no common base
        raise DataError(f"not a table of shots ({_short(error)})", where=path) from error
    place = table.to_crs("EPSG:4326").geometry.representative_point()
    return table.drop(columns="geometry").assign(lon=place.x, lat=place.y)


def _read_parquet(path: Path) -> pandas.DataFrame:
    import pyarrow as pa
    import pyarrow.parquet as pq
    import shapely

    try:
        table = pq.read_table(path)
    except (pa.ArrowException, OSError) as error:
        raise DataError(
            f"not a readable Parquet file ({_short(error)})", where=path, expected=".parquet or .csv of shots"
        ) from error
    if "geometry" in table.column_names and not {"lat", "lon"} <= {_our_name(n) for n in table.column_names}:
        points = shapely.from_wkb(table["geometry"].to_numpy(zero_copy_only=False))
        table = table.append_column("lon", pa.array(shapely.get_x(points)))
        table = table.append_column("lat", pa.array(shapely.get_y(points)))
    # Without pandas' own metadata nullable bytes come as floats with NaN, which NumPy understands.
    wanted = [name for name in table.column_names if name != "geometry"]
    return table.select(wanted).to_pandas(ignore_metadata=True)


def _as_shots(table: pandas.DataFrame, path: Path, columns: Sequence[str] | None) -> geopandas.GeoDataFrame:
    import geopandas
    import pandas

    heights = [name for name in table if re.fullmatch(r"rh_\d+", str(name))]
    missing = [name for name in ("shot_number", "lat", "lon") if name not in table]
    if missing or not heights:
        raise DataError(
            f"no column {', '.join([*missing, *([] if heights else ['rh_95'])])}",
            where=path,
            expected="a table of GEDI shots, as `canopy data gedi` writes",
        )
    table["shot_number"] = _exact(table["shot_number"], path)
    if "time" in table and table["time"].dtype.kind == "f":
        table["time"] = pandas.to_datetime(table["time"] + EPOCH_UNIX_S, unit="s", utc=True)
    if columns is not None:
        table = table[list(dict.fromkeys(["shot_number", "lat", "lon", *columns]))]
    points = geopandas.points_from_xy(table["lon"], table["lat"], crs="EPSG:4326")
    return geopandas.GeoDataFrame(table, geometry=points)


def _exact(numbers: pandas.Series, path: Path) -> np.ndarray:
    """Shot numbers as uint64; texts are read digit by digit, floats refused."""
    try:
        if numbers.dtype.kind == "f":
            raise ValueError("stored as floats, which lose the last digits")
        if numbers.dtype.kind in "iu":
            return numbers.to_numpy().astype(np.uint64)
        return np.array([int(text) for text in numbers], np.uint64)
    except (ValueError, TypeError, OverflowError) as error:
        raise DataError(f"shot_number: {_short(error)}", where=path, expected="whole numbers") from error


def _short(error: BaseException) -> str:
    return " ".join(str(error).split())[:120]
