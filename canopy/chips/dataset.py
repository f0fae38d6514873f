"""Endless stream of augmented training crops from a chips file. Needs torch and numpy only."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch.nn import functional
from torch.utils.data import IterableDataset

from canopy.chips.augment import AugmentConfig, dihedral, hide_part, vary_colour
from canopy.chips.crops import Sample
from canopy.chips.store import Chip
from canopy.errors import DataError
from canopy.models.fill import fill_invalid

_BOOST_POWER, _MOST_BOOST = 0.7, 14.0


def chip_weights(chips: list[Chip], neon_share: float, synth_share: float) -> np.ndarray:
    """Chance of each chip, summing to 1.

    Plots and synthetic chips get fixed shares; the rest goes to the lidar sites by the square root of
    their tile counts, so that the largest site does not rule.
    """
    kinds = np.array([c.row.kind for c in chips])
    sites = np.array([c.row.site for c in chips])
    weights = np.zeros(len(chips))
    shares = {"neon": neon_share, "synth": synth_share}
    shares = {k: v if (kinds == k).any() else 0.0 for k, v in shares.items()}
    shares["lidar"] = 1.0 - sum(shares.values())
    for kind, share in shares.items():
        members = kinds == kind
        roots = {site: np.sqrt((sites[members] == site).sum()) for site in np.unique(sites[members])}
        total = sum(roots.values())
        for site, root in roots.items():
            at = members & (sites == site)
            weights[at] = share * root / total / at.sum()
    if not weights.sum() > 0:
        raise DataError("no training chips")
    return weights / weights.sum()


class CropStream(IterableDataset[Sample]):
    """Sample i is a function of (seed, i) alone, so a resumed run continues where it stopped.

    Args:
        chips: what to cut from.
        weights: chance of each chip.
        crop_px: side of the image crop S, even.
        augment: see AugmentConfig; None cuts plain crops.
        seed, start: the stream's seed and its first sample.
    """

    def __init__(
        self,
        chips: list[Chip],
        weights: np.ndarray,
        crop_px: int,
        augment: AugmentConfig | None,
        seed: int = 0,
        start: int = 0,
    ) -> None:
        self.chips, self.weights, self.crop_px = chips, weights, crop_px
        self.augment, self.seed, self.start = augment, seed, start

    def __iter__(self) -> Iterator[Sample]:
        worker = torch.utils.data.get_worker_info()
        index = self.start + (worker.id if worker else 0)
        while True:
            yield self.sample(index)
            index += worker.num_workers if worker else 1

    def sample(self, index: int) -> Sample:
        """Sample number `index` of the stream."""
        rng = np.random.default_rng((self.seed, index))
        for _ in range(8):
            chip = self.chips[int(rng.choice(len(self.chips), p=self.weights))]
            rgb, valid, chm = cut_crop(chip, self.crop_px, rng, self.augment)
            if np.isfinite(chm).mean() > (0.005 if chip.row.kind == "neon" else 0.2):
                break
        return self._finish(rgb, valid, chm, rng)

    def _finish(
        self, rgb: np.ndarray, valid: np.ndarray, chm: np.ndarray, rng: np.random.Generator
    ) -> Sample:
        options = self.augment
        if options is not None:
            rgb, valid, chm = dihedral(rng, rgb, valid, chm)
            # Most images nearly as they are, some far off: always far off is too hard to learn from at all.
            rgb = vary_colour(rgb, rng, options.colour * rng.random())
            if rng.random() < options.hide_chance:
                shown = hide_part(valid, rng)
                if shown.mean() > 0.02:
                    valid = shown
        if options is not None and rng.random() < options.black_chance:
            rgb = np.where(valid, rgb, 0.0)
        else:
            rgb = fill_invalid(np.ascontiguousarray(rgb), valid)
        covered = valid[0::2, 0::2] & valid[1::2, 0::2] & valid[0::2, 1::2] & valid[1::2, 1::2]
        known = np.isfinite(chm) & covered
        # A 20 m plot has 400 label pixels, a crop 16,384: left alone, plots would not count in a batch.
        boost = min(_MOST_BOOST, (known.size / max(int(known.sum()), 1)) ** _BOOST_POWER)
        return Sample(
            torch.from_numpy(np.ascontiguousarray(rgb, np.float32)),
            torch.from_numpy(np.where(known, chm, 0.0).astype(np.float32)[None]),
            torch.from_numpy(known.astype(np.float32)[None] * np.float32(boost)),
            torch.zeros(0, 5),
        )


def cut_crop(
    chip: Chip, crop_px: int, rng: np.random.Generator, augment: AugmentConfig | None
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """A random window of a chip, stretched by a random factor where the config says so.

    Returns:
        rgb float (3, S, S), validity bool (S, S), heights (S/2, S/2) with NaN unknown. A chip smaller
        than the window lies at a random place in it, with nothing around.
    """
    factor = 1.0
    if augment is not None and rng.random() < augment.gsd_chance:
        factor = float(np.exp(rng.uniform(np.log(augment.gsd_low), np.log(augment.gsd_high))))
    side = 2 * round(crop_px * factor / 2)
    half = side // 2
    h, w = chip.chm_m.shape
    row, col = (int(rng.integers(min(0, n - half), max(0, n - half) + 1)) for n in (h, w))
    rgb = np.zeros((3, side, side), np.float32)
    chm = np.full((half, half), np.nan, np.float32)
    # Where the window leaves the chip: source rows r0:r1 land at target rows r0-row and on.
    r0, r1, c0, c1 = max(row, 0), min(row + half, h), max(col, 0), min(col + half, w)
    chm[r0 - row : r1 - row, c0 - col : c1 - col] = chip.chm_m[r0:r1, c0:c1]
    rgb[:, 2 * (r0 - row) : 2 * (r1 - row), 2 * (c0 - col) : 2 * (c1 - col)] = chip.rgb[
        :, 2 * r0 : 2 * r1, 2 * c0 : 2 * c1
    ] / np.float32(255.0)
    valid = rgb.max(axis=0) > 0
    if side == crop_px:
        return rgb, valid, chm
    return _stretch(rgb, valid, chm, crop_px)


def _stretch(
    rgb: np.ndarray, valid: np.ndarray, chm: np.ndarray, crop_px: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Resample a square crop to `crop_px`, never mixing known with unknown."""
    resized = functional.interpolate(
        torch.from_numpy(rgb)[None], size=(crop_px, crop_px), mode="bilinear", antialias=True
    )[0].numpy()
    pick = ((np.arange(crop_px) + 0.5) * valid.shape[0] / crop_px).astype(int)
    inner = ndimage_erode(valid)[np.ix_(pick, pick)]
    pick = ((np.arange(crop_px // 2) + 0.5) * chm.shape[0] / (crop_px // 2)).astype(int)
    return resized, inner, chm[np.ix_(pick, pick)]


def ndimage_erode(valid: np.ndarray) -> np.ndarray:
    """Validity with its one-pixel inner edge removed, where interpolation reached outside."""
    from scipy import ndimage

    return valid if valid.all() else ndimage.binary_erosion(valid, np.ones((3, 3)), border_value=1)
