"""Scores of a model beside its baselines, as data for the checkpoint's card and as the model card's text."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from canopy.chips.store import Chip
from canopy.models.height import HeightModel
from canopy.training.baselines import fit_baselines
from canopy.training.data import split_chips
from canopy.training.scoring import Table, headline, plain, predict_chip, score

OVERLAP_PX = 64


def score_with_baselines(
    model: HeightModel, chips: Path, splits: tuple[str, ...]
) -> dict[str, dict[str, Table]]:
    """Score the model and both baselines on the same pixels of each split.

    Args:
        model: predicts with crops of `model.config.crop_px`.
        chips: a folder of `canopy data chips`.
        splits: those without chips are left out.

    Returns:
        split -> {'model', 'training_mean', 'ridge'} -> site -> the row of `scoring.score`. A score that does
        not exist (the correlation of a constant) is None.
    """
    baselines = fit_baselines(split_chips(chips, "train"))

    def by_model(chip: Chip) -> np.ndarray:
        return predict_chip(model, chip, model.config.crop_px, OVERLAP_PX)

    predictors: dict[str, Callable[[Chip], np.ndarray]] = {
        "model": by_model,
        "training_mean": baselines.constant,
        "ridge": baselines.regression,
    }
    found = {split: split_chips(chips, split) for split in splits}
    return {
        split: {name: plain(score(part, p)) for name, p in predictors.items()}
        for split, part in found.items()
        if len(part)
    }


def markdown_table(scores: dict[str, Table]) -> str:
    """One split's scores as a Markdown table, a row per site."""
    lines = [
        "| site | pixels | MAE m | r | R2 | block R2 | edge error | bias m | MAE training mean | MAE ridge "
        "| r ridge |",
        f"|---|{'---:|' * 10}",
    ]
    for site, row in scores["model"].items():
        mean, ridge = scores["training_mean"][site], scores["ridge"][site]
        cells = [site, f"{row['n']:,}", f"**{_number(row['mae_m'])}**"]
        cells += [_number(row.get(name)) for name in ("r", "r2", "block_r2", "edge_error")]
        cells += [
            f"{row['bias_m']:+.2f}",
            _number(mean["mae_m"]),
            _number(ridge["mae_m"]),
            _number(ridge["r"]),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def height_table(scores: dict[str, Table]) -> str:
    """Bias by measured height of every predictor, over all sites without plots; '' for older cards."""
    rows = {name: headline(table) for name, table in scores.items()}
    bins = [k for k in rows["model"] if k.startswith("bias_") and k != "bias_m"]
    if not bins:
        return ""
    heads = [k.removeprefix("bias_").removesuffix("_m") + " m" for k in bins]
    lines = [f"| bias, metres | {' | '.join(heads)} |", f"|---|{'---:|' * len(bins)}"]
    for name, row in rows.items():
        cells = ["-" if row[k] is None else f"{row[k]:+.1f}" for k in bins]
        lines.append(f"| {name.replace('_', ' ')} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def model_card(facts: dict[str, Any]) -> str:
    """docs/model-card.md from `canopy.models.registry.describe`; written by code so that it cannot drift."""
    card = facts["card"]
    scores, data = card.get("scores", {}), card["data"]
    parts = [
        f"# {card['name']}",
        "Canopy height in metres from RGB aerial imagery at "
        f"{facts['gsd_m']} m. Written by `pipelines/score_pack.py`; do not edit.",
        "## Facts",
        "\n".join(
            [
                f"- parameters: {facts['parameters'] / 1e6:.1f} M; file {facts['bytes'] / 1e6:.1f} MB (fp16)",
                f"- licence: {card['licence']}",
                f"- trained: {card['date']}, {card['minutes']} minutes, {card['steps']} steps on "
                f"{card.get('hardware', 'one machine')}",
                f"- command: `{card['command']}` at commit {card.get('commit', 'not recorded')}",
                f"- data: {data.get('train_chips', len(data['train_ids']))} training and "
                f"{data.get('val_chips', len(data['val_ids']))} validation chips, "
                f"sha256 of the chips' sources `{data['sha256'][:16]}`",
                f"- input: {', '.join(facts['bands'])} in 0..1, crops of {facts['crop_px']} px",
                f"- {card.get('data_note', '')}",
            ]
        ),
    ]
    titles = {
        "val": "Validation rows (used for choosing; close to the training tiles in space)",
        "test": "Test rows (a site without training tiles, and the south of another)",
        "test_hard": "Hard test rows (autumn, half leaf-off; reported apart)",
    }
    for split, title in titles.items():
        if split in scores:
            parts += [f"## {title}", markdown_table(scores[split])]
            parts += [table] if (table := height_table(scores[split])) else []
    parts += [
        "Every row counts the same pixels for all columns: 1 m cells with both image and lidar. The ridge "
        "regression sees colour, greenness and texture in 3, 9 and 21 m windows, with all their products.",
        "## Limits",
        card.get("limits", ""),
    ]
    return "\n\n".join(parts) + "\n"
