"""Reading tables of GEDI shots back: our GeoParquet, anybody's Parquet or CSV."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from canopy.errors import DataError
from canopy.sources.gedi_h5 import require_gedi
from canopy.sources.gedi_names import EPOCH_UNIX_S, L2A, LAT, LON, SHOT_NUMBER, TIME
from canopy.sources.gedi_table import rh_column

if TYPE_CHECKING:
    import geopandas
    import pandas


def read_shots(path: str | Path, columns: Sequence[str] | None = None) -> geopandas.GeoDataFrame:
    """Shots of a GeoParquet, plain Parquet or CSV file as points in EPSG:4326.

    Needs `shot_number`, a place (`lat` and `lon`, their GEDI names, or a point geometry) and at least one
    relative height (`rh_95`, or `rh95`); GEDI's and our own spellings are accepted and ours returned. Shot
    numbers stay exact uint64. `columns` limits the others.

    Raises DataError for a file that is not such a table.
    """
    require_gedi()
    path = Path(path)
    if not path.is_file():
        raise DataError("no such file", where=path, remedy="check the spelling of the path")
    table = _read_csv(path) if path.suffix.lower() in (".csv", ".txt") else _read_parquet(path)
    return _as_shots(table.rename(columns=_our_name), path, columns)


def _our_name(name: str) -> str:
    known = {v.paths[0].split("/")[-1]: v.column for v in (SHOT_NUMBER, LAT, LON, TIME, *L2A)}
    known |= {"latitude": "lat", "longitude": "lon", "elev_lowestmode_m": "elev_lowestmode"}
    height = re.fullmatch(r"rh_?(\d{1,3})(?:_m)?", name.lower())
    return rh_column(int(height[1])) if height else known.get(name, name)


def _read_csv(path: Path) -> pandas.DataFrame:
    import pandas

    try:
        # Through text: a column of whole numbers with a gap in it would be read as floats.
        return pandas.read_csv(path, dtype={"shot_number": str})
    except (ValueError, UnicodeDecodeError) as error:
        raise DataError(f"not a table of shots ({_short(error)})", where=path) from error


def _read_parquet(path: Path) -> pandas.DataFrame:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        table = pq.read_table(path)
    except (pa.ArrowException, OSError) as error:
        raise DataError(
            f"not a readable Parquet file ({_short(error)})", where=path, expected=".parquet or .csv of shots"
        ) from error
    if "geometry" in table.column_names and not {"lat", "lon"} <= {_our_name(n) for n in table.column_names}:
        import shapely

        points = shapely.from_wkb(table["geometry"].to_numpy(zero_copy_only=False))
        table = table.append_column("lon", pa.array(shapely.get_x(points)))
        table = table.append_column("lat", pa.array(shapely.get_y(points)))
    return table.drop_columns([n for n in table.column_names if n == "geometry"]).to_pandas()


def _as_shots(table: pandas.DataFrame, path: Path, columns: Sequence[str] | None) -> geopandas.GeoDataFrame:
    import geopandas

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
        import pandas

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
