"""Chips and the shards they lie in; no geo library needed.

A shard is a safetensors file. For each chip ID it holds `ID/rgb` uint8 (3, 2h, 2w), where 0,0,0 alone means
no image, `ID/chm` uint16 (h, w) in centimetres, 65535 = no height, and perhaps `ID/shots` float32 (n, 4). Its
metadata has where the chips come from and a hash of their sources, so that a shard can be used alone.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Callable, Iterator, Sequence
from copy import copy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from canopy.chips.index import ChipRow, cut_rows, height_facts, read_index
from canopy.chips.targets import pixel_weight
from canopy.errors import DataError
from canopy.files import replacing
from canopy.inference.lattice import predict_array
from canopy.models.height import fill_invalid

NO_HEIGHT = 65535
IMAGE_GSD_M, LABEL_GSD_M = 0.5, 1.0  # of chips that say nothing else
NO_SHOTS = np.zeros((0, 4), np.float32)
BUFFER_M = 50.0  # between training and test chips, where a folder says nothing else
_GSD_TOLERANCE = 0.03
_FORMAT = "canopy-chips"


@dataclass(frozen=True, eq=False)
class Chip:
    """One chip.

    Attributes:
        row: its row of the index.
        rgb: uint8 (3, 2h, 2w), 0,0,0 alone where there is no image.
        chm_m: float32 (h, w) metres on the label grid, NaN = unknown.
        shots: float32 (n, 4) GEDI shots: row, col on the label grid, height in metres, weight.
    """

    row: ChipRow
    rgb: np.ndarray
    chm_m: np.ndarray
    shots: np.ndarray = field(default_factory=lambda: NO_SHOTS)

    @property
    def image_valid(self) -> np.ndarray:
        """Bool (2h, 2w), True where there is an image."""
        return self.rgb.max(axis=0) > 0

    @property
    def weight(self) -> np.ndarray:
        """Float32 (h, w), what each label pixel is worth, 0 where unknown."""
        known = np.isfinite(self.chm_m)
        return pixel_weight(np.where(known, self.chm_m, 0), known, self.row.weight, self.row.floor_m)

    @property
    def scored(self) -> np.ndarray:
        """Bool (h, w): height known and all of its image pixels present."""
        v = self.image_valid
        return np.isfinite(self.chm_m) & v[0::2, 0::2] & v[1::2, 0::2] & v[0::2, 1::2] & v[1::2, 1::2]


def described(chip: Chip, shard: str, licence: str = "") -> ChipRow:
    """The row of a chip that was not cut from a manifest's pair: what can be read off it."""
    known = chip.chm_m[np.isfinite(chip.chm_m)]
    gsd = {} if chip.row.gsd_m == chip.row.gsd_m else {"gsd_m": IMAGE_GSD_M, "label_gsd_m": LABEL_GSD_M}
    facts: dict[str, Any] = gsd | (height_facts(known) or {"height_p95_m": 0.0})
    return dataclasses.replace(
        chip.row,
        shard=shard,
        height_px=chip.rgb.shape[1],
        width_px=chip.rgb.shape[2],
        shots=len(chip.shots),
        image_share=float(chip.image_valid.mean()),
        label_share=known.size / max(chip.chm_m.size, 1),
        licence=licence,
        **facts,
    )


@dataclass(frozen=True)
class ChipStore:
    """All chips of one shard, in memory, with the hash of the data they were cut from."""

    chips: tuple[Chip, ...]
    data_sha256: str

    def of_split(self, *splits: str) -> list[Chip]:
        """Chips of the named splits, in file order."""
        return [c for c in self.chips if c.row.split in splits]


def write_store(path: str | Path, chips: Sequence[Chip], source: str) -> None:
    """Write chips to one shard, heights rounded to centimetres; equal bytes for equal chips."""
    from safetensors.numpy import save_file

    path = Path(path)
    tensors: dict[str, np.ndarray] = {}
    for chip in chips:
        known = np.isfinite(chip.chm_m)
        cm = np.where(known, np.round(np.where(known, chip.chm_m, 0) * 100), NO_HEIGHT)
        tensors[f"{chip.row.id}/chm"] = cm.astype(np.uint16)
        tensors[f"{chip.row.id}/rgb"] = np.ascontiguousarray(chip.rgb)
        if len(chip.shots):
            tensors[f"{chip.row.id}/shots"] = chip.shots.astype(np.float32)
    rows = [{k: getattr(chip.row, k) for k in ("id", "site", "kind", "split")} for chip in chips]
    facts = json.dumps({"rows": rows, "data_sha256": source})
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as part:
        # One entry alone: the library puts several in random order.
        save_file(tensors, part, metadata={_FORMAT: facts})
        part.chmod(0o644)  # it writes 0600, which nobody else could read


def read_store(path: str | Path) -> ChipStore:
    """Read a shard; DataError where it is missing or not one."""
    from safetensors import SafetensorError, safe_open

    path = Path(path)
    if not path.is_file():
        raise DataError("no such chips file", where=path, expected="a shard of canopy data chips")
    try:
        with safe_open(path, framework="numpy") as file:
            facts = _facts(file.metadata() or {}, path)
            chips = []
            for row in (ChipRow(**row) for row in facts["rows"]):
                shots = f"{row.id}/shots" in set(file.keys())
                chip = Chip(
                    row,
                    file.get_tensor(f"{row.id}/rgb"),
                    _metres(file.get_tensor(f"{row.id}/chm")),
                    file.get_tensor(f"{row.id}/shots") if shots else NO_SHOTS,
                )
                chips.append(dataclasses.replace(chip, row=described(chip, path.name)))
    except SafetensorError as error:
        raise DataError(f"is damaged ({error})", where=path, remedy="build it again") from error
    return ChipStore(tuple(chips), facts["data_sha256"])


def _facts(header: dict[str, str], path: Path) -> dict[str, Any]:
    """What a shard says of its chips; shards of earlier versions have it in several entries."""
    if _FORMAT in header:
        return dict(json.loads(header[_FORMAT]))
    if header.get("format") != _FORMAT:
        raise DataError("is not a chips file", where=path)
    return {"rows": json.loads(header["rows"]), "data_sha256": header["data_sha256"]}


def _metres(cm: np.ndarray) -> np.ndarray:
    return np.where(cm == NO_HEIGHT, np.nan, cm / 100.0).astype(np.float32)


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
        self.rows: list[ChipRow] = []
        self._folders: dict[str, Path] = {}
        self._sources: list[str] = []
        for place in map(Path, wanted):
            if place.is_file():
                store = read_store(place)
                self._sources.append(store.data_sha256)
                rows, folder = [chip.row for chip in store.chips], place.parent
            else:
                rows, folder = cut_rows(read_index(place)), place
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

    def subset(self, rows: Sequence[ChipRow]) -> ChipShards:
        """The same with these of its rows, perhaps none."""
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

    def near_test(self, row: ChipRow) -> bool:
        """Whether a chip lies within its folder's buffer (`canopy data chips --buffer-m`) of a test chip. A
        chips file has no index, and does not know."""
        folder = self._folders[row.id]
        if folder not in self._buffers:
            try:
                settings = json.loads((folder / "settings.json").read_text())
                self._buffers[folder] = float(settings["splits"]["buffer_m"])
            except (OSError, ValueError, KeyError, TypeError):
                self._buffers[folder] = BUFFER_M
        return row.test_distance_m <= self._buffers[folder]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, number: int) -> Chip:
        row = self.rows[number]
        shots = self._tensor(row, "shots") if row.shots else NO_SHOTS
        return Chip(row, self._tensor(row, "rgb"), _metres(self._tensor(row, "chm")), shots)

    def __iter__(self) -> Iterator[Chip]:
        return (self[i] for i in range(len(self)))

    @property
    def fingerprint(self) -> str:
        """Hash of which chips these are, in which order; ids and a file's hash stand for pixels."""
        facts = [*self._sources, *(row.id for row in self.rows)]
        return hashlib.sha256("\n".join(facts).encode()).hexdigest()[:16]

    def _tensor(self, row: ChipRow, name: str) -> np.ndarray:
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


# ---- whole chips ----------------------------------------------------------------------------------------
def predict_chip(
    network: Callable[[np.ndarray], np.ndarray], chip: Chip, crop_px: int, overlap_px: float, batch: int = 4
) -> np.ndarray:
    """What a network says of a chip at its labels' pixels, float32 (l, h, w); see `lattice.predict_array`."""
    rgb = chip.rgb.astype(np.float32) / 255.0
    layers = predict_array(network, rgb, chip.image_valid, crop_px, overlap_px, batch)
    _, H, W = layers.shape
    return layers.reshape(-1, H // 2, 2, W // 2, 2).mean(axis=(2, 4)).astype(np.float32)


def crop_of(chip: Chip, row: int, col: int, side: int) -> np.ndarray:
    """Crop float32 (3, side, side) in 0..1 of a chip's image; holes, and what lies beyond, filled from it."""
    place = np.s_[row : row + side, col : col + side]
    rgb, valid = chip.rgb[:, *place].astype(np.float32) / 255.0, chip.image_valid[place]
    beyond = ((0, side - valid.shape[0]), (0, side - valid.shape[1]))
    return fill_invalid(np.pad(rgb, ((0, 0), *beyond)), np.pad(valid, beyond))
