"""A planted displacement is found, on made-up and on real pairs; nothing is claimed where nothing is."""

from __future__ import annotations

import csv

import numpy as np
import pytest
from scipy import ndimage

from canopy.chips.register import measure_shift
from canopy.errors import InputError
from canopy.synth.forest import random_spec
from canopy.synth.render import render

GSD = 0.5


@pytest.fixture(scope="module")
def scene():
    """A render with 12 px to spare around 288 px."""
    tile = render(random_spec(2004), 0.0, 0.0, 312, 312)
    return tile.rgb / np.float32(255), tile.chm.astype(np.float32)


def planted(chm: np.ndarray, down: float, right: float) -> np.ndarray:
    return ndimage.shift(chm, (down, right), order=1)[12:-12, 12:-12]


@pytest.mark.parametrize(("down", "right"), [(0.0, 0.0), (3.4, 0.0), (-2.0, 3.4)])
def test_a_planted_shift_is_found_to_a_third_of_a_pixel(scene, down, right):
    rgb, chm = scene
    label = planted(chm, down, right)
    shift = measure_shift(rgb[:, 12:-12, 12:-12], label, np.ones(label.shape, bool), GSD)
    assert shift is not None and shift.is_sure
    assert abs(shift.down_m / GSD - down) < 0.3 and abs(shift.right_m / GSD - right) < 0.3


def test_holes_and_their_edges_do_not_pull_towards_zero(scene):
    rgb, chm = scene
    label = planted(chm, 3.4, -3.4)
    valid = np.ones(label.shape, bool)
    valid[:, 60:110] = valid[200:230] = False
    shift = measure_shift(rgb[:, 12:-12, 12:-12], np.where(valid, label, 99), valid, GSD)
    assert shift is not None
    assert abs(shift.down_m / GSD - 3.4) < 0.3 and abs(shift.right_m / GSD + 3.4) < 0.3


def test_nothing_is_claimed_where_there_is_nothing(scene):
    rgb, chm = scene
    everywhere = np.ones(chm.shape, bool)
    noise = np.random.default_rng(0).random(rgb.shape, np.float32)
    shift = measure_shift(noise, chm, everywhere, GSD)
    assert shift is None or not shift.is_sure
    assert measure_shift(rgb, np.zeros_like(chm), everywhere, GSD) is None
    assert measure_shift(rgb, chm, ~everywhere, GSD) is None
    assert measure_shift(rgb[:, :60, :60], chm[:60, :60], everywhere[:60, :60], GSD) is None


def test_bad_inputs_are_named(scene):
    rgb, chm = scene
    with pytest.raises(InputError, match="differ"):
        measure_shift(rgb, chm[1:], np.ones(chm.shape, bool), GSD)
    with pytest.raises(InputError, match="pixels of 4 m"):
        measure_shift(rgb, chm, np.ones(chm.shape, bool), 4.0)


@pytest.mark.parametrize("name", ["ky_blackmtn_r00c02", "ky_magoffin_r01c05"])
def test_a_shift_planted_into_real_lidar_is_found(shared, name):
    import rasterio

    pack = shared / "data"
    with (pack / "manifest.csv").open(newline="") as file:
        row = next(r for r in csv.DictReader(file) if r["id"] == name)
    with rasterio.open(pack / row["rgb_path"]) as file:
        rgb = file.read().astype(np.float32) / 255
    with rasterio.open(pack / row["chm_path"]) as file:
        cm = file.read(1).repeat(2, 0).repeat(2, 1)
    valid = (cm != 65535) & (rgb.max(axis=0) > 0.03)
    chm = np.where(cm != 65535, cm / np.float32(100), 0).astype(np.float32)
    before = measure_shift(rgb, chm, valid, GSD)
    moved = ndimage.shift(chm, (3.4, -2.0), order=1, mode="nearest")
    still = ndimage.shift(valid.astype(np.float32), (3.4, -2.0), order=1) > 0.99
    after = measure_shift(rgb, moved, still & (rgb.max(axis=0) > 0.03), GSD)
    assert before is not None and after is not None and before.is_sure and after.is_sure
    assert abs((after.down_m - before.down_m) / GSD - 3.4) < 0.3
    assert abs((after.right_m - before.right_m) / GSD + 2.0) < 0.3
