"""Labels on an image grid: exact where grids agree, weights by gap and floor, unknown stays unknown."""

from __future__ import annotations

import numpy as np
import pytest
import rasterio
from affine import Affine

from canopy.chips.targets import chm_target, gap_weight, pixel_weight, shots_on
from canopy.errors import DataError, ImageryError
from canopy.geo.crs import transformer
from canopy.geo.grid import Grid
from canopy.labels.catalog import sensor_floor

UTM, X, Y = "EPSG:32617", 400_000.0, 4_000_000.0


@pytest.fixture
def chm(tmp_path):
    """40 x 60 m of heights at 1 m, in centimetres with nodata 65535."""
    values = np.random.default_rng(0).integers(0, 4000, (40, 60)).astype(np.uint16)
    values[5:9, 7:12] = 65535
    path = tmp_path / "chm.tif"
    with rasterio.open(
        path, "w", driver="GTiff", width=60, height=40, count=1, dtype="uint16", crs=UTM, nodata=65535,
        transform=Affine(1, 0, X, 0, -1, Y),
    ) as file:  # fmt: skip
        file.write(values, 1)
        file.scales = (0.01,)
    return path, values


def grid(gsd: float, h: int, w: int, x: float = X, y: float = Y) -> Grid:
    return Grid.of(UTM, (gsd, 0, x, 0, -gsd, y), (h, w))


@pytest.mark.parametrize("rule", ["mean", "max"])
def test_the_same_grid_gives_the_same_heights(chm, rule):
    path, cm = chm
    target = chm_target(path, grid(1, 40, 60), rule)
    assert np.array_equal(np.isnan(target), cm == 65535)
    assert np.allclose(target[cm != 65535], cm[cm != 65535] / 100, atol=1e-4)


def test_coarser_pixels_take_the_mean_or_the_highest_and_finer_ones_repeat(chm):
    path, cm = chm
    blocks = (cm[20:40, :].reshape(10, 2, 30, 2) / 100).astype(np.float32)
    place = grid(2, 10, 30, y=Y - 20)
    assert np.allclose(chm_target(path, place, "mean"), blocks.mean(axis=(1, 3)), atol=1e-3)
    assert np.allclose(chm_target(path, place, "max"), blocks.max(axis=(1, 3)), atol=1e-3)
    target = chm_target(path, grid(0.5, 80, 120), "max")
    assert np.array_equal(np.isnan(target), (cm == 65535).repeat(2, 0).repeat(2, 1))
    known = cm != 65535
    assert np.allclose(target[0::2, 1::2][known], cm[known] / 100, atol=1e-4)


def test_a_known_displacement_is_undone(chm):
    path, cm = chm
    # The label lies 3 m south and 2 m west of the image: what belongs to (0, 0) is found at (3, -2).
    target = chm_target(path, grid(1, 40, 60), moved_m=(3.0, -2.0))
    wanted = np.where(cm == 65535, np.nan, cm / 100)[13:40, :-2]
    assert np.allclose(target[10:37, 2:], wanted, atol=1e-4, equal_nan=True)
    assert np.isnan(target[37:]).all() and np.isnan(target[:, :2]).all()


def test_another_crs_keeps_its_place(chm):
    path, cm = chm
    x, y = transformer(UTM, "EPSG:32618").transform(X + 30, Y - 20)
    target = chm_target(path, Grid.of("EPSG:32618", (1, 0, x - 8, 0, -1, y + 8), (16, 16)), "max")
    assert np.isfinite(target).all()
    back = transformer("EPSG:32618", UTM).transform(x - 8 + 4.5, y + 8 - 6.5)
    here = cm[int(Y - back[1]), int(back[0] - X)] / 100
    assert target[6, 4] == pytest.approx(here, abs=1e-3)


def test_impossible_heights_are_unknown_and_small_negatives_are_ground(tmp_path, save):
    heights = np.array([[-9999.0, -0.4, np.nan, 12.0, 500.0]] * 5, np.float32)
    save(tmp_path / "odd.tif", heights[None], 1.0)
    found = chm_target(tmp_path / "odd.tif", grid(1, 5, 5))
    assert np.array_equal(found[2], [np.nan, 0, np.nan, 12, np.nan], equal_nan=True)
    with pytest.raises(ImageryError, match="no such file"):
        chm_target(tmp_path / "none.tif", grid(1, 4, 4))


def test_what_a_label_is_worth():
    heights = np.array([[0.0, 1.0, 2.0, 9.0, np.nan]], np.float32)
    assert np.allclose(pixel_weight(heights, 1.0, 2.0), [[1 / 3, 1 / 3, 1, 1, 0]])
    assert sensor_floor("Optech Gemini") == 2 and sensor_floor("Riegl LMS-Q780") == pytest.approx(2 / 3)
    assert sensor_floor(None) == 0
    with pytest.raises(DataError, match="not known"):
        sensor_floor("sonar")
    worth = [gap_weight(y) for y in (0, 1, 3, 10)]
    assert worth[0] == 1 and worth == sorted(worth, reverse=True) and gap_weight(-3) == gap_weight(3)
    assert gap_weight(1) > gap_weight(None) > gap_weight(3)


def shots_file(path, points, **columns):
    import pyarrow as pa
    from pyarrow import parquet

    lon, lat = transformer(UTM, "EPSG:4326").transform(*zip(*points, strict=True))
    parquet.write_table(pa.table({"lat": lat, "lon": lon, **columns}), path)
    return path


def test_shots_land_on_their_discs(tmp_path):
    points = [(X + 30, Y - 20), (X + 5, Y - 20), (X + 45, Y - 26)]
    path = shots_file(
        tmp_path / "s.parquet", points, rh_98=[21.5, 9.0, 7.0], rh_95=[20, 8, 6.0], weight=[1.0, 1.0, 0.5]
    )
    shots = shots_on(path, grid(1, 40, 60))
    assert len(shots) == 2  # the one at the edge does not fit
    assert np.allclose(shots[0], [20, 30, 21.5, 1.0], atol=0.02)
    assert shots_on(path, grid(1, 40, 60), rh=95)[0, 2] == 20


def test_shots_without_their_columns_are_refused(tmp_path):
    path = shots_file(tmp_path / "s.parquet", [(X, Y)], rh_95=[1.0])
    with pytest.raises(DataError, match="rh_98"):
        shots_on(path, grid(1, 40, 60))
    with pytest.raises(DataError, match="no such file"):
        shots_on(tmp_path / "none.parquet", grid(1, 40, 60))
    (tmp_path / "x.parquet").write_text("nothing")
    with pytest.raises(DataError, match="Parquet"):
        shots_on(tmp_path / "x.parquet", grid(1, 40, 60))
