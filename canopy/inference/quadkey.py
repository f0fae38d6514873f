"""The grid of quadkeys: Web-Mercator pixels that divide every one of them; and the UTM zone to predict in.

They shrink with the cosine of the latitude, so heights are predicted in metres and resampled to them.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from canopy.errors import AreaError
from canopy.geo.area import AOI
from canopy.geo.crs import to_crs
from canopy.geo.grid import HALF_WORLD_M, WEB_MERCATOR, Grid

if TYPE_CHECKING:
    from odc.geo import CRS


# Predicted pixels around what is resampled from them.
MARGIN_PX = 16
# A zone's own scale is right to 0.1 % within its six degrees; up to here an area may keep one zone.
MOST_STRETCH = 0.015
_WORLD_PX_LEVELS = range(12, 31)


def quadkey_pixel(gsd_m: float, lat: float) -> float:
    """Side, EPSG:3857 metres, of the pixel that is nearest to `gsd_m` on the ground at a latitude.

    A power of two of such pixels fits around the world, so that every quadkey holds whole ones.
    """
    exact = math.log2(2 * HALF_WORLD_M * math.cos(math.radians(lat)) / gsd_m)
    return 2 * HALF_WORLD_M / 2 ** min(max(round(exact), _WORLD_PX_LEVELS.start), _WORLD_PX_LEVELS.stop - 1)


def quadkey_output(
    aoi: AOI, gsd_m: float, option: str = "--grid quadkey", instead: str = "use --grid utm"
) -> Grid:
    """The grid of an area's map: the nearest pixel that quadkeys divide into, on their lattice.

    `option` is what asks for it in the caller's command, and `instead` what does not, for messages.

    Raises:
        AreaError: beyond Web Mercator's latitudes, or across the antimeridian.
    """
    west, south, east, north = aoi.bounds_lonlat
    if west > east:
        raise AreaError(
            "the area crosses the antimeridian, where Web Mercator is torn",
            where=option,
            remedy=f"map both sides on their own, or {instead}",
        )
    if max(abs(south), abs(north)) > 85.05:
        raise AreaError("the area reaches beyond 85.05 degrees", where=option, remedy=instead)
    pixel = quadkey_pixel(gsd_m, aoi.centroid_lonlat[1])
    return Grid.from_bounds(aoi.to_crs(WEB_MERCATOR).geometry.bounds, to_crs(WEB_MERCATOR), pixel)


def one_zone(aoi: AOI, native_crs: CRS | None = None) -> CRS | None:
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


def predict_grid_for(output: Grid, crs: CRS, gsd_m: float) -> Grid:
    """The pixels to predict for a map's window: on the lattice of `crs` at `gsd_m`, with a margin."""
    bounds = AOI.from_grid(output).to_crs(crs).geometry.bounds
    return Grid.from_bounds(bounds, crs, gsd_m).pad(MARGIN_PX)
