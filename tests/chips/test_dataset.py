"""Crops: image and heights move together, unknown has no weight, a stream can be resumed."""

from __future__ import annotations

from itertools import islice

import numpy as np
import pytest
import torch

from canopy.chips.augment import AugmentConfig, dihedral, hide_part, vary_colour
from canopy.chips.dataset import CropStream, chip_weights
from canopy.errors import DataError

ONLY_SHAPE = AugmentConfig(colour=0.0, hide_chance=0.3, gsd_chance=0.0, black_chance=0.0)


def heights_in(rgb: torch.Tensor) -> np.ndarray:
    """The heights that make_chip wrote into the red channel, at 1 m."""
    return rgb[0].numpy()[::2, ::2] * 255 / 8


@pytest.mark.parametrize("index", range(12))
def test_geometry_is_shared_by_image_and_heights(make_chip, index):
    chips = [make_chip("a"), make_chip("b", kind="neon", side_m=20, seed=1)]
    sample = CropStream(chips, np.array([0.5, 0.5]), 64, ONLY_SHAPE, seed=3).sample(index)
    known = sample.weight[0].numpy() > 0
    assert sample.rgb.shape == (3, 64, 64) and sample.target.shape == (1, 32, 32)
    assert known.any()
    assert np.abs(heights_in(sample.rgb) - sample.target[0].numpy())[known].max() < 0.14
    assert (sample.target[0].numpy()[~known] == 0).all()


def test_full_augmentation_stays_in_range(make_chip):
    chip = make_chip(side_m=100)
    chip.rgb[:, :30] = 0
    chip.chm_m[60:] = np.nan
    stream = CropStream([chip], np.ones(1), 64, AugmentConfig(), seed=1)
    for sample in islice(stream, 40):
        assert torch.isfinite(sample.rgb).all() and sample.rgb.min() >= 0 and sample.rgb.max() <= 1
        assert torch.isfinite(sample.target).all() and (sample.weight >= 0).all()


def test_a_resumed_stream_goes_on_where_it_stopped(make_chip):
    chips, weights = [make_chip(), make_chip("b", seed=2)], np.array([0.3, 0.7])
    whole = list(islice(CropStream(chips, weights, 32, AugmentConfig(), seed=5), 6))
    rest = list(islice(CropStream(chips, weights, 32, AugmentConfig(), seed=5, start=3), 3))
    for a, b in zip(whole[3:], rest, strict=True):
        assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def test_the_largest_site_does_not_rule(make_chip):
    chips = [make_chip(f"a{i}", "big", side_m=4) for i in range(64)]
    chips += [make_chip(f"b{i}", "small", side_m=4) for i in range(4)]
    chips += [make_chip("n", "plots", "neon", side_m=4), make_chip("s", "made", "synth", side_m=4)]
    weights = chip_weights(chips, neon_share=0.1, synth_share=0.2)
    assert weights.sum() == pytest.approx(1)
    assert weights[-2] == pytest.approx(0.1) and weights[-1] == pytest.approx(0.2)
    assert weights[:64].sum() == pytest.approx(0.7 * 8 / 10)
    assert chip_weights(chips[:68], 0.1, 0.2).sum() == pytest.approx(1)
    with pytest.raises(DataError, match="no training chips"):
        chip_weights([], 0.1, 0.1)


def test_colour_changes_colour_and_nothing_else():
    rng = np.random.default_rng(0)
    rgb = rng.random((3, 32, 32), np.float32)
    assert vary_colour(rgb, rng, 0.0) is rgb
    varied = [vary_colour(rgb, np.random.default_rng(i)) for i in range(30)]
    assert all(v.shape == rgb.shape and v.dtype == np.float32 for v in varied)
    assert len({float(v.mean()) for v in varied}) == 30
    # Texture survives: bright stays brighter than dark.
    assert np.median([np.corrcoef(v.mean(0).ravel(), rgb.mean(0).ravel())[0, 1] for v in varied]) > 0.6


def test_all_eight_orientations_occur_and_agree():
    a = np.arange(16).reshape(1, 4, 4)
    seen = set()
    for seed in range(60):
        x, y = dihedral(np.random.default_rng(seed), a, a[0] * 10)
        assert np.array_equal(x[0] * 10, y)
        seen.add(x.tobytes())
    assert len(seen) == 8


def test_hiding_only_hides():
    valid = np.random.default_rng(0).random((30, 40)) < 0.9
    for seed in range(20):
        assert not (hide_part(valid, np.random.default_rng(seed)) & ~valid).any()
