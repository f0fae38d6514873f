"""Scores on chips: a model's or a baseline's heights against the lidar, per site, on the same pixels."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TypeVar

import numpy as np
import torch

from canopy import metrics
from canopy.chips.store import Chip, ChipRow
from canopy.models.fill import fill_invalid
from canopy.models.height import HeightModel
from canopy.training.processes import from_all, share_of

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


def scored_pixels(chip: Chip) -> np.ndarray:
    """Bool (h, w): height known and all of its image pixels present."""
    v = chip.image_valid
    return np.isfinite(chip.chm_m) & v[0::2, 0::2] & v[1::2, 0::2] & v[0::2, 1::2] & v[1::2, 1::2]


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
