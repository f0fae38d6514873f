"""Small random models of every family, saved to files, and the cache they are converted into."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from canopy.models.checkpoint import load_model, save_checkpoint
from canopy.models.config import DecoderConfig, EncoderConfig, ModelConfig
from canopy.models.height import HeightModel

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


@pytest.fixture(scope="session")
def unsaved() -> Callable[..., HeightModel]:
    """`unsaved(family, seed=0)`: such a model that never was a file."""
    return random_model


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache, and where conversions will lie in it."""
    monkeypatch.setenv("CANOPY_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "backends"
