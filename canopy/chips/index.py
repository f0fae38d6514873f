"""The index of a chips folder: one row per chip, cut or rejected. CSV and Parquet; no geo library needed."""

from __future__ import annotations

import csv
import dataclasses
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from canopy.errors import DataError
from canopy.files import replacing

INDEX_CSV, INDEX_PARQUET = "index.csv", "index.parquet"


@dataclass(frozen=True)
class IndexRow:
    """One chip.

    Attributes:
        id: unique; the end is a hash of the files, the window and the settings it was cut with.
        pair, site, kind, split: from the manifest; kind is 'lidar', 'neon' or 'synth'.
        shard: file within the folder, '' where rejected.
        reason: why rejected, '' where cut.
        row, col, height_px, width_px: window on the pair's image grid.
        gsd_m, label_gsd_m: ground metres per image and per label pixel.
        crs, west, south, east, north: where it is.
        weight: worth of its labels, 0..1; floor_m: heights below are only known as 0..floor.
        shots: number of GEDI shots stored with it.
        height_mean_m, height_p95_m, height_max_m: over known label pixels; cover: share above 2 m.
        image_share, label_share, cloud_share, contrast, sharpness, match: see `canopy.chips.screen`.
        shift_down_m, shift_right_m, shift_sure: where labels lay relative to the image, see `register`;
        shift_applied: whether that was undone.
        test_distance_m: to the nearest test chip, as far as it was looked for; NaN beyond.
        licence: of the pair.
    """

    id: str
    pair: str
    site: str
    kind: str
    split: str
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

    @property
    def is_labelled(self) -> bool:
        """Whether anything is measured: heights, or GEDI shots. Images alone are for pretraining."""
        return self.label_share != 0 or self.shots > 0  # NaN: not counted, as by hand-made indexes


_CONVERT: dict[str, Callable[[str], Any]] = {
    "str": str, "int": int, "float": lambda t: float(t or "nan"), "bool": lambda t: t == "true"
}  # fmt: skip
_TYPES = {field.name: str(field.type) for field in dataclasses.fields(IndexRow)}


def write_index(folder: Path, rows: Sequence[IndexRow]) -> None:
    """Write index.csv, and index.parquet where pyarrow is installed; each whole or not at all."""
    with replacing(folder / INDEX_CSV) as part, part.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(_TYPES)
        writer.writerows([_text(getattr(row, name)) for name in _TYPES] for row in rows)
    try:
        import pyarrow as pa
        from pyarrow import parquet
    except ImportError:
        return
    arrow = {"str": pa.string(), "int": pa.int64(), "float": pa.float64(), "bool": pa.bool_()}
    columns = {n: pa.array([getattr(r, n) for r in rows], arrow[kind]) for n, kind in _TYPES.items()}
    with replacing(folder / INDEX_PARQUET) as part:
        parquet.write_table(pa.table(columns), part)


def read_index(folder: str | Path) -> list[IndexRow]:
    """Rows of a chips folder, rejected chips included. Raises DataError where there is no readable index."""
    path = Path(folder) / INDEX_CSV
    if not path.is_file():
        what = "no index.csv" if path.parent.is_dir() else "no such chips"
        raise DataError(what, where=folder, expected="a folder made by canopy data chips")
    with path.open(newline="") as file:
        return [row_of(line, path) for line in csv.DictReader(file)]


def row_of(values: dict[str, str], where: object) -> IndexRow:
    """An IndexRow of texts; unknown columns are ignored. Raises DataError for a missing or bad value."""
    try:
        return IndexRow(**{name: _CONVERT[kind](values[name]) for name, kind in _TYPES.items()})
    except (KeyError, ValueError, TypeError) as error:
        raise DataError(f"a row has no usable {error}", where=where, remedy="cut the chips again") from error


def as_texts(row: IndexRow) -> dict[str, str]:
    """The row as index.csv holds it."""
    return {name: _text(getattr(row, name)) for name in _TYPES}


def _text(value: object) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, float):
        return "" if value != value else repr(round(value, 9))
    return str(value)


def cut_rows(rows: Iterable[IndexRow]) -> list[IndexRow]:
    """Only the chips that were cut."""
    return [row for row in rows if not row.reason]
