"""Schedules of pretraining as pure functions of progress (share of the run done, 0..1, clamped)."""

from __future__ import annotations

import math


def linear(progress: float, start: float, end: float) -> float:
    """From `start` to `end` in a straight line."""
    return start + (end - start) * _clamp(progress)


def cosine(progress: float, start: float, end: float) -> float:
    """From `start` to `end` along half a cosine: weight decay and the teacher's momentum (DINO)."""
    return end + (start - end) * 0.5 * (1.0 + math.cos(math.pi * _clamp(progress)))


def warmup_cosine_to(progress: float, peak: float, end: float, warmup: float, start: float = 0.0) -> float:
    """The learning rate: in a line from `start` to `peak` over the share `warmup`, then a cosine to `end`.

    Raises:
        ValueError: `warmup` outside 0..1.
    """
    if not 0 <= warmup < 1:
        raise ValueError(f"warm-up over {warmup} of the run, expected 0 <= share < 1")
    progress = _clamp(progress)
    if progress < warmup:
        return linear(progress / warmup, start, peak)
    return cosine((progress - warmup) / (1.0 - warmup), peak, end)


def warmup_constant(progress: float, start: float, end: float, warmup: float) -> float:
    """The teacher's temperature: in a line from `start` to `end` over the share `warmup`, then constant."""
    return end if _clamp(progress) >= warmup else linear(_clamp(progress) / warmup, start, end)


def layer_factor(layer: int, layers: int, decay: float) -> float:
    """Layer-wise decay of the learning rate: `decay` to the number of layers above; the last has 1.

    Args:
        layer: 0 for what comes before the blocks, i + 1 for block i, `layers - 1` for what comes after.
    """
    if not 0 <= layer < layers:
        raise ValueError(f"layer {layer} of {layers}")
    return decay ** (layers - 1 - layer)


def _clamp(progress: float) -> float:
    return min(max(progress, 0.0), 1.0)
