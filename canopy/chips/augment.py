"""Augmentation of one pair: geometry for image and heights together, colour for the image alone.

Other places come from other cameras, seasons, suns and compressions. With a few hundred training tiles the
colour of a pixel would be learned by heart, so colour is varied far beyond what looks natural; shape,
texture and shadow are what is left to learn from.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy import ndimage

Rng = np.random.Generator


@dataclass(frozen=True)
class AugmentConfig:
    """How strongly to vary. 0 switches a part off; the numbers are standard deviations or half ranges.

    Attributes:
        colour: scale of every colour change at once.
        gsd_low, gsd_high: range of the ground sample distance relative to the true one.
        gsd_chance: how often it is varied.
        hide_chance: how often part of the image is hidden, as by a nodata collar.
        black_chance: how often hidden pixels stay black instead of being filled.
        turn: quarter turns and flips. Without them the sun stays where it was, which helps a model for one
            camera and hour, and harms one for all.
    """

    colour: float = 1.0
    gsd_low: float = 0.8
    gsd_high: float = 1.25
    gsd_chance: float = 0.5
    hide_chance: float = 0.15
    black_chance: float = 0.15
    turn: bool = True


def dihedral(rng: Rng, *arrays: np.ndarray) -> tuple[np.ndarray, ...]:
    """The same random flip and quarter turn for all arrays; the last two axes are rows and columns."""
    turns, flip = int(rng.integers(4)), bool(rng.integers(2))
    return tuple(turn(array, turns, flip) for array in arrays)


def turn(array: np.ndarray, turns: int, flip: bool) -> np.ndarray:
    """`turns` quarter turns to the left, then mirrored left to right if `flip`; over the last two axes."""
    array = np.rot90(array, turns, axes=(-2, -1))
    return array[..., ::-1] if flip else array


def turn_points(points: np.ndarray, side: float, turns: int, flip: bool) -> np.ndarray:
    """Where points (n, 2) of row, col on a square of `side` go when `turn` turns the square."""
    row, col = points[:, 0], points[:, 1]
    for _ in range(turns % 4):
        row, col = side - col, row
    return np.stack([row, side - col if flip else col], axis=1)


def vary_colour(rgb: np.ndarray, rng: Rng, strength: float = 1.0) -> np.ndarray:
    """Another camera, season, sun or compression: float (3, H, W) in 0..1 -> the same, still in 0..1."""
    if strength <= 0:
        return rgb
    x = _vary_tone(rgb.astype(np.float32), rng, strength)
    x = _vary_hue(x, rng, strength)
    x = _vary_sharpness(x, rng, strength)
    return np.clip(x, 0.0, 1.0)


def _vary_tone(x: np.ndarray, rng: Rng, s: float) -> np.ndarray:
    """Gamma, contrast, brightness, per-channel gain and offset, haze."""
    x = np.power(np.clip(x, 1e-4, 1.0), np.float32(np.exp(rng.normal(0, 0.22 * s))))
    mean = x.mean()
    x = (x - mean) * np.float32(np.exp(rng.normal(0, 0.2 * s))) + mean
    gain = np.exp(rng.normal(0, 0.09 * s, (3, 1, 1)))
    offset = rng.normal(0, 0.03 * s, (3, 1, 1)) + rng.normal(0, 0.06 * s)
    x = x * gain.astype(np.float32) + offset.astype(np.float32)
    if rng.random() < 0.2 * min(s, 1):
        share = np.float32(rng.uniform(0, 0.35))
        veil = rng.uniform(0.55, 0.9) + rng.uniform(-0.08, 0.08, (3, 1, 1))
        x = x * (1 - share) + share * veil.astype(np.float32)
    return x


def _vary_hue(x: np.ndarray, rng: Rng, s: float) -> np.ndarray:
    """Saturation, and a mixing matrix that turns hues and crosstalks bands."""
    grey = x.mean(axis=0, keepdims=True)
    keep = 0.0 if rng.random() < 0.06 * min(s, 1) else float(np.exp(rng.normal(0, 0.35 * s)))
    x = grey + (x - grey) * np.float32(min(keep, 2.5))
    mix = np.eye(3) + rng.normal(0, 0.05 * s, (3, 3))
    mix /= mix.sum(axis=1, keepdims=True)  # greys stay grey: the white balance is varied elsewhere
    return np.einsum("ij,jhw->ihw", mix.astype(np.float32), x)


def _vary_sharpness(x: np.ndarray, rng: Rng, s: float) -> np.ndarray:
    """Blur, sharpening halos, resampling, block compression of colour, sensor noise."""
    draw = rng.random()
    if draw < 0.25:
        x = ndimage.gaussian_filter(x, (0, *(rng.uniform(0.4, 1.2) * min(s, 1.5),) * 2), truncate=2.5)
    elif draw < 0.45:
        soft = ndimage.uniform_filter(x, (0, 3, 3))
        x = x + np.float32(rng.uniform(0.2, 1.2) * s) * (x - soft)
    if rng.random() < 0.2:
        grey = x.mean(axis=0, keepdims=True)
        colour = x - grey  # chroma at a quarter of the detail, as JPEG stores it
        coarse = colour.reshape(3, x.shape[1] // 2, 2, x.shape[2] // 2, 2).mean(axis=(2, 4))
        x = grey + coarse.repeat(2, axis=1).repeat(2, axis=2)
    if rng.random() < 0.4:
        size = (1, *x.shape[1:]) if rng.random() < 0.5 else x.shape
        noise = rng.standard_normal(size, dtype=np.float32)
        x = x + np.float32(rng.uniform(0, 0.03) * s) * noise
    return x


def hide_part(valid: np.ndarray, rng: Rng) -> np.ndarray:
    """Hide the outside of a random rectangle or one side of a random line: bool (H, W) -> bool (H, W)."""
    H, W = valid.shape
    if rng.random() < 0.5:
        h, w = int(rng.uniform(0.15, 0.95) * H), int(rng.uniform(0.15, 0.95) * W)
        top, left = int(rng.integers(0, H - h + 1)), int(rng.integers(0, W - w + 1))
        keep = np.zeros_like(valid)
        keep[top : top + h, left : left + w] = True
    else:
        angle, share = rng.uniform(0, 2 * np.pi), rng.uniform(0.1, 0.5)
        rows, cols = np.mgrid[0:H, 0:W]
        along = (rows / H - 0.5) * np.sin(angle) + (cols / W - 0.5) * np.cos(angle)
        keep = along > -share
    return valid & keep
