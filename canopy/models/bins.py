"""Height bins: where their centres lie, how scores become weights; their mean, spread and quantiles."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from canopy.models.config import DecoderConfig


def bin_centres(config: DecoderConfig) -> Tensor:
    """Centres (bins,), float32, in units of `config.scale` metres, rising.

    'linear' and 'log' are evenly spaced in x and log x. 'blend' is t*log + (1-t)*linear with t falling
    evenly from 1 at the first bin to 0 at the last (CHMv2, arXiv 2603.06382): fine steps near the
    ground without the huge last steps of a logarithm.
    """
    low, high, count = config.bin_min, config.bin_max, config.bins
    linear = torch.linspace(low, high, count)
    if config.spacing == "linear":
        return linear
    floor = max(low, 1e-3)  # a logarithm has no zero
    # On the CPU even where a model is only outlined on the meta device: these two are read as numbers.
    first, last = (float(torch.tensor(v, device="cpu").log()) for v in (floor, high))
    log = torch.exp(torch.linspace(first, last, count))
    if config.spacing == "log":
        return log
    t = torch.linspace(1.0, 0.0, count)
    return t * log + (1.0 - t) * linear


def bin_weights(scores: Tensor, config: DecoderConfig) -> Tensor:
    """Scores (B, bins, H, W) -> non-negative weights that sum to 1 over the bins."""
    if config.weights == "softmax":
        return torch.softmax(scores, dim=1)
    positive = torch.relu(scores) + config.eps
    return positive / positive.sum(dim=1, keepdim=True)


def moments(weights: Tensor, centres: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Weighted mean and spread in metres, both (B, 1, H, W).

    The spread is the standard deviation of the bin distribution, sqrt(sum w (bin - mean)^2): how unsure
    the network is between heights. It is not yet a calibrated interval.
    """
    mean = torch.einsum("bkhw,k->bhw", weights, centres).unsqueeze(1)
    square = torch.einsum("bkhw,k->bhw", weights, centres * centres).unsqueeze(1)
    # E[x^2] - mean^2 avoids a (B, bins, H, W) temporary; rounding may dip below zero.
    spread = torch.sqrt((square - mean * mean).clamp_min(0.0))
    return scale * mean, scale * spread


def quantiles(weights: Tensor, centres: Tensor, scale: float, shares: Sequence[float]) -> Tensor:
    """Heights below which these shares of the bin weights lie, metres (B, len(shares), H, W).

    Each bin's weight is taken as spread evenly between the middles towards its neighbours (the outermost
    bins: as far outwards as inwards, but not below 0), so quantiles run continuously and rise with the share.
    """
    middle = (centres[1:] + centres[:-1]) / 2
    low, high = (2 * centres[0] - middle[0]).clamp_min(0.0), 2 * centres[-1] - middle[-1]
    edges = torch.cat([low[None], middle, high[None]])
    total = weights.cumsum(dim=1)
    found = []
    for share in shares:
        at = (total < share).sum(dim=1, keepdim=True).clamp_max(len(centres) - 1)
        mass = weights.gather(1, at)
        inside = (share - (total.gather(1, at) - mass)) / mass.clamp_min(1e-12)
        left = edges[at]
        found.append(left + inside.clamp(0.0, 1.0) * (edges[at + 1] - left))
    return scale * torch.cat(found, dim=1)
