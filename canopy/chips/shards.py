"""A chips folder (`canopy data chips`) read chip by chip, and how often each should be seen. No geo library,
no torch; the torch Datasets over it are in `canopy.chips.streams`."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from canopy.chips.index import IndexRow, cut_rows, read_index
from canopy.chips.store import NO_HEIGHT, Chip, ChipRow
from canopy.chips.targets import pixel_weight
from canopy.errors import DataError

BARE, TALL, OTHER = "bare", "tall", "other"
_BARE_P95_M, _TALL_P95_M = 2.0, 35.0


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
        folder: made by `canopy data chips`.
        rows: which chips; None takes all that were cut.
        splits: only these splits; None takes all.

    Raises:
        DataError: there is no index, or nothing of these splits.
    """

    def __init__(
        self,
        folder: str | Path,
        rows: Sequence[IndexRow] | None = None,
        *,
        splits: Sequence[str] | None = None,
    ) -> None:
        self.folder = Path(folder)
        chosen = cut_rows(read_index(self.folder) if rows is None else rows)
        self.rows = [r for r in chosen if splits is None or r.split in splits]
        if not self.rows:
            raise DataError(
                "no chips", where=folder, expected=f"some of {', '.join(splits or ['any split'])}"
            )
        self._handles: dict[str, Any] = {}
        self._owner = os.getpid()

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, number: int) -> ShardChip:
        row = self.rows[number]
        rgb, cm = self._tensor(row, "rgb"), self._tensor(row, "chm")
        known = cm != NO_HEIGHT
        chm = np.where(known, cm / 100.0, np.nan).astype(np.float32)
        weight = pixel_weight(np.where(known, chm, 0), known, row.weight, row.floor_m)
        shots = self._tensor(row, "shots") if row.shots else np.zeros((0, 4), np.float32)
        return ShardChip(row, rgb, chm, weight, shots)

    @property
    def fingerprint(self) -> str:
        """Hash of which chips these are, in which order; ids stand for their pixels."""
        return hashlib.sha256("\n".join(row.id for row in self.rows).encode()).hexdigest()[:16]

    def _tensor(self, row: IndexRow, name: str) -> np.ndarray:
        from safetensors import SafetensorError, safe_open

        if self._owner != os.getpid():
            self._handles, self._owner = {}, os.getpid()
        path = self.folder / row.shard
        try:
            if row.shard not in self._handles:
                self._handles[row.shard] = safe_open(path, framework="numpy")
            return self._handles[row.shard].get_tensor(f"{row.id}/{name}")
        except (SafetensorError, OSError) as error:
            raise DataError(
                f"chip {row.id} cannot be read ({error})", where=path, remedy="run canopy data chips again"
            ) from error

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_handles": {}}


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
