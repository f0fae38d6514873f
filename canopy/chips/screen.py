"""Is this pair fit to learn from? Simple evidence, a reason for every no, and the numbers kept.

The thresholds are meant to drop what is plainly wrong; they are no judge of quality.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy import ndimage

from canopy.chips.register import block_means

NO_LABEL = "no label"
_DARK = 6  # JPEG leaves values up to about this inside areas that were 0,0,0
_SMALLEST_GAP_PX = 64  # smaller dark spots are shadows, not missing image


@dataclass(frozen=True)
class ScreenRules:
    """When to reject. Shares are of the chip's pixels.

    Attributes:
        least_image: share that has an image.
        least_label: share of the label pixels that are known.
        most_cloud: share that is white, bright and smooth.
        least_contrast: standard deviation of brightness (0..1) below which a bright image is haze.
        least_sharpness: finest detail relative to the next coarser. Sharp aerial images have 0.6 to 0.8, one
            blown up twice 0.37, four times 0.31; nothing falls below 0.24.
        least_match: share of the heights' variance that colour and texture explain, where heights vary.
    """

    least_image: float = 0.5
    least_label: float = 0.05
    most_cloud: float = 0.3
    least_contrast: float = 0.035
    least_sharpness: float = 0.33
    least_match: float = 0.02


@dataclass(frozen=True)
class Screening:
    """What was found. `reason` is '' where the chip may stay; numbers are NaN where they mean nothing."""

    reason: str
    image_share: float
    label_share: float
    cloud_share: float
    contrast: float
    sharpness: float
    match: float


def screen(
    rgb: np.ndarray,
    image_valid: np.ndarray,
    height_m: np.ndarray,
    label_valid: np.ndarray,
    gsd_m: float = 0.5,
    rules: ScreenRules | None = None,
) -> Screening:
    """Judge one chip.

    Args:
        rgb: float (3, H, W) in 0..1.
        image_valid: bool (H, W).
        height_m, label_valid: (h, w) on the same ground, H / h and W / w the same whole number.
        gsd_m: of the image.
        rules: thresholds.

    Returns:
        The first reason that applies, in the order: no image, no label, cloud, haze, blur, mismatch.
    """
    rules = rules or ScreenRules()
    image_share, label_share = float(image_valid.mean()), float(label_valid.mean())
    grey = rgb.mean(axis=0, dtype=np.float32)
    cloud = cloud_share(rgb, image_valid, gsd_m)
    contrast = float(grey[image_valid].std()) if image_share else np.nan
    sharp = sharpness(grey, image_valid)
    match = label_match(rgb, image_valid, height_m, label_valid, gsd_m)
    bright = float(grey[image_valid].mean()) if image_share else np.nan
    checks = [
        ("no image", image_share < rules.least_image),
        (NO_LABEL, label_share < rules.least_label),
        ("cloud", cloud > rules.most_cloud),
        ("haze", bright > 0.5 and contrast < rules.least_contrast),
        ("blur", sharp < rules.least_sharpness),
        ("image and label do not match", match < rules.least_match),
    ]
    reason = next((name for name, applies in checks if applies), "")
    return Screening(reason, image_share, label_share, cloud, contrast, sharp, match)


def cloud_share(rgb: np.ndarray, valid: np.ndarray, gsd_m: float) -> float:
    """Share of the known pixels that are white and bright over 5 m, and without texture there."""
    if not valid.any():
        return np.nan
    size = max(3, round(5 / gsd_m))
    mean = ndimage.uniform_filter(rgb.astype(np.float32), (0, size, size))
    grey = rgb.mean(axis=0, dtype=np.float32)
    rough = np.sqrt(np.maximum(ndimage.uniform_filter(grey**2, size) - mean.mean(axis=0) ** 2, 0))
    white = (mean.min(axis=0) > 0.72) & (mean.max(axis=0) - mean.min(axis=0) < 0.09) & (rough < 0.05)
    return float((white & valid).sum() / valid.sum())


def sharpness(grey: np.ndarray, valid: np.ndarray) -> float:
    """Detail of one pixel relative to detail of two: low for an image blown up or out of focus.

    NaN where there is too little detail of either kind to judge (water, bare fields).
    """
    inner = ndimage.binary_erosion(valid, iterations=6)
    if inner.sum() < 400:
        return np.nan
    once = ndimage.gaussian_filter(grey, 0.7)
    twice = ndimage.gaussian_filter(grey, 1.6)
    fine, coarse = (grey - once)[inner].std(), (once - twice)[inner].std()
    return float(fine / coarse) if coarse > 0.004 else np.nan


def label_match(
    rgb: np.ndarray, image_valid: np.ndarray, height_m: np.ndarray, label_valid: np.ndarray, gsd_m: float
) -> float:
    """Share of the variance of heights, over 8 m blocks, that greenness, brightness and texture explain.

    A least-squares fit within the chip, adjusted for its number of terms; NaN where heights hardly vary or
    fewer than 40 blocks are known, for then it says nothing.
    """
    factor = rgb.shape[1] // height_m.shape[0]
    block = max(1, round(8 / gsd_m / factor))
    grey = rgb.mean(axis=0, dtype=np.float32)
    rough = np.abs(grey - ndimage.gaussian_filter(grey, 2.0))
    green = (2 * rgb[1] - rgb[0] - rgb[2]) / (rgb.sum(axis=0) + 0.05)
    known = ndimage.minimum_filter(image_valid, 3)
    features = [block_means(x, block * factor) for x in (grey, rough, green)]
    labels = block_means(label_valid.astype(np.float32), block)
    use = (labels > 0.6) & (block_means(known.astype(np.float32), block * factor) > 0.9)
    heights = block_means(np.where(label_valid, height_m, 0), block)[use] / labels[use]
    if use.sum() < 40 or heights.std() < 2.5:
        return np.nan
    terms = np.stack([np.ones(len(heights)), *(f[use] for f in features)], axis=1).astype(np.float64)
    rest = heights - terms @ np.linalg.lstsq(terms, heights, rcond=None)[0]
    free = len(heights) - terms.shape[1]
    return float(1 - rest.var() / heights.var() * (len(heights) - 1) / free)


def mark_missing(rgb: np.ndarray) -> np.ndarray:
    """Set missing image to exactly 0,0,0 and lift dark but real pixels off it; uint8 (3, H, W)."""
    dark = rgb.max(axis=0) <= _DARK
    labels, count = ndimage.label(dark)
    if count:
        areas = np.bincount(labels.ravel())
        touches_gap = areas >= _SMALLEST_GAP_PX
        touches_gap[0] = False
        missing = touches_gap[labels]
    else:
        missing = dark
    out = np.maximum(rgb, 1)
    out[:, missing] = 0
    return out
