"""`canopy models export`: another runtime gives the heights of torch, from 8-bit RGB divided by 255."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
import torch

from canopy.models.export import to_onnx
from canopy.models.registry import load_model

onnxruntime = pytest.importorskip("onnxruntime", reason="needs onnxruntime, of the extra dev")


def _run(made: bytes, rgb: np.ndarray) -> tuple[np.ndarray, Any]:
    session = onnxruntime.InferenceSession(made, providers=["CPUExecutionProvider"])
    return session.run(None, {session.get_inputs()[0].name: rgb})[0], session


@pytest.mark.parametrize(
    "family", ["v1-like", "v2-like", pytest.param("ours", marks=pytest.mark.slow), "cnn"]
)
def test_every_family_gives_the_heights_of_torch(make_model, family: str) -> None:
    model = make_model(family, crop_px=64)
    rgb = np.random.default_rng(1).random((1, 3, 64, 64), dtype=np.float32)
    heights, _ = _run(to_onnx(model), rgb)
    with torch.no_grad():
        np.testing.assert_allclose(heights, model(torch.from_numpy(rgb)).numpy(), rtol=0, atol=1e-3)
    assert np.ptp(heights) > 0.01  # not one value that any input gives


def test_the_default_as_the_qgis_plugin_runs_it() -> None:
    """Bytes / 255, less its mean, by its std, channels first: what Deepness feeds; its checks of a model."""
    model = load_model("default")
    side = model.config.crop_px
    tile = np.random.default_rng(2).integers(0, 256, (side, side, 3), np.uint8)
    made = to_onnx(model, deepness=True)
    session = onnxruntime.InferenceSession(made, providers=["CPUExecutionProvider"])
    told = {k: json.loads(v) for k, v in session.get_modelmeta().custom_metadata_map.items()}
    assert told["model_type"] == "Regressor" and told["class_names"] == {"0": "canopy_height_m"}
    assert told["tile_size"] == side and told["resolution"] == pytest.approx(100 * model.config.gsd_m)
    assert 0 < told["tiles_overlap"] < 50 and told["reg_output_scaling"] == 1
    fed = (np.float32(tile / 255) - np.float32(told["standardization_mean"])) / np.float32(
        told["standardization_std"]
    )
    heights, session = _run(made, fed.transpose(2, 0, 1)[None].astype(np.float32))
    assert [o.shape for o in session.get_outputs()] == [[1, 1, side, side]]
    with torch.no_grad():
        expected = model(torch.from_numpy(np.float32(tile / 255)).permute(2, 0, 1)[None]).numpy()
    np.testing.assert_allclose(heights, expected, rtol=0, atol=1e-3)
