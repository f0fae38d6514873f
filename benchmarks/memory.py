"""Peak memory of `canopy.predict` on a small and a large raster: it must not grow with the raster.

    python benchmarks/memory.py                      # 5,000 and 20,000 px a side, a very cheap model
    python benchmarks/memory.py --model default      # the embedded model, on images that are mostly nodata

Each size runs in a process of its own on a tiled JPEG GeoTIFF made on the fly, and reports the peak of its
resident memory. With `--model` only a chequer of 2 % of the image is valid, so that a real network passes
over the whole raster in minutes; what grows with a raster (strips, caches) is the same for all models.
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
from types import SimpleNamespace

TILE = 512
# A new place starts here every so many pixels where only part of the image is valid.
SPARSE_STEP, SPARSE_SIDE = 3584, 512


def make_image(path: Path, side: int, sparse: bool) -> None:
    """A noisy JPEG-compressed RGB GeoTIFF; with `sparse` black (nodata) but for a chequer of squares."""
    import numpy as np
    import rasterio
    from rasterio.windows import Window

    rng = np.random.default_rng(1)
    block = np.clip(rng.normal(110, 40, (3, TILE, TILE)), 1, 255).astype(np.uint8)
    profile = {
        "driver": "GTiff", "width": side, "height": side, "count": 3, "dtype": "uint8", "crs": "EPSG:32618",
        "transform": rasterio.Affine(0.5, 0, 500_000, 0, -0.5, 4_900_000), "tiled": True, "blockxsize": TILE,
        "blockysize": TILE, "compress": "jpeg", "photometric": "ycbcr", "sparse_ok": True,
    }  # fmt: skip
    if sparse:
        profile |= {"compress": "deflate", "photometric": "rgb", "nodata": 0}
    with rasterio.open(path, "w", **profile) as dataset:
        for row in range(0, side, TILE):
            for col in range(0, side, TILE):
                if sparse and (row % SPARSE_STEP >= SPARSE_SIDE or col % SPARSE_STEP >= SPARSE_SIDE):
                    continue
                height, width = min(TILE, side - row), min(TILE, side - col)
                dataset.write(block[:, :height, :width], window=Window(col, row, width, height))


def cheap_model():  # type: ignore[no-untyped-def]
    """Height = 30 x green: no work, but all of the reading, blending and writing."""
    import torch

    class Cheap(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.config = SimpleNamespace(crop_px=256, patch_px=16, gsd_m=0.5)
            self.card, self.sha256 = {"name": "cheap"}, None

        def forward(self, rgb: torch.Tensor) -> torch.Tensor:
            return 30 * rgb[:, 1:2]

    return Cheap()


def measure(image: Path, model: str) -> dict[str, float]:
    """Predict `image` in this process; peak resident memory in MB and seconds."""
    import canopy

    started = time.perf_counter()
    loaded = cheap_model() if model == "cheap" else canopy.load_model(model)
    canopy.predict(image, model=loaded, out=image.with_name("chm.tif"), overwrite=True, device="cpu")
    peak_mb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return {"peak_mb": round(peak_mb), "seconds": round(time.perf_counter() - started)}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sizes", type=int, nargs="+", default=[5_000, 20_000], help="image sides, pixels")
    parser.add_argument(
        "--model", default="cheap", help="cheap, or a name or file that canopy.load_model takes"
    )
    parser.add_argument(
        "--dir", help="where the images go (20,000 px need about 6 GB); default: a temporary one"
    )
    parser.add_argument("--out", type=Path, help="folder for memory.json")
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        print(json.dumps(measure(options.child, options.model)))
        return
    results = {}
    with tempfile.TemporaryDirectory(dir=options.dir) as folder:
        for side in options.sizes:
            image = Path(folder) / f"{side}.tif"
            make_image(image, side, sparse=options.model != "cheap")
            command = [sys.executable, __file__, "--child", str(image), "--model", options.model]
            done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
            results[side] = json.loads(done.stdout)
            print(
                f"{side} x {side} px: peak {results[side]['peak_mb']} MB, {results[side]['seconds']} s",
                flush=True,
            )
            image.unlink()
    first, last = (results[side]["peak_mb"] for side in (options.sizes[0], options.sizes[-1]))
    print(f"growth {100 * (last / first - 1):+.1f} % (allowed: 10 %)")
    if options.out:
        options.out.mkdir(parents=True, exist_ok=True)
        text = json.dumps({"model": options.model, "sizes": results, "growth": last / first - 1}, indent=2)
        (options.out / "memory.json").write_text(text + "\n", encoding="utf-8")
    sys.exit(last > 1.1 * first)


if __name__ == "__main__":
    main()
