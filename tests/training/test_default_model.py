"""The shipped weights on real validation tiles: better than any constant, and sane elsewhere."""

from __future__ import annotations

import csv

import numpy as np
import pytest
import torch

from canopy.chips.options import CutOptions
from canopy.chips.store import Chip, ChipRow, ChipShards
from canopy.chips.write import write_chips
from canopy.models.registry import load_model
from canopy.synth.forest import SceneSpec
from canopy.synth.render import render
from canopy.training.height import score, score_chips

VAL = ["ky_magoffin_r02c08", "ky_frankfort_r02c05", "ky_frankfort_r05c04", "neon_mlbs_1", "neon_osbs_1"]


@pytest.fixture(scope="module")
def model():
    torch.set_num_threads(1)
    return load_model("default")


@pytest.fixture(scope="module")
def chips(shared, tmp_path_factory) -> list[Chip]:
    """A few val tiles and plots."""
    folder = tmp_path_factory.mktemp("pack")
    (folder / "pairs").symlink_to(shared / "data" / "pairs")
    with (shared / "data" / "manifest.csv").open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["id"] in VAL]
    with (folder / "manifest.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    write_chips(folder / "manifest.csv", folder / "chips", CutOptions(size_px=512, undo_shift=False))
    return list(ChipShards(folder / "chips"))


def test_it_beats_the_best_constant_on_real_validation_tiles(model, chips):
    truth = np.concatenate([c.chm_m[c.scored] for c in chips])
    ours = score_chips(model, chips, overlap_px=0)["all"]
    # A constant's MAE is least at the median of these very pixels.
    constant = score(chips, lambda c: np.full(c.chm_m.shape, np.median(truth)))["all"]
    assert len(chips) >= 4 and ours["mae_m"] < 0.65 * constant["mae_m"] and ours["r"] > 0.75


def test_the_demo_forest_is_no_stranger(model):
    tile = render(SceneSpec(), 300.0, -300.0, 512, 512)
    chm = tile.chm.reshape(256, 2, 256, 2).mean(axis=(1, 3))
    chip = Chip(ChipRow("demo", "demo", "synth", "val"), np.maximum(tile.rgb, 1), chm)
    assert score_chips(model, [chip], overlap_px=0)["all"]["r"] > 0.65
