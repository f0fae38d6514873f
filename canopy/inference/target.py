"""The two grids of a job: where the network predicts, and what the user gets.

Usually they are one. They differ where the user asks for another ground sample distance than the model's, or
for a grid in degrees: then heights are predicted on a metric grid at the model's ground sample distance and
resampled (see `regrid`), because a network only knows trees at the size it has learned.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from canopy.errors import AreaError, ConfigError, ImageryError
from canopy.geo.aoi import AOI
from canopy.geo.crs import METRES_PER_DEGREE, ground_crs, metres_per_unit
from canopy.geo.grid import Grid

if TYPE_CHECKING:
    from odc.geo import CRS

# Within 5 % a model does not notice the scale of an image: its own grid can be used as it is.
SAME_SCALE = 0.05
# Coarser images hold less detail than the model expects; finer ones only cost reading.
COARSEST = 1.5
HOPELESS = 6  # at 3 m a crown is a pixel or two


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
    if gsd_m is not None and not (math.isfinite(gsd_m) and 0 < gsd_m <= 10_000):
        raise ConfigError(f"{gsd_m} is no ground sample distance", where="--gsd", expected="metres, above 0")
    if crs == "image":
        return _on_image(aoi, model_gsd_m, gsd_m, native)
    if crs == "quadkey":
        from canopy.inference.mercator import quadkey_target

        return quadkey_target(aoi, model_gsd_m, gsd_m, native_crs)
    default = aoi.output_crs(native_crs)
    chosen = default if crs is None else ground_crs(crs, "--crs")
    if not chosen.projected:
        return _resampled(aoi, _degree_grid(aoi, chosen, gsd_m or model_gsd_m), model_gsd_m)
    if gsd_m is None or math.isclose(gsd_m, model_gsd_m, rel_tol=1e-6):
        grid = aoi.grid(chosen, model_gsd_m)
        return Target(grid, grid)
    return _resampled(aoi, aoi.grid(chosen, gsd_m), model_gsd_m)


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
    output = _part_of(native, aoi)
    x, y = native.pixel
    if (
        native.crs.projected
        and abs(native.gsd_m / model_gsd_m - 1) < SAME_SCALE
        and math.isclose(x, y, rel_tol=0.01)
    ):
        return Target(output, output)
    return _resampled(aoi, output, model_gsd_m)


def _part_of(native: Grid, aoi: AOI) -> Grid:
    """The smallest window of `native` that holds the area; inside the image."""
    bounds = aoi.to_crs(native.crs).geometry.bounds
    corners = [native.rowcol(x, y) for x in bounds[0::2] for y in bounds[1::2]]
    # A hair of tolerance: an area that was made from this very grid must not gain a row by rounding.
    top, left = (max(0, math.floor(min(values) + 1e-6)) for values in zip(*corners, strict=True))
    bottom, right = (
        min(limit, math.ceil(max(values) - 1e-6))
        for values, limit in zip(zip(*corners, strict=True), native.shape, strict=True)
    )
    if bottom <= top or right <= left:
        raise AreaError("the area and the image do not overlap", where=aoi.describe())
    return native.window(top, left, bottom - top, right - left)


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


def scale_notes(native_gsd_m: float, model_gsd_m: float) -> list[str]:
    """A warning where the imagery is coarser than what the model has learned on."""
    if native_gsd_m <= COARSEST * model_gsd_m:
        return []
    what = (
        "nothing of a tree is left to see, and heights will mean nothing"
        if native_gsd_m > HOPELESS * model_gsd_m
        else "heights will be less certain and less sharp than the model's card says"
    )
    return [
        f"the imagery has {native_gsd_m:.2g} m pixels and the model expects {model_gsd_m:.2g} m: "
        f"it is enlarged, and {what}"
    ]
