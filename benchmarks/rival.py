"""The plain loop that the published notebook predicts with, as a rival in `throughput.py`.

Written from its description (256 px windows, step 192, a Gaussian taper, PyTorch eager): the whole image and
two whole maps are held in memory, each window goes through the network alone, and the weighted sum is divided
by the sum of the weights. The network is this project's `HeightModel` with the same weights.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import numpy as np

WINDOW_PX, STEP_PX = 256, 192
TAPER_SIGMA = 0.5  # of the window, in units of half its side


def starts(length: int) -> list[int]:
    """Where windows begin along an axis: every `STEP_PX`, the last one moved inside."""
    last = max(length - WINDOW_PX, 0)
    return [*range(0, last, STEP_PX), last]


def windows(height: int, width: int) -> int:
    """How many windows the loop predicts."""
    return len(starts(height)) * len(starts(width))


def taper() -> np.ndarray:
    """Gaussian weights (256, 256), 1 in the middle."""
    x = np.linspace(-1, 1, WINDOW_PX)
    bell = np.exp(-0.5 * (x / TAPER_SIGMA) ** 2)
    return bell[:, None] * bell[None, :]


def predict_loop(model: Any, image: Path, out: Path) -> float:
    """Read all of `image`, predict window after window, write all of `out`; seconds spent in the model."""
    import rasterio
    import torch

    with rasterio.open(image) as dataset:
        rgb, profile = dataset.read([1, 2, 3]), dataset.profile
    pixels = torch.from_numpy(rgb.astype(np.float32) / 255)
    height, width = rgb.shape[1:]
    total, weight, bell = np.zeros((height, width)), np.zeros((height, width)), taper()
    seconds = 0.0
    with torch.inference_mode():
        for row in starts(height):
            for col in starts(width):
                here = np.s_[row : row + WINDOW_PX, col : col + WINDOW_PX]
                started = time.perf_counter()
                predicted = model(pixels[None, :, *here])
                seconds += time.perf_counter() - started
                total[here] += predicted.numpy()[0, 0] * bell
                weight[here] += bell
    heights = (total / weight).astype(np.float32)
    profile.update(
        driver="GTiff", count=1, dtype="float32", compress="deflate", photometric=None, nodata=None
    )
    profile = {key: value for key, value in profile.items() if value is not None}
    with rasterio.open(out, "w", **profile) as dataset:
        dataset.write(heights, 1)
    return seconds


def compressed(model: Any) -> Any:
    """The published "compressed" way: Linear layers multiply dynamically quantised 8-bit integers.

    Raises:
        ValueError: the model has none.
    """
    import torch

    if not any(isinstance(part, torch.nn.Linear) for part in model.modules()):
        raise ValueError("no Linear layers to quantise")
    return torch.ao.quantization.quantize_dynamic(model, {torch.nn.Linear}, dtype=torch.qint8)
