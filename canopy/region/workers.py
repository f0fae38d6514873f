"""Where tiles are made: futures of dask.distributed, the one engine of `canopy map`; and what a worker does.

`--scheduler local` starts a `LocalCluster` of spawned processes, one per GPU or `--workers` of them; an
address takes any cluster, whose workers need this package and the run's folder under the same path.

Every worker opens the run for itself, from the run file in the folder, and refuses if model, imagery or
settings are not those that the run is pinned to. A tile is a map like any other: written under a temporary
name, read back, and renamed, so whoever makes it a second time replaces it by the same heights. The ledger is
the queue: what failed for a while is pending again, and comes when all others have had their turn.
"""

from __future__ import annotations

import errno
import functools
import logging
import signal
import socket
import threading
import time
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from canopy.errors import CanopyError, FetchError, InputError, OutputError
from canopy.region.ledger import Ledger, Outcome, read_pins, refuse_changes, run_id
from canopy.region.options import MapOptions
from canopy.region.plan import Region, open_region, pinned_options
from canopy.region.tiles import Tile, tile_path
from canopy.runtime import NoProgress, Progress, log

if TYPE_CHECKING:
    from distributed import Client

    from canopy.inference.backends import Runner


CONNECT_S = 60.0
LINE_EVERY_S = 60.0
_one_at_a_time = threading.Lock()


# ---- one tile, on a worker --------------------------------------------------------------------
@dataclass(frozen=True)
class Run:
    """What workers need to know of a run; only `folder` and `id` say what its heights are.

    Attributes:
        id: of all that is pinned, as `run_id` has it.
        devices: of the workers of this machine, taken by their numbers; on a cluster one for all.
        threads: of the network on a CPU; None: as many as the worker has.
        batch_size, readers: of the engine.
    """

    folder: str
    id: str
    devices: tuple[str, ...] = ("auto",)
    threads: int | None = None
    batch_size: int | str = "auto"
    readers: int = 2


def dask_setup(worker: object) -> None:
    """Of a local worker, called by dask as it starts: Ctrl-C is the driver's to handle, and what libraries
    warn of is for developers."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    warnings.simplefilter("ignore")


def make_tile(run: Run, tile: Tile) -> Outcome:
    """On a dask worker: make one tile with the process's model, opened at its first tile.

    Raises:
        CanopyError: this worker cannot work for the run at all.
    """
    from distributed import get_worker

    worker = get_worker()
    number = int(worker.name) if isinstance(worker.name, int) else 0
    with _one_at_a_time:  # two in a process would only compete for the device
        threads = run.threads or worker.state.nthreads
        region, runner = _opened(run, run.devices[number % len(run.devices)], threads)
        started = time.perf_counter()
        try:
            outcome = predict_tile(region, runner, tile)
        except Exception as error:
            reason = str(error) if isinstance(error, CanopyError) else f"{type(error).__name__}: {error}"
            full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EROFS)
            # Bad input stays bad; a host, a device or a bug's bad luck may not.
            again = isinstance(error, FetchError) or not isinstance(error, InputError)
            reason, stop = " ".join(reason.split())[:500], full or isinstance(error, OutputError)
            outcome = Outcome("failed", reason=reason, again=again, stop=stop)
        return replace(outcome, seconds=round(time.perf_counter() - started, 3))


@functools.cache
def _opened(run: Run, device: str, threads: int) -> tuple[Region, Runner]:
    """A worker's region and its model on the runtime.

    Raises:
        InputError: the folder is not seen from here, or model or imagery are not the run's.
    """
    import torch

    folder = Path(run.folder)
    pins = read_pins(folder)
    if pins is None or run_id(pins) != run.id:
        raise InputError(
            "the run's folder is not there, or is another run's",
            where=f"{folder} on {socket.gethostname()}",
            remedy="workers need the same folder under the same path as the driver",
        )
    torch.set_num_threads(threads)
    how = MapOptions(out=run.folder, device=device, batch_size=run.batch_size, readers=run.readers)
    region = open_region(pinned_options(pins, how), pins)
    refuse_changes(pins, region.pins, folder)
    made = region.inputs
    return region, made.choice.open(made.model, made.extras.outputs)


def predict_tile(region: Region, runner: Runner, tile: Tile) -> Outcome:
    """Predict and write one tile.

    Raises:
        CanopyError: nothing is left at the tile's place then but what was there before.
    """
    from canopy.inference.output import OutputFiles
    from canopy.inference.predict import Prediction

    options, path, made = region.options, tile_path(region.options.folder, tile.id), region.inputs_of(tile)
    if made is not None:
        target = region.lattices.target(region.tiling.window(tile.row, tile.col))
        files = OutputFiles.of(path, False)
        job = Prediction(made, target, runner, files, True, options.readers, options.batch_size)
        if job.run(keep_empty=False).files is not None:
            return Outcome("done", bytes=path.stat().st_size)
    for left in (path, path.with_suffix(".json")):
        left.unlink(missing_ok=True)
    return Outcome("empty", reason="no valid imagery in the area")


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
        # A worker's death is counted in the ledger, like any other failure of its tile.
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
    """What dask says of lost workers and connections is told of their tiles."""
    logging.getLogger("distributed").setLevel(logging.CRITICAL)


def make_tiles(
    ledger: Ledger, client: Client, run: Run, attempts: int, stop: threading.Event, progress: Progress
) -> Counter[str]:
    """Make the pending tiles of a ledger, as many at a time as there are workers.

    Each is tried until it is made, or has failed `attempts` times or for good; until `stop` is set and those
    in work are made.

    Returns:
        Tiles that are `done`, `empty` and `failed`, and tries that were `retried`.

    Raises:
        OutputError: the disk is full, or cannot be trusted; the tiles in work stay open.
        CanopyError: workers cannot work for the run at all, or the scheduler is gone.
    """
    from distributed import as_completed

    info = client.scheduler_info(n_workers=-1)["workers"].values()
    gpus = run.devices[0] in ("auto", "cuda") and any("GPU" in one.get("resources", {}) for one in info)
    queue, in_work, made = ledger.rows("pending"), dict[str, Tile](), Counter[str]()
    results = as_completed(loop=client.loop)

    def fill() -> None:
        nonlocal queue
        while not stop.is_set() and len(in_work) < max(1, len(client.nthreads())):
            found = next(queue, None)
            if found is None:  # what failed meanwhile is pending again
                queue = ledger.rows("pending")
                found = next(queue, None)
            if found is None:
                return
            tile = found[0]
            ledger.begin(tile)
            key = f"canopy-{run.id[:8]}-{tile.id}-{time.time_ns()}"
            in_work[key] = tile
            resources = {"GPU": 1} if gpus else None
            results.add(client.submit(make_tile, run, tile, key=key, pure=False, resources=resources))

    total, told = ledger.counts()["pending"], time.monotonic()
    progress.start(total, "tiles")
    fill()
    for future in results:
        state = _enter(ledger, in_work.pop(future.key), _outcome(future), attempts)
        made[state] += 1
        fill()
        progress.advance(int(state != "retried"))
        if isinstance(progress, NoProgress) and time.monotonic() - told > LINE_EVERY_S:
            told, finished = time.monotonic(), made.total() - made["retried"]
            pace = f"{ledger.totals()['km2_per_hour']:,.3g} km2/h"
            log.info(f"{finished:,} of {total:,} tiles, {pace}, {made['failed']:,} failed")
    return made


def _outcome(future: Any) -> Outcome:
    """What a worker says of its tile, or what became of the worker."""
    if future.status == "finished":
        outcome: Outcome = future.result()
        return outcome
    if future.cancelled():
        raise CanopyError("the scheduler is gone", remedy="start it and run the same command again to go on")
    error = future.exception()
    if isinstance(error, CanopyError):
        raise error  # a worker that is unfit for the run: all others are like it
    killed = type(error).__name__ == "KilledWorker"
    reason = "its worker died while it had the tile" if killed else f"{type(error).__name__}: {error}"
    return Outcome("failed", reason=" ".join(reason.split())[:500], again=True)


def _enter(ledger: Ledger, tile: Tile, outcome: Outcome, attempts: int) -> str:
    """Enter what became of a tile, maybe for another try; returns its state, or `retried`."""
    reason = outcome.reason
    if outcome.stop:
        ledger.finish(tile, replace(outcome, state="pending"))
        raise OutputError(
            reason or "cannot be written", remedy="with room there, run the same command again to go on"
        )
    if outcome.state == "failed":
        tries = ledger.attempts(tile)
        if outcome.again and tries < attempts:
            ledger.finish(tile, replace(outcome, state="pending"))
            log.info(f"tile {tile.id}: {reason}; another try ({tries + 1} of {attempts})")
            return "retried"
        if tries > 1:
            reason = f"{reason} (after {tries} tries)"
        log.warning(f"tile {tile.id} failed: {reason}")
    ledger.finish(tile, replace(outcome, reason=reason))
    return outcome.state
