"""Cut one shard: read, register, screen and write its chips. A pure function of the plan's shard."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from scipy import ndimage

from canopy.chips.plan import LABEL_FACTOR, PlannedChip, Shard
from canopy.chips.register import block_means, image_shift
from canopy.chips.store import NO_SHOTS, SHARDS, Chip, ChipRow, described, read_rows, write_shard
from canopy.chips.targets import chm_target, gap_weight, shots_on
from canopy.errors import DataError, FetchError, ImageryError
from canopy.geo.grid import Grid
from canopy.imagery.base import Imagery
from canopy.imagery.open import open_imagery

DISPLACED, NO_LABEL = "image and label lie too far apart", "no label"
UNREADABLE = "unreadable"
_LEAST_SHIFT_M = 0.5  # half a label pixel: below it, moving changes nothing
_DARK = 6  # JPEG leaves values up to about this inside areas that were 0,0,0
_SMALLEST_GAP_PX = 64  # smaller dark spots are shadows, not missing image

# What the screen rejects: meant to drop what is plainly wrong, no judge of quality. Shares of pixels.
_LEAST_IMAGE, _LEAST_LABEL, _MOST_CLOUD = 0.5, 0.05, 0.3
_HAZE_BRIGHTNESS, _LEAST_CONTRAST = 0.5, 0.035  # of the brightness: its mean, its standard deviation
# Finest detail relative to the next coarser. Sharp aerial images have 0.6 to 0.8, one blown up twice 0.37,
# four times 0.31; nothing falls below 0.24.
_LEAST_SHARPNESS = 0.33
_LEAST_MATCH = 0.02  # share of the heights' variance that colour and texture explain, where heights vary


def cut_shard(shard: Shard, folder: Path) -> bool:
    """Write `folder/shards/NAME.safetensors`, the rows of its rejected chips with it.

    A shard that is there is left as it is, and one is whole or not there: the next run of one that was killed
    makes the missing ones.

    Returns:
        Whether it was cut now.

    Raises:
        OutputError: a file cannot be written.
    """
    path = shard.path(folder)
    if read_rows(path) is not None:
        return False
    found = list(_cut(shard))
    chips = [chip for chip in found if isinstance(chip, Chip)]
    name = f"{SHARDS}/{path.name}"
    write_shard(path, chips, [replace(e.row, shard=name) if isinstance(e, Chip) else e for e in found])
    return True


def _cut(shard: Shard) -> Iterator[Chip | ChipRow]:
    """For every planned chip the chip, or the row that says why there is none."""
    wanted = [chip for chip in shard.chips if not chip.reason]
    yield from (_row(shard, chip, reason=chip.reason) for chip in shard.chips if chip.reason)
    if not wanted:
        return
    # The window around all chips of the block, those that are not wanted left out.
    top, left = (min(chip.window[k] for chip in shard.chips) for k in (0, 1))
    bottom, right = (max(chip.window[k] + chip.window[k + 2] for chip in shard.chips) for k in (0, 1))
    grid = shard.grid.window(top, left, bottom - top, right - left)
    (px, py), corner = grid.pixel, grid.xy(0, 0)
    size = (px * LABEL_FACTOR, 0, corner[0], 0, -py * LABEL_FACTOR, corner[1])
    labels = Grid.of(grid.crs, size, (grid.height // LABEL_FACTOR, grid.width // LABEL_FACTOR))
    try:
        image, heights, facts = _read(shard, grid, labels)
        gedi = shard.pair.gedi
        shots = shots_on(gedi, labels, rh=shard.options.rh) if gedi else NO_SHOTS
    except FetchError:
        raise
    except (ImageryError, DataError) as error:
        yield from (_row(shard, chip, reason=f"{UNREADABLE}: {error.what}") for chip in wanted)
        return
    for planned in wanted:
        chip = _cut_chip(shard, planned, (top, left), image, heights, shots)
        row = replace(chip.row, **facts)
        row = replace(row, reason=chip.row.reason or row.reason)
        yield row if row.reason else replace(chip, row=row)


def _read(shard: Shard, grid: Grid, labels: Grid) -> tuple[Imagery, np.ndarray, dict[str, Any]]:
    """Image and heights of the block, the measured shift undone where it is sure; what was measured."""
    pair, options = shard.pair, shard.options
    image = open_imagery(pair.rgb, crs=pair.crs or None).read(grid)
    if not pair.chm:
        return image, np.full(labels.shape, np.nan, np.float32), {}
    heights = chm_target(pair.chm, labels, options.rule)
    if not options.undo_shift or options.gsd_m > 1.0:
        return image, heights, {}
    fine = heights.repeat(LABEL_FACTOR, 0).repeat(LABEL_FACTOR, 1)
    known = np.isfinite(fine) & image.valid & (image.rgb.max(axis=0) > 0.03)
    shift = image_shift(image.rgb, np.where(known, fine, 0), known, grid.gsd_m)
    if shift is None:
        return image, heights, {}
    undo = shift.is_sure and _LEAST_SHIFT_M <= shift.length_m <= options.most_shift_m
    if undo:
        heights = chm_target(pair.chm, labels, options.rule, (shift.down_m, shift.right_m))
    facts: dict[str, Any] = {
        "shift_down_m": round(shift.down_m, 3), "shift_right_m": round(shift.right_m, 3),
        "shift_sure": shift.is_sure, "shift_applied": undo,
    }  # fmt: skip
    if shift.is_sure and shift.length_m > options.most_shift_m:
        facts["reason"] = DISPLACED
    return image, heights, facts


def _cut_chip(
    shard: Shard,
    chip: PlannedChip,
    corner: tuple[int, int],
    image: Imagery,
    heights: np.ndarray,
    shots: np.ndarray,
) -> Chip:
    """The chip, its row filled; `image`, `heights` and `shots` begin at `corner` of the shard's grid."""
    (row, col), n = (chip.window[k] - corner[k] for k in (0, 1)), LABEL_FACTOR
    height, width = chip.window[2:]
    here = np.s_[row : row + height, col : col + width]
    chm = heights[row // n : (row + height) // n, col // n : (col + width) // n]
    pixels = np.round(image.rgb[:, *here] * 255).astype(np.uint8)
    pixels[:, ~image.valid[here]] = 0
    pixels = mark_missing(pixels)
    near = shots - np.array([row // n, col // n, 0, 0], np.float32)
    near = near[((near[:, :2] >= 0) & (near[:, :2] < [height // n, width // n])).all(axis=1)]
    # GEDI shots alone are labels too, if weak ones.
    need_label = bool(shard.pair.chm) and not len(near)
    reason, evidence = screen(pixels, chm, shard.grid.gsd_m, need_label)
    return described(Chip(_row(shard, chip, reason=reason, **evidence), pixels, chm, near))


def _row(shard: Shard, chip: PlannedChip, **facts: Any) -> ChipRow:
    pair, gsd = shard.pair, round(shard.grid.gsd_m, 4)
    west, south, east, north = (round(v, 6) for v in chip.bounds)
    row, col, height, width = chip.window
    return ChipRow(
        id=chip.id, pair=pair.id, site=pair.site, kind=pair.kind, split=chip.split,
        row=row, col=col, height_px=height, width_px=width, gsd_m=gsd, label_gsd_m=gsd * LABEL_FACTOR,
        crs=chip.crs, west=west, south=south, east=east, north=north,
        weight=round(gap_weight(pair.gap_years), 4), floor_m=pair.floor_m,
        licence=pair.licence, **facts,
    )  # fmt: skip


# ---- is it fit to learn from? -----------------------------------------------------------------------
def screen(
    rgb: np.ndarray, chm_m: np.ndarray, gsd_m: float = 0.5, need_label: bool = True
) -> tuple[str, dict[str, float]]:
    """Judge one chip.

    Args:
        rgb: uint8 (3, H, W), 0,0,0 where there is no image.
        chm_m: (h, w) on the same ground, NaN where unknown; H / h and W / w the same whole number.
        gsd_m: of the image.
        need_label: reject a chip without heights.

    Returns:
        The first reason that applies, in the order: no image, no label, cloud, haze, blur, mismatch; '' where
        the chip may stay. And the evidence, columns of the index; NaN where it means nothing.
    """
    seen, known = rgb.max(axis=0) > 0, np.isfinite(chm_m)
    rgb = rgb / np.float32(255)
    grey = rgb.mean(axis=0, dtype=np.float32)
    bright, contrast = (float(grey[seen].mean()), float(grey[seen].std())) if seen.any() else (np.nan, np.nan)
    cloud, sharp = cloud_share(rgb, seen, gsd_m), sharpness(grey, seen)
    match = label_match(rgb, seen, chm_m, gsd_m)
    checks = [
        ("no image", seen.mean() < _LEAST_IMAGE),
        (NO_LABEL, need_label and known.mean() < _LEAST_LABEL),
        ("cloud", cloud > _MOST_CLOUD),
        ("haze", bright > _HAZE_BRIGHTNESS and contrast < _LEAST_CONTRAST),
        ("blur", sharp < _LEAST_SHARPNESS),
        ("image and label do not match", match < _LEAST_MATCH),
    ]
    evidence = {"cloud_share": cloud, "contrast": contrast, "sharpness": sharp, "match": match}
    reason = next((name for name, applies in checks if applies), "")
    return reason, {name: round(value, 4) for name, value in evidence.items()}


def cloud_share(rgb: np.ndarray, valid: np.ndarray, gsd_m: float) -> float:
    """Share of the known pixels that are white and bright over 5 m, and without texture there."""
    if not valid.any():
        return np.nan
    size = max(3, round(5 / gsd_m))
    mean = ndimage.uniform_filter(rgb, (0, size, size))
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


def label_match(rgb: np.ndarray, valid: np.ndarray, chm_m: np.ndarray, gsd_m: float) -> float:
    """Share of the variance of heights, over 8 m blocks, that greenness, brightness and texture explain.

    A least-squares fit within the chip, adjusted for its number of terms; NaN where heights hardly vary or
    fewer than 40 blocks are known, for then it says nothing.
    """
    factor = rgb.shape[1] // chm_m.shape[0]
    block = max(1, round(8 / gsd_m / factor))
    grey = rgb.mean(axis=0, dtype=np.float32)
    rough = np.abs(grey - ndimage.gaussian_filter(grey, 2.0))
    green = (2 * rgb[1] - rgb[0] - rgb[2]) / (rgb.sum(axis=0) + 0.05)
    seen = ndimage.minimum_filter(valid, 3).astype(np.float32)
    features = [block_means(x, block * factor) for x in (grey, rough, green)]
    labels = block_means(np.isfinite(chm_m).astype(np.float32), block)
    use = (labels > 0.6) & (block_means(seen, block * factor) > 0.9)
    heights = block_means(np.nan_to_num(chm_m), block)[use] / labels[use]
    if use.sum() < 40 or heights.std() < 2.5:
        return np.nan
    terms = np.stack([np.ones(len(heights)), *(f[use] for f in features)], axis=1).astype(np.float64)
    rest = heights - terms @ np.linalg.lstsq(terms, heights, rcond=None)[0]
    free = len(heights) - terms.shape[1]
    return float(1 - rest.var() / heights.var() * (len(heights) - 1) / free)


def mark_missing(rgb: np.ndarray) -> np.ndarray:
    """Set missing image to exactly 0,0,0 and lift dark but real pixels off it; uint8 (3, H, W)."""
    labels, count = ndimage.label(rgb.max(axis=0) <= _DARK)
    missing = np.bincount(labels.ravel(), minlength=count + 1) >= _SMALLEST_GAP_PX
    missing[0] = False  # what is not dark
    out = np.maximum(rgb, 1)
    out[:, missing[labels]] = 0
    return out
