"""The synthetic forest laid on the Earth, and written to disk: imagery, heights, lidar, GEDI, and the truth.

Every scene's plane lies on the Earth as the demo's does, so that scenes of one seed and pixel size show the
same trees whatever their extent: `canopy data synth --seed 0` gives the middle of the `demo` source.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import rasterio
import rasterio.shutil
from affine import Affine
from odc.geo import CRS
from rasterio.enums import ColorInterp
from rasterio.errors import RasterioError
from rasterio.windows import Window

from canopy import __version__
from canopy.errors import InputError, OutputError
from canopy.files import file_sha256, flush
from canopy.geo.cog import BandSpec, CogWriter
from canopy.geo.crs import transformer, utm_crs
from canopy.geo.grid import Grid
from canopy.imagery.named import DAY, LATITUDE, LONGITUDE, SPOT_XY
from canopy.labels.points import require_lidar
from canopy.labels.shots import require_gedi
from canopy.runtime import NoProgress, Progress
from canopy.synth.forest import SceneSpec, SynthTile, trees_in
from canopy.synth.render import render
from canopy.synth.sensors import PULSE_CELL_M, blocks, tracks, write_gedi, write_points

FILES = ("rgb.tif", "chm.tif", "points.laz", "gedi.h5", "scene.json")
GSD_RANGE_M = (0.1, 5.0)
MAX_SIDE_M = 10_000.0
MAX_SIDE_PX = 20_000
_TILE_PX = 512
_COVER_M = 2.0


@dataclass(frozen=True)
class Scene:
    """A scene on the Earth: what stands there, its grid, and the world place (x, y) of the plane's origin."""

    spec: SceneSpec
    grid: Grid
    origin_xy: tuple[float, float]


def place(spec: SceneSpec, size_m: float) -> Scene:
    """A square of about `size_m` (whole pixels) round the demo's point, in its UTM zone."""
    crs: CRS = utm_crs(LONGITUDE, LATITUDE)
    x, y = transformer("EPSG:4326", crs).transform(LONGITUDE, LATITUDE)
    origin = round(x) - SPOT_XY[0], round(y) - SPOT_XY[1]
    side, gsd = max(round(size_m / spec.gsd_m), 1), spec.gsd_m
    # Whole pixels from the plane's origin, which is the lattice that `render` paints on.
    col, row = round(SPOT_XY[0] / gsd) - side // 2, round(SPOT_XY[1] / gsd) + side // 2
    corner = Affine(gsd, 0, origin[0] + col * gsd, 0, -gsd, origin[1] + row * gsd)
    return Scene(spec, Grid.of(crs, corner, (side, side)), origin)


def render_grid(spec: SceneSpec, grid: Grid, origin: tuple[float, float]) -> SynthTile:
    """Render a north-up grid whose pixels are the scene's.

    Args:
        spec: the scene.
        grid: any window of the scene's lattice, however far away.
        origin: (x, y) of the plane's origin in the grid's CRS.

    Raises:
        InputError: the grid has other pixels than the scene.
    """
    west, north = grid.xy(0, 0)
    col, row = (west - origin[0]) / spec.gsd_m, (origin[1] - north) / spec.gsd_m
    same = all(abs(side / spec.gsd_m - 1) < 1e-9 for side in grid.pixel)
    if not same or abs(col - round(col)) > 1e-3 or abs(row - round(row)) > 1e-3:
        raise InputError(
            f"grid {grid} has other pixels than the scene", expected=f"its {spec.gsd_m:g} m lattice"
        )
    return render(spec, round(col) * spec.gsd_m, -round(row) * spec.gsd_m, *grid.shape)


def write_scene(
    out_dir: str | Path,
    seed: int = 0,
    size_m: float = 1000.0,
    gsd_m: float = 0.5,
    *,
    gedi_jitter_m: float = 0.0,
    overwrite: bool = False,
    progress: Progress | None = None,
    tile_px: int = _TILE_PX,
) -> dict[str, Any]:
    """Write the five `FILES` of a scene into a folder, all of them or none.

    rgb.tif: uint8 imagery with its acquisition date. chm.tif: true canopy height, float32 metres. points.laz:
    classified lidar, about 8 points per square metre. gedi.h5: GEDI L2A version 2 layout. scene.json: place,
    parameters, what was planted, and the checksums of the others. The bytes depend on seed, size, pixel
    and jitter alone; memory depends on none of them.

    Args:
        out_dir: made if need be; files of other names in it are left alone.
        seed: what stands where, 0 or more.
        size_m: side of the square, metres; rounded to whole pixels.
        gsd_m: pixel side, metres.
        gedi_jitter_m: standard deviation, per axis, of the difference between true and reported shot place.
        overwrite: replace files of these names.
        tile_px: side of the tiles that are rendered at once.

    Returns:
        The content of scene.json without the list of shots.

    Raises:
        InputError: a size out of range, or files that exist; nothing was written.
        MissingDependencyError: laspy or h5py is not installed.
        OutputError: the folder or disk does not take the files.
    """
    folder, progress = Path(out_dir), progress or NoProgress()
    _check_numbers(seed, size_m, gsd_m, gedi_jitter_m)
    require_lidar()
    require_gedi()
    _check_folder(folder, overwrite)
    scene = place(SceneSpec(seed=seed, gsd_m=gsd_m), size_m)
    with _scratch_in(folder, scene) as scratch:
        steps = len(list(_windows(scene.grid, tile_px)))
        plane = _plane(scene)
        progress.start(steps + len(blocks(plane)) + len(tracks(plane)), "synthetic scene")
        heights = _write_rasters(scratch, scene, tile_px, progress)
        where = scene.spec, scene.grid, scene.origin_xy, DAY
        points = write_points(scratch / "points.laz", *where, progress)
        gedi = write_gedi(scratch / "gedi.h5", *where, gedi_jitter_m, progress)
        facts = _facts(scratch, scene)
        facts["planted"] = {"trees": _count_trees(scene), **heights, "points": points, "gedi": gedi}
        (scratch / "scene.json").write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
        _move(scratch, folder)
    return facts | {"planted": facts["planted"] | {"gedi": {k: v for k, v in gedi.items() if k != "shots"}}}


# --- checks -------------------------------------------------------------------------------------------


def _check_numbers(seed: int, size_m: float, gsd_m: float, jitter_m: float) -> None:
    if not (math.isfinite(gsd_m) and GSD_RANGE_M[0] <= gsd_m <= GSD_RANGE_M[1]):
        raise InputError(f"pixel side {gsd_m:g} m", where="--gsd", expected="0.1 to 5 metres")
    limit = min(MAX_SIDE_M, MAX_SIDE_PX * gsd_m)
    if not (math.isfinite(size_m) and 0 < size_m <= limit):
        raise InputError(
            f"side of {size_m:g} m",
            where="--size-m",
            expected=f"above 0, at most {limit:g} m at {gsd_m:g} m pixels",
        )
    if round(size_m / gsd_m) < 1:
        raise InputError(
            f"side of {size_m:g} m", where="--size-m", expected=f"a pixel of {gsd_m:g} m or more"
        )
    if not (math.isfinite(jitter_m) and 0 <= jitter_m <= 100):
        raise InputError(f"jitter {jitter_m:g} m", where="--gedi-jitter-m", expected="0 to 100 metres")
    if not 0 <= seed < 2**32:
        raise InputError(f"seed {seed}", where="--seed", expected="0 to 4294967295")


def _check_folder(folder: Path, overwrite: bool) -> None:
    if folder.exists() and not folder.is_dir():
        raise InputError("a file", where=folder, expected="a folder", remedy="give another --out")
    taken = [name for name in FILES if (folder / name).exists()]
    if taken and not overwrite:
        raise InputError(
            f"{', '.join(taken)} exist" if len(taken) > 1 else f"{taken[0]} exists",
            where=folder,
            remedy="use --overwrite to replace, or another --out",
        )
    if any((folder / name).is_dir() for name in taken):
        raise InputError("folders in the place of files", where=folder)


@contextlib.contextmanager
def _scratch_in(folder: Path, scene: Scene) -> Iterator[Path]:
    """A hidden folder inside `folder`; both vanish on failure, unless `folder` was there before."""
    new = not folder.exists()
    scratch: Path | None = None
    try:
        folder.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(prefix=".synth.", suffix=".partial", dir=folder))
        _check_space(scratch, scene)
        yield scratch
    except BaseException as error:
        if scratch:
            shutil.rmtree(scratch, ignore_errors=True)
        if new:
            with contextlib.suppress(OSError):
                folder.rmdir()
        if isinstance(error, (OSError, RasterioError)) and not isinstance(error, OutputError):
            reason = getattr(error, "strerror", None) or " ".join(str(error.__cause__ or error).split())[:160]
            raise OutputError(f"the scene cannot be written ({reason})", where=folder) from error
        raise
    shutil.rmtree(scratch, ignore_errors=True)


def _check_space(folder: Path, scene: Scene) -> None:
    height, width = scene.grid.shape
    pixels, area = height * width, height * width * scene.spec.gsd_m**2
    # Both rasters raw and finished, compressed points of some seven bytes, and a little more.
    needed = int(pixels * (3 + 4) * 2 + area * 10 * 7 + 2**24)
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise OutputError(
            f"{free / 1e9:.2f} GB free on the disk, {needed / 1e9:.2f} GB needed",
            where=folder.parent,
            remedy="make room, choose another disk, or a smaller scene",
        )


# --- writing ------------------------------------------------------------------------------------------


def _plane(scene: Scene) -> tuple[float, float, float, float]:
    """(west, south, east, north) of the scene in its plane, metres."""
    west, south, east, north = scene.grid.bounds
    ox, oy = scene.origin_xy
    return west - ox, south - oy, east - ox, north - oy


def _windows(grid: Grid, side: int) -> Iterator[tuple[int, int, int, int]]:
    """(row, col, height, width) of the tiles, row by row."""
    for row in range(0, grid.height, side):
        for col in range(0, grid.width, side):
            yield row, col, min(side, grid.height - row), min(side, grid.width - col)


@dataclass
class _Heights:
    """Running facts of the height raster, exact whatever the order of the tiles."""

    highest: float = 0.0
    covered: int = 0
    pixels: int = 0
    # Millimetres in whole numbers: a sum of floats would depend on how the scene is cut.
    total_mm: int = 0
    surfaces: np.ndarray = field(default_factory=lambda: np.zeros(5, np.int64))

    def add(self, tile: SynthTile) -> None:
        self.highest = max(self.highest, float(tile.chm.max()))
        self.covered += int((tile.chm >= _COVER_M).sum())
        self.pixels += tile.chm.size
        self.total_mm += int(np.rint(tile.chm.astype(np.float64) * 1000).sum())
        self.surfaces += np.bincount(tile.surface.ravel(), minlength=5)

    def facts(self) -> dict[str, Any]:
        names = ("ground", "tree", "road", "water", "roof")
        return {
            "highest_m": round(self.highest, 3),
            "mean_m": round(self.total_mm / self.pixels / 1000, 4),
            "cover": round(self.covered / self.pixels, 6),
            "surface_px": dict(zip(names, self.surfaces.tolist(), strict=True)),
        }


def _write_rasters(folder: Path, scene: Scene, tile_px: int, progress: Progress) -> dict[str, Any]:
    """rgb.tif and chm.tif, from the same tiles."""
    tags = {
        "ACQUISITION_DATE": DAY.isoformat(),
        "CANOPY_VERSION": __version__,
        "CANOPY_SOURCE": f"synthetic scene, seed {scene.spec.seed}",
    }
    heights = _Heights()
    scratch, profile = folder / "rgb.scratch.tif", _picture_profile(scene.grid)
    with (
        rasterio.open(scratch, "w", **profile) as picture,
        CogWriter(folder / "chm.tif", scene.grid, [BandSpec("canopy_height")], tags=tags) as chm,
    ):
        picture.colorinterp = (ColorInterp.red, ColorInterp.green, ColorInterp.blue)
        picture.descriptions = ("red", "green", "blue")
        picture.update_tags(AREA_OR_POINT="Area", **tags)
        for row, col, height, width in _windows(scene.grid, tile_px):
            tile = render_grid(scene.spec, scene.grid.window(row, col, height, width), scene.origin_xy)
            picture.write(tile.rgb, window=Window(col, row, width, height))
            chm.write(tile.chm[None], np.ones(tile.chm.shape, bool), row, col)
            heights.add(tile)
            progress.advance()
    rasterio.shutil.copy(
        scratch, folder / "rgb.tif", driver="COG", BLOCKSIZE=512, COMPRESS="DEFLATE", PREDICTOR="YES",
        OVERVIEW_RESAMPLING="AVERAGE", BIGTIFF="IF_SAFER",
    )  # fmt: skip
    scratch.unlink()
    return heights.facts()


def _picture_profile(grid: Grid) -> dict[str, Any]:
    return {
        "driver": "GTiff", "dtype": "uint8", "count": 3, "height": grid.height, "width": grid.width,
        "crs": rasterio.crs.CRS.from_wkt(grid.crs.to_wkt()), "transform": grid.transform, "tiled": True,
        "blockxsize": 512, "blockysize": 512, "interleave": "pixel", "photometric": "RGB",
        "bigtiff": "IF_SAFER",
    }  # fmt: skip


def _count_trees(scene: Scene, strip_m: float = 200.0) -> int:
    """Stems inside the scene, shrubs included, counted in squares."""
    west, south, east, north = _plane(scene)
    xs = [*np.arange(west, east, strip_m).tolist(), east]
    ys = [*np.arange(south, north, strip_m).tolist(), north]
    return sum(
        len(trees_in(scene.spec, x0, y0, x1, y1)) for y0, y1 in pairwise(ys) for x0, x1 in pairwise(xs)
    )


def _facts(folder: Path, scene: Scene) -> dict[str, Any]:
    """scene.json but for what was planted."""
    grid = scene.grid
    lon, lat = transformer(grid.crs, "EPSG:4326").transform(*scene.origin_xy)
    files = {}
    for path in (folder / name for name in FILES if name != "scene.json"):
        flush(path)
        files[path.name] = {"bytes": path.stat().st_size, "sha256": file_sha256(path)}
    return {
        "what": "a synthetic forest made by `canopy data synth`; no real place looks like this",
        "version": __version__,
        "spec": asdict(scene.spec),
        "crs": f"EPSG:{grid.crs.epsg}",
        "bounds": list(grid.bounds),
        "origin_xy": list(scene.origin_xy),
        "origin_lat_lon": [round(lat, 7), round(lon, 7)],
        "height_px": grid.height,
        "width_px": grid.width,
        "date": DAY.isoformat(),
        "vertical": "metres above an arbitrary datum",
        "points_pulse_spacing_m": PULSE_CELL_M,
        "files": files,
    }


def _move(scratch: Path, folder: Path) -> None:
    """Put the finished files in place; scene.json goes last, so that it never describes other files."""
    (folder / "scene.json").unlink(missing_ok=True)
    for name in FILES:
        os.replace(scratch / name, folder / name)
