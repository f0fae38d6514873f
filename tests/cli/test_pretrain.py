"""`canopy pretrain` at the command line."""

from __future__ import annotations

import json

import numpy as np
import pytest

from canopy.chips.index import ChipRow
from canopy.chips.store import Chip
from canopy.chips.synthetic import write_made


@pytest.fixture
def chips(tmp_path):
    """Four chips without heights: there is nothing to probe."""
    rng, nothing = np.random.default_rng(0), np.full((24, 24), np.nan, np.float32)
    rows = [ChipRow(f"c{i}", "s", "lidar", "train") for i in range(4)]
    chips = [Chip(row, rng.integers(1, 255, (3, 48, 48)).astype(np.uint8), nothing) for row in rows]
    write_made(tmp_path / "chips", chips, "made up")
    return tmp_path / "chips"


def test_a_run_and_its_json(canopy, repo, chips, tmp_path):
    config = str(repo / "configs" / "pretrain" / "smoke.yaml")
    words = ("pretrain", config, f"data.chips={chips}", "steps=2", "-o", "out")
    ran = canopy(*words, "--json")
    assert ran.code == 0, ran.err
    told = json.loads(ran.out)
    assert told["steps"] == 2 and told["objective"] == "dinov2" and told["images_seen"] == 8
    assert {"config.yaml", "last.ckpt", "encoder.safetensors", "log"} <= {
        p.name for p in (tmp_path / "out").iterdir()
    }
    again = canopy(*words)
    assert again.code == 2 and "--resume" in again.error_line


def test_fast_dev_run_leaves_nothing(canopy, repo, chips, tmp_path):
    config = str(repo / "configs" / "pretrain" / "smoke.yaml")
    ran = canopy("pretrain", config, f"data.chips={chips}", "objective=mae", "-o", "out", "--fast-dev-run")
    assert ran.code == 0 and "two steps" in ran.out and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (("none.yaml",), "none.yaml"),
        (("smoke", "stepz=3"), "did you mean 'steps'"),
        (("smoke", "views.global_px=40"), "patches of 16"),
        (("smoke", "data.chips=nowhere"), "canopy data chips"),
        (("smoke", "--resume"), "no run to resume"),
        (("smoke", "device=cuda"), "CUDA"),
    ],
)
def test_bad_input_exits_2_in_one_line_and_writes_nothing(canopy, repo, chips, tmp_path, words, named):
    import torch

    if "device=cuda" in words and torch.cuda.is_available():
        words, named = (*words, "data.chips=nowhere"), "canopy data chips"
    config, *rest = words
    file = str(repo / "configs" / "pretrain" / "smoke.yaml") if config == "smoke" else config
    given = [] if any("data.chips" in w for w in rest) else [f"data.chips={chips}"]
    ran = canopy("pretrain", file, *given, *rest, "-o", "out")
    assert ran.code == 2 and named in ran.error_line and "Traceback" not in ran.err
    assert not (tmp_path / "out").exists()


def test_help_has_an_example(canopy):
    ran = canopy("pretrain", "--help")
    assert ran.code == 0 and "Example: canopy pretrain" in ran.out
