"""Weights, gradients, the optimiser's moments and the teacher spread over all processes: FSDP2.

torch's `fully_shard` (Zhao et al. 2023, arXiv 2304.11277, in its second form) on every transformer block,
stem and prototype head: each process keeps 1 / n of them, and a part is whole only while it is at work. What
lies between (patch embedding, class token and registers, norms, the mask token: under 1 % of a ViT-L) stays
whole on every process, because pretraining enters the encoder by its methods and not by one forward; its
gradients are averaged here. Lightning's `ModelParallelStrategy` starts the processes and writes checkpoints,
which hold the whole weights like those of any other run.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from canopy.models.encoder import ConvStem
from canopy.training.processes import distributed
from canopy.training.ssl_heads import PrototypeHead

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh


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
