"""Crops of successive windows through the network in full batches, and onto the canvas.

Batches run across windows, so that only the last one of a run is short. Windows are finished in plan order,
as soon as their last crop is on the canvas.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from canopy.inference.blend import Canvas
from canopy.inference.extras import Extras
from canopy.inference.forward import Predictor
from canopy.inference.plan import Lattice, WorkWindow
from canopy.inference.transfer import Download, Transfer
from canopy.inference.windows import Pixels, Place, crop_slices
from canopy.runtime import Progress

if TYPE_CHECKING:
    import torch


class Finished(NamedTuple):
    """A window whose pixels are complete: `layers` gives (l, final rows, final columns) float32."""

    window: WorkWindow
    pixels: Pixels | None
    layers: Download


@dataclass
class _Open:
    """A window on its way; `rgb` is its imagery on the device, `left` its crops not yet on the canvas."""

    window: WorkWindow
    pixels: Pixels | None
    rgb: torch.Tensor | None
    left: int
    begun: bool = False


@dataclass
class Flow:
    """Feed it windows in plan order; it gives finished ones.

    Attributes:
        scorers: threads that score crops for the quality flags while the network works on them.
    """

    predictor: Predictor
    canvas: Canvas
    transfer: Transfer
    lattice: Lattice
    extras: Extras
    scorers: ThreadPoolExecutor
    progress: Progress
    crops_predicted: int = 0
    _open: deque[_Open] = field(default_factory=deque)
    _waiting: deque[tuple[_Open, Place]] = field(default_factory=deque)

    def feed(self, window: WorkWindow, pixels: Pixels | None) -> Iterator[Finished]:
        """Take a window (None: nothing of it is wanted), and give those that it completes."""
        places = pixels.crops if pixels is not None else ()
        rgb = self.transfer.up(pixels.packed) if pixels is not None and places else None
        new = _Open(window, pixels, rgb, len(places))
        self._open.append(new)
        self._waiting.extend((new, place) for place in places)
        self.crops_predicted += len(places)
        self.progress.advance(len(window.rows.crops) * len(window.cols.crops) - len(places))
        yield from self._complete()
        while len(self._waiting) >= self.predictor.batch_size:
            yield from self._predict(self.predictor.batch_size)

    def end(self) -> Iterator[Finished]:
        """The rest, after the last window."""
        while self._waiting:
            yield from self._predict(min(self.predictor.batch_size, len(self._waiting)))

    def _predict(self, count: int) -> Iterator[Finished]:
        import torch

        batch = [self._waiting.popleft() for _ in range(count)]
        scores = self._scores(batch)
        made = self.predictor(torch.stack([self._crop(one, place) for one, place in batch]))
        # Sums in float64 are not for every accelerator: the canvas may lie elsewhere.
        made = made.to(self.canvas.device)
        for index, (one, place) in enumerate(batch):
            layers = made[index]
            if scores:
                score = torch.from_numpy(scores[index].result()).to(layers)
                layers = torch.cat([layers, score])
            if not one.begun:
                self._begin(one)
            self.canvas.add(*place, layers)
            one.left -= 1
            yield from self._complete()
        self.progress.advance(count)

    def _crop(self, one: _Open, place: Place) -> torch.Tensor:
        import torch

        if one.pixels is None or one.rgb is None:
            raise RuntimeError("a window without pixels has no crops")
        if place in one.pixels.filled:
            return torch.from_numpy(one.pixels.filled[place]).to(self.predictor.device, non_blocking=True)
        rows, cols = crop_slices(place, self.lattice)
        return one.rgb[:, rows, cols]

    def _scores(self, batch: list[tuple[_Open, Place]]) -> list[Future[np.ndarray]]:
        rules = self.extras.quality
        if rules is None:
            return []
        jobs = []
        for one, place in batch:
            if one.pixels is None:
                raise RuntimeError("a window without pixels has no crops")
            here = crop_slices(place, self.lattice)
            rgb = one.pixels.filled.get(place)
            rgb = one.pixels.rgb[:, *here] if rgb is None else rgb
            jobs.append(self.scorers.submit(rules.scores, rgb, one.pixels.valid[here]))
        return jobs

    def _begin(self, one: _Open) -> None:
        self.canvas.begin(one.window)
        one.begun = True

    def _complete(self) -> Iterator[Finished]:
        """Windows whose crops are all on the canvas, oldest first."""
        while self._open and self._open[0].left == 0:
            one = self._open.popleft()
            if not one.begun:
                self._begin(one)
            layers = self.transfer.down(self.canvas.finish())
            yield Finished(one.window, one.pixels, layers)
