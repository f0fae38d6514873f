"""The GEDI model: learns heights from synthetic images, lives without facts, and corrects a map."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from canopy.calibration.collect import places_of
from canopy.calibration.gedi_area import Samples, joined, score_gedi, simulated, split_regions, train_gedi
from canopy.chips.index import ChipRow
from canopy.chips.store import Chip
from canopy.errors import CheckpointError, ConfigError, DataError, InputError
from canopy.models.gedi import FACTS, GediModel, load_gedi_model, save_gedi_model


def bright_is_tall(number: int, region: str) -> Chip:
    """A chip whose height can be read off its colour: the network must find that out."""
    rng = np.random.default_rng(number)
    side = 96
    height = np.clip(rng.uniform(0, 25) + 3 * rng.normal(size=(side, side)), 0, 40).astype(np.float32)
    green = np.repeat(np.repeat(0.2 + height / 60, 2, 0), 2, 1)
    rgb = np.stack([0.3 * np.ones_like(green), green, 0.2 * np.ones_like(green)])
    return Chip(ChipRow(f"c{number}", region, "lidar", "train"), (rgb * 255).astype(np.uint8), height)


@pytest.fixture(scope="module")
def samples() -> Samples:
    chips = [bright_is_tall(n, "north" if n % 3 else "south") for n in range(36)]
    places = {chip.row.id: (40.0 + n, -80.0) for n, chip in enumerate(chips)}
    return simulated(chips, per_chip=6, places=places)


@pytest.fixture(scope="module")
def model(samples: Samples) -> GediModel:
    inside, _ = split_regions(samples, ["south"])
    return train_gedi(inside, steps=120, batch=16, width=8, lr=5e-3)


def test_learns_what_a_held_out_region_looks_like(samples: Samples, model: GediModel) -> None:
    inside, outside = split_regions(samples, ["south"])
    assert set(outside.region) == {"south"} and set(inside.region) == {"north"}
    scores = score_gedi(model, outside, float(np.median(inside.height_m)))
    assert scores["mae_m"] < 0.6 * scores["mae_constant_m"]
    assert scores["r"] > 0.8


def test_simulated_heights_are_percentiles_of_the_disc(samples: Samples) -> None:
    flat = Chip(ChipRow("f", "r", "lidar", "train"), np.full((3, 256, 256), 90, np.uint8),
                np.full((128, 128), 7.5, np.float32))  # fmt: skip
    made = simulated([flat], per_chip=3)
    np.testing.assert_allclose(made.height_m, 7.5)
    assert made.rgb.shape == (3, 3, 128, 128) and np.isnan(made.facts).all()
    assert np.isfinite(samples.facts[:, :2]).all() and np.isnan(samples.facts[:, 2:]).all()
    with pytest.raises(DataError, match="no chip has room"):
        simulated([bright_is_tall(0, "r")], per_chip=0)


def test_missing_facts_are_a_case_of_their_own() -> None:
    torch.manual_seed(0)
    model = GediModel(width=8).eval()
    with torch.no_grad():
        model.missing.normal_()
    rgb = torch.rand(2, 3, 128, 128)
    told = torch.tensor([[45.0, 10.0, 30.0, 2.0, 5.0]]).repeat(2, 1)
    unknown = torch.full_like(told, float("nan"))
    assert not torch.allclose(model(rgb, told), model(rgb, unknown))
    assert (model(rgb, unknown) >= 0).all()
    with pytest.raises(InputError, match="128, 128"):
        model(rgb[..., :64], told)
    assert len(FACTS) == 5


def test_the_file_keeps_the_model(model: GediModel, samples: Samples, tmp_path: Path) -> None:
    path = tmp_path / "gedi.safetensors"
    save_gedi_model(path, model, {"note": "test"})
    again = load_gedi_model(path)
    assert again.card == {"note": "test"} and again.rh == 98
    rgb = torch.from_numpy(samples.rgb[:4].astype(np.float32) / 255)
    facts = torch.from_numpy(samples.facts[:4])
    torch.testing.assert_close(again(rgb, facts), model(rgb, facts))
    with pytest.raises(CheckpointError, match="no such file"):
        load_gedi_model(tmp_path / "none")
    (tmp_path / "bad").write_bytes(b"0" * 100)
    with pytest.raises(CheckpointError, match="cannot be used"):
        load_gedi_model(tmp_path / "bad")


def test_faults_of_training(samples: Samples) -> None:
    with pytest.raises(DataError, match="no region"):
        split_regions(samples, ["west"])
    with pytest.raises(ConfigError, match="at least 1"):
        train_gedi(samples, steps=0)


def test_places_of_the_pack_are_where_its_sites_are(shared: Path) -> None:
    lon, lat = places_of(shared / "data")["ky_magoffin_r00c01"]
    assert (lat, lon) == pytest.approx((37.66, -83.14), abs=0.03)


def test_real_shots_join_imagery_and_a_map_is_matched_to_the_model(model: GediModel, tmp_path: Path) -> None:
    from canopy.calibration.gedi import correct_map
    from canopy.geo.raster import read_raster
    from canopy.imagery.open import open_imagery
    from canopy.labels.gedi import extract_shots, read_shots
    from canopy.synth.sensors import write_scene

    write_scene(tmp_path / "s", 3, 420.0, 1.0, gedi_jitter_m=5.0)
    shots = tmp_path / "shots.parquet"
    extract_shots([tmp_path / "s" / "gedi.h5"], shots, filter="loose")
    table = read_shots(shots)
    made = joined(open_imagery(str(tmp_path / "s" / "rgb.tif"), area=None), table, region="scene")
    assert 0 < len(made) <= len(table) and np.isfinite(made.facts[:, :3]).all()
    assert np.isnan(made.facts[:, 3:]).all()
    sloped = joined(open_imagery(str(tmp_path / "s" / "rgb.tif"), area=None), table.assign(slope=12.0))
    assert (sloped.facts[:, 4] == 12.0).all() and np.isnan(sloped.facts[:, 3]).all()
    weights = tmp_path / "gedi.safetensors"
    save_gedi_model(weights, model, {})
    report = correct_map(
        tmp_path / "s" / "chm.tif", shots, tmp_path / "out.tif", model=weights,
        imagery=str(tmp_path / "s" / "rgb.tif"),
    )  # fmt: skip
    assert "predicted by gedi.safetensors" in report["fitted_on"] and report["held_out"]["n"] > 10
    out = read_raster(tmp_path / "out.tif", bands=[1]).values[0]
    truth = read_raster(tmp_path / "s" / "chm.tif").values[0]
    assert (out[truth == 0] == 0).all()
    with pytest.raises(ConfigError, match="--imagery"):
        correct_map(tmp_path / "s" / "chm.tif", shots, tmp_path / "o2.tif", model=weights)
