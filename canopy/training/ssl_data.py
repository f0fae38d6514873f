"""The stream of views that pretraining consumes: by process, and in two phases of different sizes."""

from __future__ import annotations

import numpy as np
import torch
from torch.utils.data import DataLoader

from canopy.chips.data import ViewBatches, ViewRules, Views
from canopy.chips.store import ChipShards, site_weights
from canopy.training.settings import PretrainSettings


class ViewStream(ViewBatches):
    """`ViewBatches` with larger views at the end.

    Batches from number `late_from` on have the late rules. A run that is bounded by minutes does not know
    that number; it calls `go_late()`, which also reaches worker processes, for the batches they have not
    made yet.
    """

    def __init__(
        self,
        shards: ChipShards,
        batch: int,
        rules: ViewRules,
        late_rules: ViewRules,
        *,
        late_from: int,
        patch_px: int,
        seed: int,
        chances: np.ndarray | None = None,
    ) -> None:
        super().__init__(shards, batch, rules, patch_px=patch_px, seed=seed, chances=chances)
        self.phases, self.late_from = (rules, late_rules), late_from
        self._late = torch.zeros(1, dtype=torch.bool).share_memory_()

    def go_late(self) -> None:
        """Begin the final phase now."""
        self._late[0] = True

    def make(self, number: int) -> Views:
        late = number >= self.late_from or bool(self._late[0])
        self.rules = self.phases[late]
        return super().make(number)


def open_stream(settings: PretrainSettings) -> ViewStream:
    """The stream of a run. Raises DataError where there are no chips, or chips of another scale."""
    late_from = round(settings.steps * (1 - settings.final.share)) if settings.final.share else settings.steps
    shards = ChipShards(settings.data.chips, splits=settings.data.splits)
    shards.require_gsd(settings.architecture.gsd_m)
    return ViewStream(
        shards,
        settings.images,
        settings.rules(),
        settings.rules(final=True),
        late_from=late_from,
        patch_px=settings.architecture.patch_px,
        seed=settings.seed,
        chances=site_weights(shards.rows, settings.data.site_power),
    )


def loader(stream: ViewStream, workers: int, *, pin: bool = False) -> DataLoader[Views]:
    """Batches of the stream, made ahead by `workers` processes."""
    return DataLoader(
        stream,
        batch_size=None,
        num_workers=workers,
        pin_memory=pin,
        # A forked child would inherit torch's threads in whatever state they are.
        multiprocessing_context="spawn" if workers else None,
    )
