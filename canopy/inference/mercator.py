"""The grid of quadkeys: Web-Mercator pixels that divide every quadkey evenly, and heights on them.

A Web-Mercator pixel shrinks with the cosine of the latitude, and a network only knows trees at the size it
has learned. Heights are therefore predicted at the model's own ground sample distance, in UTM, and resampled.
"""

from __future__ import annotations

import math

from canopy.errors import AreaError, ConfigError
from canopy.geo.aoi import AOI
from canopy.geo.crs import to_crs, utm_crs
from canopy.geo.grid import Grid
from canopy.geo.tiles import HALF_WORLD_M, WEB_MERCATOR
from canopy.inference.target import Target

# `--crs quadkey` is the grid of quadkeys, as `canopy map --grid quadkey` has it.
QUADKEY = "quadkey"
# Predicted pixels around what is resampled from them.
MARGIN_PX = 16
# A zone's own scale is right to 0.1 % within its six degrees; up to here an area may keep one zone.
MOST_STRETCH = 0.015
_WORLD_PX_LEVELS = range(12, 31)


def pixel_level(gsd_m: float, lat: float) -> int:
    """n of the pixel 2 * HALF_WORLD_M / 2**n whose ground size at a latitude is nearest to `gsd_m`."""
    exact = math.log2(2 * HALF_WORLD_M * math.cos(math.radians(lat)) / gsd_m)
    return min(max(round(exact), _WORLD_PX_LEVELS.start), _WORLD_PX_LEVELS.stop - 1)


def pixel_at(level: int) -> float:
    """Side of a pixel, EPSG:3857 metres, when the world is 2**level pixels wide."""
    return 2 * HALF_WORLD_M / (1 << level)


def quadkey_output(
    aoi: AOI, gsd_m: float, option: str = "--grid quadkey", instead: str = "use --grid utm"
) -> Grid:
    """The grid of an area's map: the nearest pixel that quadkeys divide into, on their lattice.

    `option` is what asks for it in the caller's command, and `instead` what does not, for messages.

    Raises:
        AreaError: beyond Web Mercator's latitudes, or across the antimeridian.
        ConfigError: an impossible `gsd_m`.
    """
    if not (math.isfinite(gsd_m) and 0 < gsd_m <= 10_000):
        raise ConfigError(f"{gsd_m} is no ground sample distance", where="--gsd", expected="metres, above 0")
    west, south, east, north = aoi.bounds_lonlat
    if west > east:
        raise AreaError(
            "the area crosses the antimeridian, where Web Mercator is torn",
            where=option,
            remedy=f"map both sides on their own, or {instead}",
        )
    if max(abs(south), abs(north)) > 85.05:
        raise AreaError("the area reaches beyond 85.05 degrees", where=option, remedy=instead)
    pixel = pixel_at(pixel_level(gsd_m, aoi.centroid_lonlat[1]))
    return Grid.from_bounds(aoi.to_crs(WEB_MERCATOR).geometry.bounds, to_crs(WEB_MERCATOR), pixel)


def one_zone(aoi: AOI, native_crs: object = None):  # type: ignore[no-untyped-def]  # -> CRS | None
    """The UTM zone that can serve the whole area without stretching it by more than 1.5 %, or None."""
    crs = aoi.output_crs(native_crs)
    west, _, east, _ = aoi.bounds_lonlat
    try:
        bounds = aoi.to_crs(crs).geometry.bounds
        size = max(bounds[2] - bounds[0], bounds[3] - bounds[1])
        if east < west or size > 2_500_000:
            return None
        corners = [(bounds[i], bounds[j]) for i in (0, 2) for j in (1, 3)]
        nominal = [Grid.of(crs, (1.0, 0, x, 0, -1.0, y), (1, 1)).gsd_m for x, y in corners]
    except (AreaError, ValueError):
        return None
    return crs if all(abs(gsd - 1) <= MOST_STRETCH for gsd in nominal) else None


def predict_grid_for(output: Grid, crs: object, gsd_m: float) -> Grid:
    """The pixels to predict for a map's window: on the lattice of `crs` at `gsd_m`, with a margin."""
    bounds = AOI.from_grid(output).to_crs(crs).geometry.bounds
    return Grid.from_bounds(bounds, crs, gsd_m).pad(MARGIN_PX)


def quadkey_target(
    aoi: AOI, model_gsd_m: float, gsd_m: float | None = None, native_crs: object = None
) -> Target:
    """Both grids of an area's map on the grid of quadkeys.

    Raises:
        AreaError: an area that one UTM zone cannot serve; `canopy map` takes a zone for each tile.
    """
    option = f"--crs {QUADKEY}"
    output = quadkey_output(aoi, gsd_m or model_gsd_m, option, "leave --crs out for the area's UTM zone")
    crs = one_zone(aoi, native_crs)
    if crs is None:
        raise AreaError(
            "the area is too wide to be predicted in one UTM zone",
            where=option,
            remedy="use canopy map, which takes a zone for each tile",
        )
    return Target(predict_grid_for(output, crs, model_gsd_m), output)


def zone_of(output: Grid):  # type: ignore[no-untyped-def]  # -> CRS
    """The UTM zone of the middle of a window."""
    return utm_crs(*AOI.from_grid(output).centroid_lonlat)
