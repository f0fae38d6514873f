"""What the network sees in place of missing pixels."""

from __future__ import annotations

import numpy as np
import pytest
import rasterio
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from canopy.errors import InputError
from canopy.models.height import fill_invalid
from canopy.models.registry import load_model

FORESTS = ("ky_magoffin_r01c07", "ky_magoffin_r01c09")


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


def test_an_oblique_border_is_a_mirror():
    """Below a diagonal lies what lies above it, and no streaks: its values differ as those above do."""
    row, col = np.indices((40, 40))
    distance = (col - row).astype(np.float32)[None]  # from the diagonal; negative below it
    filled = fill_invalid(distance, col >= row)[0]
    below = row - col
    near = (below > 0) & (below < 15) & (row > 15) & (row < 35)
    assert np.abs(filled[near] - below[near]).max() <= 2


def test_heights_beside_the_edge_of_a_turned_image(shared):
    """Within a metre those of the whole image on average; beside streaks they were 2 to 6 m too low."""
    whole = np.stack([_rgb(shared / "data/pairs/rgb" / f"{name}.tif") for name in FORESTS])
    side = whole.shape[-1]
    row, col = np.indices((side, side)) - side / 2
    angle = np.deg2rad(20)
    u, v = col * np.cos(angle) + row * np.sin(angle), row * np.cos(angle) - col * np.sin(angle)
    valid = np.maximum(np.abs(u), np.abs(v)) < 0.36 * side
    rim = valid & (np.maximum(np.abs(u), np.abs(v)) > 0.36 * side - 15)
    model = load_model("default").eval()
    with torch.inference_mode():
        expected = model(torch.from_numpy(whole))[:, 0].numpy()
        cut = np.stack([fill_invalid(image, valid) for image in whole])
        found = model(torch.from_numpy(cut))[:, 0].numpy()
    assert expected[:, rim].mean() > 8
    assert abs((found - expected)[:, rim].mean()) < 1.0
    assert np.abs(found - expected)[:, rim].mean() < 1.7


def _rgb(path):
    with rasterio.open(path) as image:
        return image.read((1, 2, 3)).astype(np.float32) / 255


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
