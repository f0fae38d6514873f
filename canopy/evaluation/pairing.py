"""Two maps, whatever their grids: the one grid they are compared on, and its windows."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from canopy.errors import ConfigError, InputError
from canopy.evaluation.gather import pixel_areas_m2
from canopy.evaluation.products import HeightProduct, HeightWindow, check_overlap
from canopy.geo.aoi import AOI
from canopy.geo.crs import to_crs
from canopy.geo.grid import Grid
from canopy.geo.tiles import tiles_over
from canopy.runtime import NoProgress, Progress

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
