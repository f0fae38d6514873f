"""Schedules as pure functions of progress: the share of a run that is done, 0..1 (clamped).

torch.compile of the parts that take the time, in place: names of weights, checkpoints and exports stay.

Weights, gradients, the optimiser's moments and the teacher spread over all processes: FSDP2.

torch's `fully_shard` (Zhao et al. 2023, arXiv 2304.11277, in its second form) on every transformer block,
stem and prototype head: each process keeps 1 / n of them, and a part is whole only while it is at work. What
lies between (patch embedding, class token and registers, norms, the mask token: under 1 % of a ViT-L) stays
whole on every process, because pretraining enters the encoder by its methods and not by one forward; its
gradients are averaged here. Lightning's `ModelParallelStrategy` starts the processes and writes checkpoints,
which hold the whole weights like those of any other run.

What moves weights: AdamW's groups (what is decayed, how fast a layer learns), and a teacher's average.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

import torch
import torch._dynamo
import torch._inductor.config
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from canopy.models.encoder import ConvStem
from canopy.models.height import HeightModel
from canopy.training.run_folder import distributed
from canopy.training.ssl_heads import PrototypeHead

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh


SHAPES = ("linear", "cosine", "step")
_LEAST_WARMUP = 1e-3  # of the peak: a first step at rate 0 would be thrown away


def ramp(
    progress: float,
    first: float,
    last: float,
    begin: float = 0.0,
    end: float = 1.0,
    shape: str = "linear",
) -> float:
    """`first` until progress `begin`, `last` from `end` on; between them a line ('linear'), half a cosine
    ('cosine'), or `first` until `end` ('step')."""
    if progress >= end:
        return last
    if progress <= begin or shape == "step":
        return first
    share = (progress - begin) / (end - begin)
    if shape == "cosine":
        share = 0.5 * (1.0 - math.cos(math.pi * share))
    return first + (last - first) * share


def learning_rate(progress: float, peak: float, end: float, warmup: float, shape: str = "cosine") -> float:
    """In a line from nearly 0 to `peak` over the share `warmup` (below 1), then to `end` by a 'cosine' or a
    'linear' fall, or 'constant' at `peak`."""
    if progress < warmup:
        return peak * max(progress / warmup, _LEAST_WARMUP)
    return peak if shape == "constant" else ramp(progress, peak, end, warmup, 1.0, shape)


def ema_decay(step: int, final: float = 0.998) -> float:
    """Decay of the weight average at `step`: short memory first, `final` later (as TensorFlow's EMA does)."""
    return min(final, (1.0 + step) / (10.0 + step))


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


def sharded_parts(module: nn.Module) -> list[nn.Module]:
    """What is spread: no part lies in another."""
    blocks = [part for name, part in module.named_modules() if name.rsplit(".", 2)[-2:-1] == ["blocks"]]
    return blocks + [part for part in module.modules() if isinstance(part, ConvStem | PrototypeHead)]


def shard(module: nn.Module, mesh: DeviceMesh) -> None:
    """Spread the parts of `module` over the processes of `mesh` (one dimension). Weights must be equal."""
    from torch.distributed.fsdp import fully_shard

    for part in sharded_parts(module):
        # Each part is a root of its own: without the flag a root would stay whole after its forward.
        fully_shard(part, mesh=mesh, reshard_after_forward=True)


def local(x: Tensor) -> Tensor:
    """This process's share of a spread tensor; a whole one as it is. Shares memory."""
    return x.to_local() if isinstance(x, DTensor) else x


def whole(x: Tensor) -> Tensor:
    """A tensor with all shares put together. All processes must ask."""
    return x.full_tensor() if isinstance(x, DTensor) else x


def whole_state(module: nn.Module) -> dict[str, Any]:
    """`module.state_dict()` of whole tensors. All processes must ask."""
    return {name: whole(value) for name, value in module.state_dict().items()}


@torch.no_grad()
def share_buffers(module: nn.Module) -> None:
    """Give all processes the first one's buffers (running statistics), as a checkpoint would."""
    if distributed():
        for buffer in module.buffers():
            dist.broadcast(buffer, 0)


@torch.no_grad()
def average_rest(parameters: Iterable[nn.Parameter]) -> None:
    """Average the gradients of parameters that are not spread over all processes; torch does the others."""
    count = dist.get_world_size()
    for parameter in parameters:
        if parameter.grad is not None and not isinstance(parameter, DTensor):
            dist.all_reduce(parameter.grad)
            parameter.grad.div_(count)


@torch.no_grad()
def clip_norm(parameters: Iterable[nn.Parameter], most: float) -> Tensor:
    """Scale gradients, of which some are spread, to a joint norm of at most `most`; returns the norm before.

    What is not spread must be equal on all processes.
    """
    found = [p for p in parameters if p.grad is not None]
    grads = [local(p.grad) for p in found if p.grad is not None]
    spread = [isinstance(p, DTensor) for p in found]
    device = grads[0].device if grads else torch.device("cpu")
    squares = torch.zeros(2, device=device)
    for grad, apart in zip(grads, spread, strict=True):
        squares[int(apart)] += grad.float().square().sum()
    dist.all_reduce(squares[1:])
    norm = squares.sum().sqrt()
    torch._foreach_mul_(grads, (most / (norm + 1e-6)).clamp(max=1.0))
    return norm


_TOKENS = ("cls_token", "reg_token", "mask_token", "pos_embed")


def layer_of(name: str, depth: int) -> int:
    """Layer of a parameter: 0 before the blocks, i + 1 in block i, depth + 1 in the final norm and heads."""
    block = re.search(r"encoder\.vit\.blocks\.(\d+)\.", name)
    if block:
        return int(block[1]) + 1
    before = re.search(r"encoder\.(stem\.|vit\.(patch_embed|cls_token|reg_token|pos_embed|norm_pre))", name)
    return 0 if before or name == "mask_token" else depth + 1


def layer_factor(name: str, depth: int, decay: float) -> float:
    """Factor on the learning rate of a parameter: `decay` to the number of layers above its own.

    Block i of `depth` gets decay ** (depth - i), whatever lies before the blocks decay ** (depth + 1), what
    comes after them 1 (BEiT, Bao et al. 2021, arXiv 2106.08254).
    """
    return decay ** (depth + 1 - layer_of(name, depth))


def parameter_groups(
    named: Iterable[tuple[str, nn.Parameter]], factor: Callable[[str], float]
) -> list[dict[str, Any]]:
    """AdamW's groups of trainable parameters, in a fixed order, for `set_rates`: each has `factor` (on the
    learning rate) and `decays` (1 or 0, on the weight decay).

    Vectors (biases, norms, LayerScale), learnt tokens and positions are not decayed, as is usual for
    transformers.

    Args:
        named: names and parameters; those that need no gradient are left out.
        factor: of a name.
    """
    groups: dict[tuple[float, int, bool], list[Tensor]] = {}
    for name, parameter in named:
        if parameter.requires_grad:
            decays = int(parameter.ndim > 1 and not name.endswith(_TOKENS))
            # An optimiser's fused steps take spread tensors or whole ones, not both at once.
            groups.setdefault((factor(name), decays, isinstance(parameter, DTensor)), []).append(parameter)
    ordered = sorted(groups.items(), key=lambda group: group[0])
    return [{"params": p, "factor": f, "decays": d} for (f, d, _), p in ordered]


def set_rates(optimizer: torch.optim.Optimizer, rate: float, weight_decay: float) -> None:
    """Give every group of `parameter_groups` its share of the learning rate and of the weight decay."""
    for group in optimizer.param_groups:
        group["lr"], group["weight_decay"] = rate * group["factor"], weight_decay * group["decays"]


@torch.no_grad()
def follow(teacher: nn.Module, student: nn.Module, momentum: float) -> None:
    """Move the teacher's parameters towards the student's: teacher = m * teacher + (1 - m) * student.

    Running statistics stay each one's own: the student's stem sees blanked patches, the teacher's never does.
    """
    ours, theirs = dict(teacher.named_parameters()), dict(student.named_parameters())
    names = [name for name in ours if name in theirs]
    torch._foreach_lerp_(
        [local(ours[n].data) for n in names], [local(theirs[n].data) for n in names], 1.0 - momentum
    )
