"""What CHM to make: the options, and the CRS and grid that follow from them and from the input."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import shapely
from odc.geo import CRS

from canopy.errors import AreaError, InputError
from canopy.geo.aoi import AOI
from canopy.geo.crs import metres_per_unit, output_crs, to_crs, to_lonlat
from canopy.geo.grid import Grid
from canopy.sources.lidar_surface import POLICIES, Policy

Bounds = tuple[float, float, float, float]
GROUNDS = ("auto", "class", "csf")
BLOCK_M = 256.0
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
        block_m: side of a block of work; results do not depend on it where ground is classified.
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


def check_out(out: Path, overwrite: bool) -> None:
    """What `CogWriter` would refuse at the end is refused before hours of work."""
    if out.exists() and not (overwrite and out.is_file()):
        raise InputError("the file exists", where=out, remedy="use --overwrite to replace it")
    if not out.parent.is_dir():
        raise InputError("no such folder", where=out.parent, remedy="create it first")
