"""Tiles partition a grid on the global lattice; quadkeys follow Bing's published example."""

from __future__ import annotations

import numpy as np
import pytest
from affine import Affine
from hypothesis import given
from hypothesis import strategies as st

from canopy.errors import InputError
from canopy.geo.area import AOI
from canopy.geo.grid import Grid
from canopy.geo.tiles import quadkey_bounds, quadkey_grid, quadkey_of, quadkey_rc, quadkeys, tiles_over


@given(
    st.integers(-300, 300),
    st.integers(-300, 300),
    st.integers(1, 200),
    st.integers(1, 200),
    st.integers(7, 90),
)
def test_cores_partition_the_grid(row, col, height, width, tile_px):
    grid = Grid.of("EPSG:32610", Affine(2, 0, 2 * col, 0, -2, -2 * row), (height, width))
    count = np.zeros(grid.shape, dtype=int)
    for tile in tiles_over(grid, tile_px, halo_px=5):
        r, c = grid.offset_of(tile.core)
        count[r : r + tile.core.height, c : c + tile.core.width] += 1
        assert tile.core.height <= tile_px and tile.core.width <= tile_px
        assert tile.core.pad(5) == tile.read
        # A core never crosses a multiple of tile_px of the lattice.
        top, left = tile.core.origin_rc
        assert top // tile_px == (top + tile.core.height - 1) // tile_px
        assert tile.id == f"r{top // tile_px}_c{left // tile_px}"
    assert (count == 1).all()


def test_overlapping_grids_share_tiles():
    grid = Grid.of("EPSG:32610", Affine(1, 0, 1000, 0, -1, 5000), (300, 300))
    part = grid.window(37, 51, 200, 210)
    whole = {t.id: t.core for t in tiles_over(grid, 64)}
    inner = [t for t in tiles_over(part, 64) if t.core.shape == (64, 64)]
    assert inner and all(whole[t.id] == t.core for t in inner)


def test_bad_tile_sizes():
    grid = Grid.of("EPSG:32610", Affine(1, 0, 0, 0, -1, 0), (3, 3))
    with pytest.raises(InputError):
        tiles_over(grid, 0)
    with pytest.raises(InputError):
        tiles_over(grid, 8, -1)


def test_quadkey_example_of_the_bing_tile_system():
    # The documentation's example: tile x = 3, y = 5 at level 3 is quadkey 213.
    assert quadkey_rc("213") == (5, 3)


@given(st.floats(-180, 179.999), st.floats(-85, 85), st.integers(1, 20))
def test_a_point_lies_in_its_quadkey(lon, lat, zoom):
    import pyproj

    x, y = pyproj.Transformer.from_crs(4326, 3857, always_xy=True).transform(lon, lat)
    west, south, east, north = quadkey_bounds(quadkey_of(lon, lat, zoom))
    assert west - 1e-5 <= x <= east + 1e-5 and south - 1e-5 <= y <= north + 1e-5


def test_quadkey_grids_are_aligned_and_have_the_published_pixel():
    grid = quadkey_grid("0230102100", 32768)
    assert grid.pixel[0] == pytest.approx(1.19433, abs=1e-5)
    assert grid.shape == (32768, 32768)
    east = quadkey_grid("0230102101", 32768)
    assert grid.offset_of(east) == (0, 32768)
    assert grid.lattice[2:] == (0.0, 0.0)


def test_quadkeys_cover_an_area_and_only_it():
    aoi = AOI.from_bbox("45.0,-122.0,45.3,-121.5")
    found = quadkeys(aoi, 10)
    assert found == sorted(set(found))
    union = AOI.from_bounds(aoi.geometry.bounds)
    covered = sum(
        AOI.from_bounds(quadkey_bounds(q), "EPSG:3857").lonlat.intersection(union.geometry).area
        for q in found
    )
    assert covered == pytest.approx(aoi.geometry.area, rel=1e-6)
    whole = AOI.from_bounds(quadkey_bounds("0230102101"), "EPSG:3857")
    inner = AOI(whole.lonlat.buffer(-1e-6), "EPSG:4326")
    assert quadkeys(inner, 10) == ["0230102101"]


def test_quadkeys_across_the_antimeridian():
    found = quadkeys(AOI.from_bounds((179.99, -17, -179.99, -16.99)), 8)
    columns = {quadkey_rc(q)[1] for q in found}
    assert columns == {0, 255}


@pytest.mark.parametrize("text", ["", "0124", "x"])
def test_bad_quadkeys(text):
    with pytest.raises(InputError, match="quadkey"):
        quadkey_rc(text)
    with pytest.raises(InputError):
        quadkeys(AOI.from_bbox("1,1", size_m=10), 0)
