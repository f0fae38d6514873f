"""CRSs and grids: snapping, the global lattice, ground distances, outlines, tiles."""

from __future__ import annotations

import math
import pickle

import numpy as np
import pyproj
import pytest
import rasterio.crs
from affine import Affine
from hypothesis import given, settings
from hypothesis import strategies as st
from shapely.geometry import Point, box

from canopy.errors import AreaError, InputError
from canopy.geo.crs import output_crs, project, to_crs, utm_crs, utm_zone
from canopy.geo.grid import Grid, quadkey_at, quadkey_bounds, tiles_over

coordinate = st.floats(-5e6, 5e6, allow_nan=False)
pixels = st.sampled_from([0.15, 0.3, 0.5, 0.6, 1.0, 1.19432856695588, 10.0, 30.0])


def utm_grid(west=500_000.0, north=4_000_000.0, pixel=0.6, shape=(50, 70)) -> Grid:
    return Grid.of("EPSG:32610", Affine(pixel, 0, west, 0, -pixel, north), shape)


# ---- CRSs ---------------------------------------------------------------------------------------
@settings(max_examples=40)
@given(st.floats(-179.9, 179.9), st.floats(-79.5, 83.5))
def test_utm_zone_agrees_with_epsg_areas_of_use(lon, lat):
    if min(abs(lat), abs(lon % 6), 6 - abs(lon % 6)) < 1e-6:
        return  # on a border two zones are right
    area = pyproj.aoi.AreaOfInterest(lon, lat, lon, lat)
    infos = pyproj.database.query_utm_crs_info(datum_name="WGS 84", area_of_interest=area)
    assert str(utm_crs(lon, lat).epsg) in {i.code for i in infos}


@pytest.mark.parametrize(
    ("native", "lon", "lat", "expected"),
    [
        (26910, -123.0, 45, 26910),  # NAD83 of the zone itself
        (26917, -78.0 + 0.5, 39, 26917),  # a neighbour: NEON's BLAN flies in 17N
        (26910, -100.0, 40, 32614),  # far away
        (31983, -46.6, -23.6, 31983),  # SIRGAS 2000
        (2154, 2.0, 47, 32631),  # Lambert-93 is no UTM zone
        (4326, 2.0, 47, 32631),
        (None, -70, -30, 32719),
        (32601, 179.99, -17, 32601),  # the neighbour across the antimeridian
        (32660, -179.99, -17, 32660),
        (32633, 15.0, 85, 32661),
        (None, 10, -81, 32761),
    ],
)
def test_the_default_output_crs(native, lon, lat, expected):
    assert output_crs(box(lon - 0.01, lat - 0.01, lon + 0.01, lat + 0.01), native).epsg == expected


def test_crs_objects_of_all_kinds():
    assert utm_zone(to_crs("+proj=utm +zone=33 +datum=WGS84")) == 33
    assert utm_zone(to_crs("+proj=utm +zone=33 +datum=WGS84 +units=us-ft")) is None
    assert utm_zone(to_crs("EPSG:2193")) is None  # New Zealand: also transverse Mercator
    assert to_crs(pyproj.CRS("EPSG:6339+5703")).epsg == 6339  # NAD83(2011) UTM 10N + NAVD88
    assert to_crs(rasterio.crs.CRS.from_epsg(32610)) == to_crs(32610) == to_crs("EPSG:32610")
    for wrong, message in ((None, "coordinate reference system"), ("EPSG:999999", "unreadable")):
        with pytest.raises(InputError, match=message):
            to_crs(wrong)
    with pytest.raises(AreaError, match="domain"):
        project(box(0, -90, 10, -89.9), 4326, 2154)


# ---- grids --------------------------------------------------------------------------------------
@given(coordinate, coordinate, st.floats(0.01, 900), st.floats(0.01, 900), pixels)
def test_from_bounds_snaps_outward_to_multiples(west, south, wide, tall, pixel):
    bounds = (west, south, west + wide, south + tall)
    grid = Grid.from_bounds(bounds, "EPSG:32610", pixel)
    w, s, e, n = grid.bounds
    slack = 2e-6 * pixel
    assert w <= bounds[0] + slack and s <= bounds[1] + slack
    assert e >= bounds[2] - slack and n >= bounds[3] - slack
    assert bounds[0] - w < pixel and e - bounds[2] < pixel
    for edge in (w, n):
        assert edge / pixel == pytest.approx(round(edge / pixel), abs=1e-6)
    assert grid.lattice[2:] == (0.0, 0.0)
    assert grid.rowcol(*grid.xy(wide, -tall)) == pytest.approx((wide, -tall), abs=1e-5)


def test_decimal_noise_does_not_add_a_column_and_a_point_has_one_pixel():
    grid = Grid.from_bounds((310548.9999999, 10, 310600.0000001, 20), "EPSG:32610", 1.0)
    assert grid.bounds == (310549, 10, 310600, 20)
    assert Grid.from_bounds((5, 5, 5, 5), "EPSG:32610", 2.0).shape == (1, 1)


@given(st.integers(-200, 200), st.integers(-200, 200), st.integers(1, 99), st.integers(1, 99), pixels)
def test_windows_share_the_lattice(row, col, height, width, pixel):
    grid = utm_grid(pixel=pixel, west=500_000.0 + pixel / 2)  # half-pixel phase: the treacherous one
    window = grid.window(row, col, height, width)
    assert window.shape == (height, width)
    assert grid.offset_of(window) == (row, col) and window.is_aligned(grid)
    origin, moved = grid.origin_rc, window.origin_rc
    assert (moved[0] - origin[0], moved[1] - origin[1]) == (row, col)  # rows grow southward
    assert window.lattice[2:] == grid.lattice[2:]
    assert window.pad(3).window(3, 3, height, width).offset_of(window) == (0, 0)


@pytest.mark.parametrize(
    ("reach", "expected"),
    [
        ((2.0, 3.0, 5.0, 7.0), (3, 2, 4, 3)),  # whole pixels gain none by rounding
        ((2.1, 3.9, 4.9, 6.01), (3, 2, 4, 3)),
        ((2.5, 3.5, 2.5, 3.5), (3, 2, 1, 1)),
        ((-4.5, -2.0, 1.0, 1.0), (-2, -5, 3, 6)),
    ],
)
def test_window_over_bounds_is_the_smallest_that_holds_them(reach, expected):
    grid = utm_grid(pixel=0.3, west=500_000.1)
    left, top, right, bottom = reach
    (west, north), (east, south) = grid.xy(top, left), grid.xy(bottom, right)
    window = grid.window_over((west, south, east, north))
    assert (*grid.offset_of(window), *window.shape) == expected


def test_grids_are_values_and_know_their_lattice():
    grid = utm_grid()
    assert pickle.loads(pickle.dumps(grid)) == grid and hash(grid) == hash(utm_grid())
    other_zone = Grid.of("EPSG:32611", grid.transform, (50, 70))
    for other in (utm_grid(pixel=0.60001), utm_grid(west=500_000.1), other_zone):
        assert not grid.is_aligned(other)
        with pytest.raises(InputError, match="lattice"):
            grid.offset_of(other)


@pytest.mark.parametrize(
    ("transform", "shape"),
    [
        (Affine(1, 0.2, 0, 0.2, -1, 0), (3, 3)),
        (Affine(1, 0, 0, 0, 1, 0), (3, 3)),
        (Affine(-1, 0, 0, 0, -1, 0), (3, 3)),
        (Affine(math.nan, 0, 0, 0, -1, 0), (3, 3)),
        (Affine(1, 0, 0, 0, -1, 0), (0, 3)),
    ],
)
def test_only_north_up_transforms_with_pixels(transform, shape):
    with pytest.raises(InputError):
        Grid.of("EPSG:32610", transform, shape)


@pytest.mark.parametrize("lat", [0.0, 37.0, 60.0, -33.0])
def test_web_mercator_ground_distance_is_cos_latitude(lat):
    x, y = pyproj.Transformer.from_crs(4326, 3857, always_xy=True).transform(10.0, lat)
    grid = Grid.of(3857, Affine(1.0, 0, x, 0, -1.0, y), (1, 1))
    # On the ellipsoid the two axes differ from the sphere's cosine by at most 0.7 %.
    assert grid.gsd_m == pytest.approx(math.cos(math.radians(lat)), rel=5e-3)


def test_ground_distance_in_feet_degrees_and_utm():
    feet = Grid.of(2229, Affine(2.0, 0, 6.5e6, 0, -2.0, 1.9e6), (10, 10))  # California zone 5, US feet
    assert feet.gsd_m == pytest.approx(2 * 1200 / 3937, rel=1e-3)
    degrees = Grid.of(4326, Affine(1e-5, 0, 8.0, 0, -1e-5, 60.0), (10, 10))
    expected = math.sqrt(1.1140 * 0.5580)  # one 1e-5 degree of latitude and of longitude at 60 N
    assert degrees.gsd_m == pytest.approx(expected, rel=2e-3)
    assert utm_grid().gsd_m == pytest.approx(0.6, rel=1e-3)
    with pytest.raises(InputError, match="domain"):
        _ = Grid.of(32633, Affine(1, 0, 5e8, 0, -1, 9e9), (1, 1)).gsd_m


def test_outlines_are_bent_cut_at_the_antimeridian_and_reach_the_pole():
    grid = Grid.of("EPSG:32633", Affine(1000, 0, 300_000, 0, -1000, 7_000_000), (400, 400))
    middle_of_top = pyproj.Transformer.from_crs(32633, 4326, always_xy=True).transform(500_000, 7_000_000)
    assert grid.outline().boundary.distance(Point(middle_of_top)) < 1e-4
    fiji = Grid.of("EPSG:32701", Affine(10, 0, 170_000, 0, -10, 8_130_000), (2000, 2000))
    assert {round(p.bounds[0]) for p in fiji.outline().geoms} == {-180, 180}
    assert fiji.outline("EPSG:32701").area == pytest.approx(20_000**2, rel=1e-9)
    pole = Grid.of("EPSG:32661", Affine(1e4, 0, 1e6, 0, -1e4, 3e6), (200, 200)).outline()
    west, _, east, north = pole.bounds
    assert (west, east, north) == pytest.approx((-180, 180, 90)) and pole.is_valid


# ---- cutting ------------------------------------------------------------------------------------
@given(
    st.integers(-300, 300), st.integers(-300, 300), st.integers(1, 200), st.integers(1, 200),
    st.integers(7, 90),
)  # fmt: skip
def test_tiles_partition_the_grid_at_multiples_of_the_lattice(row, col, height, width, tile_px):
    grid = Grid.of("EPSG:32610", Affine(2, 0, 2 * col, 0, -2, -2 * row), (height, width))
    count = np.zeros(grid.shape, dtype=int)
    for tile in tiles_over(grid, tile_px):
        r, c = grid.offset_of(tile)
        count[r : r + tile.height, c : c + tile.width] += 1
        top, left = tile.origin_rc
        assert top // tile_px == (top + tile.height - 1) // tile_px
        assert left // tile_px == (left + tile.width - 1) // tile_px
    assert (count == 1).all()


def test_quadkeys_are_those_of_the_bing_tile_system():
    assert quadkey_at(5, 3, 3) == "213"  # the documentation's example: tile x = 3, y = 5 at level 3
    west, south, east, north = quadkey_bounds("0230102100")
    assert (east - west) / 32768 == pytest.approx(1.19433, abs=1e-5)
    assert north - south == pytest.approx(east - west)
    assert quadkey_bounds("0230102101")[0] == pytest.approx(east)
    with pytest.raises(InputError, match="quadkey"):
        quadkey_bounds("0124")
