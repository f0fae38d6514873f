"""Bin centres, weights and moments against independent numpy."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from canopy.models.config import DecoderConfig
from canopy.models.decoder import bin_centres, bin_weights, moments, quantiles


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
    assert (np.diff(centres("blend")) > 0).all()


@pytest.mark.parametrize(("kind", "eps"), [("relu", 0.1), ("relu", 1e-8), ("softmax", 0.0)])
def test_weights_and_moments(kind, eps):
    config = DecoderConfig(bins=9, weights=kind, eps=eps, scale=8.0)
    scores = torch.randn(2, 9, 3, 4, dtype=torch.float64)
    weights = bin_weights(scores, config)
    x = scores.numpy()
    raw = np.exp(x) if kind == "softmax" else np.maximum(x, 0) + eps
    expected = raw / raw.sum(axis=1, keepdims=True)
    np.testing.assert_allclose(weights.numpy(), expected, rtol=1e-6)

    centres = bin_centres(config).double()
    mean, spread = moments(weights, centres, config.scale)
    c = centres.numpy()[None, :, None, None]
    m = (expected * c).sum(axis=1, keepdims=True)
    s = np.sqrt((expected * (c - m) ** 2).sum(axis=1, keepdims=True))
    np.testing.assert_allclose(mean.numpy(), 8 * m, rtol=1e-6)
    np.testing.assert_allclose(spread.numpy(), 8 * s, rtol=1e-5)


def test_one_sure_bin_has_no_spread():
    weights = torch.zeros(1, 5, 2, 2)
    weights[:, 3] = 1.0
    mean, spread = moments(weights, torch.tensor([0.0, 1.0, 2.0, 3.3, 4.0]), 10.0)
    assert torch.allclose(mean, torch.tensor(33.0)) and spread.max() < 0.05


@pytest.mark.parametrize("spacing", ["linear", "blend"])
def test_quantiles_invert_the_distribution(spacing):
    """Against a million draws: a bin by its weight, then a place within it."""
    config = DecoderConfig(bins=12, bin_min=0.0, bin_max=5.0, spacing=spacing, scale=10.0)
    centres = bin_centres(config)
    weights = torch.softmax(2 * torch.randn(1, 12, 1, 1), dim=1)
    shares = [0.02, 0.05, 0.3, 0.5, 0.9, 0.99]
    found = quantiles(weights, centres, config.scale, shares)[0, :, 0, 0].numpy()

    rng = np.random.default_rng(0)
    c = centres.numpy().astype(float)
    edges = np.concatenate([[0.0], (c[1:] + c[:-1]) / 2, [1.5 * c[-1] - 0.5 * c[-2]]])
    p = weights.flatten().numpy().astype(float)
    bins = rng.choice(12, 1_000_000, p=p / p.sum())
    draws = 10 * rng.uniform(edges[bins], edges[bins + 1])
    for share, value in zip(shares, found, strict=True):
        assert (draws <= value).mean() == pytest.approx(share, abs=0.003)
    assert (np.diff(found) > 0).all()


def test_quantiles_of_a_sure_bin_stay_in_it():
    weights = torch.zeros(1, 5, 1, 1)
    weights[:, 3] = 1.0
    found = quantiles(weights, torch.tensor([0.0, 1.0, 2.0, 3.0, 4.0]), 10.0, [0.001, 0.5, 0.999]).flatten()
    assert torch.allclose(found, torch.tensor([25.01, 30.0, 34.99]), atol=1e-3)
