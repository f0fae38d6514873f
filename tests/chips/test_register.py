"""A planted displacement is found, on made-up and on real pairs; nothing is claimed where nothing is."""

from __future__ import annotations

import csv

import numpy as np
import pytest
from scipy import ndimage

from canopy.chips.register import Shift, ShiftMeter, image_shift
from canopy.synth.forest import random_spec
from canopy.synth.render import render

GSD = 0.5


@pytest.fixture(scope="module")
def scene():
    """A render with 12 px to spare around 384 px."""
    tile = render(random_spec(2004), 0.0, 0.0, 408, 408)
    return tile.rgb / np.float32(255), tile.chm.astype(np.float32)


def planted(chm: np.ndarray, down: float, right: float) -> np.ndarray:
    return ndimage.shift(chm, (down, right), order=1)[12:-12, 12:-12]


@pytest.mark.parametrize(("down", "right"), [(0.0, 0.0), (3.4, 0.0), (-2.0, 3.4)])
def test_a_shift_planted_between_image_and_heights_is_found_to_half_a_metre(scene, down, right):
    rgb, chm = scene
    label = planted(chm, down, right)
    shift = image_shift(rgb[:, 12:-12, 12:-12], label, np.ones(label.shape, bool), GSD)
    assert shift is not None and shift.is_sure and shift.agreement == 1
    assert np.hypot(shift.down_m - down * GSD, shift.right_m - right * GSD) < 0.5


def test_holes_and_their_edges_do_not_pull_towards_zero(scene):
    rgb, chm = scene
    label = planted(chm, 3.4, -3.4)
    valid = np.ones(label.shape, bool)
    valid[:, 60:110] = valid[200:230] = False
    shift = image_shift(rgb[:, 12:-12, 12:-12], np.where(valid, label, 99), valid, GSD)
    assert shift is not None
    assert np.hypot(shift.down_m - 1.7, shift.right_m + 1.7) < 0.5


def test_nothing_is_claimed_where_there_is_nothing(scene):
    rgb, chm = scene
    everywhere = np.ones(chm.shape, bool)
    noise = np.random.default_rng(0).random(rgb.shape, np.float32)
    for image in (noise, rgb[:, ::-1]):
        shift = image_shift(image, chm, everywhere, GSD)
        assert shift is None or not shift.is_sure
    assert image_shift(rgb, np.zeros_like(chm), everywhere, GSD) is None
    assert image_shift(rgb, chm, ~everywhere, GSD) is None
    assert image_shift(rgb[:, :60, :60], chm[:60, :60], everywhere[:60, :60], GSD) is None


def measure(*windows: tuple[np.ndarray, np.ndarray, np.ndarray]) -> Shift | None:
    meter = ShiftMeter((1.0, 1.0))
    for window in windows:
        meter.add(*window)
    return meter.result()


def stand(seed: int, shape: tuple[int, int]) -> np.ndarray:
    """Crowns at 1 m, as two height maps see them."""
    rng = np.random.default_rng(seed)
    tops = (rng.random(shape) < 0.02) * rng.uniform(10, 30, shape)
    return ndimage.gaussian_filter(ndimage.maximum_filter(tops, 5), 1.2)


@pytest.mark.parametrize(("south", "east"), [(0, 0), (0, 2), (1.25, -3.5), (-0.7, 0.4), (-9, 8)])
def test_two_height_maps_to_a_tenth_of_a_pixel(south: float, east: float) -> None:
    truth = stand(3, (220, 240))
    noisy = ndimage.shift(truth, (south, east), order=3, mode="nearest")
    noisy += np.random.default_rng(0).normal(0, 2, truth.shape)
    shift = measure((noisy, truth, np.ones(truth.shape, bool)))
    assert shift is not None and shift.is_sure and shift.spread_m is None
    assert (shift.down_m, shift.right_m) == (pytest.approx(south, abs=0.12), pytest.approx(east, abs=0.12))
    assert shift.fit >= shift.fit_unshifted


def test_metres_follow_the_pixel_and_windows_are_pooled() -> None:
    truth = stand(4, (220, 240))
    moved = ndimage.shift(truth, (-1, 2), order=3, mode="nearest")
    valid = ndimage.gaussian_filter(np.random.default_rng(5).normal(size=truth.shape), 8) > -0.03
    meter = ShiftMeter((0.5, 0.6))
    for rows in (np.s_[:110], np.s_[110:]):
        assert meter.add(np.where(valid, moved, 0)[rows], truth[rows], valid[rows])
    shift = meter.result()
    assert shift is not None and shift.windows == 2
    assert shift.spread_m is not None and shift.spread_m < 0.3
    assert (shift.down_m, shift.right_m) == (pytest.approx(-0.6, abs=0.08), pytest.approx(1.0, abs=0.08))


def test_unlike_height_maps_are_doubted_and_flat_ones_not_measured() -> None:
    truth, everywhere = stand(4, (220, 240)), np.ones((220, 240), bool)
    shift = measure((stand(9, truth.shape), truth, everywhere))
    assert shift is not None and not shift.is_sure and "correlate" in str(shift.doubt)
    flat = np.zeros_like(truth)
    cases = [
        (flat, truth, everywhere),
        (truth, truth, ~everywhere),
        (truth[:15], truth[:15], everywhere[:15]),
    ]
    assert measure(*cases) is None


def test_a_shift_planted_into_real_lidar_is_found(shared):
    import rasterio

    pack = shared / "data"
    with (pack / "manifest.csv").open(newline="") as file:
        row = next(r for r in csv.DictReader(file) if r["id"] == "ky_blackmtn_r00c02")
    with rasterio.open(pack / row["rgb_path"]) as file:
        rgb = file.read().astype(np.float32) / 255
    with rasterio.open(pack / row["chm_path"]) as file:
        cm = file.read(1).repeat(2, 0).repeat(2, 1)
    valid = (cm != 65535) & (rgb.max(axis=0) > 0.03)
    chm = np.where(cm != 65535, cm / np.float32(100), 0).astype(np.float32)
    before = image_shift(rgb, chm, valid, GSD)
    moved = ndimage.shift(chm, (3.4, -2.0), order=1, mode="nearest")
    still = ndimage.shift(valid.astype(np.float32), (3.4, -2.0), order=1) > 0.99
    after = image_shift(rgb, moved, still & (rgb.max(axis=0) > 0.03), GSD)
    assert before is not None and after is not None and before.is_sure and after.is_sure
    assert abs((after.down_m - before.down_m) / GSD - 3.4) < 0.4
    assert abs((after.right_m - before.right_m) / GSD + 2.0) < 0.4
