"""Peak memory and speed of `canopy evaluate` on a small and a large raster: memory must not grow with it.

    python benchmarks/evaluate.py                            # 5,000 and 20,000 px a side
    python benchmarks/evaluate.py --sizes 2000 4000 --out bench_out

Each size runs in a process of its own: a map and a reference of one forest (a tile repeated, the map with
errors) are written as compressed GeoTIFFs, then scored by height with intervals and the measured shift.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import common

TILE = 500
# The first size fills the caches; blocks and bootstrap add some tens of MB up to 1,600 blocks, and no more.
ALLOWED_GROWTH = 0.15


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


def measure(folder: Path) -> dict[str, Any]:
    """Score in this process."""
    import canopy

    clock = common.Clock()
    result = canopy.evaluate(folder / "map.tif", folder / "reference.tif", by=("height",))
    scored = {"pixels": result.overall.n, "mae_m": float(result.overall["mae_m"].value or 0)}
    return scored | clock.read() | {"peak_mb": common.peak_mb()}


def main(argv: list[str] | None = None) -> None:
    parser = common.parser(__doc__)
    parser.add_argument("--sizes", type=int, nargs="+", default=[5_000, 20_000], help="raster sides, pixels")
    parser.add_argument(
        "--dir", help="where the rasters go (20,000 px need 1.5 GB); default: a temporary one"
    )
    options = parser.parse_args(argv)
    if options.child:
        print(json.dumps(measure(Path(json.loads(options.child)["folder"]))))
        return
    results: dict[int, dict[str, Any]] = {}
    for side in options.sizes:
        with tempfile.TemporaryDirectory(dir=options.dir) as folder:
            make_pair(Path(folder), side)
            results[side] = common.alone(__file__, {"folder": folder})
        print(f"  {side} px: {results[side]}", file=sys.stderr, flush=True)
    first, last = (results[side]["peak_mb"] for side in (options.sizes[0], options.sizes[-1]))
    rows = [
        {
            "side px": side,
            "Mpx": side**2 / 1e6,
            "peak MB": found["peak_mb"],
            "wall s": found["wall_s"],
            "cpu s": found["cpu_s"],
            "Mpx/cpu s": side**2 / 1e6 / max(found["cpu_s"], 1e-9),
        }
        for side, found in results.items()
    ]
    growth = last / first - 1
    note = f"growth {100 * growth:+.1f} % (allowed: {100 * ALLOWED_GROWTH:.0f} %)"
    common.show("canopy evaluate by raster size", rows, [note])
    common.save(options.out, "evaluate", {"sizes": options.sizes}, {"sizes": results, "growth": growth})
    sys.exit(growth > ALLOWED_GROWTH)


if __name__ == "__main__":
    main()
