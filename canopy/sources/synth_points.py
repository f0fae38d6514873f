"""Airborne lidar of the synthetic forest: a classified LAZ file, block by block.

One pulse falls in every cell of `PULSE_CELL_M`; where in it, and what it does, is hashed from the cell, so
that the file does not depend on how the scene is cut. The first return of a pulse lies on the surface of the
pixel that it hits (roof, crown or ground) with `RANGE_SIGMA_M` of ranging noise, at most three of it: no
point but noise (class 7) lies more than that above `chm + dtm` of its pixel.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from datetime import date
from pathlib import Path

import numpy as np

from canopy.errors import MissingDependencyError
from canopy.geo.grid import Grid
from canopy.runtime import Progress
from canopy.sources.synth import ROOF, TREE, WATER, SceneSpec, hash01
from canopy.sources.synth_render import truth

PULSE_CELL_M = 0.4
RANGE_SIGMA_M = 0.02
BLOCK_CELLS = 256
CLASSES = {2: "ground", 3: "low vegetation", 5: "high vegetation", 6: "building", 7: "noise", 9: "water"}
_HIGH_M = 2.0  # vegetation from here on is class 5, below it class 3
_EPOCH_S = 4.0e8  # any GPS second will do; returns of a pulse share theirs


@dataclass(frozen=True)
class Returns:
    """Lidar returns as columns: metres in the scene's plane, LAS class, number, count, and their pulse."""

    x: np.ndarray
    y: np.ndarray
    z: np.ndarray
    kind: np.ndarray
    number: np.ndarray
    count: np.ndarray
    seconds: np.ndarray

    def __len__(self) -> int:
        return len(self.x)

    def take(self, keep: np.ndarray) -> Returns:
        """The rows of a mask or an index."""
        return Returns(**{name: getattr(self, name)[keep] for name in self.__dataclass_fields__})


def require_laspy() -> None:
    """Raises MissingDependencyError where LAZ cannot be written."""
    try:
        import laspy
        import lazrs  # noqa: F401 - laspy finds it by itself
    except ImportError as error:
        raise MissingDependencyError(
            f"point clouds need {error.name}", remedy="run: pip install 'canopy-height[lidar,gedi]'"
        ) from error
    del laspy


def blocks(bounds: tuple[float, float, float, float]) -> list[tuple[int, int]]:
    """Indices (i, j) of the pulse blocks that meet (west, south, east, north), from the south-west."""
    side = BLOCK_CELLS * PULSE_CELL_M
    west, south, east, north = (v / side for v in bounds)
    rows = range(int(np.floor(south)), int(np.ceil(north)))
    return [(i, j) for j in rows for i in range(int(np.floor(west)), int(np.ceil(east)))]


def returns_in(spec: SceneSpec, block: tuple[int, int], bounds: tuple[float, float, float, float]) -> Returns:
    """All returns of one block whose pulses fall within `bounds` of the scene's plane (metres)."""
    cells = [np.arange(BLOCK_CELLS, dtype=np.int64) + BLOCK_CELLS * k for k in block]
    i, j = (c.ravel() for c in np.meshgrid(*cells))
    draw = [hash01(spec.seed, 200 + n, i, j) for n in range(8)]
    x, y = (i + 0.1 + 0.8 * draw[0]) * PULSE_CELL_M, (j + 0.1 + 0.8 * draw[1]) * PULSE_CELL_M
    west, south, east, north = bounds
    inside = (x > west) & (x < east) & (y > south) & (y < north)
    i, j, x, y, draw = i[inside], j[inside], x[inside], y[inside], [d[inside] for d in draw]
    if not len(x):
        return Returns(*[np.zeros(0)] * 7)
    gsd = spec.gsd_m
    cols, rows = np.floor(x / gsd).astype(np.int64), np.floor(-y / gsd).astype(np.int64)
    col, row = int(cols.min()), int(rows.min())
    seen = truth(spec, col * gsd, -row * gsd, int(rows.max()) - row + 1, int(cols.max()) - col + 1)
    at = (rows - row, cols - col)
    seconds = _EPOCH_S + (j % 2**16 * 2**16 + i % 2**16) * 1e-6
    return _trace(x, y, seconds, draw, seen.chm[at], seen.dtm[at], seen.surface[at], seen.roof[at])


def _trace(
    x: np.ndarray, y: np.ndarray, seconds: np.ndarray, draw: list[np.ndarray],
    chm: np.ndarray, dtm: np.ndarray, surface: np.ndarray, roof: np.ndarray,
) -> Returns:  # fmt: skip
    """Up to three returns per pulse: the surface, something inside the crown, and the ground below it."""
    crown = surface == TREE
    first = dtm + np.maximum(chm, roof)
    kind = np.where(crown, np.where(chm >= _HIGH_M, 5, 3), 2).astype(np.uint8)
    kind[surface == ROOF], kind[surface == WATER] = 6, 9
    # Leaves let more light through than one thinks; tall crowns a little less.
    inside = crown & (chm > 3.0) & (draw[2] < 0.28)
    below = crown & (draw[3] < 0.34 - 0.006 * chm)
    count = (1 + inside + below).astype(np.uint8)
    depth = (0.15 + 0.75 * draw[4]) * chm
    parts = [
        (np.ones(len(x), bool), first, kind, np.ones(len(x), np.uint8)),
        (inside, first - depth, np.where(chm - depth >= _HIGH_M, 5, 3), np.full(len(x), 2)),
        (below, dtm, np.full(len(x), 2), count),
    ]
    lost = ((surface == WATER) & (draw[5] < 0.7)) | (draw[5] > 0.995)
    columns = []
    for n, (keep, z, kinds, number) in enumerate(parts):
        keep = keep & ~lost
        # Three sums of uniforms make a bell; each return has its own error.
        bell = sum(((draw[6] * (7 + 10 * n + k)) % 1.0 for k in range(3)), -1.5) * 2.0
        z = z + RANGE_SIGMA_M * bell
        columns.append((x[keep], y[keep], z[keep], kinds[keep], number[keep], count[keep], seconds[keep]))
    # Birds and multipath: about one pulse in three thousand, far above or below everything.
    odd = (draw[7] < 3e-4) & ~lost
    off = np.where(draw[4] < 0.5, 25.0 + 60.0 * draw[3], -6.0 - 12.0 * draw[3])
    base = np.where(off > 0, first, dtm)
    one = np.ones(int(odd.sum()))
    columns.append((x[odd], y[odd], (base + off)[odd], 7 * one, one, one, seconds[odd] + 5e-7))
    dtypes = (np.float64, np.float64, np.float64, np.uint8, np.uint8, np.uint8, np.float64)
    joined = [np.concatenate(c).astype(t) for c, t in zip(zip(*columns, strict=True), dtypes, strict=True)]
    flown = Returns(*joined)
    return flown.take(np.lexsort((flown.number, flown.seconds)))


def write_points(
    path: Path, spec: SceneSpec, grid: Grid, origin_xy: tuple[float, float], day: date, progress: Progress
) -> dict[str, int]:
    """Write the LAZ file (format 6, cm) of the scene on `grid`; returns counts by class name and in total.

    Memory does not depend on the scene's size: points go out block by block, in the blocks' fixed order.
    """
    import laspy
    from pyproj import CRS

    west, south, east, north = grid.bounds
    header = laspy.LasHeader(point_format=6, version="1.4")
    header.add_crs(CRS.from_wkt(grid.crs.to_wkt()))
    header.scales = np.array([0.01, 0.01, 0.01])
    header.offsets = np.array([np.floor(west), np.floor(south), 0.0])
    header.creation_date = day
    header.generating_software, header.system_identifier = "canopy", "synthetic scene"
    ox, oy = origin_xy
    plane = (west - ox, south - oy, east - ox, north - oy)
    totals = dict.fromkeys(CLASSES.values(), 0)
    with laspy.open(path, mode="w", header=header, laz_backend=laspy.LazBackend.Lazrs) as writer:
        for chunk in _blocks_of(spec, plane, progress):
            if len(chunk):
                writer.write_points(_record(laspy, header, chunk, origin_xy, grid.bounds))
            for code, name in CLASSES.items():
                totals[name] += int((chunk.kind == code).sum())
    return {"total": sum(totals.values()), **totals}


def _blocks_of(
    spec: SceneSpec, plane: tuple[float, float, float, float], progress: Progress
) -> Iterator[Returns]:
    for block in blocks(plane):
        yield returns_in(spec, block, plane)
        progress.advance()


def _record(  # type: ignore[no-untyped-def]
    laspy, header, chunk: Returns, origin_xy: tuple[float, float], bounds: tuple[float, ...]
):
    """laspy's points of some returns, in the header's CRS."""
    points = laspy.ScaleAwarePointRecord.zeros(len(chunk), header=header)
    west, south, east, north = bounds
    # Whole centimetres may round over the scene's edge: keep every point inside it.
    points.x = np.clip(chunk.x + origin_xy[0], west, east - 0.01)
    points.y = np.clip(chunk.y + origin_xy[1], south + 0.01, north)
    points.z = chunk.z
    points.classification = chunk.kind
    points.return_number, points.number_of_returns = chunk.number, chunk.count
    points.gps_time = chunk.seconds
    points.intensity = np.choose(np.searchsorted([3, 5, 6, 7, 9], chunk.kind, "right"), _INTENSITY)
    return points


_INTENSITY = np.array([900, 700, 600, 1200, 100, 60], np.uint16)[:, None]
