"""Heights inside polygons against exact geometry."""

from __future__ import annotations

import geopandas
import numpy as np
import pytest
import shapely
from pyproj import Transformer

from canopy.errors import ConfigError, DataError, InputError
from canopy.evaluation import zones
from canopy.evaluation.zones import geodesic_area_m2
from canopy.evaluation.zones import stats as zone_stats

WEST, NORTH, UTM = 500_000.0, 4_882_000.0, "EPSG:32618"


def save(tmp_path, shapes, crs=UTM, name="zones.gpkg", **columns):
    frame = geopandas.GeoDataFrame(columns or {"id": range(len(shapes))}, geometry=shapes, crs=crs)
    path = tmp_path / name
    frame.to_file(path)
    return path


def box(left, top, right, bottom):
    """A box in metres from the map's upper left corner."""
    return shapely.box(WEST + left, NORTH - bottom, WEST + right, NORTH - top)


def test_whole_and_cut_pixels_equal_numpy_in_any_crs(write_map, forest, tmp_path):
    heights = forest(120)
    heights[30:34, 30:50] = np.nan
    path, shapes = write_map("map.tif", heights), [box(20, 20, 80, 70), box(1, 1, 2.5, 2)]
    zone = save(tmp_path, shapes)
    row, cut = (zone_stats(path, zone).iloc[k] for k in (0, 1))
    inside = heights[20:70, 20:80]
    known = inside[np.isfinite(inside)].astype(float)
    assert row.n == known.size
    assert row.mean_m == pytest.approx(known.mean(), rel=1e-9)
    assert row.std_m == pytest.approx(known.std(), rel=1e-9)
    assert (row.min_m, row.max_m) == (pytest.approx(known.min()), pytest.approx(known.max()))
    for q in (5, 25, 50, 75, 95):
        wanted = np.percentile(known, q, method="inverted_cdf")
        assert row[f"p{q:02d}_m"] == pytest.approx(wanted, abs=0.02)
    for limit in (2, 5, 10):
        assert row[f"cover_{limit}m"] == pytest.approx((known > limit).mean(), rel=1e-9)
    assert row.valid_share == pytest.approx(known.size / inside.size, rel=1e-4)
    assert row.area_ha == pytest.approx(inside.size / 0.9996**2 / 1e4, rel=1e-5)
    # Of 1.5 x 1 pixels the second counts half.
    assert cut.n == 2 and cut.mean_m == pytest.approx((heights[1, 1] + heights[1, 2] / 2) / 1.5, rel=1e-6)
    degrees = geopandas.GeoSeries(shapes[:1], crs=UTM).to_crs("EPSG:4326")
    other = zone_stats(path, save(tmp_path, list(degrees), "EPSG:4326", "degrees.geojson")).iloc[0]
    for name in ("mean_m", "p95_m", "cover_5m", "area_ha", "valid_ha"):
        assert other[name] == pytest.approx(row[name], rel=1e-3), name


def test_web_mercator_map_gives_ground_area(write_map, tmp_path):
    x, y = Transformer.from_crs(UTM, "EPSG:3857", always_xy=True).transform(WEST, NORTH)
    import rasterio

    path = write_map(
        "m.tif",
        np.full((200, 200), 7, np.float32),
        crs="EPSG:3857",
        transform=rasterio.Affine(2, 0, x, 0, -2, y),
    )
    zone = save(tmp_path, [box(60, 60, 160, 160)])
    row = zone_stats(path, zone).iloc[0]
    assert row.area_ha == pytest.approx(1, rel=2e-3) and row.valid_ha == pytest.approx(row.area_ha, rel=1e-3)


def test_edges_along_a_parallel_are_no_geodesics():
    x, y = Transformer.from_crs("EPSG:4326", "EPSG:6933", always_xy=True).transform([-80, -70], [40, 50])
    wanted = (x[1] - x[0]) * (y[1] - y[0])  # a cylinder of equal area on the ellipsoid
    assert geodesic_area_m2(shapely.box(-80, 40, -70, 50), "EPSG:4326") == pytest.approx(wanted, rel=1e-5)


def test_outside_and_odd_features_stay_with_n_0(write_map, forest, tmp_path):
    shapes = [box(10, 10, 30, 30), box(5000, 5000, 5100, 5100), box(-50, 10, 20, 30), None]
    path = save(tmp_path, shapes, name="z.gpkg", stand=["in", "far", "edge", "none"], n=[1, 2, 3, 4])
    table = zone_stats(write_map("map.tif", forest(60)), path, tmp_path / "out.csv")
    assert table.n.tolist()[1] == 0 and table.n.tolist()[3] == 0 and np.isnan(table.mean_m[1])
    assert table.area_ha[1] == pytest.approx(1, rel=1e-3)
    assert table.valid_share[2] == pytest.approx(20 / 70, rel=1e-3)
    assert table.n_zone.tolist() == [1, 2, 3, 4]  # the file's own column is kept
    lines = (tmp_path / "out.csv").read_text().splitlines()
    assert len(lines) == 5 and lines[2].startswith("far,2,0,")


def test_parquet_carries_the_polygons_and_windows_do_not_matter(write_map, forest, tmp_path, monkeypatch):
    path = write_map("map.tif", forest(150, 4))
    shape = shapely.Point(WEST + 70, NORTH - 80).buffer(55)
    zone = save(tmp_path, [shape])
    whole = zone_stats(path, zone, tmp_path / "out.parquet")
    back = geopandas.read_parquet(tmp_path / "out.parquet")
    assert back.crs == UTM and back.geometry[0].equals(shape)
    monkeypatch.setattr(zones, "TILE_PX", 32)
    parts = zone_stats(path, zone)
    for name in ("n", "mean_m", "std_m", "p50_m", "cover_5m", "valid_ha"):
        assert parts[name][0] == pytest.approx(whole[name][0], rel=1e-9)


def test_bad_input_is_said_and_nothing_written(write_map, forest, tmp_path):
    path, zone = write_map("map.tif", forest(40)), save(tmp_path, [box(0, 0, 10, 10)])
    points = save(tmp_path, [shapely.Point(WEST, NORTH)], name="points.gpkg")
    for zones_file, out, options, words in (
        (tmp_path / "no.gpkg", "a.csv", {}, "no such file"),
        (points, "a.csv", {}, "only Point in the file"),
        (zone, "a.xlsx", {}, "does not end in .csv or .gpkg or .parquet"),
        (zone, "no/a.csv", {}, "no such directory"),
        (zone, "a.csv", {"percentiles": (101,)}, "--percentiles"),
        (zone, "a.csv", {"above_m": (-1,)}, "--above"),
    ):
        with pytest.raises(InputError, match=words):
            zone_stats(path, zones_file, tmp_path / out, **options)
    assert not list(tmp_path.glob("*.csv"))
    (tmp_path / "a.csv").write_text("mine")
    with pytest.raises(InputError, match="exists already"):
        zone_stats(path, zone, tmp_path / "a.csv")


def test_statistics_equal_one_call_of_exactextract(write_map, forest, tmp_path):
    """Crooked polygons over holes, one with a hole of its own, one of two parts."""
    from exactextract import exact_extract
    from exactextract.raster import NumPyRasterSource

    heights = forest(160, 6)
    heights[60:70, 20:90] = np.nan
    rng = np.random.default_rng(0)
    shapes = [shapely.Point(WEST + x, NORTH - y).buffer(r) for x, y, r in rng.uniform(20, 60, (4, 3))]
    shapes.append(box(20, 20, 80, 80).difference(box(40.3, 40, 60, 60.6)))
    shapes.append(shapely.MultiPolygon([box(0, 0, 10, 10), box(45, 45, 55, 55)]))
    table = zone_stats(write_map("map.tif", heights), save(tmp_path, shapes))
    frame = geopandas.GeoDataFrame({"i": range(6)}, geometry=shapes, crs=UTM)
    source = NumPyRasterSource(heights, WEST, NORTH - 160, WEST + 160, NORTH, srs_wkt=frame.crs.to_wkt())
    found = exact_extract(source, frame, ["mean", "stdev", "min", "max", "quantile(q=0.75)"], output="pandas")
    np.testing.assert_allclose(table["mean_m"], found["mean"], rtol=1e-6)
    np.testing.assert_allclose(table["std_m"], found["stdev"], rtol=1e-6)
    np.testing.assert_allclose(table[["min_m", "max_m"]], found[["min", "max"]], rtol=1e-6)
    np.testing.assert_allclose(table["p75_m"], found["quantile_75"], atol=0.1)  # of few pixels: between two


def test_zones_of_an_earlier_run_keep_their_columns(write_map, forest, tmp_path):
    path, zone = write_map("map.tif", forest(40)), save(tmp_path, [box(0, 0, 10, 10)], stand=["x"])
    for run in range(1, 4):
        out = tmp_path / f"{run}.parquet"
        table = zone_stats(path, zone, out)
        assert table.columns.is_unique and len(table.columns) == 2 + 19 * run
        zone = out
    assert {"mean_m", "mean_m_zone", "mean_m_zone2"} <= set(geopandas.read_parquet(zone).columns)


def test_frames_arrays_and_what_must_be_known(write_map, forest):
    import rioxarray

    heights = forest(60)
    heights[:10] = -9999
    path = write_map("map.tif", heights, nodata=None)
    frame = geopandas.GeoDataFrame({"stand": ["x"]}, geometry=[box(0, 0, 30, 30)], crs=UTM)
    table = zone_stats(rioxarray.open_rasterio(path), frame, percentiles=(50,), above_m=(2,))
    assert isinstance(table, geopandas.GeoDataFrame) and table.crs == UTM
    assert table.n[0] == 600 and table.mean_m[0] == pytest.approx(heights[10:30, :30].mean(dtype=float))
    assert any("impossible heights" in note for note in table.attrs["notes"])
    with pytest.raises(ConfigError, match="did you mean 'percentiles'"):
        zone_stats(path, frame, percentile=(50,))


def test_intervals_of_means_and_covers_and_the_total(write_map, forest, tmp_path, area_tags):
    heights = forest(120, 3)
    bands = np.stack([heights, heights * 0.5, heights * 1.5])
    names = ("canopy_height", "height_lower", "height_upper")
    path = write_map("map.tif", bands, names=names, tags=area_tags)
    shapes = [box(10, 10, 34, 26), box(20, 20, 80, 70), box(70, 60, 100, 100)]
    zone = save(tmp_path, shapes, stand=["a", "b", "c"], number=[1, 2, 3])
    table = zone_stats(path, zone, tmp_path / "s.gpkg", interval=0.9, total=True)
    row, inside = table.iloc[0], heights[10:26, 10:34].astype(float)
    # Every pair of pixels, by brute force.
    at = np.stack(np.indices(inside.shape)).reshape(2, -1).T.astype(float)
    apart = np.hypot(*(at[:, None] - at[None]).transpose(2, 0, 1))
    rho = (0.3 * np.exp(-apart / 20) + 0.2).mean()
    reach = 1.645 * np.hypot(0.5 * inside.mean() * np.sqrt(rho), 0.3)
    assert row.mean_m == pytest.approx(inside.mean())
    assert row.mean_upper_m - row.mean_m == pytest.approx(reach, rel=0.02)
    share = reach / (0.5 * inside.mean())  # of every pixel's band
    for end, moved in (("lower", inside * (1 - 0.5 * share)), ("upper", inside * (1 + 0.5 * share))):
        assert row[f"cover_10m_{end}"] == pytest.approx((moved > 10).mean(), abs=0.02)
    total = table.iloc[3]
    assert total.stand == "total" and list(table.stand[:3]) == ["a", "b", "c"]
    assert total.area_ha == pytest.approx(table.area_ha[:3].sum() - (6 * 14 + 10 * 10) / 1e4, rel=1e-3)
    assert total.mean_sd_m / total.mean_m < row.mean_sd_m / row.mean_m
    assert geopandas.read_file(tmp_path / "s.gpkg").number[:3].tolist() == [1, 2, 3]
    with pytest.raises(DataError, match=r"redict it with --interval 0\.9"):
        zone_stats(write_map("plain.tif", heights), zone, interval=0.9)
    with pytest.raises(ConfigError, match=r"0\.5 to 0\.95"):
        zone_stats(path, zone, interval=0.99)
