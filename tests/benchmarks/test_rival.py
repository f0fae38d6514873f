"""The plain loop is a fair rival: it covers every pixel, and loses nothing of the model's heights."""

from __future__ import annotations

import numpy as np
import pytest
import rasterio
import torch


@pytest.mark.parametrize("length", [256, 257, 448, 640, 1000])
def test_windows_cover(script, length):
    rival = script("rival")
    covered = np.zeros(length, int)
    for start in rival.starts(length):
        assert 0 <= start <= length - 256
        covered[start : start + 256] += 1
    assert covered.min() >= 1
    assert rival.windows(length, 256) == len(rival.starts(length))


def test_step_of_192_sees_the_published_share_of_pixels(script):
    rival = script("rival")
    side = 256 + 192 * 20
    assert rival.windows(side, side) * 256**2 / side**2 == pytest.approx((256 / 192) ** 2, rel=0.05)


def test_heights_come_out_as_the_model_gives_them(script, tmp_path):
    common, rival = script("common"), script("rival")
    image = common.make_image(tmp_path / "a.tif", 500, compress="deflate")
    seconds = rival.predict_loop(lambda rgb: 30 * rgb[:, 1:2], image, tmp_path / "b.tif")
    with rasterio.open(image) as source, rasterio.open(tmp_path / "b.tif") as made:
        assert np.allclose(made.read(1), source.read(2) * (30 / 255), atol=1e-4)
        assert made.crs == source.crs and made.transform == source.transform
    assert seconds >= 0


@pytest.mark.filterwarnings("ignore:torch")
def test_compressed_keeps_heights_near(script, tiny_model):
    from canopy.models.registry import load_model

    model = load_model(tiny_model)
    rgb = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    small = script("rival").compressed(model)
    with torch.inference_mode():
        apart = (model(rgb) - small(rgb)).abs().max()
    assert 0 < apart < 1
