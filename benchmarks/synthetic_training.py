"""Pretraining and fine-tuning from end to end on the procedural forest, scored on a forest never seen.

    python benchmarks/synthetic_training.py --out DIR            # minutes on one CPU thread
    python benchmarks/synthetic_training.py --out DIR --quick    # does it run at all?

Chips are cut from windows of several scenes (other seeds, one camera and sun), an encoder is pretrained on
them without their heights, a height model is fine-tuned from it, and both it and the best constant are scored
on scenes of further seeds. The aim is less than a quarter of the constant's MAE (docs/training.md).
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from itertools import product
from pathlib import Path

import numpy as np

SHARE = 0.25  # of the constant's MAE
SIDE_PX = 256
# Scenes by their seeds, and windows of each; 0: as many as asked for.
SPLITS = {"train": (range(100, 220), 0), "val": (range(40, 44), 1), "test": (range(50, 74), 1)}
MODEL = {
    "encoder": {
        "family": "rope", "rope_type": "cat", "rope_rotate_half": False, "norm_taps": True, "dim": 96,
        "depth": 4, "heads": 3, "registers": 2, "layer_scale": 0.1, "taps": [0, 1, 2, 3],
        "stem": [24, 48, 64],
    },
    "decoder": {
        "post_channels": [32, 32, 48, 96], "fusion": 32, "hidden": 32, "project_after_fusion": False,
        "unit_norm": True, "head": "half", "detail": True, "bins": 48, "bin_min": 0.0, "bin_max": 4.5,
        "weights": "softmax",
    },
}  # fmt: skip


def write_chips(folder: Path, windows: int) -> None:
    """Chips of `windows` places in every training scene and of one in every other, heights as cell means."""
    from canopy.chips.store import Chip, ChipRow
    from canopy.chips.write import write_made
    from canopy.synth.forest import SceneSpec
    from canopy.synth.render import render

    def chips() -> Iterator[Chip]:
        half = SIDE_PX // 2
        for split, (seeds, count) in SPLITS.items():
            for seed, k in product(seeds, range(count or windows)):
                tile = render(replace(SceneSpec(), seed=seed), 400.0 * k, 0.0, SIDE_PX, SIDE_PX)
                chm = tile.chm.reshape(half, 2, half, 2).mean(axis=(1, 3)).astype(np.float32)
                row = ChipRow(f"{split}-{seed}-{k}", f"scene {seed}", "lidar", split)
                yield Chip(row, np.maximum(tile.rgb, 1), chm)

    write_made(folder, chips(), "procedural forest")


def pretrain_encoder(chips: Path, run: Path, steps: int, objective: str) -> Path:
    """Pretrain the model's encoder on the chips' images; returns its file."""
    from canopy.config import validate_settings
    from canopy.training.fit import pretrain
    from canopy.training.settings import PretrainSettings

    raw = {
        "name": "synthetic", "objective": objective, "steps": steps, "batch": 8, "lr": 1e-3, "warmup": 0.1,
        "layer_decay": 1.0, "patch_lr": 1.0, "precision": "bf16-mixed",
        "checkpoint_every": max(steps // 2, 1),
        "data": {"chips": str(chips)}, "probe": {"every": 0}, "model": MODEL,
        "views": {"global_px": 96, "local_px": 48, "locals": 2, "global_area": [0.15, 0.6]},
        "dino": {"class_prototypes": 256, "patch_prototypes": 256, "hidden": 256, "bottleneck": 64,
                 "momentum": 0.98},
        "mae": {"width": 64, "depth": 1, "heads": 4},
    }  # fmt: skip
    pretrain(validate_settings(PretrainSettings, raw, "benchmark"), run)
    return run / "encoder.safetensors"


def tune(chips: Path, run: Path, steps: int, encoder: Path | None) -> Path:
    """Fine-tune a height model; returns its file."""
    from canopy.config import validate_settings
    from canopy.training.fit import finetune
    from canopy.training.settings import FinetuneSettings

    raw = {
        "name": "synthetic", "minutes": None, "steps": steps, "batch": 8, "crop_px": 128, "lr": 2e-3,
        "warmup": 0.05, "precision": "bf16-mixed", "validate_every": max(steps // 4, 1),
        "export": "last", "ema_final": 0.99,
        "init_from": encoder and str(encoder), "data": {"chips": str(chips), "bare_share": 0.02},
        "augment": {"colour": 0.1, "gsd_chance": 0.0, "hide_chance": 0.0, "turn": False},
        "loss": {"gradient": 0.3, "shift_reach_m": 0}, "model": {**MODEL, "crop_px": SIDE_PX},
    }  # fmt: skip
    return finetune(validate_settings(FinetuneSettings, raw, "benchmark"), run)


def judge(chips: Path, model_file: Path) -> dict[str, float]:
    """MAE of the model and of the best constant on the test scenes, metres at 1 m."""
    from canopy.models.checkpoint import load_model
    from canopy.training.data import split_chips
    from canopy.training.scoring import score, score_chips

    train = np.concatenate([chip.chm_m.ravel() for chip in split_chips(chips, "train")])
    model = load_model(model_file)
    test = split_chips(chips, "test")
    ours = score_chips(model, test, bf16=True)["all"]
    # A constant's MAE is least at the median; the mean is what is usually shown. The harder one counts.
    constants = [
        score(test, lambda c, h=h: np.full(c.chm_m.shape, h)) for h in (np.median(train), train.mean())
    ]
    return {
        "mae_m": ours["mae_m"],
        "r": ours["r"],
        "constant_mae_m": min(table["all"]["mae_m"] for table in constants),
        "mean_mae_m": constants[1]["all"]["mae_m"],
    }


def run(out: Path, pretrain_steps: int, steps: int, windows: int, objective: str) -> dict[str, object]:
    """The whole chain; returns what results.json holds."""
    started, begun = time.monotonic(), time.process_time()
    chips = out / "chips"
    write_chips(chips, windows)
    encoder = pretrain_encoder(chips, out / "pretrain", pretrain_steps, objective) if pretrain_steps else None
    cut = time.monotonic()
    found = judge(chips, tune(chips, out / "finetune", steps, encoder))
    return {
        "objective": objective if encoder else "none",
        "pretrain_steps": pretrain_steps,
        "steps": steps,
        **{k: round(v, 3) for k, v in found.items()},
        "share_of_constant": round(found["mae_m"] / found["constant_mae_m"], 3),
        "minutes": round((time.monotonic() - started) / 60, 1),
        "minutes_before_tuning": round((cut - started) / 60, 1),
        "cpu_minutes": round((time.process_time() - begun) / 60, 1),
    }


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--pretrain-steps", type=int, default=150)
    parser.add_argument("--steps", type=int, default=1400)
    parser.add_argument("--windows", type=int, default=2, help="chips of every training scene")
    parser.add_argument("--objective", choices=("dinov2", "mae"), default="dinov2")
    parser.add_argument("--quick", action="store_true", help="a few steps on a few chips")
    args = parser.parse_args()
    from canopy.runtime import setup_logging

    setup_logging()
    if args.quick:
        args.pretrain_steps, args.steps, args.windows = 2, 4, 1
    result = run(args.out, args.pretrain_steps, args.steps, args.windows, args.objective)
    (args.out / "results.json").write_text(json.dumps(result, indent=1))
    for key, value in result.items():
        print(f"{key:22} {value}")
    reached = float(str(result["share_of_constant"])) < SHARE
    print(f"{'aim':22} below {SHARE} of the constant: {'reached' if reached else 'missed'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
