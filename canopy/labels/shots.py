"""Tables of GEDI shots: written as GeoParquet or GeoPackage, read back from ours and from anybody's.

A row is a shot, a point in EPSG:4326 (the place of the lowest mode). A GeoParquet's metadata say by which
filter and of which granules it was made (pandas' `attrs`), but no wall-clock time: the same granules and
options give the same table.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from canopy.errors import DataError, require
from canopy.files import replacing

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
    require("GEDI files", "canopy-height[gedi]", "h5py", "pyarrow.parquet")


def rh_column(percent: int) -> str:
    """Name of the column of a relative height: rh_95, rh_98."""
    return f"rh_{percent}"


def instants(seconds: pandas.Series) -> pandas.Series:
    """GEDI's `delta_time`, NaN for missing, as UTC timestamps of whole microseconds."""
    import pandas

    return pandas.to_datetime(np.rint((seconds + EPOCH_UNIX_S) * 1e6), unit="us", utc=True)


def write_shots(shots: pandas.DataFrame, out: Path) -> None:
    """Write a table with `lon` and `lat` under its final name, whole or not at all. Raises OutputError."""
    table = _with_points(shots)
    with replacing(out) as part:
        if out.suffix.lower() != ".gpkg":
            table.to_parquet(part, index=False, compression="zstd")
            return
        named = part.with_suffix(".gpkg")  # GDAL warns of other endings
        # SQLite has no unsigned numbers of 64 bits.
        table = table.assign(shot_number=table["shot_number"].astype(str))
        table.to_file(named, driver="GPKG", layer="shots", engine="pyogrio")
        named.rename(part)


def draw_shots(shots: pandas.DataFrame, out: Path, column: str, title: str) -> None:
    """A map of the shots by height and a histogram of their heights, one PNG. Raises OutputError."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    lon, lat, heights = (shots[name].to_numpy(float) for name in ("lon", "lat", column))
    lon = np.where((np.ptp(lon) > 180) & (lon < 0), lon + 360, lon)  # across the antimeridian
    known = heights[np.isfinite(heights)]
    top = max(5.0, np.ceil(np.percentile(known, 99.5) / 5) * 5) if known.size else 5.0
    figure = Figure(figsize=(11, 5.2), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2, width_ratios=(3, 2))
    dots = left.scatter(lon, lat, c=heights, s=float(np.clip(2e4 / len(shots), 2, 30)), vmin=0, vmax=top)
    left.set_aspect(1 / np.cos(np.radians(lat.mean())), adjustable="datalim")
    left.ticklabel_format(useOffset=False)
    left.set(xlabel="longitude", ylabel="latitude", facecolor="#f4f4f2")
    left.tick_params(axis="x", rotation=30)
    left.set_title(title, loc="left", fontsize=11)
    label = f"relative height {column.removeprefix('rh_')} (m)"
    figure.colorbar(dots, ax=left, shrink=0.8, extend="both").set_label(label)
    right.hist(known.clip(None, top), bins=np.arange(min(0, np.floor(known.min(initial=0))), top + 1, 1))
    right.set(xlabel=label, ylabel="shots")
    if known.size:
        middle = np.median(known)
        right.axvline(middle, color="#d55e00", label=f"median {middle:.1f} m")
        right.legend(frameon=False)
    with replacing(out, "cannot write the quicklook") as part:
        figure.savefig(part, format="png", dpi=110, metadata={"Software": None})


def _with_points(table: pandas.DataFrame) -> geopandas.GeoDataFrame:
    import geopandas

    points = geopandas.points_from_xy(table["lon"], table["lat"], crs="EPSG:4326")
    return geopandas.GeoDataFrame(table, geometry=points)


def read_shots(path: str | Path) -> geopandas.GeoDataFrame:
    """Shots of a GeoParquet, plain Parquet, GeoPackage or CSV file as points in EPSG:4326.

    Needs `shot_number`, a place (`lat` and `lon`, their GEDI names, or a point geometry) and at least one
    relative height (`rh_95`, or `rh95`); GEDI's and our own spellings are accepted and ours returned. Shot
    numbers stay exact uint64.

    Raises DataError for a file that is not such a table.
    """
    require_gedi()
    path = Path(path)
    if not path.is_file():
        raise DataError("no such file", where=path, remedy="check the spelling of the path")
    readers = {".csv": _read_csv, ".txt": _read_csv, ".gpkg": _read_geopackage}
    try:
        table = readers.get(path.suffix.lower(), _read_parquet)(path)
    except Exception as error:  # those of pandas, pyarrow and pyogrio have no common base
        raise DataError(
            f"not a table of shots ({str(error)[:120]})", where=path, expected="Parquet, GeoPackage or CSV"
        ) from error
    table = table.rename(columns=_our_name)
    missing = [name for name in ("shot_number", "lat", "lon") if name not in table]
    if not any(re.fullmatch(r"rh_\d+", str(name)) for name in table):
        missing.append("rh_95")
    if missing:
        raise DataError(
            f"no column {', '.join(missing)}",
            where=path,
            expected="a table of GEDI shots, as `canopy data gedi` writes",
        )
    table["shot_number"] = _exact(table["shot_number"], path)
    if "time" in table and table["time"].dtype.kind == "f":
        table["time"] = instants(table["time"])
    return _with_points(table)


def _our_name(name: str) -> str:
    height = re.fullmatch(r"rh_?(\d{1,3})(?:_m)?", name.lower())
    return rh_column(int(height[1])) if height else _SPELLINGS.get(name, name)


def _read_csv(path: Path) -> pandas.DataFrame:
    import pandas

    # Through text: a column of whole numbers with a gap in it would be read as floats.
    return pandas.read_csv(path, dtype={"shot_number": str})


def _read_geopackage(path: Path) -> pandas.DataFrame:
    import geopandas

    return _placed(geopandas.read_file(path, engine="pyogrio"))


def _read_parquet(path: Path) -> pandas.DataFrame:
    import geopandas
    import pyarrow.parquet as pq
    import shapely

    # Without pandas' own metadata nullable bytes come as floats with NaN, which NumPy understands.
    table = pq.read_table(path).to_pandas(ignore_metadata=True)
    if "geometry" not in table:
        return table
    return _placed(geopandas.GeoDataFrame(table, geometry=shapely.from_wkb(table["geometry"]), crs=4326))


def _placed(table: geopandas.GeoDataFrame) -> pandas.DataFrame:
    """A plain table, with columns lon and lat where only its points said the place."""
    if not {"lat", "lon"} <= {_our_name(name) for name in table.columns}:
        points = table.to_crs("EPSG:4326").geometry.representative_point()
        table = table.assign(lon=points.x, lat=points.y)
    return table.drop(columns="geometry")


def _exact(numbers: pandas.Series, path: Path) -> np.ndarray:
    """Shot numbers as uint64; texts are read digit by digit, floats refused."""
    try:
        if numbers.dtype.kind == "f":
            raise ValueError("stored as floats, which lose the last digits")
        if numbers.dtype.kind in "iu":
            return numbers.to_numpy().astype(np.uint64)
        return np.array([int(text) for text in numbers], np.uint64)
    except (ValueError, TypeError, OverflowError) as error:
        raise DataError(f"shot_number: {str(error)[:120]}", where=path, expected="whole numbers") from error
