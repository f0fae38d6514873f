"""Run the command line in this process, on small images made on the fly, with a small model."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import rasterio


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


@pytest.fixture
def refused(canopy: Callable, tmp_path: Path) -> Callable[..., str]:
    """`refused("predict", ...)`: the one line of a command that exits with 2 and writes nothing."""

    def run(*words: object) -> str:

        def times() -> dict[Path, int]:
            return {path: path.lstat().st_mtime_ns for path in tmp_path.rglob("*")}

        before = times()
        ran = canopy(*words)
        assert ran.code == 2, ran.err
        assert ran.out == "" and "Traceback" not in ran.err
        assert times() == before, "it wrote something"
        return ran.error_line

    return run


@pytest.fixture(scope="session")
def model_file(small_model: Path) -> Path:
    """A model small enough to run in milliseconds."""
    return small_model


@pytest.fixture
def predict(canopy: Callable, model_file: Path) -> Callable[..., Ran]:
    """`predict("a.tif", ..., out="chm.tif")`: `canopy predict`, which must do it."""

    def run(*words: object, out: str = "chm.tif") -> Ran:
        done = canopy("predict", *words, "--model", model_file, "-o", out, "--overwrite")
        assert done.code == 0, done.err
        return done

    return run


def texture(height: int, width: int, seed: int = 0) -> np.ndarray:
    """uint8 (3, height, width): smooth blobs of green and brown, never 0."""
    from scipy import ndimage

    rng = np.random.default_rng(seed)
    noise = ndimage.gaussian_filter(rng.normal(size=(3, height, width)), (0, 3, 3))
    noise = noise / max(float(noise.std()), 1e-9)
    return np.clip(noise * 35 + np.array([90, 110, 70])[:, None, None], 20, 230).astype(np.uint8)


@pytest.fixture
def rgb() -> np.ndarray:
    """The picture of `make_image`."""
    return texture(100, 120)


@pytest.fixture
def make_image(make_tif: Callable[..., Path]) -> Callable[..., Path]:
    """`make_image("a.tif", pixels, ...)`: `make_tif` with 100 x 120 px of 0.5 m in UTM 18N by default."""

    def make(name: str = "image.tif", pixels: np.ndarray | None = None, **given: object) -> Path:
        place = {"crs": "EPSG:32618", "transform": rasterio.Affine(0.5, 0, 500_000, 0, -0.5, 4_882_000)}
        return make_tif(texture(100, 120) if pixels is None else pixels, name, **place | given)

    return make


@pytest.fixture
def heights() -> Callable:
    """`heights("chm.tif")` -> (height, width) metres with NaN where there is none."""

    def read(path: object) -> np.ndarray:
        with rasterio.open(str(path)) as dataset:
            return dataset.read(1, masked=True).astype(np.float32).filled(np.nan) * dataset.scales[0]

    return read
