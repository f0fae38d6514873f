"""Every backend gives what torch gives, on every family of models and on real images."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import pytest
import rasterio
import torch

import canopy
from canopy.inference.backends import StaticRunner, settle
from canopy.models.height import Stretch

OUTPUTS = ("height_m", "spread_m", "q0.05", "q0.95")
MOST_M = 1e-3


@pytest.mark.parametrize("family", ["vit", "vit-timm", "rope-v3", "rope-stem", "cnn"])
@pytest.mark.parametrize("backend", ["openvino", "onnx"])
def test_all_layers_are_those_of_torch(saved, family: str, backend: str) -> None:
    model = saved(family)
    crops = np.random.default_rng(1).random((3, 3, 64, 64), np.float32)
    expected = settle(model, "torch", device="cpu").open(model, OUTPUTS)(crops)
    runner = settle(model, backend).open(model, OUTPUTS)
    found = runner(crops)
    assert (runner.backend, runner.precision, runner.outputs) == (backend, "fp32", OUTPUTS)
    assert found.dtype == np.float32 and found.shape == (3, 4, 64, 64)
    assert expected[:, 0].std() > 0.02
    np.testing.assert_allclose(found, expected, atol=MOST_M)
    # A crop alone is the crop in company, to the byte: a map must not depend on how it was cut.
    assert np.array_equal(runner(crops[1:2]), found[1:2])
    only = settle(model, backend).open(model)(crops)
    assert np.array_equal(only[:, 0], found[:, 0])


def test_compiled_torch_is_torch(saved) -> None:
    """Whether there is a compiler or not: without one the network runs eagerly, and says so."""
    stretch = Stretch(source=(0.1, 0.6, 0.1, 0.5, 0.1, 0.4), target=(0.05, 0.9, 0.1, 0.8, 0.1, 0.7))
    crops = np.random.default_rng(4).random((3, 3, 64, 64), np.float32)
    model = saved("vit").with_radiometry(stretch)
    expected = settle(model, "torch", device="cpu").open(model, OUTPUTS)(crops)
    choice = settle(model, "torch-compiled", device="cpu")
    assert choice.names == {"backend": "torch-compiled", "precision": "fp32", "device": "cpu"}
    runner = choice.open(model, OUTPUTS)
    assert runner.backend == "torch-compiled"
    np.testing.assert_allclose(runner(crops), expected, atol=MOST_M)


def test_what_cannot_be_compiled_is_tried_once(saved, caplog, monkeypatch, tmp_path) -> None:
    import torch._inductor.config as inductor

    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))  # nothing compiled before is found
    torch._dynamo.reset()
    model = saved("vit")
    crops = np.random.default_rng(4).random((2, 3, 64, 64), np.float32)
    expected = settle(model, "torch", device="cpu").open(model)(crops)
    runner = StaticRunner(model, torch.device("cpu"), mode="compile").with_radiometry(None)
    with inductor.patch("cpp.cxx", ("no-such-compiler",)):
        for _ in range(3):
            np.testing.assert_allclose(runner(crops), expected, atol=MOST_M)
    assert caplog.text.count("is not compiled") == 1


@pytest.mark.parametrize("backend", ["openvino", "onnx"])
def test_a_moved_radiometry_is_moved_alike(saved, backend: str) -> None:
    model = saved("cnn").with_radiometry(
        Stretch(source=(0.1, 0.6, 0.1, 0.5, 0.1, 0.4), target=(0.05, 0.9, 0.1, 0.8, 0.1, 0.7))
    )
    crops = np.random.default_rng(2).random((2, 3, 64, 64), np.float32)
    with torch.inference_mode():
        expected = model(torch.from_numpy(crops)).numpy()
    plain = settle(saved("cnn"), backend).open(saved("cnn"))
    np.testing.assert_allclose(settle(model, backend).open(model)(crops), expected, atol=MOST_M)
    np.testing.assert_allclose(plain.with_radiometry(model.stretch)(crops), expected, atol=MOST_M)
    assert not np.allclose(plain(crops), expected, atol=MOST_M)


def test_bf16_is_near_and_fp32_is_not_secretly_bf16(saved) -> None:
    capabilities = getattr(torch.cpu, "get_capabilities", dict)()
    if not capabilities.get("avx512_bf16"):
        pytest.skip("this processor has no bf16")
    model = saved("cnn")
    crops = np.random.default_rng(3).random((2, 3, 64, 64), np.float32)
    exact = settle(model, "openvino").open(model)(crops)
    half = settle(model, "openvino", "bf16").open(model)
    assert half.precision == "bf16"
    apart = np.abs(half(crops) - exact)
    assert 0 < apart.mean() < 0.5 and apart.max() > MOST_M


@pytest.fixture(scope="module")
def real_crops(shared: Path) -> np.ndarray:
    """Crops of three real images, (3, 3, side, side)."""
    side = canopy.load_model("default").config.crop_px
    with (shared / "data/manifest.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row["split"] == "val"]
    made = []
    for row in rows[:: len(rows) // 3][:3]:
        with rasterio.open(shared / "data" / row["rgb_path"]) as dataset:
            window = rasterio.windows.Window(0, 0, side, side)
            made.append(dataset.read(window=window, boundless=True, fill_value=0)[:3])
    return np.stack(made).astype(np.float32) / 255


@pytest.mark.parametrize("backend", ["openvino", "onnx"])
def test_the_default_model_on_real_images(real_crops, backend: str) -> None:
    model = canopy.load_model("default")
    expected = settle(model, "torch", device="cpu").open(model, OUTPUTS[:2])(real_crops)
    found = settle(model, backend).open(model, OUTPUTS[:2])(real_crops)
    assert expected[:, 0].max() > 5
    np.testing.assert_allclose(found, expected, atol=MOST_M)
