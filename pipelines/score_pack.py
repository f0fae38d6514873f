"""Score a model beside the training mean and a ridge regression on the same pixels of a chips folder.

The regression sees what a forester without a network would measure per pixel: colour, greenness, and the
mean and roughness of brightness around it at three scales, with all squares and products.

`--publish MODEL.safetensors` stores the scores in a copy of the model. A model that was trained on the val
rows too cannot be judged by them: `--unseen SIBLING` names the same training without them, whose val scores
and calibration the copy gets instead.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np

from canopy.config import named_values
from canopy.errors import CanopyError

OVERLAP_PX = 64
WINDOWS_M = (3, 9, 21)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("chips", type=Path, help="folder of canopy data chips")
    parser.add_argument("--model", default="default")
    parser.add_argument("--splits", default="val", help="val,test,test_hard; test is for reports only")
    parser.add_argument(
        "--unseen", metavar="SIBLING", help="model file: val scores and calibration of this one"
    )
    parser.add_argument("--crop-px", type=int, help="score, and publish, with this crop side")
    parser.add_argument("--overlap-px", type=int, help="publish with this overlap of crops")
    parser.add_argument("--margin-px", type=int, help="publish with this margin of crops")
    parser.add_argument("--publish", type=Path, help="write the model with these scores here")
    parser.add_argument("--json", type=Path, help="write all scores here")
    parser.add_argument("--note", action="append", default=[], metavar="KEY=TEXT", help="facts for the card")
    args = parser.parse_args()
    try:
        _run(args)
    except CanopyError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    return 0


def _run(args: argparse.Namespace) -> None:
    from canopy.calibration.intervals import CARD_KEY as GAP
    from canopy.inference.layers import CARD_KEY as QUALITY
    from canopy.models.checkpoint import load_model, save_checkpoint
    from canopy.models.heads import CARD_KEY as INTERVALS

    notes = named_values(args.note, "--note")
    model = load_model(args.model)
    lattice = {name: getattr(args, name) for name in ("crop_px", "overlap_px", "margin_px")}
    model.config = dataclasses.replace(model.config, **{k: v for k, v in lattice.items() if v is not None})
    scores = beside_baselines(model, args.chips, args.splits.split(","))
    sibling = load_model(args.unseen) if args.unseen else None
    if sibling:
        scores |= beside_baselines(sibling, args.chips, ["val"])
    for split, tables in scores.items():
        print(f"{split}\n{markdown(tables)}\n")
    if args.json:
        args.json.write_text(json.dumps(scores, indent=1))
    if args.publish:
        card = {**model.card, **notes, "scores": {**model.card.get("scores", {}), **scores}}
        if sibling:
            card |= {key: sibling.card[key] for key in (INTERVALS, GAP, QUALITY) if key in sibling.card}
        for split in scores:
            card[split] = scores[split]["model"]
        save_checkpoint(args.publish, model, json.loads(json.dumps(card)))


def beside_baselines(model: Any, chips: Path, splits: Iterable[str]) -> dict[str, dict[str, Any]]:
    """split -> {'model', 'training_mean', 'ridge'} -> site -> scores, on the same pixels."""
    from canopy.chips.store import ChipShards
    from canopy.training.scoring import heights_of, plain, score

    shards = ChipShards(chips)

    def of(split: str) -> ChipShards:
        return shards.subset([row for row in shards.rows if row.split == split])

    mean_m, ridge = fit_baselines(of("train"))
    predictors: dict[str, Callable[[Any], np.ndarray]] = {
        "model": lambda chip: heights_of(model, chip, model.config.crop_px, OVERLAP_PX),
        "training_mean": lambda chip: np.full(chip.chm_m.shape, mean_m),
        "ridge": ridge,
    }
    found = {split: of(split) for split in splits}
    return {
        split: {name: plain(score(part, predictor)) for name, predictor in predictors.items()}
        for split, part in found.items()
        if len(part)
    }


def fit_baselines(chips: Iterable[Any], per_chip: int = 1500) -> tuple[float, Callable[[Any], np.ndarray]]:
    """Mean height of training chips, and a ridge regression fitted to some of their pixels; synthetic chips
    are left out."""
    rng = np.random.default_rng(0)
    features, heights, total, count = [], [], 0.0, 0
    for chip in chips:
        known = np.flatnonzero(chip.scored)
        if chip.row.kind == "synth" or not known.size:
            continue
        total, count = total + float(chip.chm_m.ravel()[known].sum()), count + known.size
        chosen = rng.choice(known, min(per_chip, known.size), replace=False)
        features.append(pixel_features(chip)[chosen])
        heights.append(chip.chm_m.ravel()[chosen])
    x, y = np.concatenate(features), np.concatenate(heights)
    centre, scale = x.mean(axis=0), x.std(axis=0) + 1e-6

    def expand(x: np.ndarray) -> np.ndarray:
        x = (x - centre) / scale
        rows, cols = np.triu_indices(x.shape[1])
        return np.concatenate([np.ones((len(x), 1)), x, x[:, rows] * x[:, cols]], axis=1)

    design = expand(x)
    penalty = 10.0 * np.eye(design.shape[1])
    penalty[0, 0] = 0.0
    coefficients = np.linalg.solve(design.T @ design + penalty, design.T @ y)

    def predict(chip: Any) -> np.ndarray:
        heights = np.maximum(expand(pixel_features(chip)) @ coefficients, 0.0)
        return heights.reshape(chip.chm_m.shape).astype(np.float32)

    return total / count, predict


def pixel_features(chip: Any) -> np.ndarray:
    """Features (h * w, 21) at 1 m: r, g, b, greenness, edge; mean and spread of luma, and mean greenness and
    edge, in three windows; colour means in the largest."""
    from scipy import ndimage

    from canopy.models.height import fill_invalid

    rgb = fill_invalid(chip.rgb.astype(np.float32) / 255.0, chip.image_valid)
    fine = rgb.mean(axis=0)  # 0.5 m: carries the texture that averaging to 1 m would lose
    rgb = rgb.reshape(3, rgb.shape[1] // 2, 2, rgb.shape[2] // 2, 2).mean(axis=(2, 4))
    total = rgb.sum(axis=0) + 1e-3
    green = (2 * rgb[1] - rgb[0] - rgb[2]) / total
    edge = np.hypot(ndimage.sobel(fine, 0), ndimage.sobel(fine, 1))
    edge = edge.reshape(green.shape[0], 2, green.shape[1], 2).mean(axis=(1, 3))
    out = [*rgb, green, edge]
    for window in WINDOWS_M:
        side = 2 * window + 1
        mean, square = ndimage.uniform_filter(fine, side), ndimage.uniform_filter(fine * fine, side)
        out += [mean[::2, ::2], np.sqrt(np.maximum(square - mean * mean, 0.0))[::2, ::2]]
        out += [ndimage.uniform_filter(green, window), ndimage.uniform_filter(edge, window)]
    out += [ndimage.uniform_filter(band, WINDOWS_M[-1]) for band in rgb]
    out.append(out[0] / total)
    return np.stack(out).reshape(len(out), -1).T.astype(np.float64)


def markdown(scores: dict[str, Any]) -> str:
    """One split's scores as a Markdown table, a row per site."""
    names = ("mae_m", "r", "r2", "block_r2", "edge_error", "bias_m")
    lines = [f"| site | pixels | {' | '.join(names)} | MAE training mean | MAE ridge | r ridge |"]
    lines.append(f"|---|{'---:|' * 10}")
    for site, row in scores["model"].items():
        mean, ridge = scores["training_mean"][site], scores["ridge"][site]
        values = [*(row.get(name) for name in names), mean["mae_m"], ridge["mae_m"], ridge["r"]]
        cells = [site, f"{row['n']:,}", *("-" if v is None else f"{v:.2f}" for v in values)]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    raise SystemExit(main())
