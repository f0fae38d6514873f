"""Converted models on disk: one uncompressed zip each, with a card that holds the hash of every part.

Conversion takes seconds to minutes, so it is done once per model, crop size, runtime and version. Several
processes may want the same conversion at the same time: one makes it, the others wait, and a file appears
whole or not at all. A file that does not match its own hashes is made anew.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from canopy.errors import CheckpointError, OutputError
from canopy.runtime import cache_dir, log
from canopy.sources.fetch import only_one

FORMAT = "canopy-converted"
_CARD = "card.json"
_EPOCH = (1980, 1, 1, 0, 0, 0)  # the same content gives the same bytes


@dataclass(frozen=True)
class Converted:
    """A model in a runtime's own form.

    Attributes:
        parts: the runtime's files by name.
        card: JSON-ready facts: backend, precision, weights_sha256, crop_px, runtime, and of int8 how it was
            calibrated and what it costs.
    """

    parts: Mapping[str, bytes]
    card: dict[str, Any]


def folder() -> Path:
    """Where conversions are kept."""
    return cache_dir() / "backends"


def write_converted(path: Path, converted: Converted) -> None:
    """Write a conversion atomically.

    Raises:
        OutputError: the file cannot be written.
    """
    hashes = {name: hashlib.sha256(data).hexdigest() for name, data in converted.parts.items()}
    card = {"format": FORMAT, **converted.card, "files": hashes}
    partial = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with zipfile.ZipFile(partial, "w", zipfile.ZIP_STORED) as file:
            for name, data in {_CARD: json.dumps(card, indent=1).encode(), **converted.parts}.items():
                file.writestr(zipfile.ZipInfo(name, _EPOCH), data)
        with partial.open("rb+") as written:  # Windows flushes only what may be written
            os.fsync(written.fileno())
        os.replace(partial, path)
    except OSError as error:
        raise OutputError(
            f"the converted model cannot be written ({error.strerror or error})", where=path,
            remedy="set CANOPY_CACHE to a folder that can be written, or use --backend torch",
        ) from error  # fmt: skip
    finally:
        partial.unlink(missing_ok=True)


def read_card(path: Path) -> dict[str, Any]:
    """The card of a conversion, without its parts.

    Raises:
        CheckpointError: it is no such file, or it is damaged.
    """
    return _read(path, whole=False).card


def read_converted(path: Path) -> Converted:
    """A conversion, every byte checked.

    Raises:
        CheckpointError: it is no such file, or it is damaged.
    """
    return _read(path, whole=True)


def _read(path: Path, whole: bool) -> Converted:
    try:
        with zipfile.ZipFile(path) as file:
            card = json.loads(file.read(_CARD))
            if not isinstance(card, dict) or card.get("format") != FORMAT:
                raise CheckpointError("is no converted model", where=path)
            parts = {name: file.read(name) for name in card["files"]} if whole else {}
    except (OSError, zipfile.BadZipFile, ValueError, KeyError, NotImplementedError, EOFError) as error:
        raise CheckpointError(f"the converted model cannot be read ({error})", where=path) from error
    for name, data in parts.items():
        if hashlib.sha256(data).hexdigest() != card["files"][name]:
            raise CheckpointError(f"the converted model is damaged in {name}", where=path)
    return Converted(parts, card)


def entry_path(name: str, facts: Mapping[str, Any]) -> Path:
    """The cache's file for a conversion with these facts (among them `backend`, `precision`, `part`)."""
    key = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:24]
    clean = "".join(c if c.isalnum() or c in "-_." else "-" for c in name)[:40]
    return folder() / f"{clean}-{facts['backend']}-{facts['precision']}-{facts['part']}-{key}.zip"


def cached(
    name: str, facts: Mapping[str, Any], make: Callable[[], Mapping[str, bytes]], *, title: str | None = None
) -> Converted:
    """The conversion with these facts, made now if there is none or only a damaged one.

    Args:
        name: of the model, for people.
        facts: what it depends on, JSON-ready; with `backend`, `precision` and `part`.
        make: converts.
        title: of the runtime; with it, the user is told that a conversion is made and what it took.

    Raises:
        OutputError: it cannot be written. Whatever `make` raises.
    """
    path = entry_path(name, facts)
    found = _usable(path)
    if found is not None:
        return found
    _make_folder(path)
    with only_one(path):
        found = _usable(path)  # another process may have made it meanwhile
        if found is not None:
            return found
        started = time.perf_counter()
        if title:
            log.info(f"converting {name} for {title}, once ...")
        converted = Converted(make(), dict(facts))
        write_converted(path, converted)
        if title:
            seconds = time.perf_counter() - started
            log.info(f"converted {name} for {title}: {seconds:.0f} s, kept in {path.parent}")
        return converted


def _make_folder(path: Path) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if not os.access(path.parent, os.W_OK):
            raise PermissionError(13, "permission denied")
    except OSError as error:
        raise OutputError(
            f"converted models cannot be kept there ({error.strerror})", where=path.parent,
            remedy="set CANOPY_CACHE to a folder that can be written, or use --backend torch",
        ) from error  # fmt: skip


def _usable(path: Path) -> Converted | None:
    if not path.is_file():
        return None
    try:
        return read_converted(path)
    except CheckpointError as error:
        log.warning(f"{error}; it is made anew")
        return None
