"""Chips: how fast they are cut, and how many samples per second the readers of training give.

    python benchmarks/chips.py                       # 64 chips of 256 px
    python benchmarks/chips.py --size 8192 --samples 2000

One pair of image and heights (the synthetic forest) is cut by `canopy data chips`; the readers then draw
from the folder: whole chips (validation), crops plain and augmented (fine-tuning), views (pretraining), and
augmented crops from two worker processes. Rates are of one process unless it says otherwise.
"""

from __future__ import annotations

import csv
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import common
import numpy as np

CROP_PX, BATCH = 224, 8
# Items that two loader processes may hold ready, and one more.
AHEAD = 5


def make_pair(folder: Path, side: int) -> Path:
    """rgb.tif of 0.5 m, chm.tif of 1 m and the manifest that names them; one tile is repeated."""
    import rasterio

    from canopy.synth.forest import SceneSpec
    from canopy.synth.render import render

    tile = render(SceneSpec(gsd_m=0.5), 300.0, 300.0, common.TILE_PX, common.TILE_PX)
    times = -(-side // common.TILE_PX)
    rgb = np.tile(np.maximum(tile.rgb, 1), (1, times, times))[:, :side, :side]
    halved = tile.chm.reshape(common.TILE_PX // 2, 2, common.TILE_PX // 2, 2).mean(axis=(1, 3))
    chm = np.tile(halved, (times, times))[: side // 2, : side // 2].astype(np.float32)
    for name, values, gsd, more in (("rgb", rgb, 0.5, {}), ("chm", chm[None], 1.0, {"nodata": -9999.0})):
        with rasterio.open(
            folder / f"{name}.tif", "w", driver="GTiff", count=len(values), dtype=values.dtype,
            height=values.shape[1], width=values.shape[2], crs="EPSG:32618", compress="deflate", tiled=True,
            transform=rasterio.Affine(gsd, 0, 500_000, 0, -gsd, 4_900_000), **more,
        ) as dataset:  # fmt: skip
            dataset.write(values)
    manifest = folder / "manifest.csv"
    with manifest.open("w", newline="") as file:
        writer = csv.DictWriter(file, ["id", "site", "kind", "split", "rgb_path", "chm_path"])
        writer.writeheader()
        writer.writerow(
            {
                "id": "a",
                "site": "s",
                "kind": "synth",
                "split": "train",
                "rgb_path": "rgb.tif",
                "chm_path": "chm.tif",
            }
        )
    return manifest


def readers(folder: Path, workers: bool) -> dict[str, tuple[int, Callable[[], Iterator[Any]]]]:
    """Name -> samples per item, and what makes an iterator over items."""
    from torch.utils.data import DataLoader

    from canopy.chips.augment import AugmentConfig
    from canopy.chips.data import ChipBatches, ViewBatches, ViewRules
    from canopy.chips.store import ChipShards
    from canopy.training.data import WholeChips

    shards = ChipShards(folder)
    whole = WholeChips(shards)
    plain = ChipBatches(shards, BATCH, CROP_PX, None)
    augmented = ChipBatches(shards, BATCH, CROP_PX, AugmentConfig())
    views = ViewBatches(shards, BATCH, ViewRules())

    def endless() -> Iterator[Any]:
        while True:
            yield from whole

    made: dict[str, tuple[int, Callable[[], Iterator[Any]]]] = {
        "whole chips (validation)": (1, endless),
        f"crops of {CROP_PX} px, plain": (BATCH, lambda: iter(plain)),
        f"crops of {CROP_PX} px, augmented": (BATCH, lambda: iter(augmented)),
        "views (pretraining)": (BATCH, lambda: iter(views)),
    }
    if workers:
        two = DataLoader(augmented, batch_size=None, num_workers=2, multiprocessing_context="spawn")
        made["augmented crops, 2 worker processes"] = (BATCH, lambda: iter(two))
    return made


def rate(per_item: int, items: Iterator[Any], samples: int) -> dict[str, float]:
    """Samples per second of wall and of this process's processor time, after what was made ahead."""
    for _ in range(AHEAD):
        next(items)
    started, used, taken = time.perf_counter(), time.process_time(), 0
    while taken < samples:
        next(items)
        taken += per_item
    wall, cpu = time.perf_counter() - started, time.process_time() - used
    return {"samples": taken, "wall s": wall, "samples/s": taken / wall, "cpu ms/sample": 1000 * cpu / taken}


def measure(folder: Path, side: int, samples: int, workers: bool = True) -> list[dict[str, Any]]:
    """Cut, then read in every way; `workers`: also from processes."""
    import torch

    from canopy.chips.plan import CutRules
    from canopy.chips.write import write_chips

    torch.set_num_threads(1)
    manifest = make_pair(folder, side)
    clock = common.Clock()
    cut = write_chips(manifest, folder / "chips", CutRules(register=False))["chips"]
    took = clock.read()
    rows: list[dict[str, Any]] = [
        {
            "what": "cutting (canopy data chips)",
            "samples": cut,
            "wall s": took["wall_s"],
            "samples/s": cut / took["wall_s"],
            "cpu ms/sample": 1000 * took["cpu_s"] / cut,
        }
    ]
    for name, (per_item, make) in readers(folder / "chips", workers).items():
        found = rate(per_item, make(), samples)
        if "worker" in name:
            found["cpu ms/sample"] = None  # type: ignore[assignment]  # spent elsewhere
        rows.append({"what": name, **found})
    return rows


def main(argv: list[str] | None = None) -> None:
    parser = common.parser(__doc__)
    parser.add_argument("--size", type=int, default=2048, help="side of the image, pixels")
    parser.add_argument("--samples", type=int, default=200, help="to draw from every reader")
    parser.add_argument("--dir", help="where image and chips go; default: a temporary folder")
    options = parser.parse_args(argv)
    with tempfile.TemporaryDirectory(dir=options.dir) as folder:
        rows = measure(Path(folder), options.size, options.samples)
    common.show(f"Chips of 256 px from {options.size} x {options.size} px", rows)
    common.save(options.out, "chips", {"size": options.size, "samples": options.samples}, rows)


if __name__ == "__main__":
    sys.exit(main())
