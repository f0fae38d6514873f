"""The synthetic forest as pictures and heights: windows, seeds, shadows, colours, ranges."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from canopy.synth.forest import (
    GROUND,
    MAX_HEIGHT_M,
    ROAD,
    ROOF,
    TREE,
    WATER,
    SceneSpec,
    random_spec,
    trees_in,
)
from canopy.synth.render import render, truth

# A corner of seed 0 with a river, a road, houses, meadow and forest.
X0, Y0, SIDE_PX = 632.0, 496.0, 240
SPEC = SceneSpec()


@pytest.fixture(scope="module")
def village():
    return render(SPEC, X0, Y0, SIDE_PX, SIDE_PX)


def luma(rgb: np.ndarray) -> np.ndarray:
    return rgb.astype(np.float32).mean(axis=0)


@settings(max_examples=12, deadline=None)
@given(st.integers(0, 190), st.integers(0, 190), st.integers(1, 50), st.integers(1, 50))
def test_any_window_equals_the_same_pixels_of_the_whole(village, row, col, height, width):
    part = render(SPEC, X0 + col * 0.5, Y0 - row * 0.5, height, width)
    here = np.s_[..., row : row + height, col : col + width]
    for name in ("rgb", "chm", "dtm", "surface"):
        np.testing.assert_array_equal(getattr(part, name), getattr(village, name)[here], err_msg=name)


@settings(max_examples=6, deadline=None)
@given(st.integers(1, 10_000), st.integers(-60, 60), st.integers(-60, 60))
def test_windows_agree_in_every_kind_of_scene(seed, row, col):
    spec = random_spec(seed)
    whole = render(spec, col * 0.5, -row * 0.5, 48, 48)
    part = render(spec, (col + 17) * 0.5, -(row + 9) * 0.5, 20, 25)
    np.testing.assert_array_equal(part.rgb, whole.rgb[:, 9:29, 17:42])
    np.testing.assert_array_equal(part.chm, whole.chm[9:29, 17:42])
    assert whole.rgb.std() > 3 and whole.chm.max() <= MAX_HEIGHT_M + 2


def test_the_truth_alone_is_what_the_picture_shows(village):
    alone = truth(SPEC, X0, Y0, SIDE_PX, SIDE_PX)
    for name in ("chm", "dtm", "surface"):
        np.testing.assert_array_equal(getattr(alone, name), getattr(village, name))
    assert set(np.unique(alone.surface)) == {GROUND, TREE, ROAD, WATER, ROOF}
    np.testing.assert_array_equal(alone.roof > 0, alone.surface == ROOF)
    np.testing.assert_array_equal(alone.owner >= 0, alone.surface == TREE)


def test_heights_are_zero_off_trees_and_in_range(village):
    open_ground = village.surface != TREE
    assert (village.chm[open_ground] == 0).all() and (village.chm[~open_ground] > 0).all()
    assert 5 < village.chm.max() <= MAX_HEIGHT_M + 2
    assert village.dtm.std() > 0.1 and village.rgb.dtype == np.uint8 and village.chm.dtype == np.float32


@pytest.mark.parametrize("azimuth", [100.0, 250.0])
def test_shadows_fall_on_the_side_away_from_the_sun(azimuth):
    spec = replace(SPEC, sun_azimuth_deg=azimuth, sun_elevation_deg=40.0, noise=0.0)
    scene = render(spec, X0, Y0, SIDE_PX, SIDE_PX)
    # 6 m (12 px) towards the sun and away from it, as (row, col) steps.
    step = np.rint(12 * np.array([-np.cos(np.deg2rad(azimuth)), np.sin(np.deg2rad(azimuth))])).astype(int)
    rows, cols = np.nonzero(scene.surface[15:-15, 15:-15] == GROUND)
    rows, cols = rows + 15, cols + 15
    sunward, leeward = (scene.chm[rows + k * step[0], cols + k * step[1]] for k in (1, -1))
    light = luma(scene.rgb)[rows, cols]
    shaded, sunny = light[(sunward > 10) & (leeward < 1)], light[(sunward < 1) & (leeward > 10)]
    assert len(shaded) > 50 and len(sunny) > 50
    assert shaded.mean() < 0.7 * sunny.mean()


def test_crowns_are_greener_than_roads_roofs_and_water(village):
    rgb = village.rgb.astype(np.float32)
    green = (2 * rgb[1] - rgb[0] - rgb[2]) / rgb.sum(axis=0)
    kinds = {code: green[village.surface == code].mean() for code in (TREE, ROAD, ROOF, WATER)}
    assert kinds[TREE] > 0.1 and all(kinds[TREE] > kinds[k] + 0.05 for k in (ROAD, ROOF, WATER))


def test_trees_do_not_stand_on_roads_water_or_houses_and_do_not_depend_on_the_box():
    trees = trees_in(SPEC, X0, Y0 - 120, X0 + 120, Y0)
    ground = truth(SPEC, X0, Y0, SIDE_PX, SIDE_PX)
    stems = ground.surface[((Y0 - trees.y) / 0.5).astype(int), ((trees.x - X0) / 0.5).astype(int)]
    assert len(trees) > 100 and set(np.unique(stems)) <= {GROUND, TREE}
    halves = [trees_in(SPEC, X0 + k, Y0 - 120, X0 + k + 60, Y0) for k in (0, 60)]
    assert sorted(trees.x.tolist()) == sorted(x for half in halves for x in half.x.tolist())
    assert sorted(trees.height.tolist()) == sorted(h for half in halves for h in half.height.tolist())
