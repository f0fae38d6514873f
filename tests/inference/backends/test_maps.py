"""A map says which backend made it, in which precision; a run keeps both."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import rasterio
from affine import Affine

import canopy
from canopy.errors import InputError
from canopy.region.options import MapOptions
from canopy.region.plan import read_pins
from canopy.region.run import prepare_run, start


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("image") / "texture.tif"
    pixels = np.random.default_rng(0).integers(20, 200, (3, 100, 120), np.uint8)
    with rasterio.open(
        path, "w", driver="GTiff", width=120, height=100, count=3, dtype="uint8", crs="EPSG:32618",
        transform=Affine(0.5, 0, 500_000, 0, -0.5, 4_882_000),
    ) as dataset:  # fmt: skip
        dataset.write(pixels)
    return path


def test_tags_and_item_say_what_made_the_map(saved, image: Path, tmp_path: Path) -> None:
    model = saved("cnn")
    maps = {}
    for backend in ("torch", "openvino", "onnx"):
        path = canopy.predict(
            image, model=model, backend=backend, out=tmp_path / f"{backend}.tif", device="cpu"
        )
        with rasterio.open(path) as dataset:
            tags, maps[backend] = dataset.tags(), dataset.read(1)
        assert (tags["CANOPY_BACKEND"], tags["CANOPY_PRECISION"]) == (backend, "fp32")
        facts = json.loads((tmp_path / f"{backend}.json").read_text())["properties"]["canopy:model"]
        assert (facts["backend"], facts["precision"]) == (backend, "fp32")
    np.testing.assert_allclose(maps["openvino"], maps["torch"], atol=1e-3)
    np.testing.assert_allclose(maps["onnx"], maps["torch"], atol=1e-3)


@pytest.mark.parametrize("backend", ["openvino", "onnx"])
def test_a_map_does_not_depend_on_batches_and_threads_that_read(saved, image, tmp_path, backend) -> None:
    model = saved("rope-stem")
    bytes_of = set()
    for batch_size, workers in ((1, 1), (3, 2), ("auto", 4)):
        canopy.predict(
            image, model=model, backend=backend, batch_size=batch_size, workers=workers, device="cpu",
            out=tmp_path / "map.tif", overwrite=True,
        )  # fmt: skip
        bytes_of.add((tmp_path / "map.tif").read_bytes())
    assert len(bytes_of) == 1


def test_a_regional_run_keeps_backend_and_precision(saved, image: Path, tmp_path: Path) -> None:
    given = {
        "out": str(tmp_path / "run"), "images": (str(image),), "model": str(saved("cnn").path), "grid": "utm",
        "tile_px": 128, "device": "cpu", "threads": 1, "attempts": 1,
    }  # fmt: skip
    start(prepare_run(MapOptions(**given, backend="onnx")))
    pins = read_pins(tmp_path / "run")
    assert pins is not None and (pins["map"]["backend"], pins["map"]["precision"]) == ("onnx", "fp32")
    tile = next((tmp_path / "run/tiles").glob("*.tif"))
    with rasterio.open(tile) as dataset:
        assert dataset.tags()["CANOPY_BACKEND"] == "onnx"
    # Whoever goes on keeps what it was begun with, and a change is refused.
    assert prepare_run(MapOptions(**given)).choice.backend == "onnx"
    with pytest.raises(InputError, match=r'map.backend was "onnx" and is "torch"'):
        prepare_run(MapOptions(**given, backend="torch"))
