"""Pace and peak memory of `canopy predict` by the side of the raster: memory must not grow with it.

    python benchmarks/memory.py                      # 2,000, 5,000, 10,000 and 20,000 px, a very cheap model
    python benchmarks/memory.py --model default      # the embedded model, on images that are mostly nodata

Each size runs in a process of its own on a tiled JPEG GeoTIFF made on the fly. With `--model` only a
chequer of 2 % of the image is valid, so that a real network passes over it in minutes; what grows with a
raster (strips, caches) is the same for all models. Growth is that from 5,000 px, or the smallest, to the
largest.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import common

# Where only part of the image is valid, a tile in every square of this side.
SPARSE_EVERY_PX = 3584
# Below this side the caches are not full yet.
FULL_PX = 5000
ALLOWED_GROWTH = 0.05


def run_case(case: dict[str, Any]) -> dict[str, Any]:
    """Predict an image in this process."""
    import canopy

    cheap = case["model"] == "cheap"
    model, backend = (common.cheap_model(), "torch") if cheap else (canopy.load_model(case["model"]), "auto")
    clock = common.Clock()
    canopy.predict(case["image"], model=model, out=case["to"], overwrite=True, device="cpu", backend=backend)
    return clock.read() | {"peak_mb": common.peak_mb()}


def growth_of(results: dict[int, dict[str, Any]]) -> float:
    """Peak memory of the largest raster over that of the first with full caches, minus 1."""
    sides = sorted(results)
    first = next((side for side in sides if side >= FULL_PX), sides[0])
    return results[sides[-1]]["peak_mb"] / results[first]["peak_mb"] - 1


def main(argv: list[str] | None = None) -> None:
    parser = common.parser(__doc__)
    parser.add_argument(
        "--sizes", type=int, nargs="+", default=[2000, 5000, 10_000, 20_000], help="sides, px"
    )
    parser.add_argument("--model", default="cheap", help="cheap, or what canopy.load_model takes")
    parser.add_argument("--dir", help="where images go (20,000 px: up to 4 GB); default: a temporary folder")
    options = parser.parse_args(argv)
    if options.child:
        print(json.dumps(run_case(json.loads(options.child))))
        return
    results: dict[int, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory(dir=options.dir) as folder:
        for side in options.sizes:
            image, to = Path(folder) / f"{side}.tif", Path(folder) / "chm.tif"
            common.make_image(image, side, every_px=0 if options.model == "cheap" else SPARSE_EVERY_PX)
            case = {"image": str(image), "to": str(to), "model": options.model}
            results[side] = common.alone(__file__, case)
            image.unlink()
            to.unlink()
            print(f"  {side} px: {results[side]}", file=sys.stderr, flush=True)
    growth = growth_of(results)
    rows = [
        {
            "side px": side,
            "Mpx": side**2 / 1e6,
            "peak MB": found["peak_mb"],
            "wall s": found["wall_s"],
            "cpu s": found["cpu_s"],
            "cpu s/Mpx": found["cpu_s"] / side**2 * 1e6,
        }
        for side, found in results.items()
    ]
    note = f"growth {100 * growth:+.1f} % (allowed: {100 * ALLOWED_GROWTH:.0f} %)"
    common.show(f"Raster size, model {options.model}", rows, [note])
    common.save(options.out, "memory", {"model": options.model}, {"sizes": results, "growth": growth})
    sys.exit(growth > ALLOWED_GROWTH)


if __name__ == "__main__":
    main()
