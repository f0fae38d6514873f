"""Rasters made for one test each, and a local web server that misbehaves on command."""

from __future__ import annotations

import importlib.util
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import rasterio
import yaml
from affine import Affine
from rasterio.enums import ColorInterp

from canopy.runtime import bundled_dir
from canopy.sources.http import RetryPolicy, use_policy

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
        **profile: object,
    ) -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        count, height, width = values.shape
        settings = {
            "driver": "GTiff",
            "dtype": values.dtype.name,
            "count": count,
            "height": height,
            "width": width,
            "crs": UTM,
            "transform": NORTH_UP,
        } | profile
        with rasterio.open(path, "w", **settings) as dataset:
            if colors:
                dataset.colorinterp = colors
            dataset.write(values)
            for index, text in enumerate(descriptions, 1):
                dataset.set_band_description(index, text)
            if colormap:
                dataset.write_colormap(1, colormap)
            dataset.update_tags(**(tags or {}))
        return path

    return make


@pytest.fixture
def rgb() -> np.ndarray:
    """uint8 (3, 64, 80), every band different, no value 0."""
    return np.random.default_rng(0).integers(1, 255, (3, 64, 80), dtype=np.uint8)


def _load(name: str) -> ModuleType:
    path = Path(__file__).parents[1] / f"{name}.py"
    spec = importlib.util.spec_from_file_location(f"canopy_tests_{name}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    import sys

    sys.modules[spec.name] = module  # dataclasses look their module up by name
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def server() -> Iterator[object]:
    """A running tests/servers.py server, with a retry policy that does not make the tests wait."""
    running = _load("servers").start()
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
