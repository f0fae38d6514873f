"""`canopy calibrate interval`: what is known of the chips and places that a model was trained on."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import rasterio

from canopy.chips.store import Chip, ChipRow
from canopy.chips.write import write_folder
from canopy.models.checkpoint import describe, rewrite_card


@pytest.fixture(scope="module")
def chips(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight held-out tiles of 128 m of the procedural forest: too few to say what a model knows."""
    from canopy.synth.forest import random_spec
    from canopy.synth.render import render

    made = []
    for number in range(8):
        tile = render(random_spec(4000 + number), 0.0, 0.0, 256, 256)
        chm = tile.chm.reshape(128, 2, 128, 2).max(axis=(1, 3)).astype(np.float32)
        row = ChipRow(f"c{number}", f"forest {number % 4}", "lidar", "val")
        made.append(Chip(row, np.maximum(tile.rgb, 1), chm))
    path = tmp_path_factory.mktemp("chips") / "chips"
    write_folder(path, made)
    return path


@pytest.fixture
def calibrate(canopy, chips: Path, tmp_path: Path):
    """`calibrate(model, ...)` makes m.safetensors: its card, the facts printed, and what was said."""

    def run(model: Path, *words: object):
        told = ("-o", "m.safetensors", "--report", "", "--overwrite", "--json")
        ran = canopy("calibrate", "interval", model, "--data", chips, *words, *told)
        assert ran.code == 0, ran.err
        return describe(tmp_path / "m.safetensors")["card"], json.loads(ran.out), ran.err

    return run


def test_models_kept_from_places_widen_bands_elsewhere(
    calibrate, canopy, refused, chips: Path, model_file: Path, make_image, tmp_path: Path
) -> None:
    kept = tmp_path / "kept.safetensors"
    rewrite_card(model_file, kept, {"data": {"train_ids": ["c3", "c7", "c8_0"]}})
    _, facts, said = calibrate(model_file, "--kept-from", kept)
    assert list(facts["new_places"]["places"]) == ["forest 0", "forest 1", "forest 2"]
    assert "do not say where they lie" in said  # chips that were drawn lie nowhere
    model = ("--model", tmp_path / "m.safetensors", "--interval")
    assert canopy("predict", make_image(), *model, 0.9, "-o", "chm.tif").code == 0
    with rasterio.open(tmp_path / "chm.tif") as made:
        assert made.tags()["CANOPY_INTERVAL_PLACE"] == "new"
    assert "0.5 to 0.98" in refused("predict", make_image(), *model, 1.5, "-o", "x.tif")
    words = ("calibrate", "interval", model_file, "--data", chips, "--kept-from", model_file)
    assert "does not say which chips" in refused(*words, "-o", "y.safetensors")


def test_calibrating_again_says_what_was_seen_and_keeps_what_it_cannot_know(
    calibrate, model_file: Path, tmp_path: Path
) -> None:
    """A model that was trained on two of the chips; they say neither where they lie nor what it knows."""
    before, _, said = calibrate(model_file)
    assert "domain stays" in said and "quality" not in before
    new_place = {"height_m": [0.0, 30.0], "factor": [[2.0, 3.0]] * 6}
    told = {"new_places": {"level": 0.9}, "areas_in_new_places": {"8": {}}}
    intervals = before["intervals"] | {"new_place": new_place, "places": [[-83.1, 37.7]]}
    intervals["facts"] |= told
    card = {
        "data": {"train_ids": ["c0", "c1-0-0-abc", "c10"]},
        "intervals": intervals,
        "quality": {"limit": 3},
    }
    rewrite_card(tmp_path / "m.safetensors", tmp_path / "model.safetensors", card)
    after, _, said = calibrate(tmp_path / "model.safetensors")
    assert "trained on 2 of these 8 chips" in said and "sibling" in said and "where they lie" in said
    assert after["intervals"]["new_place"] == new_place and after["intervals"]["places"] == []
    facts = after["intervals"]["facts"]
    assert facts["seen_in_training"] == 2 and told.items() <= facts.items()
    assert after["quality"] == {"limit": 3}, "the domain stays"
