"""The benchmarks are scripts beside the package: here they are imported as modules."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest


@pytest.fixture
def script(repo: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], ModuleType]:
    """`script("memory")`: the module of benchmarks/memory.py."""
    monkeypatch.syspath_prepend(str(repo / "benchmarks"))
    return importlib.import_module


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The file of a small random height model with crops of 64 px."""
    import torch

    from canopy.models.checkpoint import save_checkpoint
    from canopy.models.config import DecoderConfig, EncoderConfig, ModelConfig
    from canopy.models.height import HeightModel

    torch.manual_seed(0)
    encoder = EncoderConfig(dim=32, depth=4, heads=2, taps=(0, 1, 2, 3), layer_scale=None)
    decoder = DecoderConfig(post_channels=(8, 8, 8, 8), fusion=8, hidden=8, bins=8)
    path = tmp_path_factory.mktemp("model") / "tiny.safetensors"
    save_checkpoint(
        path, HeightModel(ModelConfig(crop_px=64, encoder=encoder, decoder=decoder)), {"name": "tiny"}
    )
    return path
