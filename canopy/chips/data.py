"""Chips as training takes them: which are used, how often each is drawn, batches, Lightning's data module.

Training batches never end, and batch j is a function of (chips, seed, j) alone, whatever the number of
workers: worker k of n makes batches k, k + n, ... and torch's DataLoader hands them out in turn. So a
training's step says where its stream stands, and a resumed run sees exactly what it would have seen.
"""

from __future__ import annotations

import hashlib
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Generic, Literal, TypeVar

import numpy as np
import pytorch_lightning as pl
import torch
from pydantic import BeforeValidator, Field, model_validator
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from canopy.chips.augment import AugmentSettings, Sample, make_crop
from canopy.chips.store import Chip, ChipRow, ChipShards
from canopy.config import Settings
from canopy.errors import DataError

T = TypeVar("T")
_BARE_P95_M, _TALL_P95_M = 2.0, 35.0
_MOST_TIMES = 4

# One folder of `canopy data chips`, or a list of them: `data.chips=[chips,synth]`.
ChipPlaces = Annotated[
    tuple[Path, ...],
    BeforeValidator(lambda value: (value,) if isinstance(value, str | Path) else value),
    Field(min_length=1),
]


class DataSettings(Settings):
    """Where the labels are and how often each kind is seen.

    `chips`: a folder of `canopy data chips`, or a list of them. `bare_share`, `tall_share`: chance of a chip
    of that height category; `neon_share`, `synth_share`: chance of a plot or a synthetic chip, where there
    are any.
    `label_share`: share of the training chips that may be used; a smaller share is a subset of a larger
    one. `include_val`: train on the val chips too, but for those within the folder's buffer of a test chip;
    their scores are then called "seen". `val_chips`: validate on at most so many, evenly spaced (the final
    scores count all).
    `val_sites`: beginnings of sites' names; validation is then on all train and val chips of these sites, and
    training on the others: what a model knows of places it has not seen, without looking at a test chip.
    """

    chips: ChipPlaces = (Path("chips"),)
    bare_share: float = Field(default=0.1, ge=0, le=1)
    tall_share: float = Field(default=0.2, ge=0, le=1)
    neon_share: float = Field(default=0.12, ge=0, lt=1)
    synth_share: float = Field(default=0.12, ge=0, lt=1)
    label_share: float = Field(default=1.0, gt=0, le=1)
    include_val: bool = False
    val_chips: int | None = Field(default=None, ge=1)
    val_sites: tuple[str, ...] = ()

    @model_validator(mode="after")
    def _apart(self) -> DataSettings:
        if self.val_sites and self.include_val:
            raise ValueError("val_sites are there to be unseen: no include_val")
        return self


# ---- which chips ----------------------------------------------------------------------------------------
@dataclass(frozen=True)
class ChosenChips:
    """The chips of a run: `train` is drawn from, `val` (may be empty) validated on; `val_seen`: it is part
    of train."""

    train: ChipShards
    val: ChipShards
    val_seen: bool

    def facts(self) -> dict[str, object]:
        """For the model's card."""
        ids = [row.id for row in [*self.train.rows, *self.val.rows]]
        return {
            "sha256": hashlib.sha256("\n".join(ids).encode()).hexdigest(),
            "train_chips": len(self.train),
            "val_chips": len(self.val),
            "train_ids": sorted({row.pair for row in self.train.rows}),
            "val_ids": sorted({row.pair for row in self.val.rows}),
            "val_seen": self.val_seen,
        }

    @property
    def licence(self) -> str:
        """Of the training data, as the manifest told it; 'not stated' where it is silent on some of it."""
        found = {row.licence for row in self.train.rows}
        return "not stated" if "" in found else "; ".join(sorted(found))


def choose_chips(settings: DataSettings, gsd_m: float | None) -> ChosenChips:
    """The train and val chips of `settings.chips` that have labels.

    With `include_val` those val chips are trained on that keep the buffer to test chips, as train chips do.

    Args:
        settings: where they are and which are wanted.
        gsd_m: ground metres per pixel of the model; None takes any, but one for all chips.

    Raises:
        DataError: no such chips, chips of another scale, or none to train on; `val_sites` that name no site,
            or several.
    """
    chips = ChipShards(settings.chips)
    chips.require_gsd(gsd_m)
    train, val = ([r for r in chips.rows if r.split == s and r.is_labelled] for s in ("train", "val"))
    if settings.val_sites:
        # Other sites' val chips are left out: they lie beside training chips, and would mix two questions.
        every = [*train, *val]
        held = {_site(name, sorted({row.site for row in every})) for name in settings.val_sites}
        train, val = [r for r in train if r.site not in held], [r for r in every if r.site in held]
    train = label_subset(train, settings.label_share)
    if settings.include_val:
        train = [*train, *(row for row in val if not chips.near_test(row))]
    if not train:
        places = ", ".join(map(str, settings.chips))
        raise DataError("no training chips", where=places, expected="labelled chips of the split 'train'")
    return ChosenChips(chips.subset(train), chips.subset(val), settings.include_val)


def _site(beginning: str, known: Sequence[str]) -> str:
    """The one site whose name begins so."""
    found = [site for site in known if site.lower().startswith(beginning.lower())]
    if len(found) != 1:
        raise DataError(
            f"val_sites: {beginning!r} begins the name of {len(found)} sites",
            expected=f"the beginning of one of: {'; '.join(known)}",
        )
    return found[0]


def label_subset(rows: Sequence[ChipRow], share: float) -> list[ChipRow]:
    """Of every kind of chip (lidar, plot, synthetic) the first `share`, at least one, in an order that a hash
    of their ids gives. So the subset of a smaller share lies inside that of a larger one. Rows keep their
    order.
    """
    chosen: set[str] = set()
    for kind in {row.kind for row in rows}:
        members = [row for row in rows if row.kind == kind]
        members.sort(key=lambda r: hashlib.sha256(f"0:{r.id}".encode()).digest())
        chosen |= {r.id for r in members[: max(1, math.ceil(share * len(members) - 1e-9))]}
    return [row for row in rows if row.id in chosen]


def some_heights(chips: ChipShards, most: int = 200) -> np.ndarray:
    """Known heights (n,) in metres of evenly spaced pixels of at most so many evenly spaced chips."""
    some = (chips[number] for number in evenly(len(chips), most))
    return np.concatenate([chip.chm_m[::4, ::4][chip.weight[::4, ::4] > 0] for chip in some])


def evenly(count: int, most: int | None) -> list[int]:
    """At most so many of the numbers 0..count - 1, evenly spaced; None takes all."""
    if most is None or most >= count:
        return list(range(count))
    return np.unique(np.linspace(0, count - 1, most).round().astype(int)).tolist()


# ---- how often each -------------------------------------------------------------------------------------
def chances(rows: Sequence[ChipRow], settings: DataSettings) -> np.ndarray:
    """Chance (n,) of each chip, summing to 1: height categories and sites within each kind of chip, and the
    set shares for plots and synthetic chips where there are any besides lidar.

    Bare and tall chips get fixed shares (10 % and 20 % in the CHMv2 paper, arXiv 2603.06382), but are drawn
    at most four times as often as their number says: one bare chip among a hundred would otherwise be a tenth
    of all that is seen. Within a category sites count by the square root of their number of chips, so that
    the largest does not rule.
    """
    kinds = np.array([row.kind for row in rows])
    p95 = np.array([row.height_p95_m for row in rows])
    category = np.where(p95 < _BARE_P95_M, 0, np.where(p95 > _TALL_P95_M, 1, 2))
    kind_shares = {"neon": settings.neon_share, "synth": settings.synth_share}
    kind_shares["lidar"] = max(1.0 - sum(s for k, s in kind_shares.items() if (kinds == k).any()), 0.0)
    out = np.zeros(len(rows))
    for kind in np.unique(kinds):
        counts = np.bincount(category[kinds == kind], minlength=3) / (kinds == kind).sum()
        shares = np.minimum([settings.bare_share, settings.tall_share, 1.0], [*(_MOST_TIMES * counts[:2]), 1])
        shares[2] = max(1.0 - shares[:2].sum(), 0.0) if counts[2] else 0.0
        shares = shares if shares.sum() > 0 else counts
        for number in np.flatnonzero(counts):
            members = np.flatnonzero((kinds == kind) & (category == number))
            part = kind_shares[kind] * shares[number] / shares[counts > 0].sum()
            out[members] = part * site_weights([rows[int(i)] for i in members])
    if not out.sum() > 0:
        raise DataError("no training chip has a chance", remedy="raise neon_share or synth_share")
    return out / out.sum()


def site_weights(rows: Sequence[ChipRow], power: float = 0.5) -> np.ndarray:
    """Chance (n,) of each chip, summing to 1: a site counts as its number of chips to `power`.

    1 draws every chip alike, 0 every site alike.
    """
    _, place, counts = np.unique([row.site for row in rows], return_inverse=True, return_counts=True)
    weights = counts[place] ** (power - 1.0)
    return weights / weights.sum()


# ---- batches --------------------------------------------------------------------------------------------
class BatchStream(IterableDataset[T], Generic[T], ABC):
    """Endless batches; a subclass says what batch number j is.

    Process r of n takes batch j * n + r as its j-th, so all together see what one would with a batch n times
    as large. Use with `DataLoader(stream, batch_size=None, num_workers=n)`.
    """

    def __init__(self, shards: ChipShards, batch: int, seed: int, chances: np.ndarray | None = None) -> None:
        self.shards, self.batch, self.seed, self.chances = shards, batch, seed, chances
        self.first, self.rank, self.world = 0, 0, 1

    def __iter__(self) -> Iterator[T]:
        worker = get_worker_info()
        number = self.first + (worker.id if worker else 0)
        while True:
            yield self.make(number)
            number += worker.num_workers if worker else 1

    def make(self, number: int) -> T:
        """Batch `number` of this process."""
        return self.drawn(number * self.world + self.rank)

    def draw_chip(self, rng: np.random.Generator) -> Chip:
        """A chip by its chance."""
        return self.shards[int(rng.choice(len(self.shards), p=self.chances))]

    @abstractmethod
    def drawn(self, number: int) -> T:
        """Batch `number` of the stream that all processes share."""


class ChipDataset(BatchStream[Sample]):
    """Batches of augmented training crops: rgb (B, 3, S, S), target and weight (B, 1, S/2, S/2), shots
    (B, K, 5); see `augment.Sample`. Weights hold the date gap and the sensor's floor of the chip.

    Args:
        shards: chips to draw from; crop_px: S, even; augment: None for plain crops;
        chances: (n,) of each chip, summing to 1; None draws all alike;
        with_shots: give the GEDI shots their weight.
    """

    def __init__(
        self,
        shards: ChipShards,
        batch: int,
        crop_px: int,
        augment: AugmentSettings | None,
        *,
        seed: int = 0,
        chances: np.ndarray | None = None,
        with_shots: bool = True,
    ) -> None:
        super().__init__(shards, batch, seed, chances)
        self.crop_px, self.augment, self.with_shots = crop_px, augment, with_shots

    def drawn(self, number: int) -> Sample:
        samples = []
        for index in range(number * self.batch, (number + 1) * self.batch):
            rng = np.random.default_rng((self.seed, index, 2))
            samples.append(make_crop(self.draw_chip(rng), self.crop_px, rng, self.augment))
            if not self.with_shots:
                samples[-1].shots[:, 3] = 0
        return _batch_of(samples)


def _batch_of(samples: Sequence[Sample]) -> Sample:
    return Sample(*(torch.stack(parts) for parts in zip(*samples, strict=True)))


def as_dict(sample: Sample) -> dict[str, torch.Tensor]:
    """A batch in torchgeo's words: `image` (B, 3, S, S) in 0..1; `mask` (B, 1, S, S), canopy height in metres
    on the image's pixels, NaN where unknown; `weight` (B, 1, S, S), 0 there."""
    target = torch.where(sample.weight > 0, sample.target, torch.nan)
    mask, weight = (x.repeat_interleave(2, -1).repeat_interleave(2, -2) for x in (target, sample.weight))
    return {"image": sample.rgb, "mask": mask, "weight": weight}


class StreamDataModule(pl.LightningDataModule):
    """Serves a stream from the trainer's step on, each process its own part.

    A checkpoint knows which chips it is of: going on with others, or in other numbers of processes, raises
    DataError.
    """

    collate: Callable[[Any], Any] | None = None

    def __init__(self, stream: BatchStream[Any], workers: int = 0) -> None:
        super().__init__()
        self.stream, self.workers = stream, workers

    def train_dataloader(self) -> DataLoader[Any]:
        trainer = self.trainer
        if trainer is not None:
            self.stream.rank, self.stream.world = trainer.global_rank, trainer.world_size
            self.stream.first = trainer.global_step
        return DataLoader(
            self.stream,
            batch_size=None,
            collate_fn=self.collate,
            num_workers=self.workers,
            # A forked child would inherit torch's threads in whatever state they are.
            multiprocessing_context="spawn" if self.workers else None,
            pin_memory=trainer is not None and trainer.strategy.root_device.type == "cuda",
        )

    def state_dict(self) -> dict[str, Any]:
        world = self.trainer.world_size if self.trainer else 1
        return {"chips": self.stream.shards.fingerprint, "processes": world}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        for name, ours in StreamDataModule.state_dict(self).items():
            if state_dict.get(name) != ours:
                raise DataError(
                    f"the run has {name} {state_dict.get(name)}, this call {ours}",
                    remedy="go on with the same chips and as many devices as before, or start a new run",
                )


class ChipDataModule(StreamDataModule):
    """Chips of `canopy data chips` for any Lightning model, this project's or your own.

    Training batches never end (see the module), so give the trainer `max_steps`; without a trainer they can
    be drawn from `train_dataloader()` as well.

    Args:
        chips: a folder, several, or all of `DataSettings`: which chips, how often each.
        batch, crop_px: crops of a batch, and their side, even.
        augment: None for plain crops.
        gsd_m: ground metres per pixel that all chips must have; None takes any, but one for all.
        sample: "height": batches of `augment.Sample`, validation on whole chips by their number in `val`, as
            `canopy train` wants it; "dict": see `as_dict`, validation on one crop of each val chip.
        with_shots: give the GEDI shots their weight.

    Attributes:
        chosen: the chips of both splits; val: those to validate on, at most `val_chips`.

    Raises:
        DataError: no such chips, chips of another scale, or none to train on.
    """

    def __init__(
        self,
        chips: str | Path | Sequence[str | Path] | DataSettings,
        *,
        batch: int = 8,
        crop_px: int = 256,
        augment: AugmentSettings | None = None,
        gsd_m: float | None = None,
        seed: int = 0,
        workers: int = 0,
        sample: Literal["height", "dict"] = "dict",
        with_shots: bool = True,
    ) -> None:
        settings = chips if isinstance(chips, DataSettings) else DataSettings(chips=chips)  # type: ignore[arg-type]
        self.chosen = choose_chips(settings, gsd_m)
        train, rows = self.chosen.train, self.chosen.val.rows
        weights = chances(train.rows, settings)
        stream = ChipDataset(
            train, batch, crop_px, augment, seed=seed, chances=weights, with_shots=with_shots
        )
        super().__init__(stream, workers)
        self.val = self.chosen.val.subset([rows[i] for i in evenly(len(rows), settings.val_chips)])
        self.sample = sample
        if sample == "dict":
            self.collate = as_dict

    def val_dataloader(self) -> DataLoader[Any] | list[Any]:
        """Numbers of chips in `val`, each once over all processes, -1 where one has none left; or crops."""
        count = len(self.val)
        world, rank = (self.trainer.world_size, self.trainer.global_rank) if self.trainer else (1, 0)
        if not count:
            return []
        mine = [i if i < count else -1 for i in range(rank, -(-count // world) * world, world)]
        if self.sample == "height":
            return DataLoader(mine, batch_size=None)  # type: ignore[arg-type]
        numbers = [i for i in mine if i >= 0]
        return DataLoader(numbers, batch_size=self.stream.batch, collate_fn=self._crops)  # type: ignore[arg-type]

    def _crops(self, numbers: Sequence[int]) -> dict[str, torch.Tensor]:
        side = self.stream.crop_px  # type: ignore[attr-defined]
        crops = (make_crop(self.val[i], side, np.random.default_rng((0, i)), None) for i in numbers)
        return as_dict(_batch_of(list(crops)))
