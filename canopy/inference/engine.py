"""Streaming prediction on one device: read ahead -> predict -> write, all three at the same time.

Reader threads fetch the next windows while the network works on this one, and one writer thread takes
finished pixels away. Queues are bounded, so memory does not depend on the size of the raster. The first error
of any stage stops the others and is raised as it was; the sink is left to its owner, who discards it.
"""

from __future__ import annotations

import os
import time
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

import numpy as np

from canopy.errors import CanopyError
from canopy.geo.aoi import AOI
from canopy.geo.grid import Grid
from canopy.inference.allocator import kept_memory
from canopy.inference.backends.runner import Runner
from canopy.inference.blend import Canvas
from canopy.inference.extras import Extras
from canopy.inference.flow import Finished, Flow
from canopy.inference.forward import Predictor, counted
from canopy.inference.plan import WINDOW_PX, Lattice, Plan, WorkWindow, plan_windows
from canopy.inference.transfer import Transfer
from canopy.inference.windows import Pixels, Source, read_ahead
from canopy.runtime import NoProgress, Progress

if TYPE_CHECKING:
    import torch

    from canopy.models.height import HeightModel

COVER_ABOVE_M = 2.0


class Sink(Protocol):
    """Where finished pixels go, e.g. `CogWriter`; always called from one thread."""

    def write(self, values: np.ndarray, valid: np.ndarray, row_off: int, col_off: int) -> None: ...


@dataclass
class RunSummary:
    """What a run did. Heights are in metres, over the valid pixels of the grid that was predicted.

    `black_share` is the share of these whose imagery is (0, 0, 0).
    """

    windows: int = 0
    crops: int = 0
    crops_predicted: int = 0
    pixels: int = 0
    valid_pixels: int = 0
    height_sum_m: float = 0.0
    max_height_m: float = 0.0
    cover_pixels: int = 0
    batch_size: int = 0
    seconds: float = 0.0
    model_seconds: float = 0.0
    first_day: int = 0
    last_day: int = 0
    black_pixels: int = 0
    black_share: float = 0.0
    notes: list[str] = field(default_factory=list)

    @property
    def valid_fraction(self) -> float:
        return self.valid_pixels / self.pixels if self.pixels else 0.0

    @property
    def mean_height_m(self) -> float:
        """Mean over the valid pixels; NaN without any."""
        return self.height_sum_m / self.valid_pixels if self.valid_pixels else float("nan")

    @property
    def cover_2m(self) -> float:
        """Share of the valid pixels higher than 2 m; NaN without any."""
        return self.cover_pixels / self.valid_pixels if self.valid_pixels else float("nan")

    def count(self, height_m: np.ndarray, valid: np.ndarray, days: np.ndarray | None) -> None:
        """Add finished pixels, all (h, w), to the statistics; `days` since 1970, 0 where unknown."""
        self.pixels += valid.size
        if not valid.any():
            return
        heights = height_m[valid]
        self.valid_pixels += heights.size
        self.height_sum_m += float(heights.sum(dtype=np.float64))
        self.max_height_m = max(self.max_height_m, float(heights.max()))
        self.cover_pixels += int((heights > COVER_ABOVE_M).sum())
        known = days[valid & (days > 0)] if days is not None else np.empty(0)
        if known.size:
            self.first_day = min(self.first_day or int(known.min()), int(known.min()))
            self.last_day = max(self.last_day, int(known.max()))


def predict_grid(
    model: HeightModel,
    source: Source,
    grid: Grid,
    sink: Sink,
    *,
    aoi: AOI | None = None,
    device: str | torch.device = "auto",
    precision: str = "auto",
    batch_size: int | str = "auto",
    runner: Runner | None = None,
    workers: int | str = "auto",
    date_band: bool = False,
    extras: Extras | None = None,
    lattice: Lattice | None = None,
    window_px: int = WINDOW_PX,
    progress: Progress | None = None,
) -> RunSummary:
    """Predict canopy height on every pixel of `grid` and hand it to `sink`.

    Args:
        model: a `HeightModel`, or any module from RGB (B, 3, H, W) in 0..1 to metres (B, 1, H, W) whose
            `config` has `crop_px` and `patch_px`. The grid's pixel size is taken to be the model's.
        source: gives RGB, validity and dates on any grid; read from `workers` threads at once (`auto`: by
            device).
        sink: receives (1, h, w) heights in metres and (h, w) validity, or (2, h, w) with `date_band`, whose
            second band is the acquisition day since 1970-01-01 (0 where unknown). Each pixel comes once.
        runner: the model on its runtime, with the outputs that `extras` need; by default torch, on `device`
            in `precision`.
        extras: other bands beside heights, in the order of its `bands`; stands in for `date_band`.
        aoi: pixels whose centres lie outside become invalid; a box is not masked.
        lattice: crop geometry; the model's own by default.
        window_px: side of a unit of reading; has no influence on the heights.

    Returns:
        Counts, height statistics and times of the run.

    Raises:
        CanopyError: the network gave a height that is not a number at a valid pixel.
        Whatever the source or the sink raised.
    """
    started = time.perf_counter()
    progress = progress or NoProgress()
    extras = extras or Extras(date=date_band)
    predictor = Predictor(
        model, device=device, precision=precision, batch_size=batch_size, extras=extras, runner=runner
    )
    lattice = lattice or Lattice.of_model(model.config)
    plan = plan_windows(grid, lattice, window_px)
    summary = RunSummary(windows=len(plan), crops=plan.n_crops)
    progress.start(plan.n_crops, "predicting")
    readers = reader_count(workers, predictor.device.type)
    with kept_memory(), _Stages(plan, predictor, extras, readers, progress) as stages:
        for window, pixels in stages.read_ahead(source, aoi):
            for finished in stages.flow.feed(window, pixels):
                stages.write(finished, sink, summary)
        for finished in stages.flow.end():
            stages.write(finished, sink, summary)
        stages.wait_for_writes(0)
        summary.crops_predicted = stages.flow.crops_predicted
    summary.batch_size, summary.model_seconds = predictor.batch_size, predictor.seconds
    summary.black_share = summary.black_pixels / max(summary.valid_pixels, 1)
    summary.notes += predictor.notes
    summary.seconds = time.perf_counter() - started
    return summary


def reader_count(workers: int | str, device_type: str = "cpu") -> int:
    """Threads that read imagery: `auto` takes two beside a CPU that predicts, up to eight for a GPU."""
    if workers == "auto":
        return 2 if device_type == "cpu" else min(8, os.cpu_count() or 2)
    return counted(workers, "number of readers", "--workers")


class _Stages:
    """The threads of a run, and what flows between them."""

    def __init__(
        self, plan: Plan, predictor: Predictor, extras: Extras, readers: int, progress: Progress
    ) -> None:
        self._plan, self._extras, self._readers = plan, extras, readers
        # Float64 is not for every accelerator; where it is not, heights are summed on the CPU.
        device = predictor.device if predictor.device.type == "cuda" else "cpu"
        canvas = Canvas(plan, extras.layers, device)
        self._transfer = Transfer(predictor.device)
        # Pools of their own: a full write queue must not keep the readers from running.
        self._pools = [
            ThreadPoolExecutor(count, thread_name_prefix=f"canopy-{name}")
            for name, count in (("read", readers), ("score", readers), ("write", 1))
        ]
        self._writes: deque[Future[None]] = deque()
        self.flow = Flow(predictor, canvas, self._transfer, plan.lattice, extras, self._pools[1], progress)

    def __enter__(self) -> _Stages:
        return self

    def __exit__(self, *_: object) -> None:
        for pool in self._pools:
            pool.shutdown(wait=True, cancel_futures=True)

    def read_ahead(self, source: Source, aoi: AOI | None) -> Iterator[tuple[WorkWindow, Pixels | None]]:
        return read_ahead(self._plan, source, aoi, self._transfer, self._pools[0], self._readers)

    def write(self, finished: Finished, sink: Sink, summary: RunSummary) -> None:
        """Hand a window to the writer thread; waits while two others are still to be written."""
        self._writes.append(self._pools[2].submit(_write, finished, self._plan, sink, summary, self._extras))
        self.wait_for_writes(2)

    def wait_for_writes(self, left: int) -> None:
        while len(self._writes) > left:
            self._writes.popleft().result()


def _write(finished: Finished, plan: Plan, sink: Sink, summary: RunSummary, extras: Extras) -> None:
    window, pixels, layers = finished
    values, valid = _finished(window, plan, layers.numpy(), pixels, summary, extras)
    if valid.size:
        sink.write(values, valid, window.rows.final[0], window.cols.final[0])


def _finished(
    window: WorkWindow,
    plan: Plan,
    layers: np.ndarray,
    pixels: Pixels | None,
    summary: RunSummary,
    extras: Extras,
) -> tuple[np.ndarray, np.ndarray]:
    """Bands (b, h, w) and validity (h, w) of the window's finished pixels, checked and counted."""
    height_m = layers[0]
    if pixels is None:
        valid = np.zeros(height_m.shape, bool)
        days = np.zeros(height_m.shape, np.int32)
    else:
        rows, cols = (
            slice(*(edge - span.served_from + plan.lattice.margin_px for edge in span.final))
            for span in (window.rows, window.cols)
        )
        valid, days = pixels.wanted[rows, cols], pixels.date[rows, cols]
        summary.black_pixels += int((valid & ~pixels.rgb[:, rows, cols].any(axis=0)).sum())
    bad = valid & ~np.isfinite(layers).all(axis=0)
    if bad.any():
        row, col = (int(i) for i in np.argwhere(bad)[0])
        row, col = row + window.rows.final[0], col + window.cols.final[0]
        x, y = plan.grid.xy(row + 0.5, col + 0.5)
        raise CanopyError(
            f"the model gave a height that is not a number at {int(bad.sum())} valid pixels, "
            f"the first at row {row}, column {col} (x {x:.2f}, y {y:.2f})",
            remedy="try --precision fp32; if it stays, the model file is faulty",
        )
    summary.count(height_m, valid, days)
    return np.where(valid, extras.stack(layers, days), np.float32(np.nan)), valid
