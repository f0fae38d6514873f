"""Keeping an engine busy until the ledger has no open tile: retries, quarantine, stopping, progress.

Memory does not depend on the number of tiles: only those in work, those that wait for another try, and one
page of the ledger are held.
"""

from __future__ import annotations

import heapq
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Protocol

from canopy.errors import CanopyError, OutputError
from canopy.inference.region.engines import Engine
from canopy.inference.region.ledger import Ledger
from canopy.inference.region.task import Outcome
from canopy.inference.region.tiling import TileTask
from canopy.runtime import log

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
