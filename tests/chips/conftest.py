"""Small made-up chips."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from canopy.chips.index import ChipRow
from canopy.chips.store import Chip


@pytest.fixture
def make_chip() -> Callable[..., Chip]:
    """`make_chip(id, site, kind, split, side_m)`: heights that can be read off the red channel."""

    def make(id="a", site="s", kind="lidar", split="train", side_m=64, seed=0) -> Chip:
        rng = np.random.default_rng(seed)
        chm = rng.uniform(1, 30, (side_m, side_m)).round(2).astype(np.float32)
        red = (chm * 8).astype(np.uint8).repeat(2, 0).repeat(2, 1)
        rgb = np.stack([red, red // 2 + 1, np.full_like(red, 40)])
        return Chip(ChipRow(id, site, kind, split), rgb, chm)

    return make
