"""Views for self-supervised pretraining: global and local crops of an image, block masks over patches.

Pure functions of an image and a generator. Crops: DINO (Caron et al. 2021, arXiv 2104.14294); block masks:
BEiT (Bao et al. 2021, arXiv 2106.08254), as iBOT and DINOv2 use them.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from canopy.chips.augment import dihedral, vary_colour
from canopy.errors import InputError
from canopy.models.fill import fill_invalid

Rng = np.random.Generator


@dataclass(frozen=True)
class ViewRules:
    """Sizes are in pixels; areas are shares of the image's.

    Attributes:
        global_px, local_px: sides of the crops as the network sees them.
        globals_, locals_: how many.
        global_area, local_area: from what share of the image a crop is cut.
        aspect: most that a crop's sides may differ, as a ratio.
        colour: strength of the colour changes, see `augment.vary_colour`.
    """

    global_px: int = 224
    local_px: int = 96
    globals_: int = 2
    locals_: int = 8
    global_area: tuple[float, float] = (0.32, 1.0)
    local_area: tuple[float, float] = (0.05, 0.32)
    aspect: float = 4 / 3
    colour: float = 0.8


def multi_crop(
    rgb: np.ndarray, valid: np.ndarray, rng: Rng, rules: ViewRules | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Global and local crops of one image, each turned, recoloured and resized on its own.

    Args:
        rgb: float (3, H, W) in 0..1; valid: bool (H, W). Missing pixels are filled (`models.fill`).

    Returns:
        float32 (globals, 3, G, G) and (locals, 3, L, L), in 0..1.
    """
    rules = rules or ViewRules()
    if rgb.ndim != 3 or valid.shape != rgb.shape[1:]:
        raise InputError(f"image {rgb.shape} and validity {valid.shape} do not match")
    full = fill_invalid(np.ascontiguousarray(rgb), valid)
    wide = [view(full, rules.global_px, rules.global_area, rng, rules) for _ in range(rules.globals_)]
    near = [view(full, rules.local_px, rules.local_area, rng, rules) for _ in range(rules.locals_)]
    shapes = (0, 3, rules.global_px, rules.global_px), (0, 3, rules.local_px, rules.local_px)
    return tuple(  # type: ignore[return-value]
        np.stack(v) if v else np.zeros(s, np.float32) for v, s in zip((wide, near), shapes, strict=True)
    )


def view(rgb: np.ndarray, side_px: int, area: tuple[float, float], rng: Rng, rules: ViewRules) -> np.ndarray:
    """One crop: float32 (3, side_px, side_px)."""
    top, left, height, width = crop_box(rgb.shape[1:], area, rules.aspect, rng)
    crop = _resize(rgb[:, top : top + height, left : left + width], side_px)
    (crop,) = dihedral(rng, crop)
    crop = vary_colour(np.ascontiguousarray(crop), rng, rules.colour * rng.random())
    return np.ascontiguousarray(crop, np.float32)


def crop_box(
    shape: tuple[int, ...], area: tuple[float, float], aspect: float, rng: Rng
) -> tuple[int, int, int, int]:
    """(top, left, height, width) of a random box inside (H, W) with a share of its area in `area`."""
    H, W = shape
    share = rng.uniform(*area)
    lean = np.exp(rng.uniform(-np.log(aspect), np.log(aspect)) / 2)
    height = int(np.clip(round(np.sqrt(share) * H * lean), 1, H))
    width = int(np.clip(round(share * H * W / height), 1, W))
    return int(rng.integers(0, H - height + 1)), int(rng.integers(0, W - width + 1)), height, width


def _resize(rgb: np.ndarray, side_px: int) -> np.ndarray:
    import torch
    from torch.nn import functional

    tensor = torch.from_numpy(np.ascontiguousarray(rgb, np.float32))[None]
    size = (side_px, side_px)
    return functional.interpolate(tensor, size=size, mode="bilinear", antialias=True)[0].clamp(0, 1).numpy()


def block_mask(shape: tuple[int, int], ratio: float, rng: Rng, *, least: int = 4) -> np.ndarray:
    """Mask exactly round(ratio * rows * cols) patches, in blocks as far as they fit.

    Args:
        shape: (rows, cols) of the patch grid.
        ratio: share to mask, 0..1.
        least: patches in the smallest block.

    Returns:
        bool (rows, cols), True = masked.
    """
    rows, cols = shape
    if not 0 <= ratio <= 1 or rows < 1 or cols < 1:
        raise InputError(f"mask of {ratio} on {rows} x {cols} patches", expected="a share in 0..1")
    wanted = round(ratio * rows * cols)
    mask = np.zeros(shape, bool)
    for _ in range(40):
        room = wanted - int(mask.sum())
        if room < least:
            break
        size = rng.uniform(least, max(room, least))
        lean = np.exp(rng.uniform(np.log(0.3), -np.log(0.3)) / 2)
        h = int(np.clip(round(np.sqrt(size) * lean), 1, rows))
        w = int(np.clip(round(np.sqrt(size) / lean), 1, cols))
        top, left = int(rng.integers(0, rows - h + 1)), int(rng.integers(0, cols - w + 1))
        block = mask[top : top + h, left : left + w]
        if 0 < (~block).sum() <= room:
            block[:] = True
    free = np.flatnonzero(~mask)
    rest = rng.choice(free, wanted - int(mask.sum()), replace=False)  # the count is exact, by single patches
    mask.flat[rest] = True
    return mask


def batch_masks(
    count: int,
    shape: tuple[int, int],
    rng: Rng,
    *,
    chance: float = 0.5,
    ratios: tuple[float, float] = (0.1, 0.5),
) -> np.ndarray:
    """Masks bool (count, rows, cols) for a batch: a share `chance` of them masked, their ratios spread evenly
    over `ratios`, so that a batch always has the same number of masked patches; order shuffled."""
    masked = round(count * chance)
    steps = np.linspace(*ratios, masked + 1)
    out = np.zeros((count, *shape), bool)
    for i, k in enumerate(rng.permutation(count)[:masked]):
        out[k] = block_mask(shape, (steps[i] + steps[i + 1]) / 2, rng)
    return out
