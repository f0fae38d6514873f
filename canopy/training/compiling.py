"""torch.compile of the parts that take the time, in place: names of weights, checkpoints and exports stay."""

from __future__ import annotations

import torch._dynamo
import torch._inductor.config
from torch import nn

from canopy.models.encoder import ConvStem
from canopy.models.height import HeightModel


def compile_parts(module: nn.Module) -> int:
    """Compile every transformer block, convolutional stem and height decoder in `module`, where it stands.

    Nothing is compiled before its first call, and once more for every new shape of what goes in.

    Returns:
        How many parts.
    """
    # Blocks share their code but not their rate of stochastic depth, and views differ in size: torch's own
    # limit of eight kinds would leave most of them uncompiled, without a word.
    torch._dynamo.config.recompile_limit = 256
    torch._dynamo.config.accumulated_recompile_limit = 4096
    # Stochastic depth is drawn as an uncompiled run draws it.
    torch._inductor.config.fallback_random = True
    parts: list[nn.Module] = [part for part in module.modules() if isinstance(part, ConvStem)]
    parts += [part for name, part in module.named_modules() if name.rsplit(".", 2)[-2:-1] == ["blocks"]]
    parts += [part.decoder for part in module.modules() if isinstance(part, HeightModel)]
    for part in parts:
        part.compile()
    return len(parts)
