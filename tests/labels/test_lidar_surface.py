"""Terrain and canopy surface on arrays: exactness, locality, pits, structures."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from canopy.geo.grid import Grid
from canopy.labels.points import RECORD
from canopy.labels.surface import (
    BUILDING,
    GROUND,
    MAX_CIRCUMRADIUS_M,
    OTHER,
    WATER,
    WIRE,
    close_pits,
    elevation_at,
    fill_gaps,
    highest,
    lonely,
    terrain,
)

NAN = np.nan


def points_over(side: float, count: int, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    xy = rng.uniform(0, side, (count, 2)) + np.array([300_000.0, 4_000_000.0 - side])
    return np.column_stack([xy, rng.uniform(0, 30, count)])


def window(row: int, col: int, size: int) -> Grid:
    """Pixels of 1 m, counted from the CRS's origin."""
    return Grid.of("EPSG:32616", (1, 0, col, 0, -1, -row), (size, size))


# ---- terrain ----------------------------------------------------------------------------------
def test_a_plane_comes_back_as_a_plane_also_beyond_the_last_point():
    ground = points_over(60.0, 500)
    ground[:, 2] = 100 + 0.3 * (ground[:, 0] - 300_000) - 0.7 * (ground[:, 1] - 4_000_000)
    grid = window(-4_000_002, 299_998, 64)
    plane = terrain(ground, grid)
    x = 299_998 + np.arange(64) + 0.5
    y = 4_000_002 - np.arange(64) - 0.5
    wanted = 100 + 0.3 * (x - 300_000) - 0.7 * (y[:, None] - 4_000_000)
    # Millimetres of jitter that break ties move a slope of 0.76 by no more than that.
    assert np.nanmax(np.abs(plane - wanted)) < 0.02
    assert np.isfinite(plane[3:-3, 3:-3]).all()
    sampled = elevation_at(plane, grid, ground[:, 0], ground[:, 1])
    assert np.nanmax(np.abs(sampled - ground[:, 2])) < 0.01


def test_there_is_no_terrain_where_ground_is_too_far():
    ground = points_over(300.0, 9000, seed=3)
    hole = 1.6 * MAX_CIRCUMRADIUS_M
    ground = ground[np.hypot(ground[:, 0] - 300_150, ground[:, 1] - 3_999_850) > hole]
    plane = terrain(ground, window(-4_000_000, 300_000, 300))
    assert np.isnan(plane[150, 150]) and np.isfinite(plane[30:80, 30:80]).all()


@pytest.mark.parametrize("ground", [np.zeros((0, 3)), np.ones((2, 3)), np.tile([5.0, -5.0, 1.0], (9, 1))])
def test_too_few_or_coinciding_ground_points_give_no_terrain(ground):
    assert np.isnan(terrain(ground, window(0, 0, 10))).all()


# ---- noise ------------------------------------------------------------------------------------
def test_lonely_returns_are_noise_and_tree_tops_are_not():
    rng = np.random.default_rng(0)
    points = np.zeros(5000, RECORD)
    points["x"], points["y"] = rng.uniform(0, 50, (2, 5000))
    points["z"] = np.clip(20 - 2.5 * np.hypot(points["x"] - 25, points["y"] - 25), 0, None)
    points["z"][:2], points["z"][2] = (70, 95), -30
    assert set(np.flatnonzero(lonely(points))) == {0, 1, 2}


# ---- pits -------------------------------------------------------------------------------------
def dome(size: int = 41) -> np.ndarray:
    r, c = np.mgrid[:size, :size] - size // 2
    return np.clip(22 - 0.02 * (r**2 + c**2), 0, None)


def test_narrow_pits_are_closed_and_streets_are_not():
    height = dome()
    holed = height.copy()
    holed[12, 20], holed[20, 9], holed[25:27, 25] = 0.4, 3.0, 1.0
    closed = close_pits(holed, np.zeros(height.shape, bool), 2)
    assert np.abs(closed - height).max() < 1.0
    street = height.copy()
    street[:, 20] = 0.0
    np.testing.assert_array_equal(close_pits(street, np.zeros(height.shape, bool), 1), street)
    wide = height.copy()
    wide[15:18, 15:18] = 0.0
    np.testing.assert_array_equal(close_pits(wide, np.zeros(height.shape, bool), 2), wide)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2**31), st.integers(1, 4))
def test_closing_is_extensive_idempotent_and_local(seed, widest):
    rng = np.random.default_rng(seed)
    height = np.where(rng.random((40, 40)) < 0.15, NAN, rng.choice([0.0, 3.0, 8.0, 20.0], (40, 40)))
    fixed = rng.random((40, 40)) < 0.05
    closed = close_pits(height, fixed, widest)
    np.testing.assert_array_equal(np.isnan(closed), np.isnan(height))
    known = np.isfinite(height)
    assert (closed[known] >= height[known]).all() and (closed[fixed & known] == height[fixed & known]).all()
    assert closed[known].max() <= height[known].max()
    m = widest
    part = close_pits(height[10 - m : 30 + m, 5 - m : 25 + m], fixed[10 - m : 30 + m, 5 - m : 25 + m], m)
    np.testing.assert_array_equal(part[m:-m, m:-m], closed[10:30, 5:25])


def test_gaps_are_filled_from_neighbours_only_where_there_was_no_return():
    height = np.array([[4.0, NAN, 8.0, NAN, NAN, NAN]])
    empty = np.array([[False, True, False, False, True, True]])
    np.testing.assert_array_equal(fill_gaps(height, empty, 0), height)
    filled = fill_gaps(height, empty, 2)
    assert filled[0, 1] == 6.0 and np.isnan(filled[0, 3:]).all()


# ---- structures -------------------------------------------------------------------------------
def surface(kinds, above, cells=None, **policies):
    kinds, above = np.array(kinds, np.uint8), np.array(above, float)
    cells = np.zeros(len(kinds), np.int64) if cells is None else np.array(cells)
    shape = (1, 1 + int(cells.max()))
    names = {"buildings": BUILDING, "water": WATER, "wires": WIRE}
    rules = dict.fromkeys(names.values(), "zero") | {names[k]: v for k, v in policies.items()}
    return highest(kinds, above, cells, shape, rules, classified=True)


@pytest.mark.parametrize(
    ("kinds", "above", "policy", "height"),
    [
        ([OTHER, GROUND], [12.0, 0.1], {}, 12.0),
        ([GROUND, GROUND], [0.2, -0.1], {}, 0.0),
        ([BUILDING, GROUND], [9.0, 0.0], {}, 0.0),
        ([BUILDING, GROUND], [9.0, 0.0], {"buildings": "mask"}, NAN),
        ([BUILDING, GROUND], [9.0, 0.0], {"buildings": "keep"}, 9.0),
        ([BUILDING, OTHER], [9.0, 10.0], {}, 0.0),  # a chimney
        ([BUILDING, OTHER], [4.0, 15.0], {}, 15.0),  # a crown above a shed
        ([BUILDING, OTHER], [4.0, 15.0], {"buildings": "mask"}, 15.0),
        ([BUILDING], [NAN], {}, 0.0),  # a roof too large for terrain below it
        ([WATER], [0.1], {}, 0.0),
        ([WATER], [NAN], {"water": "mask"}, NAN),
        ([WIRE, OTHER], [18.0, 6.0], {}, 6.0),
        ([WIRE, GROUND], [18.0, 0.0], {}, 0.0),
        ([WIRE, OTHER], [18.0, 6.0], {"wires": "mask"}, NAN),
        ([WIRE, OTHER], [18.0, 22.0], {"wires": "mask"}, 22.0),
        ([OTHER, GROUND], [400.0, 0.0], {}, 0.0),  # a bird
        ([OTHER, OTHER], [-7.0, 5.0], {}, 5.0),  # multipath
        ([OTHER], [NAN], {}, NAN),  # no terrain: no height
    ],
)
def test_the_highest_canopy_return_counts(kinds, above, policy, height):
    np.testing.assert_array_equal(surface(kinds, above, **policy)[0], [[height]])


def test_pixels_without_returns_are_nodata_with_a_count_of_0():
    height, count, _, _ = surface([OTHER, OTHER], [3.0, 5.0], cells=[0, 2])
    np.testing.assert_array_equal(height, [[3.0, NAN, 5.0]])
    np.testing.assert_array_equal(count, [[1, 0, 1]])
