"""Schedules as pure functions of progress: the share of a run that is done, 0..1 (clamped)."""

from __future__ import annotations

import math

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
