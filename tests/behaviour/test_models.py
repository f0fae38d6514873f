"""`canopy models`: what there is, conversion of the published layouts, the int8 network, other backends."""

from __future__ import annotations

import hashlib

import behaviour_support as support
import numpy as np
import pytest

LAYOUTS = {
    # name: (folder, checkpoint and other words, what the original gave, how far a loader may lie from it)
    "v1": ("published_v1", "{}/tiny.pth", "tiny_io", 1e-3),
    # The original's quantised layers round activations too; ours are fp32.
    "v1_compressed": ("published_v1", "{}/tiny_compressed.pth", "tiny_compressed_io", 0.15),
    "v2": ("published_v2", "{}/tiny_head.pth --backbone {}/tiny_backbone.pth", "tiny_io", 1e-3),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_published_layouts(canopy, shared, tmp_path, name: str) -> None:
    import torch

    import canopy as api

    folder, words, outputs, tol_m = LAYOUTS[name]
    path = shared / "fixtures" / folder
    given = f"models convert {words.format(path, path)} --config {path}/tiny.json -o m.safetensors"
    told = canopy(given, "--json").json
    support.check_keys(f"convert_{name}", told)
    support.check_values(f"convert_{name}", {"found": told["found"], "licence": told["licence"]})
    assert told["bytes"] == (tmp_path / "m.safetensors").stat().st_size
    rgb = torch.from_numpy(np.load(path / "tiny_io.npz")["rgb_uint8"]).permute(0, 3, 1, 2).float() / 255
    with torch.inference_mode():
        heights = api.load_model(tmp_path / "m.safetensors")(rgb)
    expected = np.load(path / f"{outputs}.npz")["height_m"]
    assert np.abs(heights.numpy() - expected).max() < tol_m
    assert "exists" in canopy(given, code=2).error_line


def test_a_converted_model_maps(canopy, shared, inputs, tmp_path) -> None:
    path = shared / "fixtures" / "published_v1"
    canopy(f"models convert {path}/tiny.pth --config {path}/tiny.json --half -o m.safetensors")
    canopy(f"predict {inputs}/wood.tif --model m.safetensors --backend torch -o chm.tif")
    # Its heights are random and rough; half-precision weights.
    support.check_heights("convert_map", support.metres(tmp_path / "chm.tif"))


def test_what_is_no_checkpoint_is_refused(canopy, shared, tmp_path) -> None:
    path = shared / "fixtures" / "published_v1" / "tiny.pth"
    (tmp_path / "cut.pth").write_bytes(path.read_bytes()[:100_000])
    (tmp_path / "page.pth").write_text("<html>not found</html>" * 9)
    for name in ("cut.pth", "page.pth", "gone.pth"):
        ran = canopy("models", "convert", name, "-o", "m.safetensors", code=2)
        assert len(ran.err.strip().splitlines()) == 1 and name in ran.err
    assert not (tmp_path / "m.safetensors").exists()


def test_lists_and_facts(canopy, model, banded) -> None:
    told = canopy("models", "list", "--json").json
    assert {"v1-huge", "v1-large", "v2"} <= set(told["published"])
    assert all(row["licence"] and row["origin"] for row in told["published"].values())
    listed = {"published": told["published"]["v2"], "default": sorted(told["models"])}
    support.check_keys("models_list", listed)
    default = told["models"]["default"]
    assert default["gsd_m"] > 0 and default["card"]["licence"]
    facts = canopy("models", "info", model, "--json").json
    support.check_keys("models_info", facts)
    support.check_values("models_info", {key: facts[key] for key in ("crop_px", "gsd_m", "parameters")})
    assert facts["sha256"] == hashlib.sha256(model.read_bytes()).hexdigest()
    assert canopy("models", "info", banded, "--json").json["card"]["intervals"]["levels"]
    assert "default" in canopy("models", "info", "defualt", code=2).error_line


@pytest.mark.slow
def test_another_backend_and_int8(canopy, chips, model, inputs, tmp_path) -> None:
    """OpenVINO gives the heights of torch; its int8 network, made of chips, nearly those."""
    pytest.importorskip("openvino")
    pytest.importorskip("nncf")
    own = tmp_path / "own.safetensors"
    own.write_bytes(model.read_bytes())
    words = f"predict {inputs}/wood.tif --model {own} --device cpu"
    canopy(words, "--backend openvino -o a.tif")
    fp32 = support.metres(tmp_path / "a.tif")
    support.check_heights("predict_aligned", fp32, stride=2)
    quantize = f"models quantize {own} --data {chips} --crops 8 -o own.int8.zip --json"
    told = canopy(quantize).json
    support.check_keys("quantize", told)
    assert told["accuracy"]["chips"] > 0 and abs(told["accuracy"]["loss_m"]) < 0.5
    canopy(words, "--precision int8 -o b.tif")
    int8 = support.metres(tmp_path / "b.tif")
    np.testing.assert_array_equal(np.isnan(int8), np.isnan(fp32))
    assert 0 < np.nanmean(np.abs(int8 - fp32)) < 0.5
    assert "--overwrite" in canopy(quantize, code=2).error_line
