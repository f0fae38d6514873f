"""The two grids of a job: where the network predicts, and what the user gets.

Usually they are one. They differ where the user asks for another ground sample distance than the model's, or
for a grid in degrees: then heights are predicted on a metric grid at the model's ground sample distance and
resampled (see `regrid`), because a network only knows trees at the size it has learned.

So are the Web-Mercator pixels that divide every quadkey evenly: they shrink with the cosine of the latitude,
and heights on them are resampled from UTM.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from canopy.errors import AreaError, ConfigError, ImageryError
from canopy.geo.area import AOI
from canopy.geo.crs import METRES_PER_DEGREE, ground_crs, metres_per_unit, to_crs
from canopy.geo.grid import HALF_WORLD_M, WEB_MERCATOR, Grid

if TYPE_CHECKING:
    from odc.geo import CRS


# Within 5 % a model does not notice the scale of an image: its own grid can be used as it is.
SAME_SCALE = 0.05


@dataclass(frozen=True)
class Target:
    """Attributes:
    predict: north-up metric grid at the model's ground sample distance; the crop lattice lives on it.
    output: the grid of the map.
    whole: the grid that `predict` is a window of, where a map is made in parts; else None.
    """

    predict: Grid
    output: Grid
    whole: Grid | None = None

    @property
    def is_resampled(self) -> bool:
        return self.predict != self.output

    def reach(self, aoi: AOI) -> AOI:
        """The area that must be predicted for the output pixels inside `aoi`: two output pixels more."""
        around = 2 * max(self.predict.gsd_m, self.output.gsd_m) / metres_per_unit(self.predict.crs)
        geometry = aoi.to_crs(self.predict.crs).geometry.buffer(around + self.predict.pixel[0])
        return AOI(geometry, self.predict.crs, aoi.is_box)


def choose_target(
    aoi: AOI,
    model_gsd_m: float,
    *,
    gsd_m: float | None = None,
    crs: str | None = None,
    native: Grid | None = None,
    native_crs: CRS | None = None,
) -> Target:
    """The grids for an area.

    Args:
        aoi: what to map.
        model_gsd_m: ground metres per pixel that the model was trained at.
        gsd_m: ground metres per output pixel; the model's by default (with `crs="image"`, the image's).
        crs: `image`, `quadkey` (Web-Mercator pixels that quadkeys divide into), anything pyproj understands,
            or None for the area's UTM zone.
        native: grid of the image, where it is a single north-up one.
        native_crs: CRS of the imagery; kept by default if it is the area's UTM zone in another datum.

    Raises:
        ConfigError: an impossible `gsd_m`.
        InputError: a `crs` that places nothing on a map.
        ImageryError: `crs="image"` without a single image grid.
        AreaError: the area and the image do not meet.
    """
    _check_gsd(model_gsd_m if gsd_m is None else gsd_m)
    if crs == "image":
        return _on_image(aoi, model_gsd_m, gsd_m, native)
    if crs == "quadkey":
        return quadkey_target(aoi, model_gsd_m, gsd_m, native_crs)
    default = aoi.output_crs(native_crs)
    chosen = default if crs is None else ground_crs(crs, "--crs")
    if not chosen.projected:
        return _resampled(aoi, _degree_grid(aoi, chosen, gsd_m or model_gsd_m), model_gsd_m)
    if gsd_m is None or math.isclose(gsd_m, model_gsd_m, rel_tol=1e-6):
        grid = aoi.grid(chosen, model_gsd_m)
        return Target(grid, grid)
    return _resampled(aoi, aoi.grid(chosen, gsd_m), model_gsd_m)


def _check_gsd(gsd_m: float) -> None:
    if not (math.isfinite(gsd_m) and 0 < gsd_m <= 10_000):
        raise ConfigError(f"{gsd_m} is no ground sample distance", where="--gsd", expected="metres, above 0")


def _on_image(aoi: AOI, model_gsd_m: float, gsd_m: float | None, native: Grid | None) -> Target:
    if native is None:
        raise ImageryError(
            "the imagery has no single grid to keep",
            where="--crs image",
            expected="one image that is not turned, or tiles of one lattice",
            remedy="give a CRS such as EPSG:32633, or leave --crs out",
        )
    if gsd_m is not None and not math.isclose(gsd_m, native.gsd_m, rel_tol=1e-3):
        make = aoi.grid if native.crs.projected else partial(_degree_grid, aoi)
        return _resampled(aoi, make(native.crs, gsd_m), model_gsd_m)
    output = part_of(native, aoi.to_crs(native.crs).geometry.bounds, where=aoi.describe())
    x, y = native.pixel
    if (
        native.crs.projected
        and abs(native.gsd_m / model_gsd_m - 1) < SAME_SCALE
        and math.isclose(x, y, rel_tol=0.01)
    ):
        return Target(output, output)
    return _resampled(aoi, output, model_gsd_m)


def part_of(whole: Grid, bounds: Sequence[float], margin_px: int = 0, where: str | None = None) -> Grid:
    """The smallest window of `whole` that holds (west, south, east, north), and a margin, inside of it.

    Raises:
        AreaError: they do not meet.
    """
    over = whole.window_over(bounds).pad(margin_px)
    row, col = whole.offset_of(over)
    top, left = max(0, row), max(0, col)
    bottom, right = min(whole.height, row + over.height), min(whole.width, col + over.width)
    if bottom <= top or right <= left:
        raise AreaError("the area and the image do not overlap", where=where)
    return whole.window(top, left, bottom - top, right - left)


def _degree_grid(aoi: AOI, crs: CRS, gsd_m: float) -> Grid:
    """A grid of square pixels in degrees, `gsd_m` metres from north to south."""
    west, south, east, north = aoi.to_crs(crs).geometry.bounds
    if aoi.bounds_lonlat[0] > aoi.bounds_lonlat[2]:
        raise AreaError(
            "the area crosses the antimeridian, where a grid in degrees is torn",
            where=f"--crs {crs}",
            remedy="leave --crs out for the area's UTM zone",
        )
    return Grid.from_bounds((west, south, east, north), crs, gsd_m / METRES_PER_DEGREE)


def _resampled(aoi: AOI, output: Grid, model_gsd_m: float) -> Target:
    """Predict on a metric grid that covers `output` with two pixels to spare for interpolation."""
    metric = output.crs if output.crs.projected else aoi.output_crs()
    return Target(AOI.from_grid(output).grid(metric, model_gsd_m).pad(2), output)


# `--crs quadkey` is the grid of quadkeys, as `canopy map --grid quadkey` has it.
QUADKEY = "quadkey"
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
        ConfigError: an impossible `gsd_m`.
    """
    _check_gsd(gsd_m)
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


def quadkey_target(
    aoi: AOI, model_gsd_m: float, gsd_m: float | None = None, native_crs: CRS | None = None
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
