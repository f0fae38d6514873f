"""Bands of new places: wider by what models did not know of places they were kept from."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest

from canopy.calibration.collect import Scored, cells_of
from canopy.calibration.intervals import coverage
from canopy.calibration.new_places import (
    Unseen,
    areas_in_new_places,
    fit_new_place,
    kept_from,
    trained_on,
    unseen_places,
    verify_new_place,
)
from canopy.chips.store import ChipRow
from canopy.errors import CheckpointError, DataError
from canopy.models.heads import CARD_KEY, IntervalTable, table_of


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


def test_places_that_are_like_the_others_need_hardly_more(make_tiles) -> None:
    held = [t for n in range(4) for t in moved(make_tiles(4, seed=30 + n), f"p{n}", 0.0)]
    new = fit_new_place(unseen_places(make_tiles(14), held))
    assert new.factor[3, 1:6].max() < 1.3 and (new.factor >= 1).all()


def test_areas_of_new_places(places: list[Unseen]) -> None:
    model, rows = areas_in_new_places(places)
    assert model is not None
    assert all(row["coverage"] > 0.75 for row in rows.values())
    assert areas_in_new_places([replace(p, chips=p.chips[:1]) for p in places]) == (None, {})


def test_a_card_gives_the_bands_of_the_place(places: list[Unseen]) -> None:
    table, new = places[0].table, fit_new_place(places)
    card = {CARD_KEY: table.to_dict() | {"new_place": new.to_dict(), "places": [[-83.14, 37.66]]}}
    card = json.loads(json.dumps(card))
    near, far = (-83.10, 37.70), (-83.14, 37.80)
    assert table_of(card, [near, near]).place == "seen"
    for corners in ([near, far], [far], []):
        made = table_of(card, corners)
        assert made.place == "new"
        cells = cells_of(places[0].chips)
        assert coverage(made, cells)["overall"]["coverage"] > coverage(table, cells)["overall"]["coverage"]
    del card[CARD_KEY]["new_place"]  # a file of before there were bands of new places
    assert table_of(card, [far]).place == "seen"
    with pytest.raises(CheckpointError, match="new places"):
        table_of({CARD_KEY: table.to_dict() | {"new_place": {"height_m": [0], "factor": [[1]]}}})


def test_cards_tell_which_places_a_model_was_kept_from() -> None:
    sites = {"Autzen": ["or_1", "or_2"], "Frankfort": ["ky_1"], "Magoffin": ["ky_11"]}
    card = {"data": {"train_ids": ["ky_11-0-0-abc", "or_2"]}}
    assert kept_from(card, sites) == ["Frankfort"]
    with pytest.raises(DataError, match="every place"):
        kept_from({"data": {"train_ids": ["or_1", "ky_1", "ky_11"]}}, sites)
    with pytest.raises(DataError, match="does not say"):
        kept_from({}, sites)


def test_cards_tell_which_chips_a_model_was_trained_on() -> None:
    """Cards name pairs, or in older files chips; packs give pairs, folders and files give chips."""
    rows = [
        ChipRow(name, "s", "lidar", split)
        for name, split in (
            ("ky_1", "val"),
            ("ky_2-0-0-abc", "train"),
            ("ky_2-0-512-abd", "val"),
            ("ky_3", "val"),
        )
    ]
    divided = {
        "data": {"train_ids": ["ky_1-0-0-abf", "ky_2"], "val_ids": ["ky_2", "ky_3"], "val_seen": False}
    }
    found = trained_on(divided, rows)
    assert found is not None and [row.id for row in found] == ["ky_1", "ky_2-0-0-abc"]
    every = {"data": {"train_ids": ["ky_1", "ky_2", "ky_3"], "val_ids": ["ky_2", "ky_3"], "val_seen": True}}
    assert trained_on(every, rows) == rows
    assert trained_on({"data": {"train_ids": ["ky_11", "ky"]}}, rows) == [] and trained_on({}, rows) is None
    assert kept_from({"data": {"train_ids": ["ky_2"]}}, {"A": ["ky_2-0-0-abc"], "B": ["ky_3"]}) == ["B"]


def test_faults(places: list[Unseen]) -> None:
    with pytest.raises(DataError, match="at least 3"):
        fit_new_place(places[:2])
    assert isinstance(places[0].table, IntervalTable)
