"""Small height maps with the structure of a forest, written as GeoTIFFs by rasterio alone."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import rasterio
from scipy import ndimage

UTM = "EPSG:32618"
WEST, NORTH = 500_000.0, 4_882_000.0


@pytest.fixture(scope="session")
def forest() -> Callable[..., np.ndarray]:
    """`forest(shape, seed)`: heights (h, w) float32 in metres: crowns, stands and open ground."""

    def make(shape: int | tuple[int, int] = 200, seed: int = 0) -> np.ndarray:
        shape = (shape, shape) if isinstance(shape, int) else shape
        rng = np.random.default_rng(seed)
        stands = ndimage.gaussian_filter(rng.normal(size=shape), 25) * 40
        crowns = ndimage.gaussian_filter(rng.normal(size=shape), 1.5) * 5
        heights = np.maximum(14 + 9 * stands + 6 * crowns, 0)
        heights[stands < -0.4] = 0
        return np.round(heights, 3).astype(np.float32)

    return make


@pytest.fixture
def write_map(tmp_path: Path) -> Callable[..., Path]:
    """`write_map("a.tif", heights, gsd=1.0, ...)`: (h, w) or (bands, h, w), upper left at (WEST, NORTH)."""

    def write(
        name: str | Path, heights: np.ndarray, *, crs: object = UTM, gsd: float = 1.0, west: float = WEST,
        north: float = NORTH, transform: rasterio.Affine | None = None, nodata: float | None = float("nan"),
        names: tuple[str, ...] = ("canopy_height",), tags: dict[str, str] | None = None, scale: float = 1.0,
        **profile: object,
    ) -> Path:  # fmt: skip
        bands = heights if heights.ndim == 3 else heights[None]
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        with rasterio.open(
            path, "w", driver="GTiff", count=len(bands), dtype=bands.dtype, height=bands.shape[1],
            width=bands.shape[2], crs=crs, nodata=nodata,
            transform=transform or rasterio.Affine(gsd, 0, west, 0, -gsd, north), **profile,
        ) as dataset:  # fmt: skip
            dataset.write(bands)
            dataset.scales = (scale,) * len(bands)
            for index, text in enumerate(names[: len(bands)], 1):
                dataset.set_band_description(index, text)
            dataset.update_tags(**(tags or {}))
        return path

    return write


@pytest.fixture(scope="session")
def area_tags() -> dict[str, str]:
    """Tags of a model whose errors are alike over 20 m and, by a fifth, over whole tiles."""
    area = {"pull": 0.0, "nugget": 0.0, "plateau": 0.2, "weights": [0.0, 0.0, 0.3, 0.0, 0.0]}
    area["factors"] = [[0.7] * 6, [1.0] * 6, [1.3] * 6, [1.645] * 6, [1.96] * 6]
    return {"CANOPY_AREA_MODEL": json.dumps(area), "CANOPY_MODEL_SHA256": "a" * 64, "CANOPY_INTERVAL": "0.9"}
