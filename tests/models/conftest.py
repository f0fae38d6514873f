"""Tiny random models of each family, quick to run."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from canopy.models.config import DecoderConfig, EncoderConfig, ModelConfig
from canopy.models.height import HeightModel

SMALL_DECODER = dict(post_channels=(8, 8, 8, 8), fusion=8, hidden=8, bins=16)
CAT = dict(family="rope", rope_type="cat", rope_rotate_half=False)
FAMILIES = {
    "v1-like": (dict(family="vit", norm_taps=False), dict(eps=0.1)),
    "v2-like": (
        dict(family="rope", norm_taps=True, registers=4, qkv_bias=False, norm_eps=1e-5),
        dict(spacing="blend", eps=1e-8, unit_bias=True, project_after_fusion=False, bin_max=12.0, scale=8.0),
    ),
    "ours": (
        dict(
            family="rope",
            rope_type="cat",
            rope_rotate_half=False,
            registers=2,
            stem=(4, 8, 8),
            layer_scale=0.1,
        ),
        dict(head="half", detail=True, unit_norm=True, weights="softmax", bin_min=0.0),
    ),
    "separable": (
        dict(family="rope", rope_type="cat", rope_rotate_half=False, stem=(4, 8, 8)),
        dict(head="half", detail=True, unit_norm=True, separable=True, weights="softmax", bin_min=0.0),
    ),
    "patch 14": (dict(family="vit", patch=14, pos_resize="bicubic", pos_embed_prefix=False), dict()),
}


@pytest.fixture
def make_model() -> Callable[[str], HeightModel]:
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
