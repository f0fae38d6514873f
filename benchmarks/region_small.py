"""What the regional benchmarks have in common: a small region, a small model, the real command, what it left.

The model is random but real (the same code, a few thousand weights), so that a tile costs a fraction of a
second and a benchmark can start hundreds of runs; `--model NAME` of the benchmarks takes another one.
"""

from __future__ import annotations

import hashlib
import json
import re
import sys
from pathlib import Path
from typing import Any

UTM = "EPSG:32618"
WEST, NORTH, GSD = 500_000.0, 4_882_000.0, 0.5
TILE_PX = 160  # of UTM tiles of zoom 19 at 0.5 m


def small_model(path: Path) -> Path:
    """Save a random model of crops of 64 px at 0.5 m, whose heights vary with the image."""
    import torch

    from canopy.models.checkpoint import save_checkpoint
    from canopy.models.config import DecoderConfig, EncoderConfig, ModelConfig
    from canopy.models.height import HeightModel

    torch.manual_seed(3)
    encoder = EncoderConfig(dim=32, depth=4, heads=2, taps=(0, 1, 2, 3), pos_grid=4, layer_scale=None)
    decoder = DecoderConfig(
        post_channels=(16, 16, 16, 16), fusion=16, hidden=16, bins=16, bin_min=0.0, bin_max=40.0, scale=1.0,
        weights="softmax",
    )  # fmt: skip
    model = HeightModel(ModelConfig(gsd_m=GSD, crop_px=64, encoder=encoder, decoder=decoder)).eval()
    with torch.no_grad():
        list(model.decoder.parameters())[-2].mul_(300.0)
    save_checkpoint(path, model, {"name": "small-random", "licence": "Apache-2.0"})
    return path


def small_image(path: Path, tiles: int, compress: str = "deflate") -> Path:
    """Write a texture of tiles x tiles work tiles, with a hole without imagery, taken on 2021-06-15."""
    import numpy as np
    import rasterio
    from scipy import ndimage

    side = tiles * TILE_PX
    rng = np.random.default_rng(5)
    noise = ndimage.gaussian_filter(rng.normal(size=(3, side, side)).astype(np.float32), (0, 4, 4))
    pixels = np.clip(noise / noise.std() * 35 + 100, 20, 230).astype(np.uint8)
    pixels[:, side // 2 : side // 2 + 40, side // 3 : side // 3 + 70] = 0
    with rasterio.open(
        path, "w", driver="GTiff", width=side, height=side, count=3, dtype="uint8", crs=UTM, nodata=0,
        transform=rasterio.Affine(GSD, 0, WEST, 0, -GSD, NORTH), tiled=True, blockxsize=128, blockysize=128,
        compress=compress,
    ) as dataset:  # fmt: skip
        dataset.write(pixels)
        dataset.update_tags(TIFFTAG_DATETIME="2021:06:15 10:00:00")
    return path


def canopy(*words: object) -> list[str]:
    """The real command, in a process of its own."""
    return [sys.executable, "-c", "from canopy.cli.main import main; main()", *(str(word) for word in words)]


def map_command(folder: Path, image: object, model: object, *more: object) -> list[str]:
    """`canopy map` of the small region into `folder`."""
    return canopy(
        "map", image, "--model", model, "-o", folder, "--grid", "utm", "--zoom", 19, "--threads", 1,
        "--device", "cpu", "--attempts", 10, "-q", *more,
    )  # fmt: skip


def tile_hashes(folder: Path) -> dict[str, str]:
    """Hash of every tile's file."""
    files = sorted((folder / "tiles").glob("*.tif"))
    return {path.stem: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def left_behind(folder: Path) -> dict[str, Any]:
    """What a finished run left: the ledger's rows, the tiles, what the mosaic is made of, and strays.

    `strays` are files of the tiles' folder that are neither a tile nor its item; `twice` counts tiles that
    the mosaic names more than once.
    """
    from canopy.region.ledger import Ledger

    with Ledger(folder / "ledger.sqlite", read_only=True) as ledger:
        rows = {row.task.id: (row.state, row.sha256) for row in ledger.rows()}
    names = {path.name for path in (folder / "tiles").iterdir()}
    sources = re.findall(r"tiles/([^<]+)\.tif<", (folder / "mosaic").read_text(encoding="utf-8"))
    expected = {f"{tile}.tif" for tile in rows} | {f"{tile}.json" for tile in rows}
    return {
        "rows": rows,
        "files": tile_hashes(folder),
        "mosaic": sorted(set(sources)),
        "twice": len(sources) - len(set(sources)),
        "strays": sorted(names - expected),
    }


def report(results: dict[str, Any], out: Path | None, name: str) -> None:
    """Print results as JSON, and write them to `out/name.json`."""
    text = json.dumps(results, indent=2)
    print(text)
    if out:
        out.mkdir(parents=True, exist_ok=True)
        (out / f"{name}.json").write_text(text + "\n", encoding="utf-8")
