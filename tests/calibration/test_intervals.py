"""Conformal intervals: coverage on ground they have not seen, overall and by height, and their form."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from canopy.calibration.collect import cells_of, halves
from canopy.calibration.intervals import LEVELS, coverage, effective_blocks, fit_intervals
from canopy.errors import CheckpointError, ConfigError, DataError
from canopy.models.heads import CARD_KEY, IntervalTable, hats, table_of


@pytest.fixture(scope="module")
def table(make_tiles) -> IntervalTable:
    return fit_intervals(cells_of(make_tiles(14)))


@pytest.mark.parametrize("level", [0.5, 0.8, 0.9, 0.95])
def test_coverage_on_unseen_tiles(table: IntervalTable, make_tiles, level: float) -> None:
    found = coverage(table, cells_of(make_tiles(10, seed=1)), level)
    assert found["overall"]["coverage"] == pytest.approx(level, abs=0.03)
    if level == 0.9:
        for name, row in found["by_height"].items():
            assert 0.85 <= row["coverage"] <= 0.955, name
        assert found["overall"]["coverage"] >= 0.89
        assert found["overall"]["below"] > 0.02 and found["overall"]["above"] > 0.02


def test_a_spread_that_no_cell_of_a_height_has(make_tiles) -> None:
    """Bare ground whose spread is always nothing, beside forest whose spread never is."""
    bare = [
        replace(t, height_m=np.where(np.isnan(t.truth_m), np.nan, 0).astype(np.float32),
                spread_m=np.where(np.isnan(t.truth_m), np.nan, 1e-3 * (1 + t.spread_m)).astype(np.float32),
                truth_m=np.where(np.isnan(t.truth_m), np.nan, 0.1).astype(np.float32))
        for t in make_tiles(6, seed=3)
    ]  # fmt: skip
    made = fit_intervals(cells_of([*bare, *make_tiles(8)]))
    assert np.isfinite(made.below_m).all() and np.isfinite(made.above_m).all()


def test_bands_follow_the_spread_and_stay_on_the_ground(table: IntervalTable) -> None:
    heights, spreads = np.meshgrid(np.linspace(0, 40, 50), np.linspace(0, 8, 20))
    before = None
    for level in (0.5, 0.6, 0.8, 0.9, 0.93, 0.98):
        lower, upper = table.bounds(heights, spreads, level)
        assert (lower >= 0).all() and (lower <= heights + 1e-4).all() and (upper >= heights - 1e-4).all()
        if before is not None:
            assert (lower <= before[0] + 1e-4).all() and (upper >= before[1] - 1e-4).all()
        before = lower, upper
    narrow, wide = (np.subtract(*table.bounds(np.array([20.0]), np.array([s]), 0.9)) for s in (2.0, 6.0))
    assert -wide[0] > 1.5 * -narrow[0]


def test_the_table_survives_the_card(table: IntervalTable) -> None:
    again = table_of({CARD_KEY: json.loads(json.dumps(table.to_dict()))})
    h, s = np.linspace(0, 30, 40), np.linspace(0.1, 6, 40)
    np.testing.assert_allclose(again.bounds(h, s, 0.9), table.bounds(h, s, 0.9), atol=0.03)


def test_faults_name_their_remedy(table: IntervalTable, make_tiles) -> None:
    with pytest.raises(ConfigError, match="canopy calibrate interval"):
        table_of({})
    with pytest.raises(ConfigError, match=r"0\.5 to 0\.98"):
        table.bounds(np.ones(3), np.ones(3), 0.999)
    with pytest.raises(CheckpointError, match="cannot be used"):
        table_of({CARD_KEY: {"levels": [1]}})
    with pytest.raises(DataError, match="too little held-out ground"):
        fit_intervals(cells_of(make_tiles(1, side=32)))


def test_few_blocks_make_wider_bands(make_tiles) -> None:
    tiles = make_tiles(12)
    h, s = np.full(5, 12.0), np.full(5, 2.0)
    widths = []
    for count in (4, 12):
        lower, upper = fit_intervals(cells_of(tiles[:count])).bounds(h, s, 0.95)
        widths.append(float((upper - lower)[0]))
    assert widths[0] > widths[1]


def test_halves_share_sites_and_lose_nothing(make_tiles) -> None:
    tiles = make_tiles(9, side=32)
    one, two = halves(tiles)
    assert sorted(t.id for t in one + two) == [t.id for t in tiles]
    assert {t.site for t in one} == {t.site for t in two} == {"site0", "site1"}
    assert abs(len(one) - len(two)) <= 1


@settings(deadline=None)
@given(st.lists(st.floats(0.1, 50), min_size=2, max_size=8, unique=True), st.floats(-5, 60))
def test_hats_share_out_all_of_the_weight(knots: list[float], x: float) -> None:
    grid = np.sort(knots)
    (_, a), (_, b) = hats(grid, np.array([x]))
    assert a[0] >= 0 and b[0] >= 0 and a[0] + b[0] == pytest.approx(1)


def test_effective_blocks_counts_equal_blocks() -> None:
    assert effective_blocks(np.ones(40), np.repeat(np.arange(4), 10)) == pytest.approx(4)
    assert effective_blocks(np.array([1.0, 1e-9]), np.array([7, 9])) == pytest.approx(1)


def test_levels_are_the_documented_ones() -> None:
    assert LEVELS == (0.5, 0.68, 0.8, 0.9, 0.95, 0.98)
