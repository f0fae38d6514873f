"""Schedules, learning rates by layer, what is decayed, and what bad steps leave."""

from __future__ import annotations

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from canopy.errors import ConfigError
from canopy.models.config import DecoderConfig, EncoderConfig, ModelConfig
from canopy.models.height import HeightModel
from canopy.training.callbacks import NanGuard, TrainingError
from canopy.training.optim import (
    SHAPES,
    TrainingModule,
    ema_decay,
    layer_factor,
    layer_of,
    learning_rate,
    parameter_groups,
    ramp,
)
from canopy.training.settings import Ramp, weight_at

GRID = np.linspace(0, 1, 101)


# ---- schedules --------------------------------------------------------------------------------------------
@pytest.mark.parametrize("warmup", [0.0, 0.1])
def test_the_learning_rate_rises_then_falls(warmup):
    values = np.array([learning_rate(p, 1e-3, 1e-6, warmup) for p in GRID])
    top = round(100 * warmup)
    assert values[top] == values.max() == 1e-3 and values[-1] == 1e-6 and values.min() > 0
    assert (np.diff(values[: top + 1]) > 0).all() and (np.diff(values[top:]) < 0).all()
    middle = learning_rate((1 + warmup) / 2, 1e-3, 1e-6, warmup)
    assert middle == pytest.approx((1e-3 + 1e-6) / 2)


@given(
    progress=st.floats(0, 1), first=st.floats(0, 5), last=st.floats(0, 5), begin=st.floats(0, 0.5),
    length=st.floats(0, 0.5), shape=st.sampled_from(SHAPES),
)  # fmt: skip
def test_ramps_stay_between_their_ends_and_reach_them(progress, first, last, begin, length, shape):
    value = ramp(progress, first, last, begin, begin + length, shape)
    assert min(first, last) - 1e-12 <= value <= max(first, last) + 1e-12
    assert ramp(2.0, first, last, begin, begin + length, shape) == last
    if length > 1e-6:
        assert ramp(-1.0, first, last, begin, begin + length, shape) == first


def test_ramp_shapes_on_the_way():
    assert ramp(0.25, 0.0, 2.0) == pytest.approx(0.5)
    assert ramp(0.25, 0.0, 2.0, 0.0, 1.0, "cosine") == pytest.approx(2 * 0.1464466, rel=1e-5)
    assert weight_at(0.3, 0.9) == 0.3
    assert weight_at(Ramp(first=1.0, last=0.0, begin=0.2, end=0.4), 0.3) == pytest.approx(0.5)
    with pytest.raises(ValueError, match="lies before"):
        Ramp(first=0, last=1, begin=0.5, end=0.2)
    decays = [ema_decay(step, 0.99) for step in range(2000)]  # the average forgets fast at first
    assert decays[0] == pytest.approx(0.1) and decays[-1] == 0.99 and decays == sorted(decays)


# ---- groups -----------------------------------------------------------------------------------------------
def test_layers_are_read_from_names():
    for name, layer in {
        "student.encoder.stem.stages.0.0.weight": 0, "student.encoder.vit.patch_embed.proj.bias": 0,
        "encoder.vit.cls_token": 0, "mask_token": 0, "encoder.vit.blocks.0.attn.qkv.weight": 1,
        "student.encoder.vit.blocks.11.mlp.fc1.weight": 12, "encoder.vit.norm.weight": 13,
        "student.class_head.prototypes": 13, "decoder.blocks.0.attn.qkv.weight": 13, "decoder.mask_token": 13,
        "decoder.head.conv1.weight": 13,
    }.items():  # fmt: skip
        assert layer_of(name, 12) == layer, name
        assert layer_factor(name, 12, 0.8) == pytest.approx(0.8 ** (13 - layer)), name


@pytest.mark.parametrize("family", ["vit", "rope"])
def test_every_trainable_parameter_is_in_one_group_and_tokens_are_spared(family):
    encoder = EncoderConfig(dim=16, depth=4, heads=2, taps=(0, 1, 2, 3), norm_taps=True)
    encoder = encoder.replaced(family=family, registers=2, pos_grid=4)
    decoder = DecoderConfig(post_channels=(4, 4, 4, 4), fusion=4, hidden=4, bins=8)
    model = HeightModel(ModelConfig(encoder=encoder, decoder=decoder))
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


# ---- bad steps --------------------------------------------------------------------------------------------
class Tiny(TrainingModule):
    """A convolution and a batch norm."""

    def __init__(self) -> None:
        super().__init__(0)
        self.net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))

    def rates(self) -> tuple[float, float]:
        return 1.0, 0.0


def step(guard: NanGuard, module: Tiny, scale: float = 1.0, **losses: float) -> None:
    trainer, nothing = pl.Trainer(logger=False, enable_checkpointing=False), None
    guard.on_train_batch_start(trainer, module, nothing, 0)
    # Its variance overflows at a large scale, the loss does not.
    loss = module.net(torch.randn(2, 3, 8, 8) * scale).square().mean()
    loss.backward()
    module.losses = {"loss": loss.detach(), **{k: torch.tensor(v) for k, v in losses.items()}}
    guard.on_before_optimizer_step(trainer, module, nothing)  # type: ignore[arg-type]


@pytest.mark.parametrize("forgiven", [0, 1])  # also where the run ends: its checkpoint must be good
@pytest.mark.filterwarnings("ignore")
def test_a_step_left_out_leaves_no_trace(forgiven):
    module, guard = Tiny(), NanGuard(forgiven=forgiven)
    kept = {name: value.clone() for name, value in module.state_dict().items()}
    if forgiven:
        step(guard, module, 1e25)
        assert module.left_out
    else:
        with pytest.raises(TrainingError, match="running statistic"):
            step(guard, module, 1e25)
    assert all(torch.equal(value, kept[name]) for name, value in module.state_dict().items())
    assert all(p.grad is None for p in module.parameters())


@pytest.mark.filterwarnings("ignore")
def test_a_good_step_is_left_alone_and_bad_ones_are_forgotten():
    module, guard = Tiny(), NanGuard(memory=100)
    step(guard, module)
    assert not module.left_out and all(p.grad is not None for p in module.parameters())
    guard.load_state_dict({"skipped": [-500, -300, -2]})
    step(guard, module, ibot=float("nan"))
    assert guard.state_dict() == {"skipped": [-2, 0]}
    with pytest.raises(TrainingError, match=r"ibot is nan at step 0, and so it was at \[-2, 0\]"):
        step(guard, module, ibot=float("nan"))


def test_a_checkpoint_of_another_version_is_named():
    with pytest.raises(ConfigError, match="another version"):
        Tiny().on_load_checkpoint({"canopy": {"format": 1}})
