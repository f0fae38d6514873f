"""The screen keeps good pairs and says why it rejects bad ones."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import ndimage

from canopy.chips.screen import screen
from canopy.synth.forest import random_spec
from canopy.synth.render import render


@pytest.fixture(scope="module")
def pair():
    tile = render(random_spec(2001), 0.0, 0.0, 256, 256)
    chm = tile.chm.reshape(128, 2, 128, 2).max(axis=(1, 3)).astype(np.float32)
    return tile.rgb / np.float32(255), np.ones((256, 256), bool), chm, np.ones((128, 128), bool)


def test_a_good_pair_stays(pair):
    found = screen(*pair)
    assert found.reason == "" and found.image_share == 1 and found.match > 0.2 and found.sharpness > 0.4


def test_missing_image_and_missing_label(pair):
    rgb, seen, chm, known = pair
    assert screen(rgb, seen & (np.arange(256) < 100), chm, known).reason == "no image"
    assert screen(rgb, seen, chm, known & (np.arange(128) < 5)).reason == "no label"
    assert screen(rgb, ~seen, chm, ~known).reason == "no image"


def test_cloud_and_haze(pair):
    rgb, seen, chm, known = pair
    cloudy = rgb.copy()
    cloudy[:, :150] = 0.93
    assert screen(cloudy, seen, chm, known).reason == "cloud"
    assert screen(0.55 + 0.08 * rgb, seen, chm, known).reason == "haze"


def test_a_blown_up_image_is_blurred(pair):
    rgb, seen, chm, known = pair
    coarse = ndimage.zoom(rgb[:, ::8, ::8], (1, 8, 8), order=3)
    assert screen(np.clip(coarse, 0, 1), seen, chm, known).reason == "blur"


def test_labels_of_another_place_do_not_match(pair):
    rgb, seen, _, known = pair
    other = render(random_spec(2001), 9000.0, 7000.0, 256, 256).chm
    other = other.reshape(128, 2, 128, 2).max(axis=(1, 3)).astype(np.float32)
    right, wrong = screen(*pair), screen(rgb, seen, other, known)
    assert wrong.match < 0.1 < right.match


def test_flat_heights_are_not_judged(pair):
    rgb, seen, chm, known = pair
    found = screen(rgb, seen, np.zeros_like(chm), known)
    assert np.isnan(found.match) and found.reason == ""
