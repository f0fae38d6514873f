"""Streaming prediction on one device: read ahead -> predict -> blend -> write, all at the same time.

Reader threads fetch and prepare the next windows while the network works on this one, and one writer thread
takes finished pixels away. All that waits is bounded, so memory does not depend on the size of the raster.
Batches run across windows, so that only the last one of a run is short. The first error of any stage stops
the others and is raised as it was; the sink is left to its owner, who discards it.
"""

from __future__ import annotations

import os
import time
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

import numpy as np

from canopy.errors import CanopyError, ConfigError, ImageryError
from canopy.inference.lattice import WINDOW_PX, Canvas, Lattice, Plan, WorkWindow, plan_windows
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
Corner = tuple[int, int]
"""Row and column of a crop, counted within its window."""


class Source(Protocol):
    """The part of `ImagerySource` that prediction needs."""

    def read(self, grid: Grid) -> Imagery: ...


class Sink(Protocol):
    """Where finished pixels go, e.g. `CogWriter`; always called from one thread."""

    def write(self, values: np.ndarray, valid: np.ndarray, row_off: int, col_off: int) -> None: ...


@dataclass
class RunSummary:
    """What a run did. Heights are in metres, over the valid pixels of the grid that was predicted.

    `black_share` is the share of these whose imagery is (0, 0, 0); `model_seconds` were spent in calls of the
    network, which a GPU works off by itself.
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

    def count(self, height_m: np.ndarray, valid: np.ndarray, days: np.ndarray) -> None:
        """Add finished pixels, all (h, w), to the statistics; `days` since 1970, 0 where unknown."""
        self.pixels += valid.size
        if not valid.any():
            return
        heights = height_m[valid]
        self.valid_pixels += heights.size
        self.height_sum_m += float(heights.sum(dtype=np.float64))
        self.max_height_m = max(self.max_height_m, float(heights.max()))
        self.cover_pixels += int((heights > COVER_ABOVE_M).sum())
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
    summary = RunSummary(windows=len(plan), crops=plan.n_crops)
    predictor = Predictor(runner, batch_size, summary)
    progress.start(plan.n_crops, "predicting")
    readers = reader_count(workers, runner.device.type)
    with ExitStack() as stack:
        # Pools of their own: a full write queue must not keep the readers from running.
        pools = [
            ThreadPoolExecutor(count, thread_name_prefix=f"canopy-{name}")
            for name, count in (("read", readers), ("write", 1))
        ]
        for pool in pools:
            stack.callback(pool.shutdown, wait=True, cancel_futures=True)
        writes: deque[Future[None]] = deque()
        windows = _read_ahead(plan, source, aoi, pools[0], readers)
        for window, pixels, layers in _blended(plan, predictor, extras, windows, pools[0], progress):
            writes.append(pools[1].submit(_write, window, plan, layers, pixels, sink, summary, extras))
            while len(writes) > 2:
                writes.popleft().result()
        for write in writes:
            write.result()
    summary.black_share = summary.black_pixels / max(summary.valid_pixels, 1)
    summary.seconds = time.perf_counter() - started
    return summary


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
        crops: corners of the crops with wanted pixels.
        filled: of those, the crops that have invalid pixels, with plausible ones there: (3, crop, crop).
    """

    rgb: np.ndarray
    valid: np.ndarray
    wanted: np.ndarray
    date: np.ndarray
    crops: tuple[Corner, ...]
    filled: dict[Corner, np.ndarray]


def _read_ahead(
    plan: Plan, source: Source, aoi: AOI | None, pool: ThreadPoolExecutor, ahead: int
) -> Iterator[tuple[WorkWindow, Pixels | None]]:
    """The plan's windows in order with their pixels (None where the area has none), read in advance."""
    pending: deque[tuple[WorkWindow, Future[Pixels | None]]] = deque()
    for window in plan:
        pending.append((window, pool.submit(_read, window, plan, source, aoi)))
        if len(pending) > ahead:
            first, future = pending.popleft()
            yield first, future.result()
    for first, future in pending:
        yield first, future.result()


def _read(window: WorkWindow, plan: Plan, source: Source, aoi: AOI | None) -> Pixels | None:
    """The window's pixels; None where the area has none of it (nothing is read then)."""
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
    rows, cols = range(len(window.rows.crops)), range(len(window.cols.crops))
    crops = tuple((r, c) for r in rows for c in cols if wanted[lattice.served_slices((r, c))].any())
    places = {corner: lattice.crop_slices(corner) for corner in crops}
    filled = {
        corner: fill_invalid(rgb[:, *place], valid[place])
        for corner, place in places.items() if not valid[place].all()
    }  # fmt: skip
    return Pixels(rgb, valid, wanted, imagery.date, crops, filled)


# ---- predicting and blending ------------------------------------------------------------------
class Predictor:
    """Calls the network on crops, in batches that fit the device's memory, and notes what it took."""

    def __init__(self, runner: Runner, batch_size: int | str, summary: RunSummary) -> None:
        self.runner, self.summary = runner, summary
        summary.batch_size = resolve_batch(batch_size, runner.device.type, runner.model.config.crop_px)

    def __call__(self, crops: torch.Tensor) -> torch.Tensor:
        """Crops (n, 3, crop, crop) float32 in 0..1, finite -> layers (n, l, crop, crop) float32, on the
        device: heights in metres, then what else the runner gives.
        """
        import torch

        done: list[torch.Tensor] = []
        start, begun = 0, time.perf_counter()
        crops = crops.to(self.runner.device)
        while start < len(crops):
            part = crops[start : start + self.summary.batch_size]
            try:
                done.append(self._forward(part))
                start += len(part)
            except RuntimeError as error:
                # torch.OutOfMemoryError is CUDA's and MPS's; the CPU allocator raises a plain RuntimeError.
                full = isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)
                if not full or self.summary.batch_size == 1:
                    raise
                self._halve_batch()
        self.summary.model_seconds += time.perf_counter() - begun
        self.summary.crops_predicted += len(crops)
        return torch.cat(done)

    def _forward(self, crops: torch.Tensor) -> torch.Tensor:
        import torch

        # A map must not depend on how many crops were left over: other batch sizes take other kernels.
        short = self.summary.batch_size - len(crops) if self.runner.device.type == "cuda" else 0
        if short:
            crops = torch.cat([crops, crops[-1:].expand(short, -1, -1, -1)])
        layers = self.runner.forward(crops)
        return layers[: len(layers) - short]

    def _halve_batch(self) -> None:
        import torch

        device, self.summary.batch_size = self.runner.device.type, max(1, self.summary.batch_size // 2)
        note = f"the {device} device ran out of memory; batch size reduced to {self.summary.batch_size}"
        self.summary.notes.append(note)
        log.warning(note)
        if device == "cuda":
            torch.cuda.empty_cache()


Blended = tuple[WorkWindow, Pixels | None, "torch.Tensor"]
"""A window, its pixels, and the layers (l, h, w) of those that are final."""


def _blended(
    plan: Plan,
    predictor: Predictor,
    extras: Extras,
    windows: Iterator[tuple[WorkWindow, Pixels | None]],
    pool: ThreadPoolExecutor,
    progress: Progress,
) -> Iterator[Blended]:
    """Windows in plan order, each as soon as its last crop is on the canvas.

    What waits is a list of crops in order, with a None behind the last one of each window.
    """
    # Float64 is not for every accelerator; where it is not, heights are summed on the CPU.
    device = predictor.runner.device
    canvas = Canvas(plan, extras.layers, device if device.type == "cuda" else "cpu")
    waiting: list[tuple[WorkWindow, Pixels | None, Corner | None]] = []

    def flush() -> Iterator[Blended]:
        batch = [(p, corner) for _, p, corner in waiting if p is not None and corner is not None]
        layers = iter(_layers(batch, plan.lattice, predictor, extras, pool, canvas.device))
        for window, pixels, corner in waiting:
            canvas.begin(window)
            if corner is not None:
                canvas.add(*corner, next(layers))
                progress.advance()
            else:
                progress.advance(window.n_crops - (len(pixels.crops) if pixels else 0))
                yield window, pixels, canvas.finish()
        waiting.clear()

    for window, pixels in windows:
        for corner in pixels.crops if pixels else ():
            waiting.append((window, pixels, corner))
            if sum(place is not None for *_, place in waiting) >= predictor.summary.batch_size:
                yield from flush()
        waiting.append((window, pixels, None))
        if all(corner is None for *_, corner in waiting):
            yield from flush()
    yield from flush()


def _layers(
    batch: list[tuple[Pixels, Corner]],
    lattice: Lattice,
    predictor: Predictor,
    extras: Extras,
    pool: ThreadPoolExecutor,
    device: torch.device,
) -> Iterator[torch.Tensor]:
    """Layers (l, crop, crop) of each crop on `device`; scores of the flags are made beside the network."""
    import torch

    if not batch:
        return
    places = [lattice.crop_slices(corner) for _, corner in batch]
    crops = [
        pixels.filled[corner] if corner in pixels.filled else pixels.rgb[:, *place]
        for (pixels, corner), place in zip(batch, places, strict=True)
    ]
    scores: Iterator[np.ndarray] | None = None
    if extras.quality is not None:
        valid = [pixels.valid[place] for (pixels, _), place in zip(batch, places, strict=True)]
        scores = pool.map(extras.quality.scores, crops, valid)
    for layers in predictor(torch.from_numpy(np.stack(crops))).to(device):
        yield layers if scores is None else torch.cat([layers, torch.from_numpy(next(scores)).to(layers)])


# ---- writing ----------------------------------------------------------------------------------
def _write(
    window: WorkWindow,
    plan: Plan,
    layers: torch.Tensor,
    pixels: Pixels | None,
    sink: Sink,
    summary: RunSummary,
    extras: Extras,
) -> None:
    """Check and count the window's finished pixels, and hand over their bands (b, h, w) and validity."""
    blended = layers.cpu().numpy()
    row, col = window.rows.final[0], window.cols.final[0]
    if pixels is None:
        valid, days = np.zeros(blended.shape[1:], bool), np.zeros(blended.shape[1:], np.int32)
    else:
        place = plan.final_slices(window)
        valid, days = pixels.wanted[place], pixels.date[place]
        summary.black_pixels += int((valid & ~pixels.rgb[:, *place].any(axis=0)).sum())
    bad = valid & ~np.isfinite(blended).all(axis=0)
    if bad.any():
        first = np.argwhere(bad)[0] + (row, col)
        x, y = plan.grid.xy(first[0] + 0.5, first[1] + 0.5)
        raise CanopyError(
            f"the model gave a height that is not a number at {int(bad.sum())} valid pixels, "
            f"the first at row {first[0]}, column {first[1]} (x {x:.2f}, y {y:.2f})",
            remedy="try --precision fp32; if it stays, the model file is faulty",
        )
    summary.count(blended[0], valid, days)
    if valid.size:
        sink.write(np.where(valid, extras.stack(blended, days), np.float32(np.nan)), valid, row, col)
