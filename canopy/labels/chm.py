"""Canopy height of lidar: what both ways to it share, and a surface raster minus a terrain raster.

Point clouds, the other way, are `labels.lidar`.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import pyproj
import shapely
from odc.geo import CRS
from pydantic import Field
from rasterio.io import DatasetReader

from canopy import __version__
from canopy.config import Settings, option
from canopy.errors import AreaError, DataError, InputError
from canopy.files import check_output
from canopy.geo.area import AOI
from canopy.geo.cog import BandSpec, CogWriter
from canopy.geo.crs import metres_per_unit, project, to_crs, transformer, utm_crs
from canopy.geo.grid import Grid, tiles_over
from canopy.geo.place import SourcePlace
from canopy.geo.reading import open_raster, read_window
from canopy.labels.points import METRES, Bounds, vertical_unit
from canopy.labels.surface import ABOVE_M, BELOW_M
from canopy.runtime import NoProgress, Progress, log

BANDS = (BandSpec("canopy_height"), BandSpec("point_density", "1/m2"), BandSpec("valid", "1"))
_TILE_PX = 1024
# Elevations beyond the Earth's are a nodata value that the file does not declare.
LOWEST_M, HIGHEST_M = -500.0, 9_000.0
_UNIT_NAMES = {
    **dict.fromkeys(("m", "metre", "meter", "metres", "meters"), METRES["m"]),
    **dict.fromkeys(("ft", "foot", "feet"), METRES["ft"]),
    **dict.fromkeys(("us-ft", "us survey foot", "us_survey_foot", "ftus"), METRES["us-ft"]),
}
_POLICY = "zero: 0 m of canopy; mask: nodata; keep: as canopy."
Policy = Literal["zero", "mask", "keep"]


class ChmOptions(Settings):
    """How to make a CHM: the options of `canopy data chm`.

    `crs` is also that of files without one, unless `input_crs` is given; by default it is the files' own
    where that is true to scale in metres, else the area's UTM zone.
    """

    gsd: Annotated[float, Field(ge=0.1, le=30)] = option(1.0, "Ground metres per pixel.")
    crs: str | None = option(
        None, "CRS of the CHM, in metres; also of files that carry none. Default: the points' own, or UTM."
    )
    input_crs: str | None = option(None, "CRS of files that carry none. Default: --crs.")
    ground: Literal["auto", "class", "csf"] = option(
        "auto", "auto, class (LAS class 2) or csf (cloth simulation)."
    )
    buildings: Policy = option("zero", f"Class 6. {_POLICY}")
    water: Policy = option("zero", f"Class 9. {_POLICY}")
    bridges: Policy = option("zero", f"Class 17. {_POLICY}")
    wires: Policy = option("zero", f"Classes 13-16. {_POLICY}")
    units: Literal["auto", "m", "ft", "us-ft"] = option(
        "auto", "Unit of elevations: auto (as the file says, else that of x and y), m, ft or us-ft."
    )
    pit_width_m: Annotated[float, Field(ge=0, le=10)] = option(
        1.0, "Close holes in crowns up to this wide; 0 keeps them."
    )
    fill_px: Annotated[int, Field(ge=0, le=10)] = option(
        0, "Interpolate pixels without returns this near to others."
    )
    workers: Annotated[int, Field(ge=1)] | None = option(None, "Processes. Default: up to 4.")
    overwrite: bool = option(False, "Replace outputs that exist.")


def choose_crs(inputs: Sequence[tuple[CRS, Bounds]], options: ChmOptions) -> CRS:
    """The CHM's CRS, projected and in metres, for inputs with their bounds in it; see `ChmOptions`."""
    if options.crs is not None:
        crs = to_crs(options.crs)
        if _is_metric(crs):
            return crs
        # It named the CRS of files without one: those may well be in feet. Elsewhere it is a mistake.
        if options.input_crs is not None or any(own != crs for own, _ in inputs):
            raise InputError(
                f"{crs} is not in metres", where="--crs", expected="a projected CRS in metres for the CHM"
            )
    own, (west, south, east, north) = inputs[0]
    x, y = (west + east) / 2, (south + north) / 2
    if _is_metric(own) and abs(Grid.of(own, (1, 0, x, 0, -1, y), (1, 1)).gsd_m - 1) < 0.01:
        return own
    return utm_crs(*transformer(own, "EPSG:4326").transform(x, y))


def _is_metric(crs: CRS) -> bool:
    return crs.proj.is_projected and abs(metres_per_unit(crs) - 1) < 1e-9


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
    return grid


def map_facts(path: Path, grid: Grid) -> dict[str, Any]:
    """What is said of a CHM that was made: its place, mean height, cover and valid share."""
    count, total, top, over = 0, 0.0, 0.0, 0
    with open_raster(path) as made:
        for _, window in made.block_windows(1):
            heights = made.read(1, window=window)
            heights = heights[np.isfinite(heights)]
            count, total = count + heights.size, total + float(heights.sum(dtype=np.float64))
            top, over = max(top, float(heights.max(initial=0))), over + int((heights >= 2).sum())
    return {
        "file": str(path), "crs": str(grid.crs), "bounds": list(grid.bounds), "width_px": grid.width,
        "height_px": grid.height, "gsd_m": round(grid.gsd_m, 4),
        "valid_fraction": round(count / (grid.width * grid.height), 6), "highest_m": round(top, 3),
        "mean_height_m": round(total / max(count, 1), 3), "cover_2m": round(over / max(count, 1), 4),
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
            "pixels; if that means no data there, declare it in the files (rio edit-info --nodata 0 FILE)"
        )
    for name, where in (("low", "below"), ("high", f"more than {ABOVE_M:g} m above")):
        if counts[name] > both / 2:
            raise DataError(
                f"lies {where} {Path(dtm).name} in {counts[name] / both:.0%} of the pixels",
                where=dsm,
                expected="a surface (DSM) and its terrain (DTM) in the same unit and vertical datum",
                remedy="swap --dsm and --dtm, or see --units",
            )
