"""What calibrations are fitted on: chips of the right pixels, and where they lie."""

from __future__ import annotations

import csv
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from canopy.calibration.apply import calibrate_model
from canopy.calibration.collect import load_chips, places_of
from canopy.chips.index import ChipRow, write_index
from canopy.chips.store import Chip, described, write_store
from canopy.errors import ConfigError, DataError
from canopy.models.checkpoint import load_model, save_checkpoint

PLACE = {
    "crs": "EPSG:26917",
    "xmin": "310549.0",
    "ymin": "4170727.0",
    "xmax": "310805.0",
    "ymax": "4170983.0",
}


def write_manifest(folder: Path, row: dict[str, str]) -> Path:
    with (folder / "manifest.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, row)
        writer.writeheader()
        writer.writerow(row)
    return folder


def test_places_of_a_pack(tmp_path: Path) -> None:
    lon, lat = places_of(write_manifest(tmp_path, {"id": "a", **PLACE}))["a"]
    assert (lon, lat) == (pytest.approx(-83.14, abs=0.02), pytest.approx(37.66, abs=0.02))
    assert places_of(write_manifest(tmp_path, {"id": "a", **PLACE, "crs": ""})) == {}
    for column in PLACE:  # a pack need not say where it lies
        row = {name: text for name, text in PLACE.items() if name != column}
        assert places_of(write_manifest(tmp_path, {"id": "a", **row})) == {}


@pytest.mark.parametrize("fault", [{"xmin": ""}, {"ymax": "north"}, {"xmax": "inf"}, {"crs": "EPSG:0"}])
def test_bad_places_are_named(tmp_path: Path, fault: dict[str, str]) -> None:
    with pytest.raises(DataError, match="chip a "):
        places_of(write_manifest(tmp_path, {"id": "a", **PLACE, **fault}))


def test_chips_of_other_pixels_are_refused(tmp_path: Path) -> None:
    chip = Chip(
        ChipRow("a", "s", "lidar", "val"), np.ones((3, 64, 64), np.uint8), np.ones((32, 32), np.float32)
    )
    write_store(tmp_path / "val.safetensors", [chip], "x")
    row = described(chip, "val.safetensors")
    write_index(tmp_path, [row])
    assert len(load_chips(tmp_path, ("val",))[0]) == 1
    write_index(tmp_path, [replace(row, gsd_m=1.0, label_gsd_m=2.0)])
    with pytest.raises(DataError, match=r"pixels of 1 m and heights of 2 m.*--gsd 0\.5"):
        load_chips(tmp_path, ("val",))


def test_models_of_other_pixels_are_refused(tmp_path: Path, small_model: Path) -> None:
    model = load_model(small_model)
    model.config = replace(model.config, gsd_m=0.6)
    save_checkpoint(tmp_path / "coarse.safetensors", model, {})
    with pytest.raises(ConfigError, match=r"expects pixels of 0\.6 m"):
        calibrate_model(tmp_path / "coarse.safetensors", tmp_path, tmp_path / "out.safetensors")
