"""Which pixel centres lie inside polygons, the same for every window of one lattice."""

from __future__ import annotations

import numpy as np
import shapely
from shapely.geometry import MultiPolygon, Polygon

from canopy.geo.grid import Grid


def fill_polygons(geometry: Polygon | MultiPolygon, grid: Grid) -> np.ndarray:
    """Bool (height, width): pixel centres inside `geometry` (valid polygons in the grid's CRS).

    Even-odd scanlines over all rings. Crossings are computed in lattice pixels, counted from the CRS
    origin, so a pixel's answer has the same bits whichever window asks; GDAL's rasterizer works in
    window pixels and may differ on ties.
    """
    row0, col0, row_phase, col_phase = grid.lattice
    px, py = grid.pixel
    height, width = grid.shape
    edges = _edges(geometry)
    # Into lattice space with pixel CENTRES on the integers.
    cols = edges[:, 0::2] / px - col_phase - 0.5
    rows = -edges[:, 1::2] / py - row_phase - 0.5
    low, high = rows.min(axis=1), rows.max(axis=1)
    # An edge owns the centres with low <= row < high: each crossing is counted once.
    first = np.clip(np.ceil(low), row0, row0 + height).astype(np.int64)
    last = np.clip(np.ceil(high), row0, row0 + height).astype(np.int64)
    keep = last > first
    first, count = first[keep], (last - first)[keep]
    edge = np.repeat(np.flatnonzero(keep), count)
    row = np.repeat(first - np.cumsum(count) + count, count) + np.arange(count.sum())
    share = (row - rows[edge, 0]) / (rows[edge, 1] - rows[edge, 0])
    crossing = cols[edge, 0] + share * (cols[edge, 1] - cols[edge, 0])
    col = np.clip(np.ceil(crossing), col0, col0 + width).astype(np.int64) - col0
    toggles = np.zeros((height, width + 1), dtype=np.uint8)
    np.bitwise_xor.at(toggles, (row - row0, col), 1)
    return np.bitwise_xor.accumulate(toggles, axis=1)[:, :width].astype(bool)


def _edges(geometry: Polygon | MultiPolygon) -> np.ndarray:
    """Ring edges as float64 (n, 4): x0, y0, x1, y1, each written in one direction only."""
    rings = shapely.get_rings(shapely.get_parts(geometry))
    xy, ring = shapely.get_coordinates(rings, return_index=True)
    within = ring[1:] == ring[:-1]
    start, end = xy[:-1][within], xy[1:][within]
    # Shared edges of neighbouring polygons must give the same crossing: sort the end points.
    flip = (start[:, 1] > end[:, 1])[:, None]
    return np.hstack([np.where(flip, end, start), np.where(flip, start, end)])
