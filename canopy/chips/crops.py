"""One augmented training crop of a chip: image, heights, what they are worth, and the GEDI shots in it."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from canopy.chips.augment import AugmentConfig, hide_part, turn, turn_points, vary_colour
from canopy.chips.shards import ShardChip
from canopy.chips.targets import FOOTPRINT_RADIUS_M
from canopy.models.fill import fill_invalid

MAX_SHOTS = 16  # in one crop; a footprint every 60 m along eight tracks does not reach it in 128 m
_TRIES = 8
_BOOST_POWER, _MOST_BOOST = 0.7, 14.0


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


def make_crop(
    chip: ShardChip, crop_px: int, rng: np.random.Generator, augment: AugmentConfig | None
) -> Sample:
    """A random window of a chip, moved and coloured as `augment` says; None cuts plain crops.

    Windows without labels are drawn again, a few times. Plots are small, so for them less is enough.
    """
    least = 0.005 if chip.row.kind == "neon" else 0.2
    for _ in range(_TRIES):
        cut = _cut(chip, crop_px, rng, augment)
        if (cut.weight > 0).mean() > least or len(cut.shots):
            break
    return _finish(cut, rng, augment)


def _cut(chip: ShardChip, crop_px: int, rng: np.random.Generator, augment: AugmentConfig | None) -> _Cut:
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


def _shots_in(chip: ShardChip, row: int, col: int, half: int) -> np.ndarray:
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
    valid = inner(cut.valid)[np.ix_(pick, pick)]
    pick = ((np.arange(crop_px // 2) + 0.5) * half / (crop_px // 2)).astype(int)
    at = np.ix_(pick, pick)
    zoom = (crop_px // 2) / half
    shots = cut.shots * np.array([zoom, zoom, 1, 1, zoom], np.float32)
    return _Cut(resized, valid, cut.height[at], cut.weight[at], shots)


def inner(valid: np.ndarray) -> np.ndarray:
    """Validity without its one-pixel inner edge, where interpolation reached outside."""
    from scipy import ndimage

    return valid if valid.all() else ndimage.binary_erosion(valid, np.ones((3, 3)), border_value=1)


def _finish(cut: _Cut, rng: np.random.Generator, options: AugmentConfig | None) -> Sample:
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


def _fixed(shots: np.ndarray, covered: np.ndarray, known: np.ndarray, rng: np.random.Generator) -> np.ndarray:
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
