"""What is pinned to a run: area, imagery, model and map, in DIR/run.json, which every worker reads.

A run that goes on with something changed would be a patchwork, so it refuses, and says what changed.

What a regional run is asked for: the options of `canopy map`, and the keys of configs/region/*.yaml.

From settings to a pinned run: everything opened and checked once, nothing written yet.
"""

from __future__ import annotations

import datetime
import hashlib
import json
import math
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import shapely
from pydantic import Field, field_validator
from shapely.geometry import Point, Polygon, box

from canopy import __version__
from canopy.config import Settings
from canopy.errors import AreaError, ConfigError, DataError, InputError, OutputError
from canopy.files import is_template, is_url
from canopy.geo.area import AOI, choose_area
from canopy.geo.crs import metres_per_unit, to_crs
from canopy.geo.grid import Grid
from canopy.inference.backends import Choice, settle
from canopy.inference.layers import Extras, extras_of
from canopy.inference.options import PredictOptions
from canopy.inference.target import (
    MARGIN_PX,
    Target,
    choose_target,
    one_zone,
    predict_grid_for,
    quadkey_output,
    scale_notes,
    zone_of,
)
from canopy.region.tiles import Tiling, side_px

if TYPE_CHECKING:
    from canopy.imagery.base import ImagerySource
    from canopy.models.height import HeightModel


RUN_FILE = "run.json"
FORMAT = 1
_SAMPLE = 1 << 20
# Where something lies may differ from machine to machine; what it is may not.
_FREE = ("canopy.created", "imagery.images", "imagery.imagery", "model.file")

Pins = dict[str, Any]


def area_pin(aoi: AOI) -> dict[str, Any]:
    """An area, exactly."""
    return {
        "text": aoi.describe(),
        "crs": f"EPSG:{aoi.crs.epsg}" if aoi.crs.epsg else aoi.crs.to_wkt(),
        "is_box": aoi.is_box,
        "wkb": shapely.to_wkb(aoi.geometry, hex=True),
    }


def area_of(pins: Pins) -> AOI:
    """The pinned area."""
    area = pins["area"]
    return AOI(shapely.from_wkb(area["wkb"]), to_crs(area["crs"]), area["is_box"])


def imagery_fingerprint(names: Sequence[str], source: ImagerySource) -> str:
    """Hash of what the imagery is: scenes by name, local files by size and by their first and last MiB.

    Of a folder only the opened images count: maps, or the notes of a viewer, may lie there too. `names` are
    as `absolute` leaves them; what is no absolute path is a name.
    """
    digest = hashlib.sha256()
    for name in dict.fromkeys([*names, *source.scene_ids, *_assets(source)]):
        path = Path(name)
        if path.is_absolute() and path.is_file():
            digest.update(f"{path.name}\0{path.stat().st_size}\0".encode())
            digest.update(_ends(path))
        elif not (path.is_absolute() and path.is_dir()):
            digest.update(f"{name}\0".encode())
    return digest.hexdigest()


def _assets(source: ImagerySource) -> Iterator[str]:
    """The local files of scenes that have another name: those of a STAC catalog on disk."""
    for layer in getattr(source, "layers", ()):
        for scene in getattr(layer, "scenes", (layer,)):
            href = str(getattr(scene, "href", ""))
            if Path(href).is_absolute():
                yield href


def _ends(path: Path) -> bytes:
    with path.open("rb") as file:
        first = file.read(_SAMPLE)
        size = path.stat().st_size
        file.seek(max(len(first), size - _SAMPLE))
        return hashlib.sha256(first + file.read(_SAMPLE)).digest()


def absolute(name: str, known: Sequence[str] = ()) -> str:
    """A path that other processes can use; names and addresses stay as they are."""
    if is_url(name) or is_template(name) or name in known:
        return name
    path = Path(name).expanduser()
    return str(path.resolve()) if path.exists() else name


def run_id(pins: Pins) -> str:
    """Hash of all that is pinned."""
    plain = {path: value for path, value in _leaves(pins) if path not in _FREE}
    return hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()


def refuse_changes(old: Pins, new: Pins, folder: Path) -> None:
    """Compare what a run is pinned to with what is asked now.

    Raises:
        InputError: what differs, old and new.
    """
    before, after = dict(_leaves(old)), dict(_leaves(new))
    changed = [
        f"{path} was {_short(before.get(path))} and is {_short(after.get(path))}"
        for path in [*before, *(p for p in after if p not in before)]
        if path not in _FREE and path != "area.wkb" and before.get(path) != after.get(path)
    ]
    if not changed and before.get("area.wkb") != after.get("area.wkb"):
        changed = ["the area's outline changed"]
    if changed:
        raise InputError(
            f"the run there was begun with other settings: {'; '.join(changed[:4])}",
            where=folder,
            remedy="choose another -o for a new run, undo the change, or begin anew with --overwrite",
        )


def _leaves(value: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, item in value.items():
        if isinstance(item, Mapping):
            yield from _leaves(item, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", item


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:24]}...{text[-8:]}"


def stamp() -> dict[str, Any]:
    """Who pins, and when; `created` is the only time in a run's outputs."""
    now = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    return {"version": __version__, "format": FORMAT, "created": now}


def read_pins(folder: Path) -> Pins | None:
    """The pins of a run's folder; None where there is no run. Raises DataError."""
    path = folder / RUN_FILE
    try:
        pins = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise DataError(f"cannot be read ({error})", where=path, expected="the settings of a run") from error
    if not isinstance(pins, dict) or pins.get("canopy", {}).get("format") != FORMAT:
        raise DataError("is of another kind or a later version of canopy", where=path)
    return pins


def write_pins(folder: Path, pins: Pins) -> Pins:
    """Write the pins of a new run; of several shards that begin at once, one wins, and all get its pins.

    Raises:
        OutputError: the folder cannot be written.
    """
    path, partial = folder / RUN_FILE, folder / f".{RUN_FILE}.{os.getpid()}.part"
    try:
        with partial.open("w", encoding="utf-8") as file:
            json.dump(pins, file, indent=2)
            file.write("\n")
            file.flush()
            os.fsync(file.fileno())
        try:
            os.link(partial, path)  # fails where a name exists, unlike a rename
        except FileExistsError:
            pass
        except OSError:  # a file system without links
            if not path.exists():
                os.replace(partial, path)
    except OSError as error:
        raise OutputError(f"cannot be written ({error.strerror})", where=path) from error
    finally:
        partial.unlink(missing_ok=True)
    found = read_pins(folder)
    if found is None:
        raise OutputError("was written and is not there", where=path)
    return found


Layout = Literal["tiles", "published", "published-v1", "published-v2"]


class RegionSettings(Settings):
    """Options of a regional run; names and meanings are those of `canopy map --help`.

    `out`, the area, imagery, model and the map's options are pinned to the run. How it is run (`scheduler` to
    `readers`) may change from one start to the next.
    """

    out: str
    bbox: str | None = None
    size_m: float | None = None
    bounds: str | None = None
    bounds_crs: str = "EPSG:4326"
    aoi: str | None = None

    images: tuple[str, ...] = ()
    imagery: str | None = None
    datetime: str | None = None
    bands: str | None = None
    nodata: float | None = None
    scale: float | None = None
    input_crs: str | None = None
    model: str = "default"

    grid: Literal["quadkey", "utm"] = "quadkey"
    zoom: int = Field(default=10, ge=1, le=24)
    tile_px: int = Field(default=4096, ge=16, le=32768)
    crs: str | None = None
    gsd: float | None = None
    encoding: str = "float32"
    date_band: bool = False
    interval: float | None = Field(default=None, gt=0, lt=1)
    quality_band: bool = False
    radiometry: str = "none"
    backend: str = "auto"
    precision: str = "auto"
    threads: int | None = Field(default=None, ge=1)
    layout: Layout = "tiles"

    scheduler: str = "local"
    workers: int | None = Field(default=None, ge=1)
    shard: str | None = None
    device: str = "auto"
    batch_size: int | str = "auto"
    readers: int = Field(default=2, ge=1)
    attempts: int = Field(default=4, ge=1)
    price: float | None = Field(default=None, ge=0)

    @field_validator("tile_px")
    @classmethod
    def _power_of_two(cls, value: int) -> int:
        if value & (value - 1):
            raise ValueError("must be a power of two")
        return value

    @property
    def folder(self) -> Path:
        """The run's folder."""
        return Path(self.out).expanduser()

    def area(self) -> AOI | None:
        """The area that was asked for; None if none was. Raises AreaError."""
        return choose_area(
            bbox=self.bbox, size_m=self.size_m, bounds=self.bounds, bounds_crs=self.bounds_crs, aoi=self.aoi
        )

    def parse_shard(self) -> tuple[int, int] | None:
        """(I, N) of `--shard I/N`, I from 1; None without. Raises ConfigError."""
        if self.shard is None:
            return None
        found = re.fullmatch(r"(\d+)/(\d+)", self.shard.strip())
        if not found or not 1 <= int(found[1]) <= int(found[2]):
            raise ConfigError(
                f"cannot read {self.shard!r}", where="--shard", expected="I/N with I from 1 to N, e.g. 3/16"
            )
        return int(found[1]), int(found[2])


def settings_from(pins: Pins, now: RegionSettings) -> RegionSettings:
    """The pinned settings of a run, with how it is run (workers, device, ...) from `now`.

    What `now` says of pinned things stays too, for `refuse_changes` to judge; None and `auto` say nothing.
    """
    imagery, made = pins["imagery"], pins["map"]
    pinned = {
        "images": tuple(imagery["images"]),
        **{key: imagery[key] for key in ("imagery", "datetime", "bands", "nodata", "scale", "input_crs")},
        "model": pins["model"]["file"],
        **{
            key: made[key]
            for key in (
                "grid", "zoom", "tile_px", "crs", "gsd", "encoding", "date_band", "interval", "quality_band",
                "radiometry", "precision", "threads",
            )
        },
        "backend": made.get("backend", "torch"),  # all there was when runs were not pinned to one
    }  # fmt: skip
    said = {name for name in now.model_fields_set if getattr(now, name) not in (None, (), "auto")}
    if said & {"images", "imagery"}:
        said |= {"images", "imagery"}  # one stands instead of the other
    return now.model_copy(update={name: value for name, value in pinned.items() if name not in said})


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
    def request(self) -> PredictOptions:
        return request_of(self.settings)


def request_of(settings: RegionSettings) -> PredictOptions:
    """The same wish as one prediction, for what both have in common."""
    return PredictOptions(
        images=settings.images,
        imagery=settings.imagery,
        model=settings.model,
        gsd=settings.gsd,
        crs=settings.crs,
        input_crs=settings.input_crs,
        device=settings.device,
        backend=settings.backend,
        precision=settings.precision,
        batch_size=settings.batch_size,
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
    from canopy.imagery.manifests import known_names
    from canopy.inference.output import check_encoding
    from canopy.inference.predict import coverage_notes, load_named
    from canopy.inference.predictor import resolve_batch
    from canopy.inference.radiometry import with_radiometry
    from canopy.models.checkpoint import EMBEDDED
    from canopy.models.height import parse_radiometry
    from canopy.runtime import check_device

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
    extras = extras_of(request_of(settings), model, aoi)
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
    from canopy.imagery.stac import TooManyItemsError
    from canopy.inference.predict import open_source

    try:
        return open_source(request_of(settings), gsd_m, aoi), None
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
            return open_source(request_of(settings), gsd_m, here), CELL_TILES
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
