"""Spatial blocks, which the bootstrap resamples, and the ways of cutting a judgement into parts.

A part is a site, a height, a cover, a slope, a class of a raster, or a polygon. Each way gives a code per
pixel (-1: none) and the codes' names. Classes of rasters are found while reading.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pandas
import shapely
from odc.geo import CRS
from rasterio.features import rasterize
from rasterio.io import DatasetReader
from shapely.geometry.base import BaseGeometry

from canopy.errors import AreaError, InputError
from canopy.evaluation.grids import pixel_metres
from canopy.files import public_name
from canopy.geo.area import SCALE_SLACK
from canopy.geo.crs import project
from canopy.geo.grid import Grid
from canopy.geo.reading import open_raster, read_window
from canopy.geo.vector import read_zones
from canopy.labels.footprint import pool_over_disc
from canopy.metrics import BIN_NAMES, BLOCK_PX, height_bin

# Heights of forests are alike over some hundred metres; larger blocks would leave too few in a small area.
WANTED_M, LEAST_WANTED = 250.0, 25
# Each block costs some kilobytes; more of them make intervals no truer.
MOST = 1600
RASTERS = (".tif", ".tiff", ".vrt", ".jp2")
COVER_SHARES, COVER_ABOVE_M = (0.1, 0.4, 0.7), 2.0
SLOPE_DEG = (5, 10, 20, 30, 45)
# Slope is what the ground does over some twenty metres, not between two pixels of a 1 m model.
_SLOPE_REACH_M = 10.0


class BlockLayout:
    """Blocks of `side_px` x `side_px` pixels from the upper left of every grid, numbered through.

    The largest side up to 250 m (in steps of 50 px) that leaves 25 blocks; larger above 1,600 blocks.
    `side_m` asks for a side; it is rounded to whole cells of 50 px.

    Attributes:
        count: blocks in all, also empty ones; side_m: their side in ground metres (median over the grids).
    """

    def __init__(self, grids: Sequence[Grid], side_m: float | None = None) -> None:
        self.grids = tuple(grids)
        gsd_m = float(np.median([grid.gsd_m for grid in grids]))
        wanted = WANTED_M * (1 + SCALE_SLACK) if side_m is None else side_m + gsd_m * BLOCK_PX / 2
        cells = max(1, math.floor(wanted / (gsd_m * BLOCK_PX)))
        while side_m is None and cells > 1 and sum(self._sizes(cells)) < LEAST_WANTED:
            cells -= 1
        while sum(self._sizes(cells)) > max(MOST, len(grids)):
            cells += 1
        self.side_px = cells * BLOCK_PX
        self.side_m = self.side_px * gsd_m
        *self.bases, self.count = (int(x) for x in np.cumsum([0, *self._sizes(cells)]))

    def _sizes(self, cells: int) -> list[int]:
        side = cells * BLOCK_PX
        return [-(-grid.height // side) * -(-grid.width // side) for grid in self.grids]

    def local(self, raster: int, row: int, col: int, shape: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
        """Blocks of a window: local number of each pixel's block (h, w), and the blocks' numbers (local,)."""
        rows = (row + np.arange(shape[0])) // self.side_px
        cols = (col + np.arange(shape[1])) // self.side_px
        r, c = np.arange(rows[0], rows[-1] + 1), np.arange(cols[0], cols[-1] + 1)
        inside = (rows - rows[0])[:, None] * len(c) + (cols - cols[0])
        numbers = self.bases[raster] + r[:, None] * -(-self.grids[raster].width // self.side_px) + c
        return inside, numbers.ravel()

    def outlines(self) -> tuple[np.ndarray, np.ndarray]:
        """Raster (count,) and west, south, east, north in its CRS (count, 4) of every block, by number."""
        rasters, bounds = [], []
        for raster, grid in enumerate(self.grids):
            corners = np.mgrid[0 : grid.height : self.side_px, 0 : grid.width : self.side_px]
            top, left = corners.reshape(2, -1)
            t, end = (
                grid.transform,
                np.minimum(np.stack([top, left]) + self.side_px, [[n] for n in grid.shape]),
            )
            west, north = t.c + t.a * left, t.f + t.e * top
            bounds.append(np.column_stack([west, t.f + t.e * end[0], t.c + t.a * end[1], north]))
            rasters.append(np.full(len(top), raster))
        return np.concatenate(rasters), np.concatenate(bounds)


def cells_of(shape: tuple[int, int]) -> tuple[np.ndarray, int]:
    """50 px cells of a window that begins on a cell's corner: each pixel's cell (h, w), and how many."""
    rows, cols = (np.arange(n) // BLOCK_PX for n in shape)
    wide = int(cols[-1]) + 1
    return rows[:, None] * wide + cols, wide * (int(rows[-1]) + 1)


# ---- ways of cutting ------------------------------------------------------------------------------
@dataclass
class Way:
    """One way of cutting.

    Attributes:
        by: its name; names: of the codes so far, in the order to show them if `in_order`.
        codes: codes (h, w), -1 for none, of a window whose corner is the corner of a 50 px cell; called with
            its grid, reference heights and validity (h, w), and the site's name.
        file: the raster it reads, if any.
    """

    by: str
    names: list[str]
    codes: Callable[[Grid, np.ndarray, np.ndarray, str], np.ndarray]
    file: DatasetReader | None = None
    in_order: bool = True

    def shown(self) -> list[str]:
        """Names in the order to show them."""
        return self.names if self.in_order else sorted(self.names, key=natural)

    def close(self) -> None:
        """Close its file."""
        if self.file is not None:
            self.file.close()

    def at(self, lattice: Grid, lon: np.ndarray, lat: np.ndarray) -> np.ndarray:
        """Codes (n,) of places in degrees, where they do not depend on heights and sites.

        As on the lattice's pixels, cut to a metre where they are larger.
        """
        n, (px, py), (x, y) = max(1, math.ceil(lattice.gsd_m)), lattice.pixel, lattice.xy(0, 0)
        fine = Grid.of(lattice.crs, (px / n, 0, x, 0, -py / n, y), (lattice.height * n, lattice.width * n))

        def read(window: Grid) -> np.ndarray:
            found = self.codes(window, np.zeros(window.shape), np.ones(window.shape, bool), "")
            return np.where(found >= 0, found, np.nan)

        places = pandas.DataFrame({"lon": lon, "lat": lat})
        found = pool_over_disc(read, places, "max", grid=fine, diameter=1e-3)
        return np.nan_to_num(found, nan=-1).astype(np.int64)


def _by_site() -> Way:
    """By the reference raster that a pixel is from."""
    names: list[str] = []

    def codes(grid: Grid, reference_m: np.ndarray, valid: np.ndarray, site: str) -> np.ndarray:
        if site not in names:
            names.append(site)
        return np.full(grid.shape, names.index(site), np.int64)

    return Way("site", names, codes)


def _by_height() -> Way:
    """By reference height: 0-2, 2-5, ... 60+."""
    names = [f"{name} m" for name in BIN_NAMES]
    return Way("height", names, lambda grid, h, valid, site: height_bin(h))


def _by_cover() -> Way:
    """By canopy cover of the 50 x 50 px cell round a pixel: share of the reference above 2 m."""

    def codes(grid: Grid, reference_m: np.ndarray, valid: np.ndarray, site: str) -> np.ndarray:
        cell, count = cells_of(grid.shape)
        known = np.bincount(cell[valid], minlength=count)
        tall = np.bincount(cell[valid & (reference_m > COVER_ABOVE_M)], minlength=count)
        return np.searchsorted(COVER_SHARES, tall / np.maximum(known, 1), side="right")[cell]

    names = ["cover 0-10 %", "cover 10-40 %", "cover 40-70 %", "cover 70-100 %"]
    return Way("cover", names, codes)


def _band_on(file: DatasetReader, grid: Grid, resampling: str | None = None) -> np.ndarray:
    """The first band of a raster on a grid, float64 (h, w), NaN where there is nothing."""
    values, known = read_window(file, grid, [1], resampling=resampling)
    return np.where(known, values[0].astype(np.float64) * file.scales[0] + file.offsets[0], np.nan)


def _by_slope(dem: str | Path) -> Way:
    """By the slope of the ground over 20 m of an elevation model."""
    file = open_raster(dem)

    def codes(grid: Grid, reference_m: np.ndarray, valid: np.ndarray, site: str) -> np.ndarray:
        k = max(1, round(_SLOPE_REACH_M / grid.gsd_m))
        z, (mx, my) = _band_on(file, grid.pad(k)), pixel_metres(grid)
        right = (z[k:-k, 2 * k :] - z[k:-k, : -2 * k]) / (2 * k * mx)
        down = (z[2 * k :, k:-k] - z[: -2 * k, k:-k]) / (2 * k * my)
        degrees = np.degrees(np.arctan(np.hypot(right, down)))
        return np.where(np.isfinite(degrees), np.searchsorted(SLOPE_DEG, degrees, side="right"), -1)

    names = ["0-5 deg", "5-10 deg", "10-20 deg", "20-30 deg", "30-45 deg", "45+ deg"]
    return Way("slope", names, codes, file)


def _by_raster(by: str, path: str | Path) -> Way:
    """By a raster of whole numbers; every pixel takes the class that its centre lies in."""
    file, names = open_raster(path), list[str]()
    if np.dtype(file.dtypes[0]).kind not in "iub":
        was, expected = file.dtypes[0], "classes as whole numbers"
        raise InputError(f"a raster of {was}", where=public_name(path), expected=expected)

    def codes(grid: Grid, reference_m: np.ndarray, valid: np.ndarray, site: str) -> np.ndarray:
        found, inverse = np.unique(_band_on(file, grid, "nearest"), return_inverse=True)
        labels = [f"{value:.0f}" for value in found]
        names.extend(label for label in labels if label != "nan" and label not in names)
        numbers = np.array([names.index(label) if label != "nan" else -1 for label in labels], np.int64)
        return numbers[inverse].reshape(grid.shape)

    return Way(by, names, codes, file, in_order=False)


def _by_polygons(by: str, path: str | Path, column: str | None) -> Way:
    """By the polygon that a pixel's centre lies in: `FILE` (polygons 1, 2, ...) or `FILE:COLUMN`."""
    frame, crs, shapes = read_zones(path)
    if column is not None and column not in frame:
        raise missing_column(column, frame.columns, path)
    labels = [str(value) for value in (frame[column] if column else range(1, len(frame) + 1))]
    names = sorted(set(labels), key=natural)
    number = np.array([names.index(label) for label in labels])

    @lru_cache  # reprojected once for each CRS that is asked for, and looked up by place
    def tree(target: CRS) -> shapely.STRtree:
        there: list[BaseGeometry | None] = [None] * len(shapes)
        for k, shape in enumerate(shapes):
            with contextlib.suppress(AreaError):  # on the Earth's other side the CRS has no place for it
                there[k] = None if shape is None else project(shape, crs, target)
        return shapely.STRtree(there)

    def codes(grid: Grid, reference_m: np.ndarray, valid: np.ndarray, site: str) -> np.ndarray:
        # In the file's order: where polygons overlap the last one counts.
        near = np.sort(tree(grid.crs).query(shapely.box(*grid.bounds)))
        if not len(near):
            return np.full(grid.shape, -1, np.int64)
        pairs = zip(tree(grid.crs).geometries[near], number[near].tolist(), strict=True)
        drawn = rasterize(pairs, grid.shape, fill=-1, transform=grid.transform, dtype="int32")
        return drawn.astype(np.int64)

    return Way(by, names, codes)


def natural(label: str) -> tuple[int, float, str]:
    """Sorts numbers as numbers, before words: 1, 2, 10, a, b."""
    try:
        return 0, float(label), label
    except ValueError:
        return 1, 0.0, label


def stratifiers(by: Sequence[str], dem: str | Path | None = None) -> list[Way]:
    """The ways named by --by that need no table of samples; close them when done.

    Raises InputError for an unknown way, naming what there is.
    """
    plain = {"site": _by_site, "height": _by_height, "cover": _by_cover}
    made: list[Way] = []
    for word in [*by, *(["slope"] if dem and "slope" not in by else [])]:
        name, equals, source = word.partition("=")
        if word == "slope":
            if not dem:
                raise InputError(
                    "nothing to tell the slope from", where="--by slope", remedy="add --dem FILE"
                )
            made.append(_by_slope(dem))
        elif word in plain:
            made.append(plain[word]())
        elif equals and not (name and source):
            raise InputError(word, where="--by", expected="NAME=FILE")
        elif equals:
            path, column = _file_and_column(source)
            is_raster = Path(path).suffix.lower() in RASTERS
            made.append(_by_raster(name, path) if is_raster else _by_polygons(name, path, column))
        else:
            raise InputError(
                f"unknown stratum {word!r}", where="--by",
                expected="site, height, cover, slope, NAME=raster.tif, NAME=polygons.gpkg:COLUMN or, for "
                "GEDI and plots, a column",
            )  # fmt: skip
    return made


def _file_and_column(source: str) -> tuple[str, str | None]:
    path, _, column = source.rpartition(":")
    return (source, None) if Path(source).exists() or not path else (path, column or None)


def files_of(by: Sequence[str]) -> list[str]:
    """The files that words of --by name."""
    return [_file_and_column(word.partition("=")[2])[0] for word in by if "=" in word]


def missing_column(column: str, columns: Sequence[Any], path: object) -> InputError:
    """The error for a column that is not there; names those that are."""
    there = [str(c) for c in columns if str(c) != "geometry"]
    shown = ", ".join(there[:20]) + (", ..." if len(there) > 20 else "")
    return InputError(f"no column {column!r}", where=path, expected=f"one of {shown}")
