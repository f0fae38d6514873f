"""Sums over squares of a grid, filled window by window: blocks for tables, and small pictures of large
maps.

When a height map's imagery was taken: from canopy's tags, or from the files beside the published tiles.

Opening anybody's canopy height map: one GeoTIFF, a folder or list of tiles, or the published v1 and v2
maps.

Every product reads as metres on any grid. The published maps (EPSG:3857 quadkey tiles of whole metres) need
rules of their own, because "0 m" and "not mapped" look alike in them:

* 255 is never a height, whether or not the tile says so;
* v1 (zoom 9): `NAME.tif.msk`, beside the tile or in `../msk/`, is 255 where the map is NOT valid, the
opposite of GDAL's masks. Without that file the product cannot tell 0 m from unmapped, and a note says so;
* v2 (zoom 10): whatever the file itself declares (mask band, nodata value); where it declares nothing, the
same note.

One statistic of a raster over every pixel of another grid: area-weighted mean, highest, or a percentile.

The reader of `canopy.geo` is made for images; a judge needs rules that can be stated in one sentence:

* same lattice: pixels as they are;
* "mean", same CRS: exactly area-weighted, over the valid area, where at least half of the pixel is valid;
* "mean", another CRS: the window-independent average of `canopy.geo.warp` (bilinear where both pixels are of
  about the same size), where every source pixel touched is valid;
* "max" and "pNN": over points on a regular lattice in the pixel (exactly the source's pixels where they
  divide it, else at least two points per source pixel), where at least half of the points are valid.

One side of a judgement: a height map, or the height model that it is judged by.

Two maps, whatever their grids: the one grid they are compared on, and its windows.
"""

from __future__ import annotations

import json
import math
import re
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import shapely
from affine import Affine
from odc.geo import CRS
from rasterio.enums import ColorInterp, MaskFlags
from rasterio.io import DatasetReader
from scipy import sparse
from shapely.geometry import Polygon
from shapely.geometry.base import BaseGeometry

from canopy.chips.targets import sensor_floor
from canopy.errors import CanopyError, ConfigError, ImageryError, InputError
from canopy.files import file_sha256, is_url, public_name
from canopy.geo.area import AOI
from canopy.geo.crs import geod_of, to_crs, to_lonlat, transformer
from canopy.geo.grid import Grid
from canopy.geo.reading import open_raster, read_window
from canopy.geo.place import SourcePlace, lattice_ratio
from canopy.geo.tiles import quadkey_bounds, tiles_over
from canopy.imagery.names import acquisition_date
from canopy.metrics import percent_of, statistic_of
from canopy.runtime import NoProgress, Progress


class BlockSums:
    """Sums of named quantities over squares of `side_px`, cut on the grid's global lattice.

    Attributes:
        shape: (rows, cols) of squares. count: valid pixels; sums[name]: float64, both of that shape.
    """

    def __init__(self, grid: Grid, side_px: int, names: Sequence[str]) -> None:
        self.grid, self.side_px = grid, side_px
        self._row0, self._col0 = grid.origin_rc
        self._first = self._row0 // side_px, self._col0 // side_px
        self.shape = (
            (self._row0 + grid.height - 1) // side_px - self._first[0] + 1,
            (self._col0 + grid.width - 1) // side_px - self._first[1] + 1,
        )
        self.count = np.zeros(self.shape)
        self.sums = {name: np.zeros(self.shape) for name in names}

    def add(self, row_off: int, col_off: int, valid: np.ndarray, values: Mapping[str, np.ndarray]) -> None:
        """Add a window (h, w) at (row_off, col_off) of the grid; pixels that are not valid do not count."""
        rows, row_cuts = self._cuts(self._row0 + row_off, valid.shape[0], self._first[0])
        cols, col_cuts = self._cuts(self._col0 + col_off, valid.shape[1], self._first[1])
        here = np.s_[rows[0] : rows[1], cols[0] : cols[1]]

        def total(array: np.ndarray) -> np.ndarray:
            # float64 before summing: float32 loses centimetres over a million pixels
            by_row = np.add.reduceat(array, row_cuts, axis=0, dtype=np.float64)
            return np.add.reduceat(by_row, col_cuts, axis=1)

        self.count[here] += total(valid)
        for name, value in values.items():
            self.sums[name][here] += total(np.where(valid, value, 0))

    def _cuts(self, start: int, length: int, first: int) -> tuple[tuple[int, int], np.ndarray]:
        """Range of squares that a span touches, and where in the span each begins."""
        index = (start + np.arange(length)) // self.side_px - first
        cuts = np.flatnonzero(np.diff(index, prepend=index[0] - 1))
        return (int(index[0]), int(index[-1]) + 1), cuts

    def mean(self, name: str) -> np.ndarray:
        """Mean over the valid pixels of each square, NaN where there is none."""
        with np.errstate(invalid="ignore", divide="ignore"):
            return self.sums[name] / np.where(self.count > 0, self.count, np.nan)

    def block_grid(self) -> Grid:
        """The grid of the squares (whole ones, so it may reach beyond the map)."""
        side = self.side_px
        window = self.grid.window(
            self._first[0] * side - self._row0, self._first[1] * side - self._col0, 1, 1
        )
        px, py = self.grid.pixel
        t = window.transform
        return Grid.of(self.grid.crs, (px * side, 0.0, t.c, 0.0, -py * side, t.f), self.shape)

    def centres_lonlat(self) -> tuple[np.ndarray, np.ndarray]:
        """Longitude and latitude of each square's centre, (rows, cols)."""
        grid = self.block_grid()
        cols, rows = np.meshgrid(np.arange(grid.width) + 0.5, np.arange(grid.height) + 0.5)
        t = grid.transform
        lon, lat = transformer(grid.crs, "EPSG:4326").transform(t.c + t.a * cols, t.f + t.e * rows)
        return np.asarray(lon), np.asarray(lat)


def preview_side(grid: Grid, longest_px: int = 900) -> int:
    """Side of the squares that make a picture of at most `longest_px`."""
    return max(1, -(-max(grid.shape) // longest_px))


def pixel_areas_m2(grid: Grid) -> np.ndarray:
    """Ground area of a pixel in each row (height,), square metres, at the grid's middle column.

    Measured on the ellipsoid, so that Web-Mercator and degree grids count what is there: the parallelogram
    of a pixel's two mid-lines.
    """
    rows, col = np.arange(grid.height) + 0.5, grid.width / 2
    t = grid.transform
    x, y = t.c + t.a * col, t.f + t.e * rows
    to_degrees = transformer(grid.crs, "EPSG:4326").transform
    west = to_degrees(np.full_like(y, x - t.a / 2), y)
    east = to_degrees(np.full_like(y, x + t.a / 2), y)
    north = to_degrees(np.full_like(y, x), y - t.e / 2)
    south = to_degrees(np.full_like(y, x), y + t.e / 2)
    geod = geod_of(grid.crs)
    azimuth_x, _, side_x = geod.inv(*west, *east)
    azimuth_y, _, side_y = geod.inv(*south, *north)
    return np.asarray(side_x * side_y * np.abs(np.sin(np.radians(np.asarray(azimuth_x) - azimuth_y))))


_DAY = re.compile(r"(\d{4})-?(\d\d)?-?(\d\d)?")
# v2's date rasters hold years since 2000; a sample of them tells the span.
_SAMPLE_PX = 512


def map_dates(files: Sequence[tuple[str, str | None, Mapping[str, str]]]) -> tuple[str, ...]:
    """Distinct first and last dates of (path, published version, tags) of a map's files, sorted; ()
    unknown.
    """
    found: set[str] = set()
    for path, published, tags in files:
        found.update(_from_tags(tags))
        if published and not is_url(path):
            found.update(_beside(Path(path), published))
    days = sorted(found)
    return tuple(days if len(days) < 3 else (days[0], days[-1]))


def dates_text(dates: Sequence[str]) -> str:
    """ "2019-06-01", "2018/2020" or "unknown"."""
    return "/".join(dict.fromkeys((dates[0], dates[-1]))) if dates else "unknown"


def years_apart(a: Sequence[str], b: Sequence[str]) -> float | None:
    """Years between the middles of two date ranges (b minus a), None where one is unknown."""
    if not a or not b:
        return None
    return (_decimal(b[0]) + _decimal(b[-1])) / 2 - (_decimal(a[0]) + _decimal(a[-1])) / 2


def _decimal(text: str) -> float:
    match = _DAY.match(text)
    if match is None:
        return float("nan")
    year, month, day = (int(part) if part else None for part in match.groups())
    return float(year or 0) + (0.5 if month is None else (month - 1 + ((day or 15) - 1) / 31) / 12)


def _from_tags(tags: Mapping[str, str]) -> Iterator[str]:
    for part in tags.get("CANOPY_DATES", tags.get("TIFFTAG_DATETIME", "")).split("/"):
        match = _DAY.match(part.strip().replace(":", "-", 2))
        if match:
            yield "-".join(piece for piece in match.groups() if piece)


def _beside(tile: Path, published: str) -> Iterator[str]:
    """Dates in `../metadata/NAME.geojson` (v1: acq_date) or `../metadata/NAME.tif` (v2: year - 2000)."""
    stem = tile.name.split(".", 1)[0]
    for folder in (tile.parent.parent / "metadata", tile.parent):
        if published == "v1" and (folder / f"{stem}.geojson").is_file():
            yield from _from_geojson(folder / f"{stem}.geojson")
            return
        if published == "v2" and folder != tile.parent and (folder / tile.name).is_file():
            yield from _from_years(folder / tile.name)
            return


def _from_geojson(path: Path) -> Iterator[str]:
    try:
        features = json.loads(path.read_text()).get("features", [])
    except (OSError, ValueError, AttributeError):
        return  # a date that cannot be read is an unknown date, not a reason to refuse the heights
    for feature in features:
        match = _DAY.match(str((feature.get("properties") or {}).get("acq_date", "")))
        if match:
            yield "-".join(piece for piece in match.groups() if piece)


def _from_years(path: Path) -> Iterator[str]:
    try:
        with open_raster(path, georeferenced=False) as dataset:
            shape = (min(_SAMPLE_PX, dataset.height), min(_SAMPLE_PX, dataset.width))
            years = np.unique(dataset.read(1, out_shape=shape))
    except CanopyError:
        return
    for year in years:
        if 0 < year < 100:
            yield str(2000 + int(year))


SUFFIXES = {".tif", ".tiff", ".vrt"}
PUBLISHED_ZOOM = {9: "v1", 10: "v2"}
NOT_A_HEIGHT = 255
# Handles kept open while windows walk over a mosaic.
OPEN_TILES = 8
# A resampled pixel with more than this share of a masked one is masked (the reader's own tolerance).
MASK_TOL = 1e-3
DEFAULT_LEVEL = 0.9


@dataclass(frozen=True)
class HeightWindow:
    """Metres of one product on one grid; arrays (h, w). `lower`, `upper`: its interval, None without one."""

    height_m: np.ndarray
    valid: np.ndarray
    lower_m: np.ndarray | None = None
    upper_m: np.ndarray | None = None


@dataclass(frozen=True)
class Tile:
    """One file of a product and what its header says. `mask`: the v1 map's `.tif.msk`."""

    path: str
    place: SourcePlace
    bands: tuple[int, ...]  # height, and lower and upper where there are
    scale: tuple[float, ...]
    offset: tuple[float, ...]
    step_m: float
    published: str | None = None
    mask: str | None = None
    says_missing: bool = True
    zero_is_missing: bool = False
    tags: dict[str, str] = field(default_factory=dict, hash=False, compare=False)

    @cached_property
    def outline(self) -> BaseGeometry:
        """Its frame in EPSG:4326."""
        h, w = self.place.height, self.place.width
        rows, cols = np.array([0, 0, h, h]), np.array([0, w, w, 0])
        x, y = self.place.xy(rows.astype(float), cols.astype(float))
        return to_lonlat(Polygon(zip(x, y, strict=True)), self.place.crs)


class HeightProduct:
    """A map to be compared: `read` gives metres on any grid. Use from one thread; close when done.

    Attributes:
        name: what the user called it, without folders; kind: "map", "tiles", "published v1", "published v2".
        tiles: its files. step_m: what heights are rounded to (0: nothing).
        level: nominal coverage of its interval bands; None without them.
        dates: acquisition dates or years, ISO, sorted; empty where unknown.
        notes: what the user must know.
    """

    def __init__(self, name: str, tiles: Sequence[Tile], *, nodata: float | None = None) -> None:
        self.name, self.tiles, self.nodata = name, tuple(tiles), nodata
        first = tiles[0]
        self.kind = (
            f"published {first.published}" if first.published else "map" if len(tiles) == 1 else "tiles"
        )
        self.step_m = max(tile.step_m for tile in tiles)
        self.tags = first.tags
        self.has_interval = all(len(tile.bands) == 3 for tile in tiles)
        self.dates = map_dates([(tile.path, tile.published, tile.tags) for tile in tiles])
        self._tree = shapely.STRtree([tile.outline for tile in tiles])
        self._open: OrderedDict[str, DatasetReader] = OrderedDict()

    @property
    def crs(self) -> CRS:
        """CRS of its first file."""
        return self.tiles[0].place.crs

    @cached_property
    def outline(self) -> BaseGeometry:
        """Union of the frames of its files, EPSG:4326."""
        return shapely.union_all([tile.outline for tile in self.tiles])

    @cached_property
    def level(self) -> float | None:
        """Nominal coverage of the interval bands, from the tag CANOPY_INTERVAL; 0.9 where it is not said."""
        if not self.has_interval:
            return None
        try:
            level = float(self.tags.get("CANOPY_INTERVAL", DEFAULT_LEVEL))
        except ValueError:
            return DEFAULT_LEVEL
        return level if 0 < level < 1 else DEFAULT_LEVEL

    @cached_property
    def lattice(self) -> Grid | None:
        """Grid of its first file, if north-up; every file of a published map lies on its lattice."""
        place = self.tiles[0].place
        return place.grid() if place.is_north_up else None

    @cached_property
    def gsd_m(self) -> float:
        """Ground sample distance in metres at the centre of its first file."""
        place = self.tiles[0].place
        if place.is_north_up:
            return place.grid().gsd_m
        return Tilted(place).gsd_m

    @cached_property
    def notes(self) -> tuple[str, ...]:
        """One sentence each."""
        found = []
        if any(tile.published and not tile.says_missing for tile in self.tiles):
            found.append(
                f"{self.name}: tiles without a mask or nodata value: 0 m and 'not mapped' cannot be told "
                "apart in them, and unmapped ground counts as open"
            )
        if any(tile.published and tile.zero_is_missing for tile in self.tiles) and self.nodata is None:
            found.append(
                f"{self.name}: tiles declare 0 as missing, so open ground is left out of every number"
            )
        if self.step_m >= 0.5:
            found.append(
                f"{self.name}: heights are whole multiples of {self.step_m:g} m; "
                "whether rounded or cut is not known"
            )
        if self.has_interval and "CANOPY_INTERVAL" not in self.tags:
            found.append(f"{self.name}: its interval bands are taken for a {DEFAULT_LEVEL:.0%} interval")
        return tuple(found)

    def read(self, grid: Grid, *, interval: bool = False, resampling: str | None = None) -> HeightWindow:
        """Heights in metres on `grid` (see `canopy.geo.reading.read_window`); invalid pixels are 0.

        Where files overlap the earlier one counts. `interval` reads the bounds too. Raises ImageryError.
        """
        bands = 3 if interval and self.has_interval else 1
        values = np.zeros((bands, *grid.shape), np.float32)
        valid = np.zeros(grid.shape, bool)
        for index in sorted(self._tree.query(grid.outline(), predicate="intersects")):
            got, good = self._read_tile(self.tiles[index], grid, bands, resampling)
            new = good & ~valid
            values[:, new] = got[:, new]
            valid |= new
            if valid.all():
                break
        bounds = (values[1], values[2]) if bands == 3 else (None, None)
        return HeightWindow(values[0], valid, *bounds)

    def _read_tile(
        self, tile: Tile, grid: Grid, bands: int, resampling: str | None
    ) -> tuple[np.ndarray, np.ndarray]:
        nodata = NOT_A_HEIGHT if tile.published and self.nodata is None else self.nodata
        dataset = self._dataset(tile.path)
        values, valid = read_window(dataset, grid, tile.bands[:bands], resampling=resampling, nodata=nodata)
        for band in range(bands):
            if tile.scale[band] != 1 or tile.offset[band] != 0:
                values[band] = np.where(valid, values[band] * tile.scale[band] + tile.offset[band], 0)
        if tile.published and self.nodata is None:
            own = dataset.nodatavals[tile.bands[0] - 1]
            if own is not None and own != NOT_A_HEIGHT:
                valid &= read_window(dataset, grid, tile.bands[:1], resampling=resampling)[1]
        if tile.mask is not None:
            valid &= self._not_masked(tile, grid)
        return values, valid

    def _not_masked(self, tile: Tile, grid: Grid) -> np.ndarray:
        """Where the v1 mask says valid; it lies on its tile's own pixels, georeferenced or not."""
        mask: Any = _Placed(self._dataset(str(tile.mask), georeferenced=False), tile.place)
        masked, known = read_window(mask, grid, [1], nodata=NOT_A_HEIGHT)
        return known & (masked[0] <= MASK_TOL * NOT_A_HEIGHT)

    def _dataset(self, path: str, georeferenced: bool = True) -> DatasetReader:
        dataset = self._open.pop(path, None)
        if dataset is None or dataset.closed:
            dataset = open_raster(path, georeferenced=georeferenced)
        self._open[path] = dataset
        while len(self._open) > OPEN_TILES:
            self._open.popitem(last=False)[1].close()
        return dataset

    def close(self) -> None:
        """Close its files; a later `read` opens them anew."""
        while self._open:
            self._open.popitem()[1].close()

    def __enter__(self) -> HeightProduct:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class _Placed:
    """A dataset seen at another one's place: the v1 masks carry no georeferencing of their own."""

    def __init__(self, dataset: DatasetReader, place: SourcePlace) -> None:
        if dataset.shape != (place.height, place.width):
            raise ImageryError(
                f"a mask of {dataset.width} x {dataset.height} px", where=public_name(dataset.name),
                expected=f"{place.width} x {place.height} px, as its tile has",
            )  # fmt: skip
        self._dataset = dataset
        self.transform, self.crs = place.transform, place.crs

    def __getattr__(self, name: str) -> Any:
        return getattr(self._dataset, name)


@dataclass(frozen=True)
class Tilted:
    """Ground metres per pixel of a rotated or south-up file."""

    place: SourcePlace

    @property
    def gsd_m(self) -> float:
        """From a north-up grid of the same pixel area at the same centre."""
        side = abs(self.place.transform.determinant) ** 0.5
        x, y = self.place.xy(self.place.height / 2, self.place.width / 2)
        return Grid.from_bounds((x, y, x + side, y + side), self.place.crs, side).gsd_m


def open_product(name: str | Path | Sequence[str | Path], *, nodata: float | None = None) -> HeightProduct:
    """Open a height map.

    Args:
        name: a GeoTIFF, COG or VRT (path or http URL); a folder of tiles (`DIR/chm`, `DIR/tiles` or DIR
            itself); a text file with one path per line; or a sequence of files.
        nodata: value that means missing, in place of what the files and the rules above say.

    Raises ImageryError for what cannot be read as a height map, naming the file.
    """
    paths = _paths_of(name)
    tiles = [_open_tile(path) for path in paths]
    published = {tile.published for tile in tiles}
    if len(published) > 1:
        odd = next(t for t in tiles if t.published != tiles[0].published)
        raise ImageryError("tiles of different products in one folder", where=public_name(odd.path))
    return HeightProduct(_label(name), tiles, nodata=nodata)


def _label(name: str | Path | Sequence[str | Path]) -> str:
    """The last part of a path: reports leave the machine, folders do not."""
    if not isinstance(name, str | Path):
        return (
            f"{Path(str(name[0])).name} and {len(name) - 1} more"
            if len(name) > 1
            else Path(str(name[0])).name
        )
    return Path(public_name(name).rstrip("/")).name


def _paths_of(name: str | Path | Sequence[str | Path]) -> list[str]:
    if not isinstance(name, str | Path):
        return [str(one) for one in name]
    path = Path(name)
    if path.name == "mosaic" and (path.parent / "tiles").is_dir():
        path = path.parent  # of `canopy map`: an index that GDAL reads, of tiles that are read here
    if is_url(str(name)) or not (path.is_dir() or path.suffix.lower() == ".txt"):
        return [str(name)]
    if path.is_dir():
        for folder in (path / "chm", path / "tiles", path):
            found = sorted(
                p for p in folder.glob("*") if p.suffix.lower() in SUFFIXES and not p.name.startswith(".")
            )
            if found:
                return [str(p) for p in found]
        raise ImageryError(
            "no height tiles in the folder", where=name, expected="*.tif, or chm/*.tif, or tiles/*.tif"
        )
    try:
        lines = [line.strip() for line in path.read_text().splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise ImageryError(
            "not a readable list of tiles", where=name, expected="one path per line"
        ) from error
    listed = [line for line in lines if line and not line.startswith("#")]
    if not listed:
        raise ImageryError("an empty list of tiles", where=name, expected="one path per line")
    return [line if is_url(line) or Path(line).is_absolute() else str(path.parent / line) for line in listed]


def _open_tile(path: str) -> Tile:
    with open_raster(path) as dataset:
        place = SourcePlace.of(dataset)
        bands = _height_bands(dataset, path)
        published = _published_as(dataset, path, place)
        integer = np.dtype(dataset.dtypes[bands[0] - 1]).kind in "iu"
        scale = tuple(float(dataset.scales[b - 1]) for b in bands)
        mask = _mask_file(path) if published == "v1" else None
        flags = dataset.mask_flag_enums[bands[0] - 1]
        return Tile(
            path, place, bands, scale, tuple(float(dataset.offsets[b - 1]) for b in bands),
            step_m=abs(scale[0]) if integer else 0.0, published=published, mask=mask,
            says_missing=mask is not None or MaskFlags.all_valid not in flags,
            zero_is_missing=dataset.nodatavals[bands[0] - 1] == 0, tags=dict(dataset.tags()),
        )  # fmt: skip


def _height_bands(dataset: DatasetReader, path: str) -> tuple[int, ...]:
    """The height's band, and those of its interval: by description, else the only band there is."""
    names = {name: index for index, name in enumerate(dataset.descriptions, 1) if name}
    colours = set(dataset.colorinterp)
    if "canopy_height" not in names and {ColorInterp.red, ColorInterp.green, ColorInterp.blue} <= colours:
        raise ImageryError(
            "a colour image", where=public_name(path), expected="a canopy height map in metres"
        )
    height = names.get("canopy_height", 1)
    if "height_lower" in names and "height_upper" in names:
        return height, names["height_lower"], names["height_upper"]
    return (height,)


def _published_as(dataset: DatasetReader, path: str, place: SourcePlace) -> str | None:
    """v1 or v2 when name, place and pixels are those of a published tile, else None."""
    stem = Path(public_name(path)).name.split(".", 1)[0]
    if not re.fullmatch(r"[0-3]{9,10}", stem) or dataset.dtypes[0] != "uint8" or place.crs.epsg != 3857:
        return None
    if not place.is_north_up:
        return None
    bounds, there = quadkey_bounds(stem), place.grid().bounds
    pixel = place.transform.a
    near = all(abs(a - b) <= 2 * pixel for a, b in zip(bounds, there, strict=True))
    return PUBLISHED_ZOOM[len(stem)] if near else None


def _mask_file(path: str) -> str | None:
    """`NAME.tif.msk` beside a tile or in the folder `msk` beside its folder."""
    if is_url(path):
        return None
    tile = Path(path)
    for folder in (tile.parent, tile.parent.parent / "msk"):
        if (folder / f"{tile.name}.msk").is_file():
            return str(folder / f"{tile.name}.msk")
    return None


def check_overlap(a: HeightProduct, b: HeightProduct) -> BaseGeometry:
    """The ground both maps frame, EPSG:4326. Raises InputError when there is none."""
    shared = a.outline.intersection(b.outline)
    if shared.area == 0:
        raise InputError(
            "the two maps do not overlap", where=f"{a.name}, {b.name}", expected="maps of one place"
        )
    return shared


MIN_VALID_SHARE = 0.5
# Source pixels held at once, per side: memory does not grow with the ratio of the two grids.
_SOURCE_PX = 3072


class Read(Protocol):
    """Layers (bands, h, w) and valid (h, w) of a source on a grid."""

    def __call__(self, window: Grid, resampling: str | None = None) -> tuple[np.ndarray, np.ndarray]: ...


def read_stat(product: HeightProduct, grid: Grid, stat: str) -> tuple[np.ndarray, np.ndarray]:
    """A product's heights on `grid` by the rules above.

    Returns:
        metres float64 (h, w), 0 where not valid; valid bool (h, w).
    """
    return _read(product, grid, stat, lambda window: (window.height_m[None], window.valid))


def read_mean_bounds(product: HeightProduct, grid: Grid) -> tuple[np.ndarray, np.ndarray] | None:
    """Means of the ends of a map's interval, float64 (h, w), NaN where unknown; None for a map without."""
    if not product.has_interval:
        return None

    def ends(window: HeightWindow) -> tuple[np.ndarray, np.ndarray]:
        assert window.lower_m is not None and window.upper_m is not None  # it was asked for
        return np.stack([window.lower_m, window.upper_m]), window.valid

    values, valid = _layers(product, grid, "mean", ends, interval=True)
    low, high = np.where(valid, values, np.nan)
    return low, high


Layers = Callable[[HeightWindow], tuple[np.ndarray, np.ndarray]]


def _read(product: HeightProduct, grid: Grid, stat: str, layers: Layers) -> tuple[np.ndarray, np.ndarray]:
    values, valid = _layers(product, grid, stat, layers, interval=False)
    return values[0], valid


def _layers(
    product: HeightProduct, grid: Grid, stat: str, layers: Layers, interval: bool
) -> tuple[np.ndarray, np.ndarray]:
    """Values float64 (bands, h, w) and valid (h, w)."""

    def read(window: Grid, resampling: str | None = None) -> tuple[np.ndarray, np.ndarray]:
        return layers(product.read(window, interval=interval, resampling=resampling))

    ratio = lattice_ratio(product.tiles[0].place, grid) if _on_one_lattice(product) else None
    if ratio == 1:
        values, valid = read(grid)
    elif stat != "mean":
        n = ratio or max(2, math.ceil(2 * grid.gsd_m / product.gsd_m - 1e-3))
        return _in_parts(grid, n, lambda part: _of_points(read, part, stat, n))
    elif product.lattice is not None and product.lattice.crs == grid.crs and _on_one_lattice(product):
        lattice = product.lattice
        shrink = max(a / b for a, b in zip(grid.pixel, lattice.pixel, strict=True))
        return _in_parts(grid, shrink, lambda part: _area_mean(read, lattice, part))
    else:
        values, valid = read(grid)
    return values.astype(np.float64), valid


def _on_one_lattice(product: HeightProduct) -> bool:
    lattice = product.lattice
    places = [tile.place for tile in product.tiles]
    return lattice is not None and all(p.is_north_up and p.grid().is_aligned(lattice) for p in places)


def _in_parts(
    grid: Grid, shrink: float, read: Callable[[Grid], tuple[np.ndarray, np.ndarray]]
) -> tuple[np.ndarray, np.ndarray]:
    """Read a grid in parts whose source stays small."""
    step = max(8, int(_SOURCE_PX / max(shrink, 1)))
    rows = []
    for top in range(0, grid.height, step):
        line = [
            read(grid.window(top, left, min(step, grid.height - top), min(step, grid.width - left)))
            for left in range(0, grid.width, step)
        ]
        rows.append([np.concatenate(parts, axis=-1) for parts in zip(*line, strict=True)])
    values, valid = (np.concatenate(parts, axis=-2) for parts in zip(*rows, strict=True))
    return values, valid


# ---- the mean over an area ------------------------------------------------------------------------
def _area_mean(read: Read, own: Grid, grid: Grid) -> tuple[np.ndarray, np.ndarray]:
    """Exactly area-weighted mean; both grids are north-up in one CRS, so the weights are separable."""
    (top, left), (bottom, right) = own.rowcol(*grid.xy(0, 0)), own.rowcol(*grid.xy(*grid.shape))
    r0, c0, r1, c1 = math.floor(top), math.floor(left), math.ceil(bottom), math.ceil(right)
    values, valid = read(own.window(r0, c0, r1 - r0, c1 - c0))
    down = _weights(top - r0, (bottom - top) / grid.height, grid.height, r1 - r0)
    across = _weights(left - c0, (right - left) / grid.width, grid.width, c1 - c0)

    def pool(layer: np.ndarray) -> np.ndarray:
        return np.asarray((across @ (down @ layer).T).T)

    share = pool(valid.astype(np.float64))
    good = share >= MIN_VALID_SHARE - 1e-9
    known = np.where(valid, values, 0).astype(np.float64)
    means = [np.where(good, pool(band) / np.maximum(share, 1e-12), 0) for band in known]
    return np.stack(means), good


def _weights(start: float, step: float, cells: int, pixels: int) -> sparse.csr_array:
    """Share (cells, pixels) of cell i, start + i step to start + (i + 1) step, that pixel j covers."""
    low = start + step * np.arange(cells)
    reach = math.ceil(step) + 1
    j = np.floor(low).astype(np.int64)[:, None] + np.arange(reach + 1)
    length = np.minimum(low[:, None] + step, j + 1) - np.maximum(low[:, None], j)
    i = np.broadcast_to(np.arange(cells)[:, None], j.shape)
    keep = (length > 1e-12) & (j >= 0) & (j < pixels)
    return sparse.csr_array((length[keep] / step, (i[keep], j[keep])), shape=(cells, pixels))


# ---- highest and percentiles ----------------------------------------------------------------------
def _of_points(read: Read, grid: Grid, stat: str, n: int) -> tuple[np.ndarray, np.ndarray]:
    """Statistic of n x n points per pixel, each the source pixel it lies in."""
    px, py = (side / n for side in grid.pixel)
    x, y = grid.xy(0, 0)
    h, w = grid.shape
    fine = Grid.of(grid.crs, Affine(px, 0, x, 0, -py, y), (h * n, w * n))
    values, valid = read(fine, "nearest")

    def cells(layer: np.ndarray) -> np.ndarray:
        return layer.reshape(h, n, w, n).swapaxes(1, 2).reshape(h, w, n * n)

    known = cells(valid)
    count = known.sum(axis=-1)
    good = count >= max(1, MIN_VALID_SHARE * n * n)
    layers = [statistic_of(cells(band), known, percent_of(stat)) for band in values]
    return np.where(good, np.stack(layers), 0).astype(np.float64), good


# Heights beyond these are no trees: an undeclared nodata value, a bird, a pylon.
LOWEST_M, HIGHEST_M = -50.0, 150.0
REFERENCE_LOWEST_M, REFERENCE_HIGHEST_M = -3.0, 120.0
FLOOR_TAGS = ("CANOPY_SENSOR", "LIDAR_SENSOR", "SENSOR")
# Hashing a file must not take longer than scoring it.
_HASH_BYTES = 2**30


class HeightSide:
    """An open product, read as the judge reads it.

    A reference's heights are clamped at 0 and must lie in -3..120 m; a map's are taken as they are, within
    -50..150 m. What lies beyond is left out and counted in `strange`.
    """

    def __init__(self, product: HeightProduct, *, reference: bool) -> None:
        self.product, self.reference, self.strange = product, reference, 0

    @classmethod
    def open(cls, path: Any, *, reference: bool = False, nodata: float | None = None) -> HeightSide:
        """Open a file, a folder or list of tiles, or a published map; see `open_product` for the errors."""
        return cls(open_product(path, nodata=nodata), reference=reference)

    def read(self, grid: Grid, stat: str) -> tuple[np.ndarray, np.ndarray]:
        """Heights on a grid: float64 (h, w) metres, 0 where not valid; valid (h, w). See `read_stat`."""
        heights, valid = read_stat(self.product, grid, stat)
        low, high = (REFERENCE_LOWEST_M, REFERENCE_HIGHEST_M) if self.reference else (LOWEST_M, HIGHEST_M)
        sane = (heights >= low) & (heights <= high)
        self.strange += int(np.count_nonzero(valid & ~sane))
        valid = valid & sane
        return np.where(valid, np.maximum(heights, 0) if self.reference else heights, 0), valid

    def read_bounds(self, grid: Grid) -> tuple[np.ndarray, np.ndarray] | None:
        """Lower and upper end of the map's interval (h, w), NaN where unknown; None without such bands."""
        return read_mean_bounds(self.product, grid)

    @property
    def dates(self) -> tuple[str, ...]:
        """First and last date it shows, ISO (years where only these are known); empty where unknown."""
        if self.product.dates:
            return self.product.dates
        days = {acquisition_date(tile.tags, tile.path) for tile in self.product.tiles[:1000]}
        known = sorted(day.isoformat() for day in days if day)
        return tuple(dict.fromkeys((known[0], known[-1]))) if known else ()

    @property
    def floor_m(self) -> float:
        """Height below which this reference knows nothing, from its tags; 0 where nothing is said."""
        for name in FLOOR_TAGS:
            if self.product.tags.get(name):
                try:
                    return sensor_floor(self.product.tags[name])
                except InputError:
                    continue  # some other sensor: only NEON's height models have floors
        return 0.0

    def facts(self) -> dict[str, Any]:
        """Plain data for the provenance; no folders."""
        product = self.product
        return {
            "name": product.name,
            "kind": product.kind,
            "files": len(product.tiles),
            "sha256": known_sha256(product.tiles[0].path) if len(product.tiles) == 1 else None,
            "crs": str(product.crs),
            "gsd_m": round(product.gsd_m, 4),
            "dates": list(self.dates),
            "tags": {k: v for k, v in sorted(product.tags.items()) if k.startswith("CANOPY_")},
        }

    def close(self) -> None:
        """Close its files."""
        self.product.close()

    def __enter__(self) -> HeightSide:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def known_sha256(path: str | Path) -> str | None:
    """Of a local file up to 1 GiB; None for others."""
    if is_url(path) or not Path(path).is_file() or Path(path).stat().st_size > _HASH_BYTES:
        return None
    return file_sha256(path)


TILE_PX = 1024
# Pixel sizes that differ by less than this share count as one.
SAME_GSD = 0.01


@dataclass(frozen=True)
class PairWindow:
    """A window of the common grid: both maps, where both are valid (h, w), and ground area per pixel (h, w)
    in m2.
    """

    row: int
    col: int
    grid: Grid
    a: HeightWindow
    b: HeightWindow
    valid: np.ndarray
    area_m2: np.ndarray


def common_grid(
    a: HeightProduct, b: HeightProduct, area: AOI | None = None, gsd: float | None = None
) -> Grid:
    """The coarser map's own pixels over the ground both frame (A's where they are equally fine).

    A finer map is averaged onto them (`read_window`: area-weighted mean, a pixel is valid where all that
    enters it
    is). `gsd`: pixels of that many metres in the area's UTM zone instead; also used, with the coarser side's
    gsd, where that map is rotated or south-up.

    Raises InputError when the maps, or they and `area`, do not overlap.
    """
    shared = check_overlap(a, b)
    if area is not None:
        shared = shared.intersection(area.lonlat)
        if shared.area == 0:
            raise InputError("the area is outside the maps", where=area.describe())
    aoi = AOI(shared, to_crs("EPSG:4326"), False)
    coarse, fine = (b, a) if b.gsd_m > a.gsd_m * (1 + SAME_GSD) else (a, b)
    if gsd is not None:
        if not (math.isfinite(gsd) and 0 < gsd <= 10_000):
            raise ConfigError(
                f"{gsd:g} is no ground sample distance", where="--gsd", expected="metres, above 0"
            )
        return aoi.grid(aoi.output_crs(), gsd)
    lattice = coarse.lattice
    if lattice is None:
        other = fine.lattice
        if other is None or abs(fine.gsd_m / coarse.gsd_m - 1) > SAME_GSD:
            return aoi.grid(aoi.output_crs(), coarse.gsd_m)
        lattice = other
    return _part_of(lattice, aoi)


def own_grid(product: HeightProduct) -> Grid:
    """A map's own pixels; for a rotated map, pixels of its size in its UTM zone."""
    if product.lattice is not None:
        return product.lattice
    aoi = AOI(product.outline, to_crs("EPSG:4326"), False)
    return aoi.grid(aoi.output_crs(), product.gsd_m)


def _part_of(lattice: Grid, aoi: AOI) -> Grid:
    """The smallest window of a lattice whose pixel centres can lie in the area."""
    # A hair of tolerance: an area that is this lattice's own frame must not gain a row by rounding.
    return lattice.window_over(aoi.to_crs(lattice.crs).geometry.bounds, slack_px=1e-3)


def pair_windows(
    a: HeightProduct,
    b: HeightProduct,
    grid: Grid,
    *,
    area: AOI | None = None,
    interval: bool = False,
    progress: Progress | None = None,
) -> Iterator[PairWindow]:
    """Walk the common grid in windows of about 1000 px: memory does not depend on the maps' size."""
    progress = progress or NoProgress()
    tiles = tiles_over(grid, TILE_PX)
    progress.start(len(tiles), "comparing")
    # Of the whole grid, so that a pixel's area does not depend on the window it is met in.
    row_areas = pixel_areas_m2(grid)
    for tile in tiles:
        row, col = grid.offset_of(tile.core)
        one, two = a.read(tile.core, interval=interval), b.read(tile.core, interval=interval)
        valid = one.valid & two.valid
        if area is not None and not area.is_box:
            valid &= area.mask(tile.core)
        areas = np.broadcast_to(row_areas[row : row + tile.core.height, None], valid.shape)
        yield PairWindow(row, col, tile.core, one, two, valid, areas)
        progress.advance()
