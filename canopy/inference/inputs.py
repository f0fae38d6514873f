"""What a map is made of, checked and opened: imagery, model, runtime, bands, and the two grids.

The network predicts on one grid and the user gets another. Usually they are one. They differ where the user
asks for another ground sample distance than the model's, or for a grid in degrees or of quadkeys: then
heights are predicted on a metric grid at the model's ground sample distance and resampled (see `regrid`),
because a network only knows trees at the size it has learned.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from canopy.errors import AreaError, ConfigError, ImageryError, InputError
from canopy.geo.area import AOI
from canopy.geo.crs import METRES_PER_DEGREE, ground_crs, metres_per_unit
from canopy.geo.grid import Grid
from canopy.inference.backends import Choice, settle
from canopy.inference.engine import resolve_batch
from canopy.inference.layers import Extras, extras_of
from canopy.inference.output import check_encoding
from canopy.inference.quadkey import one_zone, predict_grid_for, quadkey_output
from canopy.models.height import parse_radiometry
from canopy.runtime import check_device, log

if TYPE_CHECKING:
    import xarray as xr
    from odc.geo import CRS

    from canopy.imagery.base import ImagerySource
    from canopy.inference.options import PredictOptions
    from canopy.models.height import HeightModel

# Coarser images hold less detail than the model expects; finer ones only cost reading.
COARSEST = 1.5
HOPELESS = 6  # at 3 m a crown is a pixel or two
# Within 5 % a model does not notice the scale of an image: its own grid can be used as it is.
SAME_SCALE = 0.05


@dataclass(frozen=True)
class Inputs:
    """What is needed beside a grid, for one map and for all tiles of a region alike.

    Attributes:
        choice: the runtime that carries the model.
        radiometry: the stretch in the model, for tags; `none` without.
        notes: warnings for the user.
    """

    options: PredictOptions
    aoi: AOI
    source: ImagerySource
    model: HeightModel
    model_name: str
    extras: Extras
    choice: Choice
    radiometry: str
    notes: tuple[str, ...]

    @property
    def licence(self) -> str:
        """Of the model, as its card says."""
        return str(self.model.card.get("licence", ""))


def check_options(options: PredictOptions) -> None:
    """Refuse what can be known to be wrong before a model is fetched for it."""
    check_encoding(options.encoding, options.date_band)
    parse_radiometry(options.radiometry)
    check_device(options.device)
    resolve_batch(options.batch_size, "cpu")
    if options.gsd is not None and not 0 < options.gsd <= 10_000:
        raise ConfigError(
            f"{options.gsd} is no ground sample distance", where="--gsd", expected="metres, above 0"
        )


def open_inputs(
    options: PredictOptions,
    *,
    area: AOI | None = None,
    model: HeightModel | None = None,
    opener: Callable[[float, AOI | None], tuple[ImagerySource, bool]],
    settled: Mapping[str, str] | None = None,
) -> Inputs:
    """Open and settle all that a map needs; nothing is written.

    Args:
        area, model: stand in for those that the options name.
        opener: opens the imagery, for the model's ground sample distance and the area; and says whether it
            is that of the whole area.
        settled: `backend`, `precision` and `radiometry`, in place of what the options leave open.

    Raises:
        InputError (and its kinds): whatever in the options cannot be done, in one line.
    """
    from canopy.models.registry import load_model

    check_options(options)
    area = area or options.area()
    network = model or load_model(options.model)
    name = str(network.card.get("name") or ("unnamed" if model else Path(options.model).name))
    gsd_m = network.config.gsd_m
    source, whole = opener(gsd_m, area)
    aoi = area or source.area()
    if aoi is None:
        raise AreaError(
            "which area?",
            where=source.name,
            expected="--bbox, --bounds or --aoi with imagery of unknown extent",
        )
    notes = _coverage_notes(source, aoi) if whole else []
    how = {"backend": options.backend, "precision": options.precision, "radiometry": options.radiometry}
    how |= settled or {}
    extras = extras_of(options, network, aoi)
    choice = settle(network, how["backend"], how["precision"], options.device)
    notes += [*scale_notes(source.native_gsd_m, gsd_m), *choice.notes]
    radiometry = "none"
    if how["radiometry"] != "none":
        from canopy.inference.radiometry import with_radiometry

        network, radiometry, more = with_radiometry(network, source, aoi, how["radiometry"])
        notes += more
    return Inputs(options, aoi, source, network, name, extras, choice, radiometry, tuple(notes))


def open_source(
    options: PredictOptions, gsd_m: float, area: AOI | None, array: xr.DataArray | None = None
) -> ImagerySource:
    """The imagery, to be read at `gsd_m`: an array, files, a named source or address, or the best known."""
    from canopy.imagery.open import open_imagery

    if options.images and options.imagery:
        raise InputError("images and --imagery", expected="one of them", remedy="leave one of them out")
    what: Any = array if array is not None else options.imagery or options.images or _best_for(area)
    return open_imagery(
        what[0] if isinstance(what, tuple) and len(what) == 1 else what,
        area=area,
        bands=options.bands,
        nodata=options.nodata,
        crs=options.input_crs,
        scale=options.scale,
        datetime=options.datetime,
        gsd_m=gsd_m,
        on_damaged=options.on_damaged,
        # One CRS was named: for images that carry none it cannot have been meant for the map alone.
        fallback_crs=None if options.crs in ("image", "quadkey") else options.crs,
    )


def _best_for(area: AOI | None) -> str:
    """Name of the best known source that covers an area; says which it is."""
    from canopy.imagery.base import SWAP_HINT, swapped_area
    from canopy.imagery.named import sources_for

    if area is None:
        raise InputError(
            "neither an image nor an area",
            expected="IMAGE files, --imagery NAME, or an area for which a source is known",
            remedy="see canopy predict --help",
        )
    found = sources_for(area)
    if not found:
        swapped = swapped_area(area)
        other = bool(swapped and sources_for(swapped))
        raise AreaError(
            "no named source covers the area",
            where=area.describe(),
            remedy=SWAP_HINT
            if other
            else "give IMAGE files, or --imagery with a STAC catalog or a tile template",
        )
    best, others = found[0], ", ".join(source.name for source in found[1:])
    facts = [best.licence, best.season or "season unknown", f"{best.gsd_m:g} m"]
    log.info(
        f"imagery: {best.name} ({best.title}): {', '.join(facts)}"
        + (f"; by licence, leaves and pixel size before {others}" if others else "")
    )
    return best.name


def _coverage_notes(source: ImagerySource, aoi: AOI) -> list[str]:
    """Warnings about imagery that does not reach everywhere; AreaError where there is none at all."""
    from canopy.imagery.base import check_coverage

    check_coverage(source, aoi)
    notes = list(source.notes)
    if not source.covers(aoi):
        notes.append("the imagery covers only part of the area; the rest becomes nodata")
    return notes


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


# ---- grids ------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Target:
    """Attributes:
    predict: north-up metric grid at the model's ground sample distance; the crop lattice lives on it.
    output: the grid of the map.
    """

    predict: Grid
    output: Grid

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
        InputError: a `crs` that places nothing on a map.
        ImageryError: `crs="image"` without a single image grid.
        AreaError: the area and the image do not meet.
    """
    if crs == "image":
        return _on_image(aoi, model_gsd_m, gsd_m, native)
    if crs == "quadkey":
        leave = "leave --crs out for the area's UTM zone"
        output = quadkey_output(aoi, gsd_m or model_gsd_m, "--crs quadkey", leave)
        zone = one_zone(aoi, native_crs)
        if zone is None:
            raise AreaError(
                "the area is too wide to be predicted in one UTM zone", where="--crs quadkey",
                remedy="use canopy map, which takes a zone for each tile",
            )  # fmt: skip
        return Target(predict_grid_for(output, zone, model_gsd_m), output)
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
