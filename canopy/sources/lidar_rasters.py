"""A surface model minus a terrain model: the CHM of lidar that somebody else has already gridded."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import numpy as np
from odc.geo import CRS
from rasterio.io import DatasetReader

from canopy import __version__
from canopy.errors import AreaError, DataError, InputError
from canopy.geo.aoi import AOI
from canopy.geo.cog import CogWriter
from canopy.geo.crs import project, to_crs
from canopy.geo.grid import Grid
from canopy.geo.raster import SourcePlace, open_raster, read_window
from canopy.geo.tiles import tiles_over
from canopy.runtime import NoProgress, Progress, log
from canopy.sources.lidar import BANDS
from canopy.sources.lidar_header import METRES
from canopy.sources.lidar_surface import ABOVE_M, BELOW_M
from canopy.sources.lidar_target import ChmOptions, check_out, choose_crs, choose_grid

_TILE_PX = 1024
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
    options, progress, out = options or ChmOptions(), progress or NoProgress(), Path(out)
    options.check()
    check_out(out, options.overwrite)
    with contextlib.ExitStack() as stack:
        pair = [stack.enter_context(open_raster(path)) for path in (dsm, dtm)]
        given = options.input_crs if options.input_crs is not None else options.crs
        crss = [_crs_of(ds, given) for ds in pair]
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
        top, ok_top = _metres(pair[0], crss[0], units[0], tile.core)
        ground, ok_ground = _metres(pair[1], crss[1], units[1], tile.core)
        both = ok_top & ok_ground
        if area is not None:
            both &= area.mask(tile.core)
        height = top - ground
        low, high = both & (height < -BELOW_M), both & (height > ABOVE_M)
        valid = both & ~low & ~high
        height = np.round(np.maximum(height, 0), 3).astype(np.float32)
        marks = np.stack([height, np.zeros_like(height), valid.astype(np.float32)])
        present = np.stack([valid, np.zeros_like(valid), np.ones_like(valid)])
        writer.write(marks, present, *writer.grid.offset_of(tile.core))
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
    return (values[0].astype(np.float64) * ds.scales[0] + ds.offsets[0]) * unit, valid


def _judge(facts: dict[str, Any], dsm: str | Path, dtm: str | Path) -> None:
    """Refuse pairs that cannot be a surface and its terrain."""
    if not facts["both"]:
        raise DataError("no pixel where both rasters have data", where=dsm)
    for name, where in (("low", "below"), ("high", f"more than {ABOVE_M:g} m above")):
        if facts[name] > facts["both"] / 2:
            raise DataError(
                f"lies {where} {Path(dtm).name} in {facts[name] / facts['both']:.0%} of the pixels",
                where=dsm,
                expected="a surface (DSM) and its terrain (DTM) in the same unit and vertical datum",
                remedy="swap --dsm and --dtm, or see --units",
            )
