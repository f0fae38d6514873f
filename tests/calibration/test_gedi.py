"""The GEDI correction on the synthetic forest: planted bias, 10 m jitter, outliers, nothing to correct."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import rasterio

from canopy.calibration.gedi import Footprints, correct_map, fit_correction, held_out, read_footprints
from canopy.errors import DataError
from canopy.evaluation.opening import open_heights
from canopy.geo.cog import BandSpec, CogWriter
from canopy.geo.crs import transformer
from canopy.geo.grid import Grid
from canopy.geo.reading import Raster, read_raster
from canopy.labels.footprint import pool_over_disc
from canopy.labels.shots import read_shots


def write_cog(path, raster, **options):
    """A whole raster as a map of one band; its sha256."""
    with CogWriter(path, raster.grid, [BandSpec("canopy_height")], **options) as writer:
        writer.write(raster.values, raster.valid)
    return writer.sha256


SIDE_PX = 800
GRID = Grid.of("EPSG:32617", (1.0, 0, 400_000.0, 0, -1.0, 4_200_000.0), (SIDE_PX, SIDE_PX))


@pytest.fixture(scope="module")
def truth() -> np.ndarray:
    from canopy.synth.forest import SceneSpec
    from canopy.synth.render import truth

    return truth(SceneSpec(seed=3, gsd_m=1.0), 0.0, 0.0, SIDE_PX, SIDE_PX).chm


def planted(truth: np.ndarray) -> np.ndarray:
    """Heights as a map that flattens tall forest gives them: 30 m become 22 m."""
    return truth - 0.009 * truth**2


def make_shots(
    truth: np.ndarray, path: Path, *, outliers: float = 0.0, count: int = 400, seed: int = 1
) -> Path:
    """Shots of the true heights at true places, reported 10 m (per axis) away, with 0.7 m noise."""
    import pandas

    rng = np.random.default_rng(seed)
    back = transformer(GRID.crs, "EPSG:4326")
    xy = rng.uniform(60, SIDE_PX - 60, (count, 2)) * [1, -1] + [400_000.0, 4_200_000.0]
    lon, lat = back.transform(*xy.T)
    rh = pool_over_disc(truth, pandas.DataFrame({"lon": lon, "lat": lat}), "p98", grid=GRID).astype(float)
    rh = np.maximum(rh + rng.normal(0, 0.7, count), 0)
    wrong = rng.random(count) < outliers
    rh[wrong] = rng.uniform(0, 60, wrong.sum())
    lon, lat = back.transform(*(xy + rng.normal(0, 10, xy.shape)).T)
    numbers = np.arange(count, dtype=np.uint64)
    pandas.DataFrame({"shot_number": numbers, "lat": lat, "lon": lon, "rh_98": rh}).to_parquet(path)
    return path


def make_map(heights: np.ndarray, path: Path) -> Path:
    write_cog(path, Raster(heights[None].astype(np.float32), np.isfinite(heights), GRID))
    return path


def bias_by_height(heights: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """Mean error of true 5 m classes, which no correction can trade against each other."""
    return np.array(
        [
            (heights - truth)[(truth >= low) & (truth < low + 5)].mean()
            for low in range(0, 30, 5)
        ]
    )  # fmt: skip


@pytest.mark.parametrize("outliers", [0.0, 0.3])
def test_removes_a_planted_bias(tmp_path: Path, truth: np.ndarray, outliers: float) -> None:
    flat = planted(truth)
    chm = make_map(flat, tmp_path / "map.tif")
    shots = make_shots(truth, tmp_path / "shots.parquet", outliers=outliers)
    correct_map(chm, shots, tmp_path / "out.tif")
    left = np.abs(bias_by_height(read_raster(tmp_path / "out.tif", bands=[1]).values[0], truth)).mean()
    assert left <= 0.2 * np.abs(bias_by_height(flat, truth)).mean()


@pytest.mark.parametrize("outliers", [0.0, 0.3])
def test_changes_nothing_where_nothing_is_wrong(tmp_path: Path, truth: np.ndarray, outliers: float) -> None:
    chm = make_map(truth, tmp_path / "map.tif")
    for seed in range(2):
        shots = make_shots(truth, tmp_path / f"{seed}.parquet", outliers=outliers, seed=seed, count=300)
        out = tmp_path / f"{seed}.tif"
        correct_map(chm, shots, out)
        assert np.abs(read_raster(out, bands=[1]).values[0] - truth).max() <= 0.1


@pytest.mark.parametrize("low", [40.0, 50.0])
def test_tall_forest_that_is_right_stays(low: float) -> None:
    """Beyond the last knot the curve runs on by itself; the slopes below must not answer for it."""
    rng = np.random.default_rng(0)
    heights = rng.uniform(low, 80, 400)
    places = rng.uniform(0, 2000, (400, 2))
    made = fit_correction(Footprints(heights + rng.normal(0, 2, 400), heights, places))
    at = np.linspace(0, 110, 56)
    assert np.abs(made(at) - at).max() <= 0.1
    assert made.noise_m == pytest.approx(2.0, abs=0.3) and made.outlier_share < 0.05


def test_bare_ground_order_and_nodata_stay(tmp_path: Path, truth: np.ndarray) -> None:
    flat = planted(truth)
    flat[100:140, 200:260] = np.nan
    chm = make_map(flat, tmp_path / "map.tif")
    shots = make_shots(truth, tmp_path / "shots.parquet", count=200)
    correct_map(chm, shots, tmp_path / "out.tif")
    with rasterio.open(tmp_path / "out.tif") as made:
        assert made.descriptions == ("canopy_height", "correction_se")
        assert made.tags()["CANOPY_CORRECTION"].startswith("gedi spline")
        got, error = made.read()
    assert np.array_equal(np.isnan(got), np.isnan(flat))
    assert (got[flat == 0] == 0).all() and (error[flat == 0] == 0).all()
    known = np.isfinite(flat)
    order = np.argsort(flat[known], kind="stable")
    assert (np.diff(got[known][order]) >= -1e-4).all()
    assert (np.abs(got[known] - flat[known]) <= np.maximum(0.75 * flat[known], 1) + 1e-4).all()


def test_standard_errors_cover_the_truth(truth: np.ndarray, tmp_path: Path) -> None:
    flat = planted(truth)
    chm = make_map(flat, tmp_path / "map.tif")
    heights = np.array([8.0, 12.0, 16.0, 20.0])
    exact = (1 - np.sqrt(1 - 4 * 0.009 * heights)) / (2 * 0.009)
    z = []
    for seed in range(4):
        shots = make_shots(truth, tmp_path / f"{seed}.parquet", count=250, seed=10 + seed)
        made = fit_correction(read_footprints(open_heights(chm), read_shots(shots)))
        z.append((made(heights) - exact) / made.errors(heights))
    assert np.abs(z).mean() < 2.0  # about 0.8 for perfect errors
    assert (np.abs(z) < 4).mean() > 0.9


def test_report_on_held_out_shots_and_too_few(tmp_path: Path, truth: np.ndarray) -> None:
    chm = make_map(planted(truth), tmp_path / "map.tif")
    few = make_shots(truth, tmp_path / "few.parquet", count=10)
    with pytest.raises(DataError, match="at least 20"):
        correct_map(chm, few, tmp_path / "out.tif")
    assert not (tmp_path / "out.tif").exists()
    with pytest.raises(DataError, match="rh_98"):
        read_footprints(open_heights(chm), read_shots(few), 95)
    shots = make_shots(truth, tmp_path / "shots.parquet", outliers=0.2)
    report = correct_map(chm, shots, tmp_path / "out.tif")
    scores = report["held_out"]
    assert scores["n"] > 300 and 0.7 < scores["n_good"] / scores["n"] < 0.9
    assert scores["after"]["mae_good_m"] < scores["before"]["mae_good_m"]
    assert json.loads((tmp_path / "out.gedi.json").read_text())["held_out"] == scores
    assert held_out(read_footprints(open_heights(chm), read_shots(few)))["n"] == 0
