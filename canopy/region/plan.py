"""A region before any tile is made: everything opened and settled, what it is pinned to, what it will cost.

The run file (`canopy.region.ledger`) holds what the map depends on: the area, the imagery's scenes, the
model's hash, the options, and what was settled from them (runtime, precision, radiometry). Workers and later
starts take it from there and do not search or measure again. A run that went on with something changed would
be a patchwork, so it refuses, and says what changed.
"""

from __future__ import annotations

import datetime
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import shapely

from canopy import __version__
from canopy.errors import AreaError, FetchError
from canopy.files import is_template, is_url
from canopy.geo.area import AOI
from canopy.geo.crs import metres_per_unit, to_crs
from canopy.inference.inputs import Inputs, check_options, open_inputs, open_source
from canopy.inference.predict import Prediction
from canopy.region.ledger import FORMAT, RUN_FILE, Pins
from canopy.region.options import PINNED, MapOptions
from canopy.region.tiles import Lattices, Tile, Tiling, choose_lattices, side_px

if TYPE_CHECKING:
    from canopy.imagery.base import ImagerySource

_SAMPLE = 1 << 20


@dataclass(frozen=True)
class Region:
    """A checked region, see `open_region`.

    Attributes:
        pins: what the run file says, or will say.
        inputs: model, runtime and imagery; of the whole area, or with `by_tile` of one place in it.
        by_tile: there are more images than one mosaic may have, so every tile opens those of its own place.
    """

    options: MapOptions
    pins: Pins
    inputs: Inputs
    by_tile: bool
    lattices: Lattices
    tiling: Tiling

    def inputs_of(self, tile: Tile) -> Inputs | None:
        """What a tile is made of; None where its place has no imagery."""
        if not self.by_tile:
            return self.inputs
        place = AOI.from_grid(self.tiling.window(tile.row, tile.col).pad(512))
        try:
            found = open_source(self.options, self.lattices.gsd_m, place)
        except AreaError:
            return None
        if found.name != self.inputs.source.name:  # another stands in for it: a run is of one source
            raise FetchError(f"{self.inputs.source.name} does not answer now", remedy="try again later")
        return replace(self.inputs, source=found)


def open_region(options: MapOptions, pins: Pins | None = None) -> Region:
    """Open model and imagery and settle the grids; nothing is written.

    Args:
        options: what is asked.
        pins: of the run that goes on: what was found and settled then is taken from there.

    Raises:
        InputError (and its kinds): whatever cannot be done as asked.
    """
    check_options(options)
    options.parse_shard()
    options, by_tile = _absolute(options), False

    def opener(gsd_m: float, aoi: AOI | None) -> tuple[ImagerySource, bool]:
        nonlocal by_tile
        source, by_tile = _open_imagery(options, aoi, gsd_m, pins)
        return source, not by_tile

    settled = {name: pins["settled"][name] for name in ("backend", "precision", "radiometry")} if pins else {}
    area = options.area() or (area_of(pins) if pins else None)
    made = open_inputs(options, area=area, opener=opener, settled=settled)
    if not options.images and options.imagery is None:
        options = options.model_copy(update={"imagery": made.source.name})
    if by_tile:
        note = (
            "more images than one mosaic may have: every tile searches for those of its own place when it is "
            "made, so they are not pinned, and what is published meanwhile may differ from tile to tile"
        )
        made = replace(made, notes=(*made.notes, note))
    lattices = choose_lattices(
        options.grid, made.aoi, made.model.config.gsd_m,
        gsd_m=options.gsd, crs=options.crs, native_crs=made.source.native_crs,
    )  # fmt: skip
    pixel_m = lattices.output.pixel[0] * metres_per_unit(lattices.output.crs)
    tiling = Tiling(
        options.grid, lattices.output, side_px(options.grid, pixel_m, options.zoom, options.tile_px)
    )
    options = options.model_copy(update={"device": made.choice.device})
    region = Region(options, {}, replace(made, options=options), by_tile, lattices, tiling)
    return replace(region, pins=_pins(region))


def _absolute(options: MapOptions) -> MapOptions:
    """Paths that other processes can use; names and addresses stay as they are."""
    from canopy.config import manifest_names
    from canopy.models.registry import EMBEDDED

    def full(name: str, known: Sequence[str]) -> str:
        if is_url(name) or is_template(name) or name in known:
            return name
        path = Path(name).expanduser()
        return str(path.resolve()) if path.exists() else name

    names = manifest_names("imagery")
    return options.model_copy(
        update={
            "images": tuple(full(name, names) for name in options.images),
            "imagery": full(options.imagery, names) if options.imagery else None,
            "model": full(options.model, list(EMBEDDED)),
        }
    )


def _open_imagery(
    options: MapOptions, aoi: AOI | None, gsd_m: float, pins: Pins | None
) -> tuple[ImagerySource, bool]:
    """The imagery of the whole area, or that of one place in it where there is too much for one mosaic.

    A run that goes on has the list of its scenes, and nothing is searched again.

    Raises:
        InputError: as `open_source`; with a `--radiometry` that has to measure all of it.
    """
    from canopy.imagery.open import open_pinned
    from canopy.imagery.stac import TooManyItemsError
    from canopy.models.height import MEASURED

    known = pins["imagery"] if pins else {"pin": None}
    if known["pin"] and [*options.images] == known["images"] and options.imagery == known["imagery"]:
        return open_pinned(known["pin"]), False
    try:
        return open_source(options, gsd_m, aoi), False
    except TooManyItemsError:
        if aoi is None or options.radiometry in MEASURED:
            raise
    outline = aoi.lonlat
    for place in (outline.representative_point(), outline.centroid):
        try:
            return open_source(options, gsd_m, AOI.from_bbox((place.y, place.x), 2000.0)), True
        except AreaError:
            continue
    raise AreaError("no imagery at the places that were tried", where=aoi.describe())


# ---- what a run is pinned to ------------------------------------------------------------------
def _pins(region: Region) -> Pins:
    """What the run file says of a region."""
    options, made, aoi, source = region.options, region.inputs, region.inputs.aoi, region.inputs.source
    grid = region.tiling.area
    now = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    names = [*options.images, *([options.imagery] if options.imagery else [])]
    asked = options.model_dump(mode="json")
    return {
        "canopy": {"version": __version__, "format": FORMAT, "created": now},
        "area": {
            "text": aoi.describe(),
            "crs": f"EPSG:{aoi.crs.epsg}" if aoi.crs.epsg else aoi.crs.to_wkt(),
            "is_box": aoi.is_box,
            "wkb": shapely.to_wkb(aoi.geometry, hex=True),
        },
        "imagery": {
            "images": list(options.images),
            "imagery": options.imagery,
            "pin": None if region.by_tile else source.pinned(),
            "sha256": fingerprint(names, source),
        },
        "model": {
            "file": options.model, "name": made.model_name, "sha256": made.model.sha256 or "unsaved"
        },
        "map": {
            **{name: asked[name] for name in PINNED},
            "side_px": region.tiling.tile_px,
            "bounds": list(grid.bounds),
            "width": grid.width,
            "height": grid.height,
        },
        "settled": {
            "backend": made.choice.backend,
            "precision": made.choice.precision,
            "int8": made.choice.quantised_sha256 or None,
            "radiometry": made.radiometry.replace(" -> ", ","),
        },
    }  # fmt: skip


def pinned_options(pins: Pins, given: MapOptions) -> MapOptions:
    """The options of a run, with how it is run (workers, device, ...) from `given`.

    What was given of pinned things stays too, for `refuse_changes` to judge; None and `auto` say nothing.
    """
    values = {name: getattr(given, name) for name in given.model_fields_set}
    said = {name: value for name, value in values.items() if value not in (None, (), "auto")}
    pinned = {
        "images": tuple(pins["imagery"]["images"]), "imagery": pins["imagery"]["imagery"],
        "model": pins["model"]["file"], **{name: pins["map"][name] for name in PINNED},
    }  # fmt: skip
    if {"images", "imagery"} & set(said):
        del pinned["images"], pinned["imagery"]  # one stands instead of the other
    return MapOptions.of(pinned | said, RUN_FILE)


def area_of(pins: Mapping[str, Any]) -> AOI:
    """The pinned area."""
    area = pins["area"]
    return AOI(shapely.from_wkb(area["wkb"]), to_crs(area["crs"]), area["is_box"])


def fingerprint(names: Sequence[str], source: ImagerySource) -> str:
    """Hash of what the imagery is: scenes by name, local files by size and by their first and last MiB.

    Of a folder or a catalog on disk only its scenes count: maps, the notes of a viewer, and scenes that are
    published later may lie there too. What is no absolute path is a name.
    """
    records = [scene.record for scene in getattr(source, "scenes", ())]
    ids = [record.scene_id for record in records] or [*source.scene_ids]
    # Scenes of a STAC catalog on disk have another name than their files.
    files = [href for record in records for href in record.assets if Path(href).is_absolute()]
    digest = hashlib.sha256()
    for name in dict.fromkeys([*(n for n in names if not Path(n).is_absolute()), *ids, *files]):
        path = Path(name)
        if not (path.is_absolute() and path.is_file()):
            digest.update(f"{name}\0".encode())
            continue
        size = path.stat().st_size
        digest.update(f"{path.name}\0{size}\0".encode())
        with path.open("rb") as file:
            digest.update(file.read(_SAMPLE))
            file.seek(max(0, size - _SAMPLE))
            digest.update(file.read(_SAMPLE))
    return digest.hexdigest()


# ---- what it will take ------------------------------------------------------------------------
def local_devices(device: str, workers: int | None) -> list[str]:
    """A device for each local worker: one per GPU, or processors.

    Args:
        device: `auto`, `cpu`, `cuda`, `cuda:N` or `mps`.
        workers: how many; by default one per GPU, else one.
    """
    if device in ("auto", "cuda"):
        import torch

        if torch.cuda.is_available():
            count = torch.cuda.device_count()
            return [f"cuda:{i % count}" for i in range(workers or count)]
    return [device] * (workers or 1)


def local_threads(workers: int) -> int:
    """The network's threads in each of some workers on this machine."""
    import torch

    return max(1, torch.get_num_threads() // workers)


def region_cost(region: Region) -> dict[str, Any]:
    """What a region takes if all of it has imagery, by its largest tile: clipped ones cost their share.

    Returns:
        JSON-ready: work `tiles`, `crops` that pass the network, `pixels` of the map, bytes of imagery and of
        the map (uncompressed), hours of one worker and of all `workers`, and `money` where there is a price.
    """
    options, made, tiling = region.options, region.inputs, region.tiling
    tiles = list(tiling.tiles(made.aoi))
    windows = [tiling.window(tile.row, tile.col) for tile in tiles]
    pixels = [window.height * window.width for window in windows]
    runner = made.choice.open(made.model, made.extras.outputs)
    largest = Prediction(made, region.lattices.target(windows[pixels.index(max(pixels))]), runner)
    share, workers, seconds = sum(pixels) / max(pixels), options.workers or 1, largest.seconds
    if options.scheduler == "local":
        workers = len(local_devices(options.device, options.workers))
    if runner.device.type == "cpu":  # the estimate is that of all threads of this machine
        seconds *= local_threads(1) / (options.threads or local_threads(workers))
    hours, km2 = seconds * share / 3600, sum(tile.km2 for tile in tiles)
    crops = round(largest.plan.n_crops * share)
    seen_m2 = crops * (largest.plan.lattice.stride_px * made.model.config.gsd_m) ** 2
    return {
        "tiles": len(tiles),
        "km2": km2,
        "crops": crops,
        "pixels": sum(pixels),
        "imagery_bytes": seen_m2 / made.source.native_gsd_m**2 * 3,  # of three bytes, before compression
        "map_bytes": largest.gigabytes * 1e9 * share,
        "workers": workers,
        "worker_hours": hours,
        "hours": hours / workers,
        "km2_per_hour": km2 / (hours / workers) if hours else 0.0,
        "price_per_worker_hour": options.price,
        "money": None if options.price is None else hours * options.price,
    }
