"""Where tiles are made: spawned processes of this machine, one model each.

An engine takes tiles and gives outcomes. It never decides what a failure means; `drive` does.

Keeping an engine busy until the ledger has no open tile: retries, quarantine, stopping, progress.

Memory does not depend on the number of tiles: only those in work, those that wait for another try, and one
page of the ledger are held.

Tiles made on a dask.distributed cluster, of whatever kind: `--scheduler ADDRESS`.

The cluster's workers need this package and the run's folder under the same path. Each process opens the model
once and makes one tile at a time, however many threads it has. With a GPU device only workers that declare
`GPU` resources get tiles, if any do.

How a run stands, for those who look on: `canopy map --status DIR`.

What a run will take, before it starts: tiles, imagery, hours, money (`canopy map --dry-run`).

The folder of a run: made, emptied, and its finished files looked after.

A regional run from its start to its outputs: `start`, and `status` for those who look on.
"""

from __future__ import annotations

import contextlib
import hashlib
import heapq
import multiprocessing
import os
import queue
import shutil
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, Protocol

from canopy.errors import CanopyError, ConfigError, InputError, MissingDependencyError, OutputError
from canopy.files import file_sha256
from canopy.inference.estimate import BYTES_PER_PIXEL, OVERHEAD_S_PER_PX, seconds_per_crop
from canopy.inference.lattice import Lattice, plan_windows
from canopy.region import ledger as shards
from canopy.region.ledger import STATES, HeldError, Ledger, RunLock, live_holder
from canopy.region.plan import (
    RUN_FILE,
    Prepared,
    RegionSettings,
    area_of,
    open_region,
    read_pins,
    refuse_changes,
    run_id,
    settings_from,
    write_pins,
)
from canopy.region.task import TILES, How, Outcome, failure, remove_leftovers, tile_path
from canopy.region.tiles import TileTask
from canopy.runtime import log

# Workers that die this often before they are ready will not get better.
MOST_BAD_STARTS = 3
STOP_S = 10.0


class Engine(Protocol):
    """A place where tiles are made."""

    @property
    def slots(self) -> int:
        """How many tiles it should have at a time."""
        ...

    def submit(self, task: TileTask) -> None:
        """Take a tile; at most `slots` at a time."""
        ...

    def wait(self, timeout_s: float) -> list[Outcome]:
        """Outcomes of finished tiles; waits for at least one, but no longer than `timeout_s`."""
        ...

    def close(self, kill: bool = False) -> None:
        """End it; with `kill` without waiting for the tiles in work."""
        ...


@dataclass
class _Slot:
    """A worker process and the tile it has."""

    index: int
    process: Any = None
    pipe: Connection | None = None
    ready: bool = False
    task: TileTask | None = None
    since: float = 0.0


class LocalEngine:
    """Spawned worker processes on this machine; a worker that dies is replaced, its tile reported `died`."""

    def __init__(self, how: How, devices: list[str], make_worker: Callable[[How], Any] | None = None) -> None:
        """Prepare one worker for each entry of `devices`; processes start when they get a tile.

        Args:
            how: what every worker is told; `device` is replaced by its own.
            devices: `cpu`, `cuda:0`, ...
            make_worker: makes, in the worker process, what has `attempt(task)`; `TileWorker` by default.
        """
        self._how, self._devices, self._make = how, devices, make_worker
        self._slots = [_Slot(i) for i in range(len(devices))]
        self._bad_starts = 0
        self._context = multiprocessing.get_context("spawn")

    @property
    def slots(self) -> int:
        return len(self._slots)

    @property
    def pids(self) -> list[int]:
        """Process ids of the workers that run."""
        return [slot.process.pid for slot in self._slots if slot.process is not None]

    def submit(self, task: TileTask) -> None:
        slot = next(slot for slot in self._slots if slot.task is None)
        slot.task, slot.since = task, time.perf_counter()
        if slot.process is None:
            self._start(slot)
        with contextlib.suppress(OSError):  # it just died: `wait` will see
            slot.pipe.send(task)  # type: ignore[union-attr]

    def _start(self, slot: _Slot) -> None:
        from dataclasses import replace

        ours, theirs = self._context.Pipe()
        how = replace(self._how, device=self._devices[slot.index])
        slot.process = self._context.Process(
            target=_work,
            args=(theirs, how, self._make, os.getpid()),
            name=f"canopy-{slot.index}",
            daemon=True,
        )
        slot.process.start()
        theirs.close()
        slot.pipe, slot.ready = ours, False

    def wait(self, timeout_s: float) -> list[Outcome]:
        busy = [slot for slot in self._slots if slot.process is not None]
        deadline = time.monotonic() + timeout_s
        outcomes: list[Outcome] = []
        while not outcomes:
            left = deadline - time.monotonic()
            readable = wait([slot.pipe for slot in busy if slot.pipe is not None], max(0.0, left))
            for slot in busy:
                if slot.pipe in readable:
                    outcomes += self._hear(slot)
            if left <= 0:
                break
            busy = [slot for slot in self._slots if slot.process is not None]
            if not busy:
                break
        return outcomes

    def _hear(self, slot: _Slot) -> list[Outcome]:
        """What a worker says; or that it can no longer say anything."""
        assert slot.pipe is not None
        try:
            kind, value = slot.pipe.recv()
        except (EOFError, OSError):
            return self._bury(slot)
        if kind == "ready":
            slot.ready, self._bad_starts = True, 0
            return []
        if kind == "unfit":
            raise value
        slot.task = None
        return [value]

    def _bury(self, slot: _Slot) -> list[Outcome]:
        slot.process.join(STOP_S)
        if slot.process.is_alive():  # it has closed its side and does not end
            slot.process.kill()
            slot.process.join()
        code, task = slot.process.exitcode, slot.task
        if not slot.ready:
            self._bad_starts += 1
            if self._bad_starts >= MOST_BAD_STARTS * len(self._slots):
                raise CanopyError(
                    f"workers end before they are ready ({_cause(code)})",
                    remedy="try fewer --workers: memory may be short; -v shows more",
                )
        assert slot.pipe is not None
        slot.pipe.close()
        slot.process, slot.pipe, slot.task = None, None, None
        if task is None:
            return []
        seconds = time.perf_counter() - slot.since
        reason = f"its worker ended while it had the tile ({_cause(code)})"
        return [Outcome(task, "died", socket.gethostname(), seconds, reason=reason, again=True)]

    def close(self, kill: bool = False) -> None:
        for slot in self._slots:
            if slot.pipe is not None:
                with contextlib.suppress(OSError):
                    slot.pipe.send(None)
                slot.pipe.close()
            if slot.process is not None and (kill or slot.task is not None):
                slot.process.kill()
        for slot in self._slots:
            if slot.process is not None:
                slot.process.join(STOP_S)
                if slot.process.is_alive():
                    slot.process.kill()
                    slot.process.join()
                slot.process = None


def _cause(code: int | None) -> str:
    """`signal SIGKILL` or `exit code 3`."""
    if code is not None and code < 0:
        with contextlib.suppress(ValueError):
            return f"signal {signal.Signals(-code).name}"
    return f"exit code {code}"


def _work(pipe: Connection, how: How, make_worker: Callable[[How], Any] | None, parent: int) -> None:
    """A worker process: open everything once, then tile after tile until the driver is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the driver's to handle
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    threading.Thread(target=_follow, args=(parent,), daemon=True).start()
    try:
        if make_worker is None:
            from canopy.region.task import TileWorker

            make_worker = TileWorker
        worker = make_worker(how)
    except Exception as error:
        known = error if isinstance(error, CanopyError) else CanopyError(f"{type(error).__name__}: {error}")
        pipe.send(("unfit", known))
        return
    pipe.send(("ready", None))
    with contextlib.suppress(EOFError, OSError, KeyboardInterrupt):
        while (task := pipe.recv()) is not None:
            pipe.send(("outcome", worker.attempt(task)))


def _follow(parent: int) -> None:
    """End this process soon after its driver, however that ended."""
    while os.getppid() == parent:
        time.sleep(0.5)
    os._exit(1)


def local_devices(device: str, workers: int | None) -> list[str]:
    """A device for each local worker: one per GPU, or processors.

    Args:
        device: `auto`, `cpu`, `cuda`, `cuda:N` or `mps`.
        workers: how many; by default one per GPU, else one.
    """
    if device in ("auto", "cuda"):
        import torch

        if torch.cuda.is_available():
            count = torch.cuda.device_count()
            return [f"cuda:{i % count}" for i in range(workers or count)]
    return [device] * (workers or 1)


WAIT_S = 0.25


@dataclass
class Tally:
    """What this start of a run has done so far.

    Attributes:
        started: when it began, seconds of the monotonic clock.
        began: when a worker began the first tile, its model loaded; None until one is finished.
    """

    done: int = 0
    empty: int = 0
    failed: int = 0
    retried: int = 0
    km2: float = 0.0
    worker_seconds: float = 0.0
    started: float = field(default_factory=time.monotonic)
    began: float | None = None
    interrupted: bool = False
    slow: list[str] = field(default_factory=list)

    @property
    def finished(self) -> int:
        return self.done + self.empty + self.failed

    @property
    def seconds(self) -> float:
        return time.monotonic() - self.started

    @property
    def km2_per_hour(self) -> float:
        """Of ground, since the first tile was begun: before it, workers only load the model."""
        seconds = time.monotonic() - self.began if self.began is not None else 0.0
        return self.km2 / seconds * 3600 if seconds > 0 else 0.0


class Watcher(Protocol):
    """Who shows progress."""

    def update(self, tally: Tally, in_work: int) -> None: ...


@dataclass
class Stop:
    """Set from a signal handler: `asked` ends the run after the tiles in work."""

    asked: bool = False


def drive(
    ledger: Ledger,
    engine: Engine,
    *,
    attempts: int = 4,
    retry_wait_s: float = 2.0,
    stop: Stop | None = None,
    watcher: Watcher | None = None,
) -> Tally:
    """Make every pending tile of the ledger.

    Args:
        attempts: failures of one tile, its worker's deaths included, after which it is `failed`: a tile that
            kills workers must not end the run.
        retry_wait_s: wait before another try; doubles each time.

    Raises:
        OutputError: the disk is full, or cannot be trusted; the tiles in work are pending again.
        CanopyError: workers cannot work at all.
    """
    return _Driver(ledger, engine, attempts, retry_wait_s, stop or Stop(), watcher).run()


class _Driver:
    def __init__(
        self, ledger: Ledger, engine: Engine, attempts: int, retry_wait_s: float, stop: Stop,
        watcher: Watcher | None,
    ) -> None:  # fmt: skip
        self.ledger, self.engine, self.stop, self.watcher = ledger, engine, stop, watcher
        self.attempts, self.retry_wait_s = attempts, retry_wait_s
        self.tally = Tally()
        self.feed: Iterator[TileTask] = ledger.pending()
        self.fed = False
        self.again: list[tuple[float, int, TileTask]] = []
        self.failures: dict[int, int] = {}
        self.in_work: dict[int, TileTask] = {}

    def run(self) -> Tally:
        try:
            while True:
                self._fill()
                if not self.in_work and (self.stop.asked or (self.fed and not self.again)):
                    break
                if self.in_work:
                    for outcome in self.engine.wait(WAIT_S):
                        self._take(outcome)
                else:
                    time.sleep(WAIT_S)  # only tries to come are left
                self.ledger.commit_if_due()
                if self.watcher:
                    self.watcher.update(self.tally, len(self.in_work))
        finally:
            # The tiles in work keep their state `running`: the next start takes them up again.
            self.ledger.commit()
        self.tally.interrupted = self.stop.asked and not (self.fed and not self.again)
        return self.tally

    def _fill(self) -> None:
        while not self.stop.asked and len(self.in_work) < self.engine.slots:
            task = self._next()
            if task is None:
                return
            self.ledger.begin(task.ordinal)
            self.in_work[task.ordinal] = task
            self.engine.submit(task)

    def _next(self) -> TileTask | None:
        if not self.fed:
            task = next(self.feed, None)
            if task is not None:
                return task
            self.fed = True
        if self.again and (self.again[0][0] <= time.monotonic()):
            return heapq.heappop(self.again)[2]
        return None

    def _take(self, outcome: Outcome) -> None:
        task = outcome.task
        if self.in_work.pop(task.ordinal, None) is None:
            return  # an answer that came twice
        self.tally.worker_seconds += outcome.seconds
        state, reason = outcome.state, outcome.reason
        if outcome.stop:
            self._finish(outcome, "pending", reason)
            raise OutputError(
                reason or "cannot be written", remedy="with room there, run the same command again to go on"
            )
        if state in ("failed", "died"):
            count = self.failures[task.ordinal] = self.failures.get(task.ordinal, 0) + 1
            if outcome.again and count < self.attempts:
                self._finish(outcome, "pending", reason)
                due = time.monotonic() + self.retry_wait_s * 2 ** (count - 1)
                heapq.heappush(self.again, (due, task.ordinal, task))
                self.tally.retried += 1
                log.info(f"tile {task.id}: {reason}; another try ({count + 1} of {self.attempts})")
                return
            if count > 1:
                reason = f"{reason} (after {count} tries)"
            state = "failed"
            log.warning(f"tile {task.id} failed: {reason}")
        if self.tally.began is None:
            self.tally.began = time.monotonic() - outcome.seconds
        self.failures.pop(task.ordinal, None)
        self._finish(outcome, state, reason)
        setattr(self.tally, state, getattr(self.tally, state) + 1)
        self.tally.km2 += task.km2 if state != "failed" else 0.0

    def _finish(self, outcome: Outcome, state: str, reason: str | None) -> None:
        self.ledger.finish(
            outcome.task.ordinal, state, host=outcome.host, seconds=round(outcome.seconds, 3),
            sha256=outcome.sha256, size=outcome.size, reason=reason, facts=outcome.facts,
        )  # fmt: skip


class Interrupted(CanopyError):  # noqa: N818  (a user may stop a run; nothing is wrong)
    """Stopped by the user or by the machine's scheduler; the run can go on."""

    exit_code = 130


def in_main_thread() -> bool:
    """Whether signal handlers may be set here."""
    return threading.current_thread() is threading.main_thread()


# Tiles per worker thread on their way: one in work, one waiting beside it.
AHEAD = 2
REFRESH_S = 5.0
CONNECT_S = 60.0
_worker_lock = threading.Lock()
_worker: tuple[How, Any] | None = None


def make_tile(how: How, task: TileTask) -> Outcome:
    """On a cluster's worker: make one tile with the process's model, opened at its first tile.

    Raises:
        CanopyError: this worker cannot work for the run at all.
    """
    global _worker
    with _worker_lock:  # one tile at a time: two would only compete for the device
        if _worker is None or _worker[0] != how:
            from canopy.region.task import TileWorker

            _worker = (how, TileWorker(how))
        return _worker[1].attempt(task)


class ClusterEngine:
    """An engine on a dask scheduler; see `engines.Engine`."""

    def __init__(self, how: How, address: str) -> None:
        """Connect to a scheduler.

        Raises:
            MissingDependencyError: dask.distributed is not installed.
            CanopyError: the scheduler does not answer, or has no worker for a minute.
        """
        try:
            from distributed import Client
        except ImportError:
            raise MissingDependencyError(
                "--scheduler needs dask.distributed", remedy="pip install 'canopy-height[cluster]'"
            ) from None
        self._how = how
        self._done: queue.Queue[Any] = queue.Queue()
        self._tasks: dict[str, tuple[TileTask, Any, float]] = {}
        self._number = 0
        try:
            self._client = Client(address, timeout=CONNECT_S, set_as_default=False, name="canopy-map")
            self._client.wait_for_workers(1, timeout=CONNECT_S)
        except (OSError, TimeoutError, ValueError) as error:
            raise CanopyError(
                f"no scheduler with a worker there ({error})", where=f"--scheduler {address}",
                remedy="start the cluster first; see docs/regional-mapping.md",
            ) from error  # fmt: skip
        self._slots, self._asked = 1, 0.0
        self._resources = self._find_resources()

    def _find_resources(self) -> dict[str, float] | None:
        """Ask for a GPU where workers have declared theirs."""
        if self._how.device not in ("auto", "cuda"):
            return None
        try:
            workers = self._client.scheduler_info(n_workers=-1)["workers"].values()
        except TypeError:  # before 2025 it always told of all of them
            workers = self._client.scheduler_info()["workers"].values()
        return {"GPU": 1} if any("GPU" in worker.get("resources", {}) for worker in workers) else None

    @property
    def slots(self) -> int:
        """Twice the cluster's threads, as they are now: workers may come and go."""
        if time.monotonic() - self._asked > REFRESH_S:
            self._asked = time.monotonic()
            with contextlib.suppress(OSError, TimeoutError):
                # A process makes one tile at a time, so its threads beyond the first do not count.
                self._slots = max(1, AHEAD * len(self._client.nthreads()))
        return self._slots

    def submit(self, task: TileTask) -> None:
        self._number += 1
        key = f"canopy-{self._how.run[:8]}-{task.id}-{self._number}"
        future = self._client.submit(
            make_tile, self._how, task, key=key, pure=False, retries=0, resources=self._resources
        )
        self._tasks[key] = (task, future, time.perf_counter())
        future.add_done_callback(self._done.put)

    def wait(self, timeout_s: float) -> list[Outcome]:
        outcomes: list[Outcome] = []
        try:
            outcomes += self._outcome(self._done.get(timeout=timeout_s))
            while True:
                outcomes += self._outcome(self._done.get_nowait())
        except queue.Empty:
            pass
        if not outcomes and self._client.status not in ("running", "connecting"):
            raise CanopyError(
                "the scheduler is gone", remedy="start it and run the same command again to go on"
            )
        return outcomes

    def _outcome(self, future: Any) -> list[Outcome]:
        task, _, since = self._tasks.pop(future.key, (None, None, 0.0))
        if task is None:
            return []
        seconds = time.perf_counter() - since
        if future.status == "finished":
            return [future.result()]
        if future.status == "cancelled":
            return [Outcome(task, "died", seconds=seconds, reason="the cluster lost the tile", again=True)]
        error = future.exception()
        if type(error).__name__ == "KilledWorker":
            return [
                Outcome(
                    task, "died", seconds=seconds, again=True,
                    reason=f"workers died while they had the tile ({' '.join(str(error).split())[:200]})",
                )
            ]  # fmt: skip
        if isinstance(error, CanopyError):
            raise error  # a worker that is unfit for the run: all others are like it
        return [failure(task, error, seconds)]

    def close(self, kill: bool = False) -> None:
        with contextlib.suppress(Exception):
            self._client.cancel([future for _, future, _ in self._tasks.values()], force=kill)
        with contextlib.suppress(Exception):
            self._client.close(timeout=10)


_MOST_FAILURES = 20


def outputs_digest(ledger: Ledger) -> str:
    """Hash of all finished tiles: catalog and mosaic are up to date while it stays the same."""
    digest = hashlib.sha256()
    for row in ledger.rows("done", "failed"):
        digest.update(f"{row.task.id} {row.state} {row.sha256}\n".encode())
    return digest.hexdigest()


def _sum(paths: list[Path], run: str) -> tuple[dict[str, int], dict[str, float], list[dict[str, str]]]:
    """Counts, totals and first failures of some ledgers of a run."""
    counts = dict.fromkeys(STATES, 0)
    totals = dict.fromkeys(("km2", "km2_finished", "worker_seconds", "bytes", "km2_per_hour"), 0.0)
    failures: list[dict[str, str]] = []
    for path in paths:
        with Ledger(path, read_only=True) as ledger:
            if ledger.get("run") != run:
                continue
            for state, count in ledger.counts().items():
                counts[state] += count
            for key, value in ledger.totals().items():
                totals[key] += value
            km2, in_s = ledger.pace()
            totals["km2_per_hour"] += km2 / in_s * 3600 if in_s > 0 else 0.0
            for row in ledger.rows("failed"):
                if len(failures) < _MOST_FAILURES:
                    failures.append({"tile": row.task.id, "reason": row.reason or ""})
    return counts, totals, failures


def status(folder: Path) -> dict[str, Any]:
    """Counts, area, failures and pace of a run, from all of its ledgers; changes nothing.

    Raises:
        InputError: no run there.
    """
    pins = read_pins(folder)
    if pins is None:
        raise InputError("no run there", where=folder, expected=f"a folder with {RUN_FILE}")
    main, parts = folder / "ledger.sqlite", list(shards.ledgers(folder))
    # The whole run's ledger is behind while shards are at work, and ahead of them afterwards.
    sums = [_sum(paths, run_id(pins)) for paths in ([main] if main.is_file() else [], parts)]
    counts, totals, failures = max(sums, key=lambda one: one[0]["done"] + one[0]["empty"] + one[0]["failed"])
    finished = counts["done"] + counts["empty"]
    holders = [holder for path in sorted(folder.glob(".lock*")) if (holder := live_holder(path))]
    left_km2, pace = totals["km2"] - totals["km2_finished"], totals["km2_per_hour"]
    return {
        "folder": str(folder),
        "area": pins["area"]["text"],
        "model": pins["model"]["name"],
        "created": pins["canopy"]["created"],
        "tiles": counts,
        "finished_fraction": finished / max(1, sum(counts.values())),
        **{key: round(value, 6) for key, value in totals.items()},
        "seconds_per_tile": round(totals["worker_seconds"] / max(1, counts["done"]), 3),
        "at_work": [
            {"host": h["host"], "pid": h["pid"], "for_s": round(time.time() - float(h["since"]))}  # type: ignore[arg-type]
            for h in holders
        ],
        "left_s": round(left_km2 / pace * 3600) if holders and pace > 0 else None,
        "failures": failures,
    }


# A worker reads its tile's imagery at its native pixel, three bytes each, before any compression.
IMAGERY_BYTES_PER_PX = 3


@dataclass(frozen=True)
class RegionCost:
    """Attributes:
    tiles: work tiles; km2: ground that they cover.
    crops: passes of the network if every tile has imagery everywhere.
    imagery_bytes: uncompressed RGB to read, crop margins included; JPEG imagery is about a tenth of it.
    map_bytes: of the tiles, uncompressed.
    worker_hours: of one worker; hours: with `workers` of them.
    money: worker_hours at the price of an hour, None without one.
    """

    tiles: int
    km2: float
    crops: int
    pixels: int
    imagery_bytes: float
    map_bytes: float
    workers: int
    worker_hours: float
    hours: float
    km2_per_hour: float
    price_per_worker_hour: float | None
    money: float | None

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return asdict(self)

    def lines(self) -> list[str]:
        """For a person."""
        text = [
            f"{self.tiles:,} tiles, {self.km2:,.2f} km2, {self.crops:,} crops",
            f"imagery {_size(self.imagery_bytes)} uncompressed (JPEG: about a tenth); "
            f"map {_size(self.map_bytes)} uncompressed",
            f"{self.worker_hours:,.2f} worker hours, {self.hours:,.2f} h with {self.workers} "
            f"worker{'' if self.workers == 1 else 's'}, {self.km2_per_hour:,.1f} km2/h",
        ]
        if self.money is not None:
            text.append(f"{self.money:,.2f} at {self.price_per_worker_hour:g} an hour and worker")
        return text


def region_cost(prepared: Prepared, crop_seconds: float | None = None) -> RegionCost:
    """Cost of a region if all of it has imagery.

    Args:
        crop_seconds: of one crop on one worker; measured here (two forward passes) if not given.
    """
    settings, config = prepared.settings, prepared.model.config
    if crop_seconds is None:
        runner = prepared.choice.open(prepared.model, prepared.extras.outputs)
        crop_seconds = seconds_per_crop(prepared.model, runner, prepared.extras.views)
    lattice = Lattice.of_model(config)
    tiling = prepared.tiling
    tiles = pixels = predicted = 0
    km2 = 0.0
    sample = None
    for task in tiling.tiles(prepared.aoi):
        _, _, height, width = tiling.offset(task.row, task.col)
        tiles, pixels, km2 = tiles + 1, pixels + height * width, km2 + task.km2
        if sample is None or height * width > sample[0]:
            sample = (height * width, task)
    crops = 0
    if sample is not None:
        # All tiles are alike but for the clipped ones, which cost as their share of a whole one.
        target = prepared.lattices.target(tiling.window(sample[1].row, sample[1].col))
        plan = plan_windows(target.predict, lattice)
        share = pixels / sample[0]
        crops = round(plan.n_crops * share)
        predicted = round(target.predict.height * target.predict.width * share)
    worker_s = crops * crop_seconds + OVERHEAD_S_PER_PX * (pixels + predicted)
    local = settings.scheduler == "local"
    workers = len(local_devices(settings.device, settings.workers)) if local else settings.workers or 1
    seen_m2 = crops * (config.crop_px * config.gsd_m) ** 2 * (1 / lattice.waste)
    hours = worker_s / 3600
    return RegionCost(
        tiles=tiles, km2=km2, crops=crops, pixels=pixels,
        imagery_bytes=seen_m2 / prepared.source.native_gsd_m**2 * IMAGERY_BYTES_PER_PX,
        map_bytes=float(pixels * len(prepared.bands) * BYTES_PER_PIXEL[settings.encoding]),
        workers=workers, worker_hours=hours, hours=hours / workers,
        km2_per_hour=km2 / (hours / workers) if hours else 0.0,
        price_per_worker_hour=settings.price,
        money=None if settings.price is None else hours * settings.price,
    )  # fmt: skip


def _size(count: float) -> str:
    """`3.4 GB`."""
    units = ["kB", "MB", "GB", "TB"]
    count /= 1000
    while count >= 1000 and len(units) > 1:
        count, units = count / 1000, units[1:]
    return f"{count:,.1f} {units[0]}"


LEDGER = "ledger.sqlite"


def make_folder(folder: Path) -> None:
    """Make a run's folder; OutputError where that is impossible."""
    try:
        (folder / TILES).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"cannot be made ({error.strerror})", where=folder) from error


def clear(folder: Path) -> None:
    """Remove what a run made, and nothing else."""
    for name in (RUN_FILE, LEDGER, f"{LEDGER}-wal", f"{LEDGER}-shm", "catalog.json", "collection.json",
                 "model.json", "mosaic", "mosaic.vrt", "index.gti.gpkg", "overview.tif",
                 "status.json"):  # fmt: skip
        (folder / name).unlink(missing_ok=True)
    for name in (TILES, shards.FOLDER, "stac", "published"):
        if (folder / name).is_dir():
            shutil.rmtree(folder / name, ignore_errors=True)
    (folder / TILES).mkdir(exist_ok=True)


def check_files(ledger: Ledger, folder: Path, verify: bool) -> None:
    """Finished tiles whose file is gone or changed are pending again."""
    lost = []
    for row in ledger.rows("done"):
        path = tile_path(folder, row.task.id)
        try:
            same = path.stat().st_size == row.bytes
            if same and verify:
                same = file_sha256(path) == row.sha256
        except OSError:
            same = False
        if not same:
            lost.append(row.task.ordinal)
    for ordinal in lost:
        ledger.lose(ordinal, "its file was missing or changed")
    if lost:
        log.warning(f"{len(lost)} finished tiles have lost their file and are made again")
    ledger.commit()


NO_IMAGERY = "no imagery there"


@dataclass(frozen=True)
class RunResult:
    """What a start of a run did, and how the run stands. Paths are None where outputs were not made."""

    folder: Path
    counts: dict[str, int]
    totals: dict[str, float]
    tally: Tally
    outputs: dict[str, str] = field(default_factory=dict)
    failures: list[tuple[str, str]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def exit_code(self) -> int:
        """0 when every tile is done or empty, 3 when some failed."""
        return 3 if self.counts["failed"] else 0

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return {
            "folder": str(self.folder),
            "tiles": self.counts,
            **{key: round(value, 6) for key, value in self.totals.items()},
            "this_start": {
                "done": self.tally.done,
                "empty": self.tally.empty,
                "failed": self.tally.failed,
                "retried": self.tally.retried,
                "seconds": round(self.tally.seconds, 3),
                "km2_per_hour": round(self.tally.km2_per_hour, 3),
            },
            "failures": [{"tile": tile, "reason": reason} for tile, reason in self.failures],
            "outputs": self.outputs,
            "notes": self.notes,
        }


def prepare_run(settings: RegionSettings, *, resume: bool = False, overwrite: bool = False) -> Prepared:
    """Open what the settings ask for, or what the run in their folder is pinned to.

    Args:
        resume: take area, imagery, model and map from the run, which has to exist, where they are not set.
        overwrite: what is there will be replaced, and may differ.

    Raises:
        InputError: bad input; a folder that is no run's; a run with other settings (says which).
    """
    _refuse_clearing(settings, overwrite)
    folder = settings.folder
    pins = read_pins(folder)
    if folder.exists() and not folder.is_dir():
        raise InputError("is a file", where=folder, expected="the folder of a run")
    if pins is None and folder.is_dir() and not all(_is_ours(path.name) for path in folder.iterdir()):
        raise InputError(
            "the folder holds something that is no run", where=folder, remedy="choose another -o"
        )
    if resume:
        if pins is None:
            raise InputError("no run to go on with", where=folder, expected=f"a folder with {RUN_FILE}")
        settings = settings_from(pins, settings)
        prepared = open_region(settings, settings.area() or area_of(pins))
    else:
        if pins is not None and not overwrite:
            # Threads and runtime are a matter of the machine that began; another one must keep them.
            free = {
                name
                for name in ("threads", "backend", "precision")
                if getattr(settings, name) in (None, "auto")
            }
            settings = settings.model_copy(update={k: v for k, v in pins["map"].items() if k in free})
        prepared = open_region(settings)
    if pins is not None and not overwrite:
        refuse_changes(pins, prepared.pins, folder)
    if settings.layout != "tiles":
        from canopy.region.publish import published_ratio

        published_ratio(prepared.tiling)  # known now, not after days of work
    return prepared


def _refuse_clearing(settings: RegionSettings, overwrite: bool) -> None:
    """A shard that cleared the folder would remove what the others have done and are doing."""
    if overwrite and settings.shard is not None:
        raise ConfigError(
            "--overwrite with --shard", where=settings.folder, expected="one of them",
            remedy="remove the folder or choose another -o before the shards start",
        )  # fmt: skip


def _is_ours(name: str) -> bool:
    """Names that a start leaves which died before it had pinned anything."""
    return name in (TILES, shards.FOLDER) or name.startswith((shards.LOCK, f".{RUN_FILE}", LEDGER))


def start(
    prepared: Prepared,
    *,
    overwrite: bool = False,
    retry_failed: bool = False,
    verify: bool = False,
    watch: Callable[[Ledger], Watcher] | None = None,
    engine: Callable[[How], Engine] | None = None,
) -> RunResult:
    """Make all open tiles of a run, and its catalog and mosaic when none is left.

    Args:
        prepared: of `prepare_run`.
        overwrite: begin anew; a shard cannot.
        retry_failed: failed tiles get another chance.
        verify: hash every finished tile again first, instead of trusting names and sizes.
        watch: makes who shows progress.
        engine: makes where tiles are made; by default what the settings say.

    Raises:
        HeldError: another process is at work there.
        Interrupted: stopped from outside; everything is ready to go on.
        CanopyError: the run cannot go on (full disk, workers unfit).
    """
    settings = prepared.settings
    _refuse_clearing(settings, overwrite)
    folder = settings.folder
    shard = settings.parse_shard()
    make_folder(folder)
    with ExitStack() as stack:
        stack.enter_context(RunLock(folder / shards.lock_name(shard)))
        shards.refuse_crossing(folder, shard)
        if overwrite:
            clear(folder)
        pins = write_pins(folder, prepared.pins)
        refuse_changes(pins, prepared.pins, folder)
        path = shards.ledger_path(folder, shard) if shard else folder / LEDGER
        ledger = stack.enter_context(Ledger(path))
        _enter_tiles(ledger, prepared, pins, shard)
        shards.gather(ledger, folder, path)
        ledger.reopen(retry_failed)
        check_files(ledger, folder, verify)
        mine = {t.id for t in ledger.pending()} if shard else None
        remove_leftovers(folder, mine)
        how = How(str(folder.resolve()), run_id(pins), settings.device, settings.batch_size, settings.readers)
        tally = _drive(ledger, settings, how, watch, engine)
        remove_leftovers(folder, mine)  # of workers that died on the way
        counts, totals = ledger.counts(), ledger.totals()
        failures = [(row.task.id, row.reason or "") for row in ledger.rows("failed")]
        if tally.interrupted:
            left = counts["pending"] + counts["running"]
            raise Interrupted(
                f"stopped; {left} tile{'' if left == 1 else 's'} left",
                where=folder, remedy="run the same command again to go on",
            )  # fmt: skip
        outputs = {} if shard else finish(ledger, prepared, pins)
    result = RunResult(folder, counts, totals, tally, outputs, failures, prepared.notes)
    return _finish_shards(result, prepared, shard) if shard else result


def _drive(
    ledger: Ledger,
    settings: RegionSettings,
    how: How,
    watch: Callable[[Ledger], Watcher] | None,
    make_engine: Callable[[How], Engine] | None,
) -> Tally:
    counts = ledger.counts()
    if not counts["pending"]:
        return Tally()
    engine = (make_engine or _engine_of(settings, counts["pending"]))(how)
    clean = False
    try:
        with _signals() as stop:
            tally = drive(
                ledger,
                engine,
                attempts=settings.attempts,
                stop=stop,
                watcher=watch(ledger) if watch else None,
            )
        clean = True
        return tally
    finally:
        engine.close(kill=not clean)


def _engine_of(settings: RegionSettings, pending: int) -> Callable[[How], Engine]:
    def make(how: How) -> Engine:
        if settings.scheduler != "local":
            return ClusterEngine(how, settings.scheduler)
        devices = local_devices(settings.device, settings.workers)[:pending]
        return LocalEngine(how, devices)

    return make


def finish(ledger: Ledger, prepared: Prepared, pins: dict[str, Any]) -> dict[str, str]:
    """Catalog and mosaic of what is done, unless they are up to date, and the published layout if asked."""
    from canopy.region.publish import write_catalog, write_mosaic

    folder = prepared.settings.folder
    digest = outputs_digest(ledger)
    outputs = {"catalog": str(folder / "catalog.json"), "mosaic": str(folder / "mosaic")}
    if ledger.get("outputs") != digest or not all(Path(path).exists() for path in outputs.values()):
        write_mosaic(ledger, prepared, folder)
        write_catalog(ledger, prepared, pins)
        ledger.set("outputs", digest)
    if prepared.settings.layout != "tiles":
        from canopy.region.publish import write_published

        outputs["published"] = str(write_published(ledger, prepared))
    return outputs


def _finish_shards(result: RunResult, prepared: Prepared, shard: tuple[int, int] | None) -> RunResult:
    """When the last of the shards is through: one ledger of all, and the outputs."""
    if shard is None or result.counts["pending"] or result.counts["running"]:
        return result
    folder = result.folder
    shards.mark_complete(folder, shard)
    if not shards.all_complete(folder, shard[1]):
        return result
    try:
        with RunLock(folder / shards.LOCK), Ledger(folder / LEDGER) as ledger:
            pins = read_pins(folder) or prepared.pins
            _enter_tiles(ledger, prepared, pins, None)
            shards.gather(ledger, folder, folder / LEDGER)
            outputs = finish(ledger, prepared, pins)
    except HeldError:  # another shard ended in the same moment, and does it
        return result
    return RunResult(
        folder, result.counts, result.totals, result.tally, outputs, result.failures, result.notes
    )


# ---- the folder -------------------------------------------------------------------------------
def _enter_tiles(
    ledger: Ledger, prepared: Prepared, pins: dict[str, Any], shard: tuple[int, int] | None
) -> None:
    """Enter the region's tiles (or a shard's) into a new ledger; tiles without imagery are empty at once."""
    found = ledger.get("run")
    if found is None:
        tiles = prepared.tiling.tiles(prepared.aoi)
        ledger.add(task for task in tiles if shard is None or task.ordinal % shard[1] == shard[0] - 1)
        _mark_bare(ledger, prepared)
        ledger.set("run", run_id(pins))
    elif found != run_id(pins):
        raise InputError(
            "the ledger is another run's", where=ledger.path, remedy="choose another -o, or use --overwrite"
        )


def _mark_bare(ledger: Ledger, prepared: Prepared) -> None:
    """Tiles that no imagery reaches cost nothing: they never become a task."""
    import shapely

    outline = prepared.source.area()
    if outline is None or prepared.cells:
        return
    area, side = prepared.tiling.area, prepared.tiling.tile_px
    # A quarter of a tile of slack: catalogs draw outlines with a broad pen.
    shape = outline.to_crs(area.crs).geometry.buffer(side * area.pixel[0] / 4)
    shapely.prepare(shape)
    if shape.covers(shapely.box(*area.bounds)):
        return
    for task in ledger.pending():
        window = prepared.tiling.window(task.row, task.col)
        if not shape.intersects(shapely.box(*window.bounds)):
            ledger.finish(task.ordinal, "empty", host="", seconds=0.0, reason=NO_IMAGERY)


@contextmanager
def _signals() -> Iterator[Stop]:
    """Ctrl-C and the scheduler's SIGTERM: the first lets the tiles in work end, the second does not."""
    stop = Stop()
    if not in_main_thread():
        yield stop
        return

    def ask(number: int, frame: object) -> None:
        if stop.asked:
            raise KeyboardInterrupt
        stop.asked = True
        log.warning("stopping after the tiles in work; once more stops at once")

    before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    except KeyboardInterrupt:
        raise Interrupted("stopped at once", remedy="run the same command again to go on") from None
    finally:
        for number, handler in before.items():
            with contextlib.suppress(ValueError):
                signal.signal(number, handler)


def elapsed_text(seconds: float) -> str:
    """`45 s`, `12 min`, `3.4 h` or `2.1 days`."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    if seconds < 5400:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h" if seconds < 172_800 else f"{seconds / 86_400:.1f} days"
