"""Where tiles are made: futures of dask.distributed, the one engine of `canopy map`; and what a worker does.

`--scheduler local` starts a `LocalCluster` of spawned processes, one per GPU or `--workers` of them; an
address takes any cluster, whose workers need this package and the run's folder under the same path.

Every worker opens the run for itself, from the run file in the folder, and refuses if model, imagery or
settings are not those that the run is pinned to. A tile is written under a temporary name, read back, and
renamed: whoever makes a tile a second time replaces it by the same heights. Memory does not depend on the
number of tiles: the driver holds those in work, those that wait for another try, and a page of the ledger.
"""

from __future__ import annotations

import datetime
import errno
import functools
import logging
import signal
import socket
import threading
import time
import warnings
from collections import Counter, deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from canopy.errors import CanopyError, FetchError, InputError, OutputError
from canopy.region.ledger import Ledger, Outcome, read_pins, refuse_changes, run_id
from canopy.region.options import MapOptions
from canopy.region.plan import open_region, pinned_options
from canopy.region.tiles import Tile, tile_path
from canopy.runtime import NoProgress, Progress, log

if TYPE_CHECKING:
    from distributed import Client


CONNECT_S = 60.0
LINE_EVERY_S = 60.0
_EPOCH = datetime.date(1970, 1, 1)
# More scenes than this in one tile's row only make the ledger large.
_MOST_SCENES = 50
_one_at_a_time = threading.Lock()


# ---- one tile, on a worker --------------------------------------------------------------------
@dataclass(frozen=True)
class How:
    """How workers work; nothing of it changes a tile's heights.

    Attributes:
        folder: of the run.
        run: the run's id, as `run_id` has it.
        devices: of the workers of this machine, taken by their numbers; on a cluster one for all.
        threads: of the network on a CPU; None: as many as the worker has.
        batch_size, readers: of the engine.
    """

    folder: str
    run: str
    devices: tuple[str, ...] = ("auto",)
    threads: int | None = None
    batch_size: int | str = "auto"
    readers: int = 2


def dask_setup(worker: object) -> None:
    """Of a local worker, called by dask as it starts: Ctrl-C is the driver's to handle, and what libraries
    warn of is for developers."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    warnings.simplefilter("ignore")


def make_tile(how: How, tile: Tile) -> tuple[Outcome, bool]:
    """On a dask worker: make one tile with the process's model, opened at its first tile.

    Returns:
        What became of it, and whether another try may help where it failed.

    Raises:
        CanopyError: this worker cannot work for the run at all.
    """
    from distributed import get_worker

    worker = get_worker()
    number = int(worker.name) if isinstance(worker.name, int) else 0
    device = how.devices[number % len(how.devices)]
    with _one_at_a_time:  # two in a process would only compete for the device
        maker = _maker(how, device, how.threads or worker.state.nthreads)
        started = time.perf_counter()
        try:
            return maker.make(tile), False
        except Exception as error:
            reason = str(error) if isinstance(error, CanopyError) else f"{type(error).__name__}: {error}"
            full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EROFS)
            outcome = Outcome(
                "failed", time.perf_counter() - started, reason=" ".join(reason.split())[:500],
                stop=full or isinstance(error, OutputError),
            )  # fmt: skip
            # Bad input stays bad; a host, a device or a bug's bad luck may not.
            return outcome, isinstance(error, FetchError) or not isinstance(error, InputError)


@functools.cache
def _maker(how: How, device: str, threads: int) -> TileMaker:
    return TileMaker(how, device, threads)


class _Empty(Exception):  # noqa: N818  (a signal, not an error)
    """Nothing valid in a tile: its file is not kept."""


class TileMaker:
    """Model, imagery and grids of a run, ready to make tiles one at a time."""

    def __init__(self, how: How, device: str, threads: int) -> None:
        """Open everything.

        Raises:
            InputError: the folder is not seen from here, or model or imagery are not the run's.
        """
        import torch

        self.folder = Path(how.folder)
        pins = read_pins(self.folder)
        if pins is None or run_id(pins) != how.run:
            raise InputError(
                "the run's folder is not there, or is another run's",
                where=f"{how.folder} on {socket.gethostname()}",
                remedy="workers need the same folder under the same path as the driver",
            )
        torch.set_num_threads(threads)
        options = pinned_options(
            pins, MapOptions(out=how.folder, device=device, batch_size=how.batch_size, readers=how.readers)
        )
        self.region = open_region(options, pins)
        refuse_changes(pins, self.region.pins, self.folder)
        self.runner = self.region.choice.open(self.region.model, self.region.extras.outputs)
        self.batch_size = self.region.options.batch_size

    def make(self, tile: Tile) -> Outcome:
        """Predict and write one tile.

        Raises:
            CanopyError: nothing is left at the tile's place then but what was there before.
        """
        from canopy.geo.cog import CogWriter
        from canopy.geo.reading import raster_env
        from canopy.inference.layers import band_specs
        from canopy.inference.output import Scenes
        from canopy.inference.predict import Prediction

        started = time.perf_counter()
        region, path = self.region, tile_path(self.folder, tile.id)
        empty = functools.partial(Outcome, "empty", reason="no valid imagery in the area")
        imagery = region.source_of(tile)
        if imagery is None:
            return empty(time.perf_counter() - started)
        target = region.lattices.target(region.tiling.window(tile.row, tile.col))
        scenes = Scenes.of(imagery, target.output)
        options = region.options.model_copy(update={"batch_size": self.batch_size})
        prediction = Prediction(
            options, imagery, region.aoi, region.model, region.model_name, target, self.runner,
            region.radiometry, region.extras, options.readers,
        )  # fmt: skip
        try:
            with (
                raster_env(),
                CogWriter(
                    path, target.output, band_specs(region.extras.bands),
                    encoding=options.encoding, tags=prediction.tags(scenes), overwrite=True,
                ) as writer,
            ):  # fmt: skip
                summary = prediction.predict_into(writer, None, path)
                # What was too much for the device once is not tried again with every tile.
                self.batch_size = summary.batch_size or self.batch_size
                if not summary.valid_pixels:
                    raise _Empty
        except _Empty:
            path.unlink(missing_ok=True)
            return empty(time.perf_counter() - started)
        facts: dict[str, Any] = {
            "pixels": summary.pixels,
            "valid": summary.valid_pixels,
            "mean_m": round(summary.mean_height_m, 4),
            "max_m": round(summary.max_height_m, 4),
            "cover_2m": round(summary.cover_2m, 6),
            "crops": summary.crops_predicted,
            "dates": [
                (_EPOCH + datetime.timedelta(days=day)).isoformat()
                for day in (summary.first_day, summary.last_day) if day
            ],
            "scenes": scenes.names[:_MOST_SCENES],
        } | ({"notes": summary.notes} if summary.notes else {})  # fmt: skip
        seconds = time.perf_counter() - started
        return Outcome("done", seconds, sha256=writer.sha256, bytes=path.stat().st_size, facts=facts)


# ---- all tiles, from the driver ---------------------------------------------------------------
@contextmanager
def local_cluster(workers: int) -> Iterator[Client]:
    """A client of spawned worker processes on this machine, which end with the block or with this process.

    Raises:
        CanopyError: they end before they are ready.
    """
    import dask
    from distributed import Client, LocalCluster

    settings = {
        # A worker's death is counted by `Driver`, in the ledger, like any other failure of its tile.
        "distributed.scheduler.allowed-failures": 0,
        "distributed.scheduler.worker-saturation": 1.0,
        "distributed.worker.multiprocessing-method": "spawn",
    }
    _hush()
    with dask.config.set(settings):
        try:
            cluster = LocalCluster(
                n_workers=workers, threads_per_worker=1, memory_limit=0, dashboard_address="127.0.0.1:0",
                silence_logs=logging.CRITICAL, preload=["canopy.region.workers"],
            )  # fmt: skip
        except RuntimeError as error:
            raise CanopyError(
                f"workers end before they are ready ({error})",
                remedy="try fewer --workers: memory may be short; -v shows more",
            ) from error
        with cluster, Client(cluster, set_as_default=False, timeout=CONNECT_S) as client:
            yield client


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


class Driver:
    """As many tiles in work as there are workers, each tried until it is made or quarantined."""

    def __init__(self, ledger: Ledger, client: Client, how: How, attempts: int, tally: Tally) -> None:
        self.ledger, self.client, self.how, self.attempts, self.tally = ledger, client, how, attempts, tally
        self.again: deque[Tile] = deque()
        self.failures: Counter[str] = Counter()
        info = client.scheduler_info(n_workers=-1)["workers"].values()
        gpus = how.devices[0] in ("auto", "cuda") and any("GPU" in one.get("resources", {}) for one in info)
        self.resources = {"GPU": 1} if gpus else None

    def run(self, stop: threading.Event, progress: Progress) -> None:
        """Until no tile is open, or `stop` is set and those in work are made.

        Raises:
            OutputError: the disk is full, or cannot be trusted; the tiles in work stay open.
            CanopyError: workers cannot work for the run at all, or the scheduler is gone.
        """
        from distributed import as_completed

        waiting, in_work = (tile for tile, _ in self.ledger.rows("pending")), dict[str, Tile]()
        results = as_completed(loop=self.client.loop)

        def fill() -> None:
            """Give every worker a tile; those that failed come again when all others have had their turn."""
            while not stop.is_set() and len(in_work) < max(1, len(self.client.nthreads())):
                tile = next(waiting, None) or (self.again.popleft() if self.again else None)
                if tile is None:
                    return
                self.ledger.begin(tile)
                key = f"canopy-{self.how.run[:8]}-{tile.id}-{time.time_ns()}"
                in_work[key] = tile
                results.add(
                    self.client.submit(
                        make_tile, self.how, tile, key=key, pure=False, resources=self.resources
                    )
                )

        total, told = self.ledger.counts()["pending"], time.monotonic()
        progress.start(total, "tiles")
        fill()
        for future in results:
            before = self.tally.counts.total()
            self._enter(in_work.pop(future.key), *self._outcome(future))
            fill()
            made, failed = self.tally.counts.total(), self.tally.counts["failed"]
            progress.advance(made - before)
            if isinstance(progress, NoProgress) and time.monotonic() - told > LINE_EVERY_S:
                told = time.monotonic()
                log.info(
                    f"{made:,} of {total:,} tiles, {self.tally.km2_per_hour:,.3g} km2/h, {failed:,} failed"
                )

    def _outcome(self, future: Any) -> tuple[Outcome, bool]:
        """What a worker says of its tile, or what became of the worker; and whether another try may help."""
        if future.status == "finished":
            return future.result()
        if future.cancelled():
            raise CanopyError(
                "the scheduler is gone", remedy="start it and run the same command again to go on"
            )
        error = future.exception()
        if isinstance(error, CanopyError):
            raise error  # a worker that is unfit for the run: all others are like it
        killed = type(error).__name__ == "KilledWorker"
        reason = "its worker died while it had the tile" if killed else f"{type(error).__name__}: {error}"
        return Outcome("failed", host="", reason=" ".join(reason.split())[:500]), True

    def _enter(self, tile: Tile, outcome: Outcome, retryable: bool) -> None:
        reason = outcome.reason
        if outcome.stop:
            self.ledger.finish(tile, Outcome("pending", reason=reason))
            raise OutputError(
                reason or "cannot be written", remedy="with room there, run the same command again to go on"
            )
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
