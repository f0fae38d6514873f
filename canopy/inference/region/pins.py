"""What is pinned to a run: area, imagery, model and map, in DIR/run.json, which every worker reads.

A run that goes on with something changed would be a patchwork, so it refuses, and says what changed.
"""

from __future__ import annotations

import datetime
import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import shapely

from canopy import __version__
from canopy.errors import DataError, InputError, OutputError
from canopy.geo.aoi import AOI
from canopy.geo.crs import to_crs
from canopy.sources.paths import is_template, is_url

if TYPE_CHECKING:
    from canopy.sources.imagery import ImagerySource

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
