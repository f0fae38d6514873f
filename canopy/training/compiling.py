"""torch.compile of the parts that take the time, in place: names of weights, checkpoints and exports stay."""

from __future__ import annotations

from torch import nn

from canopy.models.encoder import ConvStem
from canopy.models.height import HeightModel


def compile_parts(module: nn.Module) -> int:
    """Compile every transformer block, convolutional stem and height decoder in `module`, where it stands.

    Nothing is compiled before its first call, and once more for every new shape of what goes in.

    Returns:
        How many parts.
    """
    parts: list[nn.Module] = [part for part in module.modules() if isinstance(part, ConvStem)]
    parts += [part for name, part in module.named_modules() if name.rsplit(".", 2)[-2:-1] == ["blocks"]]
    parts += [part.decoder for part in module.modules() if isinstance(part, HeightModel)]
    for part in parts:
        part.compile()
    return len(parts)
