"""Spatial blocks, which the bootstrap resamples, and the ways of cutting a judgement into parts.

A part is a site, a height, a cover, a slope, a class of a raster, or a polygon. Each way gives a code per
pixel (-1: none) and the codes' names. Classes of rasters are found while reading.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import shapely
from odc.geo import CRS
from rasterio.features import rasterize
from shapely.geometry.base import BaseGeometry

from canopy.errors import AreaError, InputError
from canopy.evaluation.grids import pixel_metres
from canopy.files import public_name
from canopy.geo.area import SCALE_SLACK
from canopy.geo.crs import METRES_PER_DEGREE, project, transformer
from canopy.geo.grid import Grid
from canopy.geo.place import SourcePlace
from canopy.geo.reading import open_raster, read_window
from canopy.geo.vector import read_zones
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
class Stratifier:
    """One way of cutting. `by`: its name; `names`: of the codes so far."""

    by: str
    names: Sequence[str]

    def window(self, grid: Grid, reference_m: np.ndarray, valid: np.ndarray, site: str) -> np.ndarray:
        """Codes (h, w), -1 for none, of a window whose corner is the corner of a 50 px cell."""
        raise NotImplementedError

    def at(self, lon: np.ndarray, lat: np.ndarray, reference_m: np.ndarray) -> np.ndarray:
        """Codes (n,) of places in degrees."""
        raise InputError(
            f"samples have no {self.by}", where=f"--by {self.by}", remedy="name a column or a raster"
        )

    def shown(self) -> Sequence[str]:
        """Names in the order to show them."""
        return self.names

    def close(self) -> None:
        """Close its file."""


class BySite(Stratifier):
    """By the reference raster that a pixel is from."""

    by = "site"

    def __init__(self) -> None:
        self.names: list[str] = []

    def window(self, grid: Grid, reference_m: np.ndarray, valid: np.ndarray, site: str) -> np.ndarray:
        if site not in self.names:
            self.names.append(site)
        return np.full(grid.shape, self.names.index(site), np.int64)


class ByHeight(Stratifier):
    """By reference height: 0-2, 2-5, ... 60+."""

    by = "height"
    names = tuple(f"{name} m" for name in BIN_NAMES)

    def window(self, grid: Grid, reference_m: np.ndarray, valid: np.ndarray, site: str) -> np.ndarray:
        return height_bin(reference_m)

    def at(self, lon: np.ndarray, lat: np.ndarray, reference_m: np.ndarray) -> np.ndarray:
        return height_bin(reference_m)


class ByCover(Stratifier):
    """By canopy cover of the 50 x 50 px cell round a pixel: share of the reference above 2 m."""

    by = "cover"
    names = ("cover 0-10 %", "cover 10-40 %", "cover 40-70 %", "cover 70-100 %")

    def window(self, grid: Grid, reference_m: np.ndarray, valid: np.ndarray, site: str) -> np.ndarray:
        cell, count = cells_of(grid.shape)
        known = np.bincount(cell[valid], minlength=count)
        tall = np.bincount(cell[valid & (reference_m > COVER_ABOVE_M)], minlength=count)
        return np.searchsorted(COVER_SHARES, tall / np.maximum(known, 1), side="right")[cell]


class _OfRaster(Stratifier):
    """A way that reads the first band of a raster."""

    def __init__(self, path: str | Path) -> None:
        self.file = open_raster(path)
        self.crs = SourcePlace.of(self.file).crs

    def on(self, grid: Grid, resampling: str | None = None) -> np.ndarray:
        """The band on a grid, float64 (h, w), NaN where there is nothing."""
        values, known = read_window(self.file, grid, [1], resampling=resampling)
        scaled = values[0].astype(np.float64) * self.file.scales[0] + self.file.offsets[0]
        return np.where(known, scaled, np.nan)

    def sampled(self, lon: np.ndarray, lat: np.ndarray) -> np.ndarray:
        """The band at places in degrees, float64 (n,), NaN where there is nothing."""
        x, y = (np.asarray(v) for v in transformer("EPSG:4326", self.crs).transform(lon, lat))
        order = np.lexsort((x, -y // 1e3))  # near ones together: they share blocks of the file
        out = np.full(len(x), np.nan)
        picked = self.file.sample(zip(x[order], y[order], strict=True), 1, masked=True)
        out[order] = [np.ma.filled(value.astype(np.float64), np.nan)[0] for value in picked]
        return out * self.file.scales[0] + self.file.offsets[0]

    def close(self) -> None:
        self.file.close()


class BySlope(_OfRaster):
    """By the slope of the ground, from an elevation model (over 20 m) or a raster of degrees."""

    by = "slope"
    names = ("0-5 deg", "5-10 deg", "10-20 deg", "20-30 deg", "30-45 deg", "45+ deg")

    def __init__(self, path: str | Path, *, elevation: bool) -> None:
        super().__init__(path)
        self.elevation = elevation

    def window(self, grid: Grid, reference_m: np.ndarray, valid: np.ndarray, site: str) -> np.ndarray:
        if not self.elevation:
            return _slope_class(self.on(grid))
        k = max(1, round(_SLOPE_REACH_M / grid.gsd_m))
        z, (mx, my) = self.on(grid.pad(k)), pixel_metres(grid)
        right = (z[k:-k, 2 * k :] - z[k:-k, : -2 * k]) / (2 * k * mx)
        down = (z[2 * k :, k:-k] - z[: -2 * k, k:-k]) / (2 * k * my)
        return _slope_class(np.degrees(np.arctan(np.hypot(right, down))))

    def at(self, lon: np.ndarray, lat: np.ndarray, reference_m: np.ndarray) -> np.ndarray:
        if not self.elevation:
            return _slope_class(self.sampled(lon, lat))
        north = _SLOPE_REACH_M / METRES_PER_DEGREE
        east = north / np.cos(np.radians(lat))
        right = self.sampled(lon + east, lat) - self.sampled(lon - east, lat)
        up = self.sampled(lon, lat + north) - self.sampled(lon, lat - north)
        return _slope_class(np.degrees(np.arctan(np.hypot(right, up) / (2 * _SLOPE_REACH_M))))


def _slope_class(degrees: np.ndarray) -> np.ndarray:
    return np.where(np.isfinite(degrees), np.searchsorted(SLOPE_DEG, degrees, side="right"), -1)


class ByRaster(_OfRaster):
    """By a raster of whole numbers; every pixel takes the class that its centre lies in."""

    def __init__(self, by: str, path: str | Path) -> None:
        super().__init__(path)
        self.by, self.names = by, []
        if np.dtype(self.file.dtypes[0]).kind not in "iub":
            raise InputError(
                f"a raster of {self.file.dtypes[0]}", where=public_name(path),
                expected="classes as whole numbers",
            )  # fmt: skip

    def window(self, grid: Grid, reference_m: np.ndarray, valid: np.ndarray, site: str) -> np.ndarray:
        return self._coded(self.on(grid, "nearest"))

    def at(self, lon: np.ndarray, lat: np.ndarray, reference_m: np.ndarray) -> np.ndarray:
        return self._coded(self.sampled(lon, lat))

    def _coded(self, values: np.ndarray) -> np.ndarray:
        found, inverse = np.unique(values, return_inverse=True)
        labels = [f"{value:.0f}" for value in found]
        self.names = [*self.names, *(n for n in labels if n != "nan" and n not in self.names)]
        codes = np.array([self.names.index(n) if n != "nan" else -1 for n in labels], np.int64)
        return codes[inverse].reshape(values.shape)

    def shown(self) -> Sequence[str]:
        return sorted(self.names, key=natural)


class ByPolygons(Stratifier):
    """By the polygon that a pixel's centre lies in: `FILE` (polygons 1, 2, ...) or `FILE:COLUMN`."""

    def __init__(self, by: str, path: str | Path, column: str | None) -> None:
        self.by = by
        frame, self._crs, self._shapes = read_zones(path)
        if column is not None and column not in frame:
            raise missing_column(column, frame.columns, path)
        labels = [str(value) for value in (frame[column] if column else range(1, len(frame) + 1))]
        self.names = sorted(set(labels), key=natural)
        self._codes = np.array([self.names.index(label) for label in labels])
        # Reprojected once for each CRS that is asked for, and looked up by place.
        self._trees: dict[CRS, shapely.STRtree] = {}

    def _tree(self, crs: CRS) -> shapely.STRtree:
        if crs not in self._trees:
            there: list[BaseGeometry | None] = [None] * len(self._shapes)
            for k, shape in enumerate(self._shapes):
                with contextlib.suppress(AreaError):  # on the Earth's other side the CRS has no place for it
                    there[k] = None if shape is None else project(shape, self._crs, crs)
            self._trees[crs] = shapely.STRtree(there)
        return self._trees[crs]

    def window(self, grid: Grid, reference_m: np.ndarray, valid: np.ndarray, site: str) -> np.ndarray:
        tree = self._tree(grid.crs)
        # In the file's order: where polygons overlap the last one counts.
        near = np.sort(tree.query(shapely.box(*grid.bounds)))
        if not len(near):
            return np.full(grid.shape, -1, np.int64)
        pairs = zip(tree.geometries[near], self._codes[near].tolist(), strict=True)
        drawn = rasterize(pairs, grid.shape, fill=-1, transform=grid.transform, dtype="int32")
        return drawn.astype(np.int64)

    def at(self, lon: np.ndarray, lat: np.ndarray, reference_m: np.ndarray) -> np.ndarray:
        point, polygon = self._tree(CRS("EPSG:4326")).query(shapely.points(lon, lat), predicate="within")
        codes = np.full(len(lon), -1, np.int64)
        codes[point] = self._codes[polygon]
        return codes


def natural(label: str) -> tuple[int, float, str]:
    """Sorts numbers as numbers, before words: 1, 2, 10, a, b."""
    try:
        return 0, float(label), label
    except ValueError:
        return 1, 0.0, label


def stratifiers(
    by: Sequence[str], *, slope: str | Path | None = None, dem: str | Path | None = None
) -> list[Stratifier]:
    """The ways named by --by that need no table of samples; close them when done.

    Raises InputError for an unknown way, naming what there is.
    """
    plain: dict[str, type[Stratifier]] = {"site": BySite, "height": ByHeight, "cover": ByCover}
    made: list[Stratifier] = []
    for word in [*by, *(["slope"] if (slope or dem) and "slope" not in by else [])]:
        name, equals, source = word.partition("=")
        if word == "slope" and not (slope or dem):
            raise InputError(
                "nothing to tell the slope from", where="--by slope", remedy="add --dem or --slope FILE"
            )
        if word == "slope":
            made.append(BySlope(dem or slope or "", elevation=dem is not None))
        elif word in plain:
            made.append(plain[word]())
        elif equals and not (name and source):
            raise InputError(word, where="--by", expected="NAME=FILE")
        elif equals:
            path, column = _file_and_column(source)
            is_raster = Path(path).suffix.lower() in RASTERS
            made.append(ByRaster(name, path) if is_raster else ByPolygons(name, path, column))
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
