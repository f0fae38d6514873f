"""Crops stay in range and depend on the generator alone; masks have exactly the wanted size."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from canopy.errors import InputError
from canopy.training.ssl_data import ViewRules, batch_masks, block_mask, crop_box, multi_crop

RULES = ViewRules(global_px=64, local_px=32, globals=2, locals=3)


def test_crops_have_their_sizes_and_repeat():
    rgb = np.random.default_rng(0).random((3, 90, 120), np.float32)
    valid = np.arange(120)[None] < np.full((90, 1), 100)
    once, twice = (multi_crop(rgb, valid, np.random.default_rng(4), RULES) for _ in range(2))
    assert once[0].shape == (2, 3, 64, 64) and once[1].shape == (3, 3, 32, 32)
    assert all(np.array_equal(a, b) for a, b in zip(once, twice, strict=True))
    assert all(v.min() >= 0 and v.max() <= 1 and np.isfinite(v).all() for v in once)
    assert not np.array_equal(once[0][0], once[0][1])
    assert multi_crop(rgb, valid, np.random.default_rng(4), ViewRules(locals=0))[1].shape[0] == 0
    with pytest.raises(InputError):
        multi_crop(rgb, valid[1:], np.random.default_rng(0), RULES)


@settings(max_examples=60, deadline=None)
@given(h=st.integers(1, 300), w=st.integers(1, 300), seed=st.integers(0, 10**6))
def test_boxes_lie_inside(h, w, seed):
    top, left, height, width = crop_box((h, w), (0.05, 1.0), 4 / 3, np.random.default_rng(seed))
    assert top >= 0 and left >= 0 and height >= 1 and width >= 1
    assert top + height <= h and left + width <= w


def test_box_areas_cover_the_asked_range():
    rng = np.random.default_rng(0)
    shares = [np.prod(crop_box((400, 400), (0.1, 0.3), 4 / 3, rng)[2:]) / 160_000 for _ in range(300)]
    assert 0.09 < min(shares) < 0.12 and 0.28 < max(shares) < 0.31


@settings(max_examples=80, deadline=None)
@given(h=st.integers(1, 32), w=st.integers(1, 32), ratio=st.floats(0, 1), seed=st.integers(0, 10**6))
def test_masks_have_exactly_the_wanted_size(h, w, ratio, seed):
    mask = block_mask((h, w), ratio, np.random.default_rng(seed))
    assert mask.shape == (h, w) and mask.sum() == round(ratio * h * w)


def test_masks_come_in_blocks():
    def borders(mask):
        return (mask[1:] != mask[:-1]).sum() + (mask[:, 1:] != mask[:, :-1]).sum()

    rng = np.random.default_rng(0)
    blocks = np.mean([borders(block_mask((14, 14), 0.4, rng)) for _ in range(40)])
    single = np.mean([borders(rng.permutation(196).reshape(14, 14) < 78) for _ in range(40)])
    assert blocks < 0.6 * single


def test_a_batch_always_has_the_same_number_of_masked_patches():
    batches = [batch_masks(8, (14, 14), np.random.default_rng(seed)) for seed in range(5)]
    counts = [sorted(m.sum(axis=(1, 2)).tolist()) for m in batches]
    assert all((np.array(c) > 0).sum() == 4 for c in counts)
    assert max(sum(c) for c in counts) - min(sum(c) for c in counts) <= 4
