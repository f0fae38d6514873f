"""GEDI shots and field plots against a map: pooled by brute force, cut by columns."""

from __future__ import annotations

import geopandas
import numpy as np
import pandas
import pytest
from pyproj import Transformer
from shapely.geometry import Point, box

import canopy
from canopy.errors import DataError, InputError
from canopy.evaluation.evaluate import guess_kind
from canopy.evaluation.samples import block_samples, column_codes, load_samples

WEST, NORTH, UTM = 500_000.0, 4_882_000.0, "EPSG:32618"
H, W = 260, 310


@pytest.fixture(scope="module")
def heights(forest):
    return forest((H, W), 4)


@pytest.fixture
def map_path(write_map, heights):
    return write_map("m.tif", heights)


@pytest.fixture(scope="module")
def disc(heights):
    """`disc(x, y, radius)`: heights of the pixels whose centres lie in a disc."""
    cols, rows = WEST + np.arange(W) + 0.5, NORTH - np.arange(H) - 0.5
    return lambda x, y, radius: heights[(cols[None] - x) ** 2 + (rows[:, None] - y) ** 2 <= radius**2]


def places(n: int, seed: int = 0) -> list[tuple[float, float]]:
    """x, y in UTM, away from the map's edge."""
    rng = np.random.default_rng(seed)
    x, y = WEST + rng.uniform(20, W - 20, n), NORTH - rng.uniform(20, H - 20, n)
    return list(zip(x, y, strict=True))


def degrees(xy: list[tuple[float, float]]) -> np.ndarray:
    """lon, lat (2, n)."""
    return np.array(Transformer.from_crs(UTM, "EPSG:4326", always_xy=True).transform(*np.array(xy).T))


@pytest.fixture
def shots(tmp_path, disc):
    """`shots(n)`: a table of GEDI shots whose rh_98 is the disc's 98th percentile, noisy by 1 m."""

    def write(n=300):
        rng = np.random.default_rng(1)
        lon, lat = degrees(places(n))
        top = np.array([np.percentile(disc(x, y, 12.5), 98) for x, y in places(n)])
        numbers = [str(19640000000000000 + i) for i in range(n)]
        table = pandas.DataFrame({"shot_number": numbers, "lat": lat, "lon": lon, "rh_95": top})
        table["rh_98"] = top + rng.normal(0, 1, n)
        table["beam_type"] = rng.choice(["full", "coverage"], n)
        table["sensitivity"] = rng.uniform(0.9, 1, n)
        table.to_csv(tmp_path / "shots.csv", index=False)
        return tmp_path / "shots.csv", table

    return write


def test_gedi_is_compared_over_its_disc(map_path, shots):
    path, table = shots()
    by = ("beam_type", "sensitivity", "height")
    result = canopy.evaluate(map_path, path, by=by, replicates=200, block_m=50)
    assert result.kind == "gedi" and result.provenance["stat"] == "p98" and result.overall.n == len(table)
    assert abs(result.overall["bias_m"].value) < 0.25
    assert result.overall["rmse_m"].value == pytest.approx(1.0, abs=0.15)
    low, high = result.overall["mae_m"].ci95
    assert low < result.overall["mae_m"].value < high
    assert result.overall["block_r2"].value is None and "neighbouring" in result.overall["block_r2"].note
    assert result.strata["beam_type"]["full"].n == (table["beam_type"] == "full").sum()
    parts = result.strata["sensitivity"].values()
    assert len(parts) == 5 and sum(scores.n for scores in parts) == len(table) == len(result.samples)
    exact = canopy.evaluate(map_path, path, column="rh_95", stat="p98", replicates=0)
    assert exact.overall["mae_m"].value < 1e-3


def test_bands_of_pixels_are_not_judged_over_discs(write_map, heights, shots):
    names = ("canopy_height", "height_lower", "height_upper")
    banded = write_map("b.tif", np.stack([heights, heights - 0.1, heights + 0.1]), names=names)
    for stat in (None, "mean"):
        result = canopy.evaluate(banded, shots(60)[0], by=("beam_type",), replicates=0, stat=stat)
        for scores in (result.overall, *result.strata["beam_type"].values()):
            assert scores["interval_coverage"].value is None
            assert "single pixels" in scores["interval_coverage"].note


def test_strata_of_places(write_map, map_path, shots, tmp_path):
    """A raster of classes, polygons and the slope of an elevation model, looked up where the shots are."""
    classes = np.tile((np.arange(W) // 100).astype(np.uint8), (H, 1))
    dem = np.tile((0.2 * np.arange(W)).astype(np.float32), (H, 1))
    half = geopandas.GeoDataFrame(
        {"side": ["west"]}, geometry=[box(WEST, NORTH - H, WEST + 155, NORTH)], crs=UTM
    )
    half.to_file(tmp_path / "half.gpkg")
    ways = f"class={write_map('c.tif', classes, nodata=None)}", f"half={tmp_path / 'half.gpkg'}:side"
    strata = canopy.evaluate(
        map_path, shots()[0], by=ways, dem=write_map("dem.tif", dem), replicates=0
    ).strata
    x = np.array(places(300))[:, 0] - WEST
    assert {name: s.n for name, s in strata["class"].items()} == {
        str(k): (x // 100 == k).sum() for k in range(4) if (x // 100 == k).any()
    }
    assert {name: s.n for name, s in strata["half"].items()} == {"west": (x < 155).sum()}
    assert list(strata["slope"]) == ["10-20 deg"]  # 11.3 degrees


def test_plots_as_points_and_polygons(write_map, map_path, heights, disc, tmp_path):
    xy = places(40, seed=2)
    means = [disc(x, y, 10).mean() for x, y in xy]
    table = {"height": means, "site": ["a", "b"] * 20}
    points = geopandas.GeoDataFrame(table, geometry=[Point(*p) for p in xy], crs=UTM)
    points.to_file(tmp_path / "points.gpkg")
    for reference in (tmp_path / "points.gpkg", points):
        result = canopy.evaluate(map_path, reference, by=("site",), replicates=0)
        assert result.kind == "plots" and result.overall["mae_m"].value < 1e-3
        assert {name: s.n for name, s in result.strata["site"].items()} == {"a": 20, "b": 20}
    # Squares whose edges cut pixels in halves, given in degrees.
    corners = [(round(x), round(y)) for x, y in xy]
    squares = [box(x - 7.5, y - 7.5, x + 7.5, y + 7.5) for x, y in corners]
    share = np.r_[0.5, np.ones(14), 0.5]
    weight = share[:, None] * share
    exact = []
    for x, y in corners:
        row, col = int(NORTH - y) - 8, int(x - WEST) - 8
        exact.append(float((heights[row : row + 16, col : col + 16] * weight).sum() / weight.sum()))
    polygons = geopandas.GeoDataFrame({"top_height": exact}, geometry=squares, crs=UTM).to_crs("EPSG:4326")
    polygons.to_file(tmp_path / "squares.geojson")
    result = canopy.evaluate(map_path, tmp_path / "squares.geojson", replicates=0)
    assert result.overall.n == 40 and result.overall["mae_m"].value < 5e-3


def test_a_large_polygon_is_as_exact_as_a_small_one(write_map, tmp_path):
    """Its last column of pixels, the only one with trees, is covered by 0.4, its centres are not."""
    heights = np.zeros((500, 520), np.float32)
    heights[:, 450] = 100.0
    plot = box(WEST + 1, NORTH - 499, WEST + 450.4, NORTH - 1)
    large = geopandas.GeoDataFrame({"height": [100 * 0.4 / 449.4]}, geometry=[plot], crs=UTM)
    result = canopy.evaluate(write_map("m.tif", heights), large, replicates=0)
    assert result.overall["mae_m"].value < 2e-3


def test_samples_off_the_map_are_counted_and_said(write_map, heights, shots):
    path, _ = shots(60)
    west = heights.copy()
    west[:, 150:] = np.nan
    result = canopy.evaluate(write_map("west.tif", west), path, replicates=0)
    assert 10 < result.overall.n < 50 and any("off the map" in note for note in result.notes)
    with pytest.raises(InputError, match="no sample lies"):
        canopy.evaluate(write_map("far.tif", heights, west=WEST + 9000), path)


@pytest.mark.parametrize(("separator", "decimal"), [(",", "."), (";", ","), (";", "."), ("\t", ".")])
def test_tables_as_spreadsheets_write_them(map_path, disc, tmp_path, separator, decimal):
    """Any delimiter, decimal commas, a byte-order mark, gaps and -9999; what is dropped is counted aloud."""
    xy = places(20, seed=3)
    lon, lat = degrees(xy)
    height = np.array([disc(x, y, 10).mean() for x, y in xy])
    height[3], height[4] = -9999, np.nan
    table = pandas.DataFrame({"Lon": lon, "Lat": lat, "height": height, "site": "a"})
    path = tmp_path / "plots.csv"
    table.to_csv(path, sep=separator, decimal=decimal, index=False, encoding="utf-8-sig")
    result = canopy.evaluate(map_path, path, by=("site",), replicates=0)
    assert result.kind == "plots" and result.overall["mae_m"].value < 1e-3
    assert result.provenance["samples"] == {"in_file": 20, "with_height": 18, "scored": 18}
    assert any(note.startswith("1 of 20 rows have an impossible height") for note in result.notes)
    assert any(note.startswith("1 of 20 rows have no number in the column 'height'") for note in result.notes)


def test_what_is_wrong_with_a_table(map_path, shots, tmp_path):
    path, _ = shots(20)
    point = [Point(WEST + 50, NORTH - 50)]
    geopandas.GeoDataFrame({"dbh": [1.0]}, geometry=point, crs=UTM).to_file(tmp_path / "plots.gpkg")
    for layer in ("old", "new"):
        frame = geopandas.GeoDataFrame({"height": [1.0]}, geometry=point, crs=UTM)
        frame.to_file(tmp_path / "layers.gpkg", layer=layer)
    (tmp_path / "broken.gpkg").write_bytes(b"not a file")
    (tmp_path / "plain.csv").write_text("a,b\n1,2\n")
    (tmp_path / "metres.csv").write_text(f"lon;lat;height\n{WEST};{NORTH};3\n")
    for words, reference, options in (
        ("no height column", tmp_path / "plots.gpkg", {}),
        ("no column 'top'", tmp_path / "plots.gpkg", {"column": "top"}),
        (r"2 layers \(old, new\).*--layer", tmp_path / "layers.gpkg", {}),
        ("no column 'rh_50'", path, {"column": "rh_50"}),
        ("no column 'owner'", path, {"by": ("owner",)}),
        ("not a readable vector file", tmp_path / "broken.gpkg", {}),
        ("no columns lon and lat", tmp_path / "plain.csv", {}),
        (r"lon up to 500000.*expected degrees", tmp_path / "metres.csv", {}),
        ("a table, not a raster", path, {"kind": "chm"}),
        ("no such file", tmp_path / "none.parquet", {}),
        ("expected one table", [path, path], {}),
    ):
        with pytest.raises((InputError, DataError), match=words):
            canopy.evaluate(map_path, reference, **options)
    assert canopy.evaluate(map_path, tmp_path / "layers.gpkg", layer="new", replicates=0).overall.n == 1


def test_kinds_columns_and_blocks(shots, tmp_path):
    (tmp_path / "plots.csv").write_text("lon,lat,height\n1,2,3\n")
    kinds = [guess_kind(path) for path in (shots(5)[0], "lidar.tif", tmp_path / "plots.csv")]
    assert kinds == ["gedi", "chm", "plots"]
    codes, names = column_codes(pandas.Series(["b", "a", None, "b"]))
    assert list(codes) == [1, 0, -1, 1] and list(names) == ["a", "b"]
    codes, names = column_codes(pandas.Series([np.nan, *range(100)]))
    assert len(names) == 5 and codes[0] == -1 and np.bincount(codes[1:]).tolist() == [20] * 5
    lon, lat = np.random.default_rng(0).random((2, 500)) * 0.1 + [[-80], [40]]
    blocks = block_samples(lon, lat)
    assert blocks.side_m == 1000 and len(blocks.bounds) >= 25
    assert block_samples(lon[:30], lat[:30], 200.0).side_m == 200


@pytest.mark.parametrize(("name", "metres"), [("height_ft", 0.3048), ("Height (cm)", 0.01), ("h_m", 1)])
def test_a_column_says_its_unit(map_path, tmp_path, name, metres):
    lon, lat = degrees(places(20))
    table = pandas.DataFrame({"lon": lon, "lat": lat, name: np.full(20, 12 / metres)})
    table.to_csv(tmp_path / "plots.csv", index=False)
    found = load_samples("plots", tmp_path / "plots.csv", column=name)
    np.testing.assert_allclose(found.height_m, 12)
    result = canopy.evaluate(map_path, tmp_path / "plots.csv", column=name, replicates=0)
    assert any("converted to metres" in note for note in result.notes) == (metres != 1)


def test_tables_of_spaces_and_of_another_encoding(tmp_path):
    path = tmp_path / "plots.txt"
    path.write_text("lon   lat height\n-71.5  44.1   12.5\n-71.4 44.1 9\n")
    assert guess_kind(path) == "plots"
    assert load_samples("plots", path).height_m.tolist() == [12.5, 9]
    path.write_bytes("lon,lat,Höhe\n-71.5,44.1,12.5\n".encode("latin-1"))
    with pytest.raises(DataError, match=r"not UTF-8\. Save it again"):
        load_samples("plots", path)
