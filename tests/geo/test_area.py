"""AOI: texts, files, order of latitude and longitude, description, grids, masks."""

from __future__ import annotations

import json
import math
import warnings

import geopandas
import numpy as np
import pytest
import rasterio.features
import shapely
from affine import Affine
from hypothesis import given
from hypothesis import strategies as st
from shapely.geometry import MultiPolygon, Point, Polygon, box

from canopy.errors import AreaError, InputError
from canopy.geo.area import AOI, choose_area
from canopy.geo.grid import Grid
from canopy.geo.vector import read_vector, read_zones


# ---- texts --------------------------------------------------------------------------------------
def test_bbox_is_latitude_first_in_any_corner_order():
    expected = box(-46.7, -23.65, -46.6, -23.55)
    for given_ in (
        "-23.65,-46.70,-23.55,-46.60",
        " -23.55, -46.60, -23.65, -46.70 ",
        "-23.65 -46.6 -23.55 -46.7",
        [-23.65, -46.7, -23.55, -46.6],
    ):
        aoi = AOI.from_bbox(given_)
        assert aoi.geometry.equals(expected) and aoi.is_box


@pytest.mark.parametrize(
    ("bounds", "text"),
    [
        ((-46.7, -23.65, -46.6, -23.55), "23.65-23.55 S, 46.70-46.60 W, 10.2 x 11.1 km"),
        ((-180 + 0.5, -17, -179, -16), "17.00-16.00 S, 179.50-179.00 W, 53.4 x 110.7 km"),
        ((179.5, -17, -179.5, -16), "17.00-16.00 S, 179.50 E-179.50 W, 106.8 x 110.7 km"),
        ((-0.1, -0.1, 0.1, 0.1), "0.10 S-0.10 N, 0.10 W-0.10 E, 22.3 x 22.1 km"),
        ((0, 0, 0.1, 0.1), "0.00-0.10 N, 0.00-0.10 E, 11.1 x 11.1 km"),
        ((-122.0006, 45, -121.9994, 45.0009), "45.00000-45.00090 N, 122.00060-121.99940 W, 95 x 100 m"),
    ],
)
def test_describe_names_the_sides_of_the_world_with_enough_digits(bounds, text):
    assert AOI.from_bounds(bounds).describe() == text


@given(st.floats(-79, 83), st.floats(-180, 180), st.floats(10, 5000))
def test_a_point_gives_a_square_of_that_size(lat, lon, size):
    aoi = AOI.from_bbox(f"{lat:.6f},{lon:.6f}", size_m=size)
    west, south, east, north = aoi.geometry.bounds
    assert (east - west, north - south) == pytest.approx((size, size), rel=1e-6)
    got_lon, got_lat = aoi.centroid_lonlat
    assert got_lat == pytest.approx(lat, abs=2e-3)
    assert math.cos(math.radians(got_lon - lon)) == pytest.approx(1.0, abs=1e-6)
    assert aoi.size_m == pytest.approx((size, size), rel=1.5e-3)  # UTM's own scale


def test_two_corners_take_the_short_way_round():
    aoi = AOI.from_bbox("-17, 179.9, -16.8, -179.9")
    assert isinstance(aoi.geometry, MultiPolygon)
    assert aoi.bounds_lonlat == (179.9, -17.0, -179.9, -16.8)
    assert aoi.centroid_lonlat == pytest.approx((-180.0, -16.9))
    assert AOI.from_bounds((179.9, -17, -179.9, -16.8)).geometry.equals(aoi.geometry)
    assert AOI.from_bounds((179.9, -17, 180.1, -16.8)).geometry.equals_exact(aoi.geometry, 1e-9)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bbox": "-123.3,45.1", "size_m": 1000}, "id you mean --bbox 45.1,-123.3"),
        ({"bbox": "-123.3,45.1,-123.2,45.2"}, "id you mean --bbox 45.1,-123.3,45.2,-123.2"),
        ({"bbox": "120,130", "size_m": 1000}, "beyond 90"),
        ({"bbox": "45,-123,46,-122", "size_m": 1000}, "--size-m"),
        ({"bbox": "45,-123", "size_m": math.nan}, "above 0"),
        ({"bbox": "45,-123,45,-122"}, "empty"),
        ({"bbox": "45,-123,46"}, "3 numbers"),
        ({"bbox": "here,there"}, "list of numbers"),
        ({"bbox": "nan,10"}, "finite"),
        ({"bbox": "45,-723"}, "360"),
        ({"bounds": (-123, 46, -122, 45)}, "crossed"),
        ({"bounds": (45, -123, 46, -122)}, "longitude first"),
        ({"bounds": (5, 0, 1, 9), "bounds_crs": "EPSG:32610"}, "crossed"),
        ({"bounds": (1, 2, 3)}, "3 numbers"),
        ({"size_m": 10}, "without a point"),
        ({"bbox": "1,1", "bounds": (0, 0, 1, 1)}, "--bbox and --bounds together"),
    ],
)
def test_impossible_areas(options, message):
    with pytest.raises(AreaError, match=message):
        choose_area(**options)


# ---- files --------------------------------------------------------------------------------------
RING = [(-122.0, 45.0), (-121.9, 45.0), (-121.9, 45.1), (-122.0, 45.1), (-122.0, 45.0)]


def _frame(*shapes, crs: int | None = 4326) -> geopandas.GeoDataFrame:
    return geopandas.GeoDataFrame({"n": range(len(shapes))}, geometry=list(shapes), crs=crs)


@pytest.mark.parametrize("suffix", [".geojson", ".gpkg", ".shp", ".kml", ".parquet", ".fgb", ".gdb"])
def test_vector_formats(tmp_path, suffix):
    holed = Polygon(RING, [[(-121.98, 45.02), (-121.96, 45.02), (-121.97, 45.04)]])
    frame, path = _frame(holed, Polygon(np.array(RING) + 1)), tmp_path / f"area{suffix}"
    drivers = {".kml": "KML", ".fgb": "FlatGeobuf", ".gdb": "OpenFileGDB"}
    _ = frame.to_parquet(path) if suffix == ".parquet" else frame.to_file(path, driver=drivers.get(suffix))
    aoi = AOI.from_file(path)
    assert not aoi.is_box and aoi.crs.epsg == 4326
    assert aoi.geometry.area == pytest.approx(sum(g.area for g in frame.geometry), rel=1e-6)
    assert not aoi.geometry.contains(Point(-121.97, 45.025))  # the hole is kept


def test_what_polygons_of_files_become(tmp_path):
    """Projected ones stay, self-crossing ones are repaired, longitudes to 360 come home."""
    path = tmp_path / "a.gpkg"
    _frame(box(5e5, 4e6, 5.01e5, 4.001e6), crs=32610).to_file(path)
    assert AOI.from_file(path).crs.epsg == 32610
    _frame(Polygon([(0, 0), (1, 1), (1, 0), (0, 1)])).to_file(path)
    assert AOI.from_file(path).geometry.is_valid and AOI.from_file(path).geometry.area == pytest.approx(0.5)
    _frame(box(179, -17, 182, -16), box(288.7, 44, 288.8, 45)).to_file(path)
    expected = MultiPolygon([box(179, -17, 180, -16), box(-180, -17, -178, -16), box(-71.3, 44, -71.2, 45)])
    assert AOI.from_file(path).lonlat.symmetric_difference(expected).area < 1e-9
    assert shapely.union_all(read_zones(path)[2]).symmetric_difference(expected).area < 1e-9


@pytest.mark.parametrize(
    ("frame", "name", "message"),
    [
        (_frame(Point(1, 2)), "points.gpkg", "only Point"),
        (_frame(Polygon([(0, 0), (1, 1), (2, 2), (0, 0)])), "line.gpkg", "polygons with an area"),
        (_frame(box(0, 0, 1, 1), crs=None), "nocrs.shp", "no coordinate reference system"),
        (_frame(box(45, -122.5, 46, -122)), "swapped.gpkg", "swapped"),
        (_frame(box(5e5, 4e6, 6e5, 5e6)), "metres.gpkg", "CRS"),
    ],
)
def test_bad_vector_files(tmp_path, frame, name, message):
    frame.to_file(tmp_path / name)
    with pytest.raises(AreaError, match=message) as caught:
        AOI.from_file(tmp_path / name)
    assert name in str(caught.value)


def test_of_several_layers_the_fitting_one_is_read(tmp_path):
    path, square = tmp_path / "all.gpkg", box(7, 48, 7.1, 48.1)
    _frame(Point(7, 48)).to_file(path, layer="trees")
    _frame(square).to_file(path, layer="stand")
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # a library's warning is no message of ours
        assert AOI.from_file(path).geometry.equals(square)
    assert read_vector(path, "trees").geometry[0] == Point(7, 48)
    with pytest.raises(AreaError, match=r"trees, stand.*--layer"):
        read_vector(path)
    _frame(square).to_file(path, layer="other")
    with pytest.raises(AreaError, match=r"3 layers.*stand.*--layer"):
        AOI.from_file(path)
    assert AOI.from_file(path, "other").geometry.equals(square)
    with pytest.raises(AreaError, match=r"no layer 'nobody'.*trees, stand, other"):
        AOI.from_file(path, "nobody")


OGR_VRT = """<OGRVRTDataSource><OGRVRTLayer name="s"><SrcDataSource>{source}</SrcDataSource>
<SrcLayer>secret</SrcLayer></OGRVRTLayer></OGRVRTDataSource>"""


@pytest.mark.parametrize("name", ["x.vrt", "x.geojson", "x.kml", "x.gpkg", "x.csv"])
def test_no_file_makes_gdal_open_another(tmp_path, name):
    secret = tmp_path / "secret.gpkg"
    _frame(box(0, 0, 1, 1)).to_file(secret)
    pipeline = '{"type": "gdal_streamed_alg", "command_line": "gdal vector pipeline ! read a"}'
    empty = json.dumps({"type": "FeatureCollection", "features": []})
    for text in (OGR_VRT.format(source=secret), "\n" + OGR_VRT.format(source="PG:dbname=x"), pipeline, empty):
        (tmp_path / name).write_text(text)
        with pytest.raises(AreaError, match=r"no features|not a readable vector file"):
            AOI.from_file(tmp_path / name)
    for other in (tmp_path / "none.gpkg", "/vsizip/area.zip/a.shp", "<GDALDataset/>", "PG:dbname=x"):
        with pytest.raises(AreaError):
            AOI.from_file(other)


# ---- grids and masks ----------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("bbox", "crs", "pixel"),
    [
        ("60.0,10.0", "EPSG:3857", 1.0 / math.cos(math.radians(60))),
        ("34.0,-118.0", "EPSG:2229", 3937 / 1200),
        ("34.0,-118.0", "EPSG:32611", 1.0),
        ("-45.0,170.0", "EPSG:2193", 1.0),
    ],
)
def test_the_grid_has_the_ground_distance_asked_for(bbox, crs, pixel):
    aoi = AOI.from_bbox(bbox, size_m=500)
    grid = aoi.grid(crs, 1.0)
    assert grid.gsd_m == pytest.approx(1.0, rel=0.01)
    assert grid.pixel[0] == pytest.approx(pixel, rel=5e-3)
    west, south, east, north = aoi.to_crs(crs).geometry.bounds
    w, s, e, n = grid.bounds
    assert w <= west and s <= south and e >= east and n >= north


def test_grids_need_metres_and_a_place():
    aoi = AOI.from_bbox("45,-122", size_m=500)
    with pytest.raises(AreaError, match="projected"):
        aoi.grid("EPSG:4326", 1.0)
    with pytest.raises(AreaError, match="ground sample distance"):
        aoi.grid("EPSG:32610", 0)
    fiji = AOI.from_bounds((179.95, -17, -179.95, -16.9))
    with pytest.raises(AreaError, match="antimeridian"):
        fiji.grid("EPSG:3857", 1.0)
    assert fiji.grid(fiji.output_crs(), 10).shape == pytest.approx((1107, 1067), abs=25)


def test_the_output_crs_prefers_the_image_then_the_area():
    square = AOI.from_bbox("45.0,-120.001", size_m=1000)  # zone 10, one pixel row from zone 11
    assert square.output_crs().epsg == 32610
    assert square.output_crs("EPSG:26911").epsg == 26911
    assert square.output_crs("EPSG:3857").epsg == 32610
    assert AOI(square.to_crs("EPSG:32633").geometry, "EPSG:32633").output_crs().epsg == 32610
    grid = square.grid(square.output_crs(), 1.0)
    assert grid.shape == pytest.approx((1000, 1000), abs=1) and AOI.from_grid(grid).mask(grid).all()


def _blob(rng, n=40) -> Polygon:
    angle = np.sort(rng.uniform(0, 2 * np.pi, n))
    radius = rng.uniform(30, 100, n)
    shell = np.column_stack([radius * np.cos(angle), radius * np.sin(angle)])
    return shapely.transform(
        Polygon(shell, [0.2 * shell]).buffer(0), lambda xy: np.add(xy, (500_000, 4_000_000))
    )


def test_masks_agree_with_gdal(rng):
    grid = Grid.of("EPSG:32610", Affine(0.7, 0, 499_900, 0, -0.7, 4_000_100), (290, 290))
    for _ in range(10):
        shape = _blob(rng)
        mask = AOI(shape, grid.crs).mask(grid)
        reference = rasterio.features.geometry_mask([shape], grid.shape, grid.transform, invert=True)
        assert 0.05 < mask.mean() < 0.95 and np.array_equal(mask, reference)
    aoi = AOI(Polygon(RING), "EPSG:4326")
    area = aoi.mask(aoi.grid("EPSG:32610", 30)).sum() * 30 * 30
    assert area == pytest.approx(aoi.to_crs("EPSG:32610").geometry.area, rel=1e-3)


def test_masks_do_not_depend_on_the_window(rng):
    # Vertices on pixel centres and corners: all ties, where float noise would show.
    corners = [(0, 0), (40, 0), (40, 17.5), (60.5, 17.5), (60.5, 80), (11, 80), (0, 35.5)]
    shape = Polygon([(500_000 + 0.6 * x, 4_000_000 - 0.6 * y) for x, y in corners])
    grid = Grid.from_bounds((499_990, 3_999_940, 500_050, 4_000_010), "EPSG:32610", 0.6)
    aoi = AOI(MultiPolygon([shape]), "EPSG:32610")
    whole, rest = aoi.mask(grid), AOI(box(*grid.bounds).difference(shape), "EPSG:32610").mask(grid)
    assert (whole ^ rest).all()  # neighbours share every pixel once
    for _ in range(60):
        r, c = rng.integers(0, grid.height - 1), rng.integers(0, grid.width - 1)
        h, w = rng.integers(1, grid.height - r + 1), rng.integers(1, grid.width - c + 1)
        part = aoi.mask(grid.window(int(r), int(c), int(h), int(w)))
        assert np.array_equal(part, whole[r : r + h, c : c + w])
    assert not aoi.mask(grid.window(5000, 5000, 8, 8)).any()


def test_vector_files_that_are_none_are_refused_with_the_reason(tmp_path):
    zone = geopandas.GeoDataFrame({"n": [1]}, geometry=[box(5e5, 48e5, 5.01e5, 48.01e5)], crs="EPSG:32619")
    local = zone.set_crs('LOCAL_CS["site",UNIT["metre",1]]', allow_override=True)
    local.to_file(tmp_path / "local.gpkg")
    zone.to_file(tmp_path / "whole.fgb", driver="FlatGeobuf")
    (tmp_path / "cut.fgb").write_bytes((tmp_path / "whole.fgb").read_bytes()[:300])
    zone.to_file(tmp_path / "part.shp")
    (tmp_path / "part.shx").unlink()
    (tmp_path / "a.zip").write_bytes(b"PK")
    (tmp_path / "empty.geojson").write_text('{"type": "Feature"}')
    for name, told in (
        ("local.gpkg", "site is a Engineering CRS"), ("cut.fgb", "no layer in it, or truncated"),
        ("part.shp", r"part\.shx"), ("a.zip", "Unpack it first"), ("empty.geojson", "only empty features"),
    ):  # fmt: skip
        with pytest.raises(InputError, match=f"{name}: .*{told}"):
            read_zones(tmp_path / name)
