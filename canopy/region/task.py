"""What a worker does: open the run once, then make one tile at a time.

Every worker opens the run for itself, from the run file in the folder, and refuses if model, imagery or
settings are not those that the run is pinned to. A tile is written under a temporary name, read back, and
renamed: whoever makes a tile a second time replaces it by the same heights.
"""

from __future__ import annotations

import datetime
import errno
import functools
import os
import shutil
import signal
import socket
import threading
import time
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from canopy.errors import CanopyError, FetchError, InputError, OutputError
from canopy.geo.grid import Grid
from canopy.region.ledger import Outcome
from canopy.region.options import MapOptions
from canopy.region.plan import open_region, pinned_options, read_pins, refuse_changes, run_id
from canopy.region.tiles import Tile

if TYPE_CHECKING:
    from canopy.imagery.base import ImagerySource

TILES = "tiles"
_EPOCH = datetime.date(1970, 1, 1)
# More scenes than this in one tile's row only make the ledger large.
_MOST_SCENES = 50
_one_at_a_time = threading.Lock()


@dataclass(frozen=True)
class How:
    """How workers work; nothing of it changes a tile's heights.

    Attributes:
        folder: of the run.
        run: the run's id, as `plan.run_id` has it.
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


def tile_path(folder: Path, tile_id: str) -> Path:
    """Where a tile's map lies."""
    return folder / TILES / f"{tile_id}.tif"


def dask_setup(worker: object) -> None:
    """Of a local worker, called by dask as it starts: Ctrl-C is the driver's to handle."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


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
        return _maker(how, device, how.threads or worker.state.nthreads).attempt(tile)


@functools.cache
def _maker(how: How, device: str, threads: int) -> TileMaker:
    return TileMaker(how, device, threads)


class _Empty(Exception):  # noqa: N818  (a signal, not an error)
    """Nothing valid in a tile: its file is not kept."""


class TileMaker:
    """Model, imagery and grids of a run, ready to make tiles one at a time."""

    def __init__(self, how: How, device: str = "cpu", threads: int | None = None) -> None:
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
        if threads:
            torch.set_num_threads(threads)
        options = pinned_options(
            pins, MapOptions(out=how.folder, device=device, batch_size=how.batch_size, readers=how.readers)
        )
        self.region = open_region(options, pins)
        refuse_changes(pins, self.region.pins, self.folder)
        self.runner = self.region.choice.open(self.region.model, self.region.extras.outputs)
        self._batch_size = self.region.options.batch_size

    def attempt(self, tile: Tile) -> tuple[Outcome, bool]:
        """`make`, with failures told; and whether another try may help."""
        started = time.perf_counter()
        try:
            return self.make(tile), False
        except Exception as error:
            reason = str(error) if isinstance(error, CanopyError) else f"{type(error).__name__}: {error}"
            full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EROFS)
            outcome = Outcome(
                "failed", time.perf_counter() - started, reason=" ".join(reason.split())[:500],
                stop=full or isinstance(error, OutputError),
            )  # fmt: skip
            # Bad input stays bad; a host, a device or a bug's bad luck may not.
            return outcome, isinstance(error, FetchError) or not isinstance(error, InputError)

    def make(self, tile: Tile) -> Outcome:
        """Predict and write one tile.

        Raises:
            CanopyError: nothing is left at the tile's place then but what was there before.
        """
        from canopy.geo.cog import CogWriter
        from canopy.geo.reading import raster_env
        from canopy.inference.layers import band_specs
        from canopy.inference.output import bare_name
        from canopy.inference.predict import Prediction

        started = time.perf_counter()
        region, path = self.region, tile_path(self.folder, tile.id)
        imagery = region.source_of(tile)
        if imagery is None:
            return Outcome("empty", time.perf_counter() - started, reason="no valid imagery in the area")
        target = region.lattices.target(region.tiling.window(tile.row, tile.col))
        scenes = SceneNames.of(imagery, target.output)
        options = region.options.model_copy(update={"batch_size": self._batch_size})
        prediction = Prediction(
            options, imagery, region.aoi, region.model, region.model_name, target, region.radiometry,
            region.extras, self.runner, options.readers,
        )  # fmt: skip
        try:
            with raster_env():
                writer = CogWriter(
                    path, target.output, band_specs(region.bands),
                    encoding=options.encoding, tags=prediction.tags(scenes), overwrite=True,
                )  # fmt: skip
                with writer:
                    summary = prediction.predict_into(writer, None, path)
                    # What was too much for the device once is not tried again with every tile.
                    self._batch_size = summary.batch_size or self._batch_size
                    if not summary.valid_pixels:
                        raise _Empty
        except _Empty:
            path.unlink(missing_ok=True)
            return Outcome("empty", time.perf_counter() - started, reason="no valid imagery in the area")
        facts: dict[str, Any] = {
            "pixels": summary.pixels,
            "valid": summary.valid_pixels,
            "mean_m": round(summary.mean_height_m, 4),
            "max_m": round(summary.max_height_m, 4),
            "cover_2m": round(summary.cover_2m, 6),
            "crops": summary.crops_predicted,
            "model_s": round(summary.model_seconds, 3),
            "dates": [
                (_EPOCH + datetime.timedelta(days=day)).isoformat()
                for day in (summary.first_day, summary.last_day) if day
            ],
            "scenes": [bare_name(name) for name in scenes.scene_ids[:_MOST_SCENES]],
        }  # fmt: skip
        if summary.notes:
            facts["notes"] = summary.notes
        return Outcome(
            "done", time.perf_counter() - started, sha256=writer.sha256, bytes=path.stat().st_size,
            facts=facts,
        )  # fmt: skip


@dataclass(frozen=True)
class SceneNames:
    """What tags say of imagery: of a mosaic, only the scenes that reach into a tile."""

    name: str
    scene_ids: Sequence[str]
    dates: Sequence[str]

    @classmethod
    def of(cls, source: ImagerySource, window: Grid) -> SceneNames:
        """The scenes of `source` that share ground with `window`."""
        whole = cls(source.name, tuple(source.scene_ids), tuple(source.dates))
        layers = [layer for layer in getattr(source, "layers", ()) if layer.scene_id in whole.scene_ids]
        if len(layers) < 2:
            return whole
        outline = window.outline("EPSG:4326")
        near = [layer for layer in layers if layer.outline().intersects(outline)]
        dates = sorted({layer.day.isoformat() for layer in near if layer.day})
        return replace(whole, scene_ids=tuple(layer.scene_id for layer in near), dates=tuple(dates))


def remove_leftovers(folder: Path, ids: Collection[str] | None = None) -> int:
    """Drop what killed workers left under temporary names (`.ID.tif.*`), of the tiles `ids` or of all."""
    count = 0
    with os.scandir(folder / TILES) as entries:
        for entry in entries:
            if not entry.name.startswith(".") or (ids is not None and entry.name.split(".")[1] not in ids):
                continue
            if entry.is_dir(follow_symlinks=False):
                shutil.rmtree(entry.path, ignore_errors=True)
            else:
                Path(entry.path).unlink(missing_ok=True)
            count += 1
    return count
