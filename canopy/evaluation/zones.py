"""Which share of each pixel polygons cover: exact polygon-pixel intersection (exactextract; Baston,
https://github.com/isciences/exactextract).

`canopy stats`: heights inside polygons, each pixel weighted by the ground it shares with the polygon.

A pixel's weight is the fraction of it that the polygon covers times its ground area on the ellipsoid, so that
Web-Mercator and degree maps give the same numbers as metric ones. Memory depends on neither the polygon's nor
the map's size.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import shapely
from odc.geo import CRS
from shapely.geometry import MultiPolygon, Polygon, mapping
from shapely.geometry.base import BaseGeometry
from shapely.geometry.polygon import orient

from canopy.errors import ConfigError, InputError
from canopy.evaluation.maps import HeightProduct, open_product, own_grid, pixel_areas_m2
from canopy.files import replacing
from canopy.geo.area import read_zones
from canopy.geo.crs import geod_of, to_crs, to_lonlat
from canopy.geo.grid import Grid
from canopy.geo.tiles import tiles_over
from canopy.runtime import NoProgress, Progress

if TYPE_CHECKING:
    import geopandas


def coverage(shape: BaseGeometry, grid: Grid) -> np.ndarray | None:
    """Fraction of each pixel (h, w) that a shape in the grid's CRS covers; None where it is nothing."""
    from exactextract import exact_extract
    from exactextract.raster import NumPyRasterSource

    frame = shapely.box(*grid.bounds)
    if not shape.intersects(frame):
        return None
    if shape.contains(frame):
        return np.ones(grid.shape)
    part = shape.intersection(frame)
    if part.area == 0:
        return None
    source = NumPyRasterSource(np.zeros(grid.shape, np.uint8), *grid.bounds)
    feature = {"type": "Feature", "properties": {}, "geometry": mapping(_areas(part))}
    found = exact_extract(source, [feature], ["cell_id", "coverage"])[0]["properties"]
    share = np.zeros(grid.height * grid.width)
    share[found["cell_id"]] = found["coverage"]
    return share.reshape(grid.shape)


def _areas(shape: BaseGeometry) -> BaseGeometry:
    """Without the points and lines that a cut along an edge can leave."""
    if isinstance(shape, Polygon | MultiPolygon):
        return shape
    return shapely.union_all([p for p in shapely.get_parts(shape) if isinstance(p, Polygon | MultiPolygon)])


TILE_PX = 1024
# Percentiles are read off a histogram: exact to half a centimetre.
STEP_M, LOW_M, TOP_M = 0.01, -10.0, 150.0
FORMATS = (".csv", ".parquet")


@dataclass(frozen=True)
class ZoneOptions:
    """Attributes:
    percentiles: of height, 0 to 100. above_m: cover is the share of ground higher than each.
    nodata: value that means missing in the map, in place of what it says.
    """

    percentiles: tuple[float, ...] = (5, 25, 50, 75, 95)
    above_m: tuple[float, ...] = (2, 5, 10)
    nodata: float | None = None
    overwrite: bool = False

    def check(self) -> None:
        """Raises ConfigError for values out of range."""
        if not self.percentiles or any(not 0 <= p <= 100 for p in self.percentiles):
            raise ConfigError(str(self.percentiles), where="--percentiles", expected="numbers from 0 to 100")
        if any(not 0 <= height < TOP_M for height in self.above_m):
            raise ConfigError(str(self.above_m), where="--above", expected=f"metres from 0 to {TOP_M:g}")


class _ZoneSums:
    """Weighted sums of one polygon."""

    def __init__(self, above_m: Sequence[float]) -> None:
        self.above_m = np.asarray(above_m, float)
        self.n, self.area, self.total, self.square = 0, 0.0, 0.0, 0.0
        self.low, self.high = math.inf, -math.inf
        self.above = np.zeros(len(above_m))
        self.histogram = np.zeros(round((TOP_M - LOW_M) / STEP_M))

    def add(self, height: np.ndarray, weight_m2: np.ndarray) -> None:
        """Pixels (k,): metres, and the ground they share with the polygon."""
        if not height.size:
            return
        height = height.astype(np.float64)
        self.n += height.size
        self.area += float(weight_m2.sum())
        self.total += float(height @ weight_m2)
        self.square += float((height * height) @ weight_m2)
        self.low, self.high = min(self.low, float(height.min())), max(self.high, float(height.max()))
        self.above += [float(weight_m2[height > limit].sum()) for limit in self.above_m]
        steps = np.clip(((height - LOW_M) / STEP_M).astype(np.int64), 0, self.histogram.size - 1)
        self.histogram += np.bincount(steps, weight_m2, minlength=self.histogram.size)

    def percentile(self, q: float) -> float:
        """The height below which q % of the ground lies."""
        cumulated = np.cumsum(self.histogram)
        step = int(np.searchsorted(cumulated, q / 100 * cumulated[-1] - 1e-9, side="left"))
        middle = LOW_M + (min(step, self.histogram.size - 1) + 0.5) * STEP_M
        return float(np.clip(middle, self.low, self.high))

    def row(self, zone_m2: float, options: ZoneOptions) -> dict[str, Any]:
        """The polygon's numbers; None where no pixel is valid."""
        known = self.n > 0
        mean = self.total / self.area if known else None
        spread = math.sqrt(max(self.square / self.area - mean * mean, 0.0)) if mean is not None else None
        plain: dict[str, Any] = {
            "n": self.n,
            "area_ha": zone_m2 / 1e4,
            "valid_ha": self.area / 1e4,
            "valid_share": min(1.0, self.area / zone_m2) if zone_m2 else 0.0,
            "mean_m": mean,
            "std_m": spread,
            "min_m": self.low if known else None,
            "max_m": self.high if known else None,
        }
        for q in options.percentiles:
            plain[f"p{q:02g}_m"] = self.percentile(q) if known else None
        for limit, m2 in zip(options.above_m, self.above, strict=True):
            plain[f"cover_{limit:g}m"] = m2 / self.area if known else None
            plain[f"cover_{limit:g}m_ha"] = m2 / 1e4
        return plain


def zone_stats(
    height_map: Any,
    zones: str | Path,
    out: str | Path | None = None,
    options: ZoneOptions | None = None,
    *,
    progress: Progress | None = None,
) -> geopandas.GeoDataFrame:
    """One row per feature of `zones`: its own columns, then n, area_ha, valid_ha, valid_share, mean_m, ...

    `n` counts the valid pixels that the polygon touches; polygons outside the map have n = 0 and no heights.
    All means, percentiles and covers are over ground area. Cover is of the polygon's valid ground.

    Args:
        height_map: anything `open_product` takes.
        zones: polygons in any vector file and CRS; holes and several parts are respected.
        out: a .csv, or a .parquet (GeoParquet); None writes nothing.

    Raises InputError: an unreadable map or file, a bad option or name of `out`; nothing is written.
    """
    options, progress = options or ZoneOptions(), progress or NoProgress()
    options.check()
    target = check_out(out, options.overwrite) if out is not None else None
    frame, crs, shapes = read_zones(zones)
    progress.start(len(shapes), "polygons")
    rows = []
    with open_product(height_map, nodata=options.nodata) as product:
        lattice = own_grid(product)
        for shape in shapes:
            rows.append(_one(product, lattice, shape, crs, options))
            progress.advance()
        if not any(
            shape is not None and to_lonlat(shape, crs).intersects(product.outline) for shape in shapes
        ):
            west, south, east, north = product.outline.bounds
            raise InputError(
                "no polygon meets the map", where=zones,
                expected=f"polygons within {west:.4f}, {south:.4f}, {east:.4f}, {north:.4f} (W, S, E, N)",
            )  # fmt: skip
    table = _join(frame, rows)
    if target is not None:
        write_table(table, target)
    return table


def check_out(out: str | Path, overwrite: bool) -> Path:
    """The output's path. Raises InputError for a wrong suffix, an existing file or a missing folder."""
    path = Path(out).expanduser()
    if path.suffix.lower() not in FORMATS:
        raise InputError("not a table's name", where=out, expected=" or ".join(FORMATS))
    if path.exists() and not overwrite:
        raise InputError(
            "exists already", where=out, remedy="add --overwrite, or choose another name with -o"
        )
    if not path.absolute().parent.is_dir():
        raise InputError("no such folder", where=path.absolute().parent, remedy="create it first")
    return path


def _one(
    product: HeightProduct, lattice: Grid, shape: BaseGeometry | None, crs: CRS, options: ZoneOptions
) -> dict[str, Any]:
    """The numbers of one polygon."""
    sums = _ZoneSums(options.above_m)
    if shape is None:
        return sums.row(0.0, options)
    lonlat = to_lonlat(shape, crs)
    there = to_lonlat(shape, crs, lattice.crs)
    frame = to_lonlat(product.outline, "EPSG:4326", lattice.crs).bounds
    window = window_of(lattice, there, frame) if lonlat.intersects(product.outline) else None
    if window is not None:
        # Of the whole window, so that a pixel's area does not depend on the tile it is met in.
        row_areas = pixel_areas_m2(window)
        for tile in tiles_over(window, TILE_PX):
            share = coverage(there, tile.core)
            if share is None:
                continue
            top = window.offset_of(tile.core)[0]
            got = product.read(tile.core)
            used = got.valid & (share > 0)
            weight = share * row_areas[top : top + tile.core.height, None]
            sums.add(got.height_m[used], weight[used])
    return sums.row(geodesic_area_m2(lonlat), options)


def window_of(lattice: Grid, shape: BaseGeometry, frame: Sequence[float]) -> Grid | None:
    """The window of a lattice that holds a shape's part within `frame` (west, south, east, north).

    Both in the lattice's CRS; None where nothing is left.
    """
    bounds = shape.bounds
    west, south = max(bounds[0], frame[0]), max(bounds[1], frame[1])
    east, north = min(bounds[2], frame[2]), min(bounds[3], frame[3])
    return lattice.window_over((west, south, east, north)) if west < east and south < north else None


def geodesic_area_m2(lonlat: Polygon | MultiPolygon) -> float:
    """Area on the WGS84 ellipsoid of polygons in degrees, holes taken off."""
    geod = geod_of(to_crs("EPSG:4326"))
    parts = (orient(part) for part in shapely.get_parts(lonlat))
    return float(sum(abs(geod.geometry_area_perimeter(part)[0]) for part in parts))


def _join(frame: geopandas.GeoDataFrame, rows: list[dict[str, Any]]) -> geopandas.GeoDataFrame:
    """The features' own columns and the numbers; an own column of the same name gets the suffix `_zone`."""
    import pandas as pd

    numbers = pd.DataFrame(rows, index=frame.index)
    heights = [name for name in numbers if name != "n"]
    numbers[heights] = numbers[heights].astype(float)
    taken = {name: f"{name}_zone" for name in frame.columns if name in numbers}
    return frame.rename(columns=taken).join(numbers)


def write_table(table: geopandas.GeoDataFrame, path: Path) -> None:
    """Write a table of zones as .csv or .parquet; OutputError where that is impossible."""
    with replacing(path) as part:
        if path.suffix.lower() == ".csv":
            table.drop(columns=table.geometry.name).to_csv(part, index=False, float_format="%.9g")
        else:
            table.to_parquet(part, index=False)
