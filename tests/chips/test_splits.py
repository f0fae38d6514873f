"""Splits by place: no train chip near a test chip, the same ground never on two sides."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from canopy.chips.options import SplitOptions
from canopy.chips.plan import PlannedChip, distance_to_test, settle
from canopy.errors import DataError
from canopy.geo.crs import transformer

UTM = "EPSG:32617"


def chip(x: float, y: float, split: str = "", site: str = "s", side: float = 128) -> PlannedChip:
    return PlannedChip("a", (0, 0, 1, 1), site, UTM, (x, y, x + side, y + side), split)


def lattice(n: int) -> list[PlannedChip]:
    return [chip(400_000 + 128 * i, 4_000_000 + 128 * j) for i in range(n) for j in range(n)]


def gap(a: PlannedChip, b: PlannedChip) -> float:
    """Independent distance of two boxes of one CRS, in ground metres (UTM's scale there is 0.9997)."""
    dx = max(a.bounds[0] - b.bounds[2], b.bounds[0] - a.bounds[2], 0)
    dy = max(a.bounds[1] - b.bounds[3], b.bounds[1] - a.bounds[3], 0)
    return float(np.hypot(dx, dy)) / 0.99972


@settings(max_examples=12, deadline=None)
@given(seed=st.integers(0, 10**6), buffer_m=st.floats(0, 400), block_m=st.floats(200, 900))
def test_no_train_chip_is_left_near_a_test_chip(seed, buffer_m, block_m):
    options = SplitOptions(block_m=block_m, val=0.1, test=0.2, buffer_m=buffer_m, seed=seed)
    chips = settle(lattice(14), options)
    kept, tests = [c for c in chips if not c.reason], [c for c in chips if c.is_test]
    for train in (c for c in kept if c.split == "train"):
        assert all(gap(train, test) > buffer_m - 0.05 for test in tests)
    dropped = [c for c in chips if c.reason]
    assert all(c.split == "train" and min(gap(c, t) for t in tests) <= buffer_m + 0.05 for c in dropped)
    assert all(c.test_distance_m <= buffer_m for c in dropped)


def test_shares_are_about_what_was_asked():
    chips = settle(lattice(60), SplitOptions(block_m=300, val=0.2, test=0.3))
    counts = {s: sum(c.split == s for c in chips) / len(chips) for s in ("train", "val", "test")}
    assert abs(counts["test"] - 0.3) < 0.1 and abs(counts["val"] - 0.2) < 0.1


def test_the_same_ground_gets_the_same_split_whatever_it_is_called():
    options = SplitOptions(block_m=500, val=0.3, test=0.3)
    once = settle(lattice(10), options)
    other = settle([replace(c, site="again") for c in reversed(lattice(10))], options)
    assert [c.split for c in once] == [c.split for c in reversed(other)]
    reseeded = settle(lattice(10), options.model_copy(update={"seed": 9}))
    assert [c.split for c in once] != [c.split for c in reseeded]


def test_whole_sites_are_held_out_and_given_splits_kept():
    chips = [chip(400_000, 4_000_000, site="WLOU"), chip(500_000, 4_000_000, "val", site="BART")]
    chips.append(chip(600_000, 4_000_000, "test_hard", site="WLOU"))
    assert [c.split for c in settle(chips, SplitOptions(held_out=["WL*"]))] == ["test", "val", "test_hard"]
    with pytest.raises(DataError, match=r"BART.*held out"):
        settle(chips, SplitOptions(held_out=["BART"]))
    with pytest.raises(DataError, match="GUAN"):
        settle(chips, SplitOptions(held_out=["GUAN"]))


def test_distances_hold_across_coordinate_systems():
    a = chip(499_000, 4_000_000, "train")
    for x, expected in ((499_178, 50.0), (499_128, 0.0), (499_500, 372.0)):
        for crs in ("EPSG:32617", "EPSG:32618", "EPSG:3857", "EPSG:4326"):
            move = transformer(UTM, crs).transform
            corners = itertools.product((x, x + 128), (4_000_000, 4_000_128))
            xs, ys = zip(*(move(*c) for c in corners), strict=True)
            test = replace(a, crs=crs, bounds=(min(xs), min(ys), max(xs), max(ys)), split="test_b")
            found = distance_to_test([a, test], 1000)
            assert found[0] == pytest.approx(expected, abs=8)  # turned boxes grow by some metres
            assert np.isnan(found[1])
    assert np.isnan(distance_to_test([a, chip(510_000, 4_000_000, "test")], 1000)[0])
