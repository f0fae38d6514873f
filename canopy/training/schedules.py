"""Learning-rate and averaging schedules as pure functions of progress."""

from __future__ import annotations

import math


def warmup_cosine(progress: float, warmup: float = 0.03, floor: float = 0.01) -> float:
    """Factor on the learning rate: linear from ~0 to 1 over `warmup`, then half a cosine down to `floor`.

    Args:
        progress: share of the run done, 0..1 (clamped).
        warmup: share of the run spent warming up.
        floor: final factor.
    """
    progress = min(max(progress, 0.0), 1.0)
    if progress < warmup:
        return max(progress / warmup, 1e-3)
    rest = (progress - warmup) / max(1.0 - warmup, 1e-9)
    return floor + (1.0 - floor) * 0.5 * (1.0 + math.cos(math.pi * rest))


def ema_decay(step: int, final: float = 0.998) -> float:
    """Decay of the weight average at `step`: short memory first, `final` later (as TensorFlow's EMA does)."""
    return min(final, (1.0 + step) / (10.0 + step))
