"""The default model on ten real images: its heights are those of the recorded release."""

from __future__ import annotations

from pathlib import Path

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


def path_of(shared: Path, name: str) -> Path:
    """An image of the data pack."""
    return shared / "data" / "pairs" / "rgb" / f"{name}.tif"


@pytest.fixture(scope="module")
def network():
    import canopy

    return canopy.load_model("default")


@pytest.mark.parametrize("name", IMAGES)
def test_the_network(shared, network, name: str) -> None:
    """Heights of whole images, as they are (NEON's at 0.1 m, for which it is not meant)."""
    import torch

    with rasterio.open(path_of(shared, name)) as image:
        rgb = torch.from_numpy(image.read()[None].astype(np.float32) / 255)
    with torch.inference_mode():
        heights = network(rgb)[0, 0].numpy()
    support.check_heights(f"default_{name}", heights, stride=8)


def test_a_map_of_half_a_metre(shared, network) -> None:
    """A corner of a tile: a forward pass takes seconds."""
    import canopy

    path = path_of(shared, IMAGES[0])
    with rasterio.open(path) as image:
        west, _, _, north = image.bounds
        area = {"bounds": (west, north - 90, west + 110, north), "bounds_crs": image.crs.to_wkt()}
    chm = canopy.predict(path, model=network, backend="torch", device="cpu", **area)
    support.check_heights("default_map", chm.values)


def test_a_map_of_a_tenth_of_a_metre(shared, tmp_path) -> None:
    """With all its bands and a picture."""
    words = ("--interval", 0.9, "--quality-band", "--quicklook", "--backend", "torch", "-o", "chm.tif")
    support.run(tmp_path, "predict", path_of(shared, "neon_mlbs_4"), *words)
    for band in (1, 2, 3):
        support.check_heights(f"default_bands_{band}", support.metres(tmp_path / "chm.tif", band), stride=1)
    with Image.open(tmp_path / "chm.png") as picture:
        assert min(picture.size) > 100
