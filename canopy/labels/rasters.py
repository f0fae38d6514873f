"""A surface and a terrain raster, lidar that somebody else has gridded, to canopy height in metres."""

from __future__ import annotations

import contextlib
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyproj
from odc.geo import CRS
from rasterio.io import DatasetReader

from canopy import __version__
from canopy.errors import AreaError, DataError, InputError
from canopy.files import check_output
from canopy.geo.area import AOI
from canopy.geo.cog import CogWriter
from canopy.geo.crs import project
from canopy.geo.grid import Grid, tiles_over
from canopy.geo.place import SourcePlace
from canopy.geo.reading import open_raster, read_window
from canopy.labels.chm import BANDS, ChmOptions, choose_crs, choose_grid, map_facts
from canopy.labels.points import METRES, vertical_unit
from canopy.labels.surface import ABOVE_M, BELOW_M
from canopy.runtime import NoProgress, Progress, log

_TILE_PX = 1024
# Elevations beyond the Earth's are a nodata value that the file does not declare.
LOWEST_M, HIGHEST_M = -500.0, 9_000.0
_UNIT_NAMES = {
    **dict.fromkeys(("m", "metre", "meter", "metres", "meters"), METRES["m"]),
    **dict.fromkeys(("ft", "foot", "feet"), METRES["ft"]),
    **dict.fromkeys(("us-ft", "us survey foot", "us_survey_foot", "ftus"), METRES["us-ft"]),
}


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
    out = check_output(out, [dsm, dtm], overwrite=options.overwrite)[0]
    with contextlib.ExitStack() as stack:
        pair = [stack.enter_context(open_raster(path)) for path in (dsm, dtm)]
        _check_datums(pair)
        given = options.input_crs if options.input_crs is not None else options.crs
        places = [SourcePlace.of(ds, ds.crs or given) for ds in pair]
        units = [
            vertical_unit(
                Path(ds.name).name, _UNIT_NAMES.get((ds.units[0] or "").strip().lower()), p.crs, options.units
            )
            for ds, p in zip(pair, places, strict=True)
        ]
        grid = _grid_of(pair, places, options, area)
        source = f"DSM {Path(dsm).name} minus DTM {Path(dtm).name}"
        tags = {"CANOPY_VERSION": __version__, "CANOPY_SOURCE": source}
        with CogWriter(out, grid, BANDS, tags=tags, overwrite=options.overwrite) as writer:
            counts = _subtract(writer, pair, [p.crs for p in places], units, area, progress)
            _judge(counts, dsm, dtm)
    return {**map_facts(out, grid), "sha256": writer.sha256}


def _check_datums(pair: list[DatasetReader]) -> None:
    """Refuse a surface above the ellipsoid over a terrain above the geoid: tens of metres of false forest."""
    stated = []
    for ds in pair:
        crs = pyproj.CRS.from_user_input(ds.crs) if ds.crs else None
        if crs is not None and crs.is_compound:
            stated.append(crs.sub_crs_list[1].name)
        elif crs is not None and len(crs.axis_info) == 3:
            stated.append("ellipsoidal height")
    if len(stated) == 2 and stated[0] != stated[1]:
        raise DataError(
            f"its heights are {stated[0]}, those of {Path(pair[1].name).name} are {stated[1]}",
            where=pair[0].name,
            expected="a DSM and a DTM above the same vertical datum",
            remedy="bring one to the other's with gdalwarp -t_srs",
        )


def _grid_of(
    pair: list[DatasetReader], places: list[SourcePlace], options: ChmOptions, area: AOI | None
) -> Grid:
    """The grid where both rasters lie, or the part of it that was asked for."""
    for ds, place in zip(pair, places, strict=True):
        if not place.is_north_up:
            raise InputError("a rotated raster", where=ds.name, expected="north-up")
    rects = [AOI.from_grid(place.grid()) for place in places]
    crs = choose_crs([(rect.crs, rect.geometry.bounds) for rect in rects], options)
    shapes = [project(rect.geometry, rect.crs, crs) for rect in rects]
    both = shapes[0].intersection(shapes[1])
    if both.area <= 0:
        raise AreaError("the DSM and the DTM do not overlap", where=pair[0].name)
    grid, own = choose_grid([both.bounds], crs, options.gsd, area), places[0].grid()
    if own.crs != crs or any(abs(side / options.gsd - 1) >= 1e-6 for side in own.pixel):
        return grid
    # On the DSM's own lattice pixels are copied, whatever its phase.
    west, south, east, north = grid.bounds
    r0, c0 = (max(round(v), 0) for v in own.rowcol(west, north))
    r1, c1 = (min(round(v), n) for v, n in zip(own.rowcol(east, south), own.shape, strict=True))
    return own.window(r0, c0, r1 - r0, c1 - c0) if r1 > r0 and c1 > c0 else grid


def _subtract(
    writer: CogWriter, pair: list[DatasetReader], crss: list[CRS], units: list[float], area: AOI | None,
    progress: Progress,
) -> Counter[str]:  # fmt: skip
    """Write the difference tile by tile; counts of pixels by what they are."""
    counts: Counter[str] = Counter()
    tiles = tiles_over(writer.grid, _TILE_PX)
    progress.start(len(tiles), "surface minus terrain")
    for tile in tiles:
        top, ok_top = _metres(pair[0], crss[0], units[0], tile)
        ground, ok_ground = _metres(pair[1], crss[1], units[1], tile)
        both = ok_top & ok_ground
        zeros = both & (top == 0) & (ground == 0)
        if area is not None:
            both &= area.mask(tile)
        height = top - ground
        low, high = both & (height < -BELOW_M), both & (height > ABOVE_M)
        valid = both & ~low & ~high
        height = np.round(np.maximum(height, 0), 3)
        bands = np.stack([height, np.zeros_like(height), valid]).astype(np.float32)
        present = np.stack([valid, np.zeros_like(valid), np.ones_like(valid)])
        writer.write(bands, present, *writer.grid.offset_of(tile))
        for name, mask in (("both", both), ("zeros", zeros), ("low", low), ("high", high)):
            counts[name] += int(mask.sum())
        progress.advance()
    return counts


def _metres(ds: DatasetReader, crs: CRS, unit: float, grid: Grid) -> tuple[np.ndarray, np.ndarray]:
    """Elevation float64 (h, w) in metres and valid (h, w) on a grid."""
    values, valid = read_window(ds, grid, [1], crs=crs)
    metres = (values[0].astype(np.float64) * ds.scales[0] + ds.offsets[0]) * unit
    return metres, valid & (metres > LOWEST_M) & (metres < HIGHEST_M)


def _judge(counts: Counter[str], dsm: str | Path, dtm: str | Path) -> None:
    """Refuse pairs that cannot be a surface and its terrain."""
    both = counts["both"]
    if not both:
        raise DataError("no pixel where both rasters have data", where=dsm)
    if counts["zeros"] > 0.02 * both:
        log.warning(
            f"note: surface and terrain are both exactly 0 m in {counts['zeros'] / both:.0%} of the "
            "pixels; if that means no data there, declare it in the files (gdal_edit.py -a_nodata 0)"
        )
    for name, where in (("low", "below"), ("high", f"more than {ABOVE_M:g} m above")):
        if counts[name] > both / 2:
            raise DataError(
                f"lies {where} {Path(dtm).name} in {counts[name] / both:.0%} of the pixels",
                where=dsm,
                expected="a surface (DSM) and its terrain (DTM) in the same unit and vertical datum",
                remedy="swap --dsm and --dtm, or see --units",
            )
