"""The demo source: a synthetic scene at a fixed place."""

from __future__ import annotations

import numpy as np
import pytest

from canopy.errors import AreaError
from canopy.geo.area import AOI
from canopy.geo.grid import Grid
from canopy.imagery.base import ImagerySource, check_coverage
from canopy.imagery.manifests import best_source, named_source
from canopy.imagery.named import LATITUDE, LONGITUDE, SIDE_M, DemoSource
from canopy.imagery.open import open_imagery


@pytest.fixture(scope="module")
def demo() -> DemoSource:
    source = open_imagery("demo")
    assert isinstance(source, DemoSource) and isinstance(source, ImagerySource)
    return source


def test_it_is_a_square_round_its_point_on_the_utm_lattice(demo):
    assert demo.native_crs.epsg == 32619 and demo.native_grid.pixel == (0.5, 0.5)
    lon, lat = demo.area().centroid_lonlat
    assert abs(lon - LONGITUDE) < 1e-4 and abs(lat - LATITUDE) < 1e-4
    assert demo.area().size_m == pytest.approx((SIDE_M, SIDE_M), rel=0.02)
    assert named_source("demo").geometry.covers(demo.area().lonlat)


def test_windows_equal_the_whole(demo):
    whole = demo.native_grid.window(1000, 1100, 160, 150)
    part = whole.window(30, 40, 70, 60)
    image, piece = demo.read(whole), demo.read(part)
    assert image.valid.all() and image.rgb.std() > 0.02 and set(np.unique(image.date)) == {19919}
    np.testing.assert_array_equal(piece.rgb, image.rgb[:, 30:100, 40:100])


def test_other_grids_see_the_same_scene(demo):
    native = demo.native_grid.window(1000, 1000, 200, 200)
    fine = demo.read(native).rgb
    coarse = demo.read(Grid.of(native.crs, native.transform * native.transform.scale(2), (100, 100)))
    np.testing.assert_allclose(coarse.rgb, fine.reshape(3, 100, 2, 100, 2).mean((2, 4)), atol=0.02)
    other = AOI.from_grid(native).grid("EPSG:3857", 0.5)
    image = demo.read(other)
    assert 0.85 < image.valid.mean() <= 1
    assert abs(image.rgb[:, image.valid].mean() - fine.mean()) < 0.02


def test_outside_the_square_nothing_is_valid(demo):
    grid = demo.native_grid.window(-5, -7, 20, 20)
    assert demo.read(grid).valid.sum() == 15 * 13
    with pytest.raises(AreaError, match="no imagery there"):
        check_coverage(demo, AOI.from_bbox([45.0, LONGITUDE], size_m=100))
    with pytest.raises(AreaError, match="Swapping"):
        check_coverage(demo, AOI.from_bbox([LONGITUDE, LATITUDE], size_m=100))


def test_truth_lies_on_the_same_pixels(demo):
    grid = demo.native_grid.window(1000, 1100, 120, 120)
    height, valid = demo.truth(grid)
    assert valid.all() and height.shape == (120, 120) and height.min() >= 0 and height.max() < 50


def test_the_demo_is_named_even_beside_a_folder_of_that_name(tmp_path, monkeypatch):
    (tmp_path / "demo").mkdir()
    monkeypatch.chdir(tmp_path)
    assert isinstance(open_imagery("demo"), DemoSource)


def test_the_demo_is_never_the_best_source():
    best = best_source(AOI.from_bbox([LATITUDE, LONGITUDE], size_m=100))
    assert best is not None and best.name == "naip"
