"""Two small maps of known heights with their image, a server of its own process, and a real browser."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import rasterio
from viewer_maps import GRID, SHAPE, UTM, heights_m, start_serving, write_map


@pytest.fixture(scope="session")
def maps(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with first.tif (interval, dates, flags), second.tif (10 m higher) and rgb.tif."""
    folder = tmp_path_factory.mktemp("maps")
    heights = heights_m()
    days, flags = np.full(SHAPE, 19_919, np.float32), np.full(SHAPE, 5, np.float32)  # 2024-07-15; 1 and 4
    bands = np.stack([heights, heights - 1.25, heights + 2.5, days, flags])
    names = "canopy_height", "height_lower", "height_upper", "acquisition_date", "quality"
    write_map(folder / "first.tif", bands, names)
    write_map(folder / "second.tif", heights[None] + 10)
    rgb = np.zeros((3, *SHAPE), np.uint8)
    rgb[0] = 200  # red: no height is
    rgb[1:] = np.random.default_rng(4).integers(20, 40, (2, *SHAPE))
    with rasterio.open(
        folder / "rgb.tif", "w", driver="GTiff", count=3, height=SHAPE[0], width=SHAPE[1], dtype="uint8",
        crs=UTM, transform=GRID, photometric="RGB",
    ) as file:  # fmt: skip
        file.write(rgb)
    return folder


@pytest.fixture(scope="session")
def address(maps: Path) -> Iterator[str]:
    """Both maps, served."""
    pytest.importorskip("starlette", reason="the extra serve is not installed")
    process, url = start_serving(str(maps / "first.tif"), str(maps / "second.tif"))
    yield url
    process.terminate()
    process.communicate(timeout=20)


@pytest.fixture(scope="session")
def browser() -> Iterator[Any]:
    """Chromium without a window. In CI it must be there."""
    program = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    try:
        from playwright.sync_api import sync_playwright
    except ImportError:
        program = None
    if program is None:
        message = "no chromium on this machine, or no playwright"
        if os.environ.get("CI") == "true":
            pytest.fail(f"{message}, and CI must not skip")
        pytest.skip(message)
    flags = (
        "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking",
        "--disable-component-update", "--disable-sync",
    )  # fmt: skip
    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=program, args=list(flags))
        yield chromium
        chromium.close()
