"""Bands of pixels, areas and new places: what they cover on ground they have not seen, and their form."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from canopy.calibration.area import area_coverage, fit_areas
from canopy.calibration.calibrate import calibrate_model
from canopy.calibration.collect import Scored, cells_of, halves, load_chips, places_of
from canopy.calibration.intervals import coverage, effective_blocks, fit_intervals
from canopy.calibration.new_places import (
    Unseen,
    areas_in_new_places,
    fit_new_place,
    kept_from,
    trained_on,
    unseen_places,
    verify_new_place,
)
from canopy.chips.store import Chip, ChipRow
from canopy.chips.write import write_folder
from canopy.errors import CheckpointError, ConfigError, DataError
from canopy.evaluation.areas import SIZES_M, TAG, AreaModel, area_model_of, check_level
from canopy.models.checkpoint import load_checkpoint, save_checkpoint
from canopy.models.intervals import CARD_KEY, LEVELS, IntervalTable, hats, table_of


@pytest.fixture(scope="module")
def table(make_tiles) -> IntervalTable:
    return fit_intervals(cells_of(make_tiles(14)))


@pytest.fixture(scope="module")
def area(make_tiles, table: IntervalTable) -> AreaModel:
    return fit_areas(make_tiles(16), table)


# ---- pixels -----------------------------------------------------------------------------------------------
@pytest.mark.parametrize("level", [0.5, 0.8, 0.9, 0.95])
def test_coverage_on_unseen_tiles(table: IntervalTable, make_tiles, level: float) -> None:
    found = coverage([(table, cells_of(make_tiles(10, seed=1)))], level)
    assert found["overall"]["coverage"] == pytest.approx(level, abs=0.03)
    if level == 0.9:
        for name, row in found["by_height"].items():
            assert 0.85 <= row["coverage"] <= 0.955, name
        assert found["overall"]["below"] > 0.02 and found["overall"]["above"] > 0.02


def test_coverage_is_counted(table: IntervalTable, make_tiles) -> None:
    """Against plain NumPy, of two halves with tables of their own."""
    ways = [(table, cells_of(make_tiles(2, seed=s))) for s in (1, 2)]
    inside = []
    for one, cells in ways:
        lower, upper = one.bounds(cells.height_m, cells.spread_m, 0.8)
        inside.append((lower <= cells.truth_m) & (cells.truth_m <= upper))
    found = coverage(ways, 0.8)["overall"]
    assert found["n"] == sum(map(len, inside))
    assert found["coverage"] == pytest.approx(np.concatenate(inside).mean(), abs=1e-4)


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


def test_bands_follow_the_spread_stay_on_the_ground_and_survive_the_card(table: IntervalTable) -> None:
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
    again = table_of({CARD_KEY: json.loads(json.dumps(table.to_dict()))})
    np.testing.assert_allclose(again.bounds(heights, spreads, 0.98), before, atol=0.04)


def test_tall_trees_that_are_predicted_as_usual_ones_lie_inside(make_tiles) -> None:
    """One crown in 25 is 10 to 14 m taller than it looks: equal tails of 5 % would leave out most of them."""

    def tiles(count: int, seed: int) -> list[Scored]:
        made, rng = make_tiles(count, seed=seed), np.random.default_rng(seed)
        for t in made:
            at = (rng.random(t.truth_m.shape) < 0.04) & (t.height_m > 17)
            t.truth_m[at] = t.height_m[at] + rng.uniform(10, 14, at.sum())
        return made

    cells, table = cells_of(tiles(10, 1)), fit_intervals(cells_of(tiles(14, 0)))
    lower, upper = table.bounds(cells.height_m, cells.spread_m, 0.9)
    inside, high = (lower <= cells.truth_m) & (cells.truth_m <= upper), cells.height_m > 17
    tall = high & (cells.truth_m >= cells.height_m + 10)
    assert tall.sum() > 500 and inside[tall].mean() > 0.8
    assert inside[high].mean() == pytest.approx(0.9, abs=0.04)


def test_few_blocks_make_wider_bands(make_tiles) -> None:
    h, s = np.full(5, 12.0), np.full(5, 2.0)
    widths = []
    for count in (4, 12):
        lower, upper = fit_intervals(cells_of(make_tiles(12)[:count])).bounds(h, s, 0.95)
        widths.append(float((upper - lower)[0]))
    assert widths[0] > widths[1]
    assert effective_blocks(np.ones(40), np.repeat(np.arange(4), 10)) == pytest.approx(4)


def test_halves_share_sites_and_lose_nothing(make_tiles) -> None:
    tiles = make_tiles(9, side=32)
    one, two = halves(tiles)
    assert sorted(t.id for t in one + two) == [t.id for t in tiles]
    assert {t.site for t in one} == {t.site for t in two} == {"site0", "site1"}
    assert abs(len(one) - len(two)) <= 1


@settings(deadline=None)
@given(st.lists(st.floats(0.1, 50), min_size=2, max_size=8, unique=True), st.floats(-5, 60))
def test_hats_share_out_all_of_the_weight(knots: list[float], x: float) -> None:
    (_, a), (_, b) = hats(np.sort(knots), np.array([x]))
    assert a[0] >= 0 and b[0] >= 0 and a[0] + b[0] == pytest.approx(1)


# ---- areas ------------------------------------------------------------------------------------------------
def test_means_of_unseen_windows_are_covered(table: IntervalTable, area: AreaModel, make_tiles) -> None:
    tiles = make_tiles(12, seed=5)
    rows = area_coverage([(tiles, table, area)])
    for size, row in rows.items():
        assert 0.84 <= row["coverage"] <= 1.0, size
    assert rows["64"]["mean_width_m"] < 0.6 * rows["8"]["mean_width_m"]
    # What is left out when correlation is ignored: the nugget alone, and every cell by itself.
    nugget = float(area.correlation(np.array([0.0]))[0]) + area.nugget
    alone = AreaModel(area.pull, nugget, 0.0, np.zeros(len(area.weights)), area.factors)
    assert area_coverage([(tiles, table, alone)])["32"]["coverage"] < 0.7


def test_correlation_falls_with_area_and_distance_whatever_the_pixels(area: AreaModel) -> None:
    means = [area.mean_correlation(np.ones((n, n), bool), 1.0) for n in (4, 16, 64, 128)]
    assert means == sorted(means, reverse=True)
    near, far = area.correlation(np.array([1.0, 100.0]))
    assert near > far >= 0
    fine = area.mean_correlation(np.ones((200, 80), bool), 0.5)
    assert fine == pytest.approx(area.mean_correlation(np.ones((20, 8), bool), 5.0), rel=0.12)


def test_the_area_model_travels_in_a_maps_tags(area: AreaModel) -> None:
    again = area_model_of({TAG: json.dumps(area.to_dict())})
    assert again.factors.shape == area.factors.shape and again.factors.shape[1] == len(SIZES_M)
    means = np.array([18.0, 12.0, 23.0])
    lower, upper, sd = again.interval(means, 0.2, 300.0)
    assert 0 <= lower < 18 < upper < 23 and sd > 0
    narrow = again.interval(means, 0.2, 300.0, 0.5)
    assert narrow[1] - narrow[0] < upper - lower
    wide = again.interval(means, 0.2, 300.0, 0.99)
    assert wide[1] > again.interval(means, 0.2, 300.0, 0.95)[1]
    with pytest.raises(ConfigError, match=r"0\.5 to 0\.95"):
        check_level(0.99)
    with pytest.raises(DataError, match=r"--interval 0\.9"):
        area_model_of({})
    with pytest.raises(DataError, match="cannot be"):
        area_model_of({TAG: "{}"})


# ---- new places -------------------------------------------------------------------------------------------
def moved(tiles: list[Scored], site: str, by_m: float) -> list[Scored]:
    """Tiles of another place, whose truths lie `by_m` off what tiles like them had elsewhere."""
    return [
        replace(t, id=f"{site}-{t.id}", site=site, truth_m=np.maximum(t.truth_m + by_m, 0).astype(np.float32))
        for t in tiles
    ]


@pytest.fixture(scope="module")
def places(make_tiles) -> list[Unseen]:
    held = [
        tile
        for number, by_m in enumerate((-4.0, -2.0, 0.5, 3.0, 4.0))
        for tile in moved(make_tiles(4, seed=10 + number), f"place{number}", by_m)
    ]
    return unseen_places(make_tiles(10), held)


def test_places_left_out_of_the_fit_are_covered(places: list[Unseen]) -> None:
    found = verify_new_place(places)
    assert list(found["places"]) == [f"place{n}" for n in range(5)]
    worst_as_seen = min(row["as_seen"] for row in found["places"].values())
    worst = min(row["coverage"] for row in found["places"].values())
    assert worst_as_seen < 0.75 and worst > worst_as_seen + 0.1
    assert 0.88 <= found["coverage"] <= 0.99
    model, rows = areas_in_new_places(places)
    assert model is not None and all(row["coverage"] > 0.8 for row in rows.values())
    assert areas_in_new_places([replace(p, chips=p.chips[:1]) for p in places]) == (None, {})


def test_places_that_are_like_the_others_need_hardly_more(make_tiles) -> None:
    held = [t for n in range(4) for t in moved(make_tiles(4, seed=30 + n), f"p{n}", 0.0)]
    new = fit_new_place(unseen_places(make_tiles(14), held))
    assert new.factor[3, 1:6].max() < 1.3 and (new.factor >= 1).all()


def test_a_card_gives_the_bands_of_the_place(places: list[Unseen]) -> None:
    table, new = places[0].table, fit_new_place(places)
    card = {CARD_KEY: table.to_dict() | {"new_place": new.to_dict(), "places": [[-83.14, 37.66]]}}
    card = json.loads(json.dumps(card))
    near, far = (-83.10, 37.70), (-83.14, 37.80)
    assert table_of(card, [near, near]).place == "seen"
    for corners in ([near, far], [far], []):
        made = table_of(card, corners)
        assert made.place == "new"
        new_row, seen_row = (coverage([(t, cells_of(places[0].chips))])["overall"] for t in (made, table))
        assert new_row["coverage"] > seen_row["coverage"]
    del card[CARD_KEY]["new_place"]  # a file of before there were bands of new places
    assert table_of(card, [far]).place == "seen"


def _rows(*names: str, split: str = "val") -> list[ChipRow]:
    return [ChipRow(name, name[:2], "lidar", split) for name in names]


def test_cards_tell_what_a_model_was_trained_on() -> None:
    """Cards name pairs, or in older files chips; folders give chips."""
    rows = [*_rows("ky_1"), *_rows("ky_2-0-0-abc", split="train"), *_rows("ky_2-0-512-abd", "ky_3")]
    divided = {
        "data": {"train_ids": ["ky_1-0-0-abf", "ky_2"], "val_ids": ["ky_2", "ky_3"], "val_seen": False}
    }
    found = trained_on(divided, rows)
    assert found is not None and [row.id for row in found] == ["ky_1", "ky_2-0-0-abc"]
    every = {"data": {"train_ids": ["ky_1", "ky_2", "ky_3"], "val_ids": ["ky_2", "ky_3"], "val_seen": True}}
    assert trained_on(every, rows) == rows
    assert trained_on({"data": {"train_ids": ["ky_11", "ky"]}}, rows) == [] and trained_on({}, rows) is None
    sites = _rows("or_1", "or_2", "ky_1", "ma_11")
    assert kept_from({"data": {"train_ids": ["ma_11-0-0-abc", "or_2"]}}, sites) == ["ky"]
    with pytest.raises(DataError, match="every place"):
        kept_from({"data": {"train_ids": ["or_1", "ky_1", "ma_11"]}}, sites)
    with pytest.raises(DataError, match="does not say"):
        kept_from({}, sites)


# ---- faults -----------------------------------------------------------------------------------------------
def test_faults_name_their_remedy(table: IntervalTable, places, make_tiles) -> None:
    with pytest.raises(ConfigError, match="canopy calibrate interval"):
        table_of({})
    with pytest.raises(ConfigError, match=r"0\.5 to 0\.98"):
        table.bounds(np.ones(3), np.ones(3), 0.999)
    with pytest.raises(CheckpointError, match="cannot be used"):
        table_of({CARD_KEY: {"levels": [1]}})
    with pytest.raises(CheckpointError, match="new places"):
        table_of({CARD_KEY: table.to_dict() | {"new_place": {"height_m": [0], "factor": [[1]]}}})
    with pytest.raises(DataError, match="too little held-out ground"):
        fit_intervals(cells_of(make_tiles(1, side=32)))
    with pytest.raises(DataError, match="at least 4"):
        fit_areas(make_tiles(3), table)
    with pytest.raises(DataError, match="at least 3"):
        fit_new_place(places[:2])
    assert table.levels.tolist() == list(LEVELS)


def chip(**facts: object) -> Chip:
    row = ChipRow("a", "s", "lidar", "val", **facts)  # type: ignore[arg-type]
    return Chip(row, np.ones((3, 64, 64), np.uint8), np.ones((32, 32), np.float32))


def test_places_and_pixels_of_chips(tmp_path: Path, small_model: Path) -> None:
    place = {"crs": "EPSG:26917", "west": 310549.0, "south": 4170727.0, "east": 310805.0, "north": 4170983.0}
    ((lon, lat),) = places_of([chip(**place), chip(**place), chip()])
    assert (lon, lat) == (pytest.approx(-83.14, abs=0.02), pytest.approx(37.66, abs=0.02))
    write_folder(tmp_path / "fine", [chip()])
    assert len(load_chips(tmp_path / "fine", ("val",))[0]) == 1
    write_folder(tmp_path / "coarse", [chip(gsd_m=1.0, label_gsd_m=2.0)])
    with pytest.raises(DataError, match=r"chips of 1 m a pixel.*--gsd 0\.5"):
        load_chips(tmp_path / "coarse", ("val",))
    model = load_checkpoint(small_model)
    model.config = model.config.replaced(gsd_m=0.6)
    save_checkpoint(tmp_path / "m.safetensors", model, {})
    with pytest.raises(ConfigError, match=r"expects pixels of 0\.6 m"):
        calibrate_model(tmp_path / "m.safetensors", tmp_path, tmp_path / "out.safetensors")
