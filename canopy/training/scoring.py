"""Scores on chips: a model's heights against the lidar, per site."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import TypeVar

import numpy as np
import torch

from canopy import metrics
from canopy.chips.store import Chip, ChipRow, predict_chip
from canopy.models.height import HeightModel

Table = dict[str, dict[str, float]]
T = TypeVar("T")
ROW = ("n", "mae_m", "rmse_m", "r", "bias_m", "r2", "block_r2", "edge_error")


def score_chips(
    model: HeightModel, chips: Iterable[Chip], *, crop_px: int | None = None, overlap_px: int = 64
) -> Table:
    """Table of site -> scores at 1 m; see `table_of`."""
    side = crop_px or model.config.crop_px
    return table_of((c.row, chip_sums(heights_of(model, c, side, overlap_px), c)) for c in chips)


@torch.inference_mode()
def heights_of(model: HeightModel, chip: Chip, crop_px: int, overlap_px: int, batch: int = 4) -> np.ndarray:
    """Heights (h, w) in metres at 1 m, from crops of the chip's image with a linear cross-fade.

    Each crop sees invalid pixels filled from itself alone, as the real inference does.
    """

    def network(crops: np.ndarray) -> np.ndarray:
        inputs = torch.from_numpy(crops).to(model.mean.device).contiguous(memory_format=torch.channels_last)
        return model(inputs).float().cpu().numpy()

    return predict_chip(network, chip, crop_px, overlap_px, batch)[0]


def score(chips: Iterable[Chip], predictor: Callable[[Chip], np.ndarray]) -> Table:
    """Scores of any `predictor` (chip -> heights (h, w) at 1 m); see `table_of`."""
    return table_of((chip.row, chip_sums(predictor(chip), chip)) for chip in chips)


def table_of(sums: Iterable[tuple[ChipRow, np.ndarray]]) -> Table:
    """Scores from the rows and `chip_sums` of chips.

    Returns:
        One row per site in order of appearance, then 'all but plots', 'plots' (where there are any) and
        'all', each over its pooled pixels; empty where there are no chips. A row has n, mae_m, rmse_m, r,
        bias_m, r2, block_r2, edge_error (see `canopy.metrics`; blocks and gradients within chips) and
        bias_LOW-HIGH_m, the bias of pixels by their measured height.
    """
    sites: dict[str, np.ndarray] = {}
    groups = {name: np.zeros(len(metrics.FIELDS)) for name in ("all but plots", "plots", "all")}
    for row, found in sums:
        sites[row.site] = sites.get(row.site, 0) + found
        groups["plots" if row.kind == "neon" else "all but plots"] += found
        groups["all"] += found
    kept = {name: total for name, total in groups.items() if total[metrics.COLUMN["n"]]}
    return {name: _row(total) for name, total in {**sites, **kept}.items()}


def chip_sums(pred: np.ndarray, chip: Chip) -> np.ndarray:
    """Sums (len(metrics.FIELDS),) over the pixels of a chip that are `scored`; those of chips add up."""
    known, truth = chip.scored, chip.chm_m
    h, w = known.shape
    one = np.zeros(int(known.sum()), np.int64)
    sums = metrics.pixel_sums(pred[known], truth[known], one, 1)
    side = metrics.BLOCK_PX
    block = (np.arange(h) // side)[:, None] * -(-w // side) + np.arange(w) // side
    blocks = np.zeros(int(block.max(initial=-1)) + 1, np.int64)
    sums += metrics.block_sums(pred[known], truth[known], block[known], blocks, 1)
    if min(h, w) > 2:
        inner = np.zeros((h - 2, w - 2), np.int64)
        sums += metrics.gradient_sums(metrics.gradients(pred, truth, known), inner, 1)
    return sums[0]


def headline(table: Mapping[str, dict[str, T]]) -> dict[str, T]:
    """The row that chooses between models: all but plots, or all where there are only plots."""
    return table.get("all but plots") or table["all"]


def _row(sums: np.ndarray) -> dict[str, float]:
    every = metrics.scores(sums)
    row = {name: float(every[name]) for name in ROW}
    for name, part in zip(metrics.BIN_NAMES, metrics.bin_scores(sums), strict=True):
        row[f"bias_{name}_m"] = float(part["bias_m"])
    return row | {"n": int(row["n"])}


def plain(table: Table) -> dict[str, dict[str, float | None]]:
    """Rounded to the millimetre, NaN to None, so that JSON stays JSON."""
    return {
        site: {k: None if math.isnan(v) else round(v, 3) for k, v in row.items()}
        for site, row in table.items()
    }
