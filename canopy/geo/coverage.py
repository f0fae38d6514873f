"""Which share of each pixel polygons cover: exact polygon-pixel intersection (exactextract; Baston,
https://github.com/isciences/exactextract).
"""

from __future__ import annotations

import numpy as np
import shapely
from shapely.geometry import MultiPolygon, Polygon, mapping
from shapely.geometry.base import BaseGeometry

from canopy.geo.grid import Grid


def coverage(shape: BaseGeometry, grid: Grid) -> np.ndarray | None:
    """Fraction of each pixel (h, w) that a shape in the grid's CRS covers; None where it is nothing."""
    from exactextract import exact_extract
    from exactextract.raster import NumPyRasterSource

    frame = shapely.box(*grid.bounds)
    if not shape.intersects(frame):
        return None
    if shape.contains(frame):
        return np.ones(grid.shape)
    part = shape.intersection(frame)
    if part.area == 0:
        return None
    source = NumPyRasterSource(np.zeros(grid.shape, np.uint8), *grid.bounds)
    feature = {"type": "Feature", "properties": {}, "geometry": mapping(_areas(part))}
    found = exact_extract(source, [feature], ["cell_id", "coverage"])[0]["properties"]
    share = np.zeros(grid.height * grid.width)
    share[found["cell_id"]] = found["coverage"]
    return share.reshape(grid.shape)


def _areas(shape: BaseGeometry) -> BaseGeometry:
    """Without the points and lines that a cut along an edge can leave."""
    if isinstance(shape, Polygon | MultiPolygon):
        return shape
    return shapely.union_all([p for p in shapely.get_parts(shape) if isinstance(p, Polygon | MultiPolygon)])
