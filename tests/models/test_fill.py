"""What the network sees in place of missing pixels."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from canopy.errors import InputError
from canopy.models.fill import fill_invalid


def test_a_whole_image_is_left_alone():
    rgb = np.random.default_rng(0).random((3, 8, 9), np.float32)
    assert fill_invalid(rgb, np.ones((8, 9), bool)) is rgb


def test_a_plot_is_mirrored_around_itself():
    rgb = np.full((1, 4, 12), np.nan, np.float32)
    valid = np.zeros((4, 12), bool)
    valid[:, 4:7] = True
    rgb[0, :, 4:7] = [1, 2, 3]
    row = fill_invalid(rgb, valid)[0, 0]
    np.testing.assert_array_equal(row, [3, 3, 2, 1, 1, 2, 3, 3, 2, 1, 1, 2])


def test_holes_take_their_nearest_neighbour():
    rgb = np.arange(25, dtype=np.float32).reshape(1, 5, 5)
    valid = np.ones((5, 5), bool)
    valid[2, 2] = False
    filled = fill_invalid(rgb, valid)
    assert filled[0, 2, 2] in (rgb[0, 1, 2], rgb[0, 3, 2], rgb[0, 2, 1], rgb[0, 2, 3])
    assert np.array_equal(filled[0][valid], rgb[0][valid])


@given(st.integers(0, 2**31), st.integers(1, 20), st.integers(1, 20), st.floats(0, 1))
@settings(max_examples=60, deadline=None)
def test_valid_pixels_stay_and_hidden_values_do_not_matter(seed, height, width, share):
    rng = np.random.default_rng(seed)
    valid = rng.random((height, width)) < share
    rgb = rng.random((3, height, width), np.float32)
    first, second = np.where(valid, rgb, np.nan), np.where(valid, rgb, 99.0)
    filled = fill_invalid(first.astype(np.float32), valid)
    assert np.isfinite(filled).all() and filled.shape == rgb.shape
    assert np.array_equal(filled[:, valid], rgb[:, valid])
    assert np.array_equal(filled, fill_invalid(second.astype(np.float32), valid))


def test_shapes_that_do_not_match_are_refused():
    with pytest.raises(InputError, match="do not match"):
        fill_invalid(np.zeros((3, 4, 4), np.float32), np.ones((4, 5), bool))
