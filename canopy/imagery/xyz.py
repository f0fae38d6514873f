"""Web tiles in Web Mercator: `{z}/{x}/{y}` (XYZ), `{-y}` (TMS), `{q}` (quadkey); `{bbox}` (WMS, ImageServer).

A `{bbox}` is that of a tile, too, so that the requests, and with them the pixels, do not depend on what is
read.

The zoom is chosen once per source, so that neighbouring windows never come from different levels. A tile is
"no imagery" where its host says so: with an empty answer (204), with a status or placeholder picture that the
source's manifest names, or with a picture of one colour. Every other failure is an error, because a
hole from a busy host must not become a hole in the map.
"""

from __future__ import annotations

import hashlib
import io
import math
import re
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from typing import Any

import numpy as np
import shapely
from affine import Affine
from numpy.typing import NDArray
from odc.geo import CRS
from PIL import Image
from pydantic import Field

from canopy import web
from canopy.config import Settings
from canopy.errors import FetchError, InputError, refuse_options
from canopy.files import check_terms, host_of, is_url, redact
from canopy.geo.area import AOI
from canopy.geo.crs import to_crs
from canopy.geo.grid import HALF_WORLD_M, Grid, quadkey_at
from canopy.imagery.bands import GREY, is_grey
from canopy.imagery.base import Imagery, ImagerySource, ReadOptions, as_colour, read_lattice
from canopy.runtime import log

DEFAULT_GSD_M = 0.5
# A zoom up to 20 % coarser than wanted is close enough; the next one has four times the tiles.
ZOOM_SLACK = 1.2
CACHED_TILES = 512
BOX_PX = 1024  # side of what is asked for by its box, where nothing else is said: few requests, not too large
_FIELDS = {"{z}", "{z:02}", "{x}", "{y}", "{-y}", "{q}", "{bbox}", "{width}", "{height}", "{crs}", "{proj}"}
_ERROR_TEXT = (b"<", b"{")
_MERCATOR_180 = "+proj=merc +a=6378137 +b=6378137 +lat_ts=0 +lon_0=180 +units=m +nadgrids=@null +no_defs"
_CRS = "EPSG:3857"
Tile = tuple[NDArray[np.uint8], NDArray[np.bool_]]


class TileLayout(Settings):
    """Layout and manners of a tile host.

    Attributes:
        tile_px: side of a tile.
        min_zoom, max_zoom: levels that exist.
        absent_statuses: HTTP statuses that mean "no imagery here"; 204 always does.
        placeholder_sha256: digests of tile files that mean "no imagery here".
    """

    tile_px: int = Field(default=256, gt=0)
    min_zoom: int = Field(default=0, ge=0, le=24)
    max_zoom: int = Field(default=22, ge=0, le=24)
    absent_statuses: tuple[int, ...] = ()
    placeholder_sha256: tuple[str, ...] = ()


class TileService(TileLayout):
    """A tile host.

    Attributes:
        template: URL with {z} (or {z:02}) {x} {y}, with {-y}, with {q}, or with {bbox} {width} {height} and
            maybe {crs}, which becomes EPSG:3857.
        name: for messages and scene ids.
        outline: where the service has imagery, as WKT in EPSG:4326, or None if unknown.
    """

    template: str
    name: str
    outline: str | None = None

    def area(self) -> AOI | None:
        """The outline as an area."""
        return AOI(shapely.from_wkt(self.outline), to_crs("EPSG:4326")) if self.outline else None


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


def open_tiles(service: TileService, options: ReadOptions, area: AOI | None = None) -> TileSource:
    """Tiles at the zoom for the latitude of `area` and the ground sample distance of `options`.

    Raises:
        InputError: no web-tile template, or an option that has no use here.
    """
    fields = set(re.findall(r"\{[^}]*\}", service.template))
    tiled = "{x}" in fields and bool(fields & {"{z}", "{z:02}"}) and bool(fields & {"{y}", "{-y}"})
    complete = tiled or "{q}" in fields or {"{bbox}", "{width}", "{height}"} <= fields
    if not is_url(service.template) or not complete or fields - _FIELDS:
        raise InputError(
            "not a web-tile template",
            where=redact(service.template),
            expected="an http(s) URL with {z}, {x} and {y} (or {-y} for TMS), with {q} for quadkeys, or with "
            "{bbox}, {width} and {height} for a WMS or ImageServer",
        )
    check_terms(service.template)
    refuse_options(
        {
            "--bands": options.bands, "--scale": options.scale, "--input-crs": options.crs,
            "--datetime": options.datetime,
        },
        where=service.name, because="web tiles are RGB in Web Mercator, with no choice of dates",
    )  # fmt: skip
    where = area or service.area()
    latitude = where.centroid_lonlat[1] if where else 0.0
    wanted = options.gsd_m or DEFAULT_GSD_M
    zoom = choose_zoom(wanted, latitude, service.tile_px, service.min_zoom, service.max_zoom)
    return TileSource(service, options.nodata, zoom, where.bounds_lonlat if where else (0.0,) * 4)


class TileSource(ImagerySource):
    """Web tiles of one zoom."""

    has_own_extent = False  # the outline of a service may be a country

    def __init__(self, service: TileService, nodata: float | None, zoom: int, place: Sequence[float]) -> None:
        """Describe the tiles; nothing is fetched.

        Args:
            service: where they come from.
            nodata: a pixel whose red, green and blue all have this value is missing.
            zoom: their level.
            place: west, south, east, north in degrees of what will be read, for the ground sample distance.
        """
        self.service, self.name, self.zoom = service, service.name, zoom
        self._nodata, self._place = nodata, tuple(place)
        # Round the antimeridian the lattice begins at Greenwich, so that the area is in one piece.
        self._turned = place[0] > place[2]
        side = service.tile_px * 2**zoom
        pixel = 2 * HALF_WORLD_M / side
        crs = _MERCATOR_180 if self._turned else _CRS
        self.lattice = Grid.of(crs, Affine(pixel, 0, -HALF_WORLD_M, 0, -pixel, HALF_WORLD_M), (side, side))
        self.native_crs: CRS = self.lattice.crs
        self.native_gsd_m = pixel * math.cos(math.radians((place[1] + place[3]) / 2))
        self.notes = [f"{service.name}: the tiles carry no acquisition date"]
        self._tile = lru_cache(CACHED_TILES)(self._fetch)
        self._colour: bool | None = None  # whether any tile had colour; None: none was seen yet
        self._blank = ""  # the first tile of one colour

    @property
    def scene_ids(self) -> tuple[str, ...]:
        """The service and its zoom."""
        return (f"{self.name} zoom {self.zoom}",)

    def area(self) -> AOI | None:
        """Outline declared by the service, or None."""
        return self.service.area()

    def _pin(self) -> dict[str, Any]:
        return {
            "kind": "tiles",
            "service": self.service.model_dump(mode="json"),
            "nodata": self._nodata,
            "zoom": self.zoom,
            "place": self._place,
            "notes": list(self.notes),
        }

    def read(self, grid: Grid) -> Imagery:
        """Pixels on `grid`, fetched at the source's zoom."""
        values, valid = read_lattice(self._render, self.lattice, grid)
        return Imagery(as_colour(values, valid, 255.0), valid, np.zeros(grid.shape, np.int32), grid)

    def close(self) -> None:
        """Forget the tiles that were kept."""
        self._tile.cache_clear()

    def _render(self, window: Grid) -> Tile:
        """uint8 pixels and validity of a window of the lattice."""
        px = self.service.tile_px
        row, col = self.lattice.offset_of(window)
        rgb = np.zeros((3, *window.shape), np.uint8)
        valid = np.zeros(window.shape, bool)
        ys, xs = (
            range(start // px, -(-(start + size) // px))
            for start, size in ((row, window.height), (col, window.width))
        )
        keys = [(x, y) for y in ys for x in xs]
        with ThreadPoolExecutor(min(len(keys), web.REQUESTS_PER_HOST)) as pool:
            for (x, y), tile in zip(keys, pool.map(lambda key: self._tile(*key), keys), strict=True):
                if tile is None:
                    continue
                top, left = y * px - row, x * px - col
                here = np.s_[max(top, 0) : max(top + px, 0), max(left, 0) : max(left + px, 0)]
                inner = np.s_[max(-top, 0) : window.height - top, max(-left, 0) : window.width - left]
                rgb[:, *here], valid[here] = tile[0][:, *inner], tile[1][inner]
        # The note that grey files get, at the first window that shows something.
        if self._colour is None and valid.any() and rgb[0][valid].min() < rgb[0][valid].max():
            self._colour = not is_grey(rgb[:, valid], 255.0)
            if not self._colour:
                self._tell(GREY.format(self.name))
        return rgb, valid

    def _tell(self, note: str) -> None:
        self.notes.append(note)
        log.warning(note)  # whoever asked for `notes` at the start has missed it

    def _fetch(self, x: int, y: int) -> Tile | None:
        if self._turned:
            x = (x + 2**self.zoom // 2) % 2**self.zoom
        url, px, side = self.service.template, self.service.tile_px, 2 * HALF_WORLD_M / 2**self.zoom
        west, north = x * side - HALF_WORLD_M, HALF_WORLD_M - y * side
        values = {
            "z": self.zoom, "z:02": f"{self.zoom:02}", "x": x, "y": y, "-y": 2**self.zoom - 1 - y,
            "q": quadkey_at(y, x, self.zoom), "width": px, "height": px, "crs": _CRS, "proj": _CRS,
            "bbox": ",".join(f"{v:.8f}" for v in (west, north - side, west + side, north)),
        }  # fmt: skip
        for field, value in values.items():
            url = url.replace(f"{{{field}}}", str(value))
        where = f"web tile {self.zoom}/{x}/{y} of {self.name}"
        absent = (204, *self.service.absent_statuses)
        response = web.get(url, what=where, absent=absent)
        body = response.content
        if response.status_code in absent or not body:
            return None
        if hashlib.sha256(body).hexdigest() in self.service.placeholder_sha256:
            return None
        rgb, valid = decode_tile(body, self.service.tile_px, where, url)
        if (rgb == rgb[:, :1, :1]).all():
            if not self._blank:
                self._blank = f"{self.zoom}/{x}/{y}"
                self._tell(f"{self.name}: tiles of one colour, such as {self._blank}, are no image")
            return None
        if self._nodata is not None:
            valid = valid & ~(rgb == self._nodata).all(axis=0)
        return rgb, valid


def decode_tile(body: bytes, tile_px: int, where: str, url: str) -> Tile:
    """PNG, JPEG or WebP bytes -> uint8 RGB (3, px, px) and validity; grey and palettes become RGB.

    Raises:
        FetchError: not a picture, not 8 bits, or of another size than declared; repeats what a service says
            in XML or JSON in place of a picture.
    """
    if body.lstrip().startswith(_ERROR_TEXT):
        said = " ".join(re.sub(r"<[^>]*>", " ", redact(body[:4000].decode("utf-8", "replace"))).split())
        raise FetchError(f"{host_of(url)} sent an error in place of a picture: {said[:200]}", where=where)
    try:
        with Image.open(io.BytesIO(body), formats=("PNG", "JPEG", "WEBP")) as picture:
            mode, size = picture.mode, picture.size
            rgba = np.asarray(picture.convert("RGBA"))
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise FetchError(f"{host_of(url)} sent something that is no picture ({error})", where=where) from None
    if mode.startswith(("I", "F")) or size != (tile_px, tile_px):
        raise FetchError(
            f"{host_of(url)} sent {size[0]} x {size[1]} pixels of kind {mode}",
            where=where,
            expected=f"8 bits, {tile_px} x {tile_px}",
        )
    return np.ascontiguousarray(np.moveaxis(rgba[..., :3], -1, 0)), rgba[..., 3] > 0
