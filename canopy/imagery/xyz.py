"""Web tiles: `{z}/{x}/{y}` (XYZ), `{-y}` (TMS) and `{q}` (quadkey) templates in Web Mercator.

The zoom is chosen once per source, so that neighbouring windows never come from different levels. A tile is
"no imagery" where its host says so: with an empty answer (204), with a status or placeholder picture that the
source's manifest names, or with a picture of one neutral colour. Every other failure is an error, because a
hole from a busy host must not become a hole in the map.
"""

from __future__ import annotations

import hashlib
import math
import re
import threading
import warnings
from collections import OrderedDict
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import rasterio
import shapely
from affine import Affine
from numpy.typing import NDArray
from odc.geo import CRS
from rasterio.enums import ColorInterp
from rasterio.errors import NotGeoreferencedWarning, RasterioError
from rasterio.io import MemoryFile

from canopy import download
from canopy.errors import FetchError, InputError, refuse_options
from canopy.files import host_of, is_url, redact
from canopy.geo.area import AOI
from canopy.geo.crs import to_crs
from canopy.geo.grid import HALF_WORLD_M, Grid, quadkey_at
from canopy.imagery.bands import GREY
from canopy.imagery.base import Imagery, ImagerySource, ReadOptions
from canopy.imagery.files import read_lattice
from canopy.imagery.scene import as_colour
from canopy.runtime import log

# Tiles carry no georeference and need none; the library would say so at every one.
warnings.filterwarnings("ignore", category=NotGeoreferencedWarning)

DEFAULT_GSD_M = 0.5
# A zoom up to 20 % coarser than wanted is close enough; the next one has four times the tiles.
ZOOM_SLACK = 1.2
CACHED_TILES = 512
_MERCATOR_180 = "+proj=merc +a=6378137 +b=6378137 +lat_ts=0 +lon_0=180 +units=m +nadgrids=@null +no_defs"
Tile = tuple[NDArray[np.uint8], NDArray[np.bool_]]


@dataclass(frozen=True)
class TileService:
    """Layout and manners of a tile host.

    Attributes:
        template: URL with {z} {x} {y}, {-y} or {q}.
        name: for messages and scene ids.
        tile_px: side of a tile.
        min_zoom, max_zoom: levels that exist.
        absent_statuses: HTTP statuses that mean "no imagery here"; 204 always does.
        placeholder_sha256: digests of tile files that mean "no imagery here".
        outline: where the service has imagery, or None if unknown.
    """

    template: str
    name: str
    tile_px: int = 256
    min_zoom: int = 0
    max_zoom: int = 22
    absent_statuses: tuple[int, ...] = ()
    placeholder_sha256: tuple[str, ...] = ()
    outline: AOI | None = None


def choose_zoom(
    gsd_m: float, latitude: float, tile_px: int = 256, min_zoom: int = 0, max_zoom: int = 22
) -> int:
    """Coarsest zoom whose ground pixels at `latitude` are no more than 20 % larger than `gsd_m`.

    >>> choose_zoom(0.5, 0.0), choose_zoom(0.5, 60.0)
    (18, 17)
    """
    widest = 2 * HALF_WORLD_M / tile_px * math.cos(math.radians(latitude))
    zoom = math.ceil(math.log2(widest / (gsd_m * ZOOM_SLACK)) - 1e-9)
    return min(max(zoom, min_zoom), max_zoom)


class TileSource(ImagerySource):
    """An `ImagerySource` over web tiles."""

    has_own_extent = False  # the outline of a service may be a country

    def __init__(self, service: TileService, options: ReadOptions, *, area: AOI | None = None) -> None:
        """Choose the zoom for `area` (its latitude) and the ground sample distance of `options`."""
        _check_template(service.template)
        refuse_options(
            {
                "--bands": options.bands, "--scale": options.scale, "--input-crs": options.crs,
                "--datetime": options.datetime,
            },
            where=service.name, because="web tiles are RGB in Web Mercator, with no choice of dates",
        )  # fmt: skip
        where = area or service.outline
        latitude = where.centroid_lonlat[1] if where else 0.0
        wanted = options.gsd_m or DEFAULT_GSD_M
        zoom = choose_zoom(wanted, latitude, service.tile_px, service.min_zoom, service.max_zoom)
        west, _, east, _ = where.bounds_lonlat if where else (0.0, 0.0, 0.0, 0.0)
        self._open(service, options.nodata, zoom, latitude, turned=west > east)

    def _open(
        self, service: TileService, nodata: float | None, zoom: int, latitude: float, *, turned: bool
    ) -> None:
        self.service, self.name, self.zoom = service, service.name, zoom
        self._nodata, self._latitude, self._turned = nodata, latitude, turned
        side = service.tile_px * 2**zoom
        pixel = 2 * HALF_WORLD_M / side
        # Round the antimeridian the lattice begins at Greenwich, so that the area is in one piece.
        crs = _MERCATOR_180 if turned else "EPSG:3857"
        self.lattice = Grid.of(crs, Affine(pixel, 0, -HALF_WORLD_M, 0, -pixel, HALF_WORLD_M), (side, side))
        self.native_crs: CRS = self.lattice.crs
        self.native_gsd_m = pixel * math.cos(math.radians(latitude))
        self.notes = [f"{service.name}: the tiles carry no acquisition date"]
        self._cache: OrderedDict[tuple[int, int], Tile | None] = OrderedDict()
        self._lock = threading.Lock()
        self._colour: bool | None = None  # whether any tile had colour; None: none was seen yet

    @property
    def scene_ids(self) -> tuple[str, ...]:
        """The service and its zoom."""
        return (f"{self.name} zoom {self.zoom}",)

    def area(self) -> AOI | None:
        """Outline declared by the service, or None."""
        return self.service.outline

    def pinned(self) -> dict[str, Any]:
        """The service and its zoom, JSON-ready."""
        outline = self.service.outline
        return {
            "kind": "tiles",
            "service": {**vars(self.service), "outline": outline and outline.lonlat.wkt},
            "nodata": self._nodata,
            "zoom": self.zoom,
            "latitude": self._latitude,
            "turned": self._turned,
            "notes": list(self.notes),
        }

    @classmethod
    def from_pin(cls, pin: Mapping[str, Any]) -> TileSource:
        """What `pinned` described."""
        facts = dict(pin["service"])
        outline = facts.pop("outline")
        aoi = outline and AOI(shapely.from_wkt(outline), to_crs("EPSG:4326"))
        for name in ("absent_statuses", "placeholder_sha256"):
            facts[name] = tuple(facts[name])
        source = cls.__new__(cls)
        source._open(
            TileService(**facts, outline=aoi),
            pin["nodata"],
            pin["zoom"],
            pin["latitude"],
            turned=pin["turned"],
        )
        source.notes = list(pin["notes"])
        return source

    def read(self, grid: Grid) -> Imagery:
        """Pixels on `grid`, fetched at the source's zoom."""
        values, valid = read_lattice(self._render, self.lattice, grid)
        return Imagery(as_colour(values, valid, 255.0), valid, np.zeros(grid.shape, np.int32), grid)

    def close(self) -> None:
        """Forget the tiles that were kept."""
        with self._lock:
            self._cache.clear()

    def _render(self, window: Grid) -> Tile:
        """uint8 pixels and validity of a window of the lattice."""
        px = self.service.tile_px
        row, col = self.lattice.offset_of(window)
        rgb = np.zeros((3, *window.shape), np.uint8)
        valid = np.zeros(window.shape, bool)
        keys = [
            (x, y)
            for y in range(row // px, -(-(row + window.height) // px))
            for x in range(col // px, -(-(col + window.width) // px))
        ]
        with ThreadPoolExecutor(min(len(keys), download.REQUESTS_PER_HOST)) as pool:
            for (x, y), tile in zip(keys, pool.map(self._tile, keys), strict=True):
                if tile is None:
                    continue
                top, left = y * px - row, x * px - col
                rows = slice(max(top, 0), min(top + px, window.height))
                cols = slice(max(left, 0), min(left + px, window.width))
                inner = (slice(rows.start - top, rows.stop - top), slice(cols.start - left, cols.stop - left))
                rgb[:, rows, cols] = tile[0][:, *inner]
                valid[rows, cols] = tile[1][inner]
        self._tell_of_grey(rgb, valid)
        return rgb, valid

    def _tell_of_grey(self, rgb: NDArray[np.uint8], valid: NDArray[np.bool_]) -> None:
        """The note that grey files get, at the first window that shows something."""
        if self._colour is None and valid.any() and rgb[0][valid].min() < rgb[0][valid].max():
            self._colour = not (np.array_equal(rgb[0], rgb[1]) and np.array_equal(rgb[1], rgb[2]))
            if not self._colour:
                self._tell(GREY.format(self.name))

    def _tell(self, note: str) -> None:
        with self._lock:
            if note in self.notes:
                return
            self.notes.append(note)
        log.warning(note)  # whoever asked for `notes` at the start has missed it

    def _tile(self, key: tuple[int, int]) -> Tile | None:
        with self._lock:
            if key in self._cache:
                self._cache.move_to_end(key)
                return self._cache[key]
        tile = self._fetch(*key)
        with self._lock:
            self._cache[key] = tile
            while len(self._cache) > CACHED_TILES:
                self._cache.popitem(last=False)
        return tile

    def _fetch(self, x: int, y: int) -> Tile | None:
        if self._turned:
            x = (x + 2**self.zoom // 2) % 2**self.zoom
        url = tile_url(self.service.template, self.zoom, x, y)
        where = f"web tile {self.zoom}/{x}/{y} of {self.name}"
        absent = (204, *self.service.absent_statuses)
        response = download.get(url, what=where, absent=absent)
        body = response.content
        if response.status_code in absent or not body:
            return None
        if hashlib.sha256(body).hexdigest() in self.service.placeholder_sha256:
            return None
        rgb, valid = decode_tile(body, self.service.tile_px, where, url)
        if len(np.unique(rgb)) == 1:
            self._tell(f"{self.name}: tiles of one neutral colour, such as {self.zoom}/{x}/{y}, are no image")
            return None
        if self._nodata is not None:
            valid = valid & ~(rgb == self._nodata).all(axis=0)
        return rgb, valid


def _check_template(template: str) -> None:
    fields = set(re.findall(r"\{[^}]*\}", template))
    complete = {"{q}"} <= fields or ({"{z}", "{x}"} <= fields and bool(fields & {"{y}", "{-y}"}))
    if not is_url(template) or not complete or fields - {"{z}", "{x}", "{y}", "{-y}", "{q}"}:
        raise InputError(
            "not a web-tile template",
            where=redact(template),
            expected="an http(s) URL with {z}, {x} and {y} (or {-y} for TMS), or with {q} for quadkeys",
        )


def tile_url(template: str, zoom: int, x: int, y: int) -> str:
    """URL of one tile; y counts from the north, as XYZ does."""
    values = {"{z}": zoom, "{x}": x, "{y}": y, "{-y}": 2**zoom - 1 - y, "{q}": quadkey_at(y, x, zoom)}
    for field, value in values.items():
        template = template.replace(field, str(value))
    return template


def decode_tile(body: bytes, tile_px: int, where: str, url: str) -> Tile:
    """PNG, JPEG or WebP bytes -> uint8 RGB (3, px, px) and validity.

    Raises:
        FetchError: not a picture, not 8 bits, or of another size than declared.
    """
    try:
        with (
            rasterio.Env(GDAL_ERROR_ON_LIBJPEG_WARNING=True),
            MemoryFile(body) as memory,
            memory.open(driver=_driver(body)) as dataset,
        ):
            bands, colours = dataset.read(), dataset.colorinterp
            table = dataset.colormap(1) if colours[0] == ColorInterp.palette else None
    except (RasterioError, ValueError) as error:
        raise FetchError(f"{host_of(url)} sent something that is no picture ({error})", where=where) from None
    if bands.dtype != np.uint8 or bands.shape[1:] != (tile_px, tile_px):
        found = f"{bands.dtype} pixels, {bands.shape[2]} x {bands.shape[1]}"
        raise FetchError(
            f"{host_of(url)} sent {found}", where=where, expected=f"uint8, {tile_px} x {tile_px}"
        )
    if table is not None:
        lookup = np.zeros((256, 4), np.uint8)
        for value, rgba in table.items():
            lookup[value] = rgba
        bands = np.moveaxis(lookup[bands[0]], -1, 0)
    if bands.shape[0] <= 2:  # encoders drop colour from tiles that happen to be grey
        bands = np.concatenate([np.repeat(bands[:1], 3, axis=0), bands[1:]])
    alpha = bands[3] if bands.shape[0] == 4 else np.full((tile_px, tile_px), 255, np.uint8)
    return bands[:3], alpha > 0


def _driver(body: bytes) -> str:
    if body[:8] == b"\x89PNG\r\n\x1a\n":
        return "PNG"
    if body[:2] == b"\xff\xd8":
        return "JPEG"
    if body[:4] == b"RIFF" and body[8:12] == b"WEBP":
        return "WEBP"
    raise ValueError(f"begins with {body[:8]!r}")
