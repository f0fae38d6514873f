"""A region before any tile is made: everything opened and settled, and pinned in DIR/run.json.

The run file holds what the map depends on: the area, the imagery's scenes, the model's hash, the options,
and what was settled from them (runtime, precision, radiometry). Workers and later starts take it from there
and do not search or measure again. A run that went on with something changed would be a patchwork, so it
refuses, and says what changed.
"""

from __future__ import annotations

import datetime
import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import shapely

from canopy import __version__
from canopy.errors import AreaError, DataError, InputError, OutputError
from canopy.files import is_template, is_url
from canopy.geo.area import AOI
from canopy.geo.crs import metres_per_unit, to_crs
from canopy.inference.backends import Choice, settle
from canopy.inference.layers import Extras, extras_of
from canopy.inference.target import scale_notes
from canopy.region.options import PINNED, MapOptions
from canopy.region.tiles import Lattices, Tile, Tiling, choose_lattices, side_px

if TYPE_CHECKING:
    from canopy.imagery.base import ImagerySource
    from canopy.models.height import HeightModel

RUN_FILE = "run.json"
FORMAT = 2
_SAMPLE = 1 << 20
# Where something lies may differ from machine to machine; what it is may not.
_FREE = ("canopy.created", "area.wkb", "imagery.images", "imagery.imagery", "imagery.pin", "model.file")

Pins = dict[str, Any]


@dataclass(frozen=True)
class Region:
    """A checked region, see `open_region`.

    Attributes:
        pins: what the run file says, or will say.
        source: the imagery; of the whole area, or with `by_tile` of one place in it.
        by_tile: there are more images than one mosaic may have, so every tile opens those of its own place.
        choice: the runtime that carries the model.
        notes: warnings for the user.
    """

    options: MapOptions
    pins: Pins
    aoi: AOI
    source: ImagerySource
    by_tile: bool
    model: HeightModel
    model_name: str
    lattices: Lattices
    tiling: Tiling
    radiometry: str
    extras: Extras
    choice: Choice
    notes: list[str] = field(default_factory=list)

    @property
    def bands(self) -> tuple[tuple[str, str], ...]:
        """Names and units of the map's bands, in order."""
        return self.extras.bands

    def source_of(self, tile: Tile) -> ImagerySource | None:
        """The imagery for a tile; None where its place has none."""
        if not self.by_tile:
            return self.source
        window = self.tiling.window(tile.row, tile.col)
        try:
            return _open_source(self.options, self.lattices.gsd_m, AOI.from_grid(window.pad(512)))
        except AreaError:
            return None


def open_region(options: MapOptions, pins: Pins | None = None) -> Region:
    """Open model and imagery and settle the grids; nothing is written.

    Args:
        options: what is asked.
        pins: of the run that goes on: what was found and settled then is taken from there.

    Raises:
        InputError (and its kinds): whatever cannot be done as asked.
    """
    from canopy.inference.predict import coverage_notes, load_named
    from canopy.inference.radiometry import with_radiometry

    _check(options)
    options = _absolute(options)
    pinned = pins["settled"] if pins else {}
    aoi = options.area() or (area_of(pins) if pins else None)
    model, model_name = load_named(options.model)
    gsd_m = model.config.gsd_m
    source, by_tile = _open_imagery(options, aoi, gsd_m, pins)
    aoi = aoi or source.area()
    if aoi is None:
        raise AreaError("which area?", where=source.name, expected="--bbox, --bounds or --aoi")
    if not options.images and options.imagery is None:
        options = options.model_copy(update={"imagery": source.name})
    notes = [] if by_tile else coverage_notes(source, aoi)
    notes += scale_notes(source.native_gsd_m, gsd_m)
    extras = extras_of(options, model, aoi)
    choice = settle(
        model, pinned.get("backend", options.backend), pinned.get("precision", options.precision),
        options.device,
    )  # fmt: skip
    notes += choice.notes
    wish = pinned.get("radiometry", options.radiometry)
    model, radiometry, more = with_radiometry(model, source, aoi, wish)
    notes += more
    if by_tile:
        notes.append("more images than one mosaic may have: every tile opens those of its own place")
    lattices = choose_lattices(
        options.grid, aoi, gsd_m, gsd_m=options.gsd, crs=options.crs, native_crs=source.native_crs
    )
    pixel_m = lattices.output.pixel[0] * metres_per_unit(lattices.output.crs)
    tiling = Tiling(
        options.grid, lattices.output, side_px(options.grid, pixel_m, options.zoom, options.tile_px)
    )
    settled = {
        "backend": choice.backend, "precision": choice.precision, "int8": choice.quantised_sha256 or None,
        "radiometry": radiometry.replace(" -> ", ","),
    }  # fmt: skip
    made = _pins(options, aoi, source, by_tile, model, model_name, tiling, settled)
    return Region(
        options.model_copy(update={"device": choice.device}), made, aoi, source, by_tile, model, model_name,
        lattices, tiling, radiometry, extras, choice, notes,
    )  # fmt: skip


def _check(options: MapOptions) -> None:
    """Refuse what can be known to be wrong before a model is fetched for it."""
    from canopy.inference.output import check_encoding
    from canopy.inference.predictor import resolve_batch
    from canopy.models.height import parse_radiometry
    from canopy.runtime import check_device

    check_encoding(options.encoding, options.date_band)
    check_device(options.device)  # that of a worker, which need not be here
    resolve_batch(options.batch_size, "cpu")  # what is no number is told now, not for every tile
    parse_radiometry(options.radiometry)
    options.parse_shard()


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


def _open_source(options: MapOptions, gsd_m: float, aoi: AOI | None) -> ImagerySource:
    from canopy.inference.predict import open_source

    return open_source(options, gsd_m, aoi)


def _open_imagery(
    options: MapOptions, aoi: AOI | None, gsd_m: float, pins: Pins | None
) -> tuple[ImagerySource, bool]:
    """The imagery of the whole area, or that of one place in it where there is too much for one mosaic.

    A run that goes on has the list of its scenes, and nothing is searched again.

    Raises:
        InputError: as `open_source`; with `--radiometry match`, which has to measure all of it.
    """
    from canopy.imagery.open import open_pinned
    from canopy.imagery.stac import TooManyItemsError

    known = pins["imagery"] if pins else {"pin": None}
    if known["pin"] and [*options.images] == known["images"] and options.imagery == known["imagery"]:
        return open_pinned(known["pin"]), False
    try:
        return _open_source(options, gsd_m, aoi), False
    except TooManyItemsError:
        if aoi is None or options.radiometry == "match":
            raise
    outline = aoi.lonlat
    for place in (outline.representative_point(), outline.centroid):
        try:
            return _open_source(options, gsd_m, AOI.from_bbox((place.y, place.x), 2000.0)), True
        except AreaError:
            continue
    raise AreaError("no imagery at the places that were tried", where=aoi.describe())


# ---- the run file -----------------------------------------------------------------------------
def _pins(
    options: MapOptions, aoi: AOI, source: ImagerySource, by_tile: bool, model: HeightModel, model_name: str,
    tiling: Tiling, settled: Mapping[str, Any],
) -> Pins:  # fmt: skip
    grid = tiling.area
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
            "pin": None if by_tile else source.pinned(),
            "sha256": fingerprint(names, source),
        },
        "model": {"file": options.model, "name": model_name, "sha256": model.sha256 or "unsaved"},
        "map": {
            **{name: asked[name] for name in PINNED},
            "side_px": tiling.tile_px,
            "bounds": list(grid.bounds),
            "width": grid.width,
            "height": grid.height,
        },
        "settled": dict(settled),
    }


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


def area_of(pins: Pins) -> AOI:
    """The pinned area."""
    area = pins["area"]
    return AOI(shapely.from_wkb(area["wkb"]), to_crs(area["crs"]), area["is_box"])


def fingerprint(names: Sequence[str], source: ImagerySource) -> str:
    """Hash of what the imagery is: scenes by name, local files by size and by their first and last MiB.

    Of a folder or a catalog on disk only its scenes count: maps, the notes of a viewer, and scenes that are
    published later may lie there too. What is no absolute path is a name.
    """
    digest = hashlib.sha256()
    records = [scene.record for scene in getattr(source, "scenes", ())]
    ids = [record.scene_id for record in records] or [*source.scene_ids]
    # Scenes of a STAC catalog on disk have another name than their files.
    ids += [href for record in records for href in record.assets if Path(href).is_absolute()]
    names = [name for name in names if not Path(name).is_absolute()]
    for name in dict.fromkeys([*names, *ids]):
        path = Path(name)
        if path.is_absolute() and path.is_file():
            digest.update(f"{path.name}\0{path.stat().st_size}\0".encode())
            digest.update(_ends(path))
        else:
            digest.update(f"{name}\0".encode())
    return digest.hexdigest()


def _ends(path: Path) -> bytes:
    with path.open("rb") as file:
        first = file.read(_SAMPLE)
        file.seek(max(len(first), path.stat().st_size - _SAMPLE))
        return hashlib.sha256(first + file.read(_SAMPLE)).digest()


def run_id(pins: Pins) -> str:
    """Hash of all that is pinned."""
    plain = {path: value for path, value in _leaves(pins) if path == "area.wkb" or path not in _FREE}
    return hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()


def refuse_changes(old: Pins, new: Pins, folder: Path) -> None:
    """Compare what a run is pinned to with what is asked now.

    Raises:
        InputError: what differs, old and new.
    """
    before, after = dict(_leaves(old)), dict(_leaves(new))
    changed = [
        f"{path} was {_short(before.get(path))} and is {_short(after.get(path))}"
        for path in dict.fromkeys([*before, *after])
        if path not in _FREE and before.get(path) != after.get(path)
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
        if isinstance(item, Mapping) and f"{prefix}{key}" not in _FREE:
            yield from _leaves(item, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", item


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:24]}...{text[-8:]}"


def read_pins(folder: Path) -> Pins | None:
    """The run file of a folder; None where there is none. Raises DataError."""
    path = folder / RUN_FILE
    try:
        pins = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise DataError(f"cannot be read ({error})", where=path, expected="the settings of a run") from error
    if not isinstance(pins, dict) or pins.get("canopy", {}).get("format") != FORMAT:
        raise DataError("is of another kind or another version of canopy", where=path)
    return pins


def write_pins(folder: Path, pins: Pins) -> Pins:
    """Write the run file; of several shards that begin at once one wins, and all get its pins.

    Raises:
        OutputError: the folder cannot be written.
    """
    path, part = folder / RUN_FILE, folder / f".{RUN_FILE}.{os.getpid()}.part"
    try:
        with part.open("w", encoding="utf-8") as file:
            json.dump(pins, file, indent=2)
            file.write("\n")
            file.flush()
            os.fsync(file.fileno())
        try:
            os.link(part, path)  # fails where a name exists, unlike a rename
        except FileExistsError:
            pass
        except OSError:  # a file system without links
            if not path.exists():
                os.replace(part, path)
    except OSError as error:
        raise OutputError(f"cannot be written ({error.strerror})", where=path) from error
    finally:
        part.unlink(missing_ok=True)
    return read_pins(folder) or pins
