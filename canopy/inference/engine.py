"""Streaming prediction on one device: read ahead -> predict -> blend -> write, all at the same time.

A chain of generators: windows are read by threads ahead of the network, their crops pass it in batches that
run across windows, a canvas blends them, and one thread writes what is finished. All that waits is bounded,
so memory does not depend on the size of the raster. The first error of any stage stops the others and is
raised as it was; the sink is left to its owner, who discards it.
"""

from __future__ import annotations

import itertools
import os
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Protocol, TypeVar

import numpy as np

from canopy.errors import CanopyError, ConfigError, ImageryError
from canopy.inference.lattice import WINDOW_PX, Canvas, Corner, Lattice, Plan, Window, plan_windows
from canopy.inference.layers import Extras
from canopy.runtime import NoProgress, Progress, log

if TYPE_CHECKING:
    import torch

    from canopy.geo.area import AOI
    from canopy.geo.grid import Grid
    from canopy.imagery.base import Imagery
    from canopy.inference.backends import Runner

COVER_ABOVE_M = 2.0
# Crops per batch at most, and pixels: beyond them a device gains nothing and only takes more memory. They are
# fixed, not measured: in bf16 a height can move by centimetres with the batch, and parts of a map that are
# made on several cards must fit together.
AUTO_BATCH = {"cpu": (4, 2**20), "cuda": (64, 2**22), "mps": (8, 2**20)}
FEW_CROPS = 16
Item = TypeVar("Item")
Made = TypeVar("Made")


class Source(Protocol):
    """The part of `ImagerySource` that prediction needs."""

    def read(self, grid: Grid) -> Imagery: ...


class Sink(Protocol):
    """Where finished pixels go, e.g. `CogWriter`; always called from one thread."""

    def write(self, values: np.ndarray, valid: np.ndarray, row_off: int, col_off: int) -> None: ...


@dataclass
class RunSummary:
    """What a run did. Heights are in metres, over the valid pixels of the map.

    `black_pixels` of the `seen_pixels` that were predicted have imagery of (0, 0, 0); `judged` counts pixels
    of sampled crops by their flags (see `layers.findings`); `model_seconds` were spent in calls of the
    network, which a GPU works off by itself.
    """

    windows: int = 0
    crops: int = 0
    crops_predicted: int = 0
    batch_size: int = 0
    seconds: float = 0.0
    model_seconds: float = 0.0
    seen_pixels: int = 0
    black_pixels: int = 0
    pixels: int = 0
    valid_pixels: int = 0
    height_sum_m: float = 0.0
    max_height_m: float = 0.0
    cover_pixels: int = 0
    tall_pixels: int = 0
    first_day: int = 0
    last_day: int = 0
    judged: Counter[str] = field(default_factory=Counter)
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

    @property
    def tall(self) -> float:
        """Share of the valid pixels that are as high as the model can tell; NaN without any."""
        return self.tall_pixels / self.valid_pixels if self.valid_pixels else float("nan")

    def count(self, height_m: np.ndarray, valid: np.ndarray, days: np.ndarray, tallest_m: float) -> None:
        """Add finished pixels, all (h, w), to the statistics; `days` since 1970, 0 where unknown."""
        if not valid.any():
            return
        heights = height_m[valid]
        self.valid_pixels += heights.size
        self.height_sum_m += float(heights.sum(dtype=np.float64))
        self.max_height_m = max(self.max_height_m, float(heights.max()))
        self.cover_pixels += int((heights > COVER_ABOVE_M).sum())
        self.tall_pixels += int((heights >= tallest_m).sum())
        known = days[valid & (days > 0)]
        if known.size:
            self.first_day = min(self.first_day or int(known.min()), int(known.min()))
            self.last_day = max(self.last_day, int(known.max()))


def predict_grid(
    runner: Runner,
    source: Source,
    grid: Grid,
    sink: Sink,
    *,
    aoi: AOI | None = None,
    extras: Extras | None = None,
    batch_size: int | str = "auto",
    workers: int | str = "auto",
    window_px: int = WINDOW_PX,
    progress: Progress | None = None,
) -> RunSummary:
    """Predict canopy height on every pixel of `grid` and hand it to `sink`.

    Args:
        runner: the model on its runtime, with the outputs that `extras` need. The grid's pixel size is taken
            to be the model's.
        source: gives RGB, validity and dates on any grid; read from `workers` threads at once (`auto`: by
            device).
        sink: receives the bands of `extras` (b, h, w), heights in metres first, and (h, w) validity. Each
            pixel comes once.
        aoi: pixels whose centres lie outside become invalid; a box is not masked.
        window_px: side of a unit of reading; has no influence on the heights.

    Returns:
        Counts, height statistics and times of the run.

    Raises:
        CanopyError: the network gave a height that is not a number at a valid pixel.
        Whatever the source or the sink raised.
    """
    started = time.perf_counter()
    progress, extras = progress or NoProgress(), extras or Extras()
    plan = plan_windows(grid, Lattice.of_model(runner.model.config), window_px)
    summary = RunSummary(windows=len(plan), crops=plan.n_crops, pixels=grid.height * grid.width)
    summary.batch_size = resolve_batch(batch_size, runner.device.type, runner.model.config.crop_px)
    summary.batch_size = min(summary.batch_size, runner.most_crops or summary.batch_size)
    progress.start(plan.n_crops, "predicting")
    readers = reader_count(workers, runner.device.type)
    with ExitStack() as stack:
        # Pools of their own: a full write queue must not keep the readers from running.
        reading, writing = (ThreadPoolExecutor(n, thread_name_prefix="canopy") for n in (readers, 1))
        for pool in (reading, writing):
            stack.callback(pool.shutdown, wait=True, cancel_futures=True)
        read = partial(_read, plan=plan, source=source, aoi=aoi, extras=extras)
        windows = _told(plan, _ahead(reading, readers, read, plan), progress)
        blended = _blended(
            plan, _predicted(windows, runner, extras, summary, reading), runner, extras, progress
        )
        write = partial(_write, plan=plan, sink=sink, summary=summary, extras=extras)
        for _ in _ahead(writing, 2, write, blended):
            pass
    summary.seconds = time.perf_counter() - started
    return summary


def _ahead(
    pool: ThreadPoolExecutor, depth: int, function: Callable[[Item], Made], items: Iterable[Item]
) -> Iterator[Made]:
    """`function` of each item, in order; `depth` of them are begun before they are asked for."""
    pending: deque[Future[Made]] = deque()
    for item in items:
        pending.append(pool.submit(function, item))
        if len(pending) > depth:
            yield pending.popleft().result()
    while pending:
        yield pending.popleft().result()


def reader_count(workers: int | str, device_type: str = "cpu") -> int:
    """Threads that read imagery: `auto` takes two beside a CPU that predicts, up to eight for a GPU."""
    if workers == "auto":
        return 2 if device_type == "cpu" else min(8, os.cpu_count() or 2)
    return _counted(workers, "number of readers", "--workers")


def resolve_batch(batch_size: int | str, device_type: str, crop_px: int = 256) -> int:
    """Crops per forward pass for `auto` (see `AUTO_BATCH`) or a positive number.

    Raises:
        ConfigError: anything else.
    """
    if batch_size == "auto":
        crops, pixels = AUTO_BATCH.get(device_type, AUTO_BATCH["cpu"])
        return max(1, min(crops, pixels // crop_px**2))
    return _counted(batch_size, "batch size", "--batch-size")


def _counted(value: int | str, what: str, option: str) -> int:
    """A positive whole number, also from text; ConfigError otherwise."""
    try:
        number = int(value)
    except ValueError:
        number = 0
    if number < 1:
        raise ConfigError(f"{value!r} is no {what}", where=option, expected="auto or a number from 1")
    return number


# ---- reading ----------------------------------------------------------------------------------
@dataclass(frozen=True)
class Pixels:
    """A window as read: everything on `plan.read_grid(window)`.

    Attributes:
        rgb: (3, h, w) float32 in 0..1, anything where not valid.
        valid: (h, w), where there is an image.
        wanted: (h, w), where a height is due: valid, inside the grid and inside the area.
        date: (h, w) days since 1970-01-01, 0 where unknown.
        crops: those with wanted pixels.
        filled: of those, the crops that have invalid pixels, with plausible ones there: (3, crop, crop).
        judged: pixels of the crops that were judged, by flag.
    """

    window: Window
    rgb: np.ndarray
    valid: np.ndarray
    wanted: np.ndarray
    date: np.ndarray
    crops: tuple[Corner, ...]
    filled: dict[Corner, np.ndarray]
    judged: Counter[str]

    def crop(self, corner: Corner, lattice: Lattice) -> np.ndarray:
        """What the network sees of a crop: (3, crop, crop)."""
        found = self.filled.get(corner)
        return self.rgb[:, *lattice.crop_slices(corner)] if found is None else found


def _read(window: Window, plan: Plan, source: Source, aoi: AOI | None, extras: Extras) -> Pixels | None:
    """The window's pixels; None where no height is due in it (nothing is read outside the area)."""
    from canopy.models.height import fill_invalid

    grid, lattice = plan.read_grid(window), plan.lattice
    inside = np.zeros(grid.shape, bool)
    inside[plan.inside(window)] = True
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
    rgb, valid = np.ascontiguousarray(imagery.rgb, np.float32), imagery.valid
    # The last gate before the network: whatever the source believes, NaN and Inf stop here. A sum over
    # finite colours is finite, and four times cheaper to ask for.
    if not np.isfinite(rgb.sum()):
        valid = valid & np.isfinite(rgb).all(axis=0)
    wanted = valid & inside
    crops = tuple(corner for corner in window.corners if wanted[lattice.served_slices(corner)].any())
    if not crops:
        return None
    places = {corner: lattice.crop_slices(corner) for corner in crops}
    filled = {
        corner: fill_invalid(rgb[:, *place], valid[place])
        for corner, place in places.items() if not valid[place].all()
    }  # fmt: skip
    pixels = Pixels(window, rgb, valid, wanted, imagery.date, crops, filled, Counter())
    if extras.judge is not None:
        for row, col in crops:
            # Every fourth crop of the lattice tells enough of a map, whoever cuts it; of few, all are asked.
            if plan.n_crops <= FEW_CROPS or not ((window.rows[row] | window.cols[col]) & 1):
                place = places[row, col]
                pixels.judged.update(extras.judge(pixels.crop((row, col), lattice), wanted[place]))
    return pixels


def _told(plan: Plan, windows: Iterator[Pixels | None], progress: Progress) -> Iterator[Pixels]:
    """The windows that have something to predict; crops without are told as done."""
    for window, pixels in zip(plan, windows, strict=True):
        progress.advance(len(window.corners) - (len(pixels.crops) if pixels else 0))
        if pixels is not None:
            yield pixels


# ---- predicting and blending ------------------------------------------------------------------
Predicted = tuple[Pixels, Corner, "torch.Tensor"]
"""A crop, and its layers (l, crop, crop) on the runner's device."""


def _predicted(
    windows: Iterator[Pixels], runner: Runner, extras: Extras, summary: RunSummary, pool: ThreadPoolExecutor
) -> Iterator[Predicted]:
    """All crops in order, by batches; scores of the flags are made beside the network."""
    import torch

    lattice = Lattice.of_model(runner.model.config)
    waiting = ((pixels, corner) for pixels in windows for corner in pixels.crops)
    while batch := list(itertools.islice(waiting, summary.batch_size)):
        crops = [pixels.crop(corner, lattice) for pixels, corner in batch]
        scores: Iterator[np.ndarray] | None = None
        if extras.quality is not None:
            valid = [pixels.valid[lattice.crop_slices(corner)] for pixels, corner in batch]
            scores = pool.map(extras.quality.scores, crops, valid)
        begun = time.perf_counter()
        made = _forward(runner, torch.from_numpy(np.stack(crops)).to(runner.device), summary)
        summary.model_seconds += time.perf_counter() - begun
        summary.crops_predicted += len(batch)
        for (pixels, corner), layers in zip(batch, made, strict=True):
            if scores is not None:
                layers = torch.cat([layers, torch.from_numpy(next(scores)).to(layers)])
            yield pixels, corner, layers


def _forward(runner: Runner, crops: torch.Tensor, summary: RunSummary) -> torch.Tensor:
    """Crops (n, 3, crop, crop) -> layers (n, l, crop, crop); a batch too large for the device is halved."""
    import torch

    size = summary.batch_size
    if len(crops) > size:
        return torch.cat([_forward(runner, part, summary) for part in crops.split(size)])
    try:
        # A map must not depend on how many crops were left over: other batch sizes take other kernels.
        short = size - len(crops) if runner.device.type == "cuda" else 0
        full = torch.cat([crops, crops[-1:].expand(short, -1, -1, -1)]) if short > 0 else crops
        return runner.forward(full)[: len(crops)]
    except RuntimeError as error:
        # torch.OutOfMemoryError is CUDA's and MPS's; the CPU allocator raises a plain RuntimeError.
        short_of = isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)
        if not short_of or size == 1:
            raise
    # Of the runner too, for its next maps: every tile of a region would run short anew.
    summary.batch_size = runner.most_crops = size // 2
    note = f"the {runner.device.type} device ran out of memory; batch size reduced to {summary.batch_size}"
    summary.notes.append(note)
    log.warning(note)
    if runner.device.type == "cuda":
        torch.cuda.empty_cache()
    return _forward(runner, crops, summary)


def _blended(
    plan: Plan, crops: Iterator[Predicted], runner: Runner, extras: Extras, progress: Progress
) -> Iterator[tuple[Pixels, torch.Tensor]]:
    """Windows in order with their final layers (l, h, w), each as soon as a crop of the next one comes."""
    # Float64 is not for every accelerator; where it is not, heights are summed on the CPU.
    canvas = Canvas(plan, extras.layers, runner.device if runner.device.type == "cuda" else "cpu")
    current: Pixels | None = None
    for pixels, corner, layers in crops:
        if pixels is not current:
            if current is not None:
                yield current, canvas.finish()
            current = pixels
            canvas.begin(pixels.window)
        canvas.add(corner, layers.to(canvas.device))
        progress.advance()
    if current is not None:
        yield current, canvas.finish()


# ---- writing ----------------------------------------------------------------------------------
def _write(
    finished: tuple[Pixels, torch.Tensor], plan: Plan, sink: Sink, summary: RunSummary, extras: Extras
) -> None:
    """Check and count a window's finished pixels, and hand over their bands (b, h, w) and validity."""
    pixels, place = finished[0], plan.final(finished[0].window)
    layers = finished[1].cpu().numpy()
    valid, days = pixels.wanted[place], pixels.date[place]
    row, col = (first.start + at for first, at in zip(place, plan.offset(pixels.window), strict=True))
    bad = valid & ~np.isfinite(layers).all(axis=0)
    if bad.any():
        first = np.argwhere(bad)[0] + (row, col)
        x, y = plan.grid.xy(first[0] + 0.5, first[1] + 0.5)
        raise CanopyError(
            f"the model gave a height that is not a number at {int(bad.sum())} valid pixels, "
            f"the first at row {first[0]}, column {first[1]} (x {x:.2f}, y {y:.2f})",
            remedy="try --precision fp32; if it stays, the model file is faulty",
        )
    summary.seen_pixels += int(valid.sum())
    summary.black_pixels += int((valid & ~pixels.rgb[:, *place].any(axis=0)).sum())
    summary.judged.update(pixels.judged)
    if not extras.raw:
        summary.count(layers[0], valid, days, extras.tallest_m)
    if valid.size:
        sink.write(np.where(valid, extras.stack(layers, days), np.float32(np.nan)), valid, row, col)
