"""Point clouds written for one test each: LAS or LAZ of any CRS, and a small COPC."""

from __future__ import annotations

import struct
from pathlib import Path

import laspy
import numpy as np
from pyproj import CRS

UTM = "EPSG:32619"
WEST, SOUTH = 500_000.0, 4_880_000.0


def write_cloud(
    path: Path,
    x: np.ndarray,
    y: np.ndarray,
    z: np.ndarray,
    classes: np.ndarray | int = 2,
    *,
    crs: str | None = UTM,
    point_format: int = 6,
    scale: float = 0.01,
    vlrs: tuple[laspy.VLR, ...] = (),
    **columns: np.ndarray,
) -> Path:
    """A LAS or LAZ file (by its suffix) of these points."""
    header = laspy.LasHeader(point_format=point_format, version="1.4")
    header.scales = np.full(3, scale)
    header.offsets = np.floor([x.min(), y.min(), 0.0]) if len(x) else np.zeros(3)
    header.vlrs.extend(vlrs)
    if crs is not None:
        header.add_crs(CRS.from_user_input(crs))
    cloud = laspy.LasData(header)
    cloud.x, cloud.y, cloud.z = x, y, z
    cloud.classification = np.broadcast_to(np.asarray(classes, np.uint8), x.shape)
    cloud.return_number = cloud.number_of_returns = np.ones(len(x), np.uint8)
    for name, values in columns.items():
        setattr(cloud, name, values)
    cloud.write(str(path))
    return path


def field(side_m: float, spacing: float = 0.5, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """x, y of a jittered lattice of pulses over a square at (WEST, SOUTH), strictly inside it."""
    rng = np.random.default_rng(seed)
    steps = np.arange(spacing / 2, side_m, spacing)
    x, y = (a.ravel() for a in np.meshgrid(steps, steps))
    shake = rng.uniform(-0.4, 0.4, (2, len(x))) * spacing
    return WEST + x + shake[0], SOUTH + y + shake[1]


def write_copc(source: Path, path: Path) -> Path:
    """The points of a small LAS or LAZ file (below 50,000: one chunk) as a COPC of one node (COPC 1.0)."""
    cloud = laspy.read(source)
    header = laspy.LasHeader(point_format=cloud.header.point_format.id, version="1.4")
    header.scales, header.offsets = cloud.header.scales, cloud.header.offsets
    header.vlrs.append(laspy.VLR("copc", 1, "COPC info", b"\0" * 160))
    header.add_crs(cloud.header.parse_crs())
    copy = laspy.LasData(header)
    copy.points = laspy.ScaleAwarePointRecord(
        cloud.points.array, cloud.header.point_format, header.scales, header.offsets
    )
    copy.write(str(path.with_suffix(".tmp.laz")))
    raw = bytearray(path.with_suffix(".tmp.laz").read_bytes())
    path.with_suffix(".tmp.laz").unlink()
    (first,) = struct.unpack_from("<I", raw, 96)
    (table,) = struct.unpack_from("<q", raw, first)
    page = len(raw) + 60
    low, high = cloud.header.mins, cloud.header.maxs
    half = float((high - low).max()) / 2
    info = struct.pack("<5d2Q2d88x", *((low + high) / 2), half, 1.0, page, 32, 0.0, 0.0)
    raw[375 + 54 : 375 + 54 + 160] = info
    struct.pack_into("<QI", raw, 235, len(raw), 1)
    node = struct.pack("<4iQii", 0, 0, 0, 0, first + 8, table - first - 8, len(cloud.points))
    raw += struct.pack("<H16sHQ32s", 0, b"copc", 1000, 32, b"EPT hierarchy") + node
    path.write_bytes(raw)
    return path
