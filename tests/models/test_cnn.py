"""The convolutional rival goes through the same machinery: any size, strict config, state round trip."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from canopy.errors import CheckpointError, ConfigError
from canopy.models.checkpoint import load_model, load_strict, save_checkpoint
from canopy.models.config import DecoderConfig, EncoderConfig, ModelConfig
from canopy.models.height import HeightModel

ENCODER = EncoderConfig(family="cnn", network="resnet10t", widths=(8, 8, 16, 16), patch=32)
DECODER = DecoderConfig(post_channels=(8, 8, 8, 16), hidden=8, bins=16, head="half", weights="softmax")
CONFIG = ModelConfig(encoder=ENCODER, decoder=DECODER)


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return HeightModel(CONFIG).eval()


@pytest.mark.parametrize("size", [(32, 32), (64, 96), (33, 70), (150, 47)])
@torch.no_grad()
def test_any_image_size(model, size):
    height, spread = model.predict(torch.rand(2, 3, *size))
    assert height.shape == spread.shape == (2, 1, *size)
    assert (height >= 0).all() and torch.isfinite(spread).all()


@torch.no_grad()
def test_each_scale_of_the_image_matters(model):
    image = torch.rand(1, 3, 128, 128)
    base = model(image)
    dotted = image.clone()
    dotted[..., 64, 64] = 1 - dotted[..., 64, 64]
    changed = (model(dotted) - base).abs()[0, 0]
    assert changed[60:69, 60:69].max() > 0 and changed.max() < 30


def test_full_head_scores_at_the_image_scale():
    full = HeightModel(replace(CONFIG, decoder=replace(DECODER, head="full"))).eval()
    scores = full.heights_and_scores(torch.rand(1, 3, 64, 64))[2]
    assert scores.shape == (1, 16, 64, 64)


def test_every_weight_gets_a_gradient():
    model = HeightModel(CONFIG)
    model(torch.rand(2, 3, 64, 64)).sum().backward()
    idle = [n for n, p in model.named_parameters() if p.grad is None]
    assert not idle


def test_state_and_config_survive_a_file(model, tmp_path):
    save_checkpoint(tmp_path / "m.safetensors", model, {"name": "rival"}, half=False)
    again = load_model(tmp_path / "m.safetensors")
    image = torch.rand(1, 3, 64, 64)
    assert again.config == model.config and torch.equal(again(image), model(image))
    other = HeightModel(replace(CONFIG, encoder=replace(ENCODER, widths=(8, 8, 16, 24))))
    with pytest.raises(CheckpointError, match="differences"):
        load_strict(other, model.state_dict(), "m")


@pytest.mark.parametrize(
    "wrong",
    [
        {"network": "resnet17"}, {"network": "hf-hub:someone/model"}, {"network": ""}, {"patch": 16},
        {"stem": (8, 8, 8)}, {"family": "vit"}, {"network": "vit_tiny_patch16_224"},
        {"network": "convnext_atto"},
    ],
)  # fmt: skip
def test_wrong_configs_are_refused(wrong):
    with pytest.raises(ConfigError):
        HeightModel(replace(CONFIG, encoder=replace(ENCODER, widths=(), **wrong)))


def test_the_shipped_rival_is_as_large_as_ours(repo):
    from canopy.config import load_settings
    from canopy.training.settings import FinetuneSettings

    counts = [
        HeightModel(
            load_settings(FinetuneSettings, repo / "configs" / "finetune" / f"{name}.yaml").architecture
        ).parameter_count
        for name in ("unet", "canopy-small-scratch")
    ]
    assert abs(counts[0] / counts[1] - 1) < 0.05, counts
