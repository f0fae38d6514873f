"""What the page shows and asks: height maps and the image under them, by the readers of all commands."""

from __future__ import annotations

import datetime
import threading
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import shapely

from canopy.evaluation.grids import own_grid
from canopy.evaluation.maps import HeightMap
from canopy.evaluation.opening import open_heights
from canopy.evaluation.zones import ZoneOptions, zone_numbers
from canopy.geo.crs import transformer
from canopy.geo.grid import Grid
from canopy.geo.place import SourcePlace
from canopy.geo.reading import open_raster, read_window
from canopy.geo.vector import read_zones
from canopy.geo.warp import AVERAGE_ABOVE
from canopy.imagery.base import ImagerySource
from canopy.imagery.files import Mosaic
from canopy.inference.layers import DATE_BAND, QUALITY_BAND
from canopy.viewer.tiles import Pixels, Pyramid, native_zoom

if TYPE_CHECKING:
    from canopy.evaluation.opening import HeightSource

LONLAT = "EPSG:4326"
# Files that one tile is read from; where more touch it, it is made of the tiles below it.
MOST_FILES = 16
# Pixels asked for at once lie together in squares of this side, counted on the map's lattice.
_BLOCK_PX = 256
_EPOCH = datetime.date(1970, 1, 1)


class HeightLayer:
    """A height map as tiles, and what is asked of it by clicking. Thread-safe.

    Attributes:
        name: what the page calls it. heights: the map. pyramid: its tiles, float32 (1, 256, 256) metres.
    """

    def __init__(self, source: HeightSource) -> None:
        """Open a map. Raises ImageryError as `open_heights` does."""
        self.heights = open_heights(source)
        self.name = self.heights.name
        # A long question (the statistics of a large polygon) should not hold up the tiles.
        self._asked = HeightMap(self.heights.name, self.heights.tiles)
        self._drawing, self._asking = threading.Lock(), threading.Lock()
        self._grid = own_grid(self.heights)
        west, south, east, north = self.heights.outline.bounds
        deepest = native_zoom(self.heights.gsd_m, (south + north) / 2)
        self.pyramid = Pyramid(self._read, self._is_cheap, deepest, (west, south, east, north))

    def _is_cheap(self, grid: Grid) -> bool:
        return len(self.heights.near(grid)) <= MOST_FILES

    def _read(self, grid: Grid) -> Pixels:
        """Means where pixels are shrunk, else the map's own pixels, unsmoothed."""
        shrunk = grid.gsd_m > self.heights.gsd_m * AVERAGE_ABOVE
        with self._drawing:
            return self.heights.read(grid, resampling=None if shrunk else "nearest", overviews=True)

    # ---- questions ----------------------------------------------------------------------------
    def sample(self, lons: np.ndarray, lats: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The pixels that points in degrees (n,) lie in.

        Returns float64 (bands, n), the height in metres and, where the map has an interval, its ends; and
        valid (n,).
        """
        x, y = transformer(LONLAT, self._grid.crs).transform(lons, lats)
        inside = np.isfinite(x) & np.isfinite(y)
        row, col = (
            np.floor(np.where(inside, at, -1)).astype(np.int64)
            for at in SourcePlace.of_grid(self._grid).rowcol(x, y)
        )
        inside &= (row >= 0) & (row < self._grid.height) & (col >= 0) & (col < self._grid.width)
        values = np.zeros((3 if self.heights.has_interval else 1, len(row)))
        valid = np.zeros(len(row), bool)
        blocks = np.where(inside, row // _BLOCK_PX * self._grid.width + col // _BLOCK_PX, -1)
        with self._asking:
            for block in np.unique(blocks[inside]):
                here = np.flatnonzero(blocks == block)
                rows, cols = row[here], col[here]
                top, left = rows.min(), cols.min()
                window = self._grid.window(top, left, rows.max() - top + 1, cols.max() - left + 1)
                got, good = self._asked.read(window, interval=True, resampling="nearest")
                values[:, here], valid[here] = got[:, rows - top, cols - left], good[rows - top, cols - left]
        return values, valid

    def point(self, lon: float, lat: float) -> dict[str, Any]:
        """What the map says of a point: height, interval, date and flags, None where it does not say."""
        values, valid = self.sample(np.array([lon]), np.array([lat]))
        found: dict[str, Any] = {
            "name": self.name, "height_m": None, "lower_m": None, "upper_m": None,
            "level": self.heights.level, "date": None, "quality": None,
        }  # fmt: skip
        if valid[0]:
            for key, value in zip(("height_m", "lower_m", "upper_m"), values[:, 0].tolist(), strict=False):
                found[key] = value
            extra = self._extra_bands(lon, lat)
            if days := extra.get(DATE_BAND[0]):
                found["date"] = (_EPOCH + datetime.timedelta(days=days)).isoformat()
            elif DATE_BAND[0] not in extra and self.heights.dates:
                found["date"] = " to ".join(self.heights.dates)
            if QUALITY_BAND[0] in extra:
                found["quality"] = self._flags(extra[QUALITY_BAND[0]])
        return found

    def _extra_bands(self, lon: float, lat: float) -> dict[str, int]:
        """Days and flags of the file under a point, where it has such bands."""
        x, y = transformer(LONLAT, self._grid.crs).transform(lon, lat)
        row, col = (int(at) for at in np.floor(self._grid.rowcol(x, y)))
        pixel = self._grid.window(row, col, 1, 1)
        found: dict[str, int] = {}
        with self._asking:
            for tile in self._asked.near(pixel):
                with open_raster(tile.path) as dataset:
                    for name in (DATE_BAND[0], QUALITY_BAND[0]):
                        if name in dataset.descriptions and name not in found:
                            band = dataset.descriptions.index(name) + 1
                            value, valid = read_window(dataset, pixel, [band], resampling="nearest")
                            if valid[0, 0]:
                                found[name] = int(value[0, 0, 0])
        return found

    def _flags(self, bits: int) -> list[str]:
        """Names of the set bits, by the tag that the map carries; a number where it names none."""
        tag = self.heights.tags.get("CANOPY_QUALITY_BITS", "")
        pairs = (part.split(maxsplit=1) for part in tag.split(","))
        names = {int(pair[0]): pair[1].replace("_", " ") for pair in pairs if len(pair) == 2}
        set_bits = (1 << bit for bit in range(bits.bit_length()) if bits >> bit & 1)
        return [names.get(value, f"flag {value}") for value in set_bits]

    def zone(self, ring: Sequence[Sequence[float]]) -> dict[str, Any]:
        """The numbers of `canopy stats` for a polygon given as longitudes and latitudes.

        Raises AreaError for what is no polygon.
        """
        import geopandas

        frame = geopandas.GeoDataFrame(geometry=[shapely.Polygon(ring)], crs=LONLAT)
        _, crs, shapes = read_zones(frame)
        with self._asking:
            return zone_numbers(self._asked, shapes[0], crs, ZoneOptions())


class ImageLayer:
    """The image under the heights, as tiles of the area that the maps cover. Thread-safe.

    Attributes:
        pyramid: its tiles, float32 (3, 256, 256) in 0..1.
    """

    def __init__(self, source: ImagerySource, bounds: Sequence[float]) -> None:
        self.source, self.name = source, source.name
        deepest = native_zoom(source.native_gsd_m, (bounds[1] + bounds[3]) / 2)
        self.pyramid = Pyramid(self._read, self._is_cheap, deepest, bounds)

    def _is_cheap(self, grid: Grid) -> bool:
        # Files have overviews; what is drawn on demand has not.
        return isinstance(self.source, Mosaic) and len(self.source.near(grid)) <= MOST_FILES

    def _read(self, grid: Grid) -> Pixels:
        image = self.source.read(grid)
        return image.rgb, image.valid
