"""Cutting the pack: real files, and what counts as missing image."""

from __future__ import annotations

import csv

import numpy as np
import pytest
import rasterio

from canopy.chips.cut import read_pack
from canopy.chips.screen import mark_missing
from canopy.errors import DataError


def test_shadows_are_image_and_wide_black_is_not():
    rgb = np.full((3, 40, 40), 90, np.uint8)
    rgb[:, :, :10] = 2  # JPEG noise in a nodata collar
    rgb[:, 30:33, 30:33] = 0  # a deep shadow
    marked = mark_missing(rgb)
    assert (marked[:, :, :10] == 0).all() and (marked[:, :, 10:].min(axis=0) >= 1).all()


@pytest.fixture
def pack(shared, tmp_path):
    """A pack of three real pairs."""
    with (shared / "data" / "manifest.csv").open(newline="") as file:
        rows = [r for r in csv.DictReader(file) if r["id"] in ("or_autzen_r00c00", "neon_osbs_1")]
    with (tmp_path / "manifest.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    (tmp_path / "pairs").symlink_to(shared / "data" / "pairs")
    return tmp_path


def test_pairs_lie_on_one_grid(pack, shared):
    chips, digest = read_pack(pack)
    assert len(chips) == 2 and len(digest) == 64
    for chip in chips:
        h, w = chip.chm_m.shape
        assert chip.rgb.shape == (3, 2 * h, 2 * w) and chip.rgb.dtype == np.uint8
        with rasterio.open(shared / f"data/pairs/chm/{chip.row.id}.tif") as file:
            cm = file.read(1)
        assert np.array_equal(np.isnan(chip.chm_m), cm == 65535)
        np.testing.assert_allclose(chip.chm_m[cm != 65535], cm[cm != 65535] / 100, atol=1e-3)
    plot = next(c for c in chips if c.row.kind == "neon")
    with rasterio.open(shared / f"data/pairs/rgb/{plot.row.id}.tif") as file:
        fine = file.read().astype(float).reshape(3, 40, 5, 40, 5).mean(axis=(2, 4))
    assert np.abs(plot.rgb - fine).max() <= 1.5
    assert read_pack(pack)[1] == digest


def test_heights_of_other_pixels_are_refused(pack):
    manifest = pack / "manifest.csv"
    text = manifest.read_text()
    for size in ("2.0", "one", ""):
        manifest.write_text(text.replace(",0.5,1.0,", f",0.5,{size},"))
        with pytest.raises(DataError, match=r"chm_res_m is .*expected 1"):
            read_pack(pack)


def test_missing_manifest_and_columns(tmp_path):
    with pytest.raises(DataError, match=r"no manifest.csv"):
        read_pack(tmp_path)
    (tmp_path / "manifest.csv").write_text("id,site\n1,a\n")
    with pytest.raises(DataError, match="rgb_path"):
        read_pack(tmp_path)
