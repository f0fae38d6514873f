"""Canopy height of lidar: what both ways to it share, and a surface raster minus a terrain raster.

Point clouds, the other way, are `labels.lidar`.
"""

from __future__ import annotations

import contextlib
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import pyproj
import shapely
from odc.geo import CRS
from pydantic import Field
from rasterio.enums import ColorInterp
from rasterio.io import DatasetReader

from canopy import __version__
from canopy.config import Settings, option
from canopy.errors import AreaError, DataError, InputError
from canopy.files import check_output
from canopy.geo.area import AOI
from canopy.geo.cog import BandSpec, CogWriter
from canopy.geo.crs import ground_crs, metres_per_unit, project, to_crs, transformer, utm_crs
from canopy.geo.grid import Grid, tiles_over
from canopy.geo.place import SourcePlace
from canopy.geo.reading import open_raster, read_window
from canopy.geo.units import band_unit
from canopy.labels.points import HIGHEST_M, LOWEST_M, Bounds, vertical_unit
from canopy.labels.surface import ABOVE_M, BELOW_M
from canopy.runtime import NoProgress, Progress, log

BANDS = (BandSpec("canopy_height"), BandSpec("point_density", "1/m2"), BandSpec("valid", "1"))
_TILE_PX = 1024
# What is said of a DSM and of a DTM, where a file has several bands.
_NAMED = {
    "DSM": re.compile(r"(?<![a-z])(dsm|dom|mns|surface)(?![a-z])", re.IGNORECASE),
    "DTM": re.compile(r"(?<![a-z])(dtm|dem|dgm|mnt|terrain|bare[\s_-]*earth)(?![a-z])", re.IGNORECASE),
}
# A note is due where so many pixels are odd; and what stands on the ground is so high.
_NOTED_SHARE, _TALL_M = 0.02, 2.0
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


def grid_facts(path: Path, grid: Grid) -> dict[str, Any]:
    """What is known of a CHM before it is made: its name and place."""
    return {
        "file": str(path), "crs": str(grid.crs), "bounds": list(grid.bounds), "width_px": grid.width,
        "height_px": grid.height, "gsd_m": round(grid.gsd_m, 4),
    }  # fmt: skip


def map_facts(path: Path, grid: Grid) -> dict[str, Any]:
    """What is said of a CHM that was made: its place, mean height, cover and valid share."""
    count, total, top, over = 0, 0.0, 0.0, 0
    with open_raster(path) as made:
        for _, window in made.block_windows(1):
            heights = made.read(1, window=window)
            heights = heights[np.isfinite(heights)]
            count, total = count + heights.size, total + float(heights.sum(dtype=np.float64))
            top, over = max(top, float(heights.max(initial=0))), over + int((heights >= 2).sum())
    return grid_facts(path, grid) | {
        "valid_fraction": round(count / (grid.width * grid.height), 6), "highest_m": round(top, 3),
        "mean_height_m": round(total / max(count, 1), 3), "cover_2m": round(over / max(count, 1), 4),
    }  # fmt: skip


@dataclass(frozen=True)
class _Elevations:
    """A raster of elevations: which band they are in, metres per unit, and where it is."""

    file: DatasetReader
    band: int
    unit_m: float
    place: SourcePlace

    @classmethod
    def of(cls, file: DatasetReader, kind: str, options: ChmOptions) -> _Elevations:
        place, band = _place(file, options), _band(file, kind)
        told = band_unit(file, band)
        unit_m = vertical_unit(Path(file.name).name, told[1] if told else None, place.crs, options.units)
        return cls(file, band, unit_m, place)

    def read(self, grid: Grid) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Metres, float64 (h, w), on a grid; valid (h, w); and what had a value that is no elevation."""
        scale, offset = (x[self.band - 1] for x in (self.file.scales, self.file.offsets))

        def metres(raw: np.ndarray, valid: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
            values = (raw.astype(np.float64) * scale + offset) * self.unit_m
            sane = (values[0] > LOWEST_M) & (values[0] < HIGHEST_M)
            # Bands of a decoder are all resampled: the second one says where an impossible value was.
            return np.stack([np.where(sane, values[0], 0), ~sane]), valid

        values, valid = read_window(self.file, grid, [self.band], crs=self.place.crs, decode=metres)
        strange = valid & (values[1] > 0)
        return values[0].astype(np.float64), valid & ~strange, strange


def _place(file: DatasetReader, options: ChmOptions) -> SourcePlace:
    """Where a raster is: by its own CRS, else by the one that was named."""
    given = options.input_crs if options.input_crs is not None else options.crs
    try:
        return SourcePlace.of(file, ground_crs(file.crs, file.name))
    except InputError as error:
        if given is not None and not _is_ground(file.crs):
            return SourcePlace.of(file, given)
        remedy = (
            error.remedy
            if _is_ground(file.crs)
            else "name it with --input-crs, for example --input-crs EPSG:32610"
        )
        raise DataError(
            error.what, where=Path(file.name).name, expected=error.expected, remedy=remedy
        ) from error


def _is_ground(crs: Any) -> bool:
    with contextlib.suppress(InputError):
        return bool(ground_crs(crs, ""))
    return False


def _band(file: DatasetReader, kind: str) -> int:
    """The band of a surface or a terrain: the only one, or the only one that says so."""
    usable = [i for i, colour in enumerate(file.colorinterp, 1) if colour != ColorInterp.alpha]
    telling = [i for i in usable if _NAMED[kind].search(file.descriptions[i - 1] or "")]
    if len(usable) == 1 or len(telling) == 1:
        return usable[0] if len(usable) == 1 else telling[0]
    listed = ", ".join(f"{i} {file.descriptions[i - 1] or ''}".strip() for i in usable[:12])
    raise DataError(
        f"holds {len(usable)} bands ({listed})", where=Path(file.name).name,
        expected=f"one band of elevations, or one that says {kind}",
        remedy=f"take the right one out: rio stack FILE --bidx N -o {kind.lower()}.tif",
    )  # fmt: skip


def chm_from_rasters(
    dsm: str | Path,
    dtm: str | Path,
    out: str | Path,
    options: ChmOptions | None = None,
    *,
    area: AOI | None = None,
    progress: Progress | None = None,
    dry_run: bool = False,
) -> dict[str, Any]:
    """Write `dsm - dtm` in metres as a COG with the bands of `chm_from_points`; returns what was done.

    Of several bands the one that says DSM or DTM is taken. The CHM lies on the DSM's own grid where that is
    metric and of the asked pixel; otherwise both are brought to the asked grid first, averaged where it is
    coarser. Below 0 becomes 0 down to -1 m; lower, or higher than 130 m, is nodata. `point_density` is nodata
    everywhere: rasters do not tell it. With `dry_run` only what would be made is returned.

    Raises InputError for rasters that do not overlap, have no CRS, or are not a surface and its terrain.
    """
    options, progress = options or ChmOptions(), progress or NoProgress()
    out = check_output(out, [dsm, dtm], overwrite=options.overwrite)[0]
    with contextlib.ExitStack() as stack:
        files = [stack.enter_context(open_raster(path)) for path in (dsm, dtm)]
        _check_datums(files)
        pair = [_Elevations.of(file, kind, options) for file, kind in zip(files, _NAMED, strict=True)]
        grid = _grid_of(pair, options, area)
        if dry_run:
            return grid_facts(out, grid)
        source = f"DSM {Path(dsm).name} minus DTM {Path(dtm).name}"
        tags = {"CANOPY_VERSION": __version__, "CANOPY_SOURCE": source}
        with CogWriter(out, grid, BANDS, tags=tags, overwrite=options.overwrite) as writer:
            counts = _subtract(writer, pair, area, progress)
            _judge(counts, dsm, dtm)
    return {**map_facts(out, grid), "sha256": writer.sha256}


def _check_datums(pair: list[DatasetReader]) -> None:
    """Refuse a surface above the ellipsoid over a terrain above the geoid: tens of metres of false forest."""
    stated = []
    for ds in pair:
        crs = pyproj.CRS.from_user_input(ds.crs) if ds.crs else None
        if crs is not None and crs.is_compound:
            vertical = crs.sub_crs_list[1]  # of one datum there are CRSs in metres and in feet
            stated.append(vertical.datum.name if vertical.datum else vertical.name)
        elif crs is not None and len(crs.axis_info) == 3:
            stated.append("the ellipsoid")
    if len(stated) == 2 and stated[0] != stated[1]:
        raise DataError(
            f"its heights are above {stated[0]}, those of {Path(pair[1].name).name} above {stated[1]}",
            where=Path(pair[0].name).name,
            expected="a DSM and a DTM above the same vertical datum",
            remedy="bring one to the other's with gdalwarp -t_srs",
        )


def _grid_of(pair: list[_Elevations], options: ChmOptions, area: AOI | None) -> Grid:
    """The grid where both rasters lie, or the part of it that was asked for."""
    outlines = [shapely.Polygon([p.xy(r, c) for r, c in p.corners_rc]) for p in (one.place for one in pair)]
    crs = choose_crs(
        [(one.place.crs, shape.bounds) for one, shape in zip(pair, outlines, strict=True)], options
    )
    shapes = [project(shape, one.place.crs, crs) for one, shape in zip(pair, outlines, strict=True)]
    both = shapes[0].intersection(shapes[1])
    if both.area <= 0:
        raise AreaError("the DSM and the DTM do not overlap", where=Path(pair[0].file.name).name)
    grid, place = choose_grid([both.bounds], crs, options.gsd, area), pair[0].place.north_up()
    if place.crs != crs or not place.is_north_up:
        return grid
    own = place.grid()
    if any(abs(side / options.gsd - 1) >= 1e-6 for side in own.pixel):
        return grid
    # On the DSM's own lattice pixels are copied, whatever its phase.
    west, south, east, north = grid.bounds
    r0, c0 = (max(round(v), 0) for v in own.rowcol(west, north))
    r1, c1 = (min(round(v), n) for v, n in zip(own.rowcol(east, south), own.shape, strict=True))
    return own.window(r0, c0, r1 - r0, c1 - c0) if r1 > r0 and c1 > c0 else grid


def _subtract(
    writer: CogWriter, pair: list[_Elevations], area: AOI | None, progress: Progress
) -> Counter[str | float]:
    """Write the difference tile by tile; counts of pixels by what they are.

    Numbers among the keys are values, 0 or lower, that surface and terrain share exactly.
    """
    counts: Counter[str | float] = Counter()
    tiles = tiles_over(writer.grid, _TILE_PX)
    progress.start(len(tiles), "surface minus terrain")
    for tile in tiles:
        (top, ok_top, odd_top), (ground, ok_ground, odd_ground) = (one.read(tile) for one in pair)
        inside = area.mask(tile) if area is not None else np.ones(tile.shape, bool)
        both = ok_top & ok_ground & inside
        shared, number = np.unique(top[both & (top == ground) & (top <= 0)], return_counts=True)
        counts.update(dict(zip(shared.tolist(), number.tolist(), strict=True)))
        height = top - ground
        low, high = both & (height < -BELOW_M), both & (height > ABOVE_M)
        valid = both & ~low & ~high
        height = np.round(np.maximum(height, 0), 3)
        bands = np.stack([height, np.zeros_like(height), valid]).astype(np.float32)
        present = np.stack([valid, np.zeros_like(valid), np.ones_like(valid)])
        writer.write(bands, present, *writer.grid.offset_of(tile))
        odd, bare = (odd_top | odd_ground) & inside, valid & (ground == 0) & (top > _TALL_M)
        for name, mask in (("all", inside), ("both", both), ("odd", odd), ("bare", bare), ("low", low),
                           ("high", high)):  # fmt: skip
            counts[name] += int(mask.sum())
        progress.advance()
    return counts


def _judge(counts: Counter[str | float], dsm: str | Path, dtm: str | Path) -> None:
    """Refuse pairs that cannot be a surface and its terrain; say what may be an undeclared nodata value."""
    both = counts["both"]
    if not both:
        raise DataError(
            "no pixel where both rasters have an elevation", where=dsm,
            expected=f"elevations from {LOWEST_M:g} to {HIGHEST_M:g} m", remedy="see --units",
        )  # fmt: skip
    if counts["odd"]:
        log.warning(
            f"note: {counts['odd'] / counts['all']:.1%} of the pixels have impossible elevations and count "
            "as missing: an undeclared nodata value, or not metres"
        )
    values = [value for value in counts if not isinstance(value, str) and counts[value] > _NOTED_SHARE * both]
    found = [f"surface and terrain are both exactly {v:g} m in {counts[v] / both:.0%}" for v in values]
    if counts["bare"] > _NOTED_SHARE * both:
        found.append(f"the terrain alone is exactly 0 m in {counts['bare'] / both:.0%}")
    if found:
        log.warning(
            f"note: {', '.join(found)} of the pixels; if that means no data there, declare it in the files "
            f"(rio edit-info --nodata {[*values, 0.0][0]:g} FILE)"
        )
    for name, where in (("low", "below"), ("high", f"more than {ABOVE_M:g} m above")):
        if counts[name] > both / 2:
            raise DataError(
                f"lies {where} {Path(dtm).name} in {counts[name] / both:.0%} of the pixels",
                where=dsm,
                expected="a surface (DSM) and its terrain (DTM) in the same unit and vertical datum",
                remedy="swap --dsm and --dtm, or see --units",
            )
