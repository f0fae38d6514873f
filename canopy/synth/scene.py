"""The synthetic forest written to disk: imagery, heights, lidar, GEDI, and the truth.

Scenes of one seed and pixel size show the same trees whatever their extent: `canopy data synth --seed 0`
gives the middle of the `demo` source.
"""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
from collections.abc import Iterator
from dataclasses import asdict
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import rasterio
import rasterio.shutil
from rasterio.enums import ColorInterp
from rasterio.windows import Window

from canopy import __version__
from canopy.errors import InputError
from canopy.files import check_output, file_sha256, flush, told_as_output
from canopy.geo.cog import BandSpec, CogWriter
from canopy.geo.crs import transformer
from canopy.imagery.named import DAY, DemoSource
from canopy.labels.points import require_lidar
from canopy.labels.shots import require_gedi
from canopy.runtime import NoProgress, Progress
from canopy.synth.forest import SceneSpec, trees_in
from canopy.synth.sensors import PULSE_CELL_M, blocks, tracks, write_gedi, write_points

FILES = ("rgb.tif", "chm.tif", "points.laz", "gedi.h5", "scene.json")
GSD_RANGE_M = (0.1, 5.0)
MAX_SIDE_M = 10_000.0
MAX_SIDE_PX = 20_000
_TILE_PX = 512
_COVER_M = 2.0


def write_scene(
    out_dir: str | Path,
    seed: int = 0,
    size_m: float = 1000.0,
    gsd_m: float = 0.5,
    *,
    gedi_jitter_m: float = 0.0,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Write the five `FILES` of a scene into a folder, all of them or none.

    rgb.tif: uint8 imagery with its acquisition date. chm.tif: true canopy height, float32 metres. points.laz:
    classified lidar, about 8 points per square metre. gedi.h5: GEDI L2A version 2 layout. scene.json: place,
    parameters, what was planted, and the checksums of the others. The bytes depend on seed, size, pixel
    and jitter alone; memory depends on none of them.

    Args:
        out_dir: new or empty; made if need be.
        seed: what stands where, 0 or more.
        size_m: side of the square, metres; rounded to whole pixels.
        gsd_m: pixel side, metres.
        gedi_jitter_m: standard deviation, per axis, of the difference between true and reported shot place.
        overwrite: replace files of these names; others in the folder are left alone.

    Returns:
        The content of scene.json without the list of shots.

    Raises:
        InputError: a size out of range, or files that exist; nothing was written.
        MissingDependencyError: laspy or h5py is not installed.
        OutputError: the folder or disk does not take the files.
    """
    progress = progress or NoProgress()
    _check_numbers(seed, size_m, gsd_m, gedi_jitter_m)
    require_lidar()
    require_gedi()
    (folder,) = check_output(out_dir, overwrite=overwrite, folder=True)
    scene = DemoSource(SceneSpec(seed=seed, gsd_m=gsd_m), size_m)
    new = not folder.exists()
    with told_as_output(folder, "the scene cannot be written"), contextlib.ExitStack() as undo:
        folder.mkdir(parents=True, exist_ok=True)
        if new:
            undo.callback(folder.rmdir)
        with tempfile.TemporaryDirectory(prefix=".synth.", suffix=".partial", dir=folder) as scratch:
            facts = _write(Path(scratch), scene, gedi_jitter_m, progress)
            # scene.json goes last, so that it never describes other files.
            (folder / "scene.json").unlink(missing_ok=True)
            for name in FILES:
                os.replace(Path(scratch) / name, folder / name)
        undo.pop_all()
    shots = {key: value for key, value in facts["planted"]["gedi"].items() if key != "shots"}
    return facts | {"planted": facts["planted"] | {"gedi": shots}}


def _check_numbers(seed: int, size_m: float, gsd_m: float, jitter_m: float) -> None:
    if not GSD_RANGE_M[0] <= gsd_m <= GSD_RANGE_M[1]:
        raise InputError(f"pixel side {gsd_m:g} m", where="--gsd", expected="0.1 to 5 metres")
    limit = min(MAX_SIDE_M, MAX_SIDE_PX * gsd_m)
    if not gsd_m <= size_m <= limit:
        raise InputError(
            f"side of {size_m:g} m",
            where="--size-m",
            expected=f"a pixel or more, at most {limit:g} m at {gsd_m:g} m pixels",
        )
    if not 0 <= jitter_m <= 100:
        raise InputError(f"jitter {jitter_m:g} m", where="--gedi-jitter-m", expected="0 to 100 metres")
    if not 0 <= seed < 2**32:
        raise InputError(f"seed {seed}", where="--seed", expected="0 to 4294967295")


def _write(folder: Path, scene: DemoSource, jitter_m: float, progress: Progress) -> dict[str, Any]:
    """All files; returns the content of scene.json."""
    (west, south, east, north), (ox, oy) = scene.native_grid.bounds, scene.origin_xy
    plane = west - ox, south - oy, east - ox, north - oy
    windows = list(_windows(scene))
    progress.start(len(windows) + len(blocks(plane)) + len(tracks(plane)), "synthetic scene")
    heights = _write_rasters(folder, scene, windows, progress)
    where = scene.spec, scene.native_grid, scene.origin_xy, DAY
    points = write_points(folder / "points.laz", *where, progress)
    gedi = write_gedi(folder / "gedi.h5", *where, jitter_m, progress)
    facts = _facts(folder, scene)
    facts["planted"] = {"trees": _count_trees(scene, plane), **heights, "points": points, "gedi": gedi}
    (folder / "scene.json").write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
    return facts


def _windows(scene: DemoSource) -> Iterator[Window]:
    grid = scene.native_grid
    for row in range(0, grid.height, _TILE_PX):
        for col in range(0, grid.width, _TILE_PX):
            yield Window(col, row, min(_TILE_PX, grid.width - col), min(_TILE_PX, grid.height - row))


def _write_rasters(
    folder: Path, scene: DemoSource, windows: list[Window], progress: Progress
) -> dict[str, Any]:
    """rgb.tif and chm.tif, from the same tiles; returns facts about the heights."""
    grid = scene.native_grid
    tags = {
        "ACQUISITION_DATE": DAY.isoformat(),
        "CANOPY_VERSION": __version__,
        "CANOPY_SOURCE": f"synthetic scene, seed {scene.spec.seed}",
    }
    scratch = folder / "rgb.scratch.tif"
    profile = {
        "driver": "GTiff", "dtype": "uint8", "count": 3, "height": grid.height, "width": grid.width,
        "crs": rasterio.crs.CRS.from_wkt(grid.crs.to_wkt()), "transform": grid.transform, "tiled": True,
        "blockxsize": 512, "blockysize": 512, "interleave": "pixel", "photometric": "RGB",
        "bigtiff": "IF_SAFER",
    }  # fmt: skip
    highest, total, covered, surfaces = 0.0, 0.0, 0, np.zeros(5, np.int64)
    with (
        rasterio.open(scratch, "w", **profile) as picture,
        CogWriter(folder / "chm.tif", grid, [BandSpec("canopy_height")], tags=tags) as chm,
    ):
        picture.colorinterp = (ColorInterp.red, ColorInterp.green, ColorInterp.blue)
        picture.descriptions = ("red", "green", "blue")
        picture.update_tags(AREA_OR_POINT="Area", **tags)
        for window in windows:
            tile = scene.tile(grid.window(window.row_off, window.col_off, window.height, window.width))
            picture.write(tile.rgb, window=window)
            chm.write(tile.chm[None], np.ones(tile.chm.shape, bool), window.row_off, window.col_off)
            highest, total = max(highest, float(tile.chm.max())), total + float(tile.chm.sum(dtype=float))
            covered += int((tile.chm >= _COVER_M).sum())
            surfaces += np.bincount(tile.surface.ravel(), minlength=5)
            progress.advance()
    rasterio.shutil.copy(
        scratch, folder / "rgb.tif", driver="COG", BLOCKSIZE=512, COMPRESS="DEFLATE", PREDICTOR="YES",
        OVERVIEW_RESAMPLING="AVERAGE", BIGTIFF="IF_SAFER",
    )  # fmt: skip
    scratch.unlink()
    pixels, names = grid.height * grid.width, ("ground", "tree", "road", "water", "roof")
    return {
        "highest_m": round(highest, 3),
        "mean_m": round(total / pixels, 4),
        "cover": round(covered / pixels, 6),
        "surface_px": dict(zip(names, surfaces.tolist(), strict=True)),
    }


def _count_trees(scene: DemoSource, plane: tuple[float, float, float, float], strip_m: float = 200.0) -> int:
    """Stems inside the scene, shrubs included, counted in squares."""
    west, south, east, north = plane
    xs = [*np.arange(west, east, strip_m).tolist(), east]
    ys = [*np.arange(south, north, strip_m).tolist(), north]
    return sum(
        len(trees_in(scene.spec, x0, y0, x1, y1)) for y0, y1 in pairwise(ys) for x0, x1 in pairwise(xs)
    )


def _facts(folder: Path, scene: DemoSource) -> dict[str, Any]:
    """scene.json but for what was planted."""
    grid = scene.native_grid
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
