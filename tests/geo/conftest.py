"""Small georeferenced files, and a smooth function of world coordinates that warps can be held to."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import rasterio
from affine import Affine
from hypothesis import settings

# The first call of PROJ or GDAL is slow, and machines differ: correctness has no deadline.
settings.register_profile("geo", deadline=None)
settings.load_profile("geo")


@pytest.fixture
def make_tif(tmp_path: Path) -> Callable[..., Path]:
    """`make_tif(values (b, h, w), transform, crs, name=..., **profile)` -> path of a GeoTIFF."""

    def make(
        values: np.ndarray, transform: Affine, crs: object = "EPSG:32610", name: str = "in.tif", **profile
    ) -> Path:
        path = tmp_path / name
        count, height, width = values.shape
        settings = {
            "driver": "GTiff",
            "dtype": values.dtype.name,
            "count": count,
            "height": height,
            "width": width,
            "crs": crs,
            "transform": transform,
        } | profile
        with rasterio.open(path, "w", **settings) as dataset:
            dataset.write(values)
        return path

    return make


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(7)
