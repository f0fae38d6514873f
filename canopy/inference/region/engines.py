"""Where tiles are made: spawned processes of this machine, one model each.

An engine takes tiles and gives outcomes. It never decides what a failure means; `drive` does.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from typing import Any, Protocol

from canopy.errors import CanopyError
from canopy.inference.region.task import How, Outcome
from canopy.inference.region.tiling import TileTask

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
            from canopy.inference.region.task import TileWorker

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
