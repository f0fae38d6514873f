"""Scores on chips: a model's or a baseline's heights against the lidar, per site, on the same pixels.

Two baselines every model must beat on the same pixels: the training mean, and a ridge regression.

The regression sees what a forester without a network would measure per pixel: colour, greenness, and the
mean and roughness of brightness around it at three scales, with all squares and products.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch
from scipy import ndimage

from canopy import metrics
from canopy.chips.store import Chip, ChipRow, predict_whole, scored_pixels
from canopy.models.height import HeightModel, fill_invalid
from canopy.training.run_folder import from_all, share_of

Predictor = Callable[[Chip], np.ndarray]
Table = dict[str, dict[str, float | None]]
T = TypeVar("T")
ROW = ("n", "mae_m", "rmse_m", "r", "bias_m", "r2", "block_r2", "edge_error")


def score_chips(
    model: HeightModel,
    chips: Iterable[Chip],
    *,
    crop_px: int | None = None,
    overlap_px: int = 64,
    bf16: bool = False,
    together: bool = False,
) -> dict[str, dict[str, float]]:
    """Table of site -> scores at 1 m; see `score`. `bf16` predicts with autocast, for scores on the way."""
    side = crop_px or model.config.crop_px
    with torch.autocast(model.mean.device.type, torch.bfloat16, enabled=bf16):
        return score(chips, lambda chip: predict_chip(model, chip, side, overlap_px), together=together)


def score(
    chips: Iterable[Chip], predictor: Predictor, *, together: bool = False
) -> dict[str, dict[str, float]]:
    """Score `predictor` (chip -> heights (h, w) at 1 m) on pixels with both image and height.

    Args:
        chips: a sequence, where `together`.
        predictor: what is scored.
        together: all processes call this, each predicts a part of the chips, and all get the whole table.

    Returns:
        One row per site in order of appearance, then 'all but plots', 'plots' (where there are any) and
        'all', each over its pooled pixels; empty where there are no chips. A row has n, mae_m, rmse_m, r,
        bias_m, r2, block_r2, edge_error (see `canopy.metrics`; blocks and gradients within chips) and
        bias_LOW-HIGH_m, the bias of pixels by their measured height.
    """
    sites: dict[str, np.ndarray] = {}
    groups = {name: np.zeros(len(metrics.FIELDS)) for name in ("all but plots", "plots", "all")}
    for _, row, sums in sorted(_every_chip(chips, predictor, together), key=lambda found: found[0]):
        sites[row.site] = sites.get(row.site, 0) + sums
        groups["plots" if row.kind == "neon" else "all but plots"] += sums
        groups["all"] += sums
    kept = {name: sums for name, sums in groups.items() if sums[metrics.COLUMN["n"]]}
    return {name: _row(sums) for name, sums in {**sites, **kept}.items()}


def _every_chip(
    chips: Iterable[Chip], predictor: Predictor, together: bool
) -> list[tuple[int, ChipRow, np.ndarray]]:
    """Number, row and sums of each chip. They are added in order, so that any split gives the same bits."""
    mine: Iterable[tuple[int, Chip]] = enumerate(chips)
    if together:
        every = chips if isinstance(chips, Sequence) else list(chips)
        mine = ((i, every[i]) for i in share_of(len(every)))
    found = [(i, c.row, chip_sums(predictor(c), c.chm_m, scored_pixels(c))) for i, c in mine]
    return from_all(found) if together else found


def chip_sums(pred: np.ndarray, truth: np.ndarray, known: np.ndarray) -> np.ndarray:
    """Sums (len(metrics.FIELDS),) of one chip's heights (h, w) where `known`; chips' sums add up."""
    h, w = known.shape
    one = np.zeros(int(known.sum()), np.int64)
    sums = metrics.pixel_sums(pred[known], truth[known], one, 1)
    side = metrics.BLOCK_PX
    block = (np.arange(h) // side)[:, None] * -(-w // side) + np.arange(w) // side
    blocks = np.zeros(int(block.max(initial=-1)) + 1, np.int64)
    sums += metrics.block_sums(pred[known], truth[known], block[known], blocks, 1)
    if min(h, w) > 2:
        sums += metrics.edge_sums(pred, truth, known, np.zeros((h - 2, w - 2), np.int64), 1)
    return sums[0]


def headline(table: Mapping[str, dict[str, T]]) -> dict[str, T]:
    """The row that chooses between models: all but plots, or all where there are only plots."""
    return table.get("all but plots") or table["all"]


def _row(sums: np.ndarray) -> dict[str, float]:
    every = metrics.scores(sums)
    row = {name: float(every[name]) for name in ROW}
    edges = [*metrics.HEIGHT_BINS_M, None]
    for low, high, part in zip(edges, edges[1:], metrics.bin_scores(sums), strict=False):
        name = f"bias_{low:g}+_m" if high is None else f"bias_{low:g}-{high:g}_m"
        row[name] = float(part["bias_m"])
    return row | {"n": int(row["n"])}


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

    def network(crops: np.ndarray) -> np.ndarray:
        inputs = torch.from_numpy(crops).to(model.mean.device).contiguous(memory_format=torch.channels_last)
        return model(inputs).float().cpu().numpy()

    def starts(length: int) -> list[int]:
        if length <= crop_px:
            return [0]
        return [*range(0, length - crop_px, crop_px - overlap_px), length - crop_px]

    return predict_whole(network, chip, crop_px, starts, overlap_px, batch)[0]


_WINDOWS_M = (3, 9, 21)


@dataclass(frozen=True)
class Baselines:
    """Fitted baselines. `mean_m`: mean training height; `coefficients` act on standardised features."""

    mean_m: float
    centre: np.ndarray
    scale: np.ndarray
    coefficients: np.ndarray

    def constant(self, chip: Chip) -> np.ndarray:
        """The training mean at every pixel, float32 (h, w) metres."""
        return np.full(chip.chm_m.shape, self.mean_m, np.float32)

    def regression(self, chip: Chip) -> np.ndarray:
        """Ridge regression on colour and texture, float32 (h, w) metres, not below 0."""
        features = pixel_features(chip)
        flat = features.reshape(features.shape[0], -1).T
        design = _expand((flat - self.centre) / self.scale)
        return np.maximum(design @ self.coefficients, 0.0).reshape(chip.chm_m.shape).astype(np.float32)


def pixel_features(chip: Chip) -> np.ndarray:
    """Features (21, h, w) at 1 m: r, g, b, greenness, edge; mean and spread of luma, and mean greenness,
    in three windows; colour means in the largest.
    """
    rgb = fill_invalid(chip.rgb.astype(np.float32) / 255.0, chip.image_valid)
    fine = rgb.mean(axis=0)  # 0.5 m: carries the texture that averaging to 1 m would lose
    rgb = rgb.reshape(3, rgb.shape[1] // 2, 2, rgb.shape[2] // 2, 2).mean(axis=(2, 4))
    total = rgb.sum(axis=0) + 1e-3
    green = (2 * rgb[1] - rgb[0] - rgb[2]) / total
    edge = np.hypot(ndimage.sobel(fine, 0), ndimage.sobel(fine, 1))
    edge = edge.reshape(green.shape[0], 2, green.shape[1], 2).mean(axis=(1, 3))
    out = [*rgb, green, edge]
    for window in _WINDOWS_M:
        side = 2 * window + 1
        mean, square = ndimage.uniform_filter(fine, side), ndimage.uniform_filter(fine * fine, side)
        spread = np.sqrt(np.maximum(square - mean * mean, 0.0))
        out += [mean[::2, ::2], spread[::2, ::2], ndimage.uniform_filter(green, window)]
        out.append(ndimage.uniform_filter(edge, window))
    out += [ndimage.uniform_filter(band, _WINDOWS_M[-1]) for band in rgb]
    out.append(out[0] / total)
    return np.stack(out).astype(np.float64)


def _expand(x: np.ndarray) -> np.ndarray:
    """Constant, linear, and all second-order terms: (n, k) -> (n, 1 + k + k(k+1)/2)."""
    rows, cols = np.triu_indices(x.shape[1])
    return np.concatenate([np.ones((len(x), 1)), x, x[:, rows] * x[:, cols]], axis=1)


def fit_baselines(
    chips: Iterable[Chip], *, per_chip: int = 1500, ridge: float = 10.0, seed: int = 0
) -> Baselines:
    """Fit both on training chips; synthetic chips are left out, plots count with all their pixels.

    Args:
        chips: training chips.
        per_chip: pixels drawn from each chip.
        ridge: penalty on every coefficient but the constant.
        seed: of the draw.
    """
    rng = np.random.default_rng(seed)
    features, heights, total, count = [], [], 0.0, 0
    for chip in chips:
        known = np.flatnonzero(scored_pixels(chip))
        if chip.row.kind == "synth" or not known.size:
            continue
        total, count = total + float(chip.chm_m.ravel()[known].sum()), count + known.size
        chosen = rng.choice(known, min(per_chip, known.size), replace=False)
        features.append(pixel_features(chip).reshape(-1, chip.chm_m.size)[:, chosen].T)
        heights.append(chip.chm_m.ravel()[chosen])
    x, y = np.concatenate(features), np.concatenate(heights)
    centre, scale = x.mean(axis=0), x.std(axis=0) + 1e-6
    design = _expand((x - centre) / scale)
    penalty = ridge * np.eye(design.shape[1])
    penalty[0, 0] = 0.0
    coefficients = np.linalg.solve(design.T @ design + penalty, design.T @ y)
    return Baselines(total / count, centre, scale, coefficients)
