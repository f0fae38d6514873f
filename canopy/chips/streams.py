"""torch Datasets over a chips folder: endless training batches, pretraining views.

Batch j is a function of (chips, seed, j) alone, whatever the number of workers: worker k of n makes batches
k, k + n, ... and torch's DataLoader (with `batch_size=None`) hands them out in turn. So the state of a stream
is the number of batches consumed, and a resumed run sees exactly what it would have seen.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Any, Generic, NamedTuple, Protocol, TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import IterableDataset, get_worker_info

from canopy.chips.augment import AugmentConfig
from canopy.chips.crops import Sample, make_crop
from canopy.chips.index import IndexRow
from canopy.chips.shards import ChipShards, ShardChip, sampling_weights
from canopy.chips.views import ViewRules, batch_masks, multi_crop
from canopy.errors import DataError

T = TypeVar("T")


class ChipSource(Protocol):
    """Chips by number: `ChipShards`, or anything that looks like it."""

    rows: list[IndexRow]

    @property
    def fingerprint(self) -> str: ...
    def __len__(self) -> int: ...
    def __getitem__(self, number: int) -> ShardChip: ...


class _Batches(IterableDataset[T], Generic[T], ABC):
    """Endless, resumable batches; a subclass says what batch number j is.

    Process r of n takes batch j * n + r as its j-th, so all together see what one would with a batch n times
    as large.

    Use with `DataLoader(stream, batch_size=None, num_workers=n)`; after each batch the consumer calls
    `advance()`, so that `state_dict()` counts what was used and not what was made ahead.
    """

    def __init__(self, shards: ChipSource, batch: int, seed: int) -> None:
        if batch < 1:
            raise DataError(f"batch of {batch}", expected="at least 1")
        self.shards, self.batch, self.seed = shards, batch, seed
        self.position = 0
        self.rank, self.world = 0, 1

    def split(self, rank: int, world: int) -> None:
        """Serve process `rank` of `world`."""
        self.rank, self.world = rank, world

    def __iter__(self) -> Iterator[T]:
        worker = get_worker_info()
        number = self.position + (worker.id if worker else 0)
        while True:
            yield self.make(number)
            number += worker.num_workers if worker else 1

    def make(self, number: int) -> T:
        """Batch `number` of this process."""
        return self.drawn(number * self.world + self.rank)

    @abstractmethod
    def drawn(self, number: int) -> T:
        """Batch `number` of the stream that all processes share."""

    def advance(self, batches: int = 1) -> None:
        """Note that batches were used."""
        self.position += batches

    def state_dict(self) -> dict[str, Any]:
        """What `load_state_dict` needs to go on after the batches used so far."""
        return {
            "position": self.position,
            "batch": self.batch,
            "seed": self.seed,
            "chips": self.shards.fingerprint,
            "world": self.world,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a state. Raises DataError when it belongs to other chips, seed or batch size."""
        ours = self.state_dict()
        for name in ("chips", "seed", "batch"):
            if state.get(name) != ours[name]:
                raise DataError(
                    f"the saved position has {name} {state.get(name)!r}, this run {ours[name]!r}",
                    remedy="go on with the same chips and settings, or start a new run",
                )
        if state.get("world", 1) != self.world:
            raise DataError(
                f"the saved position is of {state['world']} processes, this run has {self.world}",
                remedy="go on with as many devices as before",
            )
        self.position = int(state["position"])


class ChipBatches(_Batches[Sample]):
    """Batches of augmented training crops: rgb (B, 3, S, S), target and weight (B, 1, S/2, S/2), shots
    (B, K, 5); see `crops.Sample`.

    Weights hold the date gap and the sensor's floor of the chip.

    Args:
        shards: chips to draw from; crop_px: S, even; augment: None for plain crops;
        bare, tall: shares of the height categories;
        chances: (n,) of each chip, instead of `shards.sampling_weights` with these shares;
        with_shots: give the GEDI shots their weight.
    """

    def __init__(
        self,
        shards: ChipSource,
        batch: int,
        crop_px: int,
        augment: AugmentConfig | None,
        *,
        seed: int = 0,
        bare: float = 0.1,
        tall: float = 0.2,
        chances: np.ndarray | None = None,
        with_shots: bool = True,
    ) -> None:
        super().__init__(shards, batch, seed)
        self.chances = sampling_weights(shards.rows, bare=bare, tall=tall) if chances is None else chances
        self.crop_px, self.augment, self.with_shots = crop_px, augment, with_shots

    def drawn(self, number: int) -> Sample:
        samples = [self._sample(number * self.batch + k) for k in range(self.batch)]
        return Sample(*(torch.stack(parts) for parts in zip(*samples, strict=True)))

    def _sample(self, index: int) -> Sample:
        rng = np.random.default_rng((self.seed, index, 2))
        chip = self.shards[int(rng.choice(len(self.shards), p=self.chances))]
        sample = make_crop(chip, self.crop_px, rng, self.augment)
        if not self.with_shots:
            sample.shots[:, 3] = 0
        return sample


class Views(NamedTuple):
    """Views of B images: wide (B, globals, 3, G, G), near (B, locals, 3, L, L) in 0..1, and masks
    (B * globals, rows, cols) over the patches of the wide views, True = masked."""

    wide: Tensor
    near: Tensor
    masks: Tensor


class ViewBatches(_Batches[Views]):
    """Batches of views for self-supervised pretraining; labels are not looked at.

    Args:
        shards: chips to draw from; batch: images; rules: of the views.
        chances: (n,) of each chip, summing to 1; None draws all alike.
    """

    def __init__(
        self,
        shards: ChipShards,
        batch: int,
        rules: ViewRules | None = None,
        *,
        patch_px: int = 16,
        seed: int = 0,
        chances: np.ndarray | None = None,
    ) -> None:
        super().__init__(shards, batch, seed)
        self.chances = chances
        self.rules, self.patch_px = rules or ViewRules(), patch_px
        if self.rules.global_px % patch_px:
            raise DataError(f"views of {self.rules.global_px} px", expected=f"a multiple of {patch_px}")

    def drawn(self, number: int) -> Views:
        rng = np.random.default_rng((self.seed, number, 1))
        wide, near = [], []
        for _ in range(self.batch):
            chip = self.shards[int(rng.choice(len(self.shards), p=self.chances))]
            seen = chip.rgb.max(axis=0) > 0
            crops = multi_crop(chip.rgb.astype(np.float32) / 255, seen, rng, self.rules)
            wide.append(crops[0])
            near.append(crops[1])
        side = self.rules.global_px // self.patch_px
        masks = batch_masks(self.batch * self.rules.globals_, (side, side), rng)
        return Views(*(torch.from_numpy(x) for x in (np.stack(wide), np.stack(near), masks)))
