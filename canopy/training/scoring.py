"""Scores on chips: a model's or a baseline's heights against the lidar, per site, on the same pixels."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

import numpy as np
import torch

from canopy.chips.store import Chip
from canopy.models.fill import fill_invalid
from canopy.models.height import HeightModel

Predictor = Callable[[Chip], np.ndarray]
Table = dict[str, dict[str, float | None]]


def score_chips(
    model: HeightModel, chips: Iterable[Chip], *, crop_px: int | None = None, overlap_px: int = 64
) -> dict[str, dict[str, float]]:
    """Table of site -> n, mae_m, rmse_m, r, bias_m at 1 m; see `score`."""
    side = crop_px or model.config.crop_px
    return score(chips, lambda chip: predict_chip(model, chip, side, overlap_px))


def score(chips: Iterable[Chip], predictor: Predictor) -> dict[str, dict[str, float]]:
    """Score `predictor` (chip -> heights (h, w) at 1 m) on pixels with both image and height.

    Returns:
        One row per site in order of appearance, then 'all but plots', 'plots' (where there are any) and
        'all', each over its pooled pixels. Empty where there are no chips.
    """
    sites: dict[str, list[tuple[np.ndarray, np.ndarray]]] = {}
    groups: dict[str, list[tuple[np.ndarray, np.ndarray]]] = {"all but plots": [], "plots": [], "all": []}
    for chip in chips:
        known = scored_pixels(chip)
        pair = (predictor(chip)[known], chip.chm_m[known])
        sites.setdefault(chip.row.site, []).append(pair)
        groups["plots" if chip.row.kind == "neon" else "all but plots"].append(pair)
        groups["all"].append(pair)
    if not groups["all"]:
        return {}
    tables = {**sites, **{k: v for k, v in groups.items() if v}}
    return {
        name: _row(*(np.concatenate(x) for x in zip(*pairs, strict=True))) for name, pairs in tables.items()
    }


def headline(table: dict[str, dict[str, float]]) -> dict[str, float]:
    """The row that chooses between models: all but plots, or all where there are only plots."""
    return table.get("all but plots") or table["all"]


def scored_pixels(chip: Chip) -> np.ndarray:
    """Bool (h, w): height known and all of its image pixels present."""
    v = chip.image_valid
    return np.isfinite(chip.chm_m) & v[0::2, 0::2] & v[1::2, 0::2] & v[0::2, 1::2] & v[1::2, 1::2]


def _row(pred: np.ndarray, truth: np.ndarray) -> dict[str, float]:
    pred, truth = pred.astype(np.float64), truth.astype(np.float64)
    error = pred - truth
    varies = truth.size > 1 and pred.std() > 1e-9 and truth.std() > 1e-9
    return {
        "n": int(truth.size),
        "mae_m": float(np.abs(error).mean()),
        "rmse_m": float(np.sqrt((error**2).mean())),
        "r": float(np.corrcoef(pred, truth)[0, 1]) if varies else float("nan"),
        "bias_m": float(error.mean()),
    }


def plain(table: dict[str, dict[str, float]]) -> Table:
    """Rounded to the millimetre, NaN to None, so that JSON stays JSON."""
    return {
        site: {k: None if math.isnan(v) else round(v, 3) for k, v in row.items()}
        for site, row in table.items()
    }


@torch.inference_mode()
def predict_chip(model: HeightModel, chip: Chip, crop_px: int, overlap_px: int, batch: int = 4) -> np.ndarray:
    """Heights (h, w) in metres at 1 m, from crops of the chip's image with a linear cross-fade.

    Each crop sees invalid pixels filled from itself alone, as the real inference does.
    """
    H, W = chip.rgb.shape[1:]
    image, valid = chip.rgb.astype(np.float32) / 255.0, chip.image_valid
    total, weights = np.zeros((H, W), np.float64), np.zeros((H, W), np.float64)
    window = _taper(crop_px, overlap_px)
    corners = [(r, c) for r in _starts(H, crop_px, overlap_px) for c in _starts(W, crop_px, overlap_px)]
    for first in range(0, len(corners), batch):
        part = corners[first : first + batch]
        crops = np.stack([_crop(image, valid, r, c, crop_px) for r, c in part])
        inputs = torch.from_numpy(crops).to(model.mean.device).contiguous(memory_format=torch.channels_last)
        heights = model(inputs)[:, 0].float().cpu().numpy()
        for (r, c), height in zip(part, heights, strict=True):
            h, w = min(crop_px, H - r), min(crop_px, W - c)
            total[r : r + h, c : c + w] += (height * window)[:h, :w]
            weights[r : r + h, c : c + w] += window[:h, :w]
    full = total / weights
    return full.reshape(H // 2, 2, W // 2, 2).mean(axis=(1, 3)).astype(np.float32)


def _starts(length: int, crop_px: int, overlap_px: int) -> list[int]:
    if length <= crop_px:
        return [0]
    step = crop_px - overlap_px
    return [*range(0, length - crop_px, step), length - crop_px]


def _taper(crop_px: int, overlap_px: int) -> np.ndarray:
    ramp = np.minimum(np.arange(crop_px) + 1.0, np.arange(crop_px, 0, -1.0))
    ramp = np.minimum(ramp / max(overlap_px, 1), 1.0)
    return np.minimum.outer(ramp, ramp)


def _crop(image: np.ndarray, valid: np.ndarray, row: int, col: int, side: int) -> np.ndarray:
    """Crop (3, side, side), padded where the image ends, invalid pixels filled."""
    rgb, ok = np.zeros((3, side, side), np.float32), np.zeros((side, side), bool)
    part = image[:, row : row + side, col : col + side]
    rgb[:, : part.shape[1], : part.shape[2]] = part
    ok[: part.shape[1], : part.shape[2]] = valid[row : row + side, col : col + side]
    return fill_invalid(rgb, ok)
