"""What the decoder's options change: work, not shapes."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from canopy.models.config import DecoderConfig
from canopy.models.decoder import Decoder, conv3x3
from canopy.models.encoder import Features

SLIM = DecoderConfig(post_channels=(16, 16, 32, 64), fusion=16, hidden=16, bins=16, weights="softmax")


def _features(dim: int = 24) -> Features:
    gen = torch.Generator().manual_seed(1)
    maps = [torch.randn(2, dim, 6, 5, generator=gen) for _ in range(4)]
    return Features(maps, [torch.randn(2, dim, generator=gen) for _ in range(4)], [])


def _work(config: DecoderConfig) -> tuple[int, torch.Size]:
    decoder = Decoder(config, 24).eval()
    with torch.inference_mode(), FlopCounterMode(display=False) as count:
        weights = decoder(_features())
    torch.testing.assert_close(weights.sum(1), torch.ones_like(weights[:, 0]))
    return count.get_total_flops(), weights.shape


@pytest.mark.parametrize("head", ["half", "full"])
def test_separable_convolutions_give_the_same_shapes_for_less_work(head: str) -> None:
    config = replace(SLIM, head=head)
    plain, shape = _work(config)
    less, same = _work(replace(config, separable=True))
    assert same == shape and less < 0.7 * plain
    assert shape == torch.Size((2, 16, 96, 80) if head == "full" else (2, 16, 48, 40))


def test_a_separable_convolution_is_one_of_rank_one_over_channels() -> None:
    """Depthwise kernels k_i and mixing weights m_oi are the whole kernel m_oi * k_i."""
    torch.manual_seed(0)
    both = conv3x3(replace(SLIM, separable=True), 5, 7)
    assert isinstance(both, nn.Sequential)
    each, mix = both[0], both[1]
    x = torch.randn(2, 5, 8, 9)
    kernel = mix.weight[:, :, 0, 0, None, None] * each.weight[None, :, 0]
    whole = nn.functional.conv2d(x, kernel, mix.bias, padding=1)
    torch.testing.assert_close(both(x), whole, atol=1e-5, rtol=1e-5)
