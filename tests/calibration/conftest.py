"""Held-out tiles whose errors are known: their spread, their skew, and how alike neighbours are."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from scipy import ndimage

from canopy.calibration.collect import Scored


def field(rng: np.random.Generator, side: int, range_m: float) -> np.ndarray:
    """A stationary field of unit variance whose neighbours are alike up to about `range_m`."""
    wide = ndimage.gaussian_filter(rng.normal(size=(side + 64, side + 64)), range_m, mode="wrap")
    return (wide / wide.std())[:side, :side]


@pytest.fixture(scope="session")
def make_tiles() -> Callable[..., list[Scored]]:
    """`make_tiles(count, seed=0)`: tiles of 128 m whose errors grow with height and with the spread."""

    def make(count: int, seed: int = 0, *, side: int = 128, bias_m: float = 0.0) -> list[Scored]:
        rng = np.random.default_rng(seed)
        tiles = []
        for number in range(count):
            height = np.clip(12 + 9 * field(rng, side, 12), 0, 35)
            spread = (0.4 + 0.15 * height) * np.exp(0.4 * field(rng, side, 6))
            error = spread * (0.8 * field(rng, side, 3) + 0.5 * rng.normal(size=(side, side)))
            # Skewed like real ones: now and then there is a gap in the canopy.
            gap = (field(rng, side, 3) > 1.8) & (height > 5)
            truth = np.maximum(np.where(gap, 0.2 * height, height + error) + bias_m, 0)
            truth[rng.random(truth.shape) < 0.05] = np.nan
            maps = (np.where(np.isnan(truth), np.nan, v).astype(np.float32) for v in (height, spread, truth))
            tiles.append(Scored(f"tile{number:03d}", f"site{number % 2}", "val", *maps))
        return tiles

    return make
