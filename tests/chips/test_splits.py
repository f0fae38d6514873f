"""Splits by place: no train chip near a test chip, the same ground never on two sides."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from canopy.chips.splits import Place, SplitRules, assign, distance_to_test, drop_near_test
from canopy.errors import DataError
from canopy.geo.crs import transformer

UTM = "EPSG:32617"


def chip(x: float, y: float, split: str = "", site: str = "s", side: float = 128, crs: str = UTM) -> Place:
    return Place(site, crs, (x, y, x + side, y + side), split)


def lattice(n: int) -> list[Place]:
    return [chip(400_000 + 128 * i, 4_000_000 + 128 * j) for i in range(n) for j in range(n)]


def gap(a: Place, b: Place) -> float:
    """Independent distance of two boxes of one CRS."""
    dx = max(a.bounds[0] - b.bounds[2], b.bounds[0] - a.bounds[2], 0)
    dy = max(a.bounds[1] - b.bounds[3], b.bounds[1] - a.bounds[3], 0)
    return float(np.hypot(dx, dy))


@settings(max_examples=12, deadline=None)
@given(seed=st.integers(0, 10**6), buffer_m=st.floats(0, 400), block_m=st.floats(200, 900))
def test_no_train_chip_is_left_near_a_test_chip(seed, buffer_m, block_m):
    rules = SplitRules(block_m=block_m, val=0.1, test=0.2, buffer_m=buffer_m, seed=seed)
    places = assign(lattice(14), rules)
    reasons = drop_near_test(places, buffer_m)
    kept = [p for p, reason in zip(places, reasons, strict=True) if not reason]
    assert not any(drop_near_test(kept, buffer_m))
    tests = [p for p in kept if p.is_test]
    for train in (p for p in kept if p.split == "train"):
        assert all(gap(train, test) > buffer_m - 1e-6 for test in tests)
    dropped = [p for p, reason in zip(places, reasons, strict=True) if reason]
    assert all(p.split == "train" and min(gap(p, t) for t in tests) <= buffer_m + 1e-6 for p in dropped)


def test_shares_are_about_what_was_asked():
    places = assign(lattice(60), SplitRules(block_m=300, val=0.2, test=0.3))
    counts = {s: sum(p.split == s for p in places) / len(places) for s in ("train", "val", "test")}
    assert abs(counts["test"] - 0.3) < 0.1 and abs(counts["val"] - 0.2) < 0.1


def test_the_same_ground_gets_the_same_split_whatever_it_is_called():
    rules = SplitRules(block_m=500, val=0.3, test=0.3)
    once = assign(lattice(10), rules)
    other = assign([Place("again", p.crs, p.bounds) for p in reversed(lattice(10))], rules)
    assert [p.split for p in once] == [p.split for p in reversed(other)]
    reseeded = assign(lattice(10), SplitRules(block_m=500, val=0.3, test=0.3, seed=9))
    assert [p.split for p in once] != [p.split for p in reseeded]


def test_whole_sites_are_held_out_and_given_splits_kept():
    places = [chip(400_000, 4_000_000, site="WLOU"), chip(500_000, 4_000_000, "val", site="BART")]
    places.append(chip(600_000, 4_000_000, "test_hard", site="WLOU"))
    assert [p.split for p in assign(places, SplitRules(held_out=("WL*",)))] == ["test", "val", "test_hard"]
    with pytest.raises(DataError, match=r"BART.*held out"):
        assign(places, SplitRules(held_out=("BART",)))
    with pytest.raises(DataError, match="GUAN"):
        assign(places, SplitRules(held_out=("GUAN",)))


def test_distances_hold_across_coordinate_systems():
    a = chip(499_000, 4_000_000, "train")
    for x, expected in ((499_178, 50.0), (499_128, 0.0), (499_500, 372.0)):
        corner = chip(x, 4_000_000, "test_b")
        for crs in ("EPSG:32617", "EPSG:32618", "EPSG:3857", "EPSG:4326"):
            move = transformer(UTM, crs).transform
            corners = itertools.product((x, x + 128), (4_000_000, 4_000_128))
            xs, ys = zip(*(move(*c) for c in corners), strict=True)
            test = Place("s", crs, (min(xs), min(ys), max(xs), max(ys)), corner.split)
            found = distance_to_test([a, test], 1000)
            assert found[0] == pytest.approx(expected, abs=8)  # turned boxes grow by some metres
            assert np.isinf(found[1])
    assert np.isinf(distance_to_test([a, chip(510_000, 4_000_000, "test")], 1000)[0])


def test_bad_settings_are_refused():
    with pytest.raises(DataError, match="nothing to train on"):
        SplitRules(val=0.5, test=0.5)
    with pytest.raises(DataError):
        SplitRules(buffer_m=-1)


def test_the_packs_own_split_has_no_train_chip_beside_a_test_tile_once_dropped(shared):
    import csv

    with (shared / "data" / "manifest.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    places = [
        Place(r["site"], r["crs"], tuple(float(r[k]) for k in ("xmin", "ymin", "xmax", "ymax")), r["split"])
        for r in rows
    ]
    kept = [p for p, reason in zip(places, drop_near_test(places, 50), strict=True) if not reason]
    assert not any(drop_near_test(kept, 50)) and len(kept) < len(places)
