"""A regional run from its start to its outputs: the folder, the ledger, shards, Ctrl-C; and its status."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import threading
import time
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import shapely

from canopy.errors import CanopyError, ConfigError, InputError
from canopy.files import check_output, told_as_output
from canopy.geo.style import ramp_style
from canopy.inference.layers import UNJUDGED, told, top_of_range
from canopy.region.ledger import (
    LEDGER,
    LOCK,
    RUN_FILE,
    SHARDS,
    Ledger,
    Outcome,
    Pins,
    held,
    is_held,
    ledger_path,
    lock_of,
    read_pins,
    refuse_changes,
    run_id,
    write_pins,
)
from canopy.region.options import MapOptions
from canopy.region.plan import Region, local_devices, local_threads, open_region, pinned_options
from canopy.region.tiles import TILES, Tile, tile_path
from canopy.region.workers import Run, local_cluster, make_tiles, remote_cluster
from canopy.runtime import NoProgress, Progress, log

_OUTPUTS = ("catalog.json", "collection.json", "mosaic", "mosaic.vrt", "mosaic.png", "mosaic.qml")
_MOST_FAILURES = 20


class Interrupted(CanopyError):  # noqa: N818  (a user may stop a run; nothing is wrong)
    """Stopped by the user or by the machine's scheduler; the run can go on."""

    exit_code = 130


@dataclass(frozen=True)
class RunResult:
    """How a run stands after a start of it that made the tiles `made`, in `seconds`."""

    folder: Path
    counts: dict[str, int]
    totals: dict[str, float]
    made: Counter[str] = field(default_factory=Counter)
    seconds: float = 0.0
    outputs: dict[str, str] = field(default_factory=dict)
    failures: list[tuple[str, str]] = field(default_factory=list)
    notes: Sequence[str] = ()

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
                **{state: self.made[state] for state in ("done", "empty", "failed", "retried")},
                "seconds": round(self.seconds, 3),
                "km2_per_hour": round(self.totals["km2_per_hour"], 3),
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
    # A start that died before it had pinned anything leaves these names.
    ours = (TILES, SHARDS, LOCK, f".{RUN_FILE}", LEDGER)
    if pins is None and folder.is_dir() and not all(p.name.startswith(ours) for p in folder.iterdir()):
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
    for name in (TILES, SHARDS):
        check_output(folder / name, read, overwrite=True, folder=True)
    if folder.is_dir():
        check_output([folder / name for name in (RUN_FILE, LEDGER, *_OUTPUTS)], read, overwrite=True)


# ---- the run ----------------------------------------------------------------------------------
def start(
    region: Region,
    *,
    overwrite: bool = False,
    retry_failed: bool = False,
    progress: Progress | None = None,
) -> RunResult:
    """Make all open tiles of a run, and then its catalog and mosaic; of a shard only its tiles.

    Args:
        region: of `prepare_run`.
        overwrite: begin anew.
        retry_failed: failed tiles get another chance.
        progress: is told of each tile; without one the log has a line a minute.

    Raises:
        HeldError: another process is at work there.
        Interrupted: stopped from outside; everything is ready to go on.
        CanopyError: the run cannot go on (full disk, workers unfit).
    """
    folder, shard = region.options.folder, region.options.parse_shard()
    began, made = time.monotonic(), Counter[str]()
    _make_folders(folder)
    with held(folder, shard):
        if overwrite:
            for name in (RUN_FILE, LEDGER, f"{LEDGER}-journal", *_OUTPUTS):
                (folder / name).unlink(missing_ok=True)
            for name in (TILES, SHARDS):
                shutil.rmtree(folder / name, ignore_errors=True)
            _make_folders(folder)
        pins = write_pins(folder, region.pins)
        refuse_changes(pins, region.pins, folder)
        with Ledger(ledger_path(folder, shard)) as ledger:
            who = {"host": socket.gethostname(), "pid": os.getpid(), "since": time.time()}
            ledger.set("driver", json.dumps(who))
            _enter_tiles(ledger, region, pins, shard)
            ledger.reopen(retry_failed)
            _check_files(ledger, folder)
            mine = {tile.id for tile, _ in ledger.rows("pending")} if shard else None
            remove_leftovers(folder, mine)  # also of workers that outlived a killed driver for a moment
            if ledger.counts()["pending"]:
                ledger.set("outputs", "behind")
                with _stopping() as stop:
                    made = _drive(ledger, region, run_id(pins), stop, progress or NoProgress())
                remove_leftovers(folder, mine)  # of workers that died on the way
            outputs = {} if shard else _finish(ledger, region)
            return RunResult(
                folder, ledger.counts(), ledger.totals(), made, time.monotonic() - began, outputs,
                ledger.failures(), region.inputs.notes,
            )  # fmt: skip


def _make_folders(folder: Path) -> None:
    with told_as_output(folder, "cannot be made"):
        for name in (TILES, SHARDS):
            (folder / name).mkdir(parents=True, exist_ok=True)


def _enter_tiles(ledger: Ledger, region: Region, pins: Pins, shard: tuple[int, int] | None) -> None:
    """Enter a run's tiles (or a shard's) into a new ledger, and what other ledgers of the run know of them.

    Tiles that no imagery reaches cost nothing: they are empty at once.
    """
    area, side = region.tiling.area, region.tiling.tile_px
    outline = None if region.by_tile else region.inputs.source.area()
    reach = None
    if outline is not None:
        # A quarter of a tile of slack: catalogs draw outlines with a broad pen.
        reach = outline.to_crs(area.crs).geometry.buffer(side * area.pixel[0] / 4)
        shapely.prepare(reach)

    def state(tile: Tile) -> str:
        bounds = region.tiling.window(tile.row, tile.col).bounds
        return "empty" if reach is not None and not reach.intersects(shapely.box(*bounds)) else "pending"

    tiles = region.tiling.tiles(region.inputs.aoi)
    mine = (tile for tile in tiles if shard is None or tile.ordinal % shard[1] == shard[0] - 1)
    ledger.add(run_id(pins), ((tile, state(tile)) for tile in mine))
    for other in _ledgers(region.options.folder):
        if other != ledger.path:
            ledger.gather(other)


def _ledgers(folder: Path) -> list[Path]:
    """The ledgers that there are: that of the whole run, and those of its shards."""
    return [*folder.glob(LEDGER), *sorted((folder / SHARDS).glob("*-of-*.sqlite"))]


def _check_files(ledger: Ledger, folder: Path) -> None:
    """Finished tiles whose file is gone or has another size are pending again."""
    lost = []
    for tile, outcome in ledger.rows("done"):
        path = tile_path(folder, tile.id)
        whole = path.is_file() and path.stat().st_size == outcome.bytes
        if not (whole and path.with_suffix(".json").is_file()):
            lost.append(tile)
    for tile in lost:
        ledger.finish(tile, Outcome("pending", reason="its file was missing or changed"))
    if lost:
        log.warning(f"{len(lost)} finished tiles have lost their file and are made again")


def remove_leftovers(folder: Path, ids: Collection[str] | None = None) -> None:
    """Drop what killed workers left under temporary names (`.ID.tif.*`), of the tiles `ids` or of all."""
    for path in (folder / TILES).glob(".*"):
        if ids is None or path.name.split(".")[1] in ids:
            shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)


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
    ledger: Ledger, region: Region, run: str, stop: threading.Event, progress: Progress
) -> Counter[str]:
    """Make every pending tile of the ledger.

    Raises:
        Interrupted: asked to stop before all were made. CanopyError: see `make_tiles`.
    """
    options = region.options
    local = options.scheduler == "local"
    devices = local_devices(options.device, options.workers) if local else [options.device]
    devices = devices[: ledger.counts()["pending"]]
    how = Run(
        str(options.folder.resolve()), run, tuple(devices),
        local_threads(len(devices)) if local and not options.threads else options.threads,
        options.batch_size, options.readers,
    )  # fmt: skip
    cluster = local_cluster(len(devices)) if local else remote_cluster(options.scheduler)
    with cluster as client:
        made = make_tiles(ledger, client, how, options.attempts, stop, progress)
    left = ledger.counts()["pending"]
    if left:
        raise Interrupted(
            f"stopped; {left} tile{'' if left == 1 else 's'} left",
            where=options.folder, remedy="run the same command again to go on",
        )  # fmt: skip
    return made


# ---- after it ---------------------------------------------------------------------------------
def _finish(ledger: Ledger, region: Region) -> dict[str, str]:
    """Catalog and mosaic of what is done, unless they are up to date."""
    from canopy.inference.output import Scenes
    from canopy.inference.picture import draw_map
    from canopy.region.publish import write_catalog, write_mosaic

    folder = region.options.folder
    names = {"catalog": "catalog.json", "mosaic": "mosaic", "picture": "mosaic.png"}
    outputs = {what: str(folder / name) for what, name in names.items()}
    if ledger.get("outputs") != "made" or not all(Path(path).exists() for path in outputs.values()):
        mosaic, made = write_mosaic(ledger, region), region.inputs
        found = write_catalog(ledger, region)
        draw_map(
            mosaic.with_suffix(".vrt"), Path(outputs["picture"]), made, Scenes.of(made.source), found,
            with_image=not region.by_tile,
        )  # fmt: skip
        (folder / "mosaic.qml").write_text(ramp_style(0.0, top_of_range(made.extras.tallest_m)), "utf-8")
        for line in told(found, made.extras):
            (log.info if line == UNJUDGED else log.warning)(f"note: {line}")
        ledger.set("outputs", "made")
    return outputs


# ---- how it stands ----------------------------------------------------------------------------
def status(folder: Path) -> dict[str, Any]:
    """Counts, area, failures and pace of a run, from all of its ledgers; changes nothing.

    Raises:
        InputError: no run there.
    """
    pins = read_pins(folder)
    if pins is None:
        raise InputError("no run there", where=folder, expected=f"a folder with {RUN_FILE}")
    holders = []
    with Ledger(None) as ledger:
        ledger.set("run", run_id(pins))
        for path in _ledgers(folder):
            ledger.gather(path, "all")
            if is_held(lock_of(folder, path)):
                with Ledger(path, read_only=True) as held_one:
                    holders.append(json.loads(held_one.get("driver") or "{}"))
        counts, totals, failures = ledger.counts(), ledger.totals(), ledger.failures()
    left_km2, pace = totals["km2"] - totals["km2_finished"], totals["km2_per_hour"]
    return {
        "folder": str(folder),
        "area": pins["area"]["text"],
        "model": pins["model"]["name"],
        "created": pins["canopy"]["created"],
        "tiles": counts,
        "finished_fraction": (counts["done"] + counts["empty"]) / max(1, sum(counts.values())),
        **{key: round(value, 6) for key, value in totals.items()},
        "seconds_per_tile": round(totals["worker_seconds"] / max(1, counts["done"]), 3),
        "at_work": [
            {"host": h["host"], "pid": h["pid"], "for_s": round(time.time() - h["since"])}
            for h in holders
            if h
        ],
        "left_s": round(left_km2 / pace * 3600) if holders and pace > 0 else None,
        "failures": [{"tile": tile, "reason": reason} for tile, reason in failures[:_MOST_FAILURES]],
    }
