"""The two passes over the blocks of a point cloud, in this process or in several.

Pass one finds noise and ground, block by block; pass two lays the terrain and the canopy's surface. Blocks
are squares of a fixed global lattice, and each step reads as far beyond its block as it looks, so a pixel
does not depend on the area that was asked for, on the order of the work, or on who did it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from canopy.errors import CanopyError, OutputError
from canopy.runtime import Progress
from canopy.sources import lidar_ground, lidar_surface
from canopy.sources.lidar_points import Blocks, Spool
from canopy.sources.lidar_surface import Policy

Block = tuple[int, int]
Window = tuple[int, int, int, int]


@dataclass(frozen=True)
class Plan:
    """Everything a worker needs to know. `window` is the output grid in global pixels (row, col, h, w)."""

    folder: Path
    blocks: Blocks
    window: Window
    classified: bool
    policy: Policy
    pit_width_m: float
    fill_px: int

    @property
    def spool(self) -> Spool:
        """The points on disk."""
        return Spool(self.folder, self.blocks)

    @property
    def pad_px(self) -> int:
        """How far the canopy's surface looks beyond a window."""
        return self.pit_px + self.fill_px + 1

    @property
    def pit_px(self) -> int:
        """Width, in pixels, of the widest pit that is closed."""
        return lidar_surface.pit_px(self.pit_width_m, self.blocks.pixel)

    @property
    def terrain_px(self) -> int:
        """How far the terrain's raster reaches beyond the canopy's: bilinear, and growing at its edge."""
        return 1 + 2 * lidar_ground.EDGE_PX

    def surface_blocks(self) -> list[Block]:
        """Blocks that meet the output, from the north-west."""
        r0, c0, r1, c1 = self.blocks.over(*self.window)
        return [(i, j) for i in range(r0, r1 + 1) for j in range(c0, c1 + 1)]

    def ground_limits(self) -> tuple[int, int, int, int]:
        """(first row, first col, last row, last col) of the blocks whose ground the output needs."""
        far = math.ceil(lidar_ground.TERRAIN_REACH_M / self.blocks.pixel) + self.pad_px + self.terrain_px
        row, col, height, width = self.window
        return self.blocks.over(row - far, col - far, height + 2 * far, width + 2 * far)

    def point_limits(self) -> tuple[int, int, int, int]:
        """The same for blocks whose points it needs."""
        margin = lidar_ground.NOISE_REACH_M if self.classified else lidar_ground.CLOTH_MARGIN_M
        more = math.ceil(margin / self.blocks.side_m)
        r0, c0, r1, c1 = self.ground_limits()
        return r0 - more, c0 - more, r1 + more, c1 + more


@dataclass(frozen=True)
class Done:
    """What a block's pass reports: counts, or the error that stopped it."""

    points: int = 0
    noise: int = 0
    ground: int = 0
    error: CanopyError | None = None


# ---- pass one ---------------------------------------------------------------------------------
def find_ground(plan: Plan, block: Block) -> Done:
    """Judge a block's returns: writes which to keep (bits) and its ground points (n, 3)."""
    spool, pixel = plan.spool, plan.blocks.pixel
    if not spool.path(block).exists():
        return Done()
    margin = lidar_ground.NOISE_REACH_M if plan.classified else lidar_ground.CLOTH_MARGIN_M
    points, own = spool.load(block, margin)
    if plan.classified:
        noise = lidar_ground.lonely(points, own)
        ground = lidar_ground.classified_ground(points[own & ~noise], pixel)
    else:
        noise = lidar_ground.lonely(points, np.ones(len(points), bool))
        ground = lidar_ground.cloth_ground(points[~noise], own[~noise], pixel)
    np.packbits(~noise[own]).tofile(spool.path(block, "keep"))
    if len(ground):
        ground.tofile(spool.path(block, "ground"))
    return Done(int(own.sum()), int((noise & own).sum()), len(ground))


# ---- pass two ---------------------------------------------------------------------------------
def make_surface(plan: Plan, block: Block) -> Done:
    """Heights and return counts of a block's part of the output: writes float32 (2, h, w), NaN = nodata."""
    row, col, height, width = core_of(plan, block)
    pad, more = plan.pad_px, plan.terrain_px
    window = row - pad, col - pad, height + 2 * pad, width + 2 * pad
    points = _kept(plan, block, pad)
    if not len(points):
        return Done()
    wide = window[0] - more, window[1] - more, window[2] + 2 * more, window[3] + 2 * more
    pixel = plan.blocks.pixel
    plane = lidar_ground.terrain(_ground_around(plan, wide), pixel, wide)
    rows, cols = plan.blocks.cells(points["x"], points["y"])
    rows, cols = rows - window[0], cols - window[1]
    inside = (rows >= 0) & (cols >= 0) & (rows < window[2]) & (cols < window[3])
    points, cell = points[inside], (rows * window[3] + cols)[inside]
    above = points["z"] - lidar_ground.elevation_at(plane, pixel, wide, points["x"], points["y"])
    made = lidar_surface.highest(
        points["kind"], above, cell, (window[2], window[3]), plan.policy, plan.classified
    )
    heights = lidar_surface.close_pits(made.height, made.fixed, plan.pit_px)
    heights = lidar_surface.fill_gaps(heights, made.count == 0, plan.fill_px)
    inner = np.s_[pad : pad + height, pad : pad + width]
    # Whole millimetres: finer than any lidar, and files compress.
    bands = np.stack([np.round(heights[inner], 3), made.count[inner]]).astype(np.float32)
    _save(plan.spool.path(block, "chm"), bands)
    return Done(int(made.count[inner].sum()), made.dropped, 0)


def core_of(plan: Plan, block: Block) -> Window:
    """A block's part of the output: global (row, col, height, width)."""
    row, col, side, _ = plan.blocks.window(block)
    r0, c0, h, w = plan.window
    top, left = max(row, r0), max(col, c0)
    return top, left, min(row + side, r0 + h) - top, min(col + side, c0 + w) - left


def surface_of(plan: Plan, block: Block) -> np.ndarray:
    """What `make_surface` wrote, float32 (2, h, w) height and count; NaN and 0 where no return was."""
    _, _, height, width = core_of(plan, block)
    path = plan.spool.path(block, "chm")
    if not path.exists():
        return np.stack([np.full((height, width), np.nan), np.zeros((height, width))]).astype(np.float32)
    return np.fromfile(path, np.float32).reshape(2, height, width)


def _kept(plan: Plan, block: Block, pad_px: int) -> np.ndarray:
    """RECORDs of a block and `pad_px` around it that pass one kept, in a fixed order."""
    spool = plan.spool
    row, col, side, _ = plan.blocks.window(block)
    r0, c0, r1, c1 = plan.blocks.over(row - pad_px, col - pad_px, side + 2 * pad_px, side + 2 * pad_px)
    parts = []
    for i in range(r0, r1 + 1):
        for j in range(c0, c1 + 1):
            points, _ = spool.load((i, j))
            if not len(points):
                continue
            bits = np.fromfile(spool.path((i, j), "keep"), np.uint8)
            points = points[np.unpackbits(bits, count=len(points)).astype(bool)]
            if (i, j) != block:
                rows, cols = plan.blocks.cells(points["x"], points["y"])
                near = (rows >= row - pad_px) & (rows < row + side + pad_px)
                near &= (cols >= col - pad_px) & (cols < col + side + pad_px)
                points = points[near]
            parts.append(points)
    return np.concatenate(parts) if parts else spool.load(block)[0]


def _ground_around(plan: Plan, window: Window) -> np.ndarray:
    """Ground points (n, 3) within reach of a window's pixels."""
    far = math.ceil(lidar_ground.TERRAIN_REACH_M / plan.blocks.pixel) + 1
    row, col, height, width = window
    r0, c0, r1, c1 = plan.blocks.over(row - far, col - far, height + 2 * far, width + 2 * far)
    parts = [np.zeros((0, 3))]
    for i in range(r0, r1 + 1):
        for j in range(c0, c1 + 1):
            path = plan.spool.path((i, j), "ground")
            if path.exists():
                parts.append(np.fromfile(path, np.float64).reshape(-1, 3))
    ground = np.concatenate(parts)
    rows, cols = plan.blocks.cells(ground[:, 0], ground[:, 1])
    near = (
        (rows >= row - far) & (rows < row + height + far) & (cols >= col - far) & (cols < col + width + far)
    )
    return ground[near]


def _save(path: Path, bands: np.ndarray) -> None:
    with path.open("wb") as file:
        bands.tofile(file)


# ---- who does it ------------------------------------------------------------------------------
def _guarded(work: Callable[[Plan, Block], Done], plan: Plan, block: Block) -> Done:
    """A block's pass whose foreseeable troubles come back as values: they must survive the way home."""
    try:
        return work(plan, block)
    except CanopyError as error:
        return Done(error=error)
    except OSError as error:
        reason = error.strerror or str(error)
        return Done(error=OutputError(f"the scratch folder failed ({reason})", where=plan.folder.parent))
    except MemoryError:
        return Done(error=CanopyError("out of memory", remedy="use fewer --workers"))


def run_blocks(
    work: Callable[[Plan, Block], Done],
    plan: Plan,
    blocks: Iterable[Block],
    workers: int,
    progress: Progress,
) -> Done:
    """Do a pass over blocks with dask, in `workers` spawned processes or, for one, in this process.

    Results travel through files; what comes back are counts, summed. Raises the first error.
    """
    blocks = list(blocks)
    job = partial(_guarded, work, plan)
    results: list[Done]
    if workers == 1 or len(blocks) == 1:
        results = []
        for block in blocks:
            results.append(job(block))
            progress.advance()
            if results[-1].error:
                break
    else:
        results = _with_dask(job, blocks, workers, progress)
    for done in results:
        if done.error:
            raise done.error
    totals = (sum(getattr(d, name) for d in results) for name in ("points", "noise", "ground"))
    return Done(*totals)


def _with_dask(job: Callable[[Block], Done], blocks: list[Block], workers: int, progress: Progress) -> Any:
    from concurrent.futures import ProcessPoolExecutor
    from concurrent.futures.process import BrokenProcessPool
    from multiprocessing import get_context

    import dask
    from dask.callbacks import Callback

    def step(*_: object) -> None:
        progress.advance()

    tasks = [dask.delayed(job, pure=False)(block) for block in blocks]
    # Spawned, never forked: GDAL and thread pools do not survive a fork.
    try:
        with (
            ProcessPoolExecutor(min(workers, len(blocks)), mp_context=get_context("spawn")) as pool,
            Callback(posttask=step),
        ):
            return list(dask.compute(*tasks, scheduler="processes", pool=pool, chunksize=1))
    except BrokenProcessPool as error:
        raise CanopyError(
            "a worker process died, probably for want of memory", remedy="use fewer --workers"
        ) from error
