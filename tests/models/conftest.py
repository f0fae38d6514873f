"""Tiny random models of each family, and checkpoints in the published layouts.

The layouts' names and shapes are written down from the description of the releases, not derived from canopy's
own tables, so that the two can disagree.
"""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from canopy.models.config import DecoderConfig, EncoderConfig, ModelConfig
from canopy.models.height import HeightModel

SMALL_DECODER = dict(post_channels=(8, 8, 8, 8), fusion=8, hidden=8, bins=16)
OURS = dict(family="rope", rope_type="cat", rope_rotate_half=False, stem=(4, 8, 8))
HALF = dict(head="half", detail=True, unit_norm=True, weights="softmax", bin_min=0.0)
FAMILIES = {
    "v1-like": (dict(family="vit", norm_taps=False), dict(eps=0.1)),
    "v2-like": (
        dict(family="rope", norm_taps=True, registers=4, qkv_bias=False, norm_eps=1e-5),
        dict(spacing="blend", eps=1e-8, unit_bias=True, project_after_fusion=False, bin_max=12.0, scale=8.0),
    ),
    "ours": (OURS | dict(registers=2, layer_scale=0.1), HALF),
    "separable": (OURS, HALF | dict(separable=True)),
    "patch 14": (dict(family="vit", patch=14, pos_resize="bicubic", pos_embed_prefix=False), dict()),
    "cnn": (
        dict(family="cnn", network="resnet10t", widths=(8, 8, 16, 16), patch=32),
        dict(post_channels=(8, 8, 8, 16), head="half", weights="softmax"),
    ),
}


@pytest.fixture
def make_model() -> Callable[..., HeightModel]:
    """`make_model("ours")` -> a small random HeightModel in eval mode."""

    def make(family: str = "ours", **changes: object) -> HeightModel:
        torch.manual_seed(0)
        encoder, decoder = FAMILIES[family]
        config = ModelConfig(
            encoder=EncoderConfig(**{"dim": 32, "depth": 4, "heads": 2, "taps": (0, 1, 2, 3), **encoder}),
            decoder=DecoderConfig(**{**SMALL_DECODER, **decoder}),
            **changes,
        )
        return HeightModel(config).eval()

    return make


# ---- published layouts ----------------------------------------------------------------------------------
def _zeros(*shape: int) -> Tensor:
    """Zeros that take no memory, and no space in a file."""
    return torch.zeros(1).expand(*shape)


def _random(*shape: int) -> Tensor:
    return torch.randn(*shape) * max(1, torch.Size(shape[1:]).numel()) ** -0.5


def _linear(
    state: dict[str, Tensor], make: Callable[..., Tensor], name: str, *shape: int, bias: int = 0
) -> None:
    state[f"{name}.weight"] = make(*shape)
    if bias:
        state[f"{name}.bias"] = make(bias)


def _backbone(make: Callable[..., Tensor], prefix: str, dim: int, depth: int) -> dict[str, Tensor]:
    state = {f"{prefix}cls_token": make(1, 1, dim), f"{prefix}mask_token": make(1, dim)}
    _linear(state, make, f"{prefix}patch_embed.proj", dim, 3, 16, 16, bias=dim)
    _linear(state, make, f"{prefix}norm", dim, bias=dim)
    for i in range(depth):
        block = f"{prefix}blocks.{i}"
        for norm in ("norm1", "norm2"):
            _linear(state, make, f"{block}.{norm}", dim, bias=dim)
        _linear(state, make, f"{block}.attn.qkv", 3 * dim, dim, bias=3 * dim)
        _linear(state, make, f"{block}.attn.proj", dim, dim, bias=dim)
        _linear(state, make, f"{block}.mlp.fc1", 4 * dim, dim, bias=4 * dim)
        _linear(state, make, f"{block}.mlp.fc2", dim, 4 * dim, bias=dim)
        state |= {f"{block}.ls1.gamma": make(dim), f"{block}.ls2.gamma": make(dim)}
    return state


def _head(make: Callable[..., Tensor], prefix: str, dim: int, post: tuple[int, ...], fusion: int, v1: bool):
    state: dict[str, Tensor] = {}

    def layer(name: str, *shape: int, bias: int = 0) -> None:
        _linear(state, make, prefix + name, *shape, bias=bias)

    hidden = fusion // 8 if v1 else fusion // 2
    for i, channels in enumerate(post):
        layer(f"reassemble_blocks.projects.{i}.conv", channels, dim, 1, 1, bias=channels)
        layer(f"reassemble_blocks.readout_projects.{i}.0", dim, 2 * dim, bias=dim)
        layer(f"convs.{i}.conv", fusion, channels, 3, 3)
        if i != 2:
            side = (4, 2, 1, 3)[i]
            layer(f"reassemble_blocks.resize_layers.{i}", channels, channels, side, side, bias=channels)
        layer(f"fusion_blocks.{i}.project.conv", fusion, fusion, 1, 1, bias=fusion)
        for unit in (1, 2) if i else (2,):
            for conv in (1, 2):
                name = f"fusion_blocks.{i}.res_conv_unit{unit}.conv{conv}.conv"
                layer(name, fusion, fusion, 3, 3, bias=0 if v1 else fusion)
    if v1:
        layer("project.conv", fusion, fusion, 3, 3, bias=fusion)
    layer("conv_depth.head.0", fusion // 2, fusion, 3, 3, bias=fusion // 2)
    layer("conv_depth.head.2", hidden, fusion // 2, 3, 3, bias=hidden)
    layer("conv_depth.head.4", 256, hidden, 1, 1, bias=256)
    return state


def _v1(dim: int, depth: int, post: tuple[int, ...], fusion: int = 256, *, zeros: bool = False):
    make = _zeros if zeros else _random
    state = _backbone(make, "backbone.", dim, depth) | {"backbone.pos_embed": make(1, 197, dim)}
    return state | _head(make, "decode_head.", dim, post, fusion, v1=True)


def _v2(dim: int, depth: int, heads: int, post: tuple[int, ...], fusion: int = 256, *, zeros: bool = False):
    make, quarter = _zeros if zeros else _random, dim // heads // 4
    state = _backbone(make, "", dim, depth) | {"storage_tokens": make(1, 4, dim)}
    state["rope_embed.periods"] = 100.0 ** (torch.arange(quarter, dtype=torch.float32) / quarter)
    _linear(state, make, "local_cls_norm", dim, bias=dim)
    for i in range(depth):
        state[f"blocks.{i}.attn.qkv.bias_mask"] = torch.tensor([1.0, 0.0, 1.0]).repeat_interleave(dim)
    return state, _head(make, "", dim, post, fusion, v1=False)


@pytest.fixture(scope="session")
def originals() -> SimpleNamespace:
    """`originals.v1(dim, depth, post, fusion)` -> a v1; `.v2(dim, depth, heads, post, fusion)` -> a v2's
    backbone and head; random, or (`zeros=True`) of no size at all."""
    return SimpleNamespace(v1=_v1, v2=_v2)
