"""Scores of a model beside its baselines, as data for the checkpoint's card and as the model card's text."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from canopy.chips.store import Chip, ChipStore
from canopy.models.height import HeightModel
from canopy.training.baselines import fit_baselines
from canopy.training.scoring import Table, plain, predict_chip, score

OVERLAP_PX = 64


def score_with_baselines(
    model: HeightModel, store: ChipStore, splits: tuple[str, ...]
) -> dict[str, dict[str, Table]]:
    """Score the model and both baselines on the same pixels of each split.

    Returns:
        split -> {'model', 'training_mean', 'ridge'} -> site -> n, mae_m, rmse_m, r, bias_m. A
        correlation that does not exist (a constant) is None.
    """
    baselines = fit_baselines(store.of_split("train"))

    def by_model(chip: Chip) -> np.ndarray:
        return predict_chip(model, chip, model.config.crop_px, OVERLAP_PX)

    predictors: dict[str, Callable[[Chip], np.ndarray]] = {
        "model": by_model,
        "training_mean": baselines.constant,
        "ridge": baselines.regression,
    }
    return {
        split: {name: plain(score(store.of_split(split), p)) for name, p in predictors.items()}
        for split in splits
        if store.of_split(split)
    }


def markdown_table(scores: dict[str, Table]) -> str:
    """One split's scores as a Markdown table, a row per site."""
    lines = [
        "| site | pixels | MAE m | r | bias m | MAE training mean | MAE ridge | r ridge |",
        "|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for site, row in scores["model"].items():
        mean, ridge = scores["training_mean"][site], scores["ridge"][site]
        cells = [
            site,
            f"{row['n']:,}",
            f"**{_number(row['mae_m'])}**",
            _number(row["r"]),
            f"{row['bias_m']:+.2f}",
            _number(mean["mae_m"]),
            _number(ridge["mae_m"]),
            _number(ridge["r"]),
        ]
        lines.append(f"| {' | '.join(cells)} |")
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
                f"- data: {len(data['train_ids'])} training and {len(data['val_ids'])} validation chips, "
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
    parts += [
        "Every row counts the same pixels for all columns: 1 m cells with both image and lidar. The ridge "
        "regression sees colour, greenness and texture in 3, 9 and 21 m windows, with all their products.",
        "## Limits",
        card.get("limits", ""),
    ]
    return "\n\n".join(parts) + "\n"
