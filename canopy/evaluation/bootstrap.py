"""95 % intervals by spatial block bootstrap, from each block's sums alone.

Neighbouring pixels err alike, so pixels are not resampled: whole blocks are, with replacement, as many as
there are. Everything a metric needs is a sum over blocks (`canopy.metrics`), so a replicate is a weighted sum
of rows and no pixel is read twice. The interval is the expanded percentile interval (Hesterberg 2015, The
American Statistician 69:371): percentiles are taken a little further out, at the level that Student's t and
the factor sqrt(n / (n - 1)) ask for, because plain ones are too narrow with few blocks.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from scipy import stats

LEVEL = 0.95
LEAST_BLOCKS = 10
REPLICATES = 1000
# More replicates without a value than this and there is no interval.
_MAX_MISSING = 0.05
_CHUNK = 250


@dataclass(frozen=True)
class Bootstrap:
    """How blocks are resampled. `replicates` 0 turns intervals off."""

    replicates: int = REPLICATES
    seed: int = 0


def draws(blocks: int, setting: Bootstrap) -> np.ndarray:
    """How often each block is drawn, int16 (replicates, blocks); rows sum to `blocks`."""
    return _draws(blocks, setting.replicates, setting.seed)


@lru_cache(maxsize=2)
def _draws(blocks: int, replicates: int, seed: int) -> np.ndarray:
    rng = np.random.default_rng([seed, blocks])
    equal = np.full(blocks, 1 / blocks)
    made = np.zeros((replicates, blocks), np.int16)  # no block is drawn 32,000 times
    for i in range(0, replicates, _CHUNK):
        made[i : i + _CHUNK] = rng.multinomial(blocks, equal, size=min(_CHUNK, replicates - i))
    made.flags.writeable = False
    return made


def replicate(rows: np.ndarray, setting: Bootstrap) -> np.ndarray:
    """Sums of resampled blocks (replicates, fields) from each block's row (blocks, fields)."""
    weights = draws(len(rows), setting)
    parts = [weights[i : i + _CHUNK].astype(np.float64) @ rows for i in range(0, len(weights), _CHUNK)]
    return np.concatenate(parts)


def too_few(blocks: int, side: str) -> str | None:
    """Why there can be no interval with so few blocks; None where there can."""
    if blocks >= LEAST_BLOCKS:
        return None
    many = f"{blocks} block{'s' * (blocks != 1)}"
    return f"no interval: {many} of {side} with data, at least {LEAST_BLOCKS} needed"


def intervals(values: Mapping[str, np.ndarray], blocks: int) -> dict[str, tuple[float, float] | None]:
    """Interval of each metric from its replicates (replicates,); None where too many have no value."""
    low, high = _levels(blocks)
    found: dict[str, tuple[float, float] | None] = {}
    for name, drawn in values.items():
        known = drawn[np.isfinite(drawn)]
        enough = len(drawn) > 0 and len(known) >= (1 - _MAX_MISSING) * len(drawn)
        if not enough:
            found[name] = None
            continue
        ends = np.quantile(known, [low, high])
        found[name] = float(ends[0]), float(ends[1])
    return found


def _levels(blocks: int) -> tuple[float, float]:
    """The two quantiles to take: Phi(-+ sqrt(n / (n - 1)) t)."""
    reach = stats.t.ppf((1 + LEVEL) / 2, blocks - 1) * math.sqrt(blocks / (blocks - 1))
    return float(stats.norm.cdf(-reach)), float(stats.norm.cdf(reach))
