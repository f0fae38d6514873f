"""Tiles partition the region, bear the names of their quadkeys, and only what the area touches is one."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from shapely.geometry import Polygon

from canopy.errors import AreaError, ConfigError
from canopy.geo.area import AOI
from canopy.geo.crs import to_crs
from canopy.geo.grid import Grid, quadkey_bounds
from canopy.inference.inputs import choose_target
from canopy.inference.quadkey import one_zone, quadkey_output, quadkey_pixel
from canopy.region.tiles import Tiling, side_px


@settings(max_examples=30, deadline=None)
@given(
    st.integers(-3000, 3000), st.integers(-3000, 3000), st.integers(1, 300), st.integers(1, 300),
    st.sampled_from([64, 96, 128]),
)  # fmt: skip
def test_cores_partition_the_region(row: int, col: int, height: int, width: int, side: int) -> None:
    area = Grid.of("EPSG:32618", (0.5, 0, col * 0.5, 0, -0.5, -row * 0.5), (height, width))
    tiling = Tiling("utm", area, side)
    seen = np.zeros(area.shape, int)
    found = list(tiling.tiles(AOI.from_grid(area)))
    for task in found:
        top, left, h, w = tiling.offset(task.row, task.col)
        seen[top : top + h, left : left + w] += 1
        assert area.offset_of(tiling.window(task.row, task.col)) == (top, left)
    assert (seen == 1).all()
    assert [task.ordinal for task in found] == list(range(len(found)))
    assert len({task.id for task in found}) == len(found)


@given(st.floats(-60, 60), st.floats(-170, 170))
@settings(max_examples=25, deadline=None)
def test_a_quadkey_tile_lies_in_the_quadkey_of_its_name(lat: float, lon: float) -> None:
    area = quadkey_output(AOI.from_bbox((lat, lon), 700), 0.5)
    tiling = Tiling("quadkey", area, 512)
    for task in tiling.tiles(AOI.from_grid(area)):
        west, south, east, north = tiling.window(task.row, task.col).bounds
        w, s, e, n = quadkey_bounds(task.id)
        assert len(task.id) == tiling.quadkey_zoom
        assert w - 1e-6 <= west < east <= e + 1e-6 and s - 1e-6 <= south < north <= n + 1e-6


def test_only_tiles_that_a_polygon_touches() -> None:
    area = Grid.of("EPSG:32618", (1.0, 0, 500_000, 0, -1.0, 4_000_000), (400, 400))
    tiling = Tiling("utm", area, 100)
    corner = Polygon([(500_000, 4_000_000), (500_150, 4_000_000), (500_000, 3_999_850)])
    found = {(t.row, t.col) for t in tiling.tiles(AOI(corner, to_crs("EPSG:32618")))}
    row, col = -4_000_000 // 100, 500_000 // 100
    assert found == {(row, col), (row, col + 1), (row + 1, col)}


def test_ground_area_is_that_of_the_map_also_in_web_mercator() -> None:
    aoi = AOI.from_bbox((60.0, 10.0), 3000)
    tiling = Tiling("quadkey", quadkey_output(aoi, 1.0), 512)
    km2 = sum(task.km2 for task in tiling.tiles(aoi))
    width, height = AOI.from_grid(tiling.area).size_m
    assert km2 == pytest.approx(width * height / 1e6, rel=0.01)


def test_sides_follow_the_zoom_and_never_exceed_what_a_task_may_take() -> None:
    pixel = quadkey_pixel(0.6, 0.0)
    assert side_px("quadkey", pixel, 10, 2048) == 2048  # 65,536 px are divided by 32
    assert side_px("quadkey", pixel, 17, 2048) == 512
    assert side_px("utm", 0.5, 10, 2048) == 1280
    assert side_px("utm", 0.5, 19, 2048) == 160
    with pytest.raises(ConfigError, match="zoom 24 makes tiles"):
        side_px("quadkey", pixel, 24, 2048)


def test_pixels_of_quadkeys_are_powers_of_two_nearest_to_the_wish() -> None:
    assert quadkey_pixel(1.19, 0.0) == pytest.approx(1.194329, abs=1e-6)  # of the published maps
    assert quadkey_pixel(0.5, 60.0) == quadkey_pixel(1.19, 0.0)  # that is 0.6 m of ground there


def test_areas_that_one_utm_zone_cannot_serve() -> None:
    assert one_zone(AOI.from_bounds((-1, 45, 4, 48))) is not None
    assert one_zone(AOI.from_bounds((-10, 0, 15, 5))) is None
    assert one_zone(AOI.from_bounds((179, 10, -179, 11))) is None
    with pytest.raises(AreaError, match="antimeridian"):
        quadkey_output(AOI.from_bounds((179.9, 10, -179.9, 10.1)), 1.0)
    with pytest.raises(AreaError, match=r"85\.05"):
        quadkey_output(AOI.from_bounds((10, 85.5, 11, 86)), 1.0)


@pytest.mark.parametrize("bounds", [(179.9, 10, -179.9, 10.1), (10, 85.5, 11, 86)])
def test_each_command_names_its_own_options(bounds: tuple[float, float, float, float]) -> None:
    aoi = AOI.from_bounds(bounds)
    with pytest.raises(AreaError, match=r"^--grid quadkey: .*se --grid utm"):
        quadkey_output(aoi, 1.0)
    with pytest.raises(AreaError, match=r"^--crs quadkey: .*eave --crs out") as told:
        choose_target(aoi, 1.0, crs="quadkey")
    assert "--grid" not in str(told.value)
