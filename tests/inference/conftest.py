"""Small models and sources whose answers are known, shared by the inference tests."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from canopy.geo.grid import Grid
from canopy.imagery.base import Imagery
from canopy.inference.backends import TorchRunner
from canopy.inference.engine import RunSummary, predict_grid
from canopy.inference.layers import Extras
from canopy.models.checkpoint import save_checkpoint
from canopy.models.config import DecoderConfig, EncoderConfig, ModelConfig
from canopy.models.height import HeightModel
from canopy.models.registry import load_model


class AnalyticModel(torch.nn.Module):
    """Height = 30 x a local mean of green (5 x 5 box, valid inside): exact away from a crop's edge."""

    def __init__(self, crop_px: int = 32, patch_px: int = 8, **more: int) -> None:
        super().__init__()
        self.config = SimpleNamespace(crop_px=crop_px, patch_px=patch_px, gsd_m=1.0, **more)
        self.calls = 0
        self.crops = 0
        self.largest_batch = 0

    def layers(self, rgb: torch.Tensor, outputs: tuple[str, ...]) -> torch.Tensor:
        assert torch.isfinite(rgb).all(), "NaN entered the network"
        self.calls += 1
        self.crops += len(rgb)
        self.largest_batch = max(self.largest_batch, len(rgb))
        made = {"height_m": self.heights(rgb), "spread_m": 0.5 + rgb[:, :1]}
        return torch.cat([made[name] for name in outputs], dim=1)

    def heights(self, rgb: torch.Tensor) -> torch.Tensor:
        box = torch.full((1, 1, 5, 5), 1 / 25.0)
        # Zero padding makes the outer two pixels of a crop wrong, as context-starved edges are.
        return 30 * torch.nn.functional.conv2d(rgb[:, 1:2], box, padding=2)


@dataclass
class FieldSource:
    """An endless smooth image on the global lattice, with holes where `invalid(rows, cols)` says so."""

    invalid: object = None
    name: str = "field"
    reads: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)

    def read(self, grid: Grid) -> Imagery:
        with self.lock:
            self.reads += 1
        rows, cols = (
            (np.arange(n) + o).astype(np.float64) for n, o in zip(grid.shape, grid.origin_rc, strict=True)
        )
        rows, cols = np.meshgrid(rows, cols, indexing="ij")
        green = 0.5 + 0.3 * np.sin(rows / 9) * np.cos(cols / 7)
        rgb = np.stack([green * 0.8, green, green * 0.5]).astype(np.float32)
        valid = np.ones(grid.shape, bool) if self.invalid is None else ~self.invalid(rows, cols)
        # Like a real source that forgets to mask: what is invalid is not even finite.
        rgb[:, ~valid] = np.nan
        return Imagery(rgb, valid, np.where(valid, 18_000, 0).astype(np.int32), grid)


class Recorder:
    """A sink that keeps everything and the names of the threads that called it."""

    def __init__(self, grid: Grid, bands: int = 1) -> None:
        self.values = np.full((bands, *grid.shape), np.nan, np.float32)
        self.valid = np.zeros(grid.shape, bool)
        self.times = np.zeros(grid.shape, int)
        self.threads: set[str] = set()

    def write(self, values: np.ndarray, valid: np.ndarray, row_off: int, col_off: int) -> None:
        self.threads.add(threading.current_thread().name)
        place = (slice(row_off, row_off + valid.shape[0]), slice(col_off, col_off + valid.shape[1]))
        self.values[(slice(None), *place)] = values
        self.valid[place] = valid
        self.times[place] += 1


def utm_grid(row: int, col: int, height: int, width: int) -> Grid:
    """A one-metre UTM grid whose first pixel has the global index (row, col)."""
    return Grid.of("EPSG:32618", (1.0, 0, float(col), 0, -1.0, float(-row)), (height, width))


def run(
    grid: Grid,
    model: AnalyticModel | None = None,
    source: object | None = None,
    extras: Extras | None = None,
    **options: object,
) -> tuple[np.ndarray, Recorder, RunSummary]:
    """Predict a grid: heights (h, w) with NaN where invalid, the recorder, and the summary."""
    extras = extras or Extras()
    sink, runner = (
        Recorder(grid, len(extras.bands)),
        TorchRunner(model or AnalyticModel(), outputs=extras.outputs),
    )
    summary = predict_grid(runner, source or FieldSource(), grid, sink, extras=extras, **options)
    assert (sink.times == 1)[sink.valid].all() and sink.times.max() <= 1, "pixels are written once"
    return np.where(sink.valid, sink.values[0], np.nan), sink, summary


@pytest.fixture(scope="session")
def kit() -> SimpleNamespace:
    """The helpers of this file, for tests (pytest cannot import a conftest by name)."""
    return SimpleNamespace(
        AnalyticModel=AnalyticModel, FieldSource=FieldSource, Recorder=Recorder, utm_grid=utm_grid, run=run
    )


# ---- small random models of every family ------------------------------------------------------
TINY = {"dim": 32, "depth": 4, "heads": 2, "taps": (0, 1, 2, 3), "layer_scale": None}
DPT = DecoderConfig(
    post_channels=(8, 8, 16, 16), fusion=16, hidden=8, bins=16, bin_min=0.0, bin_max=4.0, weights="softmax",
    unit_norm=True,
)  # fmt: skip
UNET = DecoderConfig(
    post_channels=(8, 8, 16, 16), hidden=8, bins=16, bin_min=0.0, bin_max=4.0, weights="softmax", head="half"
)
FAMILIES = {
    "vit": EncoderConfig(pos_grid=5, **TINY),
    "vit-timm": EncoderConfig(
        pos_grid=5, pos_resize="bicubic", pos_embed_prefix=False, registers=2, norm_taps=True, **TINY
    ),
    "rope-v3": EncoderConfig(family="rope", k_bias=True, registers=2, **TINY),
    "rope-stem": EncoderConfig(
        family="rope", rope_type="cat", rope_rotate_half=False, norm_taps=True, stem=(8, 8, 8), **TINY
    ),
    "cnn": EncoderConfig(family="cnn", network="resnet18", widths=(8, 8, 16, 16), patch=32),
}


def random_model(family: str, seed: int = 0) -> HeightModel:
    """A random network whose heights vary with the image by metres; batch statistics as after training."""
    torch.manual_seed(seed)
    model = HeightModel(
        ModelConfig(gsd_m=0.5, crop_px=64, encoder=FAMILIES[family], decoder=UNET if family == "cnn" else DPT)
    ).eval()
    with torch.no_grad():
        for name, tensor in model.named_buffers():
            if name.endswith("running_var"):
                tensor.uniform_(0.5, 2.0)
            elif name.endswith("running_mean"):
                tensor.uniform_(-0.2, 0.2)
        list(model.decoder.parameters())[-2].mul_(30.0)
    return model


@pytest.fixture(scope="session")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., HeightModel]:
    """`saved(family, seed=0)`: such a model, loaded from a file."""
    folder: Path = tmp_path_factory.mktemp("models")

    def load(family: str, seed: int = 0) -> HeightModel:
        path = folder / f"{family}-{seed}.safetensors"
        if not path.exists():
            save_checkpoint(path, random_model(family, seed), {"name": f"{family}-{seed}"}, half=False)
        return load_model(path)

    return load


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache, and where conversions will lie in it."""
    monkeypatch.setenv("CANOPY_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "backends"
