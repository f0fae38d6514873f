"""From settings to a pinned run: everything opened and checked once, nothing written yet."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from functools import lru_cache
from typing import TYPE_CHECKING

from shapely.geometry import Point, Polygon, box

from canopy.errors import AreaError, ConfigError
from canopy.geo.aoi import AOI
from canopy.geo.crs import metres_per_unit, to_crs
from canopy.geo.grid import Grid
from canopy.inference.backends.choose import Choice, settle
from canopy.inference.extras import Extras, extras_of
from canopy.inference.mercator import MARGIN_PX, one_zone, predict_grid_for, quadkey_output, zone_of
from canopy.inference.region.pins import Pins, absolute, area_pin, imagery_fingerprint, stamp
from canopy.inference.region.settings import RegionSettings
from canopy.inference.region.tiling import Tiling, side_px
from canopy.inference.request import Request
from canopy.inference.target import Target, choose_target, scale_notes

if TYPE_CHECKING:
    from canopy.models.height import HeightModel
    from canopy.sources.imagery import ImagerySource


# Tiles along a side of the square for which imagery is opened where the whole is too much for one mosaic.
CELL_TILES = 8
PLACE_M = 2000.0


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
        whole = self.predict or _zone_grid(zone_of(window), self.gsd_m, self.output)
        margin = MARGIN_PX + 2 * math.ceil(window.gsd_m / self.gsd_m)
        bounds = AOI.from_grid(window).to_crs(whole.crs).geometry.bounds
        top, left = (math.floor(v) - margin for v in whole.rowcol(bounds[0], bounds[3]))
        bottom, right = (math.ceil(v) + margin for v in whole.rowcol(bounds[2], bounds[1]))
        top, left = max(0, top), max(0, left)
        height, width = min(whole.height, bottom) - top, min(whole.width, right) - left
        return Target(whole.window(top, left, height, width), window, whole)


@lru_cache(maxsize=64)
def _zone_grid(crs, gsd_m: float, output: Grid) -> Grid:  # type: ignore[no-untyped-def]
    """A grid over all that a UTM zone may have to serve of a map."""
    west, south, east, north = AOI.from_grid(output).bounds_lonlat
    middle = 6.0 * (int(str(crs.epsg)[-2:]) - 1) - 177.0
    strip = box(max(west, middle - 4.5), south, min(east, middle + 4.5), north)
    bounds = AOI(strip, to_crs("EPSG:4326"), is_box=True).to_crs(crs).geometry.bounds
    return Grid.from_bounds(bounds, crs, gsd_m).pad(64)


@dataclass(frozen=True)
class Prepared:
    """A checked region: what `open_region` found.

    `cells`: imagery of more items than one mosaic may have is opened for squares of so many tiles a side, and
    `source` then is that of one place in the area; None: `source` is all of it.
    """

    settings: RegionSettings
    pins: Pins
    aoi: AOI
    source: ImagerySource
    model: HeightModel
    model_name: str
    lattices: Lattices
    tiling: Tiling
    radiometry: str
    extras: Extras
    cells: int | None = None
    notes: list[str] = field(default_factory=list)
    choice: Choice = field(default_factory=Choice)

    @property
    def bands(self) -> tuple[tuple[str, str], ...]:
        """Names and units of the map's bands, in order."""
        return self.extras.bands

    @property
    def request(self) -> Request:
        return request_of(self.settings, self.aoi)


def request_of(settings: RegionSettings, aoi: AOI | None) -> Request:
    """The same wish as one prediction, for what both have in common."""
    return Request(
        images=settings.images,
        imagery=settings.imagery,
        area=aoi,
        model=settings.model,
        gsd=settings.gsd,
        crs=settings.crs,
        input_crs=settings.input_crs,
        device=settings.device,
        backend=settings.backend,
        precision=settings.precision,
        batch_size=settings.batch_size,
        workers=settings.readers,
        datetime=settings.datetime,
        bands=settings.bands,
        nodata=settings.nodata,
        scale=settings.scale,
        encoding=settings.encoding,
        date_band=settings.date_band,
        interval=settings.interval,
        quality_band=settings.quality_band,
        radiometry=settings.radiometry,
    )


def open_region(settings: RegionSettings, aoi: AOI | None = None) -> Prepared:
    """Open model and imagery, settle the grids, and say what a run of these settings is pinned to.

    Args:
        settings: what is asked.
        aoi: the area, where it is pinned already.

    Raises:
        InputError (and its kinds): whatever cannot be done as asked.
    """
    from canopy.inference.forward import resolve_batch
    from canopy.inference.job import coverage_notes, load_named
    from canopy.inference.output import check_encoding
    from canopy.inference.radiometry import with_radiometry
    from canopy.models.radiometry import parse_radiometry
    from canopy.models.registry import EMBEDDED
    from canopy.runtime import check_device
    from canopy.sources.manifest import known_names

    check_encoding(settings.encoding, settings.date_band)
    check_device(settings.device)  # that of a worker, which need not be here
    resolve_batch(settings.batch_size, "cpu")  # what is no number is told now, not for every tile
    parse_radiometry(settings.radiometry)
    aoi = aoi or settings.area()
    names = known_names()
    settings = settings.model_copy(
        update={
            "images": tuple(absolute(name, names) for name in settings.images),
            "imagery": absolute(settings.imagery, names) if settings.imagery else None,
            "model": absolute(settings.model, list(EMBEDDED)),
        }
    )
    model, model_name = load_named(settings.model)
    source, cells = _open_imagery(settings, aoi, model.config.gsd_m)
    aoi = aoi or source.area()
    if aoi is None:
        raise AreaError("which area?", where=source.name, expected="--bbox, --bounds or --aoi")
    if not settings.images and settings.imagery is None:
        settings = settings.model_copy(update={"imagery": source.name})
    notes = [] if cells else coverage_notes(source, aoi)
    notes += scale_notes(source.native_gsd_m, model.config.gsd_m)
    extras = extras_of(request_of(settings, aoi), model)
    choice = settle(model, settings.backend, settings.precision, settings.device)
    notes += [*choice.notes, *_device_notes(settings, choice)]
    model, radiometry, more = with_radiometry(model, source, aoi, settings.radiometry)
    if radiometry != "none":  # measured once, here; the workers are told the numbers
        settings = settings.model_copy(update={"radiometry": radiometry.replace(" -> ", ",")})
    lattices = choose_lattices(settings, aoi, model.config.gsd_m, source)
    pixel_m = lattices.output.pixel[0] * metres_per_unit(lattices.output.crs)
    side = side_px(settings.grid, pixel_m, settings.zoom, settings.tile_px)
    tiling = Tiling(settings.grid, lattices.output, side)
    threads = settings.threads or default_threads()
    settings = settings.model_copy(update={"threads": threads, **choice.names})
    pins = _pins(settings, aoi, source, model, model_name, lattices, tiling)
    pins["map"]["int8"] = choice.quantised_sha256 or None
    pins["imagery"]["cells"] = cells
    if cells:
        notes.append(f"more images than one mosaic may have: opened for {cells} x {cells} tiles at a time")
    return Prepared(
        settings,
        pins,
        aoi,
        source,
        model,
        model_name,
        lattices,
        tiling,
        radiometry,
        extras,
        cells,
        notes + more,
        choice,
    )


def _device_notes(settings: RegionSettings, choice: Choice) -> list[str]:
    """What workers elsewhere will not do by themselves."""
    if settings.scheduler == "local" or choice.backend.startswith("torch") or settings.device != "auto":
        return []
    return [f"the workers will use {choice.backend} on their processors; for GPUs give --device cuda"]


def _open_imagery(
    settings: RegionSettings, aoi: AOI | None, gsd_m: float
) -> tuple[ImagerySource, int | None]:
    """The imagery of the whole area, or that of one place in it where there is too much for one mosaic.

    Raises:
        InputError: as `open_source`; with `--radiometry match`, which has to measure all of it.
    """
    from canopy.inference.job import open_source
    from canopy.sources.stac import TooManyItemsError

    try:
        return open_source(request_of(settings, aoi), gsd_m), None
    except TooManyItemsError:
        measures = settings.radiometry != "none" and settings.radiometry.count(",") != 11
        if aoi is None or measures:
            raise
    outline = aoi.lonlat
    places = (
        [outline.representative_point(), outline.centroid, *map(Point, outline.exterior.coords[:8])]
        if (isinstance(outline, Polygon))
        else [outline.representative_point()]
    )
    for place in places:
        try:
            here = AOI.from_bbox((place.y, place.x), PLACE_M)
            return open_source(request_of(settings, here), gsd_m), CELL_TILES
        except AreaError:
            continue
    raise AreaError("no imagery at the places that were tried", where=aoi.describe())


def default_threads() -> int:
    """Threads of a network on this machine's CPU, as `canopy predict` has them here."""
    import torch

    return int(torch.get_num_threads())


def choose_lattices(
    settings: RegionSettings, aoi: AOI, model_gsd_m: float, source: ImagerySource
) -> Lattices:
    """The grids of a run; see `Lattices`.

    Raises:
        AreaError: an area that the grid cannot hold. ConfigError: options that do not go together.
    """
    if settings.grid == "quadkey":
        if settings.crs not in (None, "quadkey"):
            raise ConfigError(
                f"--crs {settings.crs} with --grid quadkey", expected="EPSG:3857, which quadkeys have",
                remedy="leave --crs out, or add --grid utm",
            )  # fmt: skip
        output = quadkey_output(aoi, settings.gsd or model_gsd_m)
        zone = one_zone(aoi, source.native_crs)
        return Lattices(output, predict_grid_for(output, zone, model_gsd_m) if zone else None, model_gsd_m)
    if settings.crs in ("image", "quadkey"):
        raise ConfigError(f"--crs {settings.crs} with --grid utm", expected="a projected CRS, or none")
    if settings.crs is None and one_zone(aoi, source.native_crs) is None:
        raise AreaError(
            "the area is too wide for one UTM zone", where=aoi.describe(),
            remedy="use --grid quadkey, or --crs with a projected CRS made for all of it",
        )  # fmt: skip
    target = choose_target(
        aoi, model_gsd_m, gsd_m=settings.gsd, crs=settings.crs, native_crs=source.native_crs
    )
    if not target.output.crs.projected:
        raise ConfigError(f"--crs {settings.crs} with --grid utm", expected="a projected CRS")
    return Lattices(target.output, target.predict, model_gsd_m)


def _pins(
    settings: RegionSettings,
    aoi: AOI,
    source: ImagerySource,
    model: HeightModel,
    model_name: str,
    lattices: Lattices,
    tiling: Tiling,
) -> Pins:
    names = [*settings.images, *([settings.imagery] if settings.imagery else [])]
    grid = lattices.output
    return {
        "canopy": stamp(),
        "area": area_pin(aoi),
        "imagery": {
            "images": list(settings.images),
            "imagery": settings.imagery,
            "datetime": settings.datetime,
            "bands": settings.bands,
            "nodata": settings.nodata,
            "scale": settings.scale,
            "input_crs": settings.input_crs,
            "sha256": imagery_fingerprint(names, source),
        },
        "model": {"file": settings.model, "name": model_name, "sha256": model.sha256 or "unsaved"},
        "map": {
            "grid": settings.grid,
            "zoom": settings.zoom,
            "tile_px": settings.tile_px,
            "side_px": tiling.tile_px,
            "crs": settings.crs,
            "gsd": settings.gsd,
            "bounds": list(grid.bounds),
            "width": grid.width,
            "height": grid.height,
            "encoding": settings.encoding,
            "date_band": settings.date_band,
            "interval": settings.interval,
            "quality_band": settings.quality_band,
            "radiometry": settings.radiometry,
            "backend": settings.backend,
            "precision": settings.precision,
            "threads": settings.threads,
        },
    }
