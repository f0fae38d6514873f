"""Is the representation alive? Spread and effective rank."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

_MOST_ROWS = 1024  # of a singular value decomposition, so that it takes milliseconds


@torch.no_grad()
def feature_std(features: Tensor) -> float:
    """Spread of features (n, dim) of length 1 over the batch, times sqrt(dim): about 1 where they fill the
    sphere, 0 where they have collapsed to a point (Chen and He 2020, arXiv 2011.10566, section 4.1)."""
    unit = functional.normalize(features.float(), dim=-1)
    return float(unit.std(dim=0).mean() * features.shape[-1] ** 0.5)


@torch.no_grad()
def effective_rank(features: Tensor) -> float:
    """RankMe (Garrido et al. 2022, arXiv 2210.02885, eq. 2): exp(entropy of the singular values) of (n, dim).

    At least 1, at most min(n, dim); rows beyond 1024 are thinned out evenly.
    """
    step = -(-len(features) // _MOST_ROWS)
    values = torch.linalg.svdvals(features[::step].float().cpu())
    share = values / values.sum().clamp_min(1e-12) + 1e-7
    return float(torch.exp(-(share * share.log()).sum()))
