"""Learning rates by layer, what is decayed, and where a fresh head begins."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from canopy.models.config import DecoderConfig, EncoderConfig, ModelConfig
from canopy.models.height import HeightModel
from canopy.training.guard import NanGuard, TrainingError
from canopy.training.optim import layer_scale, parameter_groups, set_rates
from canopy.training.start import expect_heights

CONFIG = ModelConfig(
    encoder=EncoderConfig(dim=16, depth=4, heads=2, taps=(0, 1, 2, 3), norm_taps=True),
    decoder=DecoderConfig(
        post_channels=(4, 4, 4, 4), fusion=4, hidden=4, bins=41, bin_min=0.0, bin_max=4.0, weights="softmax"
    ),
)


@pytest.fixture
def model():
    torch.manual_seed(0)
    return HeightModel(CONFIG)


def test_later_layers_learn_faster():
    names = ["encoder.vit.cls_token", *(f"encoder.vit.blocks.{i}.attn.qkv.weight" for i in range(12))]
    scales = [layer_scale(name, 12, 0.8, 0.5) for name in names]
    assert scales == pytest.approx([0.5 * 0.8 ** (13 - i) for i in range(13)])
    assert layer_scale("encoder.vit.norm.weight", 12, 0.8, 0.5) == 0.5
    assert layer_scale("decoder.head.conv1.weight", 12, 0.8, 0.5) == 1.0
    assert layer_scale("encoder.stem.stages.0.0.weight", 12, 1.0, 1.0) == 1.0


def test_every_trainable_parameter_is_in_one_group(model):
    model.decoder.project.requires_grad_(False)
    groups = parameter_groups(model, 4, 0.05, layer_decay=0.8, encoder_scale=0.1)
    inside = [id(p) for g in groups for p in g["params"]]
    assert sorted(inside) == sorted(id(p) for p in model.parameters() if p.requires_grad)
    for group in groups:
        assert all((p.ndim > 1) == (group["weight_decay"] > 0) for p in group["params"])
    optimizer = torch.optim.AdamW(groups, lr=1.0)
    set_rates(optimizer, 2e-3)
    assert {g["lr"] for g in optimizer.param_groups} == {2e-3 * g["scale"] for g in groups}
    assert max(g["lr"] for g in optimizer.param_groups) == 2e-3


@torch.no_grad()
def test_a_fresh_head_expects_the_training_heights(model):
    heights = torch.tensor(np.random.default_rng(0).gamma(3.0, 4.0, 5000)).float()
    image = torch.rand(1, 3, 64, 64)
    assert model(image).mean() > 17  # all bins alike
    expect_heights(model, heights)
    got = model.predict(image)
    assert got.height_m.mean().item() == pytest.approx(heights.mean().item(), abs=1.0)
    assert got.spread_m.mean().item() == pytest.approx(heights.std().item(), abs=1.5)


def test_the_guard_forgets_what_is_long_ago():
    guard = NanGuard(forgiven=2, memory=100)
    nan = float("nan")
    assert (
        guard.passes(0, loss=1.0)
        and not guard.passes(1, loss=nan)
        and not guard.passes(2, gradient=float("inf"))
    )
    assert not guard.passes(150, loss=nan)
    again = NanGuard(forgiven=2, memory=100)
    again.load_state_dict(guard.state_dict())
    assert again.skipped == [150] and not again.passes(151, loss=nan)
    with pytest.raises(TrainingError, match=r"loss is nan at step 152, and so it was at \[150, 151\]"):
        again.passes(152, loss=nan)
