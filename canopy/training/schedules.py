"""Learning-rate, loss-weight and averaging schedules as pure functions of progress."""

from __future__ import annotations

import math

SHAPES = ("linear", "cosine", "step")


def warmup_cosine(progress: float, warmup: float = 0.03, floor: float = 0.01) -> float:
    """Factor on the learning rate: linear from ~0 to 1 over `warmup`, then half a cosine down to `floor`.

    Args:
        progress: share of the run done, 0..1 (clamped).
        warmup: share of the run spent warming up.
        floor: final factor.
    """
    return lr_factor(progress, "cosine", warmup, floor)


def lr_factor(progress: float, shape: str, warmup: float = 0.03, floor: float = 0.01) -> float:
    """Factor on the learning rate: linear from ~0 to 1 over `warmup`, then 'cosine' or 'linear' down to
    `floor`, or 'constant'. Arguments as in `warmup_cosine`."""
    progress = min(max(progress, 0.0), 1.0)
    if progress < warmup:
        return max(progress / warmup, 1e-3)
    if shape == "constant":
        return 1.0
    rest = (progress - warmup) / max(1.0 - warmup, 1e-9)
    left = 0.5 * (1.0 + math.cos(math.pi * rest)) if shape == "cosine" else 1.0 - rest
    return floor + (1.0 - floor) * left


def ramp(
    progress: float, first: float, last: float, begin: float, end: float, shape: str = "linear"
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


def ema_decay(step: int, final: float = 0.998) -> float:
    """Decay of the weight average at `step`: short memory first, `final` later (as TensorFlow's EMA does)."""
    return min(final, (1.0 + step) / (10.0 + step))
