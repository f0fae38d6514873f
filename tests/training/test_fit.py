"""A whole run in miniature: trains, refuses to overwrite, resumes, exports a model that loads."""

from __future__ import annotations

import csv
import math

import numpy as np
import pytest
import yaml

from canopy.chips.store import Chip, ChipRow, write_store
from canopy.config import load_settings
from canopy.errors import ConfigError
from canopy.models.checkpoint import load_model
from canopy.training.fit import finetune
from canopy.training.settings import FinetuneSettings

TINY = """
name: tiny
steps: 4
minutes: null
batch: 2
crop_px: 32
lr: 2.0e-3
log_every: 1
validate_every: 2
model:
  encoder: {family: rope, rope_type: cat, rope_rotate_half: false, dim: 32, depth: 4, heads: 2,
            taps: [0, 1, 2, 3], stem: [8, 8, 8], layer_scale: 0.1}
  decoder: {post_channels: [8, 8, 8, 8], fusion: 8, hidden: 8, head: half, detail: true, unit_norm: true,
            bins: 16, bin_min: 0.0, bin_max: 4.0, weights: softmax}
"""


@pytest.fixture
def config(tmp_path):
    rng = np.random.default_rng(0)
    chips = []
    for i, split in enumerate(["train", "train", "val"]):
        chm = rng.uniform(0, 30, (24, 24)).astype(np.float32)
        rgb = np.stack([(chm * 8).astype(np.uint8).repeat(2, 0).repeat(2, 1)] * 3)
        chips.append(Chip(ChipRow(f"c{i}", "site", "lidar", split), np.maximum(rgb, 1), chm))
    write_store(tmp_path / "chips.safetensors", chips, "datahash")
    path = tmp_path / "tiny.yaml"
    path.write_text(TINY + f"data: {{chips: {tmp_path / 'chips.safetensors'}}}\n")
    return path


def test_train_stop_resume_export(config, tmp_path):
    run = tmp_path / "run"
    exported = finetune(load_settings(FinetuneSettings, config), run, command="test")
    model = load_model(exported)
    assert model.card["steps"] == 4
    assert model.card["data"]["train_ids"] == ["c0", "c1"] and model.card["val"]["site"]["n"] == 24 * 24
    with (run / "train.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [int(r["step"]) for r in rows] == [1, 2, 3, 4]
    assert all(math.isfinite(float(value)) for r in rows for value in r.values())
    assert yaml.safe_load((run / "config.yaml").read_text())["batch"] == 2

    with pytest.raises(ConfigError, match="holds a run already"):
        finetune(load_settings(FinetuneSettings, config), run)
    longer = load_settings(FinetuneSettings, config, ["steps=6"])
    finetune(longer, run, resume=True)
    assert load_model(exported).card["steps"] == 6
    with pytest.raises(ConfigError, match="no run to resume"):
        finetune(longer, tmp_path / "elsewhere", resume=True)


def test_settings_name_the_nearest_known_key(config):
    with pytest.raises(ConfigError, match=r"shift_reach.*did you mean 'shift_reach_m'"):
        load_settings(FinetuneSettings, config, ["loss.shift_reach=2"])
    with pytest.raises(ConfigError, match=r"'dpth'.*'depth'"):
        load_settings(FinetuneSettings, config, ["model.encoder.dpth=2"])


def test_every_shipped_config_is_valid(repo):
    paths = sorted((repo / "configs" / "finetune").glob("*.yaml"))
    assert paths
    for path in paths:
        load_settings(FinetuneSettings, path)
