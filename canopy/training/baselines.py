"""Two baselines every model must beat on the same pixels: the training mean, and a ridge regression.

The regression sees what a forester without a network would measure per pixel: colour, greenness, and the
mean and roughness of brightness around it at three scales, with all squares and products.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from scipy import ndimage

from canopy.chips.store import Chip
from canopy.models.fill import fill_invalid
from canopy.training.scoring import scored_pixels

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
