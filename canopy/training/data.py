"""What a fine-tuning run trains and validates on: chosen chips, how often each is drawn, whole val chips."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from canopy.chips.augment import AugmentConfig
from canopy.chips.data import ChipBatches, ChipSource
from canopy.chips.store import BARE, TALL, Chip, ChipShards, IndexRow, category, sampling_weights
from canopy.errors import DataError
from canopy.training.settings import DataSettings, FinetuneSettings

SYNTH, PLOT = "synth", "neon"
_MOST_TIMES = 4


class WholeChips(Sequence[Chip]):
    """Chips as scoring wants them, read when asked for."""

    def __init__(self, source: ChipSource, numbers: Sequence[int] | None = None) -> None:
        self.source = source
        self.numbers = range(len(source)) if numbers is None else numbers

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, number: int) -> Chip:  # type: ignore[override]
        return self.source[self.numbers[number]].as_chip()

    def __iter__(self) -> Iterator[Chip]:
        return (self[i] for i in range(len(self)))

    def some(self, most: int | None) -> WholeChips:
        """At most so many of them, evenly spaced; None keeps all."""
        if most is None or most >= len(self):
            return self
        picked = np.linspace(0, len(self) - 1, most).round().astype(int)
        return WholeChips(self.source, [self.numbers[i] for i in picked])


@dataclass(frozen=True)
class TrainingData:
    """The chips of a run.

    Attributes:
        train: chips that are drawn from; val: whole val chips, may be empty.
        sha256: stands for all chips of both.
        val_seen: whether val is part of train.
    """

    train: ChipSource
    val: WholeChips
    sha256: str
    val_seen: bool

    def facts(self) -> dict[str, object]:
        """For the model's card."""
        val = [self.val.source.rows[i].pair for i in self.val.numbers]
        return {
            "sha256": self.sha256,
            "train_chips": len(self.train),
            "val_chips": len(self.val),
            "train_ids": sorted({row.pair for row in self.train.rows}),
            "val_ids": sorted(set(val)),
            "val_seen": self.val_seen,
        }


def open_data(settings: DataSettings, gsd_m: float | None) -> TrainingData:
    """The train and val chips of `settings.chips` that have labels.

    With `include_val` those val chips are trained on that keep the buffer to test chips, as train chips do.

    Args:
        gsd_m: ground metres per pixel of the model; None takes any, but one for all chips.

    Raises:
        DataError: no such chips, chips of another scale, or none to train on; `val_sites` that name no site,
            or several.
    """
    chips = ChipShards(settings.chips)
    chips.require_gsd(gsd_m)
    train, val = ([r for r in chips.rows if r.split == s and r.is_labelled] for s in ("train", "val"))
    if settings.val_sites:
        train, val = hold_out(train, val, settings.val_sites)
    train = label_subset(train, settings.label_share, settings.label_seed)
    if settings.include_val:
        train = [*train, *(row for row in val if not chips.near_test(row))]
    if not train:
        places = ", ".join(map(str, settings.chips))
        raise DataError("no training chips", where=places, expected="labelled chips of the split 'train'")
    digest = hashlib.sha256("\n".join(r.id for r in [*train, *val]).encode()).hexdigest()
    # An empty val is no error: the training chips then stand behind an empty list of numbers.
    shown = WholeChips(chips.subset(val)) if val else WholeChips(chips.subset(train), [])
    return TrainingData(chips.subset(train), shown, digest, settings.include_val)


def hold_out(
    train: Sequence[IndexRow], val: Sequence[IndexRow], sites: Sequence[str]
) -> tuple[list[IndexRow], list[IndexRow]]:
    """Training chips of other sites than `sites` (beginnings of names), and all chips of these.

    The other sites' val chips are left out: they lie beside training chips, and would mix two questions.
    """
    known = sorted({row.site for row in [*train, *val]})
    held = set()
    for name in sites:
        found = [site for site in known if site.lower().startswith(name.lower())]
        if len(found) != 1:
            raise DataError(
                f"val_sites: {name!r} begins the name of {len(found)} sites",
                expected=f"the beginning of one of: {'; '.join(known)}",
            )
        held.add(found[0])
    unseen = [row for row in [*train, *val] if row.site in held]
    return [row for row in train if row.site not in held], unseen


def split_chips(chips: Path | Sequence[Path], split: str) -> Sequence[Chip]:
    """The whole chips of one split of a chips folder or several, in the index's order; perhaps none."""
    shards = ChipShards(chips)
    chosen = [row for row in shards.rows if row.split == split]
    return WholeChips(shards.subset(chosen)) if chosen else []


def some_heights(chips: ChipSource, most: int = 200) -> np.ndarray:
    """Known heights (n,) in metres of evenly spaced pixels of at most so many evenly spaced chips."""
    picked = np.unique(np.linspace(0, len(chips) - 1, most).round().astype(int))
    found = [chip.chm_m[::4, ::4][chip.weight[::4, ::4] > 0] for chip in (chips[int(i)] for i in picked)]
    return np.concatenate(found)


def label_subset(rows: Sequence[IndexRow], share: float, seed: int = 0) -> list[IndexRow]:
    """Of every kind of chip (lidar, plot, synthetic) the first `share`, at least one, in an order that a hash
    of their ids gives. So the subset of a smaller share lies inside that of a larger one. Rows keep their
    order.
    """
    if share >= 1:
        return list(rows)
    chosen: set[str] = set()
    for kind in {row.kind for row in rows}:
        members = [row for row in rows if row.kind == kind]
        members.sort(key=lambda r: hashlib.sha256(f"{seed}:{r.id}".encode()).digest())
        chosen |= {r.id for r in members[: max(1, math.ceil(share * len(members) - 1e-9))]}
    return [row for row in rows if row.id in chosen]


def batches(settings: FinetuneSettings, data: TrainingData) -> ChipBatches:
    """The stream of training batches of a run."""
    return ChipBatches(
        data.train,
        settings.batch,
        settings.crop_px,
        AugmentConfig(**settings.augment.model_dump()),
        seed=settings.seed,
        chances=chances(data.train.rows, settings.data),
        with_shots=settings.loss.footprint != 0,
    )


def chances(rows: Sequence[IndexRow], settings: DataSettings) -> np.ndarray:
    """Chance (n,) of each chip, summing to 1: height categories and sites within each kind of chip, and the
    set shares for plots and synthetic chips where there are any besides lidar.

    A height category is drawn at most four times as often as its chips' number says: one bare chip among a
    hundred would otherwise be a tenth of all that is seen.
    """
    kinds = np.array([row.kind if row.kind in (SYNTH, PLOT) else "lidar" for row in rows])
    shares = {PLOT: settings.neon_share, SYNTH: settings.synth_share}
    shares["lidar"] = max(1.0 - sum(s for k, s in shares.items() if (kinds == k).any()), 0.0)
    out = np.zeros(len(rows))
    for kind, share in shares.items():
        members = np.flatnonzero(kinds == kind)
        if len(members):
            part = [rows[int(i)] for i in members]
            bare, tall = (
                min(wanted, _MOST_TIMES * sum(category(row) == name for row in part) / len(part))
                for name, wanted in ((BARE, settings.bare_share), (TALL, settings.tall_share))
            )
            out[members] = share * sampling_weights(part, bare=bare, tall=tall)
    if not out.sum() > 0:
        raise DataError("no training chip has a chance", remedy="raise neon_share or synth_share")
    return out / out.sum()
