"""Opening anybody's canopy height map: one GeoTIFF, a folder or list of tiles, or the published v1 and v2
maps.

Every product reads as metres on any grid. The published maps (EPSG:3857 quadkey tiles of whole metres) need
rules of their own, because "0 m" and "not mapped" look alike in them:

* 255 is never a height, whether or not the tile says so;
* v1 (zoom 9): `NAME.tif.msk`, beside the tile or in `../msk/`, is 255 where the map is NOT valid, the
opposite of GDAL's masks. Without that file the product cannot tell 0 m from unmapped, and a note says so;
* v2 (zoom 10): whatever the file itself declares (mask band, nodata value); where it declares nothing, the
same note.
"""

from __future__ import annotations

import re
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import shapely
from odc.geo import CRS
from rasterio.enums import ColorInterp, MaskFlags
from rasterio.io import DatasetReader
from shapely.geometry import Polygon
from shapely.geometry.base import BaseGeometry

from canopy.errors import ImageryError, InputError
from canopy.evaluation.product_dates import map_dates
from canopy.geo.crs import to_lonlat
from canopy.geo.grid import Grid
from canopy.geo.opening import SourcePlace, open_raster
from canopy.geo.paths import is_url, public_name
from canopy.geo.tiles import quadkey_bounds
from canopy.geo.window import read_window

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
        """Heights in metres on `grid` (see `canopy.geo.window.read_window`); invalid pixels are 0.

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
