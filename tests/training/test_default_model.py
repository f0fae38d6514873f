"""The shipped weights on real validation tiles: better than any constant, and sane elsewhere."""

from __future__ import annotations

import csv

import numpy as np
import pytest
import torch

from canopy.chips.cut import read_pack
from canopy.chips.index import ChipRow
from canopy.chips.store import Chip
from canopy.models.checkpoint import EMBEDDED, describe, load_model, resolve_model
from canopy.synth.forest import SceneSpec
from canopy.synth.render import render
from canopy.training.scoring import score, score_chips

VAL = ["ky_magoffin_r02c08", "ky_frankfort_r02c05", "ky_frankfort_r05c04", "neon_mlbs_1", "neon_osbs_1"]


@pytest.fixture(scope="module")
def model():
    torch.set_num_threads(1)
    return load_model("default")


@pytest.fixture(scope="module")
def chips(shared, tmp_path_factory):
    """A few val tiles and plots."""
    folder = tmp_path_factory.mktemp("pack")
    (folder / "pairs").symlink_to(shared / "data" / "pairs")
    with (shared / "data" / "manifest.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    val = [r for r in rows if r["split"] == "val"]
    chosen = [r for r in val if r["id"] in VAL] + [r for r in val if r["kind"] == "neon"][::6]
    with (folder / "manifest.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows({r["id"]: r for r in chosen}.values())
    return read_pack(folder)[0]


def test_it_beats_the_best_constant_on_real_validation_tiles(model, chips):
    truth = np.concatenate([c.chm_m[c.scored] for c in chips])
    ours = score_chips(model, chips, overlap_px=0)["all"]
    # A constant's MAE is least at the median of these very pixels.
    constant = score(chips, lambda c: np.full(c.chm_m.shape, np.median(truth)))["all"]
    assert ours["mae_m"] < 0.65 * constant["mae_m"] and ours["r"] > 0.75


def test_the_demo_forest_is_no_stranger(model):
    tile = render(SceneSpec(), 300.0, -300.0, 512, 512)
    chm = tile.chm.reshape(256, 2, 256, 2).mean(axis=(1, 3))
    chip = Chip(ChipRow("demo", "demo", "synth", "val"), np.maximum(tile.rgb, 1), chm)
    row = score_chips(model, [chip], overlap_px=0)["all"]
    assert row["r"] > 0.65
    assert row["mae_m"] < 0.8 * np.abs(chm - np.median(chm)).mean()


def test_trees_stand_above_their_surroundings_in_california(model, shared):
    import rasterio

    with (shared / "data" / "ssl" / "manifest_ssl.csv").open(newline="") as file:
        rows = [r for r in csv.DictReader(file) if r["points_csv"] and int(r["n_tree_points"]) > 20][::120]
    at_trees, elsewhere = [], []
    for row in rows[:6]:
        with rasterio.open(shared / "data" / row["rgb_path"]) as image:
            rgb = torch.from_numpy(image.read().astype(np.float32) / 255)[None]
        height = model(torch.nn.functional.interpolate(rgb, scale_factor=1.2, mode="bilinear"))[0, 0]
        height = height.detach().numpy()
        points = np.loadtxt(shared / "data" / row["points_csv"], delimiter=",", skiprows=1, usecols=(0, 1))
        cols, cells = np.clip((points.T * 1.2).astype(int), 0, height.shape[0] - 1)
        at_trees.append(height[cells, cols].mean())
        elsewhere.append(np.median(height))
    # Far too low for city trees, as the model card says, but above what surrounds them in every place.
    assert all(tree > around for tree, around in zip(at_trees, elsewhere, strict=True))
    assert np.mean(at_trees) > 2 * np.mean(elsewhere)


def test_card_and_size(model):
    path = resolve_model("default")
    facts = describe(path)
    assert path.stat().st_size < 30e6 and 6e6 < facts["parameters"] < 25e6
    card = facts["card"]
    assert {"name", "licence", "date", "command", "data", "scores"} <= set(card)
    table = card["scores"]["val"]
    for site, row in table["model"].items():
        assert row["mae_m"] < table["training_mean"][site]["mae_m"], site
    assert set(EMBEDDED) >= {"default"} and model.sha256 == facts["sha256"]
