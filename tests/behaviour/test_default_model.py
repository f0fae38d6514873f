"""The default model on ten real images: its heights are those of the recorded release."""

from __future__ import annotations

import csv

import behaviour_support as support
import numpy as np
import pytest
import rasterio
from PIL import Image

pytestmark = pytest.mark.slow

IMAGES = (
    "ky_magoffin_r08c02", "ky_courthouse_r01c01", "ky_blackmtn_r04c03", "ky_frankfort_r04c05",
    "ky_baldrock_r00c04", "ky_natbridge_r00c01", "or_autzen_r04c00", "neon_mlbs_4", "neon_osbs_6",
    "neon_osbs_25",
)  # fmt: skip
SIDE_M = 128.0


@pytest.fixture(scope="module")
def network():
    import canopy

    return canopy.load_model("default")


@pytest.mark.parametrize("name", IMAGES)
def test_heights(shared, network, name: str) -> None:
    """The middle of an image, as a forward pass takes a second; NEON's plots whole, of 0.1 m."""
    import canopy

    path = shared / "data" / "pairs" / "rgb" / f"{name}.tif"
    with rasterio.open(path) as image:
        west, south, east, north = image.bounds
        crs = image.crs.to_wkt()
    x, y, half = (west + east) / 2, (south + north) / 2, SIDE_M / 2
    area = (
        {"bounds": (x - half, y - half, x + half, y + half), "bounds_crs": crs}
        if east - west > SIDE_M
        else {}
    )
    chm = canopy.predict(path, model=network, backend="torch", device="cpu", **area)
    support.check_heights(f"default_{name}", chm.values, stride=6 if area else 1)


def test_the_recorded_heights_are_sane(shared) -> None:
    """Goldens are heights of trees: they follow the lidar."""
    with (shared / "data" / "manifest.csv").open(newline="") as file:
        lidar = {row["id"]: float(row["chm_mean_m"]) for row in csv.DictReader(file)}
    means = {}
    for name in IMAGES:
        with np.load(support.GOLDENS / f"default_{name}.npz") as golden:
            means[name] = float(golden["mm"][golden["mm"] >= 0].mean()) / 1000
    assert np.corrcoef([means[n] for n in IMAGES], [lidar[n] for n in IMAGES])[0, 1] > 0.6


def test_bands_and_a_picture_of_the_default(shared, tmp_path) -> None:
    image = shared / "data" / "pairs" / "rgb" / "neon_mlbs_4.tif"
    words = ("--interval", 0.9, "--quality-band", "--quicklook", "--backend", "torch", "-o", "chm.tif")
    support.run(tmp_path, "predict", image, *words)
    for band in (1, 2, 3):
        support.check_heights(f"default_bands_{band}", support.metres(tmp_path / "chm.tif", band), stride=1)
    with Image.open(tmp_path / "chm.png") as picture:
        assert min(picture.size) > 100
