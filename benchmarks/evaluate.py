"""Peak memory and speed of `canopy evaluate` on a small and a large raster: memory must not grow with it.

    python benchmarks/evaluate.py                            # 5,000 and 20,000 px a side
    python benchmarks/evaluate.py --sizes 2000 4000 --out bench_out

Each size runs in a process of its own: a map and a reference of one forest (a tile repeated, the map with
errors) are written as compressed GeoTIFFs, then scored by height with intervals and the measured shift.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

TILE = 500
# The first size fills the caches; blocks and bootstrap add some tens of MB up to 1,600 blocks, and no more.
ALLOWED_GROWTH = 1.15


def make_pair(folder: Path, side: int) -> None:
    """map.tif and reference.tif, side x side px of 1 m, whole centimetres in uint16."""
    import numpy as np
    import rasterio
    from rasterio.windows import Window
    from scipy import ndimage

    rng = np.random.default_rng(1)
    noise = ndimage.gaussian_filter(rng.normal(size=(TILE, TILE)), 3, mode="wrap")
    reference = np.clip(1400 + 900 * noise / noise.std(), 0, 6000)
    error = rng.normal(0, 250, (TILE, TILE))
    layers = {"reference.tif": reference, "map.tif": np.clip(0.9 * reference + error, 0, 6000)}
    profile = {
        "driver": "GTiff", "width": side, "height": side, "count": 1, "dtype": "uint16", "crs": "EPSG:32618",
        "transform": rasterio.Affine(1, 0, 500_000, 0, -1, 4_900_000), "tiled": True, "blockxsize": 512,
        "blockysize": 512, "compress": "deflate", "zlevel": 1, "nodata": 65535,
    }  # fmt: skip
    for name, layer in layers.items():
        with rasterio.open(folder / name, "w", **profile) as dataset:
            wide = np.tile(layer.astype(np.uint16), (1, side // TILE + 1))[:, :side]
            for row in range(0, side, TILE):
                height = min(TILE, side - row)
                dataset.write(wide[None, :height], window=Window(0, row, side, height))
            dataset.scales = (0.01,)


class Watched:
    """A progress that counts the windows and tells how far it is."""

    def __init__(self) -> None:
        self.total = self.done = 0

    def start(self, total: int, what: str) -> None:
        self.total, self.done = total, 0
        print(f"  {what}: {total} windows", file=sys.stderr, flush=True)

    def advance(self, steps: int = 1) -> None:
        self.done += steps
        if self.done % max(1, self.total // 10) == 0:
            print(f"  {100 * self.done // self.total} %", file=sys.stderr, flush=True)


def measure(folder: Path) -> dict[str, float]:
    """Score in this process; peak resident memory in MB, seconds of processor and of wall."""
    import canopy

    wall, used = time.perf_counter(), time.process_time()
    watched = Watched()
    result = canopy.evaluate(folder / "map.tif", folder / "reference.tif", by=("height",), progress=watched)
    seconds = time.process_time() - used
    peak_mb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    assert watched.done == watched.total
    return {
        "pixels": result.overall.n,
        "mae_m": float(result.overall["mae_m"].value or 0),
        "peak_mb": round(peak_mb),
        "cpu_s": round(seconds, 1),
        "wall_s": round(time.perf_counter() - wall, 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sizes", type=int, nargs="+", default=[5_000, 20_000], help="raster sides, pixels")
    parser.add_argument(
        "--dir", help="where the rasters go (20,000 px need 1.5 GB); default: a temporary one"
    )
    parser.add_argument("--out", type=Path, help="folder for evaluate.json")
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        print(json.dumps(measure(options.child)))
        return
    results = {}
    for side in options.sizes:
        with tempfile.TemporaryDirectory(dir=options.dir) as folder:
            make_pair(Path(folder), side)
            command = [sys.executable, __file__, "--child", folder]
            done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
        found = results[side] = json.loads(done.stdout)
        print(
            f"{side} x {side} px: peak {found['peak_mb']} MB, {found['cpu_s']} s of one processor, "
            f"{side * side / 1e6 / max(found['cpu_s'], 1e-9):.1f} Mpx/s",
            flush=True,
        )
    first, last = (results[side]["peak_mb"] for side in (options.sizes[0], options.sizes[-1]))
    print(f"growth {100 * (last / first - 1):+.1f} % (allowed: {100 * (ALLOWED_GROWTH - 1):.0f} %)")
    if options.out:
        options.out.mkdir(parents=True, exist_ok=True)
        text = json.dumps({"sizes": results, "growth": last / first - 1}, indent=2)
        (options.out / "evaluate.json").write_text(text + "\n", encoding="utf-8")
    sys.exit(last > ALLOWED_GROWTH * first)


if __name__ == "__main__":
    main()
