"""The encoder against timm itself and against the release's rule for positions."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from timm.layers import apply_rot_embed_cat
from timm.models.vision_transformer import VisionTransformer
from torch.nn import functional

from canopy.errors import ConfigError
from canopy.models.config import EncoderConfig
from canopy.models.encoder import Encoder

SIZE = dict(dim=32, depth=4, heads=2, taps=(0, 1, 2, 3))


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
    encoder = Encoder(EncoderConfig(**SIZE, pos_grid=14)).eval()
    vit = encoder.vit
    torch.nn.init.normal_(vit.pos_embed)
    tokens = vit._pos_embed(torch.zeros(1, 16, 20, 32))
    grid = vit.pos_embed[:, 1:].reshape(1, 14, 14, 32).permute(0, 3, 1, 2)
    expected = functional.interpolate(grid, size=(16, 20), mode="bicubic", align_corners=True)
    torch.testing.assert_close(tokens[:, 1:], expected.flatten(2).transpose(1, 2))
    torch.testing.assert_close(tokens[:, 0], vit.cls_token[:, 0] + vit.pos_embed[:, 0])


def test_keys_are_timm_names_and_hold_no_dead_weights():
    plain = Encoder(EncoderConfig(**SIZE)).state_dict()
    assert {"vit.cls_token", "vit.pos_embed", "vit.patch_embed.proj.weight"} <= set(plain)
    assert {"vit.blocks.0.attn.qkv.weight", "vit.blocks.3.ls2.gamma"} <= set(plain)
    assert not any(key.startswith(("vit.norm.", "stem.")) for key in plain)
    normed = Encoder(EncoderConfig(**SIZE, family="rope", norm_taps=True, registers=4)).state_dict()
    assert {"vit.norm.weight", "vit.reg_token"} <= set(normed) and "vit.pos_embed" not in normed


def test_a_stem_leaves_the_token_grid_as_it_was():
    encoder = Encoder(
        EncoderConfig(**SIZE, family="rope", rope_type="cat", rope_rotate_half=False, stem=(4, 6, 8))
    ).eval()
    features = encoder(torch.rand(1, 3, 64, 96))
    assert [tuple(m.shape[1:]) for m in features.pyramid] == [(4, 32, 48), (6, 16, 24), (8, 8, 12)]
    assert all(m.shape[-2:] == (4, 6) for m in features.maps)


@pytest.mark.parametrize(("rope_type", "rotate_half"), [("cat", False), ("dinov3", True)])
def test_attention_sees_relative_positions_only(rope_type, rotate_half):
    config = EncoderConfig(**SIZE, family="rope", rope_type=rope_type, rope_rotate_half=rotate_half)
    rope = Encoder(config).eval().vit.rope
    embedding = rope.get_embed(shape=(5, 6))
    torch.manual_seed(0)
    query, key = torch.randn(2, 1, 1, 1, 16).expand(2, 1, 1, 30, 16)
    turned = [apply_rot_embed_cat(x, embedding, half=rotate_half) for x in (query, key)]
    logits = (turned[0] @ turned[1].transpose(-1, -2)).reshape(5, 6, 5, 6)
    # The same offset gives the same logit wherever it starts.
    torch.testing.assert_close(logits[:4, :5, :4, :5], logits[1:, 1:, 1:, 1:], atol=1e-4, rtol=1e-4)
    assert logits.std() > 0.01


def test_the_layout_that_scrambles_positions_is_refused():
    with pytest.raises(ConfigError, match="rope_rotate_half"):
        EncoderConfig(**SIZE, family="rope", rope_type="cat", rope_rotate_half=True)
