"""Crops of a chip: everything moves together, unknown stays unknown, shots stay on their trees."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from canopy.chips.augment import MAX_SHOTS, AugmentSettings, make_crop, turn, turn_points
from canopy.chips.data import ChipDataset
from canopy.chips.store import Chip, ChipShards

SHAPE_ONLY = AugmentSettings(colour=0, hide_chance=0, black_chance=0)


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
def test_image_and_heights_move_together(make_chip, seed, side):
    config = SHAPE_ONLY.model_copy(update={"gsd_chance": 0.0})
    sample = make_crop(make_chip(side_m=side), 64, np.random.default_rng(seed), config)
    assert sample.rgb.shape == (3, 64, 64) and sample.target.shape == sample.weight.shape == (1, 32, 32)
    known = sample.weight[0] > 0
    assert known.any() and ((sample.target[0] == 0) | known).all()
    red = sample.rgb[0, ::2, ::2][known] * 255 / 8
    assert torch.allclose(red, sample.target[0][known], atol=0.13)


def test_weights_travel_and_unknown_heights_have_none(make_chip):
    base = make_chip()
    floored = replace(base.row, weight=0.5, floor_m=15.0)
    chm = np.where(base.chm_m > 25, np.nan, base.chm_m)
    sample = make_crop(replace(base, row=floored, chm_m=chm), 64, np.random.default_rng(3), SHAPE_ONLY)
    known = sample.weight > 0
    assert sample.target[known].max() <= 25
    high, low = (sample.weight[known & part].unique() for part in (sample.target > 15, sample.target < 15))
    assert len(high) == len(low) == 1 and high / low == pytest.approx(16)  # below the floor 1 / (1 + 15)


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10**6))
def test_a_shot_stays_on_its_tree(make_chip, seed):
    base = make_chip(shots=[(30.5, 33.5, 21.0, 0.8)])
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


def test_hidden_image_hides_shots_and_labels(make_chip):
    base = unlabelled(make_chip(shots=[(32, 32, 20, 1.0)]))
    rgb = base.rgb.copy()
    rgb[:, 60:64, 60:64] = 0
    whole = make_crop(base, 128, np.random.default_rng(0), None)
    holed = make_crop(replace(base, rgb=rgb), 128, np.random.default_rng(0), None)
    assert whole.shots[0, 3] == 1 and (holed.shots[:, 3] == 0).all()


def test_too_many_shots_are_thinned_and_the_shape_is_fixed(make_chip):
    many = [(20 + 0.3 * i, 30, 10 + i, 1.0) for i in range(60)]
    sample = make_crop(unlabelled(make_chip(shots=many)), 128, np.random.default_rng(0), None)
    assert sample.shots.shape == (MAX_SHOTS, 5) and (sample.shots[:, 3] > 0).sum() == MAX_SHOTS
    assert len(set(sample.shots[:, 2].tolist())) == MAX_SHOTS


# ---- batches --------------------------------------------------------------------------------------------
def stream(folder: Path, rows=None, batch=3, side=64, augment=None, **more) -> ChipDataset:
    shards = ChipShards(folder, splits=["train"])
    return ChipDataset(shards.subset(rows) if rows else shards, batch, side, augment, **more)


def test_batches_do_not_depend_on_workers_and_begin_where_they_should(folder):
    def take(dataset, count, workers=0):
        loader = iter(DataLoader(dataset, batch_size=None, num_workers=workers))
        return [next(loader) for _ in range(count)]

    def augmented() -> ChipDataset:
        return stream(folder, augment=AugmentSettings(), seed=5)

    plain, later = take(augmented(), 5), augmented()
    later.first = 3
    ahead = take(augmented(), 5, workers=2) + take(later, 2)
    for a, b in zip(plain + plain[3:], ahead, strict=True):
        assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))
    assert plain[0].rgb.shape == (3, 3, 64, 64) and plain[0].target.shape == (3, 1, 32, 32)
    whole = stream(folder, batch=4).make(5)  # two processes see together what one does
    parts = [stream(folder, batch=2) for _ in range(2)]
    for rank, part in enumerate(parts):
        part.rank, part.world = rank, 2
    for one, two in zip(whole, zip(*(part.make(5) for part in parts), strict=True), strict=True):
        assert torch.equal(one, torch.cat(two))


def test_shots_count_only_where_lidar_knows_nothing(folder):
    rows = ChipShards(folder, splits=["train"]).rows
    holder = [r for r in rows if r.shots]
    batch = stream(folder, holder, 1, 128).make(0)
    row, col, metres, weight, radius = batch.shots[0, 0].tolist()
    assert (row, col) == pytest.approx((30, 30), abs=0.05) and metres == pytest.approx(17.25)
    assert weight == 1 and radius == pytest.approx(12.5, rel=0.01)  # its disc has no lidar
    assert batch.shots.shape == (1, 16, 5) and (batch.shots[0, 1:, 3] == 0).all()
    assert (stream(folder, holder, 1, 128, with_shots=False).make(0).shots[..., 3] == 0).all()
    assert (stream(folder, [r for r in rows if not r.shots], 2).make(0).shots[..., 3] == 0).all()
