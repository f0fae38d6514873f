"""Streaming prediction on one device: read ahead -> predict -> write, all three at the same time.

Reader threads fetch the next windows while the network works on this one, and one writer thread takes
finished pixels away. Queues are bounded, so memory does not depend on the size of the raster. The first error
of any stage stops the others and is raised as it was; the sink is left to its owner, who discards it.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

import numpy as np

from canopy.errors import CanopyError, ImageryError
from canopy.geo.aoi import AOI
from canopy.geo.grid import Grid
from canopy.inference.backends.runner import Runner
from canopy.inference.blend import Canvas
from canopy.inference.extras import Extras
from canopy.inference.forward import Predictor
from canopy.inference.plan import WINDOW_PX, Lattice, Plan, WorkWindow, plan_windows
from canopy.runtime import NoProgress, Progress

if TYPE_CHECKING:
    import torch

    from canopy.models.height import HeightModel
    from canopy.sources.imagery import Imagery

COVER_ABOVE_M = 2.0


class Source(Protocol):
    """The part of `ImagerySource` that prediction needs."""

    def read(self, grid: Grid) -> Imagery: ...


class Sink(Protocol):
    """Where finished pixels go, e.g. `CogWriter`; always called from one thread."""

    def write(self, values: np.ndarray, valid: np.ndarray, row_off: int, col_off: int) -> None: ...


@dataclass
class RunSummary:
    """What a run did. Heights are in metres, over the valid pixels of the grid that was predicted."""

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


@dataclass(frozen=True)
class _Pixels:
    """A window as read: everything on `plan.read_grid(window)`.

    `wanted` is True where a height is due: valid, inside the grid and inside the area.
    """

    rgb: np.ndarray
    valid: np.ndarray
    wanted: np.ndarray
    date: np.ndarray


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
    workers: int = 2,
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
        source: gives RGB, validity and dates on any grid; read from `workers` threads at once.
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
    lattice = lattice or Lattice.of(model.config.crop_px, model.config.patch_px)
    plan = plan_windows(grid, lattice, window_px)
    summary = RunSummary(windows=len(plan), crops=plan.n_crops)
    canvas = Canvas(plan, extras.layers)
    progress.start(plan.n_crops, "predicting")
    writes: deque[Future[None]] = deque()
    # Two separate pools: a full write queue must not keep the readers from running.
    readers = ThreadPoolExecutor(max(1, workers), thread_name_prefix="canopy-read")
    writer = ThreadPoolExecutor(1, thread_name_prefix="canopy-write")
    try:
        for window, pixels in _read_ahead(plan, source, aoi, readers, ahead=max(1, workers)):
            layers = _predict_window(window, plan, pixels, predictor, canvas, summary, progress)
            values, valid = _finished(window, plan, layers, pixels, summary, extras)
            if valid.size:
                offset = (window.rows.final[0], window.cols.final[0])
                writes.append(writer.submit(sink.write, values, valid, *offset))
            while len(writes) > 2:
                writes.popleft().result()
        while writes:
            writes.popleft().result()
    finally:
        readers.shutdown(wait=True, cancel_futures=True)
        writer.shutdown(wait=True, cancel_futures=True)
    summary.batch_size, summary.model_seconds = predictor.batch_size, predictor.seconds
    summary.notes += predictor.notes
    summary.seconds = time.perf_counter() - started
    return summary


def _read_ahead(
    plan: Plan, source: Source, aoi: AOI | None, pool: ThreadPoolExecutor, ahead: int
) -> Iterator[tuple[WorkWindow, _Pixels | None]]:
    """The plan's windows in order with their pixels, at most `ahead` of them read in advance."""
    pending: deque[tuple[WorkWindow, Future[_Pixels | None]]] = deque()
    for window in plan:
        pending.append((window, pool.submit(_read, window, plan, source, aoi)))
        if len(pending) > ahead:
            window_done, future = pending.popleft()
            yield window_done, future.result()
    while pending:
        window_done, future = pending.popleft()
        yield window_done, future.result()


def _read(window: WorkWindow, plan: Plan, source: Source, aoi: AOI | None) -> _Pixels | None:
    """The window's pixels; None where the area has none of it (nothing is read then)."""
    grid = plan.read_grid(window)
    inside = _inside(window, plan)
    if aoi is not None and not aoi.is_box:
        inside &= aoi.mask(grid)
    if not inside.any():
        return None
    imagery = source.read(grid)
    if imagery.rgb.shape != (3, *grid.shape) or imagery.valid.shape != grid.shape:
        raise ImageryError(
            f"the source gave {imagery.rgb.shape} RGB and {imagery.valid.shape} validity",
            where=getattr(source, "name", None),
            expected=f"the window's shape (3, {grid.height}, {grid.width})",
        )
    # The last gate before the network: whatever the source believes, NaN and Inf stop here.
    valid = imagery.valid & np.isfinite(imagery.rgb).all(axis=0)
    return _Pixels(imagery.rgb, valid, valid & inside, imagery.date)


def _inside(window: WorkWindow, plan: Plan) -> np.ndarray:
    """True on the pixels of `plan.read_grid(window)` that lie in the output grid."""
    read = plan.read_grid(window)
    inside = np.zeros(read.shape, bool)
    rows, cols = (
        slice(
            max(0, -(span.served_from - plan.lattice.margin_px)),
            max(0, length - (span.served_from - plan.lattice.margin_px)),
        )
        for span, length in ((window.rows, plan.grid.height), (window.cols, plan.grid.width))
    )
    inside[rows, cols] = True
    return inside


def _predict_window(
    window: WorkWindow,
    plan: Plan,
    pixels: _Pixels | None,
    predictor: Predictor,
    canvas: Canvas,
    summary: RunSummary,
    progress: Progress,
) -> np.ndarray:
    """Layers (n, h, w) of the window's finished pixels; crops that serve no wanted pixel are skipped."""
    lattice = plan.lattice
    canvas.begin(window)
    places = [(r, c) for r in range(len(window.rows.crops)) for c in range(len(window.cols.crops))]
    needed = [] if pixels is None else [p for p in places if pixels.wanted[_served(p, lattice)].any()]
    summary.crops_predicted += len(needed)
    progress.advance(len(places) - len(needed))
    while needed and pixels is not None:
        batch, needed = needed[: predictor.batch_size], needed[predictor.batch_size :]
        crops = [_crop(place, lattice) for place in batch]
        predicted = predictor(
            np.stack([pixels.rgb[:, r, c] for r, c in crops]),
            np.stack([pixels.valid[r, c] for r, c in crops]),
        )
        for (row, col), layers in zip(batch, predicted, strict=True):
            canvas.add(row, col, layers)
        progress.advance(len(batch))
    return canvas.finish()


def _crop(place: tuple[int, int], lattice: Lattice) -> tuple[slice, slice]:
    """Rows and columns that the crop at (row, column) of a window reads."""
    top, left = place[0] * lattice.stride_px, place[1] * lattice.stride_px
    return slice(top, top + lattice.crop_px), slice(left, left + lattice.crop_px)


def _served(place: tuple[int, int], lattice: Lattice) -> tuple[slice, slice]:
    """Rows and columns that the crop at (row, column) of a window serves."""
    rows, cols = _crop(place, lattice)
    margin = lattice.margin_px
    return slice(rows.start + margin, rows.stop - margin), slice(cols.start + margin, cols.stop - margin)


def _finished(
    window: WorkWindow,
    plan: Plan,
    layers: np.ndarray,
    pixels: _Pixels | None,
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
