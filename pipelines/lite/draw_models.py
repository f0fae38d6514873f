"""Pictures: image, truth, and each model's heights. `python pipelines/draw_models.py RAW OUT.png NAME=FILE.. [--ids ID..]`"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw

from canopy.chips.shards import ChipShards
from canopy.chips.store import Chip, ChipRow
from canopy.models.checkpoint import load_model
from canopy.sources.synth import SceneSpec
from canopy.sources.synth_render import render
from canopy.training.scoring import predict_chip


def main() -> None:
    torch.set_num_threads(1)
    raw = ChipShards(sys.argv[1])
    models = [named.partition("=")[::2] for named in sys.argv[3:]]
    from canopy.sources.demo import SPOT_XY

    tile = render(SceneSpec(seed=0), SPOT_XY[0] - 128, SPOT_XY[1] + 128, 512, 512)
    chm = tile.chm.reshape(256, 2, 256, 2).max(axis=(1, 3))
    chips = [Chip(ChipRow("demo", "demo", "synth", "test"), np.maximum(tile.rgb, 1), chm)]
    for wanted in ("Natural", "Autzen", "Lockegee"):
        some = [i for i, r in enumerate(raw.rows) if r.site.startswith(wanted) and r.split.startswith("test")]
        chips += [raw[i].as_chip() for i in some[: 2 if wanted == "Natural" else 1]]
    rows = [[_rgb(c), _grey(c.chm_m)] for c in chips]
    labels = ["image", "lidar"]
    for name, file in models:
        model = load_model(file)
        labels.append(name)
        for chip, row in zip(chips, rows, strict=True):
            p = predict_chip(model, chip, 512, 0)
            row.append(_grey(p))
            t = chip.chm_m
            k = np.isfinite(t)
            print(
                chip.row.id, name, f"MAE {np.abs(p - t)[k].mean():.2f} r {np.corrcoef(p[k], t[k])[0, 1]:.3f}"
            )
    picture = Image.fromarray(np.concatenate([np.concatenate(r, axis=1) for r in rows]))
    draw = ImageDraw.Draw(picture)
    for i, label in enumerate(labels):
        draw.text((i * 256 + 6, 4), label, fill=(255, 255, 0))
    picture.save(Path(sys.argv[2]))


def _rgb(chip: Chip) -> np.ndarray:
    return chip.rgb.reshape(3, 256, 2, 256, 2).mean(axis=(2, 4)).transpose(1, 2, 0).astype(np.uint8)


def _grey(height_m: np.ndarray) -> np.ndarray:
    grey = np.clip(np.nan_to_num(height_m, nan=0.0) * 6.5, 0, 255).astype(np.uint8)
    return np.repeat(grey[..., None], 3, axis=2)


if __name__ == "__main__":
    main()
