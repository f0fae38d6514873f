"""References that are no rasters: GEDI shots, and field plots as points or polygons with a height.

A map's statistic over discs and polygons, read in windows.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import shapely

from canopy.errors import DataError, InputError
from canopy.evaluation.grids import REFERENCE_HIGHEST_M, REFERENCE_LOWEST_M, own_grid
from canopy.evaluation.maps import HeightMap
from canopy.evaluation.strata import LEAST_WANTED, MOST, missing_column, stratifiers
from canopy.evaluation.zones import ZoneOptions, zone_numbers
from canopy.geo.crs import ground_crs, to_crs, transformer, utm_crs
from canopy.geo.grid import Grid
from canopy.geo.units import metres_per, unit_in_name
from canopy.geo.vector import read_vector
from canopy.labels.footprint import pool_over_disc
from canopy.metrics import BIN_NAMES, height_bin, percent_of
from canopy.runtime import NoProgress, Progress

if TYPE_CHECKING:
    import geopandas
    import pandas


HEIGHT_COLUMNS = (
    "height_m", "height", "canopy_height", "canopy_height_m", "top_height", "top_height_m", "h_m", "h",
    "rh_98", "rh_95",
)  # fmt: skip
LON_COLUMNS, LAT_COLUMNS = (
    ("lon", "longitude", "long", "lon_lowestmode"),
    ("lat", "latitude", "lat_lowestmode"),
)
TEXTS, PARQUETS = (".csv", ".txt", ".tsv"), (".parquet", ".geoparquet", ".pq")
TABLES = TEXTS + PARQUETS
GEDI_RADIUS_M, PLOT_RADIUS_M = 12.5, 10.0
# Shots along a track and plots of a cluster err alike over longer ways than pixels do.
BLOCK_SIDES_M = (1000.0, 500.0, 250.0, 100.0)
_MOST_CATEGORIES, _QUANTILES = 12, 5
_EQUAL_AREA = "EPSG:6933"
_WIDE_DEG = 6.0
MIN_VALID_SHARE = 0.9


@dataclass(frozen=True, eq=False)
class SampleSet:
    """Places with a height.

    Attributes:
        name: of the file; column: where the height came from.
        frame: one row per sample in EPSG:4326: points, which stand for discs of `radius_m`, or polygons
            (`radius_m` None), and all columns of the file.
        lon, lat, height_m: (n,) of the middle; metres. dates: first and last, ISO, empty where unknown.
        dropped: why rows were left out -> how many.
        unit: that the column names, where it is not metres.
    """

    name: str
    column: str
    frame: geopandas.GeoDataFrame
    lon: np.ndarray
    lat: np.ndarray
    height_m: np.ndarray
    radius_m: float | None
    dates: tuple[str, ...]
    dropped: dict[str, int]
    unit: str | None

    def __len__(self) -> int:
        return len(self.lon)


# ---- reading --------------------------------------------------------------------------------------
def load_samples(
    kind: str,
    source: str | Path | geopandas.GeoDataFrame,
    column: str | None = None,
    radius_m: float | None = None,
    layer: str | None = None,
) -> SampleSet:
    """GEDI shots (any table that `read_shots` takes), or plots: a vector file, a text table, a GeoDataFrame.

    Heights are in `column`, else in rh_98 or rh_95, or in the first of `HEIGHT_COLUMNS` that is there. Raises
    DataError for a file that cannot be read, InputError for a missing column or mixed shapes.
    """
    import pandas

    where = source if isinstance(source, str | Path) else "plots"
    if kind == "gedi":
        from canopy.labels.shots import read_shots

        frame = read_shots(source)
    else:
        frame = read_places(source, layer) if isinstance(source, str | Path) else source
    names = {str(name).lower(): str(name) for name in frame.columns}
    shot_heights = ("rh_98", "rh_95", *sorted(name for name in names if name.startswith("rh_")))
    usual = shot_heights if kind == "gedi" else HEIGHT_COLUMNS
    chosen = column or next((names[n] for n in usual if n in names), None)
    if chosen is None:
        raise InputError(
            "no height column found", where=where, expected=f"one of {', '.join(HEIGHT_COLUMNS)}",
            remedy=f"name it with --column; there are {', '.join(list(names.values())[:20])}",
        )  # fmt: skip
    if chosen not in frame:
        raise missing_column(chosen, frame.columns, where)
    if frame.crs is None:
        raise DataError(
            "no coordinate reference system", where=where,
            remedy="add one (a .prj file, or save it as GeoPackage)",
        )  # fmt: skip
    ground_crs(frame.crs, where)
    shapes = set(frame.geom_type.dropna())
    areas = shapes <= {"Polygon", "MultiPolygon"}
    if not areas and not shapes <= {"Point"}:
        raise InputError(f"{', '.join(sorted(shapes))}", where=where, expected="points, or polygons")
    frame = frame.to_crs("EPSG:4326")
    heights = pandas.to_numeric(frame[chosen], errors="coerce").to_numpy(np.float64)
    unit = unit_in_name(chosen)
    to_metres = metres_per(unit) or 1.0 if unit else 1.0
    heights = heights * to_metres
    centres = shapely.centroid(frame.geometry.to_numpy())
    lon, lat = shapely.get_x(centres), shapely.get_y(centres)
    placed, known = np.isfinite(lon + lat), np.isfinite(heights)
    sane = (heights >= REFERENCE_LOWEST_M) & (heights <= REFERENCE_HIGHEST_M)
    good = placed & known & sane
    if not good.any():
        raise DataError(f"no usable height in the column {chosen!r}", where=where, expected="metres")
    dropped = {
        f"no number in the column {chosen!r}": int((~known).sum()),
        f"an impossible height in the column {chosen!r} (expected {REFERENCE_LOWEST_M:g} to "
        f"{REFERENCE_HIGHEST_M:g} m)": int((known & ~sane).sum()),
        "no place": int((known & sane & ~placed).sum()),
    }
    frame = frame[good].reset_index(drop=True)
    default_m = GEDI_RADIUS_M if kind == "gedi" else PLOT_RADIUS_M
    return SampleSet(
        Path(str(where)).name, chosen, frame, lon[good], lat[good], np.maximum(heights[good], 0),
        None if areas else radius_m or default_m, _dates(frame),
        {why: count for why, count in dropped.items() if count}, unit if to_metres != 1 else None,
    )  # fmt: skip


def read_places(path: str | Path, layer: str | None = None) -> geopandas.GeoDataFrame:
    """A vector file, or a text or Parquet table with lon and lat. Raises DataError, AreaError."""
    import geopandas
    import pandas

    if Path(path).suffix.lower() not in TABLES:
        return read_vector(path, layer)
    table = read_table(Path(path))
    if isinstance(table, geopandas.GeoDataFrame):
        return table
    names = {str(name).strip().lower(): name for name in table.columns}
    found = [next((names[n] for n in ways if n in names), None) for ways in (LON_COLUMNS, LAT_COLUMNS)]
    if None in found:
        there = ", ".join(map(str, list(table.columns)[:20]))
        expected = f"places in degrees; its columns are {there}"
        remedy = "metres belong into a vector file that names their CRS"
        raise DataError("no columns lon and lat", where=path, expected=expected, remedy=remedy)
    lon, lat = (pandas.to_numeric(table[name], errors="coerce") for name in found)
    if max(lon.abs().max(), 2 * lat.abs().max()) > 360:
        raise DataError(
            f"lon up to {lon.abs().max():.10g}, lat up to {lat.abs().max():.10g}", where=path,
            expected="degrees in the columns lon and lat",
            remedy="metres belong into a vector file that names their CRS",
        )  # fmt: skip
    return geopandas.GeoDataFrame(table, geometry=geopandas.points_from_xy(lon, lat, crs="EPSG:4326"))


def read_table(path: Path) -> pandas.DataFrame:
    """A text or Parquet table, with geometry where it has one. Raises DataError."""
    import geopandas
    import pandas

    if not path.is_file():
        raise DataError("no such file", where=path, remedy="check the spelling of the path")
    try:
        if path.suffix.lower() in PARQUETS:
            with contextlib.suppress(ValueError):  # a table without geometry
                return geopandas.read_parquet(path)
            return pandas.read_parquet(path)
        separator, decimal = table_format(path)
        return pandas.read_csv(path, sep=separator, decimal=decimal, encoding="utf-8-sig")
    except UnicodeError as error:
        remedy = "save it again as UTF-8, as spreadsheets offer"
        raise DataError("its text is not UTF-8", where=path, remedy=remedy) from error
    except Exception as error:  # each reader has its own kind of exception
        raise DataError(
            f"not a readable table ({' '.join(str(error).split())[:120]})", where=path,
            expected="GeoPackage, GeoJSON, Shapefile, GeoParquet, or a text table with lon and lat",
        ) from error  # fmt: skip


def table_format(path: Path) -> tuple[str, str]:
    """Delimiter and decimal mark of a text table, told from its first two lines."""
    with path.open(encoding="utf-8-sig", errors="replace") as file:
        head, line = file.readline(), file.readline()
    separator = max(",;\t|", key=head.count)
    if separator not in head and len(head.split()) > 1:
        return r"\s+", "."  # columns of spaces
    numbers = line.split(separator) if separator != "," else []
    return separator, "," if any(re.fullmatch(r'\s*"?-?\d+,\d+"?\s*', n) for n in numbers) else "."


def _dates(table: pandas.DataFrame) -> tuple[str, ...]:
    """First and last of the column year, time or date."""
    import pandas

    for name in (name for name in table.columns if str(name).lower() in ("year", "time", "date", "datetime")):
        is_year = str(name).lower() == "year"
        column = pandas.to_numeric(table[name], errors="coerce").astype("Int64") if is_year else table[name]
        form = "%Y" if is_year else None
        days = pandas.to_datetime(column, errors="coerce", utc=True, format=form).dropna()
        if len(days):
            ends = (day.isoformat()[: 4 if is_year else 10] for day in (days.min(), days.max()))
            return tuple(dict.fromkeys(ends))
    return ()


# ---- blocks ---------------------------------------------------------------------------------------
@dataclass(frozen=True, eq=False)
class SampleBlocks:
    """Square blocks: number of each sample's (n,); west, south, east, north of each in `crs` (k, 4)."""

    number: np.ndarray
    bounds: np.ndarray
    side_m: float
    crs: str


def block_samples(lon: np.ndarray, lat: np.ndarray, side_m: float | None = None) -> SampleBlocks:
    """Blocks of 1000, 500, 250 or 100 m, the largest that leaves 25 of them; larger above 1,600 blocks.

    Counted in the UTM zone of the middle, in an equal-area projection for samples more than 6 degrees apart.
    """
    wide = max(np.ptp(lon), np.ptp(lat)) > _WIDE_DEG
    crs = _EQUAL_AREA if wide else str(utm_crs(float(np.median(lon)), float(np.median(lat))))
    xy = np.column_stack(transformer("EPSG:4326", crs).transform(lon, lat))
    sides = [side_m] if side_m is not None else BLOCK_SIDES_M
    counts = {side: len(np.unique(np.floor(xy / side), axis=0)) for side in sides}
    side = next((s for s, count in counts.items() if count >= LEAST_WANTED), sides[-1])
    while len(np.unique(np.floor(xy / side), axis=0)) > MOST:
        side *= 2
    cells, number = np.unique(np.floor(xy / side), axis=0, return_inverse=True)
    return SampleBlocks(number.ravel(), np.hstack([cells, cells + 1]) * side, side, crs)


# ---- strata ---------------------------------------------------------------------------------------
def sample_strata(
    samples: SampleSet, by: Sequence[str], dem: str | Path | None, lattice: Grid
) -> dict[str, tuple[np.ndarray, Sequence[str]]]:
    """Codes (n,) and names of every way of cutting: columns of the table, or what rasters have too."""
    found: dict[str, tuple[np.ndarray, Sequence[str]]] = {}
    columns = samples.frame.columns.drop(samples.frame.geometry.name)
    for word in by:
        if word == "height":
            found[word] = height_bin(samples.height_m), [f"{name} m" for name in BIN_NAMES]
        elif word in columns and word != "slope":
            found[word] = column_codes(samples.frame[word])
        elif "=" not in word and word != "slope":
            raise missing_column(word, [*columns, "height", "slope"], f"--by {word}")
    for way in stratifiers([word for word in by if word not in found], dem):
        with contextlib.closing(way):
            found[way.by] = way.at(lattice, samples.lon, samples.lat), tuple(way.names)
    return found


def column_codes(column: pandas.Series) -> tuple[np.ndarray, Sequence[str]]:
    """Codes of a column: its values, or five quantiles of numbers with more than twelve; -1 for gaps."""
    import pandas

    numbers = pandas.api.types.is_numeric_dtype(column) and not pandas.api.types.is_bool_dtype(column)
    if numbers and column.nunique() > _MOST_CATEGORIES:
        column, edges = pandas.qcut(
            column.astype(np.float64), _QUANTILES, labels=False, retbins=True, duplicates="drop"
        )
        names = [f"{low:g} to {high:g}" for low, high in pairwise(edges)]
        return column.fillna(-1).to_numpy(np.int64), names
    codes, names = pandas.factorize(column.astype("string"), sort=True)
    return np.asarray(codes, np.int64), [str(name) for name in names]


# ---- the map over them ----------------------------------------------------------------------------
def pool_map(
    heights: HeightMap, samples: SampleSet, stat: str, progress: Progress | None = None
) -> np.ndarray:
    """The map over every sample, float64 (n,), NaN where less than 90 % of it is valid.

    Discs take the pixels whose centres they hold (`pool_over_disc`); polygons every pixel by the ground that
    they share with it, as in `canopy stats`.
    """
    progress = progress or NoProgress()
    if samples.radius_m is not None:
        import pandas

        def read(window: Grid) -> np.ndarray:
            values, valid = heights.read(window)
            return np.where(valid, values[0], np.nan)

        places = pandas.DataFrame({"lon": samples.lon, "lat": samples.lat})
        return pool_over_disc(
            read, places, stat, grid=own_grid(heights), diameter=2 * samples.radius_m,
            min_valid=MIN_VALID_SHARE,
        ).astype(np.float64)  # fmt: skip
    progress.start(len(samples), "pooling")
    out, percent = np.full(len(samples), np.nan), percent_of(stat)
    asked = ZoneOptions(percentiles=(percent or 0,), above_m=())
    column = "mean_m" if percent is None else "max_m" if percent == 100 else f"p{percent:02g}_m"
    for k, shape in enumerate(samples.frame.geometry.make_valid()):
        numbers = zone_numbers(heights, shape, to_crs("EPSG:4326"), asked)
        if numbers["valid_share"] >= MIN_VALID_SHARE:
            out[k] = numbers[column]
        progress.advance()
    return out
