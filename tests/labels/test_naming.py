"""File names that say where a tile is: name -> bounds -> name, and the known traps of each grammar."""

from __future__ import annotations

from datetime import date

import pyproj
import pytest
from hypothesis import given
from hypothesis import strategies as st

from canopy.errors import InputError
from canopy.geo.tiles import quadkey_of
from canopy.labels.names import IGN_CRS, EthTile, LidarHdTile, NaipTile, NeonTile, QuadkeyTile, read_name
from canopy.labels.neon import aop_crs, neon_sites

FLIGHT_SITES = sorted(code for code, site in neon_sites().items() if site.published_under is None)


def middle(tile) -> tuple[float, float]:
    west, south, east, north = tile.bounds
    return (west + east) / 2, (south + north) / 2


# ---- NEON ------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("name", "bounds", "crs"),
    [
        ("NEON_D16_WREF_DP3_580000_5075000_CHM.tif", (580000, 5075000, 581000, 5076000), "EPSG:32610"),
        ("NEON_D02_BLAN_DP3_753000_4327000_CHM.tif", (753000, 4327000, 754000, 4328000), "EPSG:32617"),
        ("NEON_D05_STEI_DP3_297000_5042000_DSM.tif", (297000, 5042000, 298000, 5043000), "EPSG:32616"),
        ("NEON_D04_GUAN_DP1_725000_1985000_classified_point_cloud_colorized.laz",
         (725000, 1985000, 726000, 1986000), "EPSG:32619"),
        ("2019_HARV_6_732000_4713000_image.tif", (732000, 4713000, 733000, 4714000), "EPSG:32618"),
    ],
)  # fmt: skip
def test_a_neon_name_gives_its_bounds_and_crs_and_back(name, bounds, crs):
    tile = read_name(f"https://host/a/b/{name}?X-Goog-Signature=1")
    assert isinstance(tile, NeonTile) and tile.bounds == bounds and tile.crs == crs and tile.filename == name
    kind, x, y = tile.kind, *middle(tile)
    assert NeonTile.at(tile.site, kind, x, y, year=tile.year, visit=tile.visit) == tile


def test_blandy_flies_in_17n_also_where_it_lies_in_18n():
    # 77.98 W is in zone 18: the tile of that stream is nevertheless named in zone 17's metres.
    lewi = neon_sites()["LEWI"]
    assert lewi.utm_zone == "18N" and lewi.flight_site == "BLAN" and aop_crs("LEWI") == "EPSG:32617"
    x, y = pyproj.Transformer.from_crs(4326, 32617, always_xy=True).transform(lewi.lon, lewi.lat)
    assert NeonTile.at("LEWI", "CHM", x, y).filename == "NEON_D02_BLAN_DP3_760000_4331000_CHM.tif"


def test_shared_flights_carry_the_flight_sites_name():
    assert NeonTile.at("TREE", "CHM", 297965, 5041047).filename == "NEON_D05_STEI_DP3_297000_5041000_CHM.tif"
    with pytest.raises(InputError, match="TREE has no files of its own; expected STEI"):
        NeonTile("TREE", "CHM", 297000, 5041000)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("NEON_D16_HARV_DP3_580000_5075000_CHM.tif", "D16; expected D01"),
        ("NEON_D16_WREX_DP3_580000_5075000_CHM.tif", "did you mean WREF"),
        ("NEON_D16_WREF_DP3_580500_5075000_CHM.tif", "whole kilometres"),
    ],
)
def test_a_neon_name_that_contradicts_itself_is_refused(name, message):
    with pytest.raises(InputError, match=message):
        read_name(name)


@given(
    st.sampled_from(FLIGHT_SITES),
    st.sampled_from(["CHM", "DTM", "DSM", "points", "image"]),
    st.integers(100, 999),
    st.integers(1000, 9999),
    st.integers(2013, 2030),
    st.integers(1, 20),
)
def test_neon_names_and_tiles_are_one_to_one(site, kind, east, north, year, visit):
    when = {"year": year, "visit": visit} if kind == "image" else {}
    tile = NeonTile(site, kind, east * 1000, north * 1000, **when)
    assert NeonTile.parse(tile.filename) == tile
    assert NeonTile.at(site, kind, *middle(tile), **when) == tile


# ---- IGN -------------------------------------------------------------------------------------
def test_an_ign_name_holds_the_north_edge():
    tile = read_name("LHD_FXX_0651_6863_MNH_O_0M50_LAMB93_IGN69.tif")
    assert isinstance(tile, LidarHdTile) and tile.crs == "EPSG:2154"
    assert tile.bounds == (651000, 6862000, 652000, 6863000)
    # As IGN's own links ask for it: BBOX=650999.75,6862000.25,651999.75,6863000.25.
    assert tile.raster_bounds == (650999.75, 6862000.25, 651999.75, 6863000.25)


@pytest.mark.parametrize(
    "name",
    [
        "LHD_FXX_0881_6546_PTS_O_LAMB93_IGN69.copc.laz",
        "LHD_FXX_0881_6546_PTS_C_LAMB93_IGN69.copc.laz",
        "LHD_FXX_0881_6546_PTS_LAMB93_IGN69.copc.laz",
        "LHD_REU_0340_7650_MNT_O_0M50_RGR92UTM40S_REUN89.tif",
    ],
)
def test_ign_names_come_back_as_they_were(name):
    tile = read_name(name)
    assert tile is not None and tile.filename == name


def test_a_dash_between_the_kilometres_is_read_and_mended():
    tile = LidarHdTile.parse("LHD_FXX_0881-6546_PTS_O_LAMB93_IGN69.copc.laz")
    assert tile is not None and tile.filename == "LHD_FXX_0881_6546_PTS_O_LAMB93_IGN69.copc.laz"


@given(st.integers(0, 9999), st.integers(1, 9999), st.sampled_from(["PTS", "MNH", "MNT", "MNS"]))
def test_ign_names_and_tiles_are_one_to_one(x_km, y_km, kind):
    tile = LidarHdTile.at(x_km * 1000 + 0.5, y_km * 1000 - 0.5, kind)
    assert (tile.x_km, tile.y_km) == (x_km, y_km)
    assert LidarHdTile.parse(tile.filename) == tile == LidarHdTile.at(*middle(tile), kind)


def test_every_crs_of_a_name_exists():
    for code in {*IGN_CRS.values(), *(aop_crs(site) for site in FLIGHT_SITES if site != "CHEQ")}:
        assert pyproj.CRS.from_string(code).is_projected


# ---- global maps -----------------------------------------------------------------------------
@given(st.floats(-89.9, 89.9), st.floats(-179.9, 179.9), st.booleans())
def test_eth_names_and_tiles_are_one_to_one(lat, lon, spread):
    tile = EthTile.at(lat, lon, spread)
    west, south, east, north = tile.bounds
    assert west <= lon < east and south <= lat < north and EthTile.parse(tile.filename) == tile
    assert EthTile.at(*reversed(middle(tile)), spread) == tile


def test_eth_names_hold_the_south_west_corner():
    assert EthTile.parse("ETH_GlobalCanopyHeight_10m_2020_S03W063_Map.tif").bounds == (-63, -3, -60, 0)
    assert EthTile.at(0.5, 0.5).filename == "ETH_GlobalCanopyHeight_10m_2020_N00E000_Map.tif"
    assert EthTile.at(-0.5, -0.5).filename == "ETH_GlobalCanopyHeight_10m_2020_S03W003_Map.tif"


@given(st.floats(-84, 84), st.floats(-179.9, 179.9), st.sampled_from([9, 10]))
def test_quadkey_names_and_tiles_are_one_to_one(lat, lon, zoom):
    tile = QuadkeyTile(quadkey_of(lon, lat, zoom))
    assert read_name(tile.filename) == tile and tile.version == zoom - 8
    back = pyproj.Transformer.from_crs(3857, 4326, always_xy=True).transform(*middle(tile))
    assert QuadkeyTile(quadkey_of(*back, zoom)) == tile


# ---- NAIP ------------------------------------------------------------------------------------
def test_naip_counts_quadrangles_from_the_north_west():
    # Alabama's southern border is 31 N: only the north quarters of its southernmost block's first row exist.
    tile = NaipTile.parse("al_m_3008503_ne_16_060_20191118_20200114")
    assert tile.bounds == (-85.6875, 30.9375, -85.625, 31.0) and tile.pixel_crs == "EPSG:26916"
    assert tile.acquired == date(2019, 11, 18) and tile.published == date(2020, 1, 14)
    # Washington's northern border is 49 N: the last row of the block above it.
    assert NaipTile.parse("m_4911962_sw_11_060_20211003.tif").bounds == (-119.375, 49.0, -119.3125, 49.0625)


@given(st.floats(18, 49.9), st.floats(-160, -66.01), st.dates(date(2003, 1, 1), date(2030, 1, 1)))
def test_naip_names_and_tiles_are_one_to_one(lat, lon, day):
    tile = NaipTile.at(lat, lon, day)
    west, south, east, north = tile.bounds
    assert west <= lon < east and south <= lat < north and read_name(tile.filename) == tile
    x, y = middle(tile)
    assert NaipTile.at(y, x, day, zone=tile.zone) == tile


@pytest.mark.parametrize(
    "name",
    [
        "",
        "image.tif",
        "NEON_D01_HARV_DP1_732000_4713000_CHM.tif",
        "LHD_FXX_0651_6863_MNH_O_0M50_LAMB94_IGN69.tif",
        "LHD_FXX_0651_6863_MNH_O_0M50_LAMB93_IGN69.copc.laz",
        "01230123.tif",
        "m_4407165_ne_19_060_20210826.tif",
        "m_4407131_ne_19_060_20211326.tif",
    ],
)
def test_other_names_are_of_no_grammar(name):
    assert read_name(name) is None
