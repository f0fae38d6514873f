"""Crops of a chip: everything moves together, unknown stays unknown, shots stay on their trees."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from canopy.chips.augment import MAX_SHOTS, AugmentSettings, make_crop, turn, turn_points
from canopy.chips.index import ChipRow
from canopy.chips.store import Chip

SHAPE_ONLY = AugmentSettings(colour=0, hide_chance=0, black_chance=0)


def chip(side=64, shots=(), kind="lidar", seed=0) -> Chip:
    """Heights that can be read off the red channel."""
    rng = np.random.default_rng(seed)
    chm = rng.uniform(1, 30, (side, side)).round(2).astype(np.float32)
    red = (chm * 8).astype(np.uint8).repeat(2, 0).repeat(2, 1)
    rgb = np.stack([red, red // 2 + 1, np.full_like(red, 40)])
    row = ChipRow("a", "s", kind, "train", gsd_m=0.5, label_gsd_m=1.0, shots=len(shots))
    return Chip(row, rgb, chm, np.array(shots, np.float32).reshape(-1, 4))


def unlabelled(base: Chip) -> Chip:
    """The same without heights."""
    return replace(base, chm_m=np.full_like(base.chm_m, np.nan))


@settings(max_examples=40, deadline=None)
@given(turns=st.integers(0, 7), flip=st.booleans(), row=st.integers(0, 8), col=st.integers(0, 8))
def test_points_turn_with_their_pixels(turns, flip, row, col):
    grid = np.zeros((9, 9))
    grid[row, col] = 1
    moved = turn_points(np.array([[row + 0.5, col + 0.5]]), 9, turns, flip)[0]
    assert turn(grid, turns, flip)[tuple(np.floor(moved).astype(int))] == 1


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10**6), side=st.sampled_from([24, 40, 64, 90]))
def test_image_and_heights_move_together(seed, side):
    config = SHAPE_ONLY.model_copy(update={"gsd_chance": 0.0})
    sample = make_crop(chip(side), 64, np.random.default_rng(seed), config)
    assert sample.rgb.shape == (3, 64, 64) and sample.target.shape == sample.weight.shape == (1, 32, 32)
    known = sample.weight[0] > 0
    assert known.any() and ((sample.target[0] == 0) | known).all()
    red = sample.rgb[0, ::2, ::2][known] * 255 / 8
    assert torch.allclose(red, sample.target[0][known], atol=0.13)


def test_weights_travel_and_unknown_heights_have_none():
    base = chip()
    floored = replace(base.row, weight=0.5, floor_m=15.0)
    chm = np.where(base.chm_m > 25, np.nan, base.chm_m)
    sample = make_crop(replace(base, row=floored, chm_m=chm), 64, np.random.default_rng(3), SHAPE_ONLY)
    known = sample.weight > 0
    assert sample.target[known].max() <= 25
    high, low = (sample.weight[known & part].unique() for part in (sample.target > 15, sample.target < 15))
    assert len(high) == len(low) == 1 and high / low == pytest.approx(16)  # below the floor 1 / (1 + 15)


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10**6))
def test_a_shot_stays_on_its_tree(seed):
    base = chip(64, [(30.5, 33.5, 21.0, 0.8)])
    chm = np.zeros_like(base.chm_m)
    chm[30, 33] = 29.0  # one tree under the shot
    unknown = np.hypot(*np.mgrid[-30:34, -33:31]) < 14
    chm[unknown & (chm == 0)] = np.nan
    sample = make_crop(replace(base, chm_m=chm), 96, np.random.default_rng(seed), SHAPE_ONLY)
    if not (sample.shots[:, 3] > 0).any():
        return  # its disc was cut
    row, col, metres, worth, radius = sample.shots[0].tolist()
    assert metres == 21 and 0.75 < worth <= 0.801 and 9 < radius < 16.5
    tree = np.argwhere(sample.target[0].numpy() > 20)
    if len(tree):
        assert np.abs(tree[0] + 0.5 - [row, col]).max() <= 1.3


def test_hidden_image_hides_shots_and_labels():
    base = unlabelled(chip(64, [(32, 32, 20, 1.0)]))
    rgb = base.rgb.copy()
    rgb[:, 60:64, 60:64] = 0
    whole = make_crop(base, 128, np.random.default_rng(0), None)
    holed = make_crop(replace(base, rgb=rgb), 128, np.random.default_rng(0), None)
    assert whole.shots[0, 3] == 1 and (holed.shots[:, 3] == 0).all()


def test_too_many_shots_are_thinned_and_the_shape_is_fixed():
    many = [(20 + 0.3 * i, 30, 10 + i, 1.0) for i in range(60)]
    sample = make_crop(unlabelled(chip(64, many)), 128, np.random.default_rng(0), None)
    assert sample.shots.shape == (MAX_SHOTS, 5) and (sample.shots[:, 3] > 0).sum() == MAX_SHOTS
    assert len(set(sample.shots[:, 2].tolist())) == MAX_SHOTS


@pytest.mark.parametrize("seed", [0, 1])
def test_a_crop_is_a_function_of_the_generator(seed):
    one, two = (make_crop(chip(), 48, np.random.default_rng(seed), AugmentSettings()) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))
    assert all(bool(torch.isfinite(part).all()) for part in one)
