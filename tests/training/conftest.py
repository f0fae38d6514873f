"""One small chips folder and one tiny run for all tests of training."""

from __future__ import annotations

import csv
import dataclasses
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from canopy.chips import write
from canopy.chips.store import Chip, ChipRow

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


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def readable_chip(name: str, split: str, seed: int, side_m: int = 24, site: str = "site0", **row) -> Chip:
    """Heights that can be read off the brightness; the first two columns are unknown."""
    rng = np.random.default_rng(seed)
    chm = np.kron(rng.uniform(0, 30, (side_m // 8, side_m // 8)), np.ones((8, 8))).astype(np.float32)
    rgb = np.stack([(chm * 8).clip(1, 255).astype(np.uint8).repeat(2, 0).repeat(2, 1)] * 3)
    chm[:, :2] = np.nan
    return Chip(ChipRow(name, site, row.pop("kind", "lidar"), split, **row), rgb, chm)


def blobs(name: str, split: str, seed: int, side_m: int = 32) -> Chip:
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


def write_folder(folder: Path, splits: list[str]) -> Path:
    """Chips c0, c1, ... of pairs p0, p1, ..., of two sites in turn."""
    chips = [
        readable_chip(f"c{i}", split, i, site=f"site{i % 2}", pair=f"p{i}") for i, split in enumerate(splits)
    ]
    write.write_folder(folder, chips)
    return folder


@pytest.fixture(scope="session")
def shards(tmp_path_factory) -> Path:
    """Four training, two val and one test chip; not to be changed."""
    return write_folder(tmp_path_factory.mktemp("shards") / "chips", ["train"] * 4 + ["val"] * 2 + ["test"])


@pytest.fixture(scope="session")
def config(tmp_path_factory, shards) -> Path:
    """A config file that trains on `shards`."""
    path = tmp_path_factory.mktemp("config") / "tiny.yaml"
    path.write_text(TINY + f"data: {{chips: {shards}}}\n")
    return path


@pytest.fixture(scope="session")
def tiny_run(config, tmp_path_factory) -> Path:
    """RUN_DIR of a whole run of six steps; not to be changed."""
    from canopy.config import load_settings
    from canopy.training.fit import finetune
    from canopy.training.settings import FinetuneSettings

    run = tmp_path_factory.mktemp("tiny") / "run"
    finetune(load_settings(FinetuneSettings, config), run, command=f"canopy train {config} -o {run}")
    return run


@pytest.fixture(scope="session")
def views_dir(tmp_path_factory) -> Path:
    """Twelve train and four val chips of 64 px, with heights."""
    folder = tmp_path_factory.mktemp("views")
    counts = {"train": 12, "val": 4}
    names = [(split, i) for split, count in counts.items() for i in range(count)]
    chips = [blobs(f"{split}{i}", split, seed=i + 100 * (split == "val")) for split, i in names]
    write.write_folder(folder, chips)
    return folder


@pytest.fixture(scope="session")
def table() -> Callable[[Path], list[dict[str, str]]]:
    """`table(run)`: all lines that a run's calls have logged."""

    def read(run: Path) -> list[dict[str, str]]:
        logs = sorted(run.glob("log*/metrics.csv"), key=lambda p: (len(p.parent.name), p))
        return [line for path in logs for line in csv.DictReader(path.open(newline=""))]

    return read


@pytest.fixture(scope="session")
def make_folder() -> Callable[[Path, list[str]], Path]:
    return write_folder


@pytest.fixture
def rows() -> Callable[..., list[ChipRow]]:
    """`rows(n, **changes)`: index rows."""

    def make(count: int, **changes: object) -> list[ChipRow]:
        base = ChipRow("", "site", "lidar", "train", gsd_m=0.5, label_gsd_m=1.0, height_p95_m=20.0)
        names = [f"{changes.get('kind', 'l')}{i}" for i in range(count)]
        return [dataclasses.replace(base, id=name, pair=name, **changes) for name in names]

    return make
