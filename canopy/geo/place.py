"""Where somebody else's raster is, and how its pixels lie to those of a grid.

A `SourcePlace` may be rotated, sheared or south-up, which a `Grid` never is.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from affine import Affine
from odc.geo import CRS
from rasterio.io import DatasetReader

from canopy.errors import ImageryError
from canopy.files import public_name
from canopy.geo.crs import METRES_PER_DEGREE, ground_crs, metres_per_unit, transformer, x_period
from canopy.geo.grid import PHASE_TOL_PX, Grid


@dataclass(frozen=True)
class SourcePlace:
    """Where a raster's pixels are: any affine (rotated and south-up too), CRS, height and width."""

    transform: Affine
    crs: CRS
    height: int
    width: int

    @classmethod
    def of(cls, dataset: DatasetReader, crs: Any | None = None) -> SourcePlace:
        """The place of an open dataset; `crs` replaces a missing (or wrong) one. Raises ImageryError."""
        given = crs if crs is not None else dataset.crs
        if not given:
            raise ImageryError(
                "no coordinate reference system",
                where=public_name(dataset.name),
                remedy="write it into the file, e.g. rio edit-info --crs EPSG:32610 FILE",
            )
        if dataset.transform.determinant == 0:
            raise ImageryError("a geotransform without area", where=public_name(dataset.name))
        place = cls(dataset.transform, ground_crs(given, public_name(dataset.name)), *dataset.shape)
        place._check_degrees(public_name(dataset.name))
        return place

    @classmethod
    def of_grid(cls, grid: Grid) -> SourcePlace:
        """The place of a grid."""
        return cls(grid.transform, grid.crs, grid.height, grid.width)

    def _check_degrees(self, name: str) -> None:
        """Refuse degrees beyond the poles or far beyond a turn: metres in a file that is tagged EPSG:4326."""
        if not self.crs.geographic:
            return
        turn = x_period(self.crs) or 360.0
        x, y = self.xy(np.array([0, 0, self.height, self.height]), np.array([0, self.width, 0, self.width]))
        # Grids of the whole Earth may reach over the pole by half a pixel, and count from any meridian.
        pixel = abs(self.transform.d) + abs(self.transform.e)
        if abs(y).max() > turn / 4 + pixel or abs(x).max() > 1.5 * turn:
            raise ImageryError(
                f"x {x.min():.10g} to {x.max():.10g}, y {y.min():.10g} to {y.max():.10g} in {self.crs}",
                where=name,
                expected="degrees in a CRS of degrees",
                remedy="the file's CRS is wrong: set the one its coordinates are in, for example with "
                "rio edit-info --crs EPSG:32610 FILE",
            )

    @property
    def corners_rc(self) -> tuple[tuple[int, int], ...]:
        """(row, col) of the four corners, in turn."""
        return (0, 0), (0, self.width), (self.height, self.width), (self.height, 0)

    @property
    def is_north_up(self) -> bool:
        """Whether a `Grid` can hold it as it is."""
        t = self.transform
        return t.a > 0 and t.e < 0 and abs(t.b) <= 1e-9 * t.a and abs(t.d) <= 1e-9 * -t.e

    def north_up(self) -> SourcePlace:
        """The same place with rows from north to south, if only their order is against it; else itself."""
        t = self.transform
        if t.a <= 0 or t.e <= 0 or t.b or t.d:
            return self
        turned = Affine(t.a, 0.0, t.c, 0.0, -t.e, t.f + t.e * self.height)
        return replace(self, transform=turned)

    def xy(self, row: Any, col: Any) -> tuple[Any, Any]:
        """World x, y of pixel-space points (numbers or arrays); (0, 0) is a corner, (0.5, 0.5) a centre."""
        t = self.transform
        return t.a * col + t.b * row + t.c, t.d * col + t.e * row + t.f

    def rowcol(self, x: Any, y: Any) -> tuple[Any, Any]:
        """Pixel-space row, col of world points: the inverse of `xy`."""
        t = ~self.transform
        return t.d * x + t.e * y + t.f, t.a * x + t.b * y + t.c

    @property
    def gsd_m(self) -> float:
        """Ground sample distance in metres at the centre; of rotated pixels, that of a square as large."""
        side = abs(self.transform.determinant) ** 0.5
        x, y = self.xy(self.height / 2, self.width / 2)
        return Grid.of(self.crs, Affine(side, 0, x - side / 2, 0, -side, y + side / 2), (1, 1)).gsd_m

    def in_turn_of(self, grid: Grid) -> SourcePlace:
        """The same place, moved by whole turns round the Earth to where `grid` counts them."""
        period = x_period(self.crs)
        if period is None or period != x_period(grid.crs):
            return self
        middle = self.xy(self.height / 2, self.width / 2)[0]
        turns = round((sum(grid.bounds[0::2]) / 2 - middle) / period)
        t = self.transform
        return self if not turns else replace(self, transform=Affine(t.a, t.b, t.c + period * turns, *t[3:6]))

    def grid(self) -> Grid:
        """As a Grid. Raises InputError when rotated, sheared or south-up."""
        return Grid.of(self.crs, self.transform, (self.height, self.width))


# ---- how the two grids lie to each other --------------------------------------------------------
def lattice_ratio(place: SourcePlace, grid: Grid) -> int | None:
    """n when each target pixel is exactly n x n source pixels (1: same lattice), else None.

    The answer holds for the whole lattice, not only for this window.
    """
    if not place.is_north_up or not _same_place(place, grid.crs):
        return None
    source_px, source_py = place.transform.a, -place.transform.e
    ratio = round(grid.pixel[0] / source_px)
    # The drift over the whole dataset must stay below the tolerance, not only that of one pixel.
    longest = max(place.height, place.width)
    for target, source in zip(grid.pixel, (source_px, source_py), strict=True):
        if ratio < 1 or abs(target / source / ratio - 1) * longest > PHASE_TOL_PX:
            return None
    # Where the source's corner lies on the target's lattice, in source pixels from a target corner.
    _, _, row_phase, col_phase = grid.lattice
    col = (place.transform.c / grid.pixel[0] - col_phase) * ratio
    row = (-place.transform.f / grid.pixel[1] - row_phase) * ratio
    # Rounding of the phases (1e-6 target px) is far inside the tolerance.
    return ratio if max(abs(col - round(col)), abs(row - round(row))) < PHASE_TOL_PX else None


def _same_place(place: SourcePlace, crs: CRS) -> bool:
    """Whether coordinates mean the same in both CRSs, within 1e-3 px over the whole dataset."""
    if place.crs == crs:
        return True
    if place.crs.geographic != crs.geographic:
        return False
    cols, rows = np.meshgrid(np.linspace(0, place.width, 5), np.linspace(0, place.height, 5))
    x, y = place.xy(rows.ravel(), cols.ravel())
    tx, ty = transformer(place.crs, crs).transform(x, y)
    limit_x, limit_y = PHASE_TOL_PX * place.transform.a, PHASE_TOL_PX * -place.transform.e
    return bool(np.all(np.abs(tx - x) < limit_x) and np.all(np.abs(ty - y) < limit_y))


def shrink_factor(place: SourcePlace, grid: Grid) -> float:
    """Source pixels per target pixel (geometric mean of both axes) at the source's centre."""
    row, col = place.height / 2, place.width / 2
    x, y = place.xy(np.array([row, row, row + 1]), np.array([col, col + 1, col]))
    x, y = transformer(place.crs, grid.crs).transform(x, y)
    jacobian = np.array([[x[1] - x[0], x[2] - x[0]], [y[1] - y[0], y[2] - y[0]]])
    target_px, source_px = (grid.pixel[0] * grid.pixel[1]) ** 0.5, abs(place.transform.determinant) ** 0.5
    area = abs(np.linalg.det(jacobian))
    if not np.isfinite(area) or area == 0:
        # A source so large that its centre is out of the target's domain: compare sizes on the ground.
        unit_m, source_unit_m = (
            metres_per_unit(crs) if crs.projected else METRES_PER_DEGREE for crs in (grid.crs, place.crs)
        )
        return float(round(target_px * unit_m / (source_px * source_unit_m), 6))
    return float(round(target_px / area**0.5, 6))
