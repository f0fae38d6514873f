"""Where a region is predicted and mapped, and the work tiles that partition its map.

Tiles are squares of `tile_px` on the global lattice of the map's grid, clipped to the region. On the grid of
quadkeys `tile_px` is a power of two, and every tile lies in exactly one quadkey, whose name it has.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import shapely
from odc.geo import CRS

from canopy.errors import AreaError, ConfigError
from canopy.geo.area import AOI
from canopy.geo.crs import to_crs, utm_crs
from canopy.geo.grid import HALF_WORLD_M, Grid, quadkey_at
from canopy.inference.inputs import Target, choose_target, part_of
from canopy.inference.quadkey import MARGIN_PX, one_zone, predict_grid_for, quadkey_output

# A UTM tile of zoom 10 is a square of this side, about what a quadkey of zoom 10 is at the equator.
UTM_ZOOM_10_M = 40_960.0
LEAST_TILE_PX = 16
TILES = "tiles"


def tile_path(folder: Path, tile_id: str) -> Path:
    """Where a tile's map lies in a run's folder."""
    return folder / TILES / f"{tile_id}.tif"


@dataclass(frozen=True)
class Tile:
    """One unit of work: `ordinal` counts the region's tiles, (row, col) is its place on the tile lattice."""

    ordinal: int
    id: str
    row: int
    col: int
    km2: float = 0.0


@dataclass(frozen=True)
class Tiling:
    """How a region is cut.

    Attributes:
        kind: `quadkey` or `utm` (squares of any projected CRS).
        area: the grid of the whole map; tiles partition it.
        tile_px: side of a tile that is not clipped.
    """

    kind: str
    area: Grid
    tile_px: int

    @property
    def quadkey_zoom(self) -> int:
        """Zoom of the quadkeys that are the tiles (kind `quadkey`)."""
        world_px = 2 * HALF_WORLD_M / self.area.pixel[0]
        return round(math.log2(world_px / self.tile_px))

    def offset(self, row: int, col: int) -> tuple[int, int, int, int]:
        """(row, col, height, width) of a tile in the map of the region, in pixels."""
        row0, col0 = self.area.origin_rc
        top, left = max(row * self.tile_px - row0, 0), max(col * self.tile_px - col0, 0)
        bottom = min((row + 1) * self.tile_px - row0, self.area.height)
        right = min((col + 1) * self.tile_px - col0, self.area.width)
        return top, left, bottom - top, right - left

    def window(self, row: int, col: int) -> Grid:
        """The pixels that a tile writes."""
        return self.area.window(*self.offset(row, col))

    def name(self, row: int, col: int) -> str:
        """A tile's id: its quadkey, or the CRS and its place on the tile lattice."""
        if self.kind != "quadkey":
            return f"{self.area.crs.epsg or 'grid'}_r{row}_c{col}"
        zoom = self.quadkey_zoom
        half = 1 << zoom >> 1
        return quadkey_at(row + half, col + half, zoom)

    def tiles(self, aoi: AOI) -> Iterator[Tile]:
        """The tiles that share ground with the area, from north-west to south-east."""
        shape = None if aoi.is_box else aoi.to_crs(self.area.crs).geometry
        shapely.prepare(shape)
        rows, cols = (
            range(first // self.tile_px, -(-(first + length) // self.tile_px))
            for first, length in zip(self.area.origin_rc, self.area.shape, strict=True)
        )
        ordinal = 0
        for row in rows:
            pixel_km2 = self.window(row, cols[len(cols) // 2]).gsd_m ** 2 / 1e6
            for col in cols:
                window = self.window(row, col)
                if shape is None or shape.intersects(shapely.box(*window.bounds)):
                    km2 = pixel_km2 * window.height * window.width
                    yield Tile(ordinal, self.name(row, col), row, col, km2)
                    ordinal += 1


def side_px(kind: str, pixel_m: float, zoom: int, most_px: int) -> int:
    """Side of a work tile: that of `zoom`, halved until it is at most `most_px`.

    Args:
        kind: `quadkey` or `utm`.
        pixel_m: the map's pixel, metres of its CRS (for quadkeys the world divided by a power of two).
        zoom: zoom of the tiles that were asked for; each step halves the side.
        most_px: what one task may take on; a power of two.

    Raises:
        ConfigError: tiles without pixels.
    """
    if kind == "quadkey":
        side = float(round(2 * HALF_WORLD_M / pixel_m / (1 << zoom)))
    else:
        side = UTM_ZOOM_10_M / pixel_m / 2.0 ** (zoom - 10)
    while side > most_px:
        side /= 2
    if side < LEAST_TILE_PX:
        raise ConfigError(
            f"zoom {zoom} makes tiles of {side:.0f} px", where="--zoom",
            expected=f"at least {LEAST_TILE_PX} px at this ground sample distance",
        )  # fmt: skip
    return round(side)


@dataclass(frozen=True)
class Lattices:
    """Where a run predicts and what it maps, for every tile alike.

    Attributes:
        output: the grid of the whole map.
        predict: the grid of the whole prediction; None where every tile takes the UTM zone of its middle.
        gsd_m: of the model.
    """

    output: Grid
    predict: Grid | None
    gsd_m: float

    def target(self, window: Grid) -> Target:
        """The grids of one tile, cut from those of the whole."""
        if self.predict == self.output:
            return Target(window, window)
        zone = utm_crs(*AOI.from_grid(window).centroid_lonlat)
        whole = self.predict or _zone_grid(zone, self.gsd_m, self.output)
        margin = MARGIN_PX + 2 * math.ceil(window.gsd_m / self.gsd_m)
        bounds = AOI.from_grid(window).to_crs(whole.crs).geometry.bounds
        return Target(part_of(whole, bounds, margin), window)


@lru_cache(maxsize=64)
def _zone_grid(crs: CRS, gsd_m: float, output: Grid) -> Grid:
    """A grid over all that a UTM zone may have to serve of a map."""
    west, south, east, north = AOI.from_grid(output).bounds_lonlat
    middle = 6.0 * (int(str(crs.epsg)[-2:]) - 1) - 177.0
    strip = shapely.box(max(west, middle - 4.5), south, min(east, middle + 4.5), north)
    bounds = AOI(strip, to_crs("EPSG:4326"), is_box=True).to_crs(crs).geometry.bounds
    return Grid.from_bounds(bounds, crs, gsd_m).pad(64)


def choose_lattices(
    kind: str, aoi: AOI, model_gsd_m: float, *, gsd_m: float | None, crs: str | None, native_crs: CRS
) -> Lattices:
    """The grids of a run; see `Lattices`.

    Args:
        kind: `quadkey` or `utm`.
        gsd_m, crs: of the map, as the user has them; None: the model's, and the area's UTM zone.
        native_crs: of the imagery.

    Raises:
        AreaError: an area that the grid cannot hold. ConfigError: options that do not go together.
    """
    if kind == "quadkey":
        if crs not in (None, "quadkey"):
            raise ConfigError(
                f"--crs {crs} with --grid quadkey", expected="EPSG:3857, which quadkeys have",
                remedy="leave --crs out, or add --grid utm",
            )  # fmt: skip
        output = quadkey_output(aoi, gsd_m or model_gsd_m)
        zone = one_zone(aoi, native_crs)
        return Lattices(output, predict_grid_for(output, zone, model_gsd_m) if zone else None, model_gsd_m)
    if crs in ("image", "quadkey"):
        raise ConfigError(f"--crs {crs} with --grid utm", expected="a projected CRS, or none")
    if crs is None and one_zone(aoi, native_crs) is None:
        raise AreaError(
            "the area is too wide for one UTM zone", where=aoi.describe(),
            remedy="use --grid quadkey, or --crs with a projected CRS made for all of it",
        )  # fmt: skip
    target = choose_target(aoi, model_gsd_m, gsd_m=gsd_m, crs=crs, native_crs=native_crs)
    if not target.output.crs.projected:
        raise ConfigError(f"--crs {crs} with --grid utm", expected="a projected CRS")
    return Lattices(target.output, target.predict, model_gsd_m)
