"""A chips file: image and height pairs on one pixel grid, in one safetensors file; no geo libraries needed.

For each chip ID the file holds `ID/rgb` uint8 (3, 2h, 2w) at 0.5 m, where 0,0,0 alone means no image,
`ID/chm` uint16 (h, w) at 1 m in centimetres, 65535 = no height, and perhaps `ID/shots` float32 (n, 4). The
metadata holds the rows (id, site, kind, split) and a hash of the source data. Every shard of a chips folder
is such a file.

The index of a chips folder: one row per chip, cut or rejected. CSV and Parquet; no geo library needed.

Chips folders (`canopy data chips`) read chip by chip, and how often each should be seen. No geo library,
no torch; the torch Datasets over it are in `canopy.chips.streams`.

A chip predicted whole: crops of its image, cross-faded, at its labels' pixels. No geo library, no torch.

Scores of trainings and calibrations both stand on this. They lay their crops differently, on purpose: scores
by a fixed overlap, that they compare between models; calibrations by a fixed share of the crop, as maps do.
"""

from __future__ import annotations

import csv
import dataclasses
import hashlib
import json
import os
from collections.abc import Callable, Iterable, Sequence
from copy import copy
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from canopy.chips.plan import SplitRules
from canopy.chips.targets import pixel_weight
from canopy.errors import DataError
from canopy.files import replacing
from canopy.models.checkpoint import header_bytes
from canopy.models.height import fill_invalid

NO_HEIGHT = 65535
IMAGE_GSD_M = 0.5
LABEL_GSD_M = 1.0
NO_SHOTS = np.zeros((0, 4), np.float32)


@dataclass(frozen=True)
class ChipRow:
    """Where a chip comes from. `kind` is 'lidar', 'neon' or 'synth'."""

    id: str
    site: str
    kind: str
    split: str


@dataclass(frozen=True)
class Chip:
    """One pair: rgb uint8 (3, 2h, 2w), chm_m float32 (h, w) metres with NaN = unknown."""

    row: ChipRow
    rgb: np.ndarray
    chm_m: np.ndarray

    @property
    def image_valid(self) -> np.ndarray:
        """Bool (2h, 2w), True where there is an image."""
        return self.rgb.max(axis=0) > 0


@dataclass(frozen=True)
class ChipStore:
    """All chips of a file, in memory, with the hash of the data they were cut from."""

    chips: tuple[Chip, ...]
    data_sha256: str

    def of_split(self, *splits: str) -> list[Chip]:
        """Chips of the named splits, in file order."""
        return [c for c in self.chips if c.row.split in splits]


def write_store(path: str | Path, chips: Sequence[Chip], data_sha256: str) -> None:
    """Write chips without shots to one file; see `write_shard`."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_shard(path, [(chip, NO_SHOTS) for chip in chips], data_sha256)


def write_shard(path: Path, chips: Sequence[tuple[Chip, np.ndarray]], source: str) -> None:
    """Write chips and their GEDI shots (n, 4), heights rounded to centimetres; equal bytes for equal chips.

    Written out by hand: the safetensors library puts the metadata in random order.
    """
    tensors: dict[str, np.ndarray] = {}
    for chip, shots in chips:
        known = np.isfinite(chip.chm_m)
        cm = np.where(known, np.round(np.where(known, chip.chm_m, 0) * 100), NO_HEIGHT)
        tensors[f"{chip.row.id}/chm"] = cm.astype("<u2")
        tensors[f"{chip.row.id}/rgb"] = np.ascontiguousarray(chip.rgb)
        if len(shots):
            tensors[f"{chip.row.id}/shots"] = shots.astype("<f4")
    names = {np.dtype("<f4"): "F32", np.dtype("<u2"): "U16", np.dtype("u1"): "U8"}
    header: dict[str, object] = {
        "__metadata__": {
            "format": "canopy-chips",
            "rows": json.dumps([asdict(chip.row) for chip, _ in chips]),
            "data_sha256": source,
        }
    }
    end = 0
    # Widest numbers first, so that every array begins on a whole multiple of its own size.
    ordered = sorted(tensors.items(), key=lambda item: (-item[1].itemsize, item[0]))
    for name, array in ordered:
        start, end = end, end + array.nbytes
        header[name] = {"dtype": names[array.dtype], "shape": array.shape, "data_offsets": [start, end]}
    with replacing(path) as part, part.open("wb") as file:
        file.write(header_bytes(header))
        for _, array in ordered:
            file.write(array.tobytes())


def read_store(path: str | Path) -> ChipStore:
    """Read a chips file; DataError where it is missing or not one."""
    from safetensors import SafetensorError, safe_open

    path = Path(path)
    if not path.is_file():
        raise DataError("no such chips file", where=path, expected="a shard of canopy data chips")
    try:
        with safe_open(path, framework="numpy") as file:
            header = file.metadata() or {}
            if header.get("format") != "canopy-chips":
                raise DataError("is not a chips file", where=path)
            rows = [ChipRow(**row) for row in json.loads(header["rows"])]
            chips = [
                Chip(r, file.get_tensor(f"{r.id}/rgb"), _metres(file.get_tensor(f"{r.id}/chm"))) for r in rows
            ]
    except SafetensorError as error:
        raise DataError(f"is damaged ({error})", where=path, remedy="build it again") from error
    return ChipStore(tuple(chips), header["data_sha256"])


def _metres(cm: np.ndarray) -> np.ndarray:
    return np.where(cm == NO_HEIGHT, np.nan, cm / 100.0).astype(np.float32)


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
        image_share, label_share, cloud_share, contrast, sharpness, match: see `canopy.chips.write`.
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


BARE, TALL, OTHER = "bare", "tall", "other"
_BARE_P95_M, _TALL_P95_M = 2.0, 35.0
_GSD_TOLERANCE = 0.03


@dataclass(frozen=True, eq=False)
class ShardChip:
    """One chip.

    Attributes:
        row: its row of the index.
        rgb: uint8 (3, H, W), 0,0,0 alone where there is no image.
        chm_m: float32 (h, w) metres on the label grid, NaN = unknown; H = 2 h.
        weight: float32 (h, w), 0 where unknown.
        shots: float32 (n, 4) GEDI shots: row, col on the label grid, height in metres, weight.
    """

    row: IndexRow
    rgb: np.ndarray
    chm_m: np.ndarray
    weight: np.ndarray
    shots: np.ndarray

    def as_chip(self) -> Chip:
        """As the chips store has it."""
        r = self.row
        return Chip(ChipRow(r.id, r.site, r.kind, r.split), self.rgb, self.chm_m)


class ChipShards:
    """Chips by number, read when asked for; picklable, and safe in forked and spawned workers.

    Args:
        places: folders made by `canopy data chips`, or single shards of one (chips files); one or several.
        splits: only these splits; None takes all.

    Raises:
        DataError: no such place, no index, nothing of these splits, or a chip that is there twice.
    """

    def __init__(
        self, places: str | Path | Sequence[str | Path], *, splits: Sequence[str] | None = None
    ) -> None:
        wanted = [places] if isinstance(places, str | Path) else places
        self.rows: list[IndexRow] = []
        self._folders: dict[str, Path] = {}
        self._sources: list[str] = []
        for place in map(Path, wanted):
            rows = _rows_of_file(place, self._sources) if place.is_file() else cut_rows(read_index(place))
            folder = place.parent if place.is_file() else place
            for row in rows:
                if row.id in self._folders:
                    raise DataError(f"chip {row.id} is also in {self._folders[row.id]}", where=place)
                self._folders[row.id] = folder
            self.rows += [row for row in rows if splits is None or row.split in splits]
        if not self.rows:
            names = ", ".join(map(str, wanted))
            raise DataError("no chips", where=names, expected=f"some of {', '.join(splits or ['any split'])}")
        self._buffers: dict[Path, float] = {}
        self._handles: dict[Path, Any] = {}
        self._owner = os.getpid()

    def subset(self, rows: Sequence[IndexRow]) -> ChipShards:
        """The same with these of its rows, at least one."""
        if not rows:
            raise DataError("no chips chosen")
        other = copy(self)
        other.rows, other._handles = list(rows), {}
        return other

    def require_gsd(self, gsd_m: float | None) -> None:
        """See that all chips are of one scale: `gsd_m` metres a pixel, or, for None, whatever the first has.

        3 % are allowed: `canopy data chips` keeps whole multiples of an image's own pixels, up to 2 % off.

        Raises:
            DataError: a chip of another scale.
        """
        wanted = self.rows[0].gsd_m if gsd_m is None else gsd_m
        for row in self.rows:
            if not abs(row.gsd_m / wanted - 1) <= _GSD_TOLERANCE:
                raise DataError(
                    f"chips of {row.gsd_m:g} m a pixel",
                    where=self._folders[row.id],
                    expected=f"{wanted:g} m, as {'the other chips' if gsd_m is None else 'the model'}",
                    remedy=f"cut them with canopy data chips --gsd {wanted:g}"
                    + ("" if gsd_m is None else ", or set the scale that the model is for (model.gsd_m)"),
                )

    def near_test(self, row: IndexRow) -> bool:
        """Whether a chip lies within its folder's buffer (`canopy data chips --buffer-m`) of a test chip. A
        chips file has no index, and does not know."""
        folder = self._folders[row.id]
        if folder not in self._buffers:
            self._buffers[folder] = _buffer_m(folder)
        return row.test_distance_m <= self._buffers[folder]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, number: int) -> ShardChip:
        row = self.rows[number]
        rgb, cm = self._tensor(row, "rgb"), self._tensor(row, "chm")
        known = cm != NO_HEIGHT
        chm = np.where(known, cm / 100.0, np.nan).astype(np.float32)
        weight = pixel_weight(np.where(known, chm, 0), known, row.weight, row.floor_m)
        shots = self._tensor(row, "shots") if row.shots else NO_SHOTS
        return ShardChip(row, rgb, chm, weight, shots)

    @property
    def fingerprint(self) -> str:
        """Hash of which chips these are, in which order; ids and a file's hash stand for pixels."""
        facts = [*self._sources, *(row.id for row in self.rows)]
        return hashlib.sha256("\n".join(facts).encode()).hexdigest()[:16]

    def _tensor(self, row: IndexRow, name: str) -> np.ndarray:
        from safetensors import SafetensorError, safe_open

        if self._owner != os.getpid():
            self._handles, self._owner = {}, os.getpid()
        path = self._folders[row.id] / row.shard
        try:
            if path not in self._handles:
                self._handles[path] = safe_open(path, framework="numpy")
            return self._handles[path].get_tensor(f"{row.id}/{name}")
        except (SafetensorError, OSError) as error:
            raise DataError(
                f"chip {row.id} cannot be read ({error})", where=path, remedy="run canopy data chips again"
            ) from error

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_handles": {}}


def _buffer_m(folder: Path) -> float:
    """Metres that were kept between train and test chips when `folder` was cut."""
    try:
        return float(json.loads((folder / "settings.json").read_text())["splits"]["buffer_m"])
    except (OSError, ValueError, KeyError, TypeError):
        return SplitRules.buffer_m


def _rows_of_file(path: Path, sources: list[str]) -> list[IndexRow]:
    """Rows of a chips file, which has no index; its hash is added to `sources`."""
    store = read_store(path)
    sources.append(store.data_sha256)
    return [row_of_chip(chip, path.name) for chip in store.chips]


def row_of_chip(chip: Chip, shard: str, licence: str = "") -> IndexRow:
    """The index row of a chip that was not cut from a manifest's pair: what can be read off it."""
    known = chip.chm_m[np.isfinite(chip.chm_m)]
    heights: dict[str, Any] = {
        "height_mean_m": round(float(known.mean()), 3),
        "height_p95_m": float(np.percentile(known, 95)),
        "height_max_m": round(float(known.max()), 3),
        "cover": round(float((known > 2).mean()), 4),
    }
    r = chip.row
    return IndexRow(
        r.id, r.id, r.site, r.kind, r.split, shard,
        height_px=chip.rgb.shape[1], width_px=chip.rgb.shape[2],
        gsd_m=IMAGE_GSD_M, label_gsd_m=LABEL_GSD_M,
        image_share=float(chip.image_valid.mean()), label_share=known.size / max(chip.chm_m.size, 1),
        licence=licence, **(heights if known.size else {"height_p95_m": 0.0}),
    )  # fmt: skip


def site_weights(rows: Sequence[IndexRow], power: float = 0.5) -> np.ndarray:
    """Chance (n,) of each chip, summing to 1: a site counts as its number of chips to `power`.

    1 draws every chip alike, 0 every site alike.
    """
    if not rows:
        raise DataError("no chips to draw from")
    _, place, counts = np.unique([row.site for row in rows], return_inverse=True, return_counts=True)
    weights = counts[place] ** (power - 1.0)
    return weights / weights.sum()


def category(row: IndexRow) -> str:
    """'bare' (95 % of the heights below 2 m), 'tall' (the upper 5 % above 35 m) or 'other'."""
    if row.height_p95_m < _BARE_P95_M:
        return BARE
    return TALL if row.height_p95_m > _TALL_P95_M else OTHER


def sampling_weights(rows: Sequence[IndexRow], *, bare: float = 0.1, tall: float = 0.2) -> np.ndarray:
    """Chance (n,) of each chip, summing to 1.

    Bare and tall chips get fixed shares (10 % and 20 % in the CHMv2 paper, arXiv 2603.06382); where there are
    none, their share goes to the others. Within a category sites count by the square root of their number of
    chips, so that the largest does not rule.

    Raises:
        DataError: no rows, or shares outside 0..1.
    """
    if not (bare >= 0 and tall >= 0 and bare + tall <= 1):
        raise DataError(f"shares {bare} and {tall}", expected="at least 0, together at most 1")
    if not rows:
        raise DataError("no chips to draw from")
    kinds = np.array([category(row) for row in rows])
    sites = np.array([row.site for row in rows])
    shares = {BARE: bare, TALL: tall, OTHER: 1.0 - bare - tall}
    present = {kind: share for kind, share in shares.items() if (kinds == kind).any()}
    total = sum(present.values())
    weights = np.zeros(len(rows))
    for kind, share in present.items():
        members = kinds == kind
        part = share / total if total > 0 else 1 / len(present)
        roots = {site: np.sqrt((sites[members] == site).sum()) for site in np.unique(sites[members])}
        for site, root in roots.items():
            at = members & (sites == site)
            weights[at] = part * root / sum(roots.values()) / at.sum()
    return weights / weights.sum()


def predict_whole(
    network: Callable[[np.ndarray], np.ndarray], chip: Chip, side: int, starts: Callable[[int], list[int]],
    fade_px: float, batch: int = 4,
) -> np.ndarray:  # fmt: skip
    """What a network says of a chip, float32 (l, h, w): the means of the labels' pixels.

    Args:
        network: crops (n, 3, side, side) of `crop_of` -> layers (n, l, side, side).
        chip: with image (3, 2h, 2w).
        side: of a crop, pixels.
        starts: length of the image along an axis, pixels -> the crops' first pixels, which leave no gap.
        fade_px: over how many pixels from its edge a crop's weight rises to the whole.
        batch: crops at a time.
    """
    _, H, W = chip.rgb.shape
    ramp = np.minimum(np.arange(side) + 1.0, np.arange(side, 0, -1.0)) / max(fade_px, 1.0)
    taper = np.minimum.outer(ramp, ramp).clip(max=1.0)
    total, weights = np.zeros((0, H, W)), np.zeros((H, W))
    corners = [(r, c) for r in starts(H) for c in starts(W)]
    for first in range(0, len(corners), batch):
        part = corners[first : first + batch]
        layers = network(np.stack([crop_of(chip, r, c, side) for r, c in part]))
        if first == 0:
            total = np.zeros((layers.shape[1], H, W))
        for (r, c), maps in zip(part, layers, strict=True):
            h, w = min(side, H - r), min(side, W - c)
            total[:, r : r + h, c : c + w] += (maps * taper)[:, :h, :w]
            weights[r : r + h, c : c + w] += taper[:h, :w]
    return (total / weights).reshape(-1, H // 2, 2, W // 2, 2).mean(axis=(2, 4)).astype(np.float32)


def crop_of(chip: Chip, row: int, col: int, side: int) -> np.ndarray:
    """Crop float32 (3, side, side) in 0..1 of a chip's image; holes, and what lies beyond, filled from it."""
    rgb, valid = np.zeros((3, side, side), np.float32), np.zeros((side, side), bool)
    piece = chip.rgb[:, row : row + side, col : col + side]
    rgb[:, : piece.shape[1], : piece.shape[2]] = piece.astype(np.float32) / 255.0
    valid[: piece.shape[1], : piece.shape[2]] = chip.image_valid[row : row + side, col : col + side]
    return fill_invalid(rgb, valid)


def scored_pixels(chip: Chip) -> np.ndarray:
    """Bool (h, w): height known and all of its image pixels present."""
    v = chip.image_valid
    return np.isfinite(chip.chm_m) & v[0::2, 0::2] & v[1::2, 0::2] & v[0::2, 1::2] & v[1::2, 1::2]
