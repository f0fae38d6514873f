"""`canopy models list | info | convert`: names, facts, and one clear line for what is not a model."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest
import torch


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory, repo: Path) -> Path:
    """A folder with a small v1 checkpoint, its sizes, and odd, hostile and truncated ones."""
    spec = importlib.util.spec_from_file_location("originals", repo / "tests" / "models" / "originals.py")
    assert spec is not None and spec.loader is not None
    originals = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(originals)
    folder = tmp_path_factory.mktemp("v1")
    state = originals.v1_state(64, 4, (8, 16, 32, 64), fusion=16, hidden=8)
    torch.save({"state_dict": state}, folder / "a.pth")
    torch.save({"state_dict": state | {"backbone.blocks.2.norm1.bias": torch.zeros(3)}}, folder / "odd.pth")
    torch.save({"state_dict": state, "x": torch.nn.Identity()}, folder / "hostile.pth")
    content = (folder / "a.pth").read_bytes()
    (folder / "cut.pth").write_bytes(content[: len(content) // 2])
    (folder / "sizes.json").write_text(json.dumps({"num_heads": 2, "taps": [0, 1, 2, 3]}))
    return folder / "a.pth"


def test_lists_and_facts_are_text_too(canopy, model_file) -> None:
    listed = canopy("models", "list").out
    assert listed.startswith("default") and "SSLhuge_satellite.pth" in listed and "DINOv3 License" in listed
    told = canopy("models", "info", model_file).out
    assert "small-random" in told and "red, green, blue at 0.5 m, crops of 64 px" in told
    told = canopy("models", "info", "default").out
    assert "val scores at 1 m" in told and "NEON" in told
    assert "Apache-2.0" in canopy("models", "info", "v1-huge").out


def test_convert_says_what_it_found(canopy, checkpoint: Path, tmp_path: Path) -> None:
    words = ("models", "convert", checkpoint, "--config", checkpoint.with_name("sizes.json"))
    done = canopy(*words, "-o", "m.safetensors", "--json")
    assert done.code == 0, done.err
    said = json.loads(done.out)
    assert said["found"] == "v1, plain: v1-64x4"
    assert set(said["dropped"]) == {"backbone.mask_token", "backbone.norm.weight", "backbone.norm.bias"}
    replaced = canopy(*words, "-o", "m.safetensors", "--overwrite")
    assert replaced.code == 0 and "found v1, plain: v1-64x4" in replaced.out


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("odd.pth", "backbone.blocks.2.norm1.bias is (3,), expected (64,)"),
        ("hostile.pth", "needs torch.nn.modules.linear.Identity"),
        ("cut.pth", "truncated or damaged"),
        ("gone.pth", "no such file"),
    ],
)
def test_what_cannot_be_converted(refused, name: str, says: str, checkpoint: Path) -> None:
    words = ("--config", checkpoint.with_name("sizes.json"), "-o", "m.safetensors")
    assert says in refused("models", "convert", checkpoint.with_name(name), *words)


def test_what_is_no_model(refused, tmp_path) -> None:
    (tmp_path / "page.safetensors").write_text("<html>not found</html>" * 9)
    assert "not a safetensors file" in refused("models", "info", "page.safetensors")
