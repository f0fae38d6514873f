"""What calibrations are fitted on: chips of the right pixels, and where they lie."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from canopy.calibration.apply import calibrate_model
from canopy.calibration.collect import load_chips, places_of
from canopy.chips.store import Chip, ChipRow
from canopy.chips.write import write_folder
from canopy.errors import ConfigError, DataError
from canopy.models.checkpoint import save_checkpoint
from canopy.models.registry import load_model


def chip(**facts: object) -> Chip:
    row = ChipRow("a", "s", "lidar", "val", **facts)  # type: ignore[arg-type]
    return Chip(row, np.ones((3, 64, 64), np.uint8), np.ones((32, 32), np.float32))


def test_places_are_those_of_the_rows() -> None:
    place = {"crs": "EPSG:26917", "west": 310549.0, "south": 4170727.0, "east": 310805.0, "north": 4170983.0}
    ((lon, lat),) = places_of([chip(**place), chip(**place), chip()])
    assert (lon, lat) == (pytest.approx(-83.14, abs=0.02), pytest.approx(37.66, abs=0.02))


def test_chips_of_other_pixels_are_refused(tmp_path: Path) -> None:
    write_folder(tmp_path / "fine", [chip()])
    assert len(load_chips(tmp_path / "fine", ("val",))[0]) == 1
    write_folder(tmp_path / "coarse", [chip(gsd_m=1.0, label_gsd_m=2.0)])
    with pytest.raises(DataError, match=r"chips of 1 m a pixel.*--gsd 0\.5"):
        load_chips(tmp_path / "coarse", ("val",))


def test_models_of_other_pixels_are_refused(tmp_path: Path, small_model: Path) -> None:
    model = load_model(small_model)
    model.config = replace(model.config, gsd_m=0.6)
    save_checkpoint(tmp_path / "coarse.safetensors", model, {})
    with pytest.raises(ConfigError, match=r"expects pixels of 0\.6 m"):
        calibrate_model(tmp_path / "coarse.safetensors", tmp_path, tmp_path / "out.safetensors")
