"""Fixtures that every test folder uses."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def repo() -> Path:
    """The checkout's top folder."""
    return ROOT


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of real imagery, lidar and fixtures that lies beside a developer's checkout.

    Its files may not be redistributed here, so elsewhere these tests skip. In CI they must run.
    """
    folder = ROOT.parent / "shared"
    if not (folder / "data" / "manifest.csv").is_file():
        message = "the shared data folder is not beside this checkout"
        if os.environ.get("CI") == "true":
            pytest.fail(f"{message}, and CI must not skip")
        pytest.skip(message)
    return folder


@pytest.fixture(scope="session", autouse=True)
def converted_models(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Models that tests convert are kept for the session, and not in the user's cache."""
    os.environ.setdefault("CANOPY_CACHE", str(tmp_path_factory.mktemp("cache")))


@pytest.fixture(scope="session")
def small_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file of a random model whose heights vary with the image; crops of 64 px at 0.5 m."""
    import torch

    from canopy.models.checkpoint import save_checkpoint
    from canopy.models.config import DecoderConfig, EncoderConfig, ModelConfig
    from canopy.models.height import HeightModel

    torch.manual_seed(3)
    encoder = EncoderConfig(dim=32, depth=4, heads=2, taps=(0, 1, 2, 3), pos_grid=4, layer_scale=None)
    decoder = DecoderConfig(
        post_channels=(16, 16, 16, 16), fusion=16, hidden=16, bins=16, bin_min=0.0, bin_max=40.0, scale=1.0,
        weights="softmax",
    )  # fmt: skip
    model = HeightModel(ModelConfig(gsd_m=0.5, crop_px=64, encoder=encoder, decoder=decoder)).eval()
    with torch.no_grad():
        # Initial weights give nearly one height everywhere; a stronger last layer makes maps that can differ.
        list(model.decoder.parameters())[-2].mul_(300.0)
    path = tmp_path_factory.mktemp("model") / "small.safetensors"
    save_checkpoint(path, model, {"name": "small-random", "licence": "Apache-2.0"})
    return path
