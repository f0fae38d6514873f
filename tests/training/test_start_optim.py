"""Learning rates by layer, what is decayed, and where a fresh head begins."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from canopy.models.config import DecoderConfig, EncoderConfig, ModelConfig
from canopy.models.height import HeightModel
from canopy.training.fit import expect_heights
from canopy.training.optim import layer_factor, layer_of, parameter_groups, set_rates

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


def test_layers_are_read_from_names():
    for name, layer in {
        "student.encoder.stem.stages.0.0.weight": 0, "student.encoder.vit.patch_embed.proj.bias": 0,
        "encoder.vit.cls_token": 0, "mask_token": 0, "encoder.vit.blocks.0.attn.qkv.weight": 1,
        "student.encoder.vit.blocks.11.mlp.fc1.weight": 12, "encoder.vit.norm.weight": 13,
        "student.class_head.prototypes": 13, "decoder.blocks.0.attn.qkv.weight": 13, "decoder.mask_token": 13,
        "decoder.head.conv1.weight": 13,
    }.items():  # fmt: skip
        assert layer_of(name, 12) == layer, name


def test_later_layers_learn_faster():
    names = ["encoder.vit.cls_token", *(f"encoder.vit.blocks.{i}.attn.qkv.weight" for i in range(12))]
    assert [layer_factor(name, 12, 0.8) for name in names] == pytest.approx(
        [0.8 ** (13 - i) for i in range(13)]
    )
    assert layer_factor("encoder.vit.norm.weight", 12, 0.8) == 1.0
    assert layer_factor("encoder.stem.stages.0.0.weight", 12, 1.0) == 1.0


@pytest.mark.parametrize("family", ["vit", "rope"])
def test_every_trainable_parameter_is_in_one_group_and_tokens_are_spared(family):
    encoder = dataclasses.replace(CONFIG.encoder, family=family, registers=2, pos_grid=4)
    model = HeightModel(dataclasses.replace(CONFIG, encoder=encoder))
    model.decoder.project.requires_grad_(False)
    groups = parameter_groups(model.named_parameters(), lambda name: layer_factor(name, 4, 0.5))
    inside = [id(p) for g in groups for p in g["params"]]
    assert sorted(inside) == sorted(id(p) for p in model.parameters() if p.requires_grad)
    where = {id(p): (g["factor"], g["decays"]) for g in groups for p in g["params"]}
    vit = model.encoder.vit
    tokens = [vit.cls_token, vit.reg_token, *([vit.pos_embed] if family == "vit" else [])]
    assert all(token.ndim > 1 and where[id(token)] == (0.5**5, 0) for token in tokens)
    assert where[id(vit.blocks[0].mlp.fc1.weight)] == (0.5**4, 1)
    assert where[id(vit.blocks[3].mlp.fc1.bias)] == (0.5, 0) and where[id(vit.norm.weight)] == (1.0, 0)
    plain = {id(p) for p in model.parameters() if p.ndim < 2} | {id(token) for token in tokens}
    assert all((key in plain) == (decays == 0) for key, (_, decays) in where.items())
    optimizer = torch.optim.AdamW(groups, lr=1.0)
    set_rates(optimizer, 2e-3, 0.05)
    for group in optimizer.param_groups:
        assert (group["lr"], group["weight_decay"]) == (2e-3 * group["factor"], 0.05 * group["decays"])


@torch.no_grad()
def test_a_fresh_head_expects_the_training_heights(model):
    heights = torch.tensor(np.random.default_rng(0).gamma(3.0, 4.0, 5000)).float()
    image = torch.rand(1, 3, 64, 64)
    assert model(image).mean() > 17  # all bins alike
    expect_heights(model, heights)
    got = model.predict(image)
    assert got.height_m.mean().item() == pytest.approx(heights.mean().item(), abs=1.0)
    assert got.spread_m.mean().item() == pytest.approx(heights.std().item(), abs=1.5)
