"""The network's parts against timm and plain arithmetic; HeightModel: any size, metres, clear refusals."""

from __future__ import annotations

import json
from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from timm.layers import apply_rot_embed_cat
from timm.models.vision_transformer import VisionTransformer
from torch.nn import functional

from canopy.errors import ConfigError, InputError
from canopy.models.config import DecoderConfig, EncoderConfig, ModelConfig
from canopy.models.decoder import bin_centres, bin_weights, moments
from canopy.models.encoder import Encoder
from canopy.models.height import HeightModel, pad_to_multiple

FAMILIES = ["v1-like", "v2-like", "ours", "separable", "patch 14", "cnn"]
SIZE = dict(dim=32, depth=4, heads=2, taps=(0, 1, 2, 3))


# ---- height bins ------------------------------------------------------------------------------------------
@pytest.mark.parametrize(("low", "high", "count"), [(0.001, 10.0, 256), (0.001, 12.0, 256), (0.01, 5.0, 7)])
def test_spacings_follow_their_formulas(low, high, count):
    def centres(spacing):
        config = DecoderConfig(bins=count, bin_min=low, bin_max=high, spacing=spacing)
        return bin_centres(config).numpy()

    linear = np.array([low + (high - low) * i / (count - 1) for i in range(count)])
    log = np.array([low * (high / low) ** (i / (count - 1)) for i in range(count)])
    t = 1 - np.arange(count) / (count - 1)
    np.testing.assert_allclose(centres("linear"), linear, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(centres("log"), log, rtol=1e-4)
    np.testing.assert_allclose(centres("blend"), t * log + (1 - t) * linear, rtol=1e-4)


@pytest.mark.parametrize(("kind", "eps"), [("relu", 0.1), ("relu", 1e-8), ("softmax", 0.0)])
def test_weights_and_moments(kind, eps):
    config = DecoderConfig(bins=9, weights=kind, eps=eps, scale=8.0)
    scores = torch.randn(2, 9, 3, 4, dtype=torch.float64)
    x = scores.numpy()
    raw = np.exp(x) if kind == "softmax" else np.maximum(x, 0) + eps
    expected = raw / raw.sum(axis=1, keepdims=True)
    weights, centres = bin_weights(scores, config), bin_centres(config).double()
    np.testing.assert_allclose(weights.numpy(), expected, rtol=1e-6)
    mean, spread = moments(weights, centres, config.scale)
    c = centres.numpy()[None, :, None, None]
    m = (expected * c).sum(axis=1, keepdims=True)
    np.testing.assert_allclose(mean.numpy(), 8 * m, rtol=1e-6)
    s = np.sqrt((expected * (c - m) ** 2).sum(axis=1, keepdims=True))
    np.testing.assert_allclose(spread.numpy(), 8 * s, rtol=1e-5)


# ---- encoder and decoder ----------------------------------------------------------------------------------
def test_taps_equal_timm_blocks_run_by_hand():
    torch.manual_seed(0)
    encoder = Encoder(EncoderConfig(**SIZE, pos_grid=4)).eval()
    vit = VisionTransformer(
        img_size=64, embed_dim=32, depth=4, num_heads=2, num_classes=0, init_values=1e-5,
        norm_layer=partial(torch.nn.LayerNorm, eps=1e-6),
    ).eval()  # fmt: skip
    vit.load_state_dict(encoder.vit.state_dict(), strict=False)
    image = torch.rand(2, 3, 64, 64)
    features = encoder(image)
    x = vit.pos_embed + torch.cat([vit.cls_token.expand(2, -1, -1), vit.patch_embed(image)], dim=1)
    for block, tap, class_token in zip(vit.blocks, features.maps, features.class_tokens, strict=True):
        x = block(x)
        torch.testing.assert_close(tap, x[:, 1:].transpose(1, 2).reshape(2, 32, 4, 4))
        torch.testing.assert_close(class_token, x[:, 0])


def test_positions_are_resized_with_corners_aligned():
    vit = Encoder(EncoderConfig(**SIZE, pos_grid=14)).eval().vit
    torch.nn.init.normal_(vit.pos_embed)
    tokens = vit._pos_embed(torch.zeros(1, 16, 20, 32))
    grid = vit.pos_embed[:, 1:].reshape(1, 14, 14, 32).permute(0, 3, 1, 2)
    expected = functional.interpolate(grid, size=(16, 20), mode="bicubic", align_corners=True)
    torch.testing.assert_close(tokens[:, 1:], expected.flatten(2).transpose(1, 2))
    torch.testing.assert_close(tokens[:, 0], vit.cls_token[:, 0] + vit.pos_embed[:, 0])


@pytest.mark.parametrize(("rope_type", "rotate_half"), [("cat", False), ("dinov3", True)])
def test_attention_sees_relative_positions_only(rope_type, rotate_half):
    config = EncoderConfig(**SIZE, family="rope", rope_type=rope_type, rope_rotate_half=rotate_half)
    embedding = Encoder(config).eval().vit.rope.get_embed(shape=(5, 6))
    torch.manual_seed(0)
    query, key = torch.randn(2, 1, 1, 1, 16).expand(2, 1, 1, 30, 16)
    turned = [apply_rot_embed_cat(x, embedding, half=rotate_half) for x in (query, key)]
    logits = (turned[0] @ turned[1].transpose(-1, -2)).reshape(5, 6, 5, 6)
    # The same offset gives the same logit wherever it starts.
    torch.testing.assert_close(logits[:4, :5, :4, :5], logits[1:, 1:, 1:, 1:], atol=1e-4, rtol=1e-4)
    assert logits.std() > 0.01


def test_a_stem_leaves_the_token_grid_as_it_was():
    config = EncoderConfig(**SIZE, family="rope", rope_type="cat", rope_rotate_half=False, stem=(4, 6, 8))
    features = Encoder(config).eval()(torch.rand(1, 3, 64, 96))
    assert [tuple(m.shape[1:]) for m in features.pyramid] == [(4, 32, 48), (6, 16, 24), (8, 8, 12)]
    assert all(m.shape[-2:] == (4, 6) for m in features.maps)


# ---- the whole model --------------------------------------------------------------------------------------
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("size", [(32, 32), (33, 100), (150, 47)])
@torch.no_grad()
def test_heights_come_at_the_pixels_of_the_image_and_do_not_mix(make_model, family, size):
    model, images = make_model(family), torch.rand(2, 3, *size)
    maps = model.layers(images, ("spread_m", "height_m"))
    assert maps.shape == (2, 2, *size) and maps.dtype == torch.float32 and (maps >= 0).all()
    assert (maps[:, 1] <= model.config.decoder.bin_max * model.config.decoder.scale + 1e-3).all()
    assert torch.equal(model(images), maps[:, 1:])
    apart = torch.cat([model(image[None]) for image in images])
    torch.testing.assert_close(maps[:, 1:], apart, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("family", ["ours", "cnn"])
def test_a_gradient_reaches_every_parameter(make_model, family):
    model = make_model(family).train()
    height, spread, scores = model.heights_and_scores(torch.rand(2, 3, 64, 64))
    (height.mean() + spread.mean() + scores.square().mean()).backward()
    assert [name for name, p in model.named_parameters() if p.grad is None] == []


def test_normalisation_lives_inside_and_is_saved(make_model):
    model = make_model()
    assert {"mean", "std", "centres"} <= set(model.state_dict())
    image = torch.rand(1, 3, 32, 32)
    before = model(image)
    assert not torch.allclose(before, model(image * 0.5))
    # Moving the input and the constants together changes nothing.
    model.mean.add_(0.1)
    torch.testing.assert_close(model(image + 0.1), before, atol=1e-4, rtol=1e-4)


def test_bad_inputs_say_what_was_expected(make_model):
    model, image = make_model(), torch.rand(1, 3, 32, 32)
    image[0, 0, 3, 3] = float("nan")
    for wrong, words in (
        (image, r"NaN.*fill_invalid"),
        (torch.rand(1, 3, 15, 40), "at least 16x16"),
        (torch.rand(1, 4, 32, 32), r"expected float \(B, 3, H, W\)"),
        (torch.zeros(1, 3, 32, 32, dtype=torch.uint8), "uint8"),
    ):
        with pytest.raises(InputError, match=words):
            model(wrong)
    with pytest.raises(ConfigError, match="no output 'slope'"):
        model.layers(torch.rand(1, 3, 32, 32), ("slope",))


@given(st.integers(16, 70), st.integers(16, 70), st.sampled_from([14, 16, 64]))
@settings(max_examples=30, deadline=None)
def test_padding_never_changes_the_image_itself(height, width, multiple):
    image = torch.rand(1, 3, height, width)
    padded = pad_to_multiple(image, multiple)
    assert padded.shape[-2] % multiple == 0 and padded.shape[-1] % multiple == 0
    assert padded.shape[-2] - height < multiple and padded.shape[-1] - width < multiple
    assert torch.equal(padded[..., :height, :width], image)


# ---- configs ----------------------------------------------------------------------------------------------
def test_a_config_survives_json(make_model):
    for family in FAMILIES:
        config = make_model(family).config
        assert ModelConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


CNN = {"family": "cnn", "network": "resnet10t", "patch": 32}


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"encoder": {"dept": 3}}, r"encoder\.dept.*'depth'"),
        ({"encoder": {"family": "swin"}}, "'vit', 'rope' or 'cnn'"),
        ({"encoder": {"depth": 4, "taps": [0, 1, 2, 4]}}, "taps"),
        ({"encoder": {"family": "rope", "rope_type": "cat"}}, "rope_rotate_half"),
        ({"decoder": {"detail": True}}, "stem"),
        ({"encoder": CNN | {"network": ""}}, "network"),
        ({"encoder": CNN | {"patch": 16}}, "patch of 32"),
        ({"encoder": CNN | {"stem": [8, 8, 8]}}, "no stem"),
        ({"encoder": CNN | {"family": "vit"}}, "network"),
        ({"encoder": CNN | {"network": "resnet17"}}, "unknown"),
        ({"encoder": CNN | {"network": "hf-hub:someone/model"}}, "unknown"),
        ({"encoder": CNN | {"network": "vit_tiny_patch16_224"}}, "vit_tiny"),
        ({"encoder": CNN | {"network": "convnext_atto"}}, "maps at"),
    ],
)
def test_wrong_configs_are_refused(wrong, words):
    with pytest.raises(ConfigError, match=words):
        HeightModel(ModelConfig.from_dict(wrong))
