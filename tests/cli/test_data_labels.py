"""`canopy data chm | gedi` through the command line."""

from __future__ import annotations

import json
from pathlib import Path

import h5py
import laspy
import numpy as np
import pytest
import rasterio
from pyproj import CRS

from canopy.labels.shots import read_shots

UTM = "EPSG:32619"
WEST, SOUTH = 500_000.0, 4_880_000.0


# ---- chm --------------------------------------------------------------------------------------
def write_cloud(path: Path, classes: int = 2, crs: str | None = UTM) -> Path:
    """20 m of level ground, or whatever else the class is, two points a metre."""
    x, y = (a.ravel() for a in np.meshgrid(np.arange(0.25, 20, 0.5), np.arange(0.25, 20, 0.5)))
    header = laspy.LasHeader(point_format=6, version="1.4")
    header.scales, header.offsets = np.full(3, 0.01), np.array([WEST, SOUTH, 0.0])
    if crs is not None:
        header.add_crs(CRS.from_user_input(crs))
    cloud = laspy.LasData(header)
    cloud.x, cloud.y, cloud.z = WEST + x, SOUTH + y, np.full(len(x), 100.0)
    cloud.classification = np.full(len(x), classes, np.uint8)
    cloud.write(str(path))
    return path


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


def test_points_to_a_map_and_a_word_about_it(canopy, heights, tmp_path):
    write_cloud(tmp_path / "c.laz")
    ran = canopy("data", "chm", "c.laz", "-o", "chm.tif")
    assert ran.code == 0 and "20 x 20 px of 1 m" in ran.out and "ground from class" in ran.out
    assert (heights(tmp_path / "chm.tif") == 0).all()
    assert canopy("data", "chm", "c.laz", "-o", "chm.tif").code == 2  # it exists
    words = ("--bounds-crs", UTM, "--bounds", f"{WEST + 5},{SOUTH + 5},{WEST + 9},{SOUTH + 11}")
    ran = canopy("data", "chm", "c.laz", "-o", "q.tif", "--gsd", "0.5", "--crs", UTM, *words, "--json")
    told = json.loads(ran.out)
    assert (told["height_px"], told["width_px"], told["ground"], ran.err) == (12, 8, "class", "")


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


def test_bad_clouds_exit_2_in_one_line_and_write_nothing(canopy, tmp_path):
    cloud = write_cloud(tmp_path / "c.laz")
    (tmp_path / "cut.laz").write_bytes(cloud.read_bytes()[:1500])
    (tmp_path / "empty.laz").write_bytes(b"")
    write_cloud(tmp_path / "bare.laz", crs=None)
    write_cloud(tmp_path / "air.laz", 5)
    before = {p.name for p in tmp_path.iterdir()}
    for words, said in (
        (("cut.laz",), "cut.laz"),
        (("empty.laz",), "empty.laz"),
        (("bare.laz",), "--crs"),
        (("bare.laz", "--crs", "EPSG:2154"), "--crs"),
        (("air.laz", "--ground", "class"), "no ground points"),
        (("c.laz", "--ground", "x"), "ground: Input should be 'auto', 'class' or 'csf'"),
        (("c.laz", "--gsd", "0"), "gsd: Input should be greater than or equal to 0.1"),
        (("c.laz", "--bbox", "0,0", "--size-m", "10"), "no data in the area"),
        ((), "no point cloud"),
    ):
        ran = canopy("data", "chm", *words, "-o", "o.tif")
        assert ran.code == 2 and said in ran.error_line and "Traceback" not in ran.err, ran.err
        assert {p.name for p in tmp_path.iterdir()} == before


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


# ---- gedi -------------------------------------------------------------------------------------
@pytest.fixture
def granule(tmp_path: Path) -> Path:
    """Forty shots near Frankfort, Kentucky, on two beams; one in four is bad."""
    with h5py.File(tmp_path / "a.h5", "w") as file:
        for beam in ("BEAM0001", "BEAM1000"):
            columns = {
                "shot_number": np.arange(20, dtype=np.uint64) + np.uint64(2**60 + 1),
                "lat_lowestmode": 38.0 + 0.001 * np.arange(20),
                "lon_lowestmode": np.full(20, -84.5),
                "rh": np.tile(np.arange(101, dtype=np.float32) / 4, (20, 1)),
                "delta_time": np.arange(20.0),
                "quality_flag": (np.arange(20) % 4 > 0).astype(np.uint8),
                "degrade_flag": np.zeros(20, np.uint8),
                "sensitivity": np.full(20, 0.99, np.float32),
                "land_cover_data/landsat_water_persistence": np.zeros(20, np.uint8),
                "land_cover_data/urban_proportion": np.zeros(20, np.uint8),
            }
            for name, values in columns.items():
                file[f"{beam}/{name}"] = values
    return tmp_path / "a.h5"


def test_it_writes_the_shots_and_says_how_many(canopy, granule, tmp_path):
    ran = canopy("data", "gedi", granule, "-o", "shots.parquet", "--rh", "50, 95,98")
    assert ran.code == 0 and "30 of 40 shots" in ran.out and "quality_flag 10" in ran.out
    assert "note: a.h5: no sensitivity_a2" in ran.err
    shots = read_shots(tmp_path / "shots.parquet")
    assert len(shots) == 30 and (shots.rh_95 == 23.75).all() and (shots.rh_50 == 12.5).all()
    assert canopy("data", "gedi", granule, "-o", "shots.parquet", "-q", "--overwrite").out == ""


def test_the_area_is_echoed_and_a_dry_run_stops_there(canopy, granule, tmp_path):
    ran = canopy("data", "gedi", granule, "--bounds", "-84.6,37.9,-84.4,38.1", "-o", "s.parquet", "--dry-run")
    assert ran.code == 0 and "37.90-38.10 N, 84.60-84.40 W" in ran.out and "40 shots" in ran.out
    told = canopy("data", "gedi", granule, "-o", "s.parquet", "--dry-run", "--json").out
    assert json.loads(told)["shots"] == {"in_files": 40} and not (tmp_path / "s.parquet").exists()


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("a.h5", "--bbox", "10,10", "--size-m", "900"), "none of 40 shots"),
        (("a.h5", "--bounds", "37.9,-84.6,38.1,-84.4"), "swapped"),
        (("a.h5", "--size-m", "900"), "--bbox"),
        (("a.h5", "--rh", "95,high"), "--rh"),
        (("a.h5", "--rh", "101"), "--rh"),
        (("a.h5", "--filter", "best"), "strict, loose, none"),
        (("none.h5",), "no such file"),
        (("a.h5", "a.h5"), "given twice"),
        (("a.h5", "--l2b", "a.h5"), "cover"),
    ],
)
def test_bad_input_exits_2_in_one_line_and_writes_nothing(canopy, granule, tmp_path, words, told):
    ran = canopy("data", "gedi", *words, "-o", "s.parquet")
    assert ran.code == 2 and told in ran.error_line and "Traceback" not in ran.err
    assert [path.name for path in tmp_path.iterdir()] == ["a.h5"]
