"""`canopy calibrate`: maps corrected by GEDI, models that know how sure they are.

Both fits may be replaced, so nothing here holds them to a number that only the old fit gave.
"""

from __future__ import annotations

import json
from pathlib import Path

import behaviour_support as support
import geopandas
import numpy as np
import pandas
import pytest
import rasterio
import shapely
from pyproj import Transformer
from safetensors import safe_open
from safetensors.numpy import load_file


# ---- GEDI -------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def biased(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wood of 500 m: truth.tif; map.tif, 30 % too low above 5 m; shots.parquet of `canopy data gedi`."""
    folder = tmp_path_factory.mktemp("biased")
    _, chm = support.forest(500, 500, seed=12, gsd_m=1.0)
    support.write_raster(folder / "truth.tif", chm, gsd=1.0, nodata=float("nan"))
    low = np.where(chm > 5, 5 + 0.7 * (chm - 5), chm).astype(np.float32)
    low[:30, :40] = np.nan
    support.write_raster(folder / "map.tif", low, gsd=1.0, nodata=float("nan"))
    rng = np.random.default_rng(3)
    x, y = rng.uniform(20, 480, (2, 400))
    rows, cols = np.mgrid[:500, :500] + 0.5
    rh = np.zeros((400, 101), np.float32)
    for i, (a, b) in enumerate(zip(x, y, strict=True)):
        disc = chm[(cols - a) ** 2 + (rows - b) ** 2 <= 12.5**2]
        rh[i] = np.percentile(disc, np.arange(101)) + rng.normal(0, 0.5)
    to_degrees = Transformer.from_crs(support.UTM, "EPSG:4326", always_xy=True)
    lon, lat = to_degrees.transform(support.WEST + x, support.NORTH - y)
    support.write_granule(folder / "a.h5", lon, lat, np.maximum(rh, 0))
    support.run(folder, "data", "gedi", "a.h5", "-o", "shots.parquet", "--filter", "none")
    return folder


def test_a_planted_bias_is_reduced(canopy, biased, tmp_path) -> None:
    words = ("calibrate", "gedi", biased / "map.tif", "--shots", biased / "shots.parquet", "-o", "out.tif")
    told = canopy(*words, "--json").json
    assert {"shots", "held_out"} <= set(told) and told["shots"] > 300 and told["held_out"]["n"] > 0
    truth, before = support.metres(biased / "truth.tif"), support.metres(biased / "map.tif")
    with rasterio.open(tmp_path / "out.tif") as made:
        assert made.descriptions[0] == "canopy_height" and "correction_se" in made.descriptions
        assert made.shape == truth.shape and made.crs.to_epsg() == 32618
    after = support.metres(tmp_path / "out.tif")
    np.testing.assert_array_equal(np.isnan(after), np.isnan(before))
    known = np.isfinite(before)
    tall = known & (truth > 12)
    bias = [float((heights - truth)[tall].mean()) for heights in (before, after)]
    assert bias[0] < -3 and abs(bias[1]) < abs(bias[0]) / 3
    assert (after[known & (before == 0)] < 0.1).all() and (after[known] >= 0).all(), "bare ground stays bare"
    assert json.loads((tmp_path / "out.gedi.json").read_text()) and (tmp_path / "out.gedi.png").is_file()
    assert "--overwrite" in canopy(*words, code=2).error_line


def test_a_right_map_is_left_alone(canopy, biased, tmp_path) -> None:
    words = ("--shots", biased / "shots.parquet", "--encoding", "uint16cm", "-o", "out.tif")
    canopy("calibrate", "gedi", biased / "truth.tif", *words)
    truth, after = support.metres(biased / "truth.tif"), support.metres(tmp_path / "out.tif")
    assert np.abs(after - truth).mean() < 0.3


# ---- intervals --------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def calibrated(chips, model) -> Path:
    """The network with intervals of eight held-out woods; what was said is in calibrated.json."""
    words = ("calibrate", "interval", model, "--data", "chips", "-o", "calibrated.safetensors", "--json")
    (chips.parent / "calibrated.json").write_text(support.run(chips.parent, *words).out)
    return chips.parent / "calibrated.safetensors"


def test_intervals_are_verified_and_leave_the_network_alone(calibrated, model) -> None:
    told = json.loads(calibrated.with_name("calibrated.json").read_text())
    assert told["chips"] == 8 and told["splits"] == ["val"]
    coverage = {row["level"]: row["overall"]["coverage"] for row in told["verified_on_unseen_halves"]}
    assert coverage[0.5] < coverage[0.9] and coverage[0.9] > 0.8
    before, after = load_file(model), load_file(calibrated)
    assert before.keys() == after.keys()
    assert all(np.array_equal(before[k], after[k]) and before[k].dtype == after[k].dtype for k in before)
    with safe_open(calibrated, "numpy") as file:
        assert json.loads(file.metadata()["card"])["intervals"]


def test_bands_hold_the_truth(canopy, calibrated, inputs, tmp_path) -> None:
    words = ("predict", inputs / "wood.tif", "--backend", "torch", "--gsd", 1, "--interval", 0.9)
    canopy(*words, "--model", calibrated, "-o", "chm.tif")
    truth = support.metres(inputs / "wood_chm.tif")
    height, lower, upper = (support.metres(tmp_path / "chm.tif", band) for band in (1, 2, 3))
    known = np.isfinite(height)
    assert (lower[known] <= height[known] + 1e-4).all() and (upper[known] >= height[known] - 1e-4).all()
    assert 0.8 < ((truth >= lower) & (truth <= upper))[known].mean() <= 1


def test_means_of_polygons_get_intervals(canopy, banded, inputs, tmp_path) -> None:
    words = ("predict", inputs / "wood.tif", "--backend", "torch", "--model", banded)
    canopy(*words, "--interval", 0.9, "-o", "m.tif")
    west, north = support.WEST, support.NORTH
    shapes = [
        shapely.box(west + 5, north - 20, west + 15, north - 10),
        shapely.box(west, north - 110, west + 140, north),
    ]
    zones = geopandas.GeoDataFrame({"name": ["small", "large"]}, geometry=shapes, crs=support.UTM)
    zones.to_file(tmp_path / "zones.gpkg")
    canopy("stats", "m.tif", "--zones", "zones.gpkg", "-o", "s.csv", "--interval", 0.9)
    table = pandas.read_csv(tmp_path / "s.csv").set_index("name")
    assert (table.mean_lower_m <= table.mean_m).all() and (table.mean_upper_m >= table.mean_m).all()
    width = table.mean_upper_m - table.mean_lower_m
    assert width["large"] < width["small"]


def test_bad_calls_write_nothing(canopy, biased, chips, model, inputs, tmp_path) -> None:
    interval, image = ("calibrate", "interval", model, "--data"), inputs / "wood.tif"
    for words, says in (
        ((*interval, "nowhere", "-o", "x.safetensors"), "no such chips"),
        ((*interval, chips, "-o", "x.tif"), ".safetensors"),
        ((*interval, chips, "--splits", "test", "-o", "x.safetensors"), "no chips"),
        (("calibrate", "gedi", biased / "map.tif", "--shots", "none.parquet", "-o", "x.tif"), "no such file"),
        (("predict", image, "--model", model, "--interval", 0.9, "-o", "x.tif"), "canopy calibrate interval"),
        (("predict", image, "--model", model, "--quality-band", "-o", "x.tif"), "canopy calibrate interval"),
    ):
        assert says in canopy(*words, code=2).error_line
    assert not list(tmp_path.iterdir())
