"""Spatial blocks, which the bootstrap resamples, and the ways of cutting a judgement into parts.

A part is a site, a height, a cover, a slope, a class of a raster, or a polygon. Each way gives a code per
pixel (-1: none) and the codes' names. Classes of rasters are found while reading; there may be up to 100.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import shapely
from odc.geo import CRS
from rasterio.features import rasterize
from rasterio.io import DatasetReader
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
from canopy.metrics import BLOCK_PX, HEIGHT_BINS_M, height_bin

# Heights of forests are alike over some hundred metres; larger blocks would leave too few in a small area.
WANTED_M = 250.0
LEAST_WANTED = 25
# Each block costs some kilobytes; more of them make intervals no truer.
MOST = 1600


@dataclass(frozen=True)
class BlockLayout:
    """Blocks of `side_px` x `side_px` pixels from the upper left of every grid, numbered through.

    Attributes:
        grids: one per raster; shapes: (rows, cols) of blocks of each; bases: number of the first block.
    """

    grids: tuple[Grid, ...]
    side_px: int
    shapes: tuple[tuple[int, int], ...]
    bases: tuple[int, ...]

    @classmethod
    def of(cls, grids: Sequence[Grid], side_m: float | None = None) -> BlockLayout:
        """The largest side up to 250 m (in steps of 50 px) that leaves 25 blocks; larger above 1,600 blocks.

        `side_m` asks for a side; it is rounded to whole cells of 50 px.
        """
        cell_m = BLOCK_PX * float(np.median([grid.gsd_m for grid in grids]))
        if side_m is not None:
            cells = max(1, round(side_m / cell_m))
        else:
            cells = max(1, math.floor(WANTED_M / cell_m * (1 + SCALE_SLACK)))
            while cells > 1 and _count(grids, cells * BLOCK_PX) < LEAST_WANTED:
                cells -= 1
        while _count(grids, cells * BLOCK_PX) > max(MOST, len(grids)):
            cells += 1
        side = cells * BLOCK_PX
        shapes = tuple((-(-g.height // side), -(-g.width // side)) for g in grids)
        sizes = [rows * cols for rows, cols in shapes]
        return cls(tuple(grids), side, shapes, tuple(int(x) for x in np.cumsum([0, *sizes[:-1]])))

    @property
    def count(self) -> int:
        """Blocks in all, also empty ones."""
        rows, cols = self.shapes[-1]
        return self.bases[-1] + rows * cols

    @property
    def side_m(self) -> float:
        """Side in ground metres (median over the rasters)."""
        return self.side_px * float(np.median([grid.gsd_m for grid in self.grids]))

    def local(self, raster: int, row: int, col: int, shape: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
        """Blocks of a window: local number of each pixel's block (h, w), and the blocks' numbers (local,)."""
        rows = (row + np.arange(shape[0])) // self.side_px
        cols = (col + np.arange(shape[1])) // self.side_px
        wide = int(cols[-1] - cols[0]) + 1
        inside = (rows - rows[0])[:, None] * wide + (cols - cols[0])
        r, c = np.arange(rows[0], rows[-1] + 1), np.arange(cols[0], cols[-1] + 1)
        numbers = self.bases[raster] + r[:, None] * self.shapes[raster][1] + c
        return inside, numbers.ravel()

    def outlines(self) -> Iterator[tuple[int, tuple[float, float, float, float]]]:
        """(raster, (west, south, east, north) in its CRS) of every block, by number."""
        for raster, (grid, (rows, cols)) in enumerate(zip(self.grids, self.shapes, strict=True)):
            for r in range(rows):
                for c in range(cols):
                    west, north = grid.xy(r * self.side_px, c * self.side_px)
                    bottom = min((r + 1) * self.side_px, grid.height)
                    east, south = grid.xy(bottom, min((c + 1) * self.side_px, grid.width))
                    yield raster, (west, south, east, north)


def _count(grids: Sequence[Grid], side: int) -> int:
    return sum(-(-g.height // side) * -(-g.width // side) for g in grids)


def cells_of(shape: tuple[int, int]) -> tuple[np.ndarray, int]:
    """50 px cells of a window that begins on a cell's corner: each pixel's cell (h, w), and how many."""
    rows, cols = (np.arange(n) // BLOCK_PX for n in shape)
    wide = int(cols[-1]) + 1
    return rows[:, None] * wide + cols, wide * (int(rows[-1]) + 1)


# ---- ways of cutting ------------------------------------------------------------------------------
COVER_SHARES = (0.1, 0.4, 0.7)
COVER_ABOVE_M = 2.0
SLOPE_DEG = (5, 10, 20, 30, 45)
# Slope is what the ground does over some twenty metres, not between two pixels of a 1 m model.
_SLOPE_REACH_M = 10.0
_RASTERS = (".tif", ".tiff", ".vrt", ".jp2")


class Stratifier:
    """One way of cutting. `by`: its name; `names`: of the codes so far."""

    by: str
    names: Sequence[str]
    _dataset: DatasetReader | None = None

    def window(self, grid: Grid, reference_m: np.ndarray, valid: np.ndarray, site: str) -> np.ndarray:
        """Codes (h, w), -1 for none, of a window whose corner is the corner of a 50 px cell."""
        raise NotImplementedError

    def at(self, lon: np.ndarray, lat: np.ndarray, reference_m: np.ndarray) -> np.ndarray:
        """Codes (n,) of places in degrees."""
        raise InputError(
            f"samples have no {self.by}", where=f"--by {self.by}", remedy="name a column or a raster"
        )

    def _open(self, path: str | Path) -> DatasetReader:
        self._dataset = open_raster(path)
        SourcePlace.of(self._dataset)
        return self._dataset

    def close(self) -> None:
        """Close its file."""
        if self._dataset is not None:
            self._dataset.close()


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
    names = (
        *(f"{low:g}-{high:g} m" for low, high in pairwise(HEIGHT_BINS_M)),
        f"{HEIGHT_BINS_M[-1]:g}+ m",
    )

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
        classes = np.searchsorted(COVER_SHARES, tall / np.maximum(known, 1), side="right")
        return classes[cell]


class BySlope(Stratifier):
    """By the slope of the ground, from an elevation model (over 20 m) or a raster of degrees."""

    by = "slope"
    names = ("0-5 deg", "5-10 deg", "10-20 deg", "20-30 deg", "30-45 deg", "45+ deg")

    def __init__(self, path: str | Path, *, elevation: bool) -> None:
        self.elevation, self._file = elevation, self._open(path)

    def window(self, grid: Grid, reference_m: np.ndarray, valid: np.ndarray, site: str) -> np.ndarray:
        slope, known = self.degrees(grid)
        return np.where(known, np.searchsorted(SLOPE_DEG, slope, side="right"), -1)

    def degrees(self, grid: Grid) -> tuple[np.ndarray, np.ndarray]:
        """Slope in degrees and where it is known, both (h, w): central differences over about 20 m."""
        k = max(1, round(_SLOPE_REACH_M / grid.gsd_m)) if self.elevation else 0
        values, known = read_window(self._file, grid.pad(k), [1])
        z = values[0].astype(np.float64) * self._file.scales[0] + self._file.offsets[0]
        if not self.elevation:
            return z, known
        mx, my = pixel_metres(grid)
        right = (z[k:-k, 2 * k :] - z[k:-k, : -2 * k]) / (2 * k * mx)
        down = (z[2 * k :, k:-k] - z[: -2 * k, k:-k]) / (2 * k * my)
        around = known[k:-k, 2 * k :] & known[k:-k, : -2 * k] & known[2 * k :, k:-k] & known[: -2 * k, k:-k]
        return np.degrees(np.arctan(np.hypot(right, down))), around

    def at(self, lon: np.ndarray, lat: np.ndarray, reference_m: np.ndarray) -> np.ndarray:
        north = _SLOPE_REACH_M / METRES_PER_DEGREE
        east = north / np.cos(np.radians(lat))
        if not self.elevation:
            slope = _sample(self._file, lon, lat)
        else:
            z = [_sample(self._file, lon + i * east, lat) for i in (-1, 1)]
            z += [_sample(self._file, lon, lat + i * north) for i in (-1, 1)]
            rise = np.hypot(z[1] - z[0], z[3] - z[2]) / (2 * _SLOPE_REACH_M)
            slope = np.degrees(np.arctan(rise))
        return np.where(np.isfinite(slope), np.searchsorted(SLOPE_DEG, slope, side="right"), -1)


class ByRaster(Stratifier):
    """By a raster of whole numbers; every pixel takes the class that its centre lies in."""

    def __init__(self, by: str, path: str | Path) -> None:
        self.by, self.names, self._file = by, (), self._open(path)
        if np.dtype(self._file.dtypes[0]).kind not in "iub":
            raise InputError(
                f"a raster of {self._file.dtypes[0]}", where=public_name(path),
                expected="classes as whole numbers",
            )  # fmt: skip
        self._codes: dict[int, int] = {}

    def window(self, grid: Grid, reference_m: np.ndarray, valid: np.ndarray, site: str) -> np.ndarray:
        values, known = read_window(self._file, grid, [1], resampling="nearest")
        return self._coded(np.where(known, values[0], np.nan))

    def at(self, lon: np.ndarray, lat: np.ndarray, reference_m: np.ndarray) -> np.ndarray:
        return self._coded(_sample(self._file, lon, lat))

    def _coded(self, values: np.ndarray) -> np.ndarray:
        found, inverse = np.unique(values, return_inverse=True)
        new = [int(v) for v in found if np.isfinite(v) and int(v) not in self._codes]
        self._codes |= {v: len(self._codes) + i for i, v in enumerate(new)}
        self.names = [str(value) for value in self._codes]
        codes = np.array([self._codes[int(v)] if np.isfinite(v) else -1 for v in found], np.int64)
        return codes[inverse].reshape(values.shape)


class ByPolygons(Stratifier):
    """By the polygon that a pixel's centre lies in: `FILE` (polygons 1, 2, ...) or `FILE:COLUMN`."""

    def __init__(self, by: str, path: str | Path, column: str | None) -> None:
        self.by = by
        frame, self._crs, shapes = read_zones(path)
        if column is not None and column not in frame:
            raise missing_column(column, frame.columns, path)
        values = list(frame[column]) if column else list(range(1, len(frame) + 1))
        labels = [str(value) for value in values]
        self.names = sorted(set(labels), key=natural)
        self._codes = np.array([self.names.index(label) for label in labels])
        self._shapes = np.array(shapes, object)
        # Reprojected once for each CRS that is asked for, and looked up by place.
        self._trees: dict[CRS, shapely.STRtree] = {}

    def _tree(self, crs: CRS) -> shapely.STRtree:
        if crs not in self._trees:
            self._trees[crs] = shapely.STRtree([self._moved(shape, crs) for shape in self._shapes])
        return self._trees[crs]

    def _moved(self, shape: BaseGeometry | None, crs: CRS) -> BaseGeometry | None:
        try:
            return None if shape is None else project(shape, self._crs, crs)
        except AreaError:  # on the other side of the Earth, where the CRS has no place for it
            return None

    def window(self, grid: Grid, reference_m: np.ndarray, valid: np.ndarray, site: str) -> np.ndarray:
        tree = self._tree(grid.crs)
        # In the file's order: where polygons overlap the last one counts.
        near = np.sort(tree.query(shapely.box(*grid.bounds)))
        if not len(near):
            return np.full(grid.shape, -1, np.int64)
        pairs = zip(tree.geometries[near], (self._codes[near] + 1).tolist(), strict=True)
        drawn = rasterize(pairs, grid.shape, fill=0, transform=grid.transform, dtype="int32")
        return drawn.astype(np.int64) - 1

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
    for word in by:
        name, equals, source = word.partition("=")
        if equals:
            made.append(_from_file(name, source))
        elif word == "slope":
            made.append(_slope(slope, dem))
        elif word in plain:
            made.append(plain[word]())
        else:
            raise InputError(
                f"unknown stratum {word!r}", where="--by",
                expected="site, height, cover, slope, NAME=raster.tif, NAME=polygons.gpkg:COLUMN or, for "
                "GEDI and plots, a column",
            )  # fmt: skip
    if (slope or dem) and not any(s.by == "slope" for s in made):
        made.append(_slope(slope, dem))
    return made


def _slope(slope: str | Path | None, dem: str | Path | None) -> BySlope:
    if dem is not None:
        return BySlope(dem, elevation=True)
    if slope is None:
        raise InputError(
            "nothing to tell the slope from", where="--by slope", remedy="add --dem or --slope FILE"
        )
    return BySlope(slope, elevation=False)


def _from_file(name: str, source: str) -> Stratifier:
    if not name or not source:
        raise InputError(f"{name}={source}", where="--by", expected="NAME=FILE")
    path, _, column = source.rpartition(":") if not Path(source).exists() else (source, "", "")
    path = path or source
    if Path(path).suffix.lower() in _RASTERS:
        return ByRaster(name, path)
    return ByPolygons(name, path, column or None)


def files_of(by: Sequence[str]) -> list[str]:
    """The files that words of --by name."""
    sources = [source for _, equals, source in (word.partition("=") for word in by) if equals]
    return [s if Path(s).exists() else s.rpartition(":")[0] or s for s in sources]


def missing_column(column: str, columns: Sequence[Any], path: object) -> InputError:
    """The error for a column that is not there; names those that are."""
    there = [str(c) for c in columns if str(c) != "geometry"]
    shown = ", ".join(there[:20]) + (", ..." if len(there) > 20 else "")
    return InputError(f"no column {column!r}", where=path, expected=f"one of {shown}")


def _sample(dataset: DatasetReader, lon: np.ndarray, lat: np.ndarray) -> np.ndarray:
    """First band of an open dataset at places in degrees, float64 (n,), NaN where there is nothing."""
    x, y = transformer("EPSG:4326", SourcePlace.of(dataset).crs).transform(lon, lat)
    order = np.lexsort((x, -np.asarray(y) // 1e3))  # near ones together: they share blocks of the file
    out = np.full(len(x), np.nan)
    picked = dataset.sample(zip(np.asarray(x)[order], np.asarray(y)[order], strict=True), 1, masked=True)
    for i, value in zip(order, picked, strict=True):
        out[i] = np.nan if np.ma.getmaskarray(value)[0] else float(value[0])
    return out * dataset.scales[0] + dataset.offsets[0]
