"""Run the command line in this process, on small images made on the fly, with a small model."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import rasterio
from rasterio.enums import ColorInterp


@dataclass(frozen=True)
class Ran:
    """What a command left behind."""

    code: int
    out: str
    err: str

    @property
    def error_line(self) -> str:
        """The last line on stderr: the one-line error of a command that failed."""
        return self.err.strip().splitlines()[-1]


@pytest.fixture
def canopy(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Callable:
    """`canopy("predict", "a.tif", ...)` in `tmp_path`, through the real entry point."""
    from canopy.cli.main import main

    monkeypatch.chdir(tmp_path)

    def run(*words: object) -> Ran:
        monkeypatch.setattr(sys, "argv", ["canopy", *(str(word) for word in words)])
        capsys.readouterr()
        code: object = 0
        try:
            main()
        except SystemExit as stop:
            code = stop.code
        captured = capsys.readouterr()
        return Ran(int(code or 0), captured.out, captured.err)  # type: ignore[call-overload]

    return run


@pytest.fixture(scope="session")
def model_file(small_model: Path) -> Path:
    """A model small enough to run in milliseconds."""
    return small_model


UTM = "EPSG:32618"
WEST, NORTH, GSD = 500_000.0, 4_882_000.0, 0.5


def texture(height: int, width: int, seed: int = 0) -> np.ndarray:
    """uint8 (3, height, width): smooth blobs of green and brown, never 0."""
    from scipy import ndimage

    rng = np.random.default_rng(seed)
    noise = ndimage.gaussian_filter(rng.normal(size=(3, height, width)), (0, 3, 3))
    noise = noise / max(float(noise.std()), 1e-9)
    return np.clip(noise * 35 + np.array([90, 110, 70])[:, None, None], 20, 230).astype(np.uint8)


@pytest.fixture
def make_image(tmp_path: Path) -> Callable:
    """`make_image("a.tif", pixels, ...)` writes a GeoTIFF; 100 x 120 px of 0.5 m in UTM 18N by default."""

    def make(
        name: str = "image.tif",
        pixels: np.ndarray | None = None,
        *,
        crs: str | None = UTM,
        transform: rasterio.Affine | None = None,
        colours: tuple[str, ...] | None = None,
        descriptions: tuple[str, ...] | None = None,
        colormap: dict | None = None,
        mask: np.ndarray | None = None,
        **profile: object,
    ) -> Path:
        pixels = texture(100, 120) if pixels is None else pixels
        path = tmp_path / name
        transform = transform or rasterio.Affine(GSD, 0, WEST, 0, -GSD, NORTH)
        with rasterio.open(
            path, "w", driver="GTiff", count=len(pixels), dtype=pixels.dtype, height=pixels.shape[1],
            width=pixels.shape[2], crs=crs, transform=transform, **profile,
        ) as dataset:  # fmt: skip
            if colours:
                dataset.colorinterp = [getattr(ColorInterp, colour) for colour in colours]
            for index, text in enumerate(descriptions or (), 1):
                dataset.set_band_description(index, text)
            if colormap:
                dataset.write_colormap(1, colormap)
            dataset.write(pixels)
            if mask is not None:
                dataset.write_mask(mask)
        return path

    return make


@pytest.fixture
def heights() -> Callable:
    """`heights("chm.tif")` -> (height, width) metres with NaN where there is none."""

    def read(path: object) -> np.ndarray:
        with rasterio.open(str(path)) as dataset:
            return dataset.read(1, masked=True).astype(np.float32).filled(np.nan) * dataset.scales[0]

    return read
