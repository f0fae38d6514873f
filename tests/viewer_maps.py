"""Small maps of known heights, and `canopy serve` as a process of its own, for tests/viewer."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import rasterio
from affine import Affine
from rasterio.enums import Resampling
from scipy import ndimage

UTM = "EPSG:32619"
GRID = Affine(0.5, 0, 315_900, 0, -0.5, 4_883_900)
SHAPE = 300, 360
BITS = "1 shadow, 2 haze, 4 exposure"


def heights_m() -> np.ndarray:
    """Smooth heights of 0 to 20 m with a hole, float32."""
    noise = ndimage.gaussian_filter(np.random.default_rng(3).normal(size=SHAPE), 12)
    heights = (20 * (noise - noise.min()) / np.ptp(noise)).astype(np.float32)
    heights[40:70, 50:90] = np.nan
    return heights


def write_map(path: Path, bands: np.ndarray, names: tuple[str, ...] = ("canopy_height",)) -> Path:
    """A GeoTIFF as `canopy predict` leaves it, with overviews."""
    with rasterio.open(
        path, "w", driver="GTiff", count=len(bands), height=SHAPE[0], width=SHAPE[1], dtype="float32",
        crs=UTM, transform=GRID, nodata=np.nan, tiled=True, blockxsize=128, blockysize=128,
    ) as file:  # fmt: skip
        file.write(bands)
        file.descriptions = names
        file.units = ["m" if name != "quality" else "1" for name in names]
        file.update_tags(CANOPY_MODEL="<i>m</i>", CANOPY_IMAGERY="rgb.tif", CANOPY_DATES="2024-07-15")
        file.update_tags(CANOPY_INTERVAL="0.9", CANOPY_QUALITY_BITS=BITS)
        file.update_tags(CANOPY_IMAGERY_ATTRIBUTION="(c) A & B")
        file.build_overviews([2, 4], Resampling.average)
    return path


def start_serving(*arguments: str) -> tuple[subprocess.Popen[str], str]:
    """`canopy serve` as a user runs it; the process and the address that it prints."""
    process = subprocess.Popen(
        [sys.executable, "-m", "canopy", "serve", *arguments],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stdout is not None
    line = process.stdout.readline()
    if not line:
        raise RuntimeError(process.communicate()[1])
    return process, line.split()[0]
