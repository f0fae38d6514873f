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

from canopy.errors import AreaError
from canopy.geo.area import AOI
from canopy.geo.crs import output_crs
from canopy.geo.grid import Grid
from canopy.geo.vector import read_vector, read_zones


# ---- texts ------------------------------------------------------------------------------------
def test_bbox_is_latitude_first_in_any_corner_order():
    expected = box(-46.7, -23.65, -46.6, -23.55)
    for text in (
        "-23.65,-46.70,-23.55,-46.60",
        " -23.55, -46.60, -23.65, -46.70 ",
        "-23.65 -46.6 -23.55 -46.7",
    ):
        aoi = AOI.from_bbox(text)
        assert aoi.geometry.equals(expected) and aoi.is_box
    assert AOI.from_bbox([-23.65, -46.7, -23.55, -46.6]).geometry.equals(expected)


def test_describe_is_the_contracts_example():
    assert AOI.from_bbox("-23.65,-46.70,-23.55,-46.60").describe() == (
        "23.65-23.55 S, 46.70-46.60 W, 10.2 x 11.1 km"
    )


@pytest.mark.parametrize(
    ("aoi", "text"),
    [
        (AOI.from_bounds((-180 + 0.5, -17, -179, -16)), "17.00-16.00 S, 179.50-179.00 W, 53.4 x 110.7 km"),
        (AOI.from_bounds((179.5, -17, -179.5, -16)), "17.00-16.00 S, 179.50 E-179.50 W, 106.8 x 110.7 km"),
        (AOI.from_bounds((-0.1, -0.1, 0.1, 0.1)), "0.10 S-0.10 N, 0.10 W-0.10 E, 22.3 x 22.1 km"),
        (AOI.from_bounds((0, 0, 0.1, 0.1)), "0.00-0.10 N, 0.00-0.10 E, 11.1 x 11.1 km"),
    ],
)
def test_describe_names_the_sides_of_the_world(aoi, text):
    assert aoi.describe() == text


def test_describe_of_a_small_area_has_enough_digits():
    text = AOI.from_bbox("45.0, -122.0", size_m=100).describe()
    assert text.endswith("100 x 100 m")
    low, high = text.split(" N")[0].split("-")
    assert low != high


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
    ("text", "size", "message"),
    [
        ("-123.3,45.1", 1000, "id you mean --bbox 45.1,-123.3"),
        ("-123.3,45.1,-123.2,45.2", None, "id you mean --bbox 45.1,-123.3,45.2,-123.2"),
        ("120,130", 1000, "beyond 90"),
        ("45,-123,46,-122", 1000, "--size-m"),
        ("45,-123", 0, "above 0"),
        ("45,-123", math.nan, "above 0"),
        ("45,-123,45,-122", None, "empty"),
        ("45,-123,46,-123", None, "empty"),
        ("45,-123,46", None, "3 numbers"),
        ("", None, "list of numbers"),
        ("here,there", 10, "list of numbers"),
        ("nan,10", 10, "finite"),
        ("inf,10,2,3", None, "finite"),
        ("45,-723", 10, "360"),
    ],
)
def test_bad_bboxes(text, size, message):
    with pytest.raises(AreaError, match=message):
        AOI.from_bbox(text, size_m=size)


@pytest.mark.parametrize(
    ("bounds", "crs", "message"),
    [
        ((-123, 46, -122, 45), "EPSG:4326", "crossed"),
        ((-123, 45, -123, 46), "EPSG:4326", "empty"),
        ((45, -123, 46, -122), "EPSG:4326", "longitude first"),
        ((5, 0, 1, 9), "EPSG:32610", "crossed"),
        ((1, 2, 3), "EPSG:4326", "3 numbers"),
        ("a,b,c,d", "EPSG:4326", "list of numbers"),
    ],
)
def test_bad_bounds(bounds, crs, message):
    with pytest.raises(AreaError, match=message):
        AOI.from_bounds(bounds, crs)


# ---- files ------------------------------------------------------------------------------------
RING = [(-122.0, 45.0), (-121.9, 45.0), (-121.9, 45.1), (-122.0, 45.1), (-122.0, 45.0)]
BOW_TIE = Polygon([(0, 0), (1, 1), (1, 0), (0, 1)])


@pytest.mark.parametrize("suffix", [".geojson", ".gpkg", ".shp", ".kml", ".parquet"])
def test_vector_formats(tmp_path, suffix):
    shapes = [Polygon(RING), Polygon(RING, [[(-121.98, 45.02), (-121.96, 45.02), (-121.97, 45.04)]])]
    frame = geopandas.GeoDataFrame(geometry=[shapes[1], Polygon(np.array(RING) + 1)], crs=4326)
    path = tmp_path / f"area{suffix}"
    if suffix == ".parquet":
        frame.to_parquet(path)
    else:
        frame.to_file(path, driver="KML" if suffix == ".kml" else None)
    aoi = AOI.from_file(path)
    assert not aoi.is_box and aoi.crs.epsg == 4326
    assert aoi.geometry.area == pytest.approx(sum(g.area for g in frame.geometry), rel=1e-6)
    assert not aoi.geometry.contains(Point(-121.97, 45.025))  # the hole is kept


def test_a_file_that_counts_longitude_to_360_is_the_same_area(tmp_path):
    path = tmp_path / "turned.gpkg"
    geopandas.GeoDataFrame(geometry=[box(179, -17, 182, -16), box(288.7, 44, 288.8, 45)], crs=4326).to_file(
        path
    )
    expected = MultiPolygon([box(179, -17, 180, -16), box(-180, -17, -178, -16), box(-71.3, 44, -71.2, 45)])
    area = AOI.from_file(path)
    assert area.lonlat.symmetric_difference(expected).area < 1e-9
    _, _, zones = read_zones(path)
    assert shapely.union_all(zones).symmetric_difference(expected).area < 1e-9


def test_a_projected_file_keeps_its_crs(tmp_path):
    path = tmp_path / "p.gpkg"
    geopandas.GeoDataFrame(geometry=[box(5e5, 4e6, 5.01e5, 4.001e6)], crs=32610).to_file(path)
    assert AOI.from_file(path).crs.epsg == 32610


def test_self_crossing_polygons_are_repaired(tmp_path):
    path = tmp_path / "bow.gpkg"
    geopandas.GeoDataFrame(geometry=[BOW_TIE], crs=4326).to_file(path)
    aoi = AOI.from_file(path)
    assert aoi.geometry.is_valid and aoi.geometry.area == pytest.approx(0.5)


def _frame(geometries, crs=4326):
    return geopandas.GeoDataFrame(geometry=geometries, crs=crs)


@pytest.mark.parametrize(
    ("frame", "name", "message"),
    [
        (_frame([Point(1, 2)]), "points.gpkg", "only Point"),
        (_frame([Polygon([(0, 0), (1, 1), (2, 2), (0, 0)])]), "line.gpkg", "polygons with an area"),
        (_frame([box(0, 0, 1, 1)], None), "nocrs.shp", "no coordinate reference system"),
        (_frame([box(45, -122.5, 46, -122)]), "swapped.gpkg", "swapped"),
        (_frame([box(5e5, 4e6, 6e5, 5e6)]), "metres.gpkg", "CRS"),
    ],
)
def test_bad_vector_files(tmp_path, frame, name, message):
    path = tmp_path / name
    frame.to_file(path)
    with pytest.raises(AreaError, match=message) as caught:
        AOI.from_file(path)
    assert name in str(caught.value)


def test_missing_empty_foreign_and_tricky_names(tmp_path):
    with pytest.raises(AreaError, match="no such file"):
        AOI.from_file(tmp_path / "none.gpkg")
    empty = tmp_path / "empty.geojson"
    empty.write_text(json.dumps({"type": "FeatureCollection", "features": []}))
    with pytest.raises(AreaError, match="no features"):
        AOI.from_file(empty)
    foreign = tmp_path / "foreign.geojson"
    foreign.write_text("not json")
    with pytest.raises(AreaError, match="readable vector"):
        AOI.from_file(foreign)
    for name in ("/vsizip/area.zip/a.shp", "<GDALDataset/>", "PG:dbname=x"):
        with pytest.raises(AreaError):
            AOI.from_file(name)


# ---- grids and masks --------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("bbox", "crs", "pixel"),
    [
        ("60.0,10.0", "EPSG:3857", 1.0 / math.cos(math.radians(60))),
        ("0.0,10.0", "EPSG:3857", 1.0),
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
    with pytest.raises(AreaError, match="antimeridian"):
        AOI.from_bounds((179.9, -17, -179.9, -16.8)).grid("EPSG:3857", 1.0)


def test_a_box_across_the_antimeridian_is_one_utm_grid():
    aoi = AOI.from_bounds((179.95, -17, -179.95, -16.9))
    grid = aoi.grid(output_crs(aoi.lonlat), 10)
    assert grid.width == pytest.approx(1067, abs=25) and grid.height == pytest.approx(1107, abs=25)


@pytest.mark.parametrize("lat", [-33.0, 0.0, 51.0])
def test_the_same_square_anywhere(lat):
    aoi = AOI.from_bbox(f"{lat},6.0", size_m=300)  # on a zone's border
    grid = aoi.grid(aoi.output_crs(), 1.0)
    assert 300 <= grid.width <= 301 and 300 <= grid.height <= 301
    assert AOI.from_grid(grid).mask(grid).all()


def _blob(rng, n=40) -> Polygon:
    angle = np.sort(rng.uniform(0, 2 * np.pi, n))
    radius = rng.uniform(30, 100, n)
    shell = np.column_stack([radius * np.cos(angle), radius * np.sin(angle)])
    return Polygon(shell, [0.2 * shell]).buffer(0)


def test_masks_agree_with_gdal(rng):
    grid = Grid.of("EPSG:32610", Affine(0.7, 0, 499_900, 0, -0.7, 4_000_100), (290, 290))
    for _ in range(10):
        shape = _blob(rng)
        shape = Polygon(
            np.add(shape.exterior.coords, (500_000, 4_000_000)),
            [np.add(r.coords, (500_000, 4_000_000)) for r in shape.interiors],
        )
        mask = AOI(shape, grid.crs).mask(grid)
        reference = rasterio.features.geometry_mask([shape], grid.shape, grid.transform, invert=True)
        assert 0.05 < mask.mean() < 0.95
        assert np.array_equal(mask, reference)


def test_masks_do_not_depend_on_the_window(rng):
    # Vertices on pixel centres and corners: all ties, where float noise would show.
    corners = [(0, 0), (40, 0), (40, 17.5), (60.5, 17.5), (60.5, 80), (11, 80), (0, 35.5)]
    shape = Polygon([(500_000 + 0.6 * x, 4_000_000 - 0.6 * y) for x, y in corners])
    aoi = AOI(MultiPolygon([shape]), "EPSG:32610")
    grid = Grid.from_bounds((499_990, 3_999_940, 500_050, 4_000_010), "EPSG:32610", 0.6)
    whole = aoi.mask(grid)
    for _ in range(60):
        r, c = rng.integers(0, grid.height - 1), rng.integers(0, grid.width - 1)
        h, w = rng.integers(1, grid.height - r + 1), rng.integers(1, grid.width - c + 1)
        part = aoi.mask(grid.window(int(r), int(c), int(h), int(w)))
        assert np.array_equal(part, whole[r : r + h, c : c + w])
    assert not aoi.mask(grid.window(5000, 5000, 8, 8)).any()


def test_neighbouring_polygons_share_every_pixel_once(rng):
    grid = Grid.of("EPSG:32610", Affine(1, 0, 500_000, 0, -1, 4_000_000), (100, 100))
    cut = [(500_000 + x, 4_000_000 - y) for x, y in ((50, 0), (33.3, 40), (71, 60), (50, 100))]
    left = Polygon([(500_000, 4_000_000), *cut, (500_000, 3_999_900)])
    right = Polygon([*cut, (500_100, 3_999_900), (500_100, 4_000_000)])
    masks = [AOI(p, grid.crs).mask(grid).astype(int) for p in (left, right)]
    assert (masks[0] + masks[1] == 1).all()


def test_a_polygon_in_degrees_masks_a_utm_grid():
    aoi = AOI(Polygon(RING), "EPSG:4326")
    grid = aoi.grid("EPSG:32610", 30)
    area = aoi.mask(grid).sum() * 30 * 30
    assert area == pytest.approx(aoi.to_crs("EPSG:32610").geometry.area, rel=1e-3)


def test_the_output_crs_prefers_the_image_then_the_area():
    square = AOI.from_bbox("45.0,-120.001", size_m=1000)  # zone 10, one pixel row from zone 11
    assert square.output_crs().epsg == 32610
    assert square.output_crs("EPSG:26911").epsg == 26911
    assert square.output_crs("EPSG:3857").epsg == 32610
    far = AOI(square.to_crs("EPSG:32633").geometry, "EPSG:32633")
    assert far.output_crs().epsg == 32610


def test_a_point_alone_is_a_square_kilometre():
    aoi = AOI.from_bbox("-23.55,-46.63")
    assert aoi.is_box and aoi.geometry.equals(AOI.from_bbox("-23.55,-46.63", size_m=1000).geometry)


def test_of_several_layers_the_one_with_polygons_is_read(tmp_path):
    path = tmp_path / "all.gpkg"
    square, point = shapely.box(7, 48, 7.1, 48.1), shapely.Point(7, 48)
    for layer, shape in (("trees", point), ("stand", square)):
        geopandas.GeoDataFrame(geometry=[shape], crs="EPSG:4326").to_file(path, layer=layer)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # a library's warning is no message of ours
        assert AOI.from_file(path).geometry.equals(square)
    geopandas.GeoDataFrame(geometry=[square], crs="EPSG:4326").to_file(path, layer="other")
    with pytest.raises(AreaError, match=r"3 layers.*stand.*ogr2ogr"):
        AOI.from_file(path)
    assert AOI.from_file(path, "other").geometry.equals(square)
    with pytest.raises(AreaError, match=r"no layer 'nobody'.*trees, stand, other"):
        AOI.from_file(path, "nobody")


OGR_VRT = """<OGRVRTDataSource><OGRVRTLayer name="s"><SrcDataSource>{source}</SrcDataSource>
<SrcLayer>secret</SrcLayer></OGRVRTLayer></OGRVRTDataSource>"""


@pytest.mark.parametrize("name", ["x.vrt", "x.geojson", "x.kml", "x.gpkg", "x.json", "x.xml", "x.csv"])
def test_no_file_makes_gdal_open_another(tmp_path, name):
    secret = tmp_path / "elsewhere" / "secret.gpkg"
    secret.parent.mkdir()
    geopandas.GeoDataFrame(geometry=[box(0, 0, 1, 1)], crs=4326).to_file(secret)
    path = tmp_path / name
    for text in (OGR_VRT.format(source=secret), "\n" + OGR_VRT.format(source="PG:dbname=x")):
        path.write_text(text)
        with pytest.raises(AreaError, match="not a readable vector file"):
            AOI.from_file(path)
    path.write_text('{"type": "gdal_streamed_alg", "command_line": "gdal vector pipeline ! read a"}')
    with pytest.raises(AreaError, match="not a readable vector file"):
        AOI.from_file(path)


@pytest.mark.parametrize("driver", ["FlatGeobuf", "OpenFileGDB"])
def test_more_formats_and_points(tmp_path, driver):
    path = tmp_path / ("a.fgb" if driver == "FlatGeobuf" else "a.gdb")
    geopandas.GeoDataFrame({"a": [1]}, geometry=[box(0, 0, 1, 1)], crs=4326).to_file(path, driver=driver)
    assert AOI.from_file(path).geometry.equals(box(0, 0, 1, 1))
    plots = tmp_path / "plots.gpkg"
    geopandas.GeoDataFrame(geometry=[box(0, 0, 1, 1)], crs=4326).to_file(plots, layer="stand")
    geopandas.GeoDataFrame({"h": [3.0]}, geometry=[Point(1, 2)], crs=4326).to_file(plots, layer="plots")
    assert read_vector(plots, "plots")["h"].tolist() == [3.0]
    with pytest.raises(AreaError, match=r"stand, plots.*--layer"):
        read_vector(plots)
