"""A regional run from its start to its outputs: `start`, and `status` for those who look on."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from canopy.errors import ConfigError, InputError
from canopy.inference.region import shards
from canopy.inference.region.drive import Interrupted, Stop, Tally, Watcher, drive, in_main_thread
from canopy.inference.region.engines import Engine, LocalEngine, local_devices
from canopy.inference.region.folder import LEDGER, check_files, clear, make_folder
from canopy.inference.region.ledger import Ledger
from canopy.inference.region.lock import HeldError, RunLock
from canopy.inference.region.pins import RUN_FILE, area_of, read_pins, refuse_changes, run_id, write_pins
from canopy.inference.region.plan import Prepared, open_region
from canopy.inference.region.settings import RegionSettings, settings_from
from canopy.inference.region.task import TILES, How, remove_leftovers
from canopy.runtime import log

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
        from canopy.inference.region.published import published_ratio

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
            from canopy.inference.region.cluster import ClusterEngine

            return ClusterEngine(how, settings.scheduler)
        devices = local_devices(settings.device, settings.workers)[:pending]
        return LocalEngine(how, devices)

    return make


def finish(ledger: Ledger, prepared: Prepared, pins: dict[str, Any]) -> dict[str, str]:
    """Catalog and mosaic of what is done, unless they are up to date, and the published layout if asked."""
    from canopy.inference.region.catalog import write_catalog
    from canopy.inference.region.mosaic import write_mosaic
    from canopy.inference.region.state import outputs_digest

    folder = prepared.settings.folder
    digest = outputs_digest(ledger)
    outputs = {"catalog": str(folder / "catalog.json"), "mosaic": str(folder / "mosaic")}
    if ledger.get("outputs") != digest or not all(Path(path).exists() for path in outputs.values()):
        write_mosaic(ledger, prepared, folder)
        write_catalog(ledger, prepared, pins)
        ledger.set("outputs", digest)
    if prepared.settings.layout != "tiles":
        from canopy.inference.region.published import write_published

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
