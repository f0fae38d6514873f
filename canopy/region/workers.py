"""Where tiles are made: futures of dask.distributed, the one engine of `canopy map`.

`--scheduler local` starts a `LocalCluster` of spawned processes, one per GPU or `--workers` of them; an
address takes any cluster, whose workers need this package and the run's folder under the same path. Memory
does not depend on the number of tiles: only those in work, those that wait for another try, and one page of
the ledger are held.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from canopy.errors import CanopyError, OutputError
from canopy.region.ledger import Ledger, Outcome
from canopy.region.task import How, make_tile
from canopy.region.tiles import Tile
from canopy.runtime import log

if TYPE_CHECKING:
    from distributed import Client, LocalCluster

CONNECT_S = 60.0


@dataclass
class Tally:
    """What this start of a run has done so far.

    Attributes:
        began: when a worker began the first tile, its model loaded; None until one is finished.
    """

    counts: Counter[str] = field(default_factory=Counter)
    retried: int = 0
    km2: float = 0.0
    started: float = field(default_factory=time.monotonic)
    began: float | None = None

    @property
    def km2_per_hour(self) -> float:
        """Of ground, since the first tile was begun: before it, workers only load the model."""
        seconds = time.monotonic() - self.began if self.began is not None else 0.0
        return self.km2 / seconds * 3600 if seconds > 0 else 0.0


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


def local_threads(workers: int) -> int:
    """The network's threads in each of some workers on this machine."""
    import torch

    return max(1, torch.get_num_threads() // workers)


@contextmanager
def local_cluster(workers: int) -> Iterator[Client]:
    """A client of spawned worker processes on this machine, which end with the block or with this process.

    Raises:
        CanopyError: they end before they are ready.
    """
    import dask
    from distributed import Client

    settings = {
        # A worker's death is counted by `Driver`, in the ledger, like any other failure of its tile.
        "distributed.scheduler.allowed-failures": 0,
        "distributed.scheduler.worker-saturation": 1.0,
        "distributed.worker.multiprocessing-method": "spawn",
        "distributed.nanny.pre-spawn-environ.PYTHONWARNINGS": "ignore",  # of libraries, to developers
    }
    _hush()
    with (
        dask.config.set(settings),
        _started(workers) as cluster,
        Client(cluster, set_as_default=False, timeout=CONNECT_S) as client,
    ):
        yield client


def _started(workers: int, tries: int = 3) -> LocalCluster:
    """A local cluster; one that loses a process while it starts, which ends all of it, is started again."""
    from distributed import LocalCluster

    try:
        return LocalCluster(
            n_workers=workers, threads_per_worker=1, memory_limit=0, dashboard_address="127.0.0.1:0",
            silence_logs=logging.CRITICAL, preload=["canopy.region.task"],
        )  # fmt: skip
    except RuntimeError as error:
        if tries > 1:
            return _started(workers, tries - 1)
        raise CanopyError(
            f"workers end before they are ready ({error})",
            remedy="try fewer --workers: memory may be short; -v shows more",
        ) from error


@contextmanager
def remote_cluster(address: str) -> Iterator[Client]:
    """A client of a scheduler that runs somewhere.

    Raises:
        CanopyError: it does not answer, or has no worker for a minute.
    """
    from distributed import Client

    _hush()
    try:
        client = Client(address, timeout=CONNECT_S, set_as_default=False, name="canopy-map")
        client.wait_for_workers(1, timeout=CONNECT_S)
    except (OSError, TimeoutError, ValueError) as error:
        raise CanopyError(
            f"no scheduler with a worker there ({error})", where=f"--scheduler {address}",
            remedy="start the cluster first; see docs/regional-mapping.md",
        ) from error  # fmt: skip
    with client:
        yield client


def _hush() -> None:
    """What dask says of lost workers and connections is told by `Driver`, of their tiles."""
    logging.getLogger("distributed").setLevel(logging.CRITICAL)


class Driver:
    """As many tiles in work as there are workers, each tried until it is made or quarantined."""

    def __init__(
        self, ledger: Ledger, client: Client, how: How, attempts: int, tally: Tally, stop: threading.Event,
        watch: Callable[[Tally, int], None] | None,
    ) -> None:  # fmt: skip
        self.ledger, self.client, self.how, self.attempts = ledger, client, how, attempts
        self.tally, self.stop, self.watch = tally, stop, watch
        self.open = (tile for tile, _ in ledger.rows("pending"))
        self.again: deque[Tile] = deque()
        self.failures: Counter[str] = Counter()
        self.in_work: dict[str, Tile] = {}
        info = client.scheduler_info(n_workers=-1)["workers"].values()
        gpus = how.devices[0] in ("auto", "cuda") and any("GPU" in one.get("resources", {}) for one in info)
        self.resources = {"GPU": 1} if gpus else None

    def run(self) -> None:
        """Until no tile is open, or `stop` is set and those in work are made.

        Raises:
            OutputError: the disk is full, or cannot be trusted; the tiles in work stay open.
            CanopyError: workers cannot work for the run at all, or the scheduler is gone.
        """
        from distributed import as_completed

        results = as_completed(loop=self.client.loop)
        self._fill(results)
        for future in results:
            self._take(future)
            self._fill(results)
            if self.watch:
                self.watch(self.tally, len(self.in_work))

    def _fill(self, results: Any) -> None:
        """Give every worker a tile; tiles that failed come again when all others have had their turn."""
        while not self.stop.is_set() and len(self.in_work) < max(1, len(self.client.nthreads())):
            tile = next(self.open, None) or (self.again.popleft() if self.again else None)
            if tile is None:
                return
            self.ledger.begin(tile)
            key = f"canopy-{self.how.run[:8]}-{tile.id}-{self.failures[tile.id]}-{time.time_ns()}"
            self.in_work[key] = tile
            results.add(
                self.client.submit(make_tile, self.how, tile, key=key, pure=False, resources=self.resources)
            )

    def _take(self, future: Any) -> None:
        tile = self.in_work.pop(future.key)
        if future.status == "finished":
            outcome, retryable = future.result()
        elif future.cancelled():
            raise CanopyError(
                "the scheduler is gone", remedy="start it and run the same command again to go on"
            )
        else:
            error = future.exception()
            if isinstance(error, CanopyError):
                raise error  # a worker that is unfit for the run: all others are like it
            killed = type(error).__name__ == "KilledWorker"
            reason = "its worker died while it had the tile" if killed else f"{type(error).__name__}: {error}"
            outcome, retryable = Outcome("failed", host="", reason=" ".join(reason.split())[:500]), True
        if outcome.stop:
            self.ledger.finish(tile, Outcome("pending", reason=outcome.reason))
            raise OutputError(
                outcome.reason or "cannot be written",
                remedy="with room there, run the same command again to go on",
            )
        self._enter(tile, outcome, retryable)

    def _enter(self, tile: Tile, outcome: Outcome, retryable: bool) -> None:
        reason = outcome.reason
        if outcome.state == "failed":
            self.failures[tile.id] += 1
            tries = self.failures[tile.id]
            if retryable and tries < self.attempts:
                self.tally.retried += 1
                self.again.append(tile)
                self.ledger.finish(tile, Outcome("pending", host=outcome.host, reason=reason))
                log.info(f"tile {tile.id}: {reason}; another try ({tries + 1} of {self.attempts})")
                return
            if tries > 1:
                reason = f"{reason} (after {tries} tries)"
            log.warning(f"tile {tile.id} failed: {reason}")
        if self.tally.began is None:
            self.tally.began = time.monotonic() - outcome.seconds
        self.tally.counts[outcome.state] += 1
        self.tally.km2 += tile.km2 if outcome.state != "failed" else 0.0
        self.ledger.finish(tile, replace(outcome, reason=reason, seconds=round(outcome.seconds, 3)))
