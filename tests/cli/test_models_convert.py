"""`canopy models convert` and `list` as a user meets them: what they say, and how they exit."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

SIZES = {"num_heads": 2, "taps": [0, 1, 2, 3]}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory, repo: Path) -> Path:
    """A folder with a small v1 checkpoint, its sizes, and a hostile and a truncated file."""
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
    (folder / "sizes.json").write_text(json.dumps(SIZES))
    return folder / "a.pth"


def test_convert_says_what_it_found(canopy: Callable, checkpoint: Path, tmp_path: Path) -> None:
    out, sizes = tmp_path / "m.safetensors", checkpoint.with_name("sizes.json")
    done = canopy("models", "convert", checkpoint, "--config", sizes, "-o", out, "--json")
    assert done.code == 0, done.err
    said = json.loads(done.out)
    assert said["found"] == "v1, plain: v1-64x4" and said["licence"] == "Apache-2.0"
    assert set(said["dropped"]) == {"backbone.mask_token", "backbone.norm.weight", "backbone.norm.bias"}
    assert said["bytes"] == out.stat().st_size and len(said["inputs"][0]["sha256"]) == 64
    again = canopy("models", "convert", checkpoint, "--config", sizes, "-o", out)
    assert again.code == 2 and "exists" in again.err
    replaced = canopy("models", "convert", checkpoint, "--config", sizes, "-o", out, "--overwrite")
    assert replaced.code == 0 and "found v1, plain: v1-64x4" in replaced.out


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("odd.pth", "backbone.blocks.2.norm1.bias is (3,), expected (64,)"),
        ("hostile.pth", "needs torch.nn.modules.linear.Identity"),
        ("cut.pth", "truncated or damaged"),
        ("gone.pth", "no such file"),
    ],
)
def test_one_clear_line_and_exit_2(
    canopy: Callable, name: str, words: str, checkpoint: Path, tmp_path: Path
) -> None:
    sizes = checkpoint.with_name("sizes.json")
    out = tmp_path / "m.safetensors"
    done = canopy("models", "convert", checkpoint.with_name(name), "--config", sizes, "-o", out)
    assert done.code == 2 and done.out == ""
    assert len(done.err.strip().splitlines()) == 1 and words in done.err
    assert list(tmp_path.iterdir()) == []


def test_list_tells_licence_origin_and_how(canopy: Callable) -> None:
    listed = json.loads(canopy("models", "list", "--json").out)["published"]
    for name in ("v1-huge", "v1-large", "v2"):
        assert listed[name]["licence"] and listed[name]["size_gb"] and listed[name]["origin"]
    assert "accept the terms" in listed["v2"]["how"]
    text = canopy("models", "list").out
    assert "SSLhuge_satellite.pth" in text and "DINOv3 License" in text
    assert "Apache-2.0" in canopy("models", "info", "v1-huge").out
