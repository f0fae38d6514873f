"""A run without a model, or without processes: the same ledger and driver, with workers that only pretend.

For measuring what the machinery itself costs, and for killing it in the middle, on one machine or on a
cluster, before days of GPU time depend on it (benchmarks/region_scale.py, benchmarks/region_faults.py).
"""

from __future__ import annotations

import hashlib
import os
import socket
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from canopy.region.task import How, Outcome, TileWorker, tile_path
from canopy.region.tiles import TileTask


def rehearsed_bytes(task: TileTask, size: int = 4096) -> bytes:
    """What a pretended tile holds: a function of its id alone, as a real tile's bytes are."""
    block = hashlib.sha256(task.id.encode()).digest()
    return block * (size // len(block))


@dataclass(frozen=True)
class Rehearsal:
    """Makes pretending workers for `LocalEngine`: each tile takes `seconds` and leaves a small file.

    Tiles whose id is in `poison` kill their worker, those in `broken` fail for good.
    """

    seconds: float = 0.0
    poison: frozenset[str] = frozenset()
    broken: frozenset[str] = frozenset()

    def __call__(self, how: How) -> PretendingWorker:
        return PretendingWorker(Path(how.folder), self)


class PretendingWorker:
    """A worker that writes what `rehearsed_bytes` says, in the way real tiles are written."""

    def __init__(self, folder: Path, rehearsal: Rehearsal) -> None:
        self.folder, self.rehearsal = folder, rehearsal

    def attempt(self, task: TileTask) -> Outcome:
        """Pretend to make a tile."""
        if task.id in self.rehearsal.poison:
            os.kill(os.getpid(), 9)
        host = socket.gethostname()
        if task.id in self.rehearsal.broken:
            return Outcome(task, "failed", host, reason="rehearsed: this tile is broken")
        started = time.perf_counter()
        path = tile_path(self.folder, task.id)
        content = rehearsed_bytes(task)
        partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
        partial.write_bytes(content[: len(content) // 2])
        time.sleep(self.rehearsal.seconds)
        partial.write_bytes(content)
        os.replace(partial, path)
        return Outcome(
            task, "done", host, time.perf_counter() - started,
            sha256=hashlib.sha256(content).hexdigest(), size=len(content),
        )  # fmt: skip


class PretendingEngine:
    """An engine in this process that has done every tile at once: what is left is the driver's own cost."""

    def __init__(self, slots: int = 64, fail_every: int = 0) -> None:
        self._slots, self._fail_every = slots, fail_every
        self._tasks: deque[TileTask] = deque()
        self.submitted = self.most_held = 0

    @property
    def slots(self) -> int:
        return self._slots

    def submit(self, task: TileTask) -> None:
        self.submitted += 1
        self._tasks.append(task)
        self.most_held = max(self.most_held, len(self._tasks))

    def wait(self, timeout_s: float) -> list[Outcome]:
        outcomes = [self._outcome(task) for task in self._tasks]
        self._tasks.clear()
        return outcomes

    def _outcome(self, task: TileTask) -> Outcome:
        if self._fail_every and task.ordinal % self._fail_every == 0:
            return Outcome(task, "failed", "simulated", 30.0, reason="rehearsed failure")
        digest = hashlib.sha256(task.id.encode()).hexdigest()
        facts = {"pixels": 4_194_304, "valid": 4_000_000, "mean_m": 12.3, "max_m": 41.0, "cover_2m": 0.7,
                 "dates": ["2023-07-01"], "scenes": ["scene"]}  # fmt: skip
        return Outcome(task, "done", "simulated", 30.0, sha256=digest, size=9_000_000, facts=facts)

    def close(self, kill: bool = False) -> None:
        pass


class InlineEngine:
    """A real worker in this process, one tile at a time: for tests, and for stepping through a tile.

    Args:
        how: what every worker is told.
        answer: asked before each tile is made; an outcome of it stands for the tile's.
    """

    slots = 2

    def __init__(self, how: How, answer: Callable[[TileTask], Outcome | None] | None = None) -> None:
        self.worker, self._answer = TileWorker(how), answer
        self._tasks: list[TileTask] = []
        self.made: list[str] = []

    def submit(self, task: TileTask) -> None:
        self._tasks.append(task)

    def wait(self, timeout_s: float) -> list[Outcome]:
        task = self._tasks.pop()
        self.made.append(task.id)
        return [(self._answer(task) if self._answer else None) or self.worker.attempt(task)]

    def close(self, kill: bool = False) -> None:
        pass
