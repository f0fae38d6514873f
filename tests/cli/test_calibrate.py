"""`canopy calibrate interval`: what is known of the chips and places that a model was trained on."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import rasterio

from canopy.calibration.apply import calibrate_model
from canopy.chips.store import Chip, ChipRow, ChipShards
from canopy.chips.write import write_folder
from canopy.models.checkpoint import describe, rewrite_card


@pytest.fixture(scope="module")
def chips(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight held-out tiles of 128 m of the procedural forest, and 32 training images."""
    from canopy.synth.forest import random_spec
    from canopy.synth.render import render

    made = []
    for number in range(12):
        tile = render(random_spec(4000 + number), 0.0, 0.0, 256, 256)
        rgb = np.maximum(tile.rgb, 1)
        chm = tile.chm.reshape(128, 2, 128, 2).max(axis=(1, 3)).astype(np.float32)
        if number < 8:
            made.append(Chip(ChipRow(f"c{number}", f"forest {number % 4}", "lidar", "val"), rgb, chm))
            continue
        for turn in range(8):  # a domain needs more crops than there are tiles to wait for
            turned = np.ascontiguousarray(np.rot90(rgb, turn % 4, (1, 2))[:, :, :: 1 if turn < 4 else -1])
            made.append(Chip(ChipRow(f"c{number}_{turn}", "forest", "lidar", "train"), turned, chm))
    path = tmp_path_factory.mktemp("chips") / "chips"
    write_folder(path, made)
    return path


@pytest.fixture(scope="module")
def calibrated(chips: Path, model_file: Path) -> Path:
    out = chips.with_name("calibrated.safetensors")
    calibrate_model(model_file, chips, out)
    return out


@pytest.fixture
def calibrate(canopy):
    """`calibrate(model, chips, ...)`: facts of `canopy calibrate interval`, and what it said."""

    def run(model: Path, data: Path, *words: object):
        told = ("-o", "m.safetensors", "--report", "", "--overwrite", "--json")
        ran = canopy("calibrate", "interval", model, "--data", data, *words, *told)
        assert ran.code == 0, ran.err
        return json.loads(ran.out), ran.err

    return run


def card_of(path: Path) -> dict:
    return describe(path)["card"]


def test_models_kept_from_places_widen_bands_elsewhere(
    calibrate, canopy, refused, chips: Path, model_file: Path, make_image, tmp_path: Path
) -> None:
    kept = tmp_path / "kept.safetensors"
    rewrite_card(model_file, kept, {"data": {"train_ids": ["c3", "c7", "c8_0"]}})
    facts, said = calibrate(model_file, chips, "--kept-from", kept)
    assert list(facts["new_places"]["places"]) == ["forest 0", "forest 1", "forest 2"]
    assert "do not say where they lie" in said  # chips that were drawn lie nowhere
    image, widths = make_image(), []
    raw = card_of(tmp_path / "m.safetensors")["intervals"]
    for name, left_out in (("new", ()), ("seen", ("new_place",))):
        model = tmp_path / f"{name}.safetensors"
        intervals = {key: value for key, value in raw.items() if key not in left_out}
        rewrite_card(tmp_path / "m.safetensors", model, {"intervals": intervals})
        words = ("predict", image, "--model", model, "--interval", 0.9, "-o", f"{name}.tif")
        assert canopy(*words).code == 0
        with rasterio.open(tmp_path / f"{name}.tif") as made:
            _, lower, upper = made.read()
            assert made.tags().get("CANOPY_INTERVAL_PLACE") == ("new" if name == "new" else None)
        widths.append(float((upper - lower).mean()))
    assert widths[0] >= widths[1]  # a network that knows nothing is as wrong everywhere
    words = ("calibrate", "interval", model_file, "--data", chips, "--kept-from", model_file)
    assert "does not say which chips" in refused(*words, "-o", "y.safetensors")
    words = ("predict", image, "--model", tmp_path / "m.safetensors", "--interval", 1.5, "-o", "x.tif")
    assert "0.5 to 0.98" in refused(*words)


def test_calibrating_again_says_what_was_seen_and_keeps_bands_of_new_places(
    calibrate, chips: Path, calibrated: Path, tmp_path: Path
) -> None:
    """A model that was trained on two of the chips, calibrated on data that do not say where they lie."""
    model = tmp_path / "model.safetensors"
    new_place = {"height_m": [0.0, 30.0], "factor": [[2.0, 3.0]] * 6}
    told = {"new_places": {"level": 0.9}, "areas_in_new_places": {"8": {}}}
    before = card_of(calibrated)["intervals"] | {"new_place": new_place, "places": [[-83.1, 37.7]]}
    before["facts"] |= told
    rewrite_card(calibrated, model, {"data": {"train_ids": ["c0", "c1-0-0-abc", "c10"]}, "intervals": before})
    _, said = calibrate(model, chips)
    assert "trained on 2 of these 8 chips" in said and "sibling" in said and "where they lie" in said
    after = card_of(tmp_path / "m.safetensors")["intervals"]
    assert after["new_place"] == new_place and after["places"] == []
    assert after["facts"]["seen_in_training"] == 2 and told.items() <= after["facts"].items()


def test_a_place_of_ones_own_changes_bands_and_not_the_domain(
    calibrate, chips: Path, model_file: Path, calibrated: Path, tmp_path: Path
) -> None:
    """Few images of another place, which the model was not trained on, say nothing of its domain."""
    few = list(ChipShards(chips, splits=["val"]))
    few.append(replace(few[0], row=replace(few[0].row, id="t", split="train")))
    write_folder(tmp_path / "mine", few)
    _, said = calibrate(model_file, tmp_path / "mine")
    assert "domain stays" in said and "quality" not in card_of(tmp_path / "m.safetensors")
    calibrate(calibrated, tmp_path / "mine")
    made, before = card_of(tmp_path / "m.safetensors"), card_of(calibrated)
    assert made["quality"] == before["quality"] and made["intervals"] != before["intervals"]
