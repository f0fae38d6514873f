"""Scores of a model beside two baselines that every model must beat, and the text of its card.

The training mean, and a ridge regression that sees what a forester without a network would measure per
pixel: colour, greenness, and the mean and roughness of brightness around it at three scales, with all
squares and products.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np

OVERLAP_PX = 64
WINDOWS_M = (3, 9, 21)
TITLES = {"val": "Validation rows", "test": "Test rows", "test_hard": "Hard test rows"}


def beside_baselines(model: Any, chips: Path, splits: Iterable[str]) -> dict[str, dict[str, Any]]:
    """split -> {'model', 'training_mean', 'ridge'} -> site -> scores, on the same pixels."""
    from canopy.chips.store import ChipShards
    from canopy.training.height import heights_of, plain, score

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


def card_text(facts: dict[str, Any]) -> str:
    """The model card of what `canopy.models.checkpoint.describe` says, with its card's scores."""
    card, data = facts["card"], facts["card"]["data"]
    lines = [
        f"- parameters: {facts['parameters'] / 1e6:.1f} M; file {facts['bytes'] / 1e6:.1f} MB",
        f"- licence: {card['licence']}",
        f"- trained: {card['date']}, {card['minutes']} minutes, {card['steps']} steps; `{card['command']}`",
        f"- data: {data['train_chips']} training and {data['val_chips']} validation chips",
        f"- sha256 of the chips' ids: `{data['sha256'][:16]}`",
        f"- input: {', '.join(facts['bands'])} in 0..1 at {facts['gsd_m']} m, crops of {facts['crop_px']} px",
    ]
    parts = [f"# {card['name']}", "Canopy height in metres from RGB aerial imagery.", "## Facts"]
    parts.append("\n".join(lines))
    for split, tables in card["scores"].items():
        parts += [f"## {TITLES.get(split, split)}", markdown(tables)]
    parts.append("Every row counts the same pixels for all columns: 1 m cells with both image and lidar.")
    return "\n\n".join(parts) + "\n"
