"""Point clouds to canopy height in metres.

Points are streamed once to squares on disk (`labels.points`). Tile by tile they are read again, with the
margin that the steps look beyond it; noise and ground are found and the surface is made (`labels.surface`),
by dask in as many processes as asked. Memory holds one chunk of input and, per worker, one tile's points.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping, Sequence
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import shapely

from canopy import __version__
from canopy.errors import CanopyError, DataError, InputError, require
from canopy.files import check_output, told_as_output
from canopy.geo.area import AOI
from canopy.geo.cog import CogWriter
from canopy.geo.crs import project
from canopy.geo.grid import Grid, tiles_over
from canopy.labels import surface
from canopy.labels.chm import BANDS, ChmOptions, choose_crs, choose_grid, grid_facts, map_facts
from canopy.labels.points import Bounds, LidarFile, Spool, Tally, fill, open_lidar
from canopy.labels.surface import BRIDGE, BUILDING, EDGE_PX, WATER, WIRE
from canopy.runtime import NoProgress, Progress, log

# Side of a tile of work; results depend on it by millimetres.
BLOCK_M = 512.0
# Heights beyond any tree in a file said to be in metres are most often feet.
_SUSPECT_M = 100.0
_GPS_EPOCH = datetime(1980, 1, 6, tzinfo=UTC) + timedelta(seconds=1e9)


def chm_from_points(
    files: Sequence[str | Path],
    out: str | Path,
    options: ChmOptions | None = None,
    *,
    area: AOI | None = None,
    progress: Progress | None = None,
    dry_run: bool = False,
) -> dict[str, Any]:
    """Write the CHM of point clouds as a COG of float32; returns what was done.

    Bands: `canopy_height` (metres above the terrain; NaN where there was no return, no terrain within reach,
    or a masked structure), `point_density` (returns kept per square metre; 0 where none), `valid` (1 or 0).

    Args:
        files: LAS, LAZ or COPC files; neighbours are processed as one cloud.
        out: the .tif to make.
        area: what to map; by default all the points. Outside polygons is nodata.
        dry_run: only say what would be made, by the headers.

    Raises:
        InputError: bad files; nothing was written.
        OutputError: the folder or disk does not take the result.
    """
    options, progress = options or ChmOptions(), progress or NoProgress()
    out = check_output(out, files, overwrite=options.overwrite)[0]
    if not files:
        raise InputError("no point cloud named", expected="LAS, LAZ or COPC files, or --dsm and --dtm")
    if len({Path(f).resolve() for f in files}) < len(files):
        raise InputError("a file is named twice", where=files[0])
    given = options.input_crs if options.input_crs is not None else options.crs
    clouds = [open_lidar(f, crs=given, units=options.units) for f in files]
    crs = choose_crs([(c.crs, c.bounds) for c in clouds], options)
    grid = choose_grid(
        [project(shapely.box(*c.bounds), c.crs, crs).bounds for c in clouds], crs, options.gsd, area
    )
    if dry_run:
        return grid_facts(out, grid) | {"points": sum(c.points for c in clouds)}
    with (
        told_as_output(out, "cannot be made"),
        tempfile.TemporaryDirectory(".partial", f".{out.name}.", out.absolute().parent) as name,
    ):
        plan, tally = _read(Path(name), clouds, grid, options, progress)
        tiles = tiles_over(grid, max(8, round(BLOCK_M / grid.pixel[0])))
        progress.start(len(tiles), "canopy surface")
        noise, ground = _run(plan, tiles, options.workers, progress)
        if ground < 3:
            raise DataError(
                f"no ground found among {tally.points} points of {_names(clouds)}",
                remedy="the area may be too small, or all water"
                + ("; try --ground csf" if plan.classified else ""),
            )
        dates = _dates(tally)
        tags = {
            "CANOPY_VERSION": __version__,
            "CANOPY_SOURCE": f"lidar: {_names(clouds)}",
            "CANOPY_GROUND": "class 2" if plan.classified else "cloth simulation",
            "CANOPY_CHM": options.model_dump_json(exclude={"workers", "overwrite"}),
        }
        tags |= {"ACQUISITION_DATE": dates} if dates else {}
        with CogWriter(out, grid, BANDS, tags=tags, overwrite=options.overwrite) as writer:
            returns = _write(writer, plan, tiles, area, _names(clouds))
    facts = map_facts(out, grid)
    if facts["highest_m"] > _SUSPECT_M and options.units == "auto":
        log.warning(
            f"note: heights up to {facts['highest_m']:.0f} m; if elevations are in feet say --units ft"
        )
    return {
        **facts, "sha256": writer.sha256, "ground": "class" if plan.classified else "csf", "dates": dates,
        "points_read": tally.points, "points_noise": tally.dropped + noise,
        "points_per_m2": round(returns / (grid.height * grid.width * float(np.prod(grid.pixel))), 2),
    }  # fmt: skip


@dataclass(frozen=True)
class SurfacePlan:
    """How the surface of a tile is made, of which points; all that a worker needs to know."""

    spool: Spool
    classified: bool
    policies: Mapping[int, str]
    pit_px: int
    fill_px: int

    @property
    def pad_px(self) -> int:
        """How far the canopy's surface looks beyond a tile."""
        return self.pit_px + self.fill_px + 1

    def reach(self, tile: Grid) -> Bounds:
        """The bounds of the points that matter to a tile: for its noise, its ground and the terrain there."""
        found = surface.NOISE_REACH_M if self.classified else surface.CLOTH_MARGIN_M
        margin = surface.TERRAIN_REACH_M + found
        west, south, east, north = tile.pad(self.pad_px + 1 + 2 * EDGE_PX).bounds
        return west - margin, south - margin, east + margin, north + margin


def _read(
    folder: Path, clouds: Sequence[LidarFile], grid: Grid, options: ChmOptions, progress: Progress
) -> tuple[SurfacePlan, Tally]:
    """Spool the points and decide where ground comes from."""
    policies = {
        BUILDING: options.buildings, WATER: options.water, BRIDGE: options.bridges, WIRE: options.wires
    }  # fmt: skip
    pit_px = int(options.pit_width_m / grid.pixel[0] + 1e-9)
    # Points for the cloth are spooled too: whether it is needed is known only when they are read.
    plan = SurfacePlan(Spool(folder, BLOCK_M), False, policies, pit_px, options.fill_px)
    progress.start(sum(c.points for c in clouds), "reading points")
    tally = fill(plan.spool, clouds, grid.crs, plan.reach(grid), progress)
    if options.ground == "class" and not tally.ground:
        raise DataError(
            f"no ground points (class 2) in {_names(clouds)}",
            where="--ground class",
            remedy="use --ground csf to find the ground",
        )
    classified = options.ground == "class"
    if options.ground == "auto":
        classified = bool(tally.ground) and tally.classified
        if not classified:
            which = "some files carry" if tally.ground else "the points carry"
            log.warning(f"note: {which} no ground class; ground is found with a cloth simulation")
    if not classified:
        require("point clouds without ground classes", "canopy-height[lidar]", "CSF")
    return replace(plan, classified=classified), tally


def _names(clouds: Sequence[LidarFile]) -> str:
    return clouds[0].path.name + (f" and {len(clouds) - 1} more" if len(clouds) > 1 else "")


def make_surface(plan: SurfacePlan, tile: Grid) -> tuple[int, int]:
    """Heights and return counts of a tile of the output: writes float32 (2, h, w), NaN = nodata.

    Returns how many noise and ground returns were found.
    """
    window, wide, pixel = tile.pad(plan.pad_px), tile.pad(plan.pad_px + 1 + 2 * EDGE_PX), tile.pixel[0]
    points = plan.spool.load(plan.reach(tile))
    noise = surface.lonely(points)
    lost, points = points[noise], points[~noise]
    ground = (
        surface.classified_ground(points, pixel) if plan.classified else surface.cloth_ground(points, pixel)
    )
    plane = surface.terrain(ground, wide)
    points, cell = _cells(points, window)
    above = points["z"] - surface.elevation_at(plane, wide, points["x"], points["y"])
    height, count, fixed, impossible = surface.highest(
        points["kind"], above, cell, window.shape, plan.policies, plan.classified
    )
    height = surface.fill_gaps(surface.close_pits(height, fixed, plan.pit_px), count == 0, plan.fill_px)
    inner = np.s_[plan.pad_px : -plan.pad_px, plan.pad_px : -plan.pad_px]
    # Whole millimetres: finer than any lidar, and files compress.
    bands = np.stack([np.round(height[inner], 3), count[inner]]).astype(np.float32)
    bands.tofile(_tile_file(plan, tile))
    return len(_cells(lost, tile)[0]) + impossible, len(ground)


def _cells(points: np.ndarray, grid: Grid) -> tuple[np.ndarray, np.ndarray]:
    """The points that lie in a grid, and the flat index of their pixels there.

    Pixels are counted on the global lattice, so that a point on an edge belongs to the same one in every
    window: west and north edges belong to a pixel.
    """
    pixel, (row, col) = grid.pixel[0], grid.origin_rc
    rows = np.floor(-points["y"] / pixel).astype(np.int64) - row
    cols = np.floor(points["x"] / pixel).astype(np.int64) - col
    inside = (rows >= 0) & (cols >= 0) & (rows < grid.height) & (cols < grid.width)
    return points[inside], (rows * grid.width + cols)[inside]


def _tile_file(plan: SurfacePlan, tile: Grid) -> Path:
    row, col = tile.origin_rc
    return plan.spool.folder / f"chm_{row}_{col}"


def _run(
    plan: SurfacePlan, tiles: Sequence[Grid], workers: int | None, progress: Progress
) -> tuple[int, int]:
    """All tiles by dask; how many noise and ground returns were found. Heights travel through files."""
    import dask
    from dask.callbacks import Callback
    from dask.multiprocessing import RemoteException

    count = min(workers or min(4, os.cpu_count() or 1), len(tiles))
    tasks = [dask.delayed(make_surface, pure=False)(plan, tile) for tile in tiles]
    how: dict[str, Any] = {"scheduler": "processes", "num_workers": count, "chunksize": 1}
    try:
        with Callback(posttask=lambda *_: progress.advance()):
            done = dask.compute(*tasks, **(how if count > 1 else {"scheduler": "sync"}))
    except (BrokenProcessPool, MemoryError) as error:
        raise CanopyError(
            "a worker process died, probably for want of memory", remedy="use fewer --workers"
        ) from error
    except RemoteException as error:  # its text is a whole traceback
        raise error.exception from None
    return sum(noise for noise, _ in done), sum(ground for _, ground in done)


def _write(writer: CogWriter, plan: SurfacePlan, tiles: Sequence[Grid], area: AOI | None, names: str) -> int:
    """Put the tiles together; how many returns they hold."""
    returns, known = 0, False
    for tile in tiles:
        heights, count = np.fromfile(_tile_file(plan, tile), np.float32).reshape(2, *tile.shape)
        if area is not None:
            inside = area.mask(tile)
            heights, count = np.where(inside, heights, np.nan), np.where(inside, count, 0)
        valid = np.isfinite(heights)
        bands = np.stack([heights, count / np.prod(tile.pixel), valid]).astype(np.float32)
        always = np.ones_like(valid)
        writer.write(bands, np.stack([valid, always, always]), *writer.grid.offset_of(tile))
        returns, known = returns + int(count.sum()), known or bool(valid.any())
    if not known:
        raise DataError(
            f"no pixel with a known height in {names}",
            remedy="no return has ground near it, or all of them are masked structures",
        )
    return returns


def _dates(tally: Tally) -> str | None:
    """First/last day of the pulses, where their GPS times have dates."""
    if not (np.isfinite(tally.first_s) and tally.last_s > -1e9 and tally.first_s != 0):
        return None
    days = [(_GPS_EPOCH + timedelta(seconds=s)).date().isoformat() for s in (tally.first_s, tally.last_s)]
    return days[0] if days[0] == days[1] else "/".join(days)
