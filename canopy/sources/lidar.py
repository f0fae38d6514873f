"""Lidar to canopy height: point clouds, or a surface and a terrain raster, to a CHM in metres.

`chm_from_points` is the job behind `canopy data chm`. Points are streamed once into blocks on disk
(`lidar_points`), noise and ground are found (`lidar_ground`), and each block's surface is made
(`lidar_blocks`, `lidar_surface`). Memory holds one chunk of input and, per worker, one block with its margin.
"""

from __future__ import annotations

import contextlib
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np

from canopy import __version__
from canopy.errors import CanopyError, DataError, InputError, OutputError
from canopy.geo.aoi import AOI
from canopy.geo.cog import CogWriter
from canopy.geo.encoding import BandSpec
from canopy.geo.grid import Grid
from canopy.runtime import NoProgress, Progress, log
from canopy.sources.lidar_blocks import (
    Plan,
    core_of,
    find_ground,
    make_surface,
    run_blocks,
    surface_of,
)
from canopy.sources.lidar_ground import require_cloth
from canopy.sources.lidar_header import LidarFile, bounds_in, open_lidar
from canopy.sources.lidar_points import RECORD, Blocks, Spool, Tally, fill
from canopy.sources.lidar_target import ChmOptions, check_out, choose_crs, choose_grid

BANDS = (BandSpec("canopy_height"), BandSpec("point_density", "1/m2"), BandSpec("valid", "1"))
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
) -> dict[str, Any]:
    """Write the CHM of point clouds as a COG of float32; returns what was done.

    Bands: `canopy_height` (metres above the terrain; NaN where there was no return, no terrain within reach,
    or a masked structure), `point_density` (returns kept per square metre; 0 where none), `valid` (1 or 0).

    Args:
        files: LAS, LAZ or COPC files; neighbours are processed as one cloud.
        out: the .tif to make.
        area: what to map; by default all the points. Outside polygons is nodata.

    Raises:
        InputError: bad options or files; nothing was written.
        OutputError: the folder or disk does not take the result.
    """
    options, progress, out = options or ChmOptions(), progress or NoProgress(), Path(out)
    options.check()
    check_out(out, options.overwrite)
    clouds = _open_all(files, options)
    crs = choose_crs([(c.crs, c.bounds) for c in clouds], options)
    grid = choose_grid([bounds_in(c, crs) for c in clouds], crs, options.gsd, area)
    for note in (n for c in clouds for n in c.notes):
        log.warning(f"note: {note}")
    with _scratch_beside(out) as folder:
        _check_space(folder, clouds)
        plan, tally = _read(folder, clouds, grid, options, progress)
        limits = plan.ground_limits()
        blocks = [(i, j) for i in range(limits[0], limits[2] + 1) for j in range(limits[1], limits[3] + 1)]
        blocks = [b for b in blocks if plan.spool.path(b).exists()]
        progress.start(len(blocks), "ground")
        found = run_blocks(find_ground, plan, blocks, options.workers, progress)
        if found.ground < 3:
            raise DataError(
                f"no ground found among {found.points} points of {_names(clouds)}",
                remedy="the area may be too small, or all water; try --ground csf"
                if plan.classified
                else "the area may be too small, or all water",
            )
        cores = plan.surface_blocks()
        progress.start(len(cores), "canopy surface")
        run_blocks(make_surface, plan, cores, options.workers, progress)
        return _write(out, plan, grid, area, clouds, options, tally, found.noise)


# ---- before -----------------------------------------------------------------------------------
def _open_all(files: Sequence[str | Path], options: ChmOptions) -> list[LidarFile]:
    if not files:
        raise InputError("no point cloud named", expected="LAS, LAZ or COPC files, or --dsm and --dtm")
    if len({Path(f).resolve() for f in files}) < len(files):
        raise InputError("a file is named twice", where=files[0])
    given = options.input_crs if options.input_crs is not None else options.crs
    return [open_lidar(f, crs=given, units=options.units) for f in files]


@contextlib.contextmanager
def _scratch_beside(out: Path) -> Iterator[Path]:
    """A hidden folder beside the output, gone afterwards whatever happens."""
    try:
        folder = Path(tempfile.mkdtemp(prefix=f".{out.name}.", suffix=".partial", dir=out.parent.absolute()))
    except OSError as error:
        raise OutputError(f"the folder cannot be written to ({error.strerror})", where=out.parent) from error
    try:
        yield folder
    except OSError as error:
        if isinstance(error, CanopyError):
            raise
        raise OutputError(f"cannot be made ({error.strerror or error})", where=out) from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _check_space(folder: Path, clouds: Sequence[LidarFile]) -> None:
    needed = sum(c.points for c in clouds) * (RECORD.itemsize + 1) + 2**26
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise OutputError(
            f"{free / 1e9:.1f} GB free on the disk, {needed / 1e9:.1f} GB needed for the points",
            where=folder.parent,
            remedy="make room, write to another disk, or give fewer files",
        )


# ---- the points -------------------------------------------------------------------------------
def _read(
    folder: Path, clouds: Sequence[LidarFile], grid: Grid, options: ChmOptions, progress: Progress
) -> tuple[Plan, Tally]:
    """Spool the points and decide where ground comes from."""
    blocks = Blocks(grid.pixel[0], max(8, round(options.block_m / grid.pixel[0])))
    row, col = grid.origin_rc
    window = (row, col, grid.height, grid.width)
    # Points for the cloth are spooled first: whether it is needed is known only when they are read.
    plan = Plan(folder, blocks, window, False, options.policy, options.pit_width_m, options.fill_px)
    progress.start(sum(c.points for c in clouds), "reading points")
    tally = fill(Spool(folder, blocks), clouds, grid.crs, plan.point_limits(), progress)
    classified = _is_classified(options.ground, tally, clouds)
    if not classified:
        require_cloth()
    made = Plan(folder, blocks, window, classified, options.policy, options.pit_width_m, options.fill_px)
    return made, tally


def _is_classified(ground: str, tally: Tally, clouds: Sequence[LidarFile]) -> bool:
    """Whether ground is taken from class 2. Raises DataError where that was asked and there is none."""
    if ground == "class" and not tally.ground:
        raise DataError(
            f"no ground points (class 2) in {_names(clouds)}",
            where="--ground class",
            remedy="use --ground csf to find the ground",
        )
    if ground != "auto":
        return ground == "class"
    if tally.ground and all(tally.classified):
        return True
    which = "some files carry" if tally.ground else "the points carry"
    log.warning(f"note: {which} no ground class; ground is found with a cloth simulation")
    return False


def _names(clouds: Sequence[LidarFile]) -> str:
    return clouds[0].path.name + (f" and {len(clouds) - 1} more" if len(clouds) > 1 else "")


# ---- after ------------------------------------------------------------------------------------
def _write(
    out: Path, plan: Plan, grid: Grid, area: AOI | None, clouds: Sequence[LidarFile], options: ChmOptions,
    tally: Tally, noise: int,
) -> dict[str, Any]:  # fmt: skip
    """Put the blocks together; returns the facts of the job."""
    facts: dict[str, Any] = {"valid_px": 0, "sum_mm": 0, "highest_m": 0.0, "over_2m": 0, "returns": 0}
    dates = _dates(tally)
    with CogWriter(
        out, grid, list(BANDS), tags=_tags(plan, clouds, options, dates), overwrite=options.overwrite
    ) as writer:
        for block in plan.surface_blocks():
            row, col, height, width = core_of(plan, block)
            window = grid.window(row - plan.window[0], col - plan.window[1], height, width)
            heights, count = surface_of(plan, block)
            if area is not None:
                inside = area.mask(window)
                heights, count = np.where(inside, heights, np.nan), np.where(inside, count, 0)
            valid = np.isfinite(heights)
            bands = np.stack([heights, count / np.prod(grid.pixel), valid]).astype(np.float32)
            always = np.ones_like(valid)
            writer.write(bands, np.stack([valid, always, always]), row - plan.window[0], col - plan.window[1])
            _count(facts, heights[valid], int(count.sum()))
        if not facts["valid_px"]:
            raise DataError(
                f"no pixel with a known height in {_names(clouds)}",
                remedy="no return has ground near it, or all of them are masked structures",
            )
    if facts["highest_m"] > _SUSPECT_M and options.units == "auto":
        log.warning(
            f"note: heights up to {facts['highest_m']:.0f} m; if elevations are in feet say --units ft"
        )
    return {"file": str(out), "sha256": writer.sha256, **_summary(facts, grid, plan, tally, noise, dates)}


def _count(facts: dict[str, Any], heights: np.ndarray, returns: int) -> None:
    facts["returns"] += returns
    facts["valid_px"] += len(heights)
    if len(heights):
        # Whole millimetres: the sum does not depend on the order of the blocks.
        facts["sum_mm"] += int(np.rint(heights.astype(np.float64) * 1000).sum())
        facts["highest_m"] = max(facts["highest_m"], float(heights.max()))
        facts["over_2m"] += int((heights >= 2).sum())


def _summary(
    facts: dict[str, Any], grid: Grid, plan: Plan, tally: Tally, noise: int, dates: str | None
) -> dict[str, Any]:
    pixels = grid.height * grid.width
    return {
        "crs": str(grid.crs),
        "bounds": list(grid.bounds),
        "width_px": grid.width,
        "height_px": grid.height,
        "gsd_m": round(grid.gsd_m, 4),
        "ground": "class" if plan.classified else "csf",
        "points_read": tally.points,
        "points_noise": tally.dropped + noise,
        "points_per_m2": round(facts["returns"] / (pixels * float(np.prod(grid.pixel))), 2),
        "valid_fraction": round(facts["valid_px"] / pixels, 6),
        "mean_height_m": round(facts["sum_mm"] / facts["valid_px"] / 1000, 3),
        "highest_m": round(facts["highest_m"], 3),
        "cover_2m": round(facts["over_2m"] / facts["valid_px"], 4),
        "dates": dates,
    }


def _dates(tally: Tally) -> str | None:
    """First/last day of the pulses, where their GPS times have dates."""
    if not (np.isfinite(tally.first_s) and tally.last_s > -1e9 and tally.first_s != 0):
        return None
    days = [(_GPS_EPOCH + timedelta(seconds=s)).date().isoformat() for s in (tally.first_s, tally.last_s)]
    return days[0] if days[0] == days[1] else "/".join(days)


def _tags(
    plan: Plan, clouds: Sequence[LidarFile], options: ChmOptions, dates: str | None
) -> dict[str, object]:
    names = ",".join(sorted(c.path.name for c in clouds)[:20])
    tags: dict[str, object] = {
        "CANOPY_VERSION": __version__,
        "CANOPY_SOURCE": f"lidar: {names}{',...' if len(clouds) > 20 else ''}",
        "CANOPY_GROUND": "class 2" if plan.classified else "cloth simulation",
        "CANOPY_STRUCTURES": ",".join(f"{k}={v}" for k, v in asdict(options.policy).items()),
        "CANOPY_PITS": f"closed up to {options.pit_width_m:g} m" if options.pit_width_m else "kept",
    }
    return tags | ({"ACQUISITION_DATE": dates} if dates else {})
