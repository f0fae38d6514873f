"""`canopy data chm` through the command line."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest
import rasterio

_spec = importlib.util.spec_from_file_location(
    "lidar_files", Path(__file__).parents[1] / "labels" / "lidar_files.py"
)
lidar_files = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(lidar_files)
WEST, SOUTH, UTM = lidar_files.WEST, lidar_files.SOUTH, lidar_files.UTM


@pytest.fixture
def cloud(tmp_path) -> Path:
    """20 m of level ground with a box of vegetation 8 m high."""
    x, y = lidar_files.field(20.0)
    tree = (np.abs(x - WEST - 10) < 4) & (np.abs(y - SOUTH - 10) < 4)
    z = 100 + np.where(tree, 8.0, 0.0)
    return lidar_files.write_cloud(tmp_path / "c.laz", x, y, z, np.where(tree, 5, 2))


def raster(
    path: Path,
    value: float | np.ndarray,
    crs: str | None = UTM,
    west: float = WEST,
    nodata: float | None = -9999,
) -> Path:
    pixels = np.broadcast_to(np.float32(value), (1, 20, 30)).astype(np.float32)
    with rasterio.open(
        path, "w", driver="GTiff", count=1, dtype="float32", height=20, width=30, crs=crs, nodata=nodata,
        transform=rasterio.Affine(1, 0, west, 0, -1, SOUTH + 20),
    ) as dataset:  # fmt: skip
        dataset.write(pixels)
    return path


def test_points_to_a_map_and_a_word_about_it(canopy, cloud, heights, tmp_path):
    ran = canopy("data", "chm", cloud, "-o", "chm.tif")
    assert ran.code == 0 and "20 x 20 px of 1 m" in ran.out and "ground from class" in ran.out
    height = heights(tmp_path / "chm.tif")
    assert height[10, 10] == pytest.approx(8, abs=0.02) and height[1, 1] == 0
    assert canopy("data", "chm", cloud, "-o", "chm.tif").code == 2  # it exists
    ran = canopy("data", "chm", cloud, "-o", "chm.tif", "--overwrite", "--json", "--gsd", "0.5", "--crs", UTM)
    told = json.loads(ran.out)
    assert ran.code == 0 and told["width_px"] == 40 and told["ground"] == "class" and ran.err == ""
    assert canopy("data", "chm", cloud, "-o", "q.tif", "-q", "--bounds-crs", UTM, "--bounds",
                  f"{WEST + 5},{SOUTH + 5},{WEST + 9},{SOUTH + 11}").out == ""  # fmt: skip
    assert heights(tmp_path / "q.tif").shape == (6, 4)


def test_a_surface_minus_a_terrain(canopy, heights, tmp_path):
    top = np.full((20, 30), 112.0, np.float32)
    top[:, :10], top[5, 5], top[0, 0] = 99.5, -9999, 900.0
    dsm, dtm = raster(tmp_path / "dsm.tif", top), raster(tmp_path / "dtm.tif", 100.0)
    ran = canopy("data", "chm", "--dsm", dsm, "--dtm", dtm, "-o", "o.tif")
    height = heights(tmp_path / "o.tif")
    assert ran.code == 0 and height[7, 20] == 12 and height[7, 2] == 0
    assert np.isnan(height[5, 5]) and np.isnan(height[0, 0]) and np.isfinite(height).sum() == 598
    with rasterio.open(tmp_path / "o.tif") as made:
        assert made.count == 3 and np.isnan(made.read(2)).all() and made.read(3).sum() == 598
    ran = canopy("data", "chm", "--dsm", dsm, "--dtm", dtm, "-o", "ft.tif", "--units", "ft")
    assert heights(tmp_path / "ft.tif")[7, 20] == pytest.approx(12 * 0.3048, abs=1e-3)
    # A coarser grid averages; the lattice is the CRS's.
    ran = canopy("data", "chm", "--dsm", dsm, "--dtm", dtm, "-o", "two.tif", "--gsd", "2", "--json")
    assert json.loads(ran.out)["width_px"] == 15
    assert heights(tmp_path / "two.tif")[5, 12] == 12


def test_bad_pairs_of_rasters_exit_2(canopy, tmp_path):
    high, low = raster(tmp_path / "high.tif", 112.0), raster(tmp_path / "low.tif", 100.0)
    bare, far = (
        raster(tmp_path / "bare.tif", 1.0, crs=None),
        raster(tmp_path / "far.tif", 1.0, west=WEST + 900),
    )
    for words, said in (
        (("--dsm", low, "--dtm", high), "Swap"),
        (("--dsm", high), "both"),
        (("--dsm", high, "--dtm", far), "overlap"),
        (("--dsm", bare, "--dtm", low), "--crs"),
        (("--dsm", high, "--dtm", tmp_path / "none.tif"), "no such file"),
        ((tmp_path / "c.laz", "--dsm", high, "--dtm", low), "one or the other"),
        (("--dsm", high, "--dtm", low, "--fill-px", "3", "--water", "keep"), "Leave --water, --fill-px out"),
    ):
        ran = canopy("data", "chm", *words, "-o", "o.tif")
        assert ran.code == 2 and said in ran.error_line, ran.err
        assert not (tmp_path / "o.tif").exists() and not list(tmp_path.glob(".*partial"))


def test_bad_clouds_exit_2_in_one_line_and_write_nothing(canopy, cloud, tmp_path):
    (tmp_path / "cut.laz").write_bytes(cloud.read_bytes()[:3000])
    (tmp_path / "empty.laz").write_bytes(b"")
    x, y = lidar_files.field(10.0)
    lidar_files.write_cloud(tmp_path / "bare.laz", x, y, x * 0, 2, crs=None)
    lidar_files.write_cloud(tmp_path / "air.laz", x, y, x * 0, 5)
    before = {p.name for p in tmp_path.iterdir()}
    for words, said in (
        (("cut.laz",), "cut.laz"),
        (("empty.laz",), "empty.laz"),
        (("none.laz",), "no such file"),
        (("bare.laz",), "--crs"),
        (("bare.laz", "--crs", "EPSG:2154"), "--crs"),
        (("air.laz", "--ground", "class"), "no ground points"),
        (("c.laz", "--ground", "x"), "--ground"),
        (("c.laz", "--gsd", "0"), "--gsd"),
        (("c.laz", "--bbox", "0,0", "--size-m", "10"), "no data in the area"),
        ((), "no point cloud"),
    ):
        ran = canopy("data", "chm", *words, "-o", "o.tif")
        assert ran.code == 2 and said in ran.error_line and "Traceback" not in ran.err, ran.err
        assert {p.name for p in tmp_path.iterdir()} == before


def test_json_stays_clean_when_the_cloth_library_talks(tmp_path, capfd):
    x, y = lidar_files.field(20.0)
    lidar_files.write_cloud(tmp_path / "u.laz", x, y, x * 0 + 50, 0)
    capfd.readouterr()
    from canopy.labels.chm import ChmOptions, chm_from_points

    chm_from_points([tmp_path / "u.laz"], tmp_path / "o.tif", ChmOptions(ground="csf"))
    assert capfd.readouterr().out == ""


def test_help_has_examples(canopy):
    ran = canopy("data", "chm", "--help")
    assert ran.code == 0 and "canopy data chm tile1.laz" in ran.out and "--pit-width-m" in ran.out


@pytest.mark.parametrize("fill", [-9999.0, float(np.finfo(np.float32).min), 32767.0])
def test_undeclared_nodata_in_both_is_no_terrain_of_0_m(canopy, heights, tmp_path, fill):
    top, ground = np.full((20, 30), 112.0, np.float32), np.full((20, 30), 100.0, np.float32)
    top[:, :10] = ground[:, :10] = fill
    ground[0, 20] = fill  # and in one of them
    dsm, dtm = (
        raster(tmp_path / "dsm.tif", top, nodata=None),
        raster(tmp_path / "dtm.tif", ground, nodata=None),
    )
    assert canopy("data", "chm", "--dsm", dsm, "--dtm", dtm, "-o", "o.tif").code == 0
    height = heights(tmp_path / "o.tif")
    assert np.isnan(height[:, :10]).all() and np.isnan(height[0, 20]) and height[5, 20] == 12


def test_zero_in_both_is_told(canopy, tmp_path):
    top, ground = np.full((20, 30), 112.0, np.float32), np.full((20, 30), 100.0, np.float32)
    top[:, :10] = ground[:, :10] = 0
    dsm, dtm = raster(tmp_path / "dsm.tif", top), raster(tmp_path / "dtm.tif", ground)
    ran = canopy("data", "chm", "--dsm", dsm, "--dtm", dtm, "-o", "o.tif")
    assert ran.code == 0 and "both exactly 0 m in 33%" in ran.err


@pytest.mark.parametrize(
    ("one", "other"), [("EPSG:32617+5703", "EPSG:32617+5773"), ("EPSG:4979", "EPSG:4326+5773")]
)
def test_two_vertical_datums_are_refused(canopy, tmp_path, one, other):
    dsm, dtm = raster(tmp_path / "dsm.tif", 112.0, crs=one), raster(tmp_path / "dtm.tif", 100.0, crs=other)
    ran = canopy("data", "chm", "--dsm", dsm, "--dtm", dtm, "-o", "o.tif")
    assert ran.code == 2 and "same vertical datum" in ran.error_line and not (tmp_path / "o.tif").exists()
