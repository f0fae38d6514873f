"""Small chips folders as `canopy data chips` writes them, without its geo libraries' work."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from canopy.chips.store import NO_HEIGHT, Chip, ChipRow, IndexRow, write_index, write_shard

# Trains in a second.
TINY = """
name: tiny
minutes: null
steps: 6
batch: 2
crop_px: 32
lr: 2.0e-3
log_every: 1
tensorboard: false
validate_every: 2
loss: {shift_after: 0.2, footprint: {first: 0.0, last: 0.5, begin: 0.2, end: 0.6}}
model:
  encoder: {family: rope, rope_type: cat, rope_rotate_half: false, dim: 32, depth: 4, heads: 2,
            taps: [0, 1, 2, 3], stem: [8, 8, 8], layer_scale: 0.1, drop_path: 0.3}
  decoder: {post_channels: [8, 8, 8, 8], fusion: 8, hidden: 8, head: half, detail: true, unit_norm: true,
            bins: 16, bin_min: 0.0, bin_max: 4.0, weights: softmax}
"""


def made_up_chip(name: str, split: str, seed: int, side_m: int = 32) -> Chip:
    """Bright ground and dark blobs of trees, whose height can be seen."""
    rng = np.random.default_rng(seed)
    rows, cols = np.mgrid[:side_m, :side_m]
    chm = np.zeros((side_m, side_m), np.float32)
    for _ in range(6):
        row, col, radius = (*rng.uniform(0, side_m, 2).tolist(), rng.uniform(3, 7))
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


def write_shards(
    folder: Path, splits: list[str], side_m: int = 24, shots: int = 0, kind: str = "lidar"
) -> Path:
    """Chips whose heights can be read off their brightness, one shard, as `canopy data chips` leaves them."""
    from safetensors.numpy import save_file

    rng = np.random.default_rng(0)
    tensors, rows = {}, []
    for i, split in enumerate(splits):
        chm = np.kron(rng.uniform(0, 30, (side_m // 8, side_m // 8)), np.ones((8, 8)))
        rgb = np.stack([(chm * 8).clip(1, 255).astype(np.uint8).repeat(2, 0).repeat(2, 1)] * 3)
        name = f"c{i}"
        tensors[f"{name}/rgb"] = rgb
        tensors[f"{name}/chm"] = np.where(np.arange(side_m) < 2, NO_HEIGHT, chm * 100).astype(np.uint16)
        if shots:
            places = rng.uniform(13, side_m - 13, (shots, 2)) if side_m > 26 else np.full((shots, 2), 12.0)
            tensors[f"{name}/shots"] = np.column_stack([places, np.full((shots, 2), [20.0, 1.0])]).astype(
                np.float32
            )
        rows.append(
            IndexRow(
                name,
                f"p{i}",
                f"site{i % 2}",
                kind,
                split,
                "shards/a.safetensors",
                gsd_m=0.5,
                label_gsd_m=1.0,
                height_px=2 * side_m,
                width_px=2 * side_m,
                shots=shots,
                height_p95_m=float(np.percentile(chm, 95)),
            )
        )
    (folder / "shards").mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "shards" / "a.safetensors")
    write_index(folder, rows)
    return folder


@pytest.fixture
def shards(tmp_path) -> Path:
    """Four training, two val and one test chip."""
    return write_shards(tmp_path / "chips", ["train"] * 4 + ["val"] * 2 + ["test"])


@pytest.fixture
def config(tmp_path, shards) -> Path:
    """A config file that trains on `shards`."""
    path = tmp_path / "tiny.yaml"
    path.write_text(TINY + f"data: {{chips: {shards}}}\n")
    return path


@pytest.fixture
def rows() -> Callable[..., list[IndexRow]]:
    """`rows(n, **changes)`: index rows."""

    def make(count: int, **changes: object) -> list[IndexRow]:
        base = IndexRow("", "", "site", "lidar", "train", gsd_m=0.5, label_gsd_m=1.0, height_p95_m=20.0)
        return [
            dataclasses.replace(base, id=f"{changes.get('kind', 'l')}{i}", **changes) for i in range(count)
        ]

    return make
