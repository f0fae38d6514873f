"""`canopy calibrate` and the bands it makes possible, at the command line."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import rasterio
from safetensors.numpy import load_file

from canopy.calibration.apply import calibrate_model, rewrite_card
from canopy.calibration.area import area_model_of
from canopy.chips.index import ChipRow
from canopy.chips.store import Chip, read_store, write_store
from canopy.models.checkpoint import describe


@pytest.fixture(scope="module")
def chips(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight held-out tiles of 128 m and training images of the procedural forest."""
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
    path = tmp_path_factory.mktemp("chips") / "chips.safetensors"
    write_store(path, made, "0" * 64)
    return path


@pytest.fixture(scope="module")
def calibrated(chips: Path, model_file: Path) -> Path:
    out = chips.with_name("calibrated.safetensors")
    calibrate_model(model_file, chips, out)
    return out


def test_calibrate_interval_reports_what_it_verified(canopy, chips: Path, model_file: Path) -> None:
    ran = canopy("calibrate", "interval", model_file, "--data", chips, "-o", "m.safetensors", "--json")
    assert ran.code == 0, ran.err
    facts = json.loads(ran.out)
    assert facts["chips"] == 8 and facts["splits"] == ["val"]
    assert facts["seen_in_training"] is None and "trained on" not in ran.err
    levels = {row["level"]: row["overall"]["coverage"] for row in facts["verified_on_unseen_halves"]}
    assert levels[0.5] < levels[0.9] and levels[0.9] > 0.8
    assert "64" in facts["areas_on_unseen_halves"]


def test_calibrate_then_predict(
    canopy, calibrated: Path, model_file: Path, make_image, tmp_path: Path
) -> None:
    before, after = load_file(model_file), load_file(calibrated)
    assert before.keys() == after.keys()
    assert all(np.array_equal(before[k], after[k]) and before[k].dtype == after[k].dtype for k in before)
    card = describe(calibrated)["card"]
    assert card["name"] == "small-random" and card["intervals"]["facts"]["tensors_sha256"]

    image = make_image()
    ran = canopy("predict", image, "--model", calibrated, "--interval", 0.9, "--quality-band", "-o", "m.tif")
    assert ran.code == 0, ran.err
    with rasterio.open(tmp_path / "m.tif") as made:
        assert made.descriptions == ("canopy_height", "height_lower", "height_upper", "quality")
        height, lower, upper, quality = made.read()
        tags = made.tags()
    assert (lower <= height + 1e-4).all() and (upper >= height - 1e-4).all() and (lower >= 0).all()
    assert (quality.astype(int) & 64).all()  # this image has no date
    assert tags["CANOPY_INTERVAL"] == "0.9" and "32 domain" in tags["CANOPY_QUALITY_BITS"]
    assert area_model_of(tags).factors.shape == (5, 6)
    item = json.loads((tmp_path / "m.json").read_text())
    assert [b["name"] for b in item["assets"]["canopy_height"]["raster:bands"]][1] == "height_lower"

    plain = canopy("predict", image, "--model", model_file, "-o", "plain.tif")
    assert plain.code == 0
    with rasterio.open(tmp_path / "plain.tif") as made:
        np.testing.assert_allclose(made.read(1), height, atol=1e-5)


def test_models_kept_from_places_widen_bands_elsewhere(
    canopy, chips: Path, model_file: Path, make_image, tmp_path: Path
) -> None:
    kept = tmp_path / "kept.safetensors"
    rewrite_card(model_file, kept, {"data": {"train_ids": ["c3", "c7", "c8_0"]}})
    ran = canopy("calibrate", "interval", model_file, "--data", chips, "--kept-from", kept, "-o",
                 "m.safetensors", "--report", "", "--json")  # fmt: skip
    assert ran.code == 0, ran.err
    facts = json.loads(ran.out)
    assert list(facts["new_places"]["places"]) == ["forest 0", "forest 1", "forest 2"]
    assert "do not say where they lie" in ran.err  # a chips file knows no places
    widths = []
    for name, card in (("new", {}), ("seen", {"new_place": None})):
        model = tmp_path / f"{name}.safetensors"
        raw = describe(tmp_path / "m.safetensors")["card"]["intervals"]
        raw = {k: v for k, v in raw.items() if card.get(k, v) is not None}
        rewrite_card(tmp_path / "m.safetensors", model, {"intervals": raw})
        assert (
            canopy("predict", make_image(), "--model", model, "--interval", 0.9, "-o", f"{name}.tif").code
            == 0
        )
        with rasterio.open(tmp_path / f"{name}.tif") as made:
            _, lower, upper = made.read()
            assert made.tags().get("CANOPY_INTERVAL_PLACE") == ("new" if name == "new" else None)
        widths.append(float((upper - lower).mean()))
    assert widths[0] >= widths[1]  # a network that knows nothing is as wrong everywhere
    again = canopy("calibrate", "interval", model_file, "--data", chips, "--kept-from", model_file, "-o",
                   "y.safetensors")  # fmt: skip
    assert again.code == 2 and "does not say which chips" in again.error_line


def test_calibrating_again_says_what_was_seen_and_keeps_bands_of_new_places(
    canopy, chips: Path, calibrated: Path, tmp_path: Path
) -> None:
    """A model that was trained on two of the chips, calibrated on data that do not say where they lie."""
    model = tmp_path / "model.safetensors"
    new_place = {"height_m": [0.0, 30.0], "factor": [[2.0, 3.0]] * 6}
    told = {"new_places": {"level": 0.9}, "areas_in_new_places": {"8": {}}}
    before = describe(calibrated)["card"]["intervals"] | {"new_place": new_place, "places": [[-83.1, 37.7]]}
    before["facts"] |= told
    rewrite_card(calibrated, model, {"data": {"train_ids": ["c0", "c1-0-0-abc", "c10"]}, "intervals": before})
    ran = canopy("calibrate", "interval", model, "--data", chips, "-o", "m.safetensors", "--report", "")
    assert ran.code == 0, ran.err
    assert "trained on 2 of these 8 chips" in ran.err and "sibling" in ran.err
    assert "8 chips, 2 of them seen in training" in ran.out and "do not say where they lie" in ran.err
    after = describe(tmp_path / "m.safetensors")["card"]["intervals"]
    assert after["new_place"] == new_place and after["places"] == []
    assert after["facts"]["seen_in_training"] == 2 and told.items() <= after["facts"].items()


def test_a_place_of_ones_own_changes_bands_and_not_the_domain(
    canopy, chips: Path, model_file: Path, calibrated: Path
) -> None:
    """Few images of another place, which the model was not trained on, say nothing of its domain."""
    few = read_store(chips).of_split("val")
    few.append(replace(few[0], row=replace(few[0].row, id="t", split="train")))
    write_store(Path("mine.safetensors"), few, "1" * 64)
    words = ("--data", "mine.safetensors", "-o", "m.safetensors", "--overwrite")
    ran = canopy("calibrate", "interval", model_file, *words)
    assert ran.code == 0 and "domain stays" in ran.err
    assert "quality" not in describe(Path("m.safetensors"))["card"]
    assert canopy("calibrate", "interval", calibrated, *words).code == 0
    made, before = (describe(path)["card"] for path in (Path("m.safetensors"), calibrated))
    assert made["quality"] == before["quality"] and made["intervals"] != before["intervals"]


@pytest.mark.parametrize("options", [("--gsd", 1.0), ("--crs", "EPSG:4326"), ("--encoding", "uint8m")])
def test_bands_on_other_grids_and_encodings(
    canopy, calibrated: Path, make_image, tmp_path: Path, options: tuple[object, ...]
) -> None:
    ran = canopy("predict", make_image(), "--model", calibrated, "--interval", 0.8, "--quality-band",
                 "-o", "m.tif", *options)  # fmt: skip
    assert ran.code == 0, ran.err
    with rasterio.open(tmp_path / "m.tif") as made:
        height, lower, upper, quality = made.read(masked=True).astype(float)
        assert "CANOPY_AREA_MODEL" not in made.tags()  # its widths are those of 90 % bands
    assert height.count() > 1000
    assert (lower <= height + 0.51).all() and (upper >= height - 0.51).all()
    assert np.isin(quality.compressed().astype(int) & 64, 64).all()


def test_without_calibration_the_remedy_is_named(
    canopy, model_file: Path, make_image, tmp_path: Path
) -> None:
    image = make_image()
    for option in (("--interval", 0.9), ("--quality-band",)):
        ran = canopy("predict", image, "--model", model_file, *option, "-o", "m.tif")
        assert ran.code == 2 and "canopy calibrate interval" in ran.error_line
        assert not (tmp_path / "m.tif").exists()


def test_bad_calls_write_nothing(canopy, chips: Path, model_file: Path, calibrated: Path, make_image) -> None:
    for words, text in (
        (("interval", model_file, "--data", "nowhere", "-o", "x.safetensors"), "no such data"),
        (("interval", "nomodel", "--data", chips, "-o", "x.safetensors"), "no model"),
        (
            ("interval", model_file, "--data", chips, "--splits", "test", "-o", "x.safetensors"),
            "no chips of test",
        ),
        (("interval", model_file, "--data", chips, "-o", calibrated), "--overwrite"),
        (("interval", model_file, "--data", chips, "-o", "x.tif"), ".safetensors"),
        (("gedi", make_image(), "--shots", "none.parquet", "-o", "x.tif"), "no such file"),
        (("gedi", "none.tif", "--shots", chips, "-o", "x.jpg"), "does not end in .tif"),
    ):
        ran = canopy("calibrate", *words)
        assert ran.code == 2 and text in ran.error_line, (words, ran.err)
        assert not Path("x.safetensors").exists() and not Path("x.tif").exists()
    ran = canopy("predict", make_image(), "--model", calibrated, "--interval", 1.5, "-o", "x.tif")
    assert ran.code == 2 and "0.5 to 0.98" in ran.error_line


def test_gedi_from_scene_to_corrected_map(canopy, tmp_path: Path) -> None:
    from canopy.synth.scene import write_scene

    write_scene(tmp_path / "scene", 3, 420.0, 1.0, gedi_jitter_m=10.0)
    ran = canopy("data", "gedi", tmp_path / "scene" / "gedi.h5", "-o", "shots.parquet", "--filter", "loose")
    assert ran.code == 0, ran.err
    ran = canopy("calibrate", "gedi", tmp_path / "scene" / "chm.tif", "--shots", "shots.parquet", "-o",
                 "out.tif", "--json")  # fmt: skip
    assert ran.code == 0, ran.err
    report = json.loads(ran.out)
    assert report["shots"] >= 20 and report["held_out"]["n"] > 0
    with rasterio.open(tmp_path / "scene" / "chm.tif") as truth, rasterio.open(tmp_path / "out.tif") as made:
        assert np.abs(made.read(1) - truth.read(1)).max() <= 0.1
    again = canopy(
        "calibrate", "gedi", tmp_path / "scene" / "chm.tif", "--shots", "shots.parquet", "-o", "out.tif"
    )
    assert again.code == 2 and "--overwrite" in again.error_line


def test_stats_of_polygons_get_intervals(canopy, calibrated: Path, make_image, tmp_path: Path) -> None:
    import geopandas
    import pandas
    import shapely

    image = make_image()
    ran = canopy("predict", image, "--model", calibrated, "--interval", 0.9, "-o", "m.tif")
    assert ran.code == 0, ran.err
    west, north = 500_000.0, 4_882_000.0
    small = shapely.box(west + 5, north - 20, west + 15, north - 10)
    large = shapely.box(west + 1, north - 49, west + 59, north - 1)
    away = shapely.box(west + 900, north, west + 910, north + 10)
    geopandas.GeoDataFrame({"name": ["small", "large", "away"]}, geometry=[small, large, away],
                           crs="EPSG:32618").to_file("zones.gpkg")  # fmt: skip
    ran = canopy("stats", "m.tif", "--zones", "zones.gpkg", "-o", "stats.csv", "--interval", 0.9)
    assert ran.code == 0, ran.err
    table = pandas.read_csv("stats.csv").set_index("name")
    known = table.loc[["small", "large"]]
    assert (known.mean_lower_m <= known.mean_m).all() and (known.mean_upper_m >= known.mean_m).all()
    assert table.mean_sd_m["large"] < table.mean_sd_m["small"] and np.isnan(table.mean_sd_m["away"])
    canopy("predict", image, "--model", calibrated, "-o", "plain.tif")
    ran = canopy("stats", "plain.tif", "--zones", "zones.gpkg", "-o", "s.csv", "--interval", 0.9)
    assert ran.code == 2 and "--interval 0.9" in ran.error_line and not Path("s.csv").exists()
