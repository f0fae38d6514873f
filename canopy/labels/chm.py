"""Lidar to canopy height: point clouds, or a surface and a terrain raster, to a CHM in metres.

`chm_from_points` is the job behind `canopy data chm`. Points are streamed once into blocks on disk
(`labels.points`); each block is then read with the margin that its steps look beyond it, its noise and
ground are found, and its surface made (`labels.surface`), by dask in as many processes as asked. Memory holds
one chunk of input and, per worker, one block with its margin. `chm_from_rasters` takes lidar that somebody
else has gridded.
"""

from __future__ import annotations

import contextlib
import math
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pyproj
import shapely
from odc.geo import CRS
from rasterio.io import DatasetReader

from canopy import __version__
from canopy.errors import AreaError, CanopyError, DataError, InputError, OutputError
from canopy.files import check_output
from canopy.geo.area import AOI
from canopy.geo.cog import BandSpec, CogWriter
from canopy.geo.crs import metres_per_unit, output_crs, project, to_crs, to_lonlat
from canopy.geo.grid import Grid, tiles_over
from canopy.geo.place import SourcePlace
from canopy.geo.reading import open_raster, read_window
from canopy.labels.points import METRES, RECORD, Blocks, LidarFile, Spool, Tally, bounds_in, fill, open_lidar
from canopy.labels.surface import (
    ABOVE_M,
    BELOW_M,
    CLOTH_MARGIN_M,
    EDGE_PX,
    NOISE_REACH_M,
    POLICIES,
    TERRAIN_REACH_M,
    Policy,
    Window,
    classified_ground,
    close_pits,
    cloth_ground,
    elevation_at,
    fill_gaps,
    highest,
    lonely,
    require_cloth,
    terrain,
)
from canopy.runtime import NoProgress, Progress, log

BANDS = (BandSpec("canopy_height"), BandSpec("point_density", "1/m2"), BandSpec("valid", "1"))
# Heights beyond any tree in a file said to be in metres are most often feet.
_SUSPECT_M = 100.0
_GPS_EPOCH = datetime(1980, 1, 6, tzinfo=UTC) + timedelta(seconds=1e9)

Bounds = tuple[float, float, float, float]
GROUNDS = ("auto", "class", "csf")
BLOCK_M = 512.0
GSD_RANGE_M = (0.1, 30.0)
MAX_FILL_PX, MAX_PIT_M, MAX_PIXELS = 10, 10.0, 4e9


@dataclass(frozen=True)
class ChmOptions:
    """How to make a CHM; the names are those of `canopy data chm`'s options.

    Attributes:
        gsd: ground metres per pixel.
        crs: CRS of the CHM, in metres; also that of files without one, unless `input_crs` is given. By
            default the files' own where it is true to scale in metres, else the area's UTM zone.
        ground: `class` (LAS class 2), `csf` (cloth simulation), or `auto`: class where files have classes.
        policy: what becomes of buildings, water, bridges and wires.
        units: unit of elevations: `auto`, `m`, `ft` or `us-ft`.
        pit_width_m: holes in crowns up to this wide are closed; 0 leaves them.
        fill_px: pixels without returns this near to known ones are interpolated; 0 leaves them nodata.
        block_m: side of a block of work; results depend on it by millimetres.
    """

    gsd: float = 1.0
    crs: str | None = None
    input_crs: str | None = None
    ground: str = "auto"
    policy: Policy = field(default_factory=Policy)
    units: str = "auto"
    pit_width_m: float = 1.0
    fill_px: int = 0
    workers: int = 1
    overwrite: bool = False
    block_m: float = BLOCK_M

    def check(self) -> None:
        """Raises InputError for an option out of range."""
        if not GSD_RANGE_M[0] <= self.gsd <= GSD_RANGE_M[1]:
            raise InputError(f"{self.gsd:g} m", where="--gsd", expected="0.1 to 30 metres")
        if self.ground not in GROUNDS:
            raise InputError(f"{self.ground!r}", where="--ground", expected=" or ".join(GROUNDS))
        for name, value in asdict(self.policy).items():
            if value not in POLICIES:
                raise InputError(f"{value!r}", where=f"--{name}", expected=" or ".join(POLICIES))
        if not 0 <= self.pit_width_m <= MAX_PIT_M:
            raise InputError(f"{self.pit_width_m:g} m", where="--pit-width-m", expected=f"0 to {MAX_PIT_M:g}")
        if not 0 <= self.fill_px <= MAX_FILL_PX:
            raise InputError(f"{self.fill_px}", where="--fill-px", expected=f"0 to {MAX_FILL_PX}")
        if self.workers < 1:
            raise InputError(f"{self.workers}", where="--workers", expected="1 or more")


def choose_crs(inputs: Sequence[tuple[CRS, Bounds]], options: ChmOptions) -> CRS:
    """The CHM's CRS, projected and in metres, for inputs with their bounds in it; see `ChmOptions`."""
    asked = options.crs
    if asked is not None:
        crs = to_crs(asked)
        if crs.proj.is_projected and abs(metres_per_unit(crs) - 1) < 1e-9:
            return crs
        # It named the CRS of files without one: those may well be in feet. Elsewhere it is a mistake.
        if options.input_crs is not None or any(own != crs for own, _ in inputs):
            raise InputError(
                f"{asked} is not in metres", where="--crs", expected="a projected CRS in metres for the CHM"
            )
    own, bounds = inputs[0]
    centre = shapely.box(*bounds).centroid
    if own.proj.is_projected and abs(metres_per_unit(own) - 1) < 1e-9:
        probe = Grid.of(own, (1, 0, centre.x, 0, -1, centre.y), (1, 1))
        if abs(probe.gsd_m - 1) < 0.01:
            return own
    return output_crs(to_lonlat(shapely.box(*_some_extent(bounds)), own))


def _some_extent(bounds: Bounds) -> Bounds:
    """Bounds with an inside, also for a single point."""
    west, south, east, north = bounds
    return west - 1e-6, south - 1e-6, east + 1e-6, north + 1e-6


def choose_grid(inputs: Sequence[Bounds], crs: CRS, gsd: float, area: AOI | None) -> Grid:
    """The pixels to make: the rectangle of the inputs' bounds in `crs`, cut to the area, on the lattice."""
    rects = np.array(inputs)
    (w, s), (e, n) = rects[:, :2].min(axis=0).tolist(), rects[:, 2:].max(axis=0).tolist()
    e, n = max(e, w + 1e-3), max(n, s + 1e-3)
    grid = AOI(shapely.box(w, s, e, n), crs, is_box=True).grid(crs, gsd)
    if area is not None:
        wanted = area.grid(crs, gsd).bounds
        cut = (max(w, wanted[0]), max(s, wanted[1]), min(e, wanted[2]), min(n, wanted[3]))
        if cut[0] >= cut[2] or cut[1] >= cut[3]:
            raise AreaError(
                f"no data in the area {area.describe()}",
                expected=f"an area within x {w:.10g} to {e:.10g}, y {s:.10g} to {n:.10g} of {crs}",
            )
        grid = Grid.from_bounds(cut, crs, grid.pixel)
    if grid.height * grid.width > MAX_PIXELS:
        raise InputError(
            f"a CHM of {grid.width} x {grid.height} px", remedy="give an area, or a larger --gsd"
        )
    return grid


# ---- point clouds -----------------------------------------------------------------------------
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
    options, progress = options or ChmOptions(), progress or NoProgress()
    options.check()
    out = check_output(out, files, overwrite=options.overwrite)[0]
    clouds = _open_all(files, options)
    crs = choose_crs([(c.crs, c.bounds) for c in clouds], options)
    grid = choose_grid([bounds_in(c, crs) for c in clouds], crs, options.gsd, area)
    for note in (n for c in clouds for n in c.notes):
        log.warning(f"note: {note}")
    with _scratch_beside(out) as folder:
        _check_space(folder, clouds)
        plan, tally = _read(folder, clouds, grid, options, progress)
        blocks = plan.blocks_over_output()
        progress.start(len(blocks), "canopy surface")
        done = _run_blocks(plan, blocks, options.workers, progress)
        if sum(one.ground for one in done) < 3:
            raise DataError(
                f"no ground found among {tally.points} points of {_names(clouds)}",
                remedy="the area may be too small, or all water"
                + ("; try --ground csf" if plan.classified else ""),
            )
        noise = sum(one.noise for one in done)
        return _write(out, plan, grid, area, clouds, options, tally, noise)


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


Block = tuple[int, int]


@dataclass(frozen=True)
class Plan:
    """Everything a worker needs to know. `window` is the output grid in global pixels."""

    spool: Spool
    window: Window
    classified: bool
    policy: Policy
    pit_px: int
    fill_px: int

    @property
    def pad_px(self) -> int:
        """How far the canopy's surface looks beyond a window."""
        return self.pit_px + self.fill_px + 1

    @property
    def margin_m(self) -> float:
        """How far beyond a block its points are read: for the terrain at its edge, and its ground."""
        found = NOISE_REACH_M if self.classified else CLOTH_MARGIN_M
        return TERRAIN_REACH_M + found + (self.pad_px + 1 + 2 * EDGE_PX) * self.spool.blocks.pixel

    def blocks_over_output(self) -> list[Block]:
        """Blocks that meet the output, from the north-west."""
        r0, c0, r1, c1 = self.spool.blocks.over(*self.window)
        return [(i, j) for i in range(r0, r1 + 1) for j in range(c0, c1 + 1)]

    def core_of(self, block: Block) -> Window:
        """A block's part of the output."""
        row, col, side, _ = self.spool.blocks.window(block)
        r0, c0, h, w = self.window
        top, left = max(row, r0), max(col, c0)
        return top, left, min(row + side, r0 + h) - top, min(col + side, c0 + w) - left


@dataclass(frozen=True)
class Done:
    """What came of a block: noise and ground returns found, or the error that stopped it."""

    noise: int = 0
    ground: int = 0
    error: CanopyError | None = None


def _read(
    folder: Path, clouds: Sequence[LidarFile], grid: Grid, options: ChmOptions, progress: Progress
) -> tuple[Plan, Tally]:
    """Spool the points and decide where ground comes from."""
    pixel = grid.pixel[0]
    spool = Spool(folder, Blocks(pixel, max(8, round(options.block_m / pixel))))
    row, col = grid.origin_rc
    window = (row, col, grid.height, grid.width)
    pit_px = int(options.pit_width_m / pixel + 1e-9)
    # Points for the cloth are spooled too: whether it is needed is known only when they are read.
    plan = Plan(spool, window, False, options.policy, pit_px, options.fill_px)
    r0, c0, r1, c1 = spool.blocks.over(*window)
    more = math.ceil(plan.margin_m / spool.blocks.side_m)
    limits = r0 - more, c0 - more, r1 + more, c1 + more
    progress.start(sum(c.points for c in clouds), "reading points")
    tally = fill(spool, clouds, grid.crs, limits, progress)
    classified = _is_classified(options.ground, tally, clouds)
    if not classified:
        require_cloth()
    return Plan(spool, window, classified, options.policy, pit_px, options.fill_px), tally


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


def make_surface(plan: Plan, block: Block) -> Done:
    """Heights and return counts of a block's part of the output: writes float32 (2, h, w), NaN = nodata."""
    spool, pixel = plan.spool, plan.spool.blocks.pixel
    row, col, height, width = plan.core_of(block)
    pad, more = plan.pad_px, plan.pad_px + 1 + 2 * EDGE_PX
    window = row - pad, col - pad, height + 2 * pad, width + 2 * pad
    wide = row - more, col - more, height + 2 * more, width + 2 * more
    points, own = spool.load(block, plan.margin_m)
    everything = np.ones(len(points), bool)
    noise = lonely(points, everything)
    found = int((noise & own).sum())
    points = points[~noise]
    if plan.classified:
        ground = classified_ground(points, pixel)
    else:
        ground = cloth_ground(points, everything[~noise], pixel)
    plane = terrain(ground, pixel, wide)
    rows, cols = spool.blocks.cells(points["x"], points["y"])
    rows, cols = rows - window[0], cols - window[1]
    inside = (rows >= 0) & (cols >= 0) & (rows < window[2]) & (cols < window[3])
    points, cell = points[inside], (rows * window[3] + cols)[inside]
    above = points["z"] - elevation_at(plane, pixel, wide, points["x"], points["y"])
    made = highest(points["kind"], above, cell, (window[2], window[3]), plan.policy, plan.classified)
    heights = close_pits(made.height, made.fixed, plan.pit_px)
    heights = fill_gaps(heights, made.count == 0, plan.fill_px)
    inner = np.s_[pad : pad + height, pad : pad + width]
    # Whole millimetres: finer than any lidar, and files compress.
    bands = np.stack([np.round(heights[inner], 3), made.count[inner]]).astype(np.float32)
    bands.tofile(spool.path(block, "chm"))
    return Done(found + made.dropped, len(ground))


def _guarded(plan: Plan, block: Block) -> Done:
    """A block's work whose foreseeable troubles come back as values: they must survive the way home."""
    try:
        return make_surface(plan, block)
    except CanopyError as error:
        return Done(error=error)
    except OSError as error:
        where = plan.spool.folder.parent
        return Done(error=OutputError(f"the scratch folder failed ({error.strerror or error})", where=where))
    except MemoryError:
        return Done(error=CanopyError("out of memory", remedy="use fewer --workers"))


def _run_blocks(plan: Plan, blocks: Sequence[Block], workers: int, progress: Progress) -> list[Done]:
    """The blocks by dask, in `workers` spawned processes or, for one, in this one. Raises the first error.

    Heights travel through files; what comes back are counts.
    """
    import dask
    from dask.callbacks import Callback

    tasks = [dask.delayed(_guarded, pure=False)(plan, block) for block in blocks]
    # Spawned, never forked: GDAL and thread pools do not survive a fork.
    how: dict[str, Any] = {"scheduler": "sync"}
    if workers > 1:
        how = {"scheduler": "processes", "num_workers": workers, "chunksize": 1}
    step = Callback(posttask=lambda *_: progress.advance())
    try:
        with dask.config.set({"multiprocessing.context": "spawn"}), step:
            done = list(dask.compute(*tasks, **how))
    except BrokenProcessPool as error:
        raise CanopyError(
            "a worker process died, probably for want of memory", remedy="use fewer --workers"
        ) from error
    for one in done:
        if one.error:
            raise one.error
    return done


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
        for block in plan.blocks_over_output():
            row, col, height, width = plan.core_of(block)
            window = grid.window(row - plan.window[0], col - plan.window[1], height, width)
            heights, count = np.fromfile(plan.spool.path(block, "chm"), np.float32).reshape(2, height, width)
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


# ---- rasters ----------------------------------------------------------------------------------
_TILE_PX = 1024
# Elevations beyond the Earth's are a nodata value that the file does not declare.
LOWEST_M, HIGHEST_M = -500.0, 9_000.0
_UNIT_NAMES = {
    "m": "m", "metre": "m", "meter": "m", "metres": "m", "meters": "m",
    "ft": "ft", "foot": "ft", "feet": "ft",
    "us-ft": "us-ft", "us survey foot": "us-ft", "us_survey_foot": "us-ft", "ftus": "us-ft",
}  # fmt: skip


def chm_from_rasters(
    dsm: str | Path,
    dtm: str | Path,
    out: str | Path,
    options: ChmOptions | None = None,
    *,
    area: AOI | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Write `dsm - dtm` in metres as a COG with the bands of `chm_from_points`; returns what was done.

    The CHM lies on the DSM's own grid where that is metric and of the asked pixel; otherwise both are brought
    to the asked grid first, averaged where it is coarser. Below 0 becomes 0 down to -1 m; lower, or higher
    than 130 m, is nodata. `point_density` is nodata everywhere: rasters do not tell it.

    Raises InputError for rasters that do not overlap, have no CRS, or are not a surface and its terrain.
    """
    options, progress = options or ChmOptions(), progress or NoProgress()
    options.check()
    out = check_output(out, [dsm, dtm], overwrite=options.overwrite)[0]
    with contextlib.ExitStack() as stack:
        pair = [stack.enter_context(open_raster(path)) for path in (dsm, dtm)]
        given = options.input_crs if options.input_crs is not None else options.crs
        crss = [_crs_of(ds, given) for ds in pair]
        _check_datums(pair)
        units = [_unit_of(ds, crs, options.units) for ds, crs in zip(pair, crss, strict=True)]
        grid = _grid_of(pair, crss, options, area)
        tags = {
            "CANOPY_VERSION": __version__,
            "CANOPY_SOURCE": f"DSM {Path(dsm).name} minus DTM {Path(dtm).name}",
        }
        with CogWriter(out, grid, list(BANDS), tags=tags, overwrite=options.overwrite) as writer:
            facts = _subtract(writer, pair, crss, units, area, progress)
            _judge(facts, dsm, dtm)
    return {
        "file": str(out), "sha256": writer.sha256, "crs": str(grid.crs), "bounds": list(grid.bounds),
        "width_px": grid.width, "height_px": grid.height, "gsd_m": round(grid.gsd_m, 4),
        "valid_fraction": round(facts["valid"] / (grid.width * grid.height), 6),
        "mean_height_m": round(facts["sum_mm"] / facts["valid"] / 1000, 3),
        "highest_m": round(facts["highest_m"], 3), "cover_2m": round(facts["over_2m"] / facts["valid"], 4),
    }  # fmt: skip


def _crs_of(ds: DatasetReader, given: Any) -> CRS:
    if ds.crs is None and given is None:
        raise DataError(
            "no coordinate reference system in the file",
            where=ds.name,
            remedy="name it with --crs, e.g. --crs EPSG:26917",
        )
    return to_crs(given if ds.crs is None else ds.crs)


def _check_datums(pair: list[DatasetReader]) -> None:
    """Refuse a surface above the ellipsoid over a terrain above the geoid: tens of metres of false forest."""
    stated = []
    for ds in pair:
        crs = pyproj.CRS.from_user_input(ds.crs) if ds.crs else None
        parts = crs.sub_crs_list[1:] if crs is not None and crs.is_compound else []
        if parts:
            stated.append(parts[0].name)
        elif crs is not None and len(crs.axis_info) == 3:
            stated.append("ellipsoidal height")
    if len(stated) == 2 and stated[0] != stated[1]:
        raise DataError(
            f"its heights are {stated[0]}, those of {Path(pair[1].name).name} are {stated[1]}",
            where=pair[0].name,
            expected="a DSM and a DTM above the same vertical datum",
            remedy="bring one to the other's with gdalwarp -t_srs",
        )


def _unit_of(ds: DatasetReader, crs: CRS, units: str) -> float:
    """Metres per stored elevation unit: as asked, as the band says, else as x and y are counted."""
    if units != "auto":
        return METRES[units]
    told = (ds.units[0] or "").strip().lower()
    if told in _UNIT_NAMES:
        return METRES[_UNIT_NAMES[told]]
    factor = float(crs.proj.axis_info[0].unit_conversion_factor) if crs.proj.is_projected else 1.0
    if abs(factor - 1) > 1e-9:
        log.warning(
            f"note: {Path(ds.name).name}: no unit for z, read in the unit of x and y; else use --units"
        )
    return factor


def _grid_of(pair: list[DatasetReader], crss: list[CRS], options: ChmOptions, area: AOI | None) -> Grid:
    """The grid where both rasters lie, or the part of it that was asked for."""
    places = [SourcePlace.of(ds, crs) for ds, crs in zip(pair, crss, strict=True)]
    rects = [AOI.from_grid(p.grid()) if p.is_north_up else None for p in places]
    if None in rects:
        raise InputError("a rotated raster", where=pair[rects.index(None)].name, expected="north-up")
    out_crs = choose_crs([(a.crs, a.geometry.bounds) for a in rects if a], options)
    shapes = [project(a.geometry, a.crs, out_crs) for a in rects if a]
    both = shapes[0].intersection(shapes[1])
    if both.area <= 0:
        raise AreaError("the DSM and the DTM do not overlap", where=pair[0].name)
    grid = choose_grid([both.bounds], out_crs, options.gsd, area)
    own = places[0].grid()
    same = own.crs == out_crs and all(abs(side / options.gsd - 1) < 1e-6 for side in own.pixel)
    if not same:
        return grid
    # On the DSM's own lattice pixels are copied, whatever its phase.
    west, south, east, north = grid.bounds
    r0, c0 = (round(v) for v in own.rowcol(west, north))
    r1, c1 = (round(v) for v in own.rowcol(east, south))
    r0, c0, r1, c1 = max(r0, 0), max(c0, 0), min(r1, own.height), min(c1, own.width)
    return own.window(r0, c0, r1 - r0, c1 - c0) if r1 > r0 and c1 > c0 else grid


def _subtract(
    writer: CogWriter, pair: list[DatasetReader], crss: list[CRS], units: list[float], area: AOI | None,
    progress: Progress,
) -> dict[str, Any]:  # fmt: skip
    facts: dict[str, Any] = {
        "both": 0,
        "zeros": 0,
        "low": 0,
        "high": 0,
        "valid": 0,
        "sum_mm": 0,
        "highest_m": 0.0,
        "over_2m": 0,
    }
    tiles = tiles_over(writer.grid, _TILE_PX)
    progress.start(len(tiles), "surface minus terrain")
    for tile in tiles:
        top, ok_top = _metres(pair[0], crss[0], units[0], tile)
        ground, ok_ground = _metres(pair[1], crss[1], units[1], tile)
        both = ok_top & ok_ground
        facts["zeros"] += int((both & (top == 0) & (ground == 0)).sum())
        if area is not None:
            both &= area.mask(tile)
        height = top - ground
        low, high = both & (height < -BELOW_M), both & (height > ABOVE_M)
        valid = both & ~low & ~high
        height = np.round(np.maximum(height, 0), 3).astype(np.float32)
        marks = np.stack([height, np.zeros_like(height), valid.astype(np.float32)])
        present = np.stack([valid, np.zeros_like(valid), np.ones_like(valid)])
        writer.write(marks, present, *writer.grid.offset_of(tile))
        seen = height[valid].astype(np.float64)
        for name, mask in (("both", both), ("low", low), ("high", high), ("valid", valid)):
            facts[name] += int(mask.sum())
        facts["sum_mm"] += int(np.rint(seen * 1000).sum())
        facts["over_2m"] += int((seen >= 2).sum())
        facts["highest_m"] = max(facts["highest_m"], float(seen.max(initial=0)))
        progress.advance()
    return facts


def _metres(ds: DatasetReader, crs: CRS, unit: float, grid: Grid) -> tuple[np.ndarray, np.ndarray]:
    """Elevation float64 (h, w) in metres and valid (h, w) on a grid."""
    values, valid = read_window(ds, grid, [1], crs=crs)
    metres = (values[0].astype(np.float64) * ds.scales[0] + ds.offsets[0]) * unit
    return metres, valid & (metres > LOWEST_M) & (metres < HIGHEST_M)


def _judge(facts: dict[str, Any], dsm: str | Path, dtm: str | Path) -> None:
    """Refuse pairs that cannot be a surface and its terrain."""
    if not facts["both"]:
        raise DataError("no pixel where both rasters have data", where=dsm)
    if facts["zeros"] > 0.02 * facts["both"]:
        log.warning(
            f"note: surface and terrain are both exactly 0 m in {facts['zeros'] / facts['both']:.0%} of the "
            "pixels; if that means no data there, declare it in the files (gdal_edit.py -a_nodata 0)"
        )
    for name, where in (("low", "below"), ("high", f"more than {ABOVE_M:g} m above")):
        if facts[name] > facts["both"] / 2:
            raise DataError(
                f"lies {where} {Path(dtm).name} in {facts[name] / facts['both']:.0%} of the pixels",
                where=dsm,
                expected="a surface (DSM) and its terrain (DTM) in the same unit and vertical datum",
                remedy="swap --dsm and --dtm, or see --units",
            )
