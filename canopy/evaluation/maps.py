"""THE reader of height maps: anybody's GeoTIFF, tiles, published map or array, as metres on any grid.

Every command that takes a height raster (evaluate, compare, stats, calibrate) opens it here, so that one rule
holds for all: which band is the height, what its unit is, which heights are impossible, what is missing.

The published maps (EPSG:3857 quadkey tiles of whole metres) need rules of their own, because "0 m" and "not
mapped" look alike in them:

* 255 is never a height, whether or not the tile says so;
* v1 (zoom 9): `NAME.tif.msk`, beside the tile or in `../msk/`, is 255 where the map is NOT valid, the
  opposite of GDAL's masks. Without that file the product cannot tell 0 m from unmapped, and a note says so;
* v2 (zoom 10): whatever the file itself declares (mask band, nodata value);
* where nothing is declared, what lies outside the outlines of a tile's images (`../metadata/NAME.geojson`)
  is not mapped; without these the note stands.
"""

from __future__ import annotations

import contextlib
import json
import re
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import date
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import shapely
from odc.geo import CRS
from rasterio.features import geometry_mask
from rasterio.io import DatasetReader
from shapely.geometry import shape
from shapely.geometry.base import BaseGeometry

from canopy import web
from canopy.errors import CanopyError, ImageryError, InputError
from canopy.files import is_url, public_name
from canopy.geo.crs import project, to_lonlat
from canopy.geo.grid import Grid
from canopy.geo.heights import HIGHEST_M, LOWEST_M, HeightBands
from canopy.geo.place import SourcePlace
from canopy.geo.reading import open_raster, read_window
from canopy.imagery.dates import acquisition_date, parse_day, parse_range
from canopy.labels.catalog import sensor_floor

NOT_A_HEIGHT = 255
# Handles kept open while windows walk over a mosaic.
OPEN_TILES = 8
DEFAULT_LEVEL = 0.9


@dataclass(frozen=True)
class Tile:
    """One file of a map and what its header says.

    Attributes:
        bands: the height's, and those of its interval.
        published: "published v1" or "published v2" for a tile of those maps. mask: the v1 map's `.tif.msk`.
        by_outlines: nothing but the outlines of its images tells what is mapped, see `acquisitions`.
        notes: what the user must know of it.
    """

    path: str
    place: SourcePlace
    bands: HeightBands
    published: str | None
    mask: str | None
    by_outlines: bool
    notes: tuple[str, ...]
    tags: dict[str, str] = field(hash=False, compare=False)

    @cached_property
    def outline(self) -> BaseGeometry:
        """Its frame in EPSG:4326."""
        corners = [self.place.xy(*corner) for corner in self.place.corners_rc]
        return to_lonlat(shapely.Polygon(corners), self.place.crs)

    @cached_property
    def acquisitions(self) -> tuple[tuple[BaseGeometry | None, date], ...]:
        """Of a published tile: outlines of its images, in its CRS, and their dates; empty where unknown.

        From `../metadata/NAME.geojson`. What cannot be read is unknown, not a reason to refuse the heights.
        """
        if self.published is None:
            return ()
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError, AttributeError, CanopyError):
            document = json.loads(_text(beside(self.path, "metadata", ".geojson")))
            named = ((document.get("crs") or {}).get("properties") or {}).get("name") or "EPSG:4326"
            rows = [
                (f.get("geometry"), parse_day(str((f.get("properties") or {}).get("acq_date"))))
                for f in document["features"]
            ]
            return tuple(
                (project(shapely.make_valid(shape(outline)), named, self.place.crs) if outline else None, day)
                for outline, day in rows
                if day is not None
            )
        return ()


def beside(path: str, folder: str, suffix: str) -> str:
    """The address of a file of a published tile's name in a folder beside the tile's own."""
    if is_url(path):
        start, _, name = path.rsplit("/", 2)
        return f"{start}/{folder}/{name.partition('.')[0]}{suffix}"
    return str(Path(path).parent.parent / folder / f"{Path(path).stem}{suffix}")


def _text(path: str) -> str:
    return web.get(path, what="the dates").text if is_url(path) else Path(path).read_text("utf-8")


class HeightMap:
    """An open height map; `read` gives metres on any grid. Use from one thread; close when done.

    Attributes:
        name: what the user called it, without folders; kind: "map", "tiles", "published v1", "published v2".
        tiles: its files. step_m: what heights are rounded to (0: nothing).
        reference: whether maps are judged by it; what that changes is said in `canopy.evaluation.grids`.
        impossible: how many pixels read so far have a height that is none, and one such height; they are
            invalid.
    """

    def __init__(
        self, name: str, tiles: Sequence[Tile], *, nodata: float | None = None, reference: bool = False
    ) -> None:
        self.name, self.tiles, self.nodata, self.reference = name, tuple(tiles), nodata, reference
        first = tiles[0]
        self.kind = first.published or ("map" if len(tiles) == 1 else "tiles")
        self.step_m = max(tile.bands.step_m for tile in tiles)
        self.tags = first.tags
        self.has_interval = all(len(tile.bands.indexes) == 3 for tile in tiles)
        self.impossible: tuple[int, float] = 0, 0.0
        self._known_px = self._unlike_px = 0
        self._tree = shapely.STRtree([tile.outline for tile in tiles])
        self._open: OrderedDict[str, DatasetReader] = OrderedDict()
        self._at_close = contextlib.ExitStack()

    # ---- facts --------------------------------------------------------------------------------
    @property
    def crs(self) -> CRS:
        """CRS of its first file."""
        return self.tiles[0].place.crs

    @cached_property
    def outline(self) -> BaseGeometry:
        """Union of the frames of its files, EPSG:4326."""
        return shapely.union_all([tile.outline for tile in self.tiles])

    @property
    def level(self) -> float | None:
        """Nominal coverage of the interval bands, from the tag CANOPY_INTERVAL; 0.9 where it is not said."""
        if not self.has_interval:
            return None
        with contextlib.suppress(ValueError):
            level = float(self.tags.get("CANOPY_INTERVAL", ""))
            return level if 0 < level < 1 else DEFAULT_LEVEL
        return DEFAULT_LEVEL

    @cached_property
    def lattice(self) -> Grid | None:
        """Grid of its first file, north up; None if it is rotated. Every published tile lies on it."""
        place = self.tiles[0].place.north_up()
        return place.grid() if place.is_north_up else None

    @cached_property
    def is_one_lattice(self) -> bool:
        """Whether the pixels of all files lie on one lattice."""
        lattice = self.lattice
        places = [tile.place.north_up() for tile in self.tiles]
        return lattice is not None and all(p.is_north_up and p.grid().is_aligned(lattice) for p in places)

    @cached_property
    def gsd_m(self) -> float:
        """Ground sample distance in metres at the centre of its first file."""
        return self.lattice.gsd_m if self.lattice is not None else self.tiles[0].place.gsd_m

    @cached_property
    def dates(self) -> tuple[str, ...]:
        """First and last acquisition date or year, ISO; empty where unknown."""
        found = [date for tile in self.tiles for date in _dates_of(tile)]
        return tuple(dict.fromkeys((min(found), max(found)))) if found else ()

    @property
    def floor_m(self) -> float:
        """Height below which this reference knows nothing, from its tags; 0 where nothing is said."""
        for name in ("CANOPY_SENSOR", "LIDAR_SENSOR", "SENSOR"):
            with contextlib.suppress(InputError):  # some other sensor: only NEON's height models have floors
                if self.tags.get(name):
                    return sensor_floor(self.tags[name])
        return 0.0

    @property
    def notes(self) -> tuple[str, ...]:
        """What the user must know, one sentence each; complete when everything has been read.

        Raises ImageryError where most of what was read are many different impossible heights: elevations, or
        another unit, of which the few that could be heights would be believed.
        """
        found = dict.fromkeys(note for tile in self.tiles for note in tile.notes)
        count, example = self.impossible
        if 2 * self._unlike_px > self._known_px:
            raise ImageryError(
                f"{100 * count / max(self._known_px, count):.2g} % of its pixels have heights such as "
                f"{example:.6g} m", where=self.name, expected="canopy heights in metres",
                remedy="if they are in another unit write it into the file, for example with "
                "rio edit-info --bidx 1 --units cm FILE",
            )  # fmt: skip
        if count:
            # A share, because windows overlap and some are read twice.
            share = f"{100 * count / max(self._known_px, count):.2g} %"
            found[
                f"{share} of its pixels have impossible heights (such as {example:.6g} m) and count as "
                "missing: an undeclared nodata value, or not metres"
            ] = None
        return tuple(f"{self.name}: {note}" for note in found)

    # ---- pixels -------------------------------------------------------------------------------
    def read(
        self, grid: Grid, *, interval: bool = False, resampling: str | None = None, overviews: bool = False
    ) -> tuple[np.ndarray, np.ndarray]:
        """Heights in metres on `grid`, as `canopy.geo.reading.read_window` resamples them.

        Returns float32 (1, h, w), or (3, h, w) with the ends of the map's interval where it has one and
        `interval` asks for it, 0 where invalid; and valid (h, w). Where files overlap the earlier one counts.
        Raises ImageryError.
        """
        bands = 3 if interval and self.has_interval else 1
        values, valid = np.zeros((bands, *grid.shape), np.float32), np.zeros(grid.shape, bool)
        for tile in self.near(grid):
            got, good = self._read_tile(tile, grid, bands, resampling, overviews)
            new = good & ~valid
            values[:, new] = got[:, new]
            valid |= new
            if valid.all():
                break
        return values, valid

    def near(self, grid: Grid) -> list[Tile]:
        """The files that may have pixels on `grid`, in order; a map of one file has always that."""
        if len(self.tiles) == 1:
            return [*self.tiles]
        return [self.tiles[index] for index in sorted(self._tree.query(grid.outline(), "intersects"))]

    def _read_tile(
        self, tile: Tile, grid: Grid, bands: int, resampling: str | None, overviews: bool
    ) -> tuple[np.ndarray, np.ndarray]:
        def metres(raw: np.ndarray, valid: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
            """Source pixels before any resampling, so that what is no height never bleeds into one."""
            values = tile.bands.metres(raw)
            if tile.published and self.nodata is None:
                valid = valid & (raw[0] != NOT_A_HEIGHT)
            self._known_px += int(valid.sum())
            return values, self.without_impossible(values[0], valid, LOWEST_M, HIGHEST_M)

        values, valid = read_window(
            self._dataset(tile.path), grid, tile.bands.indexes[:bands], resampling=resampling,
            nodata=self.nodata, decode=metres, overviews=overviews,
        )  # fmt: skip
        if tile.mask is not None:
            mask: Any = _Placed(self._dataset(tile.mask, georeferenced=False), tile.place)
            masked, known = read_window(mask, grid, [1], nodata=NOT_A_HEIGHT)
            valid &= known & (masked[0] < 1)  # a trace of a masked pixel is the resampling's rounding
        if tile.by_outlines and self.nodata is None:
            outlines = [
                project(outline, tile.place.crs, grid.crs) for outline, _ in tile.acquisitions if outline
            ]
            valid &= geometry_mask(outlines, grid.shape, grid.transform, invert=True)
        return values, valid

    def without_impossible(
        self, height_m: np.ndarray, valid: np.ndarray, low_m: float, high_m: float
    ) -> np.ndarray:
        """`valid` (h, w) without the pixels whose height is beyond the limits; one of them is kept to say."""
        sane = (height_m >= low_m) & (height_m <= high_m)
        strange = height_m[valid & ~sane]
        if strange.size:
            self.impossible = self.impossible[0] + strange.size, float(strange[0])
            # A nodata value is one number; elevations, and heights in another unit, are many.
            usual = np.percentile(strange, 50, method="lower")
            self._unlike_px += int((strange != usual).sum())
        return valid & sane

    def _dataset(self, path: str, georeferenced: bool = True) -> DatasetReader:
        dataset = self._open.pop(path, None)
        if dataset is None or dataset.closed:
            dataset = open_raster(path, georeferenced=georeferenced)
        self._open[path] = dataset
        while len(self._open) > OPEN_TILES:
            self._open.popitem(last=False)[1].close()
        return dataset

    def close(self) -> None:
        """Close its files; a later `read` opens them anew, but for arrays, which are gone."""
        while self._open:
            self._open.popitem()[1].close()
        self._at_close.close()

    def __enter__(self) -> HeightMap:
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
        self._dataset, self.transform, self.crs = dataset, place.transform, place.crs

    def __getattr__(self, name: str) -> Any:
        return getattr(self._dataset, name)


# ---- dates ----------------------------------------------------------------------------------------
def years_apart(a: Sequence[str], b: Sequence[str]) -> float | None:
    """Years between the middles of two ranges of dates (b minus a), None where one is unknown."""
    middles = []
    for dates in (a, b):
        try:
            ends = parse_range(dates[0])[0], parse_range(dates[-1])[1]
        except (IndexError, ValueError):
            return None
        middles.append(sum(d.year + (d.timetuple().tm_yday - 1) / 365.25 for d in ends if d) / 2)
    return middles[1] - middles[0]


def _dates_of(tile: Tile) -> list[str]:
    """Dates by a file's tags or name, and by what lies beside a published tile."""
    found = re.findall(r"\d{4}(?:-\d\d){0,2}", tile.tags.get("CANOPY_DATES", ""))
    day = None if found else acquisition_date(tile.tags, tile.path)
    return [*found, *(day.isoformat() for _, day in tile.acquisitions), *([day.isoformat()] if day else [])]
