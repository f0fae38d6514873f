"""Chips of procedural stands in which closure does not tell height: every closure at every size of tree.

A scene is drawn at a pixel of 0.5 m / scale and shown at 0.5 m, its heights times scale: crowns, spacing, shadows
and heights shrink or grow together, as in a young or an old stand of the same closure.

    python pipelines/synth_stands.py OUT --count 72
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from canopy.chips.made import SITE, write_made
from canopy.chips.store import Chip, ChipRow
from canopy.sources.synth import random_spec
from canopy.sources.synth_render import render


def stands(count: int, side_px: int = 512, first_seed: int = 5000) -> Iterator[Chip]:
    """Training chips, each another place, sun, camera and scale; heights are the highest of each 1 m cell."""
    half = side_px // 2
    for seed in range(first_seed, first_seed + count):
        rng = np.random.default_rng([seed, 91])
        scale = float(np.exp(rng.uniform(np.log(0.35), np.log(1.4))))
        spec = dataclasses.replace(
            random_spec(seed),
            gsd_m=0.5 / scale,
            plantation=bool(rng.random() < 0.4),
            density=float(rng.choice([0.1, 0.3, 0.5, 0.75, 0.95, 0.98])),
            height_m=float(rng.uniform(8, 34)),
            sun_elevation_deg=float(rng.uniform(24, 66)),
        )
        tile = render(spec, 0.0, 0.0, side_px, side_px)
        chm = scale * tile.chm.reshape(half, 2, half, 2).max(axis=(1, 3)).astype(np.float32)
        yield Chip(ChipRow(f"stand_{seed}", SITE, "synth", "train"), np.maximum(tile.rgb, 1), chm)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--count", type=int, default=72)
    args = parser.parse_args()
    (args.out / "shards").mkdir(parents=True, exist_ok=True)
    write_made(args.out, stands(args.count), SITE, "Apache-2.0")
