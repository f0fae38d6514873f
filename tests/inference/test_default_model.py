"""The embedded model on real and synthetic images: heights that mean something, cuts that do not matter."""

from __future__ import annotations

import csv
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import rasterio

import canopy
from canopy.geo.grid import Grid
from canopy.imagery.open import open_imagery
from canopy.inference.engine import predict_grid
from canopy.inference.lattice import Lattice
from canopy.inference.output import ArraySink


@pytest.fixture(scope="module")
def model():
    return canopy.load_model("default")


def heights_of(model, source, grid: Grid, **options: object) -> np.ndarray:
    """Heights (h, w) in metres, NaN where invalid."""
    sink = ArraySink(grid)
    predict_grid(model, source, grid, sink, **options)  # type: ignore[arg-type]
    return sink.values[0]


@pytest.fixture(scope="module")
def demo(model) -> SimpleNamespace:
    """A 200 m square of the demo scene at the model's own scale, predicted as a whole."""
    source = open_imagery("demo")
    area = canopy.AOI.from_bbox((44.083, -71.296), 200)
    grid = area.grid(source.native_crs, model.config.gsd_m)
    return SimpleNamespace(source=source, grid=grid, heights=heights_of(model, source, grid))


def test_a_sub_area_equals_the_whole(model, demo) -> None:
    """At other windows and batch sizes; the promise is 0.01 m, the truth is float noise."""
    rng = np.random.default_rng(4)
    for window_px, batch_size in ((256, 1), (1500, 3)):
        height, width = rng.integers(20, 140, 2)
        top, left = rng.integers(0, demo.grid.height - height), rng.integers(0, demo.grid.width - width)
        part = demo.grid.window(int(top), int(left), int(height), int(width))
        found = heights_of(model, demo.source, part, window_px=window_px, batch_size=batch_size)
        expected = demo.heights[top : top + height, left : left + width]
        np.testing.assert_allclose(found, expected, atol=1e-3)


def test_heights_follow_the_scenes_truth(demo) -> None:
    truth, valid = demo.source.truth(demo.grid)
    assert valid.all() and np.isfinite(demo.heights).all()
    # In 4 m cells: crowns are drawn to the pixel in the truth, no model places them so finely.
    cell = max(1, round(4 / demo.grid.pixel[0]))
    rows, cols = (n // cell * cell for n in truth.shape)
    coarse = [
        a[:rows, :cols].reshape(rows // cell, cell, cols // cell, cell).mean(axis=(1, 3))
        for a in (truth, demo.heights)
    ]
    assert np.corrcoef(coarse[0].ravel(), coarse[1].ravel())[0, 1] > 0.55
    assert abs(coarse[0].mean() - coarse[1].mean()) < 5


def test_no_seams(model, demo) -> None:
    """Heights change across the lines of the lattice no more than elsewhere."""
    lattice = Lattice.of(model.config.crop_px, model.config.patch_px)
    ratios = []
    for axis in (0, 1):
        step = np.abs(np.diff(demo.heights, axis=axis)).mean(axis=1 - axis)
        place = np.arange(step.size) + 1 + demo.grid.origin_rc[axis]
        # A crop's served part begins at a multiple of the stride and ends `overlap` pixels further on.
        on_line = (place % lattice.stride_px == 0) | (place % lattice.stride_px == lattice.overlap_px)
        ratios.append(step[on_line].mean() / step[~on_line].mean())
    assert max(ratios) < 1.5, ratios


# ---- real images ------------------------------------------------------------------------------
def val_rows(shared: Path) -> tuple[list[dict[str, str]], float]:
    """Every sixth lidar tile of the val split, and the mean height of the train split in metres."""
    with open(shared / "data" / "manifest.csv", newline="") as file:
        rows = [row for row in csv.DictReader(file) if not row["id"].startswith("neon")]
    train = [row for row in rows if row["split"] == "train"]
    weights = [float(row["valid_frac"]) for row in train]
    mean_m = float(np.average([float(row["chm_mean_m"]) for row in train], weights=weights))
    return [row for row in rows if row["split"] == "val"][::6], mean_m


def test_real_val_images_beat_the_training_mean_and_follow_the_lidar(model, shared: Path) -> None:
    rows, train_mean_m = val_rows(shared)
    predicted, measured = [], []
    for row in rows:
        chm = canopy.predict(shared / "data" / row["rgb_path"], model=model, gsd=1.0)
        with rasterio.open(shared / "data" / row["chm_path"]) as lidar:
            truth = lidar.read(1).astype(np.float32) * 0.01
            known = lidar.read(1) != 65535
            assert chm.rio.bounds() == pytest.approx(lidar.bounds)
        known &= np.isfinite(chm.values)
        predicted.append(chm.values[known])
        measured.append(truth[known])
    heights, truth = np.concatenate(predicted), np.concatenate(measured)
    assert heights.size > 50_000
    assert np.abs(heights - truth).mean() < 0.7 * np.abs(train_mean_m - truth).mean()
    assert np.corrcoef(heights, truth)[0, 1] > 0.6


def test_a_real_image_maps_to_its_own_pixels(model, shared: Path) -> None:
    """The default grid of a 0.5 m UTM image is the image's own, and a cut of it has the same heights."""
    row = val_rows(shared)[0][0]
    path = shared / "data" / row["rgb_path"]
    whole = canopy.predict(path, model=model)
    with rasterio.open(path) as image:
        assert whole.rio.crs.to_epsg() == image.crs.to_epsg()
        west, south, east, north = image.bounds
    if model.config.gsd_m == 0.5:
        assert whole.rio.bounds() == (west, south, east, north)
    part = canopy.predict(
        path,
        model=model,
        bounds=(west + 40, south + 70, west + 90, south + 100),
        bounds_crs=whole.rio.crs.to_wkt(),
    )
    same = whole.sel(x=part.x, y=part.y, method="nearest", tolerance=0.01)
    np.testing.assert_allclose(part.values, same.values, atol=0.01)
