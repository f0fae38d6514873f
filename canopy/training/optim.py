"""AdamW's parameter groups: what is decayed, and how fast each layer of the encoder learns."""

from __future__ import annotations

import torch
from torch import nn

from canopy.training.ssl_optim import layer_of


def layer_scale(name: str, depth: int, layer_decay: float, encoder_scale: float) -> float:
    """Factor on the learning rate of the parameter `name` of a HeightModel.

    Block i of `depth` gets layer_decay ** (depth - i), whatever lies before the blocks layer_decay **
    (depth + 1), what comes after them nothing more (BEiT, Bao et al. 2021, arXiv 2106.08254); the whole
    encoder gets `encoder_scale` besides.
    """
    if not name.startswith("encoder."):
        return 1.0
    return encoder_scale * layer_decay ** (depth + 1 - layer_of(name, depth))


def parameter_groups(
    model: nn.Module, depth: int, weight_decay: float, layer_decay: float = 1.0, encoder_scale: float = 1.0
) -> list[dict[str, object]]:
    """Groups of trainable parameters by learning rate ('scale') and decay, in a fixed order.

    Norms, biases and other vectors are not decayed, as is usual for transformers.
    """
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            scale = layer_scale(name, depth, layer_decay, encoder_scale)
            decay = weight_decay if parameter.ndim > 1 else 0.0
            groups.setdefault((scale, decay), []).append(parameter)
    return [
        {"params": groups[key], "scale": key[0], "weight_decay": key[1]}
        for key in sorted(groups, reverse=True)
    ]


def set_rates(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Give every group `rate` times its own scale."""
    for group in optimizer.param_groups:
        group["lr"] = rate * group["scale"]
