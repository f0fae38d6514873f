"""References that are no rasters: GEDI shots, and field plots as points or polygons with a height.

A map's statistic over discs and polygons, read in windows.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import shapely

from canopy.errors import DataError, InputError
from canopy.evaluation.maps import REFERENCE_HIGHEST_M, REFERENCE_LOWEST_M, HeightSide, own_grid
from canopy.evaluation.strata import LEAST_WANTED, MOST, Stratifier, stratifiers
from canopy.evaluation.tables import missing_column, read_table
from canopy.evaluation.zones import coverage
from canopy.geo.crs import transformer, utm_crs
from canopy.geo.grid import Grid
from canopy.geo.raster import Raster
from canopy.geo.tiles import tiles_over
from canopy.labels.footprint import pool_over_disc
from canopy.metrics import percent_of, statistic_of
from canopy.runtime import NoProgress, Progress

if TYPE_CHECKING:
    import pandas


HEIGHT_COLUMNS = (
    "height_m", "height", "canopy_height", "canopy_height_m", "top_height", "top_height_m", "h_m", "h",
    "rh_98", "rh_95",
)  # fmt: skip
GEDI_RADIUS_M, PLOT_RADIUS_M = 12.5, 10.0
# Shots along a track and plots of a cluster err alike over longer ways than pixels do.
BLOCK_SIDES_M = (1000.0, 500.0, 250.0, 100.0)
_MOST_CATEGORIES, _QUANTILES = 12, 5
_EQUAL_AREA = "EPSG:6933"
_WIDE_DEG = 6.0


@dataclass(frozen=True, eq=False)
class SampleSet:
    """Places with a height; arrays are (n,).

    Attributes:
        name: of the file; column: where the height came from.
        polygons: shapes in EPSG:4326, or None for discs of `radius_m` round lon, lat.
        table: the other columns; dates: first and last, ISO, empty where unknown.
        dropped: rows without a usable height.
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
    dropped: int

    def __len__(self) -> int:
        return len(self.lon)


def load_gedi(path: str | Path, column: str | None = None) -> SampleSet:
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
    return _sample_set(shots, path, chosen, None, GEDI_RADIUS_M)


def load_plots(path: str | Path, column: str | None = None, radius_m: float | None = None) -> SampleSet:
    """Plots of a vector file, or a CSV with lon and lat: points (discs of `radius_m`) or polygons.

    Raises DataError for a file that cannot be read, InputError for a missing column or mixed shapes.
    """
    frame = read_table(path)
    names = {str(name).lower(): str(name) for name in frame.columns}
    chosen = column or next((names[n] for n in HEIGHT_COLUMNS if n in names), None)
    if chosen is None or chosen not in frame:
        if column is None:
            raise InputError(
                "no height column found", where=path, expected=f"one of {', '.join(HEIGHT_COLUMNS)}",
                remedy=f"name it with --column; there are {', '.join(list(names.values())[:20])}",
            )  # fmt: skip
        raise missing_column(column, frame.columns, path)
    kinds = set(frame.geom_type.dropna())
    areas = kinds <= {"Polygon", "MultiPolygon"}
    if not areas and not kinds <= {"Point"}:
        raise InputError(f"{', '.join(sorted(kinds))}", where=path, expected="points, or polygons")
    if radius_m is not None and not 0 < radius_m < 10_000:
        raise InputError(f"{radius_m:g} m", where="--radius-m", expected="above 0")
    geographic = frame.to_crs("EPSG:4326")
    polygons = geographic.geometry.make_valid().to_numpy() if areas else None
    return _sample_set(geographic, path, chosen, polygons, radius_m or PLOT_RADIUS_M)


def _sample_set(
    frame: Any, path: str | Path, column: str, polygons: np.ndarray | None, radius_m: float
) -> SampleSet:
    import pandas
    import shapely

    heights = pandas.to_numeric(frame[column], errors="coerce").to_numpy(np.float64)
    if not np.isfinite(heights).any():
        raise DataError(f"no numbers in the column {column!r}", where=path)
    shapes = frame.geometry.to_numpy()
    centres = shapely.centroid(shapes)
    lon, lat = shapely.get_x(centres), shapely.get_y(centres)
    good = (heights >= REFERENCE_LOWEST_M) & (heights <= REFERENCE_HIGHEST_M) & np.isfinite(lon + lat)
    if not good.any():
        raise DataError(f"no usable height in the column {column!r}", where=path, expected="metres")
    table = pandas.DataFrame(frame.drop(columns=frame.geometry.name))[good].reset_index(drop=True)
    return SampleSet(
        Path(path).name, column, lon[good], lat[good], np.maximum(heights[good], 0),
        None if polygons is None else polygons[good], radius_m, table, _dates(table), int((~good).sum()),
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
    """Square blocks of samples: number of each sample's block (n,); west and south of each block in `crs`."""

    number: np.ndarray
    west: np.ndarray
    south: np.ndarray
    side_m: float
    crs: str

    @property
    def count(self) -> int:
        """How many blocks have a sample."""
        return len(self.west)


def block_samples(lon: np.ndarray, lat: np.ndarray, side_m: float | None = None) -> SampleBlocks:
    """Blocks of 1000, 500, 250 or 100 m, the largest that leaves 25 of them; larger above 1,600 blocks.

    Counted in the UTM zone of the middle, in an equal-area projection for samples more than 6 degrees apart.
    """
    wide = np.ptp(lon) > _WIDE_DEG or np.ptp(lat) > _WIDE_DEG
    crs = _EQUAL_AREA if wide else str(utm_crs(float(np.median(lon)), float(np.median(lat))))
    x, y = (np.asarray(v) for v in transformer("EPSG:4326", crs).transform(lon, lat))

    def cut(side: float) -> tuple[np.ndarray, np.ndarray]:
        cells = np.column_stack([np.floor(x / side), np.floor(y / side)])
        corners, number = np.unique(cells, axis=0, return_inverse=True)
        return corners, number.ravel()

    sides = [side_m] if side_m is not None else BLOCK_SIDES_M
    side = next((s for s in sides if len(cut(s)[0]) >= LEAST_WANTED), sides[-1])
    while len(cut(side)[0]) > MOST:
        side *= 2
    corners, number = cut(side)
    return SampleBlocks(number, corners[:, 0] * side, corners[:, 1] * side, side, crs)


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
    ways: list[Stratifier] = stratifiers([w for w in by if w not in found], slope=slope, dem=dem)
    for way in ways:
        codes = way.at(samples.lon, samples.lat, samples.height_m)
        found[way.by] = (codes, tuple(way.names))
    return found


def column_codes(column: pandas.Series) -> tuple[np.ndarray, Sequence[str]]:
    """Codes of a column: its values, or five quantiles of numbers with more than twelve; -1 for gaps."""
    import pandas

    numbers = pandas.api.types.is_numeric_dtype(column) and not pandas.api.types.is_bool_dtype(column)
    if numbers and column.nunique() > _MOST_CATEGORIES:
        values = column.to_numpy(np.float64, na_value=np.nan)
        known = values[np.isfinite(values)]
        edges = np.unique(np.quantile(known, np.linspace(0, 1, _QUANTILES + 1)))
        codes = np.clip(np.searchsorted(edges, values, side="right") - 1, 0, max(len(edges) - 2, 0))
        names = [f"{low:g} to {high:g}" for low, high in pairwise(edges)]
        return np.where(np.isfinite(values), codes, -1), names
    codes, names = pandas.factorize(column.astype("string"), sort=True)
    return np.asarray(codes, np.int64), [str(name) for name in names]


MIN_VALID_SHARE = 0.9
_WINDOW_PX = 1024
_MOST_PX = 30_000_000


def pool_map(side: HeightSide, samples: SampleSet, stat: str, progress: Progress | None = None) -> np.ndarray:
    """The map over every sample, float64 (n,), NaN where less than 90 % of it is valid.

    Discs take the pixels whose centres they hold (`pool_over_disc`); polygons every pixel by the share of it
    that they cover.
    """
    pool = _pool_polygons if samples.polygons is not None else _pool_discs
    return pool(side, own_grid(side.product), samples, stat, progress or NoProgress())


# ---- discs ----------------------------------------------------------------------------------------
def _pool_discs(
    side: HeightSide, grid: Grid, samples: SampleSet, stat: str, progress: Progress
) -> np.ndarray:
    import pandas

    out = np.full(len(samples), np.nan)
    x, y = transformer("EPSG:4326", grid.crs).transform(samples.lon, samples.lat)
    rows, cols = grid.rowcol(np.asarray(x), np.asarray(y))  # type: ignore[arg-type]
    known = np.isfinite(rows) & np.isfinite(cols)
    keys = np.column_stack([rows // _WINDOW_PX, cols // _WINDOW_PX])[known].astype(np.int64)
    windows, which = np.unique(keys, axis=0, return_inverse=True)
    # Twice the radius over the pixel: a web-Mercator pixel is smaller on the ground than its name.
    reach = math.ceil(2 * samples.radius_m / grid.gsd_m) + 2
    index = np.flatnonzero(known)
    progress.start(len(windows), "pooling")
    for k, (i, j) in enumerate(windows.tolist()):
        at = index[which.ravel() == k]
        size = _WINDOW_PX + 2 * reach
        window = grid.window(i * _WINDOW_PX - reach, j * _WINDOW_PX - reach, size, size)
        values, valid = side.read(window, "mean")
        if valid.any():
            shots = pandas.DataFrame({"lon": samples.lon[at], "lat": samples.lat[at]})
            raster = Raster(values[None].astype(np.float32), valid, window)
            out[at] = pool_over_disc(
                raster, shots, stat, diameter=2 * samples.radius_m, min_valid=MIN_VALID_SHARE
            )
        progress.advance()
    return out


# ---- polygons -------------------------------------------------------------------------------------
def _pool_polygons(
    side: HeightSide, grid: Grid, samples: SampleSet, stat: str, progress: Progress
) -> np.ndarray:
    assert samples.polygons is not None  # pool_map chose by it
    out = np.full(len(samples), np.nan)
    move = transformer("EPSG:4326", grid.crs).transform
    shapes = shapely.transform(
        shapely.segmentize(samples.polygons, 1e-3), lambda xy: np.column_stack(move(xy[:, 0], xy[:, 1]))
    )
    progress.start(len(shapes), "pooling")
    for k, shape in enumerate(shapes):
        if np.isfinite(shapely.get_coordinates(shape)).all() and shape.area > 0:
            out[k] = _pool_one(side, grid, shape, stat, k)
        progress.advance()
    return out


def _pool_one(side: HeightSide, grid: Grid, shape: shapely.Geometry, stat: str, number: int) -> float:
    window = grid.window_over(shape.bounds)
    if window.height * window.width > _MOST_PX:
        raise InputError(
            f"polygon {number + 1} holds {window.height * window.width} px", expected="plots, not regions"
        )
    values, valid = side.read(window, "mean")
    share = _shares(shape, window)
    area = share.sum()
    if area <= 0 or share[valid].sum() < MIN_VALID_SHARE * area:
        return float("nan")
    if stat == "mean":
        return float((values * share)[valid].sum() / share[valid].sum())
    # Highest and percentiles take pixels of which at least half is inside; if there are none, all touched.
    chosen = valid & (share >= min(0.5, float(share.max())))
    return float(statistic_of(values[chosen], np.ones(chosen.sum(), bool), percent_of(stat)))


def _shares(shape: shapely.Geometry, grid: Grid) -> np.ndarray:
    """Share (h, w) of every pixel that a polygon covers, found in tiles: only those on its edge cost time."""
    share = np.zeros(grid.shape)
    for tile in tiles_over(grid, _WINDOW_PX):
        part = coverage(shape, tile.core)
        if part is not None:
            row, col = grid.offset_of(tile.core)
            share[row : row + tile.core.height, col : col + tile.core.width] = part
    return share
