"""Scores against plain numpy; crops cover every pixel; a fresh head knows the training heights."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from canopy.chips.store import Chip, ChipRow
from canopy.models.config import DecoderConfig, EncoderConfig, ModelConfig
from canopy.models.height import HeightModel
from canopy.training.height import heights_of, plain, score
from canopy.training.start import expect_heights

CONFIG = ModelConfig(
    encoder=EncoderConfig(dim=16, depth=4, heads=2, taps=(0, 1, 2, 3), norm_taps=True),
    decoder=DecoderConfig(
        post_channels=(4, 4, 4, 4), fusion=4, hidden=4, bins=41, bin_min=0.0, bin_max=4.0, weights="softmax"
    ),
)


@pytest.fixture
def chips():
    rng = np.random.default_rng(0)
    out = []
    for i, (site, kind) in enumerate([("a", "lidar"), ("a", "lidar"), ("p", "neon")]):
        chm = rng.uniform(0, 30, (30, 40)).astype(np.float32)
        chm[:3] = np.nan
        red = np.nan_to_num(chm * 6 + 20).astype(np.uint8)
        rgb = np.stack([red.repeat(2, 0).repeat(2, 1)] * 3)
        rgb[1:] = 60
        rgb[:, -5:] = 0
        out.append(Chip(ChipRow(f"c{i}", site, kind, "train"), rgb, chm))
    return out


def test_rows_pool_the_pixels_of_a_site(chips):
    table = score(chips, lambda chip: np.where(np.isnan(chip.chm_m), 99, chip.chm_m * 0.5 + 1))
    truth = np.concatenate([c.chm_m[c.scored] for c in chips[:2]])
    assert list(table) == ["a", "p", "all but plots", "plots", "all"]
    row, error = table["a"], 1 - truth * 0.5
    assert row["n"] == truth.size == 2 * (30 - 3 - 3) * 40  # 5 missing image rows touch 3 label rows
    assert row["mae_m"] == pytest.approx(np.abs(error).mean(), rel=1e-5)
    assert row["rmse_m"] == pytest.approx(np.sqrt((error**2).mean()), rel=1e-5)
    assert row["bias_m"] == pytest.approx(error.mean(), rel=1e-5) and row["r"] == pytest.approx(1.0)
    assert plain(score(chips, lambda chip: np.full(chip.chm_m.shape, 3.0)))["all"]["r"] is None
    assert score([], lambda chip: chip.chm_m) == {}


def test_blocks_edges_and_heights_pool_over_chips(chips):
    rng = np.random.default_rng(1)
    noise = {c.row.id: np.tile(rng.normal(1, 4, c.chm_m.shape), (2, 2)) for c in chips}
    big = [replace(c, chm_m=np.tile(c.chm_m, (2, 2)), rgb=np.tile(c.rgb, (1, 2, 2))) for c in chips[:2]]
    row = score(big, lambda c: c.chm_m + noise[c.row.id])["a"]
    low, blocks = [], []
    for c in big:
        error = noise[c.row.id]
        low.append(error[c.scored & (c.chm_m < 2)])
        for place in (np.s_[r : r + 50, k : k + 50] for r in (0, 50) for k in (0, 50)):
            part = c.scored[place]
            if part.sum() >= 1250:
                blocks.append([x[place][part].mean() for x in (c.chm_m, error)])
    truth, error = np.array(blocks).T
    assert row["bias_0-2_m"] == pytest.approx(np.concatenate(low).mean()) and np.isnan(row["bias_60+_m"])
    expected = 1 - (error**2).sum() / ((truth - truth.mean()) ** 2).sum()
    assert row["block_r2"] == pytest.approx(expected, rel=1e-4) and row["edge_error"] > 0.1


@pytest.mark.parametrize("overlap", [0, 16])
def test_crops_cover_chips_of_any_size(chips, overlap):
    model = HeightModel(CONFIG).eval()
    for side in (32, 64, 128):
        heights = heights_of(model, chips[0], side, overlap)
        assert heights.shape == chips[0].chm_m.shape and np.isfinite(heights).all()


@torch.no_grad()
def test_a_fresh_head_expects_the_training_heights():
    torch.manual_seed(0)
    model = HeightModel(CONFIG)
    heights = torch.tensor(np.random.default_rng(0).gamma(3.0, 4.0, 5000)).float()
    image = torch.rand(1, 3, 64, 64)
    assert model(image).mean() > 17  # all bins alike
    expect_heights(model, heights)
    height, spread, _ = model.heights_and_scores(image)
    assert height.mean().item() == pytest.approx(heights.mean().item(), abs=1.0)
    assert spread.mean().item() == pytest.approx(heights.std().item(), abs=1.5)
