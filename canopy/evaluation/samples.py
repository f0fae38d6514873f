"""References that are no rasters: GEDI shots, and field plots as points or polygons with a height."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from canopy.errors import DataError, InputError
from canopy.evaluation.blocks import LEAST_WANTED, MOST
from canopy.evaluation.heights import REFERENCE_HIGHEST_M, REFERENCE_LOWEST_M
from canopy.evaluation.strata import Stratifier, stratifiers
from canopy.evaluation.tables import missing_column, read_table
from canopy.geo.crs import transformer, utm_crs

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
    from canopy.sources.gedi_shots import read_shots

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
