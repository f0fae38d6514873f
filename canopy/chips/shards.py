"""Chips folders (`canopy data chips`) read chip by chip, and how often each should be seen. No geo library,
no torch; the torch Datasets over it are in `canopy.chips.streams`."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from copy import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from canopy.chips.index import IndexRow, cut_rows, read_index
from canopy.chips.splits import SplitRules
from canopy.chips.store import IMAGE_GSD_M, LABEL_GSD_M, NO_HEIGHT, NO_SHOTS, Chip, ChipRow, read_store
from canopy.chips.targets import pixel_weight
from canopy.errors import DataError

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
