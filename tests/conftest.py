"""Fixtures that every test folder uses."""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import rasterio
import servers
import yaml
from affine import Affine
from hypothesis import settings
from rasterio.enums import ColorInterp

from canopy.runtime import bundled_dir, log
from canopy.web import RetryPolicy, use_policy

ROOT = Path(__file__).resolve().parent.parent
# The first call of PROJ or GDAL is slow, and machines differ: correctness has no deadline.
settings.register_profile("canopy", deadline=None)
settings.load_profile("canopy")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Tests that need the internet run only where `-m network` asks for them."""
    if "network" not in config.option.markexpr:
        away = [item for item in items if item.get_closest_marker("network")]
        config.hook.pytest_deselected(items=away)
        items[:] = [item for item in items if item not in away]


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


@pytest.fixture(autouse=True)
def log_as_a_library() -> Iterator[None]:
    """A command sends canopy's log to the stderr of its own run, and some libraries turn logging down for the
    whole process; no test meets what another left, nor what its module's fixtures did."""
    _plain_log()
    yield
    _plain_log()


def _plain_log() -> None:
    log.handlers.clear()
    log.setLevel(logging.NOTSET)
    log.propagate, log.disabled = True, False
    logging.getLogger().setLevel(logging.WARNING)
    logging.disable(logging.NOTSET)
    logging.captureWarnings(False)


@pytest.fixture(scope="session", autouse=True)
def converted_models(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Models that tests convert are kept for the session (for all its processes), out of the user's cache."""
    folder = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        folder = folder.parent
    os.environ.setdefault("CANOPY_CACHE", str(folder / "cache"))


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


UTM = "EPSG:32619"
LABEL_SECRETS = ("eyJ-top-secret-token", "sig=good", "Signature=", "earth-secret")
NORTH_UP = Affine(0.5, 0, 315_000, 0, -0.5, 4_884_000)


@pytest.fixture
def make_tif(tmp_path: Path) -> Callable[..., Path]:
    """`make_tif(values, name=..., colors=..., **profile)` writes values (bands, h, w) as a GeoTIFF."""

    def make(
        values: np.ndarray,
        name: str = "image.tif",
        *,
        colors: tuple[ColorInterp, ...] | None = None,
        descriptions: tuple[str, ...] = (),
        tags: dict[str, str] | None = None,
        colormap: dict[int, tuple[int, ...]] | None = None,
        mask: np.ndarray | None = None,
        **profile: object,
    ) -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        count, height, width = values.shape
        given = {
            "driver": "GTiff",
            "dtype": values.dtype.name,
            "count": count,
            "height": height,
            "width": width,
            "crs": UTM,
            "transform": NORTH_UP,
        } | profile
        with rasterio.open(path, "w", **given) as dataset:
            if colors:
                dataset.colorinterp = colors
            dataset.write(values)
            for index, text in enumerate(descriptions, 1):
                dataset.set_band_description(index, text)
            if colormap:
                dataset.write_colormap(1, colormap)
            if mask is not None:
                dataset.write_mask(mask)
            dataset.update_tags(**(tags or {}))
        return path

    return make


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(7)


@pytest.fixture
def rgb() -> np.ndarray:
    """uint8 (3, 64, 80), every band different, no value 0."""
    return np.random.default_rng(0).integers(1, 255, (3, 64, 80), dtype=np.uint8)


@pytest.fixture
def server() -> Iterator[servers.Server]:
    """A running tests/servers.py server, with a retry policy that does not make the tests wait."""
    running = servers.start()
    with use_policy(RetryPolicy(attempts=4, first_wait_s=0.02, longest_wait_s=5.0, timeout_s=5.0)):
        yield running
    running.shutdown()
    running.server_close()


@pytest.fixture
def point_at(tmp_path, monkeypatch):
    """`point_at("neon", url)`: the shipped manifests, but one whose address is `url`."""
    folder = tmp_path / "manifests"
    shutil.copytree(bundled_dir("data_manifests"), folder)
    monkeypatch.setenv("CANOPY_MANIFESTS", str(folder))
    monkeypatch.setenv("CANOPY_CACHE", str(tmp_path / "cache"))

    def change(name: str, href: str, **more: object) -> None:
        path = folder / "labels" / f"{name}.yaml"
        path.write_text(yaml.safe_dump({**yaml.safe_load(path.read_text()), "href": href, **more}))

    return change


@pytest.fixture
def tells_no_secret(caplog):
    """Nothing secret in any log line of a test, nor in what it hands to `also`."""
    caplog.set_level("DEBUG")
    texts: list[object] = []
    yield texts.append
    said = caplog.text + "".join(str(text) + repr(text) for text in texts)
    assert not [secret for secret in LABEL_SECRETS if secret in said]
