"""`canopy data chm` on a large synthetic point cloud: time, and memory that must not grow with the file.

    python benchmarks/lidar.py                          # 20 million points, a minute or two
    python benchmarks/lidar.py --points 100000000       # the limit asked for: 4 GiB at 100 million points

Ten points per square metre of rolling ground and crowns, written as LAZ. Memory is the highest of the main
process plus that of every worker at its largest.
"""

from __future__ import annotations

import resource
import sys
import tempfile
from pathlib import Path
from typing import Any

import common
import numpy as np

EASTING, NORTHING = 500_000.0, 4_880_000.0
POINTS_PER_M2 = 10.0
CHUNK = 1_000_000


def make_cloud(path: Path, points: int) -> None:
    """A square of hills under sinusoidal crowns; 70 % of the points are vegetation, the rest ground."""
    import laspy
    from pyproj import CRS

    side = (points / POINTS_PER_M2) ** 0.5
    header = laspy.LasHeader(point_format=6, version="1.4")
    header.scales = np.full(3, 0.01)
    header.offsets = np.array([EASTING, NORTHING, 0.0])
    header.add_crs(CRS.from_epsg(32619))
    rng = np.random.default_rng(0)
    with laspy.open(path, "w", header=header) as writer:
        for start in range(0, points, CHUNK):
            count = min(CHUNK, points - start)
            record = laspy.ScaleAwarePointRecord.zeros(count, header=header)
            x, y = rng.uniform(0, side, (2, count))
            ground = 200 + 20 * np.sin(x / 90) + 15 * np.cos(y / 70)
            crown = 12 + 6 * np.sin(x / 5) * np.sin(y / 5)
            is_tree = rng.random(count) < 0.7
            record.x, record.y = EASTING + x, NORTHING + y
            record.z = ground + np.where(is_tree, crown * rng.uniform(0.3, 1, count), 0)
            record.classification = np.where(is_tree, 5, 2)
            record.return_number = record.number_of_returns = np.ones(count, np.uint8)
            writer.write_points(record)


def measure(points: int, workers: int, folder: Path) -> dict[str, Any]:
    """Seconds and memory of one CHM from a fresh cloud of `points` points."""
    from canopy.labels.chm import ChmOptions, chm_from_points

    cloud = folder / "cloud.laz"
    make_cloud(cloud, points)
    clock = common.Clock()
    facts = chm_from_points([str(cloud)], str(folder / "chm.tif"), ChmOptions(workers=workers))
    took = clock.read()
    worker = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024
    points, main = facts["points_read"], common.peak_mb()
    return {
        "points": points,
        "workers": workers,
        "wall s": took["wall_s"],
        "cpu s": took["cpu_s"],
        "Mpoints/s": points / took["wall_s"] / 1e6,
        "main MB": round(main),
        "biggest worker MB": round(worker),
        "total MB": round(main + workers * worker),
        "mean height m": facts["mean_height_m"],
        "valid": facts["valid_fraction"],
    }


def main(argv: list[str] | None = None) -> None:
    parser = common.parser(__doc__)
    parser.add_argument("--points", type=int, default=20_000_000)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--dir", help="where the cloud goes; default: a temporary folder")
    options = parser.parse_args(argv)
    with tempfile.TemporaryDirectory(dir=options.dir) as folder:
        found = measure(options.points, options.workers, Path(folder))
    common.show("canopy data chm on a LAZ file", [found])
    common.save(options.out, "lidar", {"points": options.points, "workers": options.workers}, found)


if __name__ == "__main__":
    sys.exit(main())
