"""The index of a chips folder: one row per chip, cut or rejected, in index.csv and index.parquet."""

from __future__ import annotations

import csv
import dataclasses
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from canopy.errors import DataError, InputError
from canopy.files import replacing, told_as_output

INDEX_CSV, INDEX_PARQUET, SHARDS = "index.csv", "index.parquet", "shards"


@dataclass(frozen=True)
class ChipRow:
    """One chip of the index, cut or rejected.

    Attributes:
        id: unique; the end is a hash of the files, the window and the settings it was cut with.
        site, kind, split: from the manifest; kind is 'lidar', 'neon' or 'synth'.
        pair: the manifest's id; the chip's own where there is none.
        shard: file within the folder, '' where rejected.
        reason: why rejected, '' where cut.
        row, col, height_px, width_px: window on the pair's image grid.
        gsd_m, label_gsd_m: ground metres per image and per label pixel.
        crs, west, south, east, north: where it is.
        weight: worth of its labels, 0..1; floor_m: heights below are only known as 0..floor.
        shots: number of GEDI shots stored with it.
        height_mean_m, height_p95_m, height_max_m: over known label pixels; cover: share above 2 m.
        image_share, label_share, cloud_share, contrast, sharpness, match: see `canopy.chips.write.screen`.
        shift_down_m, shift_right_m, shift_sure: where labels lay relative to the image, see `register`;
        shift_applied: whether that was undone.
        test_distance_m: to the nearest test chip, as far as it was looked for; NaN beyond.
        licence: of the pair.
    """

    id: str
    site: str
    kind: str
    split: str
    pair: str = ""
    shard: str = ""
    reason: str = ""
    row: int = 0
    col: int = 0
    height_px: int = 0
    width_px: int = 0
    gsd_m: float = float("nan")
    label_gsd_m: float = float("nan")
    crs: str = ""
    west: float = float("nan")
    south: float = float("nan")
    east: float = float("nan")
    north: float = float("nan")
    weight: float = 1.0
    floor_m: float = 0.0
    shots: int = 0
    height_mean_m: float = float("nan")
    height_p95_m: float = float("nan")
    height_max_m: float = float("nan")
    cover: float = float("nan")
    image_share: float = float("nan")
    label_share: float = float("nan")
    cloud_share: float = float("nan")
    contrast: float = float("nan")
    sharpness: float = float("nan")
    match: float = float("nan")
    shift_down_m: float = float("nan")
    shift_right_m: float = float("nan")
    shift_sure: bool = False
    shift_applied: bool = False
    test_distance_m: float = float("nan")
    licence: str = ""

    def __post_init__(self) -> None:
        if not self.pair:
            object.__setattr__(self, "pair", self.id)

    @property
    def is_labelled(self) -> bool:
        """Whether anything is measured: heights, or GEDI shots. Images alone are for pretraining."""
        return self.label_share != 0 or self.shots > 0  # NaN: not counted, as by hand-made indexes


def height_facts(known: np.ndarray) -> dict[str, float]:
    """A row's facts of the known heights (n,) in metres; nothing where there are none."""
    if not known.size:
        return {}
    return {
        "height_mean_m": round(float(known.mean()), 3),
        "height_p95_m": round(float(np.percentile(known, 95)), 3),
        "height_max_m": round(float(known.max()), 3),
        "cover": round(float((known > 2).mean()), 4),
    }


_CONVERT: dict[str, Callable[[str], Any]] = {
    "str": str, "int": int, "float": lambda t: float(t or "nan"), "bool": lambda t: t == "true"
}  # fmt: skip
_TYPES = {field.name: str(field.type) for field in dataclasses.fields(ChipRow)}


def write_index(folder: Path, rows: Sequence[ChipRow]) -> None:
    """Write index.csv, and index.parquet where pyarrow is installed; each whole or not at all."""
    with replacing(folder / INDEX_CSV) as part, part.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(_TYPES), lineterminator="\n")
        writer.writeheader()
        writer.writerows(as_texts(row) for row in rows)
    try:
        import pyarrow as pa
        from pyarrow import parquet
    except ImportError:
        return
    arrow = {"str": pa.string(), "int": pa.int64(), "float": pa.float64(), "bool": pa.bool_()}
    columns = {n: pa.array([getattr(r, n) for r in rows], arrow[kind]) for n, kind in _TYPES.items()}
    with replacing(folder / INDEX_PARQUET) as part:
        parquet.write_table(pa.table(columns), part)


def read_index(folder: str | Path) -> list[ChipRow]:
    """Rows of a chips folder, rejected chips included. Raises DataError where there is no readable index."""
    path = Path(folder) / INDEX_CSV
    if not path.is_file():
        what = "no index.csv" if path.parent.is_dir() else "no such chips"
        raise DataError(what, where=folder, expected="a folder made by canopy data chips")
    with path.open(newline="") as file:
        return [row_of(line, path) for line in csv.DictReader(file)]


def row_of(values: dict[str, str], where: object) -> ChipRow:
    """A row of texts; unknown columns are ignored. Raises DataError for a missing or bad value."""
    try:
        return ChipRow(**{name: _CONVERT[kind](values[name]) for name, kind in _TYPES.items()})
    except (KeyError, ValueError, TypeError) as error:
        raise DataError(f"a row has no usable {error}", where=where, remedy="cut the chips again") from error


def as_texts(row: ChipRow) -> dict[str, str]:
    """The row as index.csv holds it."""
    return {name: _text(getattr(row, name)) for name in _TYPES}


def _text(value: object) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, float):
        return "" if value != value else repr(round(value, 9))
    return str(value)


def cut_rows(rows: Iterable[ChipRow]) -> list[ChipRow]:
    """Only the chips that were cut."""
    return [row for row in rows if not row.reason]


def check_folder(folder: Path, settings: dict[str, Any], overwrite: bool) -> None:
    """See that chips of `settings` may be written to a folder. Raises InputError, DataError."""
    if folder.exists() and not folder.is_dir():
        raise InputError("is a file", where=folder, expected="a folder")
    known = folder / "settings.json"
    if overwrite or not folder.exists():
        return
    if not known.is_file():
        if any(folder.iterdir()):
            raise InputError("holds other files", where=folder, remedy="name another folder or --overwrite")
        return
    try:
        before = json.loads(known.read_text())
    except ValueError as error:
        raise DataError("is damaged", where=known, remedy="use --overwrite") from error
    if before != settings:
        raise InputError(
            "holds chips cut with other settings", where=folder, remedy="name another folder or --overwrite"
        )


def begin_folder(folder: Path, settings: dict[str, Any]) -> None:
    """Create a chips folder, note its settings, and clear away what a killed run has left half-written."""
    with told_as_output(folder):
        (folder / SHARDS).mkdir(parents=True, exist_ok=True)
        with replacing(folder / "settings.json") as part:
            part.write_text(json.dumps(settings, indent=2) + "\n")
        for leftover in folder.glob("**/.*.part"):
            leftover.unlink(missing_ok=True)  # of a run that was killed
