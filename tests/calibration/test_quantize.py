"""An int8 network is made of real crops, judged on others, found again, and only for its own weights."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import ndimage

from canopy.calibration.quantize import calibration_crops, quantize
from canopy.chips.store import Chip, ChipRow, ChipShards
from canopy.chips.write import write_folder
from canopy.errors import ConfigError, DataError, InputError
from canopy.inference.backends import read_card, settle
from canopy.models.checkpoint import save_checkpoint
from canopy.models.config import DecoderConfig, EncoderConfig, ModelConfig
from canopy.models.height import HeightModel
from canopy.models.registry import load_model, resolve_model

MOST_LOSS_M = 0.05


@pytest.fixture(scope="module")
def model_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    encoder = EncoderConfig(family="cnn", network="resnet18", widths=(16, 16, 16, 16), patch=32)
    decoder = DecoderConfig(
        post_channels=(16, 16, 16, 16), hidden=16, bins=16, bin_min=0.0, bin_max=4.0, weights="softmax",
        head="half",
    )  # fmt: skip
    model = HeightModel(ModelConfig(gsd_m=0.5, crop_px=64, encoder=encoder, decoder=decoder)).eval()
    with torch.no_grad():
        list(model.decoder.parameters())[-2].mul_(10.0)
    path = tmp_path_factory.mktemp("model") / "little.safetensors"
    save_checkpoint(path, model, {"name": "little"}, half=False)
    return path


@pytest.fixture(scope="module")
def chips_dir(tmp_path_factory: pytest.TempPathFactory, model_file: Path) -> Path:
    """Twelve chips of 96 px; their lidar is what the model sees, and some noise."""
    rng, model = np.random.default_rng(1), load_model(model_file)
    chips = []
    for number in range(12):
        noise = ndimage.gaussian_filter(rng.normal(size=(3, 96, 96)), (0, 2, 2))
        rgb = np.clip(noise / noise.std() * 40 + 110, 1, 255).astype(np.uint8)
        with torch.inference_mode():
            height = model(torch.from_numpy(rgb[None].astype(np.float32) / 255))[0, 0].numpy()
        height = height.reshape(48, 2, 48, 2).mean(axis=(1, 3)) + rng.normal(size=(48, 48)) * 0.3
        row = ChipRow(f"c{number:02d}", "here", "lidar", "train" if number < 8 else "val")
        rgb[:, :10, :10] = 0 if number % 2 else rgb[:, :10, :10]
        height = np.maximum(height, 0).astype(np.float32)
        side = 20 if number == 11 else 48  # one chip is smaller than a crop
        chips.append(Chip(row, np.ascontiguousarray(rgb[:, : 2 * side, : 2 * side]), height[:side, :side]))
    path = tmp_path_factory.mktemp("chips") / "chips"
    write_folder(path, chips)
    return path


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("CANOPY_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_it_is_made_judged_found_and_the_same_each_time(model_file, chips_dir, cache, tmp_path) -> None:
    model = load_model(model_file)
    report = quantize(model, chips_dir, crops=8)
    found = report["accuracy"]
    assert found["chips"] == 4 and found["cells"] > 7000
    assert abs(found["loss_m"]) <= MOST_LOSS_M and 0 < found["mean_difference_m"] < 0.5
    assert report["calibration"]["crops"] == 8 and report["model_sha256"] == model.sha256
    assert read_card(Path(report["output"]))["accuracy"] == found

    choice = settle(model, precision="int8", device="cpu")
    assert (choice.backend, choice.precision) == ("openvino", "int8")
    crops = calibration_crops(list(ChipShards(chips_dir, splits=["val"])), 64, 4)
    int8, fp32 = choice.open(model), settle(model, "openvino").open(model)
    rgb = torch.from_numpy(crops)
    apart = (int8.forward(rgb) - fp32.forward(rgb)).abs().numpy()
    assert 0 < apart.mean() < 0.5
    assert torch.equal(int8.forward(rgb[1:2]), int8.forward(rgb)[1:2])

    again = quantize(model, chips_dir, tmp_path / "again.int8.zip", crops=8)
    files = [read_card(Path(r["output"]))["files"]["model.bin"] for r in (report, again)]
    assert files[0] == files[1]
    with pytest.raises(InputError, match="exists"):
        quantize(model, chips_dir, tmp_path / "again.int8.zip", crops=8)

    # Beside its model it is found too, but not for other weights.
    (tmp_path / "again.safetensors").write_bytes(model_file.read_bytes())
    model = load_model(tmp_path / "again.safetensors")
    assert settle(model, precision="int8").quantised == tmp_path / "again.int8.zip"
    with torch.no_grad():
        list(model.decoder.parameters())[-2].mul_(0.5)
    with pytest.raises(ConfigError, match="no int8 network yet"):
        settle(model, precision="int8")


def test_data_without_val_rows_leaves_nothing(model_file, chips_dir, cache, tmp_path) -> None:
    train = tmp_path / "train"
    write_folder(train, ChipShards(chips_dir, splits=["train"]))
    with pytest.raises(DataError, match="no chips of val"):
        quantize(load_model(model_file), train, tmp_path / "x.int8.zip")
    assert not (tmp_path / "x.int8.zip").exists()


def test_the_embedded_int8_network_is_the_default_models_and_as_good() -> None:
    path = resolve_model("default").with_suffix(".int8.zip")
    assert settle(load_model("default"), precision="int8", device="cpu").quantised == path
    found = read_card(path)["accuracy"]
    assert found["chips"] >= 40 and found["loss_m"] <= MOST_LOSS_M
