"""Labels on an image's grid: canopy height, where it is known, and how much each pixel is worth.

A label is what was measured (a lidar height model, GEDI shots); a target is what training sees. Importing
this module needs no geo library; the functions that read files do.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from canopy.errors import DataError, InputError

if TYPE_CHECKING:
    from canopy.geo.grid import Grid


RULES = ("mean", "max")
UNKNOWN_GAP_WEIGHT = 0.7  # as if about a year and three quarters lay between image and lidar
_GAP_SCALE_YEARS = 5.0
_LOWEST_M, _HIGHEST_M = -3.0, 120.0  # outside: an undeclared nodata value, a bird, a pylon
# NEON's height models set everything below this to 0, by the lidar that flew (metres).
SENSOR_FLOOR_M = {"gemini": 2.0, "riegl": 2 / 3, "galaxy": 2 / 3}
FOOTPRINT_RADIUS_M = 12.5


@dataclass(frozen=True, eq=False)
class Target:
    """What training should predict on one grid.

    Attributes:
        height_m: float32 (h, w) canopy height in metres; 0 where not valid.
        valid: bool (h, w), True where the height is known.
        weight: float32 (h, w), 0..1; 0 where not valid.
        floor_m: a valid height below this is only known to lie somewhere in 0..floor_m.
    """

    height_m: np.ndarray
    valid: np.ndarray
    weight: np.ndarray
    floor_m: float = 0.0


def sensor_floor(sensor: str | None) -> float:
    """Height in metres below which a NEON height model is set to 0; 0 where no sensor is given.

    Raises DataError for a sensor that is not known.
    """
    if not sensor:
        return 0.0
    words = sensor.lower()
    for name, floor in SENSOR_FLOOR_M.items():
        if name in words:
            return floor
    raise DataError(
        f"sensor {sensor!r} is not known", expected=", ".join(SENSOR_FLOOR_M), remedy="give floor_m instead"
    )


def gap_weight(years: float | None) -> float:
    """Worth (0..1) of a label taken `years` before or after the image; None = unknown, 0.7.

    Trees grow half a metre a year and are felled in a day: exp(-years / 5).
    """
    if years is None:
        return UNKNOWN_GAP_WEIGHT
    if not np.isfinite(years):
        raise DataError(f"date gap of {years} years")
    return float(np.exp(-abs(years) / _GAP_SCALE_YEARS))


def pixel_weight(height_m: np.ndarray, valid: np.ndarray, weight: float, floor_m: float) -> np.ndarray:
    """Weight per pixel, float32: that of the label, less where only 0..floor is known, 0 where nothing is.

    A height in 0..floor is uncertain by the floor, on top of a lidar model's usual metre: 1 / (1 + floor).
    """
    low = height_m < floor_m
    return np.where(valid, np.where(low, weight / (1 + floor_m), weight), 0).astype(np.float32)


def make_target(
    height_m: np.ndarray, valid: np.ndarray, *, gap_years: float | None = None, floor_m: float = 0.0
) -> Target:
    """Target of heights (h, w) that are already on the grid. Impossible heights become unknown, small
    negative ones 0; weights follow `gap_weight` and `pixel_weight`."""
    if height_m.shape != valid.shape:
        raise InputError(f"heights {height_m.shape} and validity {valid.shape} differ")
    if not 0 <= floor_m <= 10:
        raise DataError(f"floor of {floor_m} m", expected="0 to 10 m")
    with np.errstate(invalid="ignore"):
        good = valid & (height_m > _LOWEST_M) & (height_m < _HIGHEST_M)
    heights = np.where(good, np.maximum(height_m, 0), 0).astype(np.float32)
    return Target(heights, good, pixel_weight(heights, good, gap_weight(gap_years), floor_m), floor_m)


def chm_target(
    path: str | Path,
    grid: Grid,
    *,
    rule: str = "mean",
    gap_years: float | None = None,
    floor_m: float = 0.0,
    moved_m: tuple[float, float] = (0.0, 0.0),
) -> Target:
    """A canopy height raster of any CRS and pixel size on `grid`.

    Args:
        path: raster whose first band is height in metres (scale and offset of the file are applied).
        grid: where the target is wanted.
        rule: what a pixel takes from several label pixels: their "mean" (as `canopy evaluate` compares)
            or their "max" (the highest return). Pixels of about the same size are taken as they are, never
            interpolated; coarser labels are interpolated by "mean" and repeated by "max".
        gap_years: between image and lidar; None = unknown.
        floor_m: see `Target`.
        moved_m: (down, right) where the label lies relative to the image, as `register.image_shift`
            says it; the label is read from there, which undoes it.

    Raises:
        InputError: an unknown rule.
        ImageryError: the file is missing, damaged, or has no place.
    """
    from canopy.geo.reading import open_raster

    if rule not in RULES:
        raise InputError(f"rule {rule!r}", expected=" or ".join(RULES))
    with open_raster(path) as dataset:
        heights, valid = _read(dataset, _moved(grid, moved_m), rule)
        heights = heights * dataset.scales[0] + dataset.offsets[0]
    return make_target(heights, valid, gap_years=gap_years, floor_m=floor_m)


def unknown_target(shape: tuple[int, int]) -> Target:
    """A target (h, w) of an image without labels: no height is known."""
    nothing = np.zeros(shape, np.float32)
    return Target(nothing, np.zeros(shape, bool), nothing)


def _moved(grid: Grid, moved_m: tuple[float, float]) -> Grid:
    from affine import Affine

    from canopy.geo.grid import Grid

    if moved_m == (0.0, 0.0):
        return grid
    px, py = grid.pixel
    x, y = grid.xy(moved_m[0] / grid.gsd_m, moved_m[1] / grid.gsd_m)
    return Grid.of(grid.crs, Affine(px, 0, x, 0, -py, y), grid.shape)


def _read(dataset: Any, grid: Grid, rule: str) -> tuple[np.ndarray, np.ndarray]:
    from affine import Affine

    from canopy.geo.grid import Grid
    from canopy.geo.place import SourcePlace
    from canopy.geo.reading import read_window

    place = SourcePlace.of(dataset)
    ratio = grid.gsd_m / place.grid().gsd_m if place.is_north_up else 1.0
    if rule == "mean" or ratio <= 1.5:
        as_is = 1 / 1.5 <= ratio <= 1.5 or rule == "max"
        values, valid = read_window(dataset, grid, [1], resampling="nearest" if as_is else None)
        return values[0], valid
    n = int(np.ceil(ratio))
    px, py = (side / n for side in grid.pixel)
    (x, y), (h, w) = grid.xy(0, 0), grid.shape
    fine = Grid.of(grid.crs, Affine(px, 0, x, 0, -py, y), (h * n, w * n))
    values, valid = read_window(dataset, fine, [1], resampling="nearest")
    blocks = np.where(valid, values[0], -np.inf).reshape(h, n, w, n)
    known = valid.reshape(h, n, w, n).mean(axis=(1, 3)) >= 0.5
    return np.where(known, blocks.max(axis=(1, 3)), 0), known


# ---- GEDI: weak targets ---------------------------------------------------------------------------
def shots_on(path: str | Path, grid: Grid, *, rh: int = 98) -> np.ndarray:
    """GEDI shots whose disc lies wholly on `grid`: float32 (n, 4) of row, col, height in metres, weight.

    Args:
        path: a table of `canopy data gedi` (columns lat, lon, rh_NN and, if there, weight).
        grid: pixel-space (row, col) refer to it; (0, 0) is its upper-left corner.
        rh: which relative height to take.

    Raises:
        DataError: the file is missing, is no table, or lacks the columns.
    """
    from canopy.geo.crs import transformer

    table = _shot_table(str(path), rh)
    x, y = transformer("EPSG:4326", grid.crs).transform(table[1], table[0])
    row, col = grid.rowcol(np.asarray(x), np.asarray(y))  # type: ignore[arg-type]
    reach = FOOTPRINT_RADIUS_M / grid.gsd_m
    inside = (row >= reach) & (row <= grid.height - reach) & (col >= reach) & (col <= grid.width - reach)
    inside &= np.isfinite(table[2]) & (table[3] > 0)
    return np.stack([row, col, table[2], table[3]], axis=1)[inside].astype(np.float32)


def _shot_table(path: str, rh: int) -> np.ndarray:
    """Rows lat, lon, height, weight of a shots file, float64 (4, n)."""
    from canopy.errors import MissingDependencyError

    try:
        import pyarrow as pa
        from pyarrow import parquet
    except ImportError as error:
        raise MissingDependencyError(
            "reading GEDI tables needs pyarrow", remedy="pip install 'canopy-height[gedi]'"
        ) from error
    wanted = ["lat", "lon", f"rh_{rh}"]
    try:
        names = parquet.read_schema(path).names
        missing = [name for name in wanted if name not in names]
        if missing:
            raise DataError(f"lacks the columns {', '.join(missing)}", where=path)
        table = parquet.read_table(path, columns=[n for n in (*wanted, "weight") if n in names])
    except FileNotFoundError as error:
        raise DataError("no such file", where=path) from error
    except (pa.ArrowInvalid, OSError) as error:
        raise DataError(
            "is not a Parquet table", where=path, remedy="make it with canopy data gedi"
        ) from error
    columns = [table[name].to_numpy().astype(np.float64) for name in wanted]
    weight = table["weight"].to_numpy() if "weight" in table.column_names else np.ones(len(columns[0]))
    return np.stack([*columns, weight.astype(np.float64)])
