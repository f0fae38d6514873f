"""`canopy models list | info`: names and facts as text; tests/behaviour and tests/models convert."""

from __future__ import annotations

import pytest


def test_lists_and_facts_are_text_too(canopy, model_file) -> None:
    listed = canopy("models", "list").out
    assert listed.startswith("default") and "SSLhuge_satellite.pth" in listed and "DINOv3 License" in listed
    told = canopy("models", "info", model_file).out
    assert "small-random" in told and "red, green, blue at 0.5 m, crops of 64 px" in told
    told = canopy("models", "info", "default").out
    assert "val scores at 1 m" in told and "NEON" in told
    assert "Apache-2.0" in canopy("models", "info", "v1-huge").out


def test_what_is_no_model(refused, tmp_path) -> None:
    (tmp_path / "page.safetensors").write_text("<html>not found</html>" * 9)
    assert "not a safetensors file" in refused("models", "info", "page.safetensors")


def test_export_writes_one_file_of_the_right_kind(canopy, refused, model_file, tmp_path) -> None:
    pytest.importorskip("onnx", reason="needs onnx, of the extra export")
    assert "ending in .onnx" in refused("models", "export", model_file, "-o", "m.tif")
    ran = canopy("models", "export", model_file, "--to", "deepness", "-o", "m.onnx")
    assert ran.code == 0 and "rgb (1, 3, 64, 64) in 0..1 at 0.5 m -> metres" in ran.out
    assert b"standardization_mean" in (tmp_path / "m.onnx").read_bytes()
