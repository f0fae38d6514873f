"""A regional run from its start to its outputs: the folder, the ledger, the shards, Ctrl-C."""

from __future__ import annotations

import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import shapely

from canopy.errors import CanopyError, ConfigError, InputError, OutputError
from canopy.files import check_output, file_sha256
from canopy.region.ledger import (
    LEDGER,
    LOCK,
    SHARDS,
    HeldError,
    Ledger,
    Outcome,
    held,
    ledger_path,
    shard_ledgers,
)
from canopy.region.options import MapOptions
from canopy.region.plan import (
    RUN_FILE,
    Pins,
    Region,
    open_region,
    pinned_options,
    read_pins,
    refuse_changes,
    run_id,
    write_pins,
)
from canopy.region.task import TILES, How, remove_leftovers, tile_path
from canopy.region.tiles import Tile
from canopy.region.workers import Driver, Tally, local_cluster, local_devices, local_threads, remote_cluster
from canopy.runtime import log

_STAC = "stac"
_OUTPUTS = ("catalog.json", "collection.json", "model.json", "mosaic", "mosaic.vrt", "index.gti.gpkg")


class Interrupted(CanopyError):  # noqa: N818  (a user may stop a run; nothing is wrong)
    """Stopped by the user or by the machine's scheduler; the run can go on."""

    exit_code = 130


@dataclass(frozen=True)
class RunResult:
    """What a start of a run did, and how the run stands. `outputs` is empty where none were made."""

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
                **{state: self.tally.counts[state] for state in ("done", "empty", "failed")},
                "retried": self.tally.retried,
                "seconds": round(time.monotonic() - self.tally.started, 3),
                "km2_per_hour": round(self.tally.km2_per_hour, 3),
            },
            "failures": [{"tile": tile, "reason": reason} for tile, reason in self.failures],
            "outputs": self.outputs,
            "notes": self.notes,
        }


# ---- before it starts -------------------------------------------------------------------------
def prepare_run(options: MapOptions, *, resume: bool = False, overwrite: bool = False) -> Region:
    """Open what the options ask for, or what the run in their folder is pinned to.

    Args:
        resume: take area, imagery, model and map from the run, which has to exist, where they are not given.
        overwrite: what is there will be replaced, and may differ.

    Raises:
        InputError: bad input; a folder that is no run's; a run with other settings (says which).
    """
    folder = options.folder
    if overwrite and options.shard is not None:
        raise ConfigError(
            "--overwrite with --shard", where=folder, expected="one of them",
            remedy="remove the folder or choose another -o before the shards start",
        )  # fmt: skip
    if folder.exists() and not folder.is_dir():
        raise InputError("is a file", where=folder, expected="the folder of a run")
    pins = read_pins(folder)
    if pins is None and folder.is_dir() and not all(_is_ours(path.name) for path in folder.iterdir()):
        raise InputError(
            "the folder holds something that is no run", where=folder, remedy="choose another -o"
        )
    if resume and pins is None:
        raise InputError("no run to go on with", where=folder, expected=f"a folder with {RUN_FILE}")
    going_on = pins if not overwrite else None
    if resume and pins is not None:
        options = pinned_options(pins, options)
    elif going_on is not None:  # runtime and precision are a matter of the machine that began
        unsaid = {name for name in ("backend", "precision") if getattr(options, name) == "auto"}
        options = options.model_copy(update={name: going_on["map"][name] for name in unsaid})
    _check_inputs(options)
    region = open_region(options, going_on)
    if going_on is not None:
        refuse_changes(going_on, region.pins, folder)
    return region


def _check_inputs(options: MapOptions) -> None:
    """Refuse a folder where a run would write over what it reads."""
    read: list[object] = [options.aoi, options.model]
    for name in [*options.images, options.imagery]:
        inside = Path(name) if name else None
        # Of a folder only the images in it are read, not what lies below: that may be this very run.
        read += [*inside.glob("*.*")] if inside is not None and inside.is_dir() else [name]
    folder = options.folder
    for name in (TILES, SHARDS, _STAC):
        check_output(folder / name, read, overwrite=True, folder=True)
    if folder.is_dir():
        check_output([folder / name for name in (RUN_FILE, LEDGER, *_OUTPUTS)], read, overwrite=True)


def _is_ours(name: str) -> bool:
    """Names that a start leaves which died before it had pinned anything."""
    return name in (TILES, SHARDS) or name.startswith((LOCK, f".{RUN_FILE}", LEDGER))


# ---- the run ----------------------------------------------------------------------------------
Watch = Callable[[Ledger], Callable[[Tally, int], None]]


def start(
    region: Region,
    *,
    overwrite: bool = False,
    retry_failed: bool = False,
    verify: bool = False,
    watch: Watch | None = None,
) -> RunResult:
    """Make all open tiles of a run, and its catalog and mosaic when none is left.

    Args:
        region: of `prepare_run`.
        overwrite: begin anew.
        retry_failed: failed tiles get another chance.
        verify: hash every finished tile again first, instead of trusting names and sizes.
        watch: makes, of the open ledger, what is told the tally and the number of tiles in work.

    Raises:
        HeldError: another process is at work there.
        Interrupted: stopped from outside; everything is ready to go on.
        CanopyError: the run cannot go on (full disk, workers unfit).
    """
    options, folder, tally = region.options, region.options.folder, Tally()
    shard = options.parse_shard()
    _make_folder(folder, bool(shard))
    with held(folder, shard):
        if overwrite:
            _clear(folder)
        pins = write_pins(folder, region.pins)
        refuse_changes(pins, region.pins, folder)
        with Ledger(ledger_path(folder, shard)) as ledger:
            _enter_tiles(ledger, region, pins, shard)
            ledger.reopen(retry_failed)
            _check_files(ledger, folder, verify)
            mine = {tile.id for tile, _ in ledger.rows("pending")} if shard else None
            if ledger.counts()["pending"]:
                ledger.set("outputs", "behind")
                remove_leftovers(folder, mine)
                with _stopping() as stop:
                    _drive(ledger, region, run_id(pins), tally, stop, watch)
                remove_leftovers(folder, mine)  # of workers that died on the way
            outputs = {} if shard else _finish(ledger, region)
            counts, totals = ledger.counts(), ledger.totals()
            failures = [(tile.id, outcome.reason or "") for tile, outcome in ledger.rows("failed")]
    if shard and all(_is_through(ledger_path(folder, (i, shard[1]))) for i in range(1, shard[1] + 1)):
        outputs = _finish_shards(region)
    return RunResult(folder, counts, totals, tally, outputs, failures, region.notes)


def _make_folder(folder: Path, shards: bool = False) -> None:
    try:
        (folder / TILES).mkdir(parents=True, exist_ok=True)
        if shards:
            (folder / SHARDS).mkdir(exist_ok=True)
    except OSError as error:
        raise OutputError(f"cannot be made ({error.strerror})", where=folder) from error


def _clear(folder: Path) -> None:
    """Remove what a run made, and nothing else."""
    for name in (RUN_FILE, LEDGER, f"{LEDGER}-journal", *_OUTPUTS):
        (folder / name).unlink(missing_ok=True)
    for name in (TILES, SHARDS, _STAC):
        shutil.rmtree(folder / name, ignore_errors=True)
    _make_folder(folder)


def _enter_tiles(ledger: Ledger, region: Region, pins: Pins, shard: tuple[int, int] | None) -> None:
    """Enter a run's tiles (or a shard's) into a new ledger, and what other ledgers of the run know of them.

    Tiles that no imagery reaches cost nothing: they are empty at once.
    """
    area, side = region.tiling.area, region.tiling.tile_px
    outline = None if region.by_tile else region.source.area()
    reach = None
    if outline is not None:
        # A quarter of a tile of slack: catalogs draw outlines with a broad pen.
        reach = outline.to_crs(area.crs).geometry.buffer(side * area.pixel[0] / 4)
        shapely.prepare(reach)

    def state(tile: Tile) -> str:
        bounds = region.tiling.window(tile.row, tile.col).bounds
        return "empty" if reach is not None and not reach.intersects(shapely.box(*bounds)) else "pending"

    tiles = region.tiling.tiles(region.aoi)
    mine = (tile for tile in tiles if shard is None or tile.ordinal % shard[1] == shard[0] - 1)
    ledger.add(run_id(pins), ((tile, state(tile)) for tile in mine))
    folder = region.options.folder
    for other in [folder / LEDGER, *shard_ledgers(folder)]:
        if other != ledger.path and other.is_file():
            ledger.gather(other)


def _check_files(ledger: Ledger, folder: Path, verify: bool) -> None:
    """Finished tiles whose file is gone or changed are pending again."""
    lost = []
    for tile, outcome in ledger.rows("done"):
        path = tile_path(folder, tile.id)
        try:
            same = path.stat().st_size == outcome.bytes
            same = same and (not verify or file_sha256(path) == outcome.sha256)
        except OSError:
            same = False
        if not same:
            lost.append(tile)
    for tile in lost:
        ledger.finish(tile, Outcome("pending", reason="its file was missing or changed"))
    if lost:
        log.warning(f"{len(lost)} finished tiles have lost their file and are made again")


@contextmanager
def _stopping() -> Iterator[threading.Event]:
    """Ctrl-C and the scheduler's SIGTERM: the first lets the tiles in work end, the second does not."""
    stop = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return

    def ask(number: int, frame: object) -> None:
        if stop.is_set():
            raise KeyboardInterrupt
        stop.set()
        log.warning("stopping after the tiles in work; once more stops at once")

    before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    except KeyboardInterrupt:
        raise Interrupted("stopped at once", remedy="run the same command again to go on") from None
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _drive(
    ledger: Ledger, region: Region, run: str, tally: Tally, stop: threading.Event, watch: Watch | None
) -> None:
    """Make every pending tile of the ledger.

    Raises:
        Interrupted: asked to stop before all were made. CanopyError: see `workers.Driver.run`.
    """
    options = region.options
    local = options.scheduler == "local"
    devices = local_devices(options.device, options.workers) if local else [options.device]
    devices = devices[: ledger.counts()["pending"]]
    how = How(
        str(options.folder.resolve()), run, tuple(devices),
        local_threads(len(devices)) if local and not options.threads else options.threads,
        options.batch_size, options.readers,
    )  # fmt: skip
    cluster = local_cluster(len(devices)) if local else remote_cluster(options.scheduler)
    with cluster as client:
        Driver(ledger, client, how, options.attempts, tally, stop, watch and watch(ledger)).run()
    left = ledger.counts()["pending"]
    if left:
        raise Interrupted(
            f"stopped; {left} tile{'' if left == 1 else 's'} left",
            where=options.folder, remedy="run the same command again to go on",
        )  # fmt: skip


# ---- after it ---------------------------------------------------------------------------------
def _finish(ledger: Ledger, region: Region) -> dict[str, str]:
    """Catalog and mosaic of what is done, unless they are up to date."""
    from canopy.region.publish import write_catalog, write_mosaic

    folder = region.options.folder
    outputs = {"catalog": str(folder / "catalog.json"), "mosaic": str(folder / "mosaic")}
    if ledger.get("outputs") != "made" or not all(Path(path).exists() for path in outputs.values()):
        write_mosaic(ledger, region)
        write_catalog(ledger, region)
        ledger.set("outputs", "made")
    return outputs


def _is_through(path: Path) -> bool:
    """Whether a shard has no open tile left."""
    if not path.is_file():
        return False
    with Ledger(path, read_only=True) as ledger:
        counts = ledger.counts()
    return not counts["pending"] and not counts["running"]


def _finish_shards(region: Region) -> dict[str, str]:
    """One ledger of all shards, and the outputs."""
    folder = region.options.folder
    try:
        with held(folder), Ledger(folder / LEDGER) as ledger:
            _enter_tiles(ledger, region, read_pins(folder) or region.pins, None)
            ledger.set("outputs", "behind")
            return _finish(ledger, region)
    except HeldError:  # another shard ended in the same moment, and does it
        return {}
