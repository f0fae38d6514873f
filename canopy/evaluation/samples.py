"""References that are no rasters: GEDI shots, and field plots as points or polygons with a height.

A map's statistic over discs and polygons, read in windows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import shapely

from canopy.errors import DataError, InputError
from canopy.evaluation.grids import REFERENCE_HIGHEST_M, REFERENCE_LOWEST_M, own_grid
from canopy.evaluation.maps import HeightMap
from canopy.evaluation.pixels import LEAST_WANTED, MOST
from canopy.evaluation.strata import missing_column, stratifiers
from canopy.evaluation.zones import geodesic_area_m2, pixels_in
from canopy.geo.crs import to_crs, transformer, utm_crs
from canopy.geo.grid import Grid
from canopy.geo.vector import read_vector
from canopy.labels.footprint import pool_over_disc
from canopy.metrics import percent_of
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
GEDI_RADIUS_M, PLOT_RADIUS_M = 12.5, 10.0
# Shots along a track and plots of a cluster err alike over longer ways than pixels do.
BLOCK_SIDES_M = (1000.0, 500.0, 250.0, 100.0)
_MOST_CATEGORIES, _QUANTILES = 12, 5
_EQUAL_AREA = "EPSG:6933"
_WIDE_DEG = 6.0
MIN_VALID_SHARE = 0.9
_MOST_PX = 30_000_000


@dataclass(frozen=True, eq=False)
class SampleSet:
    """Places with a height; arrays are (n,).

    Attributes:
        name: of the file; column: where the height came from.
        polygons: shapes in EPSG:4326, or None for discs of `radius_m` round lon, lat.
        table: the other columns; dates: first and last, ISO, empty where unknown.
        dropped: why rows were left out -> how many.
    """

    name: str
    column: str
    lon: np.ndarray
    lat: np.ndarray
    height_m: np.ndarray
    polygons: np.ndarray | None
    radius_m: float
    table: pandas.DataFrame
    dates: tuple[str, ...]
    dropped: dict[str, int] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.lon)


# ---- reading --------------------------------------------------------------------------------------
def load_gedi(path: str | Path, column: str | None = None, radius_m: float | None = None) -> SampleSet:
    """Shots of `canopy data gedi` (or any table that `read_shots` takes); heights are rh_98, else rh_95.

    Raises DataError for no such table, InputError for a column that is not there.
    """
    from canopy.labels.shots import read_shots

    shots = read_shots(path)
    heights = [name for name in ("rh_98", "rh_95") if name in shots]
    heights += sorted(name for name in shots if str(name).startswith("rh_"))
    chosen = column or heights[0]
    if chosen not in shots:
        raise missing_column(chosen, shots.columns, path)
    return _sample_set(shots, path, chosen, None, radius_m or GEDI_RADIUS_M)


def load_plots(
    source: str | Path | geopandas.GeoDataFrame,
    column: str | None = None,
    radius_m: float | None = None,
    layer: str | None = None,
) -> SampleSet:
    """Plots of a vector file, a GeoDataFrame, or a text table with lon and lat: points or polygons.

    Points stand for discs of `radius_m`. Raises DataError for a file that cannot be read, InputError for a
    missing column or mixed shapes.
    """
    where = source if isinstance(source, str | Path) else "plots"
    frame = read_places(source, layer) if isinstance(source, str | Path) else source
    names = {str(name).lower(): str(name) for name in frame.columns}
    chosen = column or next((names[n] for n in HEIGHT_COLUMNS if n in names), None)
    if chosen is None:
        raise InputError(
            "no height column found", where=where, expected=f"one of {', '.join(HEIGHT_COLUMNS)}",
            remedy=f"name it with --column; there are {', '.join(list(names.values())[:20])}",
        )  # fmt: skip
    if chosen not in frame:
        raise missing_column(chosen, frame.columns, where)
    if frame.crs is None:
        raise DataError("no coordinate reference system", where=where, remedy="name it with .set_crs()")
    kinds = set(frame.geom_type.dropna())
    areas = kinds <= {"Polygon", "MultiPolygon"}
    if not areas and not kinds <= {"Point"}:
        raise InputError(f"{', '.join(sorted(kinds))}", where=where, expected="points, or polygons")
    geographic = frame.to_crs("EPSG:4326")
    polygons = geographic.geometry.make_valid().to_numpy() if areas else None
    return _sample_set(geographic, where, chosen, polygons, radius_m or PLOT_RADIUS_M)


def read_places(path: str | Path, layer: str | None = None) -> geopandas.GeoDataFrame:
    """A vector file, or a text or Parquet table with lon and lat, with a CRS. Raises DataError, AreaError."""
    import geopandas
    import pandas

    path = Path(path)
    suffix = path.suffix.lower()
    if suffix in TEXTS + PARQUETS and not path.is_file():
        raise DataError("no such file", where=path, remedy="check the spelling of the path")
    try:
        if suffix in TEXTS:
            separator, decimal = table_format(path)
            frame = _with_points(
                pandas.read_csv(path, sep=separator, decimal=decimal, encoding="utf-8-sig"), path
            )
        elif suffix in PARQUETS:
            try:
                frame = geopandas.read_parquet(path)
            except ValueError:  # a table without geometry
                frame = _with_points(pandas.read_parquet(path), path)
        else:
            frame = read_vector(path, layer)
    except InputError:
        raise
    except Exception as error:  # each reader has its own kind of exception
        raise DataError(
            f"not a readable vector file or table ({type(error).__name__})", where=path,
            expected="GeoPackage, GeoJSON, Shapefile, GeoParquet, or a text table with lon and lat",
        ) from error  # fmt: skip
    if not len(frame):
        raise DataError("no rows in the file", where=path)
    if frame.crs is None:
        raise DataError("the file names no coordinate reference system", where=path, remedy="add one to it")
    return frame


def table_format(path: Path) -> tuple[str, str]:
    """Delimiter and decimal mark of a text table, told from its first two lines."""
    with path.open(encoding="utf-8-sig", errors="replace") as file:
        head, line = file.readline(), file.readline()
    separator = max(",;\t|", key=head.count)
    comma = separator != "," and any(
        part.count(",") == 1 and part.replace(",", "").strip(' "-\n').isdigit()
        for part in line.split(separator)
    )
    return separator, "," if comma else "."


def _with_points(table: pandas.DataFrame, path: Path) -> geopandas.GeoDataFrame:
    import geopandas
    import pandas

    names = {str(name).strip().lower(): name for name in table.columns}
    found = [next((names[n] for n in ways if n in names), None) for ways in (LON_COLUMNS, LAT_COLUMNS)]
    if None in found:
        there = ", ".join(map(str, list(table.columns)[:20]))
        raise DataError(
            "no columns lon and lat", where=path, expected=f"places in degrees; its columns are {there}"
        )
    lon, lat = (pandas.to_numeric(table[name], errors="coerce") for name in found)
    if max(lon.abs().max(), 2 * lat.abs().max()) > 360:
        raise DataError(
            f"lon up to {lon.abs().max():.10g}, lat up to {lat.abs().max():.10g}", where=path,
            expected="degrees in the columns lon and lat",
            remedy="metres belong into a vector file that names their CRS",
        )  # fmt: skip
    return geopandas.GeoDataFrame(table, geometry=geopandas.points_from_xy(lon, lat, crs="EPSG:4326"))


def _sample_set(
    frame: geopandas.GeoDataFrame, where: object, column: str, polygons: np.ndarray | None, radius_m: float
) -> SampleSet:
    import pandas

    heights = pandas.to_numeric(frame[column], errors="coerce").to_numpy(np.float64)
    if not np.isfinite(heights).any():
        raise DataError(f"no numbers in the column {column!r}", where=where)
    centres = shapely.centroid(frame.geometry.to_numpy())
    lon, lat = shapely.get_x(centres), shapely.get_y(centres)
    placed, known = np.isfinite(lon + lat), np.isfinite(heights)
    sane = (heights >= REFERENCE_LOWEST_M) & (heights <= REFERENCE_HIGHEST_M)
    good = placed & known & sane
    if not good.any():
        raise DataError(f"no usable height in the column {column!r}", where=where, expected="metres")
    dropped = {
        f"no number in the column {column!r}": int((~known).sum()),
        f"an impossible height in the column {column!r} (expected {REFERENCE_LOWEST_M:g} to "
        f"{REFERENCE_HIGHEST_M:g} m)": int((known & ~sane).sum()),
        "no place": int((known & sane & ~placed).sum()),
    }
    table = pandas.DataFrame(frame.drop(columns=frame.geometry.name))[good].reset_index(drop=True)
    return SampleSet(
        Path(str(where)).name, column, lon[good], lat[good], np.maximum(heights[good], 0),
        None if polygons is None else polygons[good], radius_m, table, _dates(table),
        {why: count for why, count in dropped.items() if count},
    )  # fmt: skip


def _dates(table: pandas.DataFrame) -> tuple[str, ...]:
    """First and last of the columns time, date or year."""
    import pandas

    for name in table.columns:
        if str(name).lower() == "year":
            years = pandas.to_numeric(table[name], errors="coerce").dropna()
            return tuple(dict.fromkeys(str(int(y)) for y in (years.min(), years.max()))) if len(years) else ()
        if str(name).lower() in ("time", "date", "datetime"):
            days = pandas.to_datetime(table[name], errors="coerce", utc=True).dropna()
            if len(days):
                return tuple(dict.fromkeys(d.date().isoformat() for d in (days.min(), days.max())))
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
    samples: SampleSet, by: Sequence[str], *, slope: str | Path | None, dem: str | Path | None
) -> dict[str, tuple[np.ndarray, Sequence[str]]]:
    """Codes (n,) and names of every way of cutting: columns of the table, or what rasters have too."""
    found: dict[str, tuple[np.ndarray, Sequence[str]]] = {}
    for word in by:
        if word in samples.table and word not in ("height", "slope"):
            found[word] = column_codes(samples.table[word])
        elif "=" not in word and word not in ("height", "slope"):
            raise missing_column(word, [*samples.table.columns, "height", "slope"], f"--by {word}")
    for way in stratifiers([w for w in by if w not in found], slope=slope, dem=dem):
        codes = way.at(samples.lon, samples.lat, samples.height_m)
        found[way.by] = (codes, tuple(way.names))
        way.close()
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

    Discs take the pixels whose centres they hold (`pool_over_disc`); polygons every pixel by the share of it
    that they cover.
    """
    progress = progress or NoProgress()
    if samples.polygons is None:
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
    out = np.full(len(samples), np.nan)
    for k, shape in enumerate(samples.polygons):
        out[k] = _pool_polygon(heights, shape, stat, k)
        progress.advance()
    return out


def _pool_polygon(heights: HeightMap, shape: shapely.Geometry, stat: str, number: int) -> float:
    lonlat = to_crs("EPSG:4326")
    area = geodesic_area_m2(shape, lonlat)
    if area > _MOST_PX * heights.gsd_m**2:
        raise InputError(f"polygon {number + 1} has {area / 1e4:,.0f} ha", expected="plots, not regions")
    parts = list(pixels_in(heights, shape, lonlat))
    if not parts or area <= 0:
        return float("nan")
    values, share, weight = (np.concatenate(part) for part in zip(*parts, strict=True))
    if not values.size or weight.sum() < MIN_VALID_SHARE * area:
        return float("nan")
    if stat == "mean":
        return float(values @ share / share.sum())
    # Highest and percentiles take pixels of which at least half is inside; if there are none, all touched.
    return float(np.percentile(values[share >= min(0.5, float(share.max()))], percent_of(stat) or 0))
