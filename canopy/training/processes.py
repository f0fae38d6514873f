"""Several processes that train together: who is first, and sums and means over all of them."""

from __future__ import annotations

from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

T = TypeVar("T")


def distributed() -> bool:
    """Whether several processes train together."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def first_process() -> bool:
    """Whether this one writes files and says what is going on. Known before the processes have met."""
    from pytorch_lightning.utilities.rank_zero import rank_zero_only

    return not getattr(rank_zero_only, "rank", 0)


@torch.no_grad()
def mean_of_processes(x: Tensor) -> Tensor:
    """The mean of `x` over all processes, without gradient; `x` itself where there is only one."""
    if not distributed():
        return x
    x = x.detach().clone()
    dist.all_reduce(x)
    return x / dist.get_world_size()


def longest(seconds: float, device: torch.device) -> float:
    """The slowest process's time. What follows a clock must follow one clock: rates, and when to stop."""
    if not distributed():
        return seconds
    x = torch.tensor(seconds, dtype=torch.float32, device=device)
    dist.all_reduce(x, op=dist.ReduceOp.MAX)
    return float(x)


def from_all(mine: list[T]) -> list[T]:
    """The lists of all processes, joined in their order."""
    parts: list[list[T]] = [mine]
    if distributed():
        parts = [[] for _ in range(dist.get_world_size())]
        dist.all_gather_object(parts, mine)
    return [x for part in parts for x in part]


def share_of(count: int) -> range:
    """Which of `count` things this process does."""
    if not distributed():
        return range(count)
    return range(dist.get_rank(), count, dist.get_world_size())
