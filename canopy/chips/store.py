"""A chips folder: its index, the chips and the shards they lie in; no geo library needed.

index.csv (and index.parquet) has one row per chip, cut or rejected. A shard is a safetensors file. For each
chip ID it holds `ID/rgb` uint8 (3, 2h, 2w), where 0,0,0 alone means no image, `ID/chm` uint16 (h, w) in
centimetres, 65535 = no height, and perhaps `ID/shots` float32 (n, 4).
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from copy import copy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from canopy.chips.options import BUFFER_M
from canopy.chips.targets import pixel_weight
from canopy.errors import DataError
from canopy.files import replacing
from canopy.inference.lattice import predict_array
from canopy.models.height import fill_invalid

NO_HEIGHT = 65535
IMAGE_GSD_M, LABEL_GSD_M = 0.5, 1.0  # of chips that say nothing else
INDEX_CSV, INDEX_PARQUET, SHARDS, SETTINGS = "index.csv", "index.parquet", "shards", "settings.json"
NO_SHOTS = np.zeros((0, 4), np.float32)
_GSD_TOLERANCE = 0.03
_NAN = float("nan")


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
        image_share, label_share, cloud_share, contrast, sharpness, match: see `canopy.chips.cut.screen`.
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
    gsd_m: float = IMAGE_GSD_M
    label_gsd_m: float = LABEL_GSD_M
    crs: str = ""
    west: float = _NAN
    south: float = _NAN
    east: float = _NAN
    north: float = _NAN
    weight: float = 1.0
    floor_m: float = 0.0
    shots: int = 0
    height_mean_m: float = _NAN
    height_p95_m: float = _NAN
    height_max_m: float = _NAN
    cover: float = _NAN
    image_share: float = _NAN
    label_share: float = _NAN
    cloud_share: float = _NAN
    contrast: float = _NAN
    sharpness: float = _NAN
    match: float = _NAN
    shift_down_m: float = _NAN
    shift_right_m: float = _NAN
    shift_sure: bool = False
    shift_applied: bool = False
    test_distance_m: float = _NAN
    licence: str = ""

    def __post_init__(self) -> None:
        if not self.pair:
            object.__setattr__(self, "pair", self.id)

    @property
    def is_labelled(self) -> bool:
        """Whether anything is measured: heights, or GEDI shots. Images alone are for pretraining."""
        return self.label_share != 0 or self.shots > 0  # NaN: not counted, as by hand-made indexes


_TYPES = {field.name: str(field.type) for field in dataclasses.fields(ChipRow)}


def write_index(folder: Path, rows: Sequence[ChipRow]) -> None:
    """Write index.csv, and index.parquet where pyarrow is installed; each whole or not at all."""
    import pandas

    table = pandas.DataFrame([dataclasses.asdict(row) for row in rows], columns=list(_TYPES))
    with replacing(folder / INDEX_CSV) as part:
        table.to_csv(part, index=False, lineterminator="\n")
    try:
        import pyarrow  # noqa: F401
    except ImportError:
        return
    with replacing(folder / INDEX_PARQUET) as part:
        table.to_parquet(part, index=False)


def read_index(folder: str | Path) -> list[ChipRow]:
    """Rows of a chips folder, rejected chips included. Raises DataError where there is no readable index."""
    import pandas

    path = Path(folder) / INDEX_CSV
    if not path.is_file():
        what = "no index.csv" if path.parent.is_dir() else "no such chips"
        raise DataError(what, where=folder, expected="a folder made by canopy data chips; data.chips=FOLDER")
    texts = {name: str for name, kind in _TYPES.items() if kind == "str"}
    try:
        table = pandas.read_csv(path, dtype=texts)
        table = table[list(_TYPES)].fillna(dict.fromkeys(texts, "")).astype(_TYPES)
    except (KeyError, ValueError) as error:
        raise DataError(
            f"is no index of chips ({error})", where=path, remedy="cut the chips again"
        ) from error
    return [ChipRow(**row) for row in table.to_dict("records")]


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
        return pixel_weight(self.chm_m, self.row.weight, self.row.floor_m)

    @property
    def scored(self) -> np.ndarray:
        """Bool (h, w): height known and all of its image pixels present."""
        h, w = self.chm_m.shape
        return np.isfinite(self.chm_m) & self.image_valid.reshape(h, 2, w, 2).all(axis=(1, 3))


def described(chip: Chip, **facts: Any) -> Chip:
    """The chip with what can be read off it in its row, and `facts`."""
    known = chip.chm_m[np.isfinite(chip.chm_m)]
    facts["shots"] = len(chip.shots)
    facts["height_px"], facts["width_px"] = chip.rgb.shape[1:]
    facts["image_share"] = round(float(chip.image_valid.mean()), 4)
    facts["label_share"] = round(known.size / max(chip.chm_m.size, 1), 4)
    if known.size:
        facts["height_mean_m"] = round(float(known.mean()), 3)
        facts["height_p95_m"] = round(float(np.percentile(known, 95)), 3)
        facts["height_max_m"] = round(float(known.max()), 3)
        facts["cover"] = round(float((known > 2).mean()), 4)
    return dataclasses.replace(chip, row=dataclasses.replace(chip.row, **facts))


def write_shard(path: Path, chips: Sequence[Chip], rows: Sequence[ChipRow] = ()) -> None:
    """Write chips to one shard, heights rounded to centimetres; equal bytes for equal chips.

    `rows`, those of rejected chips among them, go into its metadata, where `read_rows` finds them.
    """
    from safetensors.numpy import save_file

    tensors: dict[str, np.ndarray] = {}
    for chip in chips:
        known = np.isfinite(chip.chm_m)
        cm = np.where(known, np.round(np.where(known, chip.chm_m, 0) * 100), NO_HEIGHT)
        tensors[f"{chip.row.id}/chm"] = cm.astype(np.uint16)
        tensors[f"{chip.row.id}/rgb"] = np.ascontiguousarray(chip.rgb)
        if len(chip.shots):
            tensors[f"{chip.row.id}/shots"] = chip.shots.astype(np.float32)
    with replacing(path) as part:
        save_file(tensors, part, {"rows": json.dumps([dataclasses.asdict(row) for row in rows])})
        part.chmod(0o644)  # it writes 0600, which nobody else could read


def read_rows(path: Path) -> list[ChipRow] | None:
    """The rows that a shard was written with; None where there is no whole shard."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="numpy") as file:
            return [ChipRow(**values) for values in json.loads(file.metadata()["rows"])]
    except (SafetensorError, OSError, ValueError, TypeError, KeyError):
        return None


class ChipShards:
    """Chips by number, read when asked for; picklable, and safe in forked and spawned workers.

    Args:
        places: folders made by `canopy data chips`, one or several.
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
        for folder in map(Path, wanted):
            rows = [row for row in read_index(folder) if not row.reason]
            for row in rows:
                if row.id in self._folders:
                    raise DataError(f"chip {row.id} is also in {self._folders[row.id]}", where=folder)
                self._folders[row.id] = folder
            self.rows += [row for row in rows if splits is None or row.split in splits]
        if not self.rows:
            names = ", ".join(map(str, wanted))
            of = f" of {', '.join(splits)}" if splits else ""
            raise DataError(f"no chips{of}", where=names, remedy="name other chips or splits")
        self._buffers = {folder: _buffer_m(folder) for folder in map(Path, wanted)}

    def subset(self, rows: Sequence[ChipRow]) -> ChipShards:
        """The same with these of its rows, perhaps none."""
        other = copy(self)
        other.rows = list(rows)
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
        """Whether a chip lies within its folder's buffer (`canopy data chips --buffer-m`) of a test chip."""
        return row.test_distance_m <= self._buffers[self._folders[row.id]]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, number: int) -> Chip:
        from safetensors import SafetensorError, safe_open

        row = self.rows[number]
        path = self._folders[row.id] / row.shard
        try:
            with safe_open(path, framework="numpy") as file:
                cm = file.get_tensor(f"{row.id}/chm")
                shots = file.get_tensor(f"{row.id}/shots") if row.shots else NO_SHOTS
                chm = np.where(cm == NO_HEIGHT, np.nan, cm / 100.0).astype(np.float32)
                return Chip(row, file.get_tensor(f"{row.id}/rgb"), chm, shots)
        except (SafetensorError, OSError) as error:
            raise DataError(
                f"chip {row.id} cannot be read ({error})", where=path, remedy="run canopy data chips again"
            ) from error

    def __iter__(self) -> Iterator[Chip]:
        return (self[i] for i in range(len(self)))

    @property
    def fingerprint(self) -> str:
        """Hash of which chips these are, in which order; ids stand for pixels."""
        return hashlib.sha256("\n".join(row.id for row in self.rows).encode()).hexdigest()[:16]


def _buffer_m(folder: Path) -> float:
    """The buffer that a folder's chips were split with."""
    try:
        return float(json.loads((folder / SETTINGS).read_text())["splits"]["buffer_m"])
    except (OSError, ValueError, KeyError, TypeError):  # chips that were not cut from pairs
        return BUFFER_M


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
