"""Small height maps, written as GeoTIFFs by rasterio alone."""

from __future__ import annotations

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
    """`forest(side, seed)`: heights (side, side) float32, 0 to 30 m, about a third of it open."""

    def make(side: int = 200, seed: int = 0, top: float = 30.0) -> np.ndarray:
        noise = ndimage.gaussian_filter(np.random.default_rng(seed).normal(size=(side, side)), 6)
        heights = np.clip(8 + 9 * noise / noise.std(), 0, top)
        return np.where(heights < 2.5, 0, heights).astype(np.float32)

    return make


@pytest.fixture
def write_map(tmp_path: Path) -> Callable[..., Path]:
    """`write_map("a.tif", heights, gsd=1.0, ...)`: (h, w) or (bands, h, w), upper left at (WEST, NORTH)."""

    def write(
        name: str | Path,
        heights: np.ndarray,
        *,
        crs: str = UTM,
        transform: rasterio.Affine | None = None,
        gsd: float = 1.0,
        nodata: float | None = float("nan"),
        names: tuple[str, ...] = ("canopy_height",),
        tags: dict[str, str] | None = None,
        **profile: object,
    ) -> Path:
        bands = heights if heights.ndim == 3 else heights[None]
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        with rasterio.open(
            path, "w", driver="GTiff", count=len(bands), dtype=bands.dtype, height=bands.shape[1],
            width=bands.shape[2], crs=crs, nodata=nodata,
            transform=transform or rasterio.Affine(gsd, 0, WEST, 0, -gsd, NORTH), **profile,
        ) as dataset:  # fmt: skip
            dataset.write(bands)
            for index, text in enumerate(names, 1):
                dataset.set_band_description(index, text)
            dataset.update_tags(**(tags or {}))
        return path

    return write
