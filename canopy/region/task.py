"""Making one tile: what a worker process holds, and what it answers.

A worker opens model and imagery once, from the pins in DIR/run.json, and refuses when they are not what the
run is pinned to. A tile is written under a temporary name, read back, hashed, and renamed: whoever makes a
tile a second time replaces it by the same bytes.
"""

from __future__ import annotations

import datetime
import errno
import os
import re
import socket
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from canopy.errors import AreaError, CanopyError, FetchError, InputError, OutputError
from canopy.geo.area import AOI
from canopy.geo.grid import Grid
from canopy.inference import output
from canopy.inference.layers import band_specs
from canopy.inference.predict import Prediction
from canopy.region.plan import (
    Prepared,
    RegionSettings,
    area_of,
    open_region,
    read_pins,
    refuse_changes,
    run_id,
    settings_from,
)
from canopy.region.tiles import TileTask

if TYPE_CHECKING:
    from canopy.imagery.base import ImagerySource


TILES = "tiles"
# Opened imagery that a worker keeps where it is opened part by part.
CELLS_KEPT = 2
_EPOCH = datetime.date(1970, 1, 1)
# More scenes than this in one tile's row only make the ledger large.
_MOST_SCENES = 50


@dataclass(frozen=True)
class How:
    """How a worker works; nothing of it changes a tile's pixels (but see --threads in the documentation).

    Attributes:
        folder: of the run.
        run: the run's id, as `pins.run_id` has it.
        device, batch_size, readers: of the engine.
    """

    folder: str
    run: str
    device: str = "auto"
    batch_size: int | str = "auto"
    readers: int = 2


@dataclass(frozen=True)
class Outcome:
    """What became of one tile.

    Attributes:
        state: `done`, `empty`, `failed`; or `died`: the worker was lost while it had the tile.
        reason: why it failed, in one line.
        again: whether another try can help.
        stop: whether the whole run has to stop (the disk is full, the model is another one).
    """

    task: TileTask
    state: str
    host: str = ""
    seconds: float = 0.0
    sha256: str | None = None
    size: int | None = None
    reason: str | None = None
    again: bool = False
    stop: bool = False
    facts: dict[str, Any] = field(default_factory=dict)


def tile_path(folder: Path, tile_id: str) -> Path:
    """Where a tile's map lies."""
    return folder / TILES / f"{tile_id}.tif"


class _Empty(Exception):  # noqa: N818  (a signal, not an error)
    """Nothing valid in a tile: its file is not kept."""


class TileWorker:
    """Model, imagery and grids of a run, ready to make tiles one at a time."""

    def __init__(self, how: How) -> None:
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
        torch.set_num_threads(pins["map"]["threads"])
        settings = settings_from(
            pins,
            RegionSettings(out=how.folder, device=how.device, batch_size=how.batch_size, readers=how.readers),
        )
        self.prepared: Prepared = open_region(settings, area_of(pins))
        refuse_changes(pins, self.prepared.pins, self.folder)
        self.runner = self.prepared.choice.open(self.prepared.model, self.prepared.extras.outputs)
        self._sources: dict[tuple[int, int], ImagerySource | None] = {}
        self._batch_size: int | str = settings.batch_size

    def source_of(self, task: TileTask) -> ImagerySource | None:
        """The imagery for a tile; None where its part of the area has none."""
        from canopy.inference.predict import open_source

        prepared = self.prepared
        if prepared.cells is None:
            return prepared.source
        key = (task.row // prepared.cells, task.col // prepared.cells)
        if key not in self._sources:
            while len(self._sources) >= CELLS_KEPT:
                self._sources.pop(next(iter(self._sources)))
            area = AOI.from_grid(prepared.tiling.cell(task.row, task.col, prepared.cells))
            try:
                self._sources[key] = open_source(prepared.request, prepared.lattices.gsd_m, area)
            except AreaError:
                self._sources[key] = None
        return self._sources[key]

    def make(self, task: TileTask) -> Outcome:
        """Predict and write one tile.

        Raises:
            CanopyError: nothing is left at the tile's place then but what was there before.
        """
        from canopy.geo.raster import CogWriter, raster_env

        started = time.perf_counter()
        prepared = self.prepared
        target = prepared.lattices.target(prepared.tiling.window(task.row, task.col))
        path = tile_path(self.folder, task.id)
        imagery = self.source_of(task)
        if imagery is None:
            return self._empty(task, started)
        source = SceneNames.of(imagery, target.output)
        request = prepared.request.model_copy(update={"batch_size": self._batch_size})
        work = Prediction(
            request, imagery, prepared.aoi, prepared.model, prepared.model_name, target,
            prepared.radiometry, prepared.extras, self.runner, prepared.settings.readers,
        )  # fmt: skip
        try:
            with raster_env():
                writer = CogWriter(
                    path, target.output, band_specs(work.bands),
                    encoding=request.encoding, tags=work.tags(source), overwrite=True,
                )  # fmt: skip
                with writer:
                    summary = work.predict_into(writer, None, path)
                    # What was too much for the device once is not tried again with every tile.
                    self._batch_size = summary.batch_size or self._batch_size
                    if not summary.valid_pixels:
                        raise _Empty
        except _Empty:
            path.unlink(missing_ok=True)
            return self._empty(task, started)
        facts: dict[str, Any] = {
            "pixels": summary.pixels,
            "valid": summary.valid_pixels,
            "mean_m": round(summary.mean_height_m, 4),
            "max_m": round(summary.max_height_m, 4),
            "cover_2m": round(summary.cover_2m, 6),
            "crops": summary.crops_predicted,
            "model_s": round(summary.model_seconds, 3),
            "dates": [_day(day) for day in (summary.first_day, summary.last_day) if day],
            "scenes": [output.bare_name(name) for name in source.scene_ids[:_MOST_SCENES]],
        }
        if summary.notes:
            facts["notes"] = summary.notes
        return Outcome(
            task, "done", socket.gethostname(), time.perf_counter() - started,
            sha256=writer.sha256, size=path.stat().st_size, facts=facts,
        )  # fmt: skip

    @staticmethod
    def _empty(task: TileTask, started: float) -> Outcome:
        seconds = time.perf_counter() - started
        return Outcome(task, "empty", socket.gethostname(), seconds, reason="no valid imagery in the area")

    def attempt(self, task: TileTask) -> Outcome:
        """`make`, with failures told as an outcome."""
        started = time.perf_counter()
        try:
            return self.make(task)
        except Exception as error:
            return failure(task, error, time.perf_counter() - started)


def failure(task: TileTask, error: BaseException, seconds: float) -> Outcome:
    """What an exception means for its tile and for the run."""
    reason = str(error) if isinstance(error, CanopyError) else f"{type(error).__name__}: {error}"
    reason = " ".join(reason.split())[:500]
    fetch = isinstance(error, FetchError)
    full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EROFS)
    # Bad input stays bad; a host, a device or a bug's bad luck may not.
    return Outcome(
        task, "failed", socket.gethostname(), seconds, reason=reason,
        again=fetch or not isinstance(error, InputError),
        stop=full or isinstance(error, OutputError),
    )  # fmt: skip


def _day(days: int) -> str:
    return (_EPOCH + datetime.timedelta(days=days)).isoformat()


@dataclass(frozen=True)
class SceneNames:
    """What tags say of imagery: of a mosaic, only the scenes that reach into a tile."""

    name: str
    scene_ids: Sequence[str]
    dates: Sequence[str]

    @classmethod
    def of(cls, source: Any, window: Grid) -> SceneNames:
        """The scenes of `source` that share ground with `window`."""
        whole = cls(source.name, tuple(source.scene_ids), tuple(source.dates))
        layers = [layer for layer in getattr(source, "layers", ()) if layer.scene_id in whole.scene_ids]
        if len(layers) < 2:
            return whole
        outline = window.outline("EPSG:4326")
        near = [layer for layer in layers if layer.outline().intersects(outline)]
        dates = sorted({layer.day.isoformat() for layer in near if layer.day})
        return replace(whole, scene_ids=tuple(layer.scene_id for layer in near), dates=tuple(dates))


def remove_leftovers(folder: Path, ids: set[str] | None = None) -> int:
    """Drop what killed workers left under temporary names; only of the tiles `ids`, if given."""
    import shutil

    count = 0
    with os.scandir(folder / TILES) as entries:
        for entry in entries:
            name = entry.name
            if not (name.startswith(".") and (name.endswith((".partial", ".part")) or ".canopy-" in name)):
                continue
            tile = re.split(r"\.(?:tif|json)\.", name[1:])[0]
            if ids is None or tile in ids:
                if entry.is_dir(follow_symlinks=False):
                    shutil.rmtree(entry.path, ignore_errors=True)
                else:
                    Path(entry.path).unlink(missing_ok=True)
                count += 1
    return count
