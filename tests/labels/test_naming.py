"""What the names of lidar tiles say of their place, and the known traps of each grammar."""

from __future__ import annotations

import pyproj
import pytest
from hypothesis import given
from hypothesis import strategies as st

from canopy.errors import InputError
from canopy.labels.names import IGN_CRS, aop_crs, neon_sites, read_name

FLIGHT_SITES = sorted(code for code, site in neon_sites().items() if site.published_under is None)


@pytest.mark.parametrize(
    ("name", "bounds", "crs"),
    [
        ("NEON_D16_WREF_DP3_580000_5075000_CHM.tif", (580000, 5075000, 581000, 5076000), "EPSG:32610"),
        # 77.98 W is in zone 18: the tiles of Blandy are nevertheless named in zone 17's metres.
        ("NEON_D02_BLAN_DP3_753000_4327000_CHM.tif", (753000, 4327000, 754000, 4328000), "EPSG:32617"),
        ("NEON_D04_GUAN_DP1_725000_1985000_classified_point_cloud_colorized.laz",
         (725000, 1985000, 726000, 1986000), "EPSG:32619"),
        ("2019_HARV_6_732000_4713000_image.tif", (732000, 4713000, 733000, 4714000), "EPSG:32618"),
        # IGN's names hold the north edge.
        ("LHD_FXX_0651_6863_MNH_O_0M50_LAMB93_IGN69.tif", (651000, 6862000, 652000, 6863000), "EPSG:2154"),
        ("LHD_FXX_0881-6546_PTS_O_LAMB93_IGN69.copc.laz", (881000, 6545000, 882000, 6546000), "EPSG:2154"),
        ("LHD_FXX_0881_6546_PTS_LAMB93_IGN69.copc.laz", (881000, 6545000, 882000, 6546000), "EPSG:2154"),
        ("LHD_REU_0340_7650_MNT_O_0M50_RGR92UTM40S_REUN89.tif", (340000, 7649000, 341000, 7650000),
         "EPSG:2975"),
    ],
)  # fmt: skip
def test_a_name_gives_its_bounds_and_crs(name, bounds, crs):
    tile = read_name(f"https://host/a/b/{name}?X-Goog-Signature=1")
    assert tile.bounds == bounds and tile.crs == crs and tile.filename == name


def test_igns_rasters_begin_half_a_pixel_off():
    tile = read_name("LHD_FXX_0651_6863_MNH_O_0M50_LAMB93_IGN69.tif")
    # As IGN's own links ask for it: BBOX=650999.75,6862000.25,651999.75,6863000.25.
    assert tile.raster_bounds == (650999.75, 6862000.25, 651999.75, 6863000.25)
    points = read_name("LHD_FXX_0881_6546_PTS_LAMB93_IGN69.copc.laz")
    assert points.raster_bounds == points.bounds


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("NEON_D16_HARV_DP3_580000_5075000_CHM.tif", "D16; expected D01"),
        ("NEON_D16_WREX_DP3_580000_5075000_CHM.tif", "did you mean WREF"),
        ("NEON_D05_TREE_DP3_297000_5041000_CHM.tif", "TREE has no files of its own; expected STEI"),
    ],
)
def test_a_neon_name_that_contradicts_itself_is_refused(name, message):
    with pytest.raises(InputError, match=message):
        read_name(name)


@given(st.sampled_from(FLIGHT_SITES), st.integers(100, 999), st.integers(1000, 9999))
def test_neon_tiles_lie_north_east_of_their_corner(site, east, north):
    name = f"NEON_{neon_sites()[site].domain}_{site}_DP3_{east}000_{north}000_CHM.tif"
    tile = read_name(name)
    assert tile.site == site and tile.bounds[:2] == (east * 1000, north * 1000)


def test_every_crs_of_a_name_exists():
    for code in {*IGN_CRS.values(), *(aop_crs(site) for site in FLIGHT_SITES if site != "CHEQ")}:
        assert pyproj.CRS.from_string(code).is_projected


@pytest.mark.parametrize(
    "name", ["", "image.tif", "LHD_FXX_0651_6863_MNH_O_0M50_LAMB94_IGN69.tif", "0123.tif"]
)
def test_other_names_are_of_no_grammar(name):
    assert read_name(name) is None
