"""A chips file: image and height pairs on one pixel grid, in one safetensors file; no geo libraries needed.

For each chip ID the file holds `ID/rgb` uint8 (3, 2h, 2w) at 0.5 m, where 0,0,0 alone means no image,
`ID/chm` uint16 (h, w) at 1 m in centimetres, 65535 = no height, and perhaps `ID/shots` float32 (n, 4). The
metadata holds the rows (id, site, kind, split) and a hash of the source data. Every shard of a chips folder
is such a file.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from canopy.errors import DataError
from canopy.files import replacing
from canopy.models.registry import header_bytes

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
