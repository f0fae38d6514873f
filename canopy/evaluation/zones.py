"""Heights inside polygons, each pixel weighted by the ground it shares with the polygon: `canopy stats`.

A pixel's weight is the fraction of it that the polygon covers (exactextract; Baston,
https://github.com/isciences/exactextract) times its ground area on the ellipsoid, so that Web-Mercator and
degree maps give the same numbers as metric ones. A polygon is walked in tiles, and exactextract sees only
those that its edge crosses: given a whole region it would keep every pixel in memory for the percentiles.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import shapely
from odc.geo import CRS
from shapely.geometry import mapping
from shapely.geometry.base import BaseGeometry
from shapely.geometry.polygon import orient

from canopy.config import Settings, validate_settings
from canopy.errors import ConfigError, InputError
from canopy.evaluation.areas import CoverCounts, Drawing, area_model_of, check_level
from canopy.evaluation.grids import own_grid, pixel_areas_m2
from canopy.evaluation.maps import HeightMap
from canopy.evaluation.opening import open_heights
from canopy.files import check_output, replacing
from canopy.geo.crs import EDGE_PIECES, geod_of, to_crs, to_lonlat
from canopy.geo.grid import Grid, tiles_over
from canopy.geo.heights import HIGHEST_M, LOWEST_M
from canopy.geo.vector import read_zones
from canopy.runtime import NoProgress, Progress

if TYPE_CHECKING:
    import geopandas

    from canopy.evaluation.opening import HeightSource

TILE_PX = 1024
FORMATS = (".csv", ".gpkg", ".parquet")
TOTAL = "total"


class ZoneOptions(Settings):
    """What `canopy stats` can be asked.

    Attributes:
        percentiles: of height, 0 to 100. above_m: cover is the share of ground higher than each.
        interval: coverage of intervals of the means and covers, 0.5 to 0.95, of a map with bands of 0.9.
        total: a last row for all polygons together, their common ground once.
        nodata: value that means missing in the map, in place of what it says.
        band: number or name of the height's band. layer: of a vector file that has several.
    """

    percentiles: tuple[float, ...] = (5, 25, 50, 75, 95)
    above_m: tuple[float, ...] = (2, 5, 10)
    interval: float | None = None
    total: bool = False
    nodata: float | None = None
    band: int | str | None = None
    layer: str | None = None

    def check(self) -> None:
        """Raises ConfigError for values out of range."""
        if not self.percentiles or any(not 0 <= p <= 100 for p in self.percentiles):
            raise ConfigError(str(self.percentiles), where="--percentiles", expected="numbers from 0 to 100")
        if any(not 0 <= height < HIGHEST_M for height in self.above_m):
            expected = f"metres from 0 to {HIGHEST_M:g}"
            raise ConfigError(str(self.above_m), where="--above", expected=expected)
        if self.interval is not None:
            check_level(self.interval)


def stats(
    map: HeightSource,
    zones: str | Path | geopandas.GeoDataFrame,
    out: str | Path | None = None,
    *,
    overwrite: bool = False,
    progress: Progress | None = None,
    **options: Any,
) -> geopandas.GeoDataFrame:
    """Heights by polygon: its own columns, then n, area_ha, valid_ha, valid_share, mean_m, std_m, ...

    `n` counts the valid pixels that a polygon touches; polygons outside the map have n = 0 and no heights.
    All means, percentiles and covers are over ground area. Cover is of the polygon's valid ground. With
    `interval` there are mean_lower_m, mean_upper_m, mean_sd_m and cover_Xm_lower, cover_Xm_upper. What a
    reader must know is in `attrs["notes"]`.

    Args:
        map: a height map: a path, a folder of tiles, or an xarray DataArray with a CRS.
        zones: polygons in any vector file and CRS, or a GeoDataFrame; holes and several parts are respected.
        out: a .csv, a .gpkg, or a .parquet (GeoParquet); None writes nothing.
        options: see `ZoneOptions`.

    Raises InputError: an unreadable map or file, a bad option or name of `out`; DataError: `interval` of a
    map without bands. Nothing is written.
    """
    chosen = validate_settings(ZoneOptions, options, "stats")
    chosen.check()
    if out is not None:
        check_table(out, [map, zones], overwrite)
    frame, crs, shapes = read_zones(zones, chosen.layer)
    if chosen.total:
        frame, shapes = with_total(frame, shapes)
    progress = progress or NoProgress()
    progress.start(len(shapes), "polygons")
    rows = []
    with open_heights(map, nodata=chosen.nodata, band=chosen.band) as heights:
        check_meeting(shapes, crs, heights.outline, zones)
        for shape in shapes:
            rows.append(zone_numbers(heights, shape, crs, chosen))
            progress.advance()
        notes = heights.notes
    table = joined(frame, rows)
    table.attrs["notes"] = notes
    if out is not None:
        write_table(table, Path(out).expanduser())
    return table


def check_meeting(
    shapes: Sequence[BaseGeometry | None], crs: CRS, outline: BaseGeometry, zones: object
) -> None:
    """Raises InputError where no polygon meets an outline in degrees."""
    if not any(shape is not None and to_lonlat(shape, crs).intersects(outline) for shape in shapes):
        west, south, east, north = outline.bounds
        raise InputError(
            "no polygon meets the map", where=zones if isinstance(zones, str | Path) else "zones",
            expected=f"polygons within {west:.4f}, {south:.4f}, {east:.4f}, {north:.4f} (W, S, E, N)",
        )  # fmt: skip


def with_total(
    frame: geopandas.GeoDataFrame, shapes: list[BaseGeometry | None]
) -> tuple[geopandas.GeoDataFrame, list[BaseGeometry | None]]:
    """A last feature of all polygons' ground, named "total" in the first column of texts."""
    import pandas as pd

    whole = shapely.union_all([shape for shape in shapes if shape is not None])
    texts = [name for name in frame if pd.api.types.is_string_dtype(frame[name])]
    last = {frame.geometry.name: [whole]} | {name: [TOTAL] for name in texts[:1]}
    row = type(frame)(last, geometry=frame.geometry.name, crs=frame.crs)
    # A missing number must not make decimals of all.
    kinds = {"i": "Int64", "u": "UInt64", "b": "boolean"}
    whole_numbers = {n: kinds[d.kind] for n, d in frame.dtypes.items() if getattr(d, "kind", "") in kinds}
    return pd.concat([frame.astype(whole_numbers), row], ignore_index=True), [*shapes, whole]


def check_table(out: str | Path, inputs: Sequence[Any], overwrite: bool) -> None:
    """Raises InputError for an output's wrong suffix, an existing file, an input, or a missing folder."""
    expected = "a table's name, ending in .csv, .gpkg or .parquet"
    check_output(out, inputs, overwrite=overwrite, suffixes=FORMATS, expected=expected)


@dataclass(frozen=True)
class Pixels:
    """Valid pixels (k,) of a polygon: values (bands, k), the share of each that is covered, and the ground it
    has in common with the polygon in square metres. `drawing` knows the polygon's shape so far."""

    values: np.ndarray
    share: np.ndarray
    weight: np.ndarray
    drawing: Drawing


def pixels_in(
    read: Callable[[Grid], tuple[np.ndarray, np.ndarray]],
    lattice: Grid,
    shape: BaseGeometry | None,
    crs: CRS,
) -> Iterator[Pixels]:
    """The valid pixels of a lattice that polygons in `crs` touch, a tile at a time.

    `read` gives values (bands, h, w) and validity (h, w) of a window of the lattice.
    """
    if shape is None or not to_lonlat(shape, crs).intersects(lattice.outline()):
        return
    there = to_lonlat(shape, crs, lattice.crs)
    window = window_of(lattice, there, lattice.bounds)
    if window is None:
        return
    # Of the whole window, so that a pixel's area does not depend on the tile it is met in.
    row_areas = pixel_areas_m2(window)
    drawing = Drawing(window.shape, window.gsd_m)
    for tile in tiles_over(window, TILE_PX):
        share = coverage(there, tile)
        if share is None:
            continue
        top, left = window.offset_of(tile)
        values, valid = read(tile)
        rows, cols = np.nonzero(valid & (share > 0))
        if rows.size:
            covered = share[rows, cols]
            drawing.add(rows + top, cols + left, covered)
            found = values[:, rows, cols].astype(np.float64)
            yield Pixels(found, covered, covered * row_areas[rows + top], drawing)


def coverage(shape: BaseGeometry, grid: Grid) -> np.ndarray | None:
    """Fraction of each pixel (h, w) that a shape in the grid's CRS covers; None where it is nothing."""
    from exactextract import exact_extract
    from exactextract.raster import NumPyRasterSource

    frame = shapely.box(*grid.bounds)
    if shape.contains(frame):
        return np.ones(grid.shape)
    # Without the points and lines that a cut along an edge can leave.
    areas = shapely.union_all([p for p in shapely.get_parts(shape.intersection(frame)) if p.area > 0])
    if areas.area == 0:
        return None
    source = NumPyRasterSource(np.zeros(grid.shape, np.uint8), *grid.bounds)
    feature = {"type": "Feature", "properties": {}, "geometry": mapping(areas)}
    found = exact_extract(source, [feature], ["cell_id", "coverage"])[0]["properties"]
    share = np.zeros(grid.height * grid.width)
    share[found["cell_id"]] = found["coverage"]
    return share.reshape(grid.shape)


def window_of(lattice: Grid, shape: BaseGeometry, frame: Sequence[float]) -> Grid | None:
    """The window of a lattice that holds a shape's part within `frame` (west, south, east, north).

    Both in the lattice's CRS; None where nothing is left.
    """
    bounds = shape.bounds
    west, south = max(bounds[0], frame[0]), max(bounds[1], frame[1])
    east, north = min(bounds[2], frame[2]), min(bounds[3], frame[3])
    return lattice.window_over((west, south, east, north)) if west < east and south < north else None


def geodesic_area_m2(shape: BaseGeometry, crs: CRS) -> float:
    """Area of polygons on the WGS84 ellipsoid, holes taken off."""
    geod = geod_of(to_crs("EPSG:4326"))
    if to_crs(crs) == to_crs("EPSG:4326"):
        # Edges are straight in degrees, along a parallel too; the shortest way between their ends is not.
        west, south, east, north = shape.bounds
        shape = shapely.segmentize(shape, max(east - west, north - south) / EDGE_PIECES or 1.0)
    parts = (orient(part) for part in shapely.get_parts(to_lonlat(shape, crs)))
    return float(sum(abs(geod.geometry_area_perimeter(part)[0]) for part in parts))


def zone_numbers(
    heights: HeightMap, shape: BaseGeometry | None, crs: CRS, options: ZoneOptions
) -> dict[str, Any]:
    """The numbers of polygons in `crs` by the names of `stats`' columns; None where no pixel is valid.

    Raises DataError where intervals are asked for, of a map that has none.
    """
    asks = options.interval is not None
    model = area_model_of(heights.tags if heights.has_interval else {}) if asks else None

    def read(tile: Grid) -> tuple[np.ndarray, np.ndarray]:
        return heights.read(tile, interval=asks)

    zone_m2 = 0.0 if shape is None else geodesic_area_m2(shape, crs)
    n, area, squares, sums, lows, highs = 0, 0.0, 0.0, 0.0, [], []
    covers = [CoverCounts(limit) for limit in options.above_m]
    # Square metres by whole millimetres above LOWEST_M: percentiles are exact to half of one.
    histogram = np.zeros(round((HIGHEST_M - LOWEST_M) * 1000) + 1)
    part = None
    for part in pixels_in(read, own_grid(heights), shape, crs):
        height, weight = part.values[0], part.weight
        n += height.size
        area += weight.sum()
        sums += part.values @ weight
        squares += (height * height) @ weight
        for cover in covers:
            cover.add(part.values, weight)
        lows.append(float(height.min()))
        highs.append(float(height.max()))
        np.add.at(histogram, np.rint((height - LOWEST_M) * 1000).astype(np.int64), weight)
    means = np.full(3, np.nan) if part is None else np.atleast_1d(sums) / area
    mean = float(means[0]) if n else None
    plain: dict[str, Any] = {
        "n": n,
        "area_ha": zone_m2 / 1e4,
        "valid_ha": area / 1e4,
        "valid_share": min(1.0, area / zone_m2) if zone_m2 else 0.0,
        "mean_m": mean,
        "std_m": None if mean is None else max(squares / area - mean * mean, 0.0) ** 0.5,
        "min_m": min(lows, default=None),
        "max_m": max(highs, default=None),
    }
    cumulated = np.cumsum(histogram)
    for q in options.percentiles:
        step = int(np.searchsorted(cumulated, q / 100 * cumulated[-1] * (1 - 1e-12), side="left"))
        plain[f"p{q:02g}_m"] = float(np.clip(LOWEST_M + step / 1000, min(lows), max(highs))) if n else None
    lower, upper, sd = np.full(3, np.nan)
    if model is not None and part is not None and options.interval is not None:
        lower, upper, sd = model.interval(means, part.drawing.correlation(model), area, options.interval)
    for cover in covers:
        name = f"cover_{cover.above_m:g}m"
        plain[name] = cover.share(0.0) if n else None
        if model is not None:
            # All heights moved together, each by the share of its band that takes the mean to its end.
            down, up = means[0] - means[1], means[2] - means[0]
            plain[f"{name}_lower"] = cover.share(-(means[0] - lower) / max(down, 1e-9)) if n else None
            plain[f"{name}_upper"] = cover.share((upper - means[0]) / max(up, 1e-9)) if n else None
        plain[f"{name}_ha"] = cover.share(0.0) * area / 1e4 if n else 0.0
    if model is not None:
        plain |= {"mean_lower_m": float(lower), "mean_upper_m": float(upper), "mean_sd_m": float(sd)}
    return plain


def joined(frame: geopandas.GeoDataFrame, rows: Sequence[Mapping[str, Any]]) -> geopandas.GeoDataFrame:
    """The features' own columns and the numbers.

    An own column that is named as a number keeps its values under `NAME_zone`, or `NAME_zone2`, ... where the
    file is itself the output of an earlier run.
    """
    import pandas as pd

    numbers = pd.DataFrame(list(rows), index=frame.index)
    heights = [name for name in numbers if name != "n" and numbers[name].dtype != bool]
    numbers[heights] = numbers[heights].astype(float)
    used = {*map(str, frame.columns), *map(str, numbers.columns)}
    renamed = {}
    for name in (name for name in frame.columns if name in numbers):
        free = (f"{name}_zone{k}" for k in ("", *range(2, len(used) + 3)))
        renamed[name] = next(new for new in free if new not in used)
        used.add(renamed[name])
    return frame.rename(columns=renamed).join(numbers)


def write_table(
    table: geopandas.GeoDataFrame, path: Path, layers: Mapping[str, geopandas.GeoDataFrame] | None = None
) -> None:
    """Write a table as .csv, .gpkg or .parquet; OutputError where that is impossible.

    `layers`: what a .gpkg holds, by name, in place of the layer `zones`.
    """
    plain = table.copy()
    plain.attrs = {}
    with replacing(path) as part:
        if path.suffix.lower() == ".csv":
            plain.drop(columns=plain.geometry.name).to_csv(part, index=False, float_format="%.9g")
        elif path.suffix.lower() == ".gpkg":
            named = part.with_suffix(".gpkg")  # GDAL warns of other endings
            for layer, frame in (layers or {"zones": plain}).items():
                frame.to_file(named, driver="GPKG", layer=layer)
            named.rename(part)
        else:
            plain.to_parquet(part, index=False)
