"""A chip predicted whole: crops of its image, cross-faded, at its labels' pixels. No geo library, no torch.

Scores of trainings and calibrations both stand on this. They lay their crops differently, on purpose: scores
by a fixed overlap, that they compare between models; calibrations by a fixed share of the crop, as maps do.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from canopy.chips.store import Chip
from canopy.models.fill import fill_invalid


def predict_whole(
    network: Callable[[np.ndarray], np.ndarray], chip: Chip, side: int, starts: Callable[[int], list[int]],
    fade_px: float, batch: int = 4,
) -> np.ndarray:  # fmt: skip
    """What a network says of a chip, float32 (l, h, w): the means of the labels' pixels.

    Args:
        network: crops (n, 3, side, side) of `crop_of` -> layers (n, l, side, side).
        chip: with image (3, 2h, 2w).
        side: of a crop, pixels.
        starts: length of the image along an axis, pixels -> the crops' first pixels, which leave no gap.
        fade_px: over how many pixels from its edge a crop's weight rises to the whole.
        batch: crops at a time.
    """
    _, H, W = chip.rgb.shape
    ramp = np.minimum(np.arange(side) + 1.0, np.arange(side, 0, -1.0)) / max(fade_px, 1.0)
    taper = np.minimum.outer(ramp, ramp).clip(max=1.0)
    total, weights = np.zeros((0, H, W)), np.zeros((H, W))
    corners = [(r, c) for r in starts(H) for c in starts(W)]
    for first in range(0, len(corners), batch):
        part = corners[first : first + batch]
        layers = network(np.stack([crop_of(chip, r, c, side) for r, c in part]))
        if first == 0:
            total = np.zeros((layers.shape[1], H, W))
        for (r, c), maps in zip(part, layers, strict=True):
            h, w = min(side, H - r), min(side, W - c)
            total[:, r : r + h, c : c + w] += (maps * taper)[:, :h, :w]
            weights[r : r + h, c : c + w] += taper[:h, :w]
    return (total / weights).reshape(-1, H // 2, 2, W // 2, 2).mean(axis=(2, 4)).astype(np.float32)


def crop_of(chip: Chip, row: int, col: int, side: int) -> np.ndarray:
    """Crop float32 (3, side, side) in 0..1 of a chip's image; holes, and what lies beyond, filled from it."""
    rgb, valid = np.zeros((3, side, side), np.float32), np.zeros((side, side), bool)
    piece = chip.rgb[:, row : row + side, col : col + side]
    rgb[:, : piece.shape[1], : piece.shape[2]] = piece.astype(np.float32) / 255.0
    valid[: piece.shape[1], : piece.shape[2]] = chip.image_valid[row : row + side, col : col + side]
    return fill_invalid(rgb, valid)


def scored_pixels(chip: Chip) -> np.ndarray:
    """Bool (h, w): height known and all of its image pixels present."""
    v = chip.image_valid
    return np.isfinite(chip.chm_m) & v[0::2, 0::2] & v[1::2, 0::2] & v[0::2, 1::2] & v[1::2, 1::2]
