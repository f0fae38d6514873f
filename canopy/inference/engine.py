"""Windows of imagery, read ahead and made ready for the network while it works on others.

Everything here runs in reader threads: pixels, which of them are wanted, which crops have work to do, and
what the network sees where an image has holes. The thread that feeds the network only cuts and stacks.

Pixels to the device and heights back, beside the work of the network.

On a CPU nothing moves. To a GPU a window goes once, as bytes where the image was bytes, from page-locked
memory on a stream of its own; finished heights come back the same way, and whoever needs them waits.

Crops of successive windows through the network in full batches, and onto the canvas.

Batches run across windows, so that only the last one of a run is short. Windows are finished in plan order,
as soon as their last crop is on the canvas.

Freed memory kept for the next batch, while a network runs on the CPU.

torch asks the C library for every intermediate map, and glibc gives large blocks back to the system as soon
as they are freed: the kernel then clears the same pages again for every layer. For a U-Net on four crops of
512 px that took 40 % of all processor time (docs/performance.md).

Streaming prediction on one device: read ahead -> predict -> write, all three at the same time.

Reader threads fetch the next windows while the network works on this one, and one writer thread takes
finished pixels away. Queues are bounded, so memory does not depend on the size of the raster. The first error
of any stage stops the others and is raised as it was; the sink is left to its owner, who discards it.
"""

from __future__ import annotations

import ctypes
import os
import sys
import time
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from threading import Lock
from typing import TYPE_CHECKING, NamedTuple, Protocol

import numpy as np

from canopy.errors import CanopyError, ImageryError
from canopy.geo.area import AOI
from canopy.geo.grid import Grid
from canopy.inference.backends import Runner
from canopy.inference.lattice import WINDOW_PX, Canvas, Lattice, Plan, WorkWindow, plan_windows
from canopy.inference.layers import Extras
from canopy.inference.predictor import Predictor, counted
from canopy.runtime import NoProgress, Progress

if TYPE_CHECKING:
    import torch

    from canopy.geo.area import AOI
    from canopy.geo.grid import Grid
    from canopy.imagery.base import Imagery
    from canopy.models.height import HeightModel


Place = tuple[int, int]
"""Row and column of a crop, counted within its window."""


class Source(Protocol):
    """The part of `ImagerySource` that prediction needs."""

    def read(self, grid: Grid) -> Imagery: ...


@dataclass(frozen=True)
class Pixels:
    """A window as read: everything on `plan.read_grid(window)`.

    Attributes:
        rgb: (3, h, w) float32 in 0..1, anything where not valid; packed: the same, ready for the device.
        valid: (h, w), where there is an image.
        wanted: (h, w), where a height is due: valid, inside the grid and inside the area.
        date: (h, w) days since 1970-01-01, 0 where unknown.
        crops: places with wanted pixels.
        filled: of those, the crops that have invalid pixels, with plausible ones there: (3, crop, crop).
    """

    rgb: np.ndarray
    packed: Packed
    valid: np.ndarray
    wanted: np.ndarray
    date: np.ndarray
    crops: tuple[Place, ...]
    filled: dict[Place, np.ndarray]


def read_ahead(
    plan: Plan,
    source: Source,
    aoi: AOI | None,
    transfer: Transfer,
    pool: ThreadPoolExecutor,
    ahead: int,
) -> Iterator[tuple[WorkWindow, Pixels | None]]:
    """The plan's windows in order with their pixels, at most `ahead` of them read in advance.

    Pixels are None where the area has none of the window.
    """
    pending: deque[tuple[WorkWindow, Future[Pixels | None]]] = deque()
    for window in plan:
        pending.append((window, pool.submit(_read, window, plan, source, aoi, transfer)))
        if len(pending) > ahead:
            window_done, future = pending.popleft()
            yield window_done, future.result()
    while pending:
        window_done, future = pending.popleft()
        yield window_done, future.result()


def _read(
    window: WorkWindow, plan: Plan, source: Source, aoi: AOI | None, transfer: Transfer
) -> Pixels | None:
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
    rgb, valid = np.ascontiguousarray(imagery.rgb, np.float32), imagery.valid
    # The last gate before the network: whatever the source believes, NaN and Inf stop here. A sum over
    # finite colours is finite, and four times cheaper to ask for.
    if not np.isfinite(rgb.sum()):
        valid = valid & np.isfinite(rgb).all(axis=0)
    wanted = valid & inside
    crops = _crops_with_work(window, plan.lattice, wanted)
    whole = bool(valid.all())
    filled = {} if whole else _filled(crops, plan.lattice, rgb, valid)
    packed = transfer.pack(rgb)
    return Pixels(rgb, packed, valid, wanted, imagery.date, crops, filled)


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


def _crops_with_work(window: WorkWindow, lattice: Lattice, wanted: np.ndarray) -> tuple[Place, ...]:
    return tuple(
        (row, col)
        for row in range(len(window.rows.crops))
        for col in range(len(window.cols.crops))
        if wanted[served_slices((row, col), lattice)].any()
    )


def _filled(
    crops: tuple[Place, ...], lattice: Lattice, rgb: np.ndarray, valid: np.ndarray
) -> dict[Place, np.ndarray]:
    from canopy.models.height import fill_invalid  # scipy: only where there are holes

    filled = {}
    for place in crops:
        rows, cols = crop_slices(place, lattice)
        if not valid[rows, cols].all():
            filled[place] = fill_invalid(rgb[:, rows, cols], valid[rows, cols])
    return filled


def crop_slices(place: Place, lattice: Lattice) -> tuple[slice, slice]:
    """Rows and columns of the window that the crop at `place` reads."""
    top, left = place[0] * lattice.stride_px, place[1] * lattice.stride_px
    return slice(top, top + lattice.crop_px), slice(left, left + lattice.crop_px)


def served_slices(place: Place, lattice: Lattice) -> tuple[slice, slice]:
    """Rows and columns of the window that the crop at `place` serves."""
    rows, cols = crop_slices(place, lattice)
    margin = lattice.margin_px
    return slice(rows.start + margin, rows.stop - margin), slice(cols.start + margin, cols.stop - margin)


WHITE = np.float32(255)


@dataclass(frozen=True)
class Packed:
    """RGB (3, h, w) on its way to the device: float32 in 0..1, or uint8 where that says the same."""

    host: torch.Tensor


class Download:
    """An array on its way back; `numpy` waits for it."""

    def __init__(self, host: torch.Tensor, ready: torch.cuda.Event | None = None) -> None:
        self._host, self._ready = host, ready

    def numpy(self) -> np.ndarray:
        if self._ready is not None:
            self._ready.synchronize()
        return self._host.numpy()


class Transfer:
    """Moves windows to `device` and finished pixels back.

    Args:
        device: where the network runs.
        as_bytes: send bytes where the image was bytes; by default where there is a bus to cross.
    """

    def __init__(self, device: torch.device, as_bytes: bool | None = None) -> None:
        import torch

        self.device = device
        self._cuda = device.type == "cuda"
        self._as_bytes = self._cuda if as_bytes is None else as_bytes
        # One each way: a window going up must not wait for heights coming down.
        self._up = torch.cuda.Stream(device) if self._cuda else None
        self._down = torch.cuda.Stream(device) if self._cuda else None
        # On the device, or torch would multiply by the reciprocal, which differs in the last bit.
        self._white = torch.tensor(float(WHITE), device=device)

    def pack(self, rgb: np.ndarray) -> Packed:
        """Make float32 RGB (3, h, w) ready to go; to be called from reader threads."""
        import torch

        host = torch.from_numpy(rgb)
        if self._as_bytes:
            coded = (host * float(WHITE)).round_().clamp_(0, 255).to(torch.uint8)
            # NaN, resampled and 16-bit pixels are no whole number of 255ths, and stay as they are.
            if torch.equal(coded / torch.tensor(float(WHITE)), host):
                host = coded
        return Packed(host.pin_memory() if self._cuda else host)

    def up(self, packed: Packed) -> torch.Tensor:
        """The window on the device, float32 in 0..1; does not wait for it."""
        import torch

        if self._up is None:
            moved = packed.host.to(self.device)
        else:
            work = torch.cuda.current_stream(self.device)
            with torch.cuda.stream(self._up):
                moved = packed.host.to(self.device, non_blocking=True)
            work.wait_stream(self._up)
            moved.record_stream(work)  # so that its memory is not given away while the network reads it
        return moved.to(torch.float32) / self._white if moved.dtype == torch.uint8 else moved

    def down(self, made: torch.Tensor) -> Download:
        """Start to bring `made` back."""
        import torch

        if self._down is None:
            return Download(made.cpu())
        host = torch.empty(made.shape, dtype=made.dtype, pin_memory=True)
        self._down.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self._down):
            host.copy_(made, non_blocking=True)
            ready = torch.cuda.Event()
            ready.record()
        made.record_stream(self._down)
        return Download(host, ready)


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


# Parameters of glibc's mallopt (malloc.h), and where its own adaptation ends once large blocks were freed.
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
_USUAL = {_TRIM_THRESHOLD: 64 * 2**20, _MMAP_THRESHOLD: 32 * 2**20}
_KEEP = {_TRIM_THRESHOLD: 2**31 - 1, _MMAP_THRESHOLD: 2**30}
_lock = Lock()
_users = 0


@contextmanager
def kept_memory() -> Iterator[None]:
    """Keep freed memory in this process until the (last) block ends; no more than the peak is ever held.

    Does nothing where the C library is not glibc.
    """
    global _users
    library = _glibc()
    if library is None:
        yield
        return
    with _lock:
        _users += 1
        if _users == 1:
            _set(library, _KEEP)
    try:
        yield
    finally:
        with _lock:
            _users -= 1
            if _users == 0:
                _set(library, _USUAL)
                library.malloc_trim(0)


def _glibc() -> ctypes.CDLL | None:
    if not sys.platform.startswith("linux"):
        return None
    try:
        library = ctypes.CDLL(None)
        library.gnu_get_libc_version  # noqa: B018  (other C libraries have no such name)
    except (OSError, AttributeError):
        return None
    return library


def _set(library: ctypes.CDLL, values: dict[int, int]) -> None:
    for parameter, value in values.items():
        library.mallopt(parameter, value)


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
