"""Small height rasters with the structure of a forest, written where a test wants them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import rasterio
from affine import Affine
from scipy import ndimage

WEST, NORTH, UTM = 400_000.0, 4_200_000.0, "EPSG:32617"


def forest(seed: int = 0, shape: tuple[int, int] = (260, 310)) -> np.ndarray:
    """Heights (h, w) float32: crowns, stands and open ground."""
    rng = np.random.default_rng(seed)
    stands = ndimage.gaussian_filter(rng.normal(size=shape), 25) * 40
    crowns = ndimage.gaussian_filter(rng.normal(size=shape), 1.5) * 5
    heights = np.maximum(14 + 9 * stands + 6 * crowns, 0)
    heights[stands < -0.4] = 0
    return np.round(heights, 3).astype(np.float32)


def write_heights(
    path: Path, *bands: np.ndarray, gsd: float = 1.0, west: float = WEST, north: float = NORTH,
    crs: str | None = UTM, names: Sequence[str] = (), nodata: float | None = float("nan"), **profile: object,
) -> Path:  # fmt: skip
    """Write bands (h, w) as a north-up GeoTIFF; `tags` in `profile` go into its metadata."""
    tags = profile.pop("tags", {})
    h, w = bands[0].shape
    settings = {
        "driver": "GTiff", "height": h, "width": w, "count": len(bands), "crs": crs,
        "dtype": bands[0].dtype.name, "transform": Affine(gsd, 0, west, 0, -gsd, north), "nodata": nodata,
        **profile,
    }  # fmt: skip
    with rasterio.open(path, "w", **settings) as dataset:
        for i, band in enumerate(bands, 1):
            dataset.write(band, i)
        if names:
            dataset.descriptions = tuple(names)
        dataset.update_tags(**tags)  # type: ignore[arg-type]
    return path
