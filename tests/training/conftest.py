"""A small chips folder as `canopy data chips` writes it, without its geo libraries' work."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from canopy.chips.cutting import write_shard
from canopy.chips.index import IndexRow, write_index
from canopy.chips.store import Chip, ChipRow


def made_up_chip(name: str, split: str, seed: int, side_m: int = 32) -> Chip:
    """Bright ground and dark blobs of trees, whose height can be seen."""
    rng = np.random.default_rng(seed)
    rows, cols = np.mgrid[:side_m, :side_m]
    chm = np.zeros((side_m, side_m), np.float32)
    for _ in range(6):
        row, col, radius = rng.uniform(0, side_m, 2).tolist() + [rng.uniform(3, 7)]
        dome = np.sqrt(np.maximum(0, 1 - ((rows - row) ** 2 + (cols - col) ** 2) / radius**2))
        chm = np.maximum(chm, (rng.uniform(8, 25) * dome).astype(np.float32))
    fine = chm.repeat(2, 0).repeat(2, 1)
    colour = np.array([150, 140, 110])[:, None, None] - np.array([5, 3, 4])[:, None, None] * fine
    rgb = np.clip(colour + rng.normal(0, 6, (3, 2 * side_m, 2 * side_m)), 1, 255).astype(np.uint8)
    return Chip(ChipRow(name, f"site{seed % 2}", "lidar", split), rgb, chm)


@pytest.fixture(scope="session")
def views_dir(tmp_path_factory) -> Path:
    """Twelve train and four val chips of 64 px, with heights."""
    folder = tmp_path_factory.mktemp("views")
    (folder / "shards").mkdir()
    index = []
    for split, count in (("train", 12), ("val", 4)):
        chips = [made_up_chip(f"{split}{i}", split, seed=i + 100 * (split == "val")) for i in range(count)]
        shots = np.zeros((0, 4), np.float32)
        write_shard(folder / "shards" / f"{split}.safetensors", [(chip, shots) for chip in chips], "source")
        index += [
            IndexRow(
                c.row.id, c.row.id, c.row.site, "lidar", split, f"shards/{split}.safetensors",
                height_px=64, width_px=64, gsd_m=0.5, label_gsd_m=1.0, label_share=1.0,
                height_p95_m=float(np.percentile(c.chm_m, 95)),
            )
            for c in chips
        ]  # fmt: skip
    write_index(folder, index)
    return folder
