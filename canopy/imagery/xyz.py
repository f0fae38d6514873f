"""Web tiles: `{z}/{x}/{y}` (XYZ), `{-y}` (TMS) and `{q}` (quadkey) templates in Web Mercator.

The zoom is chosen once per source, so that neighbouring windows never come from different levels. A tile is
"no imagery" only where the source's manifest says how its host tells so (a status, or the digest of a
placeholder picture); every other failure is an error, because a hole from a busy host must not become a
hole in the map.
"""

from __future__ import annotations

import hashlib
import math
import re
import threading
from collections import OrderedDict
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import date

import numpy as np
import rasterio
from affine import Affine
from numpy.typing import NDArray
from odc.geo import CRS
from rasterio.enums import ColorInterp
from rasterio.errors import RasterioError
from rasterio.io import MemoryFile

from canopy import download as http
from canopy.errors import FetchError, InputError, refuse_options
from canopy.files import host_of, is_url, redact
from canopy.geo.area import AOI
from canopy.geo.grid import Grid
from canopy.geo.tiles import HALF_WORLD_M, quadkey_at
from canopy.imagery.base import Imagery, ReadOptions, contains
from canopy.imagery.files import read_lattice

DEFAULT_GSD_M = 0.5
ZOOM_SLACK = (
    1.2  # a zoom up to 20 % coarser than wanted is close enough; the next one has four times the tiles
)
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
        absent_statuses: HTTP statuses that mean "no imagery here".
        placeholder_sha256: digests of tile files that mean "no imagery here".
        outline: where the service has imagery, or None if unknown.
        day: acquisition day when all tiles share one.
    """

    template: str
    name: str
    tile_px: int = 256
    min_zoom: int = 0
    max_zoom: int = 22
    absent_statuses: tuple[int, ...] = ()
    placeholder_sha256: tuple[str, ...] = ()
    outline: AOI | None = None
    day: date | None = None


def open_template(template: str, options: ReadOptions, *, area: AOI | None) -> TileSource:
    """A bare template given by the user, with nothing declared about missing tiles."""
    return TileSource(TileService(template, redact(template)), options, area=area)


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


class TileSource:
    """An `ImagerySource` over web tiles."""

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
        self.service, self.name = service, service.name
        self._nodata = options.nodata
        where = area or service.outline
        latitude = where.centroid_lonlat[1] if where else 0.0
        wanted = options.gsd_m or DEFAULT_GSD_M
        self.zoom = choose_zoom(wanted, latitude, service.tile_px, service.min_zoom, service.max_zoom)
        side = service.tile_px * 2**self.zoom
        pixel = 2 * HALF_WORLD_M / side
        # Round the antimeridian the lattice begins at Greenwich, so that the area is in one piece.
        self._turn = 2**self.zoom // 2 if where is not None and _crosses_180(where) else 0
        crs = "EPSG:3857" if not self._turn else _MERCATOR_180
        self.lattice = Grid.of(crs, Affine(pixel, 0, -HALF_WORLD_M, 0, -pixel, HALF_WORLD_M), (side, side))
        self.native_crs: CRS = self.lattice.crs
        self.native_gsd_m = pixel * math.cos(math.radians(latitude))
        self.native_grid: Grid | None = None
        self.has_own_extent = False  # that of a service may be a country
        self.dates: tuple[str, ...] = (service.day.isoformat(),) if service.day else ()
        self.scene_ids: tuple[str, ...] = (f"{service.name} zoom {self.zoom}",)
        self.notes: list[str] = (
            [] if service.day else [f"{service.name}: the tiles carry no acquisition date"]
        )
        self._cache: OrderedDict[tuple[int, int], Tile | None] = OrderedDict()
        self._lock = threading.Lock()

    def area(self) -> AOI | None:
        """Outline declared by the service, or None."""
        return self.service.outline

    def covers(self, aoi: AOI) -> bool:
        """True when inside the declared outline, or when none is declared."""
        return self.service.outline is None or contains(self.service.outline, aoi)

    def read(self, grid: Grid) -> Imagery:
        """Pixels on `grid`, fetched at the source's zoom."""
        values, valid = read_lattice(self._render, self.lattice, grid)
        rgb = np.clip(values / np.float32(255.0), 0.0, 1.0)
        rgb[:, ~valid] = 0.0
        out = Imagery(rgb, valid, np.zeros(grid.shape, np.int32), grid)
        if self.service.day:
            out.date[valid] = (self.service.day - date(1970, 1, 1)).days
        return out

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
        with ThreadPoolExecutor(min(len(keys), http.REQUESTS_PER_HOST)) as pool:
            for (x, y), tile in zip(keys, pool.map(self._tile, keys), strict=True):
                if tile is None:
                    continue
                top, left = y * px - row, x * px - col
                rows = slice(max(top, 0), min(top + px, window.height))
                cols = slice(max(left, 0), min(left + px, window.width))
                inner = (slice(rows.start - top, rows.stop - top), slice(cols.start - left, cols.stop - left))
                rgb[:, rows, cols] = tile[0][:, *inner]
                valid[rows, cols] = tile[1][inner]
        return rgb, valid

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
        x = (x + self._turn) % 2**self.zoom
        url = tile_url(self.service.template, self.zoom, x, y)
        where = f"web tile {self.zoom}/{x}/{y} of {self.name}"
        response = http.get(url, what=where, absent=self.service.absent_statuses)
        body = response.content
        if response.status_code in self.service.absent_statuses:
            return None
        if hashlib.sha256(body).hexdigest() in self.service.placeholder_sha256:
            return None
        rgb, valid = decode_tile(body, self.service.tile_px, where, url)
        if self._nodata is not None:
            valid = valid & ~(rgb == self._nodata).all(axis=0)
        return rgb, valid


def _crosses_180(area: AOI) -> bool:
    west, _, east, _ = area.bounds_lonlat
    return west > east


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
