"""One training crop of a chip: a random window, turned, recoloured and partly hidden, with its labels.

Geometry is for image and labels together, colour for the image alone. Other places come from other cameras,
seasons, suns and compressions. With a few hundred training tiles the colour of a pixel would be learned by
heart, so colour is varied far beyond what looks natural; shape, texture and shadow are what is left to learn
from. In NumPy and with an explicit generator, because the image has twice the labels' pixels and GEDI shots
move along, which torchvision's joint transforms do not know, and a resumed run must draw the same again.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from scipy import ndimage
from torch import Tensor
from torch.nn import functional

from canopy.chips.store import Chip
from canopy.chips.targets import FOOTPRINT_RADIUS_M
from canopy.config import Settings
from canopy.models.height import fill_invalid

Rng = np.random.Generator
MAX_SHOTS = 16  # in one crop; a footprint every 60 m along eight tracks does not reach it in 128 m
_TRIES = 8
_BOOST_POWER, _MOST_BOOST = 0.7, 14.0


class AugmentSettings(Settings):
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


class Sample(NamedTuple):
    """One crop, or a batch of them with a leading B.

    Attributes:
        rgb: (3, S, S) in 0..1.
        target: (1, S/2, S/2) canopy height in metres, 0 where unknown.
        weight: (1, S/2, S/2) >= 0, 0 where unknown.
        shots: (K, 5) GEDI shots on the target's grid: row, col, height in metres, weight, radius of the
            disc; row, col and radius in target pixels, (0, 0) the upper-left corner. K is fixed, and rows
            without a shot have weight 0.
    """

    rgb: Tensor
    target: Tensor
    weight: Tensor
    shots: Tensor


class _Cut(NamedTuple):
    rgb: np.ndarray  # (3, S, S) float
    valid: np.ndarray  # (S, S)
    height: np.ndarray  # (S/2, S/2), NaN unknown
    weight: np.ndarray  # (S/2, S/2)
    shots: np.ndarray  # (n, 5)


def make_crop(chip: Chip, crop_px: int, rng: Rng, augment: AugmentSettings | None) -> Sample:
    """A random window of a chip, moved and coloured as `augment` says; None cuts plain crops.

    Windows without labels are drawn again, a few times. Plots are small, so for them less is enough.
    """
    least = 0.005 if chip.row.kind == "neon" else 0.2
    for _ in range(_TRIES):
        cut = _cut(chip, crop_px, rng, augment)
        if (cut.weight > 0).mean() > least or len(cut.shots):
            break
    return _finish(cut, rng, augment)


def _cut(chip: Chip, crop_px: int, rng: Rng, augment: AugmentSettings | None) -> _Cut:
    factor = 1.0
    if augment is not None and rng.random() < augment.gsd_chance:
        factor = float(np.exp(rng.uniform(np.log(augment.gsd_low), np.log(augment.gsd_high))))
    side = 2 * round(crop_px * factor / 2)
    half = side // 2
    h, w = chip.chm_m.shape
    # A chip smaller than the window lies at a random place in it, with nothing around.
    row, col = (int(rng.integers(min(0, n - half), max(0, n - half) + 1)) for n in (h, w))
    rgb = np.zeros((3, side, side), np.float32)
    height = np.full((half, half), np.nan, np.float32)
    weight = np.zeros((half, half), np.float32)
    # Where the window leaves the chip: source rows r0:r1 land at target rows r0-row and on.
    r0, r1, c0, c1 = max(row, 0), min(row + half, h), max(col, 0), min(col + half, w)
    inside = np.s_[r0 - row : r1 - row, c0 - col : c1 - col]
    height[inside] = chip.chm_m[r0:r1, c0:c1]
    weight[inside] = chip.weight[r0:r1, c0:c1]
    rgb[:, 2 * (r0 - row) : 2 * (r1 - row), 2 * (c0 - col) : 2 * (c1 - col)] = chip.rgb[
        :, 2 * r0 : 2 * r1, 2 * c0 : 2 * c1
    ] / np.float32(255.0)
    shots = _shots_in(chip, row, col, half)
    cut = _Cut(rgb, rgb.max(axis=0) > 0, height, weight, shots)
    return cut if side == crop_px else _stretch(cut, crop_px)


def _shots_in(chip: Chip, row: int, col: int, half: int) -> np.ndarray:
    """Shots (n, 5) whose disc lies wholly in the window."""
    if not len(chip.shots):
        return np.zeros((0, 5), np.float32)
    radius = FOOTPRINT_RADIUS_M / chip.row.label_gsd_m
    place = chip.shots[:, :2] - np.array([row, col])
    inside = ((place >= radius) & (place <= half - radius)).all(axis=1)
    disc = np.full((len(place), 1), radius)
    return np.concatenate([place, chip.shots[:, 2:4], disc], axis=1)[inside].astype(np.float32)


def _stretch(cut: _Cut, crop_px: int) -> _Cut:
    """Resample a square cut to `crop_px`, never mixing known with unknown; heights stay what they are."""
    resized = functional.interpolate(
        torch.from_numpy(cut.rgb)[None], size=(crop_px, crop_px), mode="bilinear", antialias=True
    )[0].numpy()
    side, half = cut.valid.shape[0], cut.height.shape[0]
    pick = ((np.arange(crop_px) + 0.5) * side / crop_px).astype(int)
    # Without its one-pixel inner edge, where interpolation reached outside.
    inner = ndimage.binary_erosion(cut.valid, np.ones((3, 3)), border_value=1)
    valid = inner[np.ix_(pick, pick)]
    pick = ((np.arange(crop_px // 2) + 0.5) * half / (crop_px // 2)).astype(int)
    at = np.ix_(pick, pick)
    zoom = (crop_px // 2) / half
    shots = cut.shots * np.array([zoom, zoom, 1, 1, zoom], np.float32)
    return _Cut(resized, valid, cut.height[at], cut.weight[at], shots)


def _finish(cut: _Cut, rng: Rng, options: AugmentSettings | None) -> Sample:
    rgb, valid, height, weight, shots = cut
    black = False
    if options is not None:
        turns, flip = int(rng.integers(4)), bool(rng.integers(2))
        if not options.turn:
            turns, flip = 0, False
        rgb, valid, height, weight = (turn(a, turns, flip) for a in (rgb, valid, height, weight))
        shots = shots.copy()
        shots[:, :2] = turn_points(shots[:, :2], height.shape[0], turns, flip)
        # Most images nearly as they are, some far off: always far off is too hard to learn from at all.
        rgb = vary_colour(rgb, rng, options.colour * rng.random())
        if rng.random() < options.hide_chance:
            shown = hide_part(valid, rng)
            if shown.mean() > 0.02:
                valid = shown
        black = rng.random() < options.black_chance
    rgb = np.where(valid, rgb, 0.0) if black else fill_invalid(np.ascontiguousarray(rgb), valid)
    covered = valid[0::2, 0::2] & valid[1::2, 0::2] & valid[0::2, 1::2] & valid[1::2, 1::2]
    known = np.isfinite(height) & covered & (weight > 0)
    # A 20 m plot has 400 label pixels, a crop 16,384: left alone, plots would not count in a batch.
    boost = min(_MOST_BOOST, (known.size / max(int(known.sum()), 1)) ** _BOOST_POWER)
    return Sample(
        torch.from_numpy(np.ascontiguousarray(rgb, np.float32)),
        torch.from_numpy(np.where(known, height, 0.0).astype(np.float32)[None]),
        torch.from_numpy(np.where(known, weight * np.float32(boost), 0.0).astype(np.float32)[None]),
        torch.from_numpy(_fixed(shots, covered, known, rng)),
    )


def _fixed(shots: np.ndarray, covered: np.ndarray, known: np.ndarray, rng: Rng) -> np.ndarray:
    """Shots as (MAX_SHOTS, 5). A shot counts where the image shows its whole disc, and the less the more of
    it lidar has measured: one number for 490 square metres says nothing new there."""
    out = np.zeros((MAX_SHOTS, 5), np.float32)
    out[:, 4] = 1.0
    if len(shots) > MAX_SHOTS:
        shots = shots[rng.permutation(len(shots))[:MAX_SHOTS]]
    rows, cols = np.ogrid[: covered.shape[0], : covered.shape[1]]
    for i, (row, col, metres, weight, radius) in enumerate(shots):
        disc = (rows + 0.5 - row) ** 2 + (cols + 0.5 - col) ** 2 <= radius**2
        worth = weight * (1 - known[disc].mean()) if disc.any() and covered[disc].all() else 0.0
        out[i] = row, col, metres, worth, radius
    return out


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
