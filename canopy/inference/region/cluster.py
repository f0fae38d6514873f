"""Tiles made on a dask.distributed cluster, of whatever kind: `--scheduler ADDRESS`.

The cluster's workers need this package and the run's folder under the same path. Each process opens the model
once and makes one tile at a time, however many threads it has. With a GPU device only workers that declare
`GPU` resources get tiles, if any do.
"""

from __future__ import annotations

import contextlib
import queue
import threading
import time
from typing import Any

from canopy.errors import CanopyError, MissingDependencyError
from canopy.inference.region.task import How, Outcome, failure
from canopy.inference.region.tiling import TileTask

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
            from canopy.inference.region.task import TileWorker

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
