"""What pretraining looks at: global and local views of an image with block masks, in an endless stream.

Views are pure functions of an image and a generator. Crops: DINO (Caron et al. 2021, arXiv 2104.14294); block
masks: BEiT (Bao et al. 2021, arXiv 2106.08254), as iBOT and DINOv2 use them.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from pydantic import Field, field_validator
from torch import Tensor
from torch.nn import functional

from canopy.chips.augment import Rng, turn, vary_colour
from canopy.chips.data import BatchStream, ChipPlaces
from canopy.chips.store import ChipShards
from canopy.config import Settings
from canopy.models.height import fill_invalid

_MASKED_VIEWS, _MASKED_SHARES = 0.5, (0.1, 0.5)
_LEAST_BLOCK = 4  # patches


class PretrainDataSettings(Settings):
    """What is looked at.

    Attributes:
        chips: a folder made by `canopy data chips`, or a list; splits: which of its chips.
        site_power: a site counts as its number of chips to this power: 1 draws chips alike, 0 sites alike.
        workers: processes that prepare views ahead.
    """

    chips: ChipPlaces = (Path("chips"),)
    splits: tuple[str, ...] = ("train",)
    site_power: float = Field(default=0.5, ge=0, le=1)
    workers: int = Field(default=0, ge=0)


class ViewRules(Settings):
    """How views are cut; areas are shares of a chip's.

    Attributes:
        global_px, local_px: sides of the views as the network sees them; globals, locals: how many.
        global_area, local_area: from what share of the image a view is cut.
        aspect: most that a view's sides may differ, as a ratio.
        colour: strength of the colour changes, see `augment.vary_colour`.
    """

    global_px: int = Field(default=224, gt=0)
    local_px: int = Field(default=96, gt=0)
    globals: int = Field(default=2, ge=1)
    locals: int = Field(default=8, ge=0)
    global_area: tuple[float, float] = (0.32, 1.0)
    local_area: tuple[float, float] = (0.05, 0.32)
    aspect: float = Field(default=4 / 3, ge=1)
    colour: float = Field(default=0.8, ge=0)

    @field_validator("global_area", "local_area")
    @classmethod
    def _shares_rise(cls, value: tuple[float, float]) -> tuple[float, float]:
        if not 0 < value[0] <= value[1] <= 1:
            raise ValueError("two rising shares of the chip are needed, above 0 and at most 1")
        return value


class Views(NamedTuple):
    """Views of B images: wide (B, globals, 3, G, G), near (B, locals, 3, L, L) in 0..1, and masks
    (B * globals, rows, cols) over the patches of the wide views, True = masked."""

    wide: Tensor
    near: Tensor
    masks: Tensor


class ViewStream(BatchStream[Views]):
    """Batches of views; labels are not looked at.

    Args:
        shards: chips to draw from; batch: images; rules: of the views; patch_px: side of a mask's patch.
        chances: (n,) of each chip, summing to 1; None draws all alike.
    """

    def __init__(
        self,
        shards: ChipShards,
        batch: int,
        rules: ViewRules,
        patch_px: int,
        seed: int = 0,
        chances: np.ndarray | None = None,
    ) -> None:
        super().__init__(shards, batch, seed, chances)
        self.rules, self.patch_px = rules, patch_px

    def drawn(self, number: int) -> Views:
        rules, rng = self.rules, np.random.default_rng((self.seed, number, 1))
        crops = []
        for _ in range(self.batch):
            chip = self.draw_chip(rng)
            crops.append(multi_crop(chip.rgb.astype(np.float32) / 255, chip.image_valid, rng, rules))
        wide, near = (np.stack(part) for part in zip(*crops, strict=True))
        side = rules.global_px // self.patch_px
        masks = batch_masks(self.batch * rules.globals, (side, side), rng)
        return Views(*(torch.from_numpy(x) for x in (wide, near, masks)))


def multi_crop(
    rgb: np.ndarray, valid: np.ndarray, rng: Rng, rules: ViewRules
) -> tuple[np.ndarray, np.ndarray]:
    """Global and local crops of one image, each turned, recoloured and resized on its own.

    Args:
        rgb: float (3, H, W) in 0..1; valid: bool (H, W). Missing pixels are filled.

    Returns:
        float32 (globals, 3, G, G) and (locals, 3, L, L), in 0..1.
    """
    full = fill_invalid(np.ascontiguousarray(rgb), valid)
    wide = [view(full, rules.global_px, rules.global_area, rng, rules) for _ in range(rules.globals)]
    near = [view(full, rules.local_px, rules.local_area, rng, rules) for _ in range(rules.locals)]
    shapes = (0, 3, rules.global_px, rules.global_px), (0, 3, rules.local_px, rules.local_px)
    return tuple(  # type: ignore[return-value]
        np.stack(v) if v else np.zeros(s, np.float32) for v, s in zip((wide, near), shapes, strict=True)
    )


def view(rgb: np.ndarray, side_px: int, area: tuple[float, float], rng: Rng, rules: ViewRules) -> np.ndarray:
    """One crop: float32 (3, side_px, side_px)."""
    top, left, height, width = crop_box(rgb.shape[1:], area, rules.aspect, rng)
    box = torch.from_numpy(np.ascontiguousarray(rgb[:, top : top + height, left : left + width], np.float32))
    resized = functional.interpolate(box[None], size=(side_px, side_px), mode="bilinear", antialias=True)
    crop = turn(resized[0].clamp(0, 1).numpy(), int(rng.integers(4)), bool(rng.integers(2)))
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


def block_mask(shape: tuple[int, int], ratio: float, rng: Rng) -> np.ndarray:
    """Mask exactly round(ratio * rows * cols) patches, in blocks as far as they fit.

    Args:
        shape: (rows, cols) of the patch grid.
        ratio: share to mask, 0..1.

    Returns:
        bool (rows, cols), True = masked.
    """
    rows, cols = shape
    wanted = round(ratio * rows * cols)
    mask = np.zeros(shape, bool)
    for _ in range(40):
        room = wanted - int(mask.sum())
        if room < _LEAST_BLOCK:
            break
        size = rng.uniform(_LEAST_BLOCK, max(room, _LEAST_BLOCK))
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


def batch_masks(count: int, shape: tuple[int, int], rng: Rng) -> np.ndarray:
    """Masks bool (count, rows, cols) for a batch: half of them masked, by shares spread evenly over 10 to
    50 %, so that a batch always has the same number of masked patches; order shuffled."""
    masked = round(count * _MASKED_VIEWS)
    steps = np.linspace(*_MASKED_SHARES, masked + 1)
    out = np.zeros((count, *shape), bool)
    for i, k in enumerate(rng.permutation(count)[:masked]):
        out[k] = block_mask(shape, (steps[i] + steps[i + 1]) / 2, rng)
    return out
