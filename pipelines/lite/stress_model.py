"""What the pack's scores do not show: closure against height, shade, towns. `python pipelines/stress_model.py NAME=FILE..`"""

from __future__ import annotations

import csv
import sys
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from synth_stands import stands
from torch.nn import functional

from canopy.chips.shards import ChipShards
from canopy.models.checkpoint import load_model
from canopy.training.scoring import predict_chip

PACK = Path("/work/shared/data")


def main() -> None:
    torch.set_num_threads(1)
    raw = ChipShards(sys.argv[1])
    made = list(stands(24, 512, first_seed=90_000))
    shade = [raw[i].as_chip() for i, r in enumerate(raw.rows) if r.split == "val" and r.kind != "neon"][::3]
    for named in sys.argv[2:]:
        name, _, file = named.partition("=")
        model = load_model(file)

        def pred(chip):
            with torch.autocast("cpu", torch.bfloat16):
                return predict_chip(model, chip, 512, 0)  # noqa: B023

        print("==", name)
        cells: dict[tuple[int, int], list[tuple[float, float, int]]] = {}
        p_all, t_all = [], []
        for chip in made:
            p = pred(chip)
            p_all.append(p.ravel())
            t_all.append(chip.chm_m.ravel())
            for r in range(0, 256, 64):
                for c in range(0, 256, 64):
                    t, q = chip.chm_m[r : r + 64, c : c + 64], p[r : r + 64, c : c + 64]
                    cover, top = (t > 1).mean(), np.percentile(t, 90)
                    key = (int(np.digitize(cover, [0.3, 0.7])), int(np.digitize(top, [5, 10, 20])))
                    cells.setdefault(key, []).append((float((q - t).mean()), float(np.abs(q - t).mean()), 1))
        p, t = np.concatenate(p_all), np.concatenate(t_all)
        print(f"unseen stands: MAE {np.abs(p - t).mean():.2f} r {np.corrcoef(p, t)[0, 1]:.3f}")
        for cover, word in enumerate(("open", "half", "closed")):
            row = []
            for k in range(4):
                some = cells.get((cover, k), [])
                row.append(f"{np.mean([s[0] for s in some]):+.1f} ({len(some)})" if some else "-")
            print(f"  bias, {word}: stand's height <5, 5-10, 10-20, >20 m: {row}")
        lost = []
        for chip in shade:
            dark = np.clip(
                chip.rgb.astype(np.float32) * np.array([0.4, 0.45, 0.5], np.float32)[:, None, None], 1, 255
            )
            tall = chip.chm_m > 10
            if tall.sum() > 2000:
                p0 = pred(chip)
                p1 = pred(
                    type(chip)(chip.row, np.where(chip.rgb.max(0) > 0, dark, 0).astype(np.uint8), chip.chm_m)
                )
                lost.append(((p0[tall] < 2).mean(), (p1[tall] < 2).mean(), (p1 - p0)[tall].mean()))
        a = np.array(lost).mean(0)
        print(
            f"cells over 10 m read below 2 m: {100 * a[0]:.1f} %, in shade {100 * a[1]:.1f} %; change in shade {a[2]:+.1f} m"
        )
        with (PACK / "ssl/manifest_ssl.csv").open() as file_:
            rows = [r for r in csv.DictReader(file_) if r["points_csv"] and r["split"] == "test"][::7][:30]
        high, at, ground = [], [], []
        for row in rows:
            rgb = torch.from_numpy(
                np.asarray(Image.open(PACK / row["rgb_path"]).convert("RGB"), np.float32) / 255
            )
            x = functional.interpolate(rgb.permute(2, 0, 1)[None], size=(320, 320), mode="bilinear")
            x = x[..., :288, :288]
            with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
                h = functional.avg_pool2d(model(x).float(), 2)[0, 0].numpy()
            with (PACK / row["points_csv"]).open() as file_:
                xy = (
                    np.array([[float(r["x"]), float(r["y"])] for r in csv.DictReader(file_)]).reshape(-1, 2)
                    * 0.625
                )
            r, c = np.mgrid[:144, :144] + 0.5
            near = np.full((144, 144), 99.0)
            for px, py in xy:
                near = np.minimum(near, np.hypot(r - py, c - px))
            high.append((h[near > 8] > 5).mean() if (near > 8).any() else 0)
            ground.append(h[near > 8].mean() if (near > 8).any() else 0)
            if (near < 1.5).any():
                at.append(h[near < 1.5].mean())
        print(f"Californian towns (unseen): tree-free cells above 5 m {100 * np.mean(high):.1f} %, "
              f"mean {np.mean(ground):.2f} m; on annotated trees {np.mean(at):.2f} m")  # fmt: skip


if __name__ == "__main__":
    main()
