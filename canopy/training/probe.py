"""A cheap measure of frozen features: ridge regression from patch features to the patch's mean height."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from canopy.chips.shards import ChipShards
from canopy.chips.store import Chip
from canopy.errors import DataError
from canopy.models.encoder import Encoder
from canopy.models.fill import fill_invalid
from canopy.training.ssl_monitor import effective_rank

_SIDE_PX = 256  # chips are cropped to this, so that a probe stays a matter of seconds
_LEAST_KNOWN = 0.5  # share of a patch's label pixels
_LAMBDAS = np.logspace(-4, 2, 7)  # times the number of rows


@dataclass(frozen=True, eq=False)
class Patches:
    """Images and what their patches should say.

    Attributes:
        images: each float (3, H, W) in 0..1, sides multiples of the patch.
        heights: each float64 (rows * cols), metres, NaN where too little is known.
    """

    images: list[Tensor]
    heights: list[np.ndarray]

    @classmethod
    def of(cls, chips: Sequence[Chip], patch: int) -> Patches:
        """From chips; those without a known patch are left out."""
        images, heights = [], []
        for chip in chips:
            h, w = (min(n, _SIDE_PX) // patch * patch for n in chip.rgb.shape[1:])
            if not h or not w:
                continue
            rgb = fill_invalid(chip.rgb[:, :h, :w].astype(np.float32) / 255, chip.image_valid[:h, :w])
            means = patch_means(chip.chm_m[: h // 2, : w // 2], chip.image_valid[:h, :w], patch // 2)
            if np.isfinite(means).any():
                images.append(torch.from_numpy(np.ascontiguousarray(rgb)))
                heights.append(means.ravel())
        return cls(images, heights)


class HeightProbe:
    """Fits frozen features of `train` chips and scores on `val` chips.

    Args:
        train, val: what to fit and what to score on.

    Raises:
        DataError: one of them is empty.
    """

    def __init__(self, train: Patches, val: Patches) -> None:
        for name, part in (("train", train), ("val", val)):
            if not part.images:
                raise DataError(f"the probe has no {name} chips with heights", remedy="or set probe.every=0")
        self.train, self.val = train, val

    @torch.no_grad()
    def score(
        self, encoder: Encoder, normalise: Callable[[Tensor], Tensor], precision: str = "32-true"
    ) -> dict[str, float]:
        """mae_m and r2 of a ridge on the val chips' patches, mae_constant_m beside it, and the features'
        effective rank."""
        known = [np.isfinite(np.concatenate(part.heights)) for part in (self.train, self.val)]
        fitted, scored = (
            _features(encoder, part.images, normalise, precision)[mask]
            for part, mask in zip((self.train, self.val), known, strict=True)
        )
        target, truth = (
            np.concatenate(part.heights)[mask]
            for part, mask in zip((self.train, self.val), known, strict=True)
        )
        guess = ridge(fitted, target, scored)
        return {
            "mae_m": float(np.abs(guess - truth).mean()),
            "r2": float(1 - np.square(guess - truth).mean() / max(truth.var(), 1e-9)),
            "mae_constant_m": float(np.abs(np.median(target) - truth).mean()),
            "rank": effective_rank(torch.from_numpy(scored)),
        }


def open_probe(places: Path | Sequence[Path], patch: int, chips: int, gsd_m: float) -> HeightProbe | None:
    """The probe over chips folders; None where they have no heights. Plots of 20 m are left out.

    Args:
        places: folders of `canopy data chips`; splits train and val are used.
        patch: pixels per token side; chips: how many of each split, spread evenly.
        gsd_m: ground metres per pixel of the encoder.

    Raises:
        DataError: no such chips, or chips of another scale.
    """
    shards = ChipShards(places)
    shards.require_gsd(gsd_m)
    parts = []
    for split in ("train", "val"):
        wanted = [
            i for i, r in enumerate(shards.rows)
            if r.split == split and r.label_share > 0 and r.kind not in ("neon", "synth")
        ]  # fmt: skip
        parts.append(Patches.of([shards[i].as_chip() for i in _spread(wanted, chips)], patch))
    train, val = parts
    return HeightProbe(train, val) if train.images and val.images else None


def _spread(numbers: Sequence[int], count: int) -> list[int]:
    if not numbers:
        return []
    at = np.linspace(0, len(numbers) - 1, min(count, len(numbers))).round().astype(int)
    return [numbers[i] for i in np.unique(at)]


def patch_means(height_m: np.ndarray, image_valid: np.ndarray, side: int) -> np.ndarray:
    """Mean height of each patch of `side` x `side` label pixels, (h / side, w / side); NaN where less than
    half of it is known and seen.

    Args:
        height_m: (h, w), NaN = unknown; image_valid: bool (2 h, 2 w).
    """
    h, w = height_m.shape
    seen = image_valid.reshape(h, 2, w, 2).all(axis=(1, 3))
    known = np.isfinite(height_m) & seen
    blocks = (h // side, side, w // side, side)
    share = known.reshape(blocks).mean(axis=(1, 3))
    total = np.where(known, height_m, 0).astype(np.float64).reshape(blocks).mean(axis=(1, 3))
    return np.where(share >= _LEAST_KNOWN, total / np.maximum(share, 1e-9), np.nan)


def _features(
    encoder: Encoder, images: list[Tensor], normalise: Callable[[Tensor], Tensor], precision: str
) -> np.ndarray:
    device = next(encoder.parameters()).device
    out = []
    with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16-mixed"):
        for image in images:
            tokens = encoder.tokens(normalise(image[None].to(device)))
            out.append(tokens.patches[0].float().cpu().numpy())
    return np.concatenate(out).astype(np.float64)


def ridge(features: np.ndarray, target: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """Predictions (m,) at `wanted` (m, d) of a ridge regression fitted to (n, d) features and (n,) targets.

    Features are standardised; the penalty is the one of least generalised cross-validation error (Golub,
    Heath and Wahba 1979), for which one decomposition of the covariance is enough.
    """
    mean, std = features.mean(axis=0), features.std(axis=0)
    std = np.where(std > 1e-9, std, 1.0)
    x, y = (features - mean) / std, target - target.mean()
    values, vectors = np.linalg.eigh(x.T @ x)
    values = np.maximum(values, 0)
    loads = vectors.T @ (x.T @ y)
    n = len(x)

    def error(penalty: float) -> float:
        freedom = (values / (values + penalty)).sum()
        # |y - x b|^2 with b in the eigenbasis
        weights = loads / (values + penalty)
        rest = y @ y - 2 * weights @ loads + weights**2 @ values
        return float(rest / max(n - freedom, 1e-9) ** 2)

    penalty = min(_LAMBDAS * n, key=error)
    weights = vectors @ (loads / (values + penalty))
    return (wanted - mean) / std @ weights + target.mean()
