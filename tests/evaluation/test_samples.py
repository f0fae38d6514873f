"""GEDI shots and field plots against a map: pooled by brute force, cut by columns."""

from __future__ import annotations

import runpy
from collections.abc import Callable
from pathlib import Path

import geopandas
import numpy as np
import pandas
import pytest
from pyproj import Transformer
from shapely.geometry import Point, box

import canopy
from canopy.errors import DataError, InputError
from canopy.evaluation.evaluate import guess_kind
from canopy.evaluation.samples import block_samples, column_codes
from canopy.evaluation.zones import coverage
from canopy.geo.grid import Grid

stand = runpy.run_path(str(Path(__file__).with_name("stand.py")))
WEST, NORTH, UTM = stand["WEST"], stand["NORTH"], stand["UTM"]
MAP = stand["forest"](4)
H, W = MAP.shape


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., Path]:
    """`write("a.tif", heights, gsd=0.5, west=...)` in the test's folder; see stand.py."""
    return lambda name, *bands, **kw: stand["write_heights"](tmp_path / name, *bands, **kw)


def places(n: int, seed: int = 0, margin: float = 20) -> tuple[np.ndarray, np.ndarray]:
    """x, y in UTM, away from the map's edge."""
    rng = np.random.default_rng(seed)
    return WEST + rng.uniform(margin, W - margin, n), NORTH - rng.uniform(margin, H - margin, n)


def disc(x: float, y: float, radius: float) -> np.ndarray:
    """Heights of the pixels whose centres lie in a disc."""
    cols, rows = WEST + np.arange(W) + 0.5, NORTH - np.arange(H) - 0.5
    return MAP[(cols[None] - x) ** 2 + (rows[:, None] - y) ** 2 <= radius**2]


def shots(path: Path, n: int = 300) -> tuple[Path, np.ndarray, np.ndarray, pandas.DataFrame]:
    x, y = places(n)
    lon, lat = Transformer.from_crs(UTM, "EPSG:4326", always_xy=True).transform(x, y)
    rng = np.random.default_rng(1)
    top = np.array([np.percentile(disc(a, b, 12.5), 98) for a, b in zip(x, y, strict=True)])
    table = pandas.DataFrame(
        {
            "shot_number": [str(19640000000000000 + i) for i in range(n)], "lat": lat, "lon": lon,
            "rh_95": top - 2, "rh_98": top + rng.normal(0, 1, n),
            "beam_type": rng.choice(["full", "coverage"], n),
            "sensitivity": rng.uniform(0.9, 1, n),
        }
    )  # fmt: skip
    table.to_csv(path, index=False)
    return path, x, y, table


def test_gedi_is_compared_over_its_disc(write: Callable[..., Path], tmp_path: Path) -> None:
    path, _, _, table = shots(tmp_path / "shots.csv")
    result = canopy.evaluate(
        write("m.tif", MAP), path, by=("beam_type", "sensitivity", "height"), replicates=200, block_m=50
    )
    assert result.kind == "gedi"
    assert result.provenance["stat"] == "p98"
    assert result.overall.n == len(table)
    assert abs(result.overall["bias_m"].value) < 0.25
    assert result.overall["rmse_m"].value == pytest.approx(1.0, abs=0.15)
    low, high = result.overall["mae_m"].ci95
    assert low < result.overall["mae_m"].value < high
    assert result.overall["block_r2"].value is None
    assert "neighbouring" in result.overall["block_r2"].note
    parts = {(by, name): s.n for by, part in result.strata.items() for name, s in part.items()}
    assert parts[("beam_type", "full")] == (table["beam_type"] == "full").sum()
    assert sum(n for (by, _), n in parts.items() if by == "sensitivity") == len(table)
    assert sum(1 for by, _ in parts if by == "sensitivity") == 5
    assert len(result.samples.lon) == len(table)
    other = canopy.evaluate(write("m.tif", MAP), path, column="rh_95", stat="p98", replicates=0)
    assert other.overall["bias_m"].value == pytest.approx(2, abs=0.4)


def test_bands_of_pixels_are_not_judged_over_discs(write: Callable[..., Path], tmp_path: Path) -> None:
    path, *_ = shots(tmp_path / "shots.csv", 60)
    names = ("canopy_height", "height_lower", "height_upper")
    banded = write("b.tif", MAP, MAP - 0.1, MAP + 0.1, names=names)
    for options in ({}, {"stat": "mean"}):
        result = canopy.evaluate(banded, path, by=("beam_type",), replicates=0, **options)
        for scores in (result.overall, *result.strata["beam_type"].values()):
            assert scores["interval_coverage"].value is None
            assert "single pixels" in scores["interval_coverage"].note
    plain = canopy.evaluate(write("m.tif", MAP), path, replicates=0)
    assert "interval_coverage" not in plain.overall.metrics


def test_plots_as_points_and_polygons(write: Callable[..., Path], tmp_path: Path) -> None:
    x, y = places(40, seed=2)
    means = np.array([disc(a, b, 10).mean() for a, b in zip(x, y, strict=True)])
    points = geopandas.GeoDataFrame(
        {"height": means, "site": ["a", "b"] * 20},
        geometry=[Point(*p) for p in zip(x, y, strict=True)],
        crs=UTM,
    )
    points.to_file(tmp_path / "points.gpkg")
    map_path = write("m.tif", MAP)
    result = canopy.evaluate(map_path, tmp_path / "points.gpkg", by=("site",), replicates=0)
    assert result.overall["mae_m"].value < 1e-3
    assert {name: s.n for name, s in result.strata["site"].items()} == {"a": 20, "b": 20}
    squares = [
        box(round(a) - 7.5, round(b) - 7.25, round(a) + 7.5, round(b) + 7.25)
        for a, b in zip(x, y, strict=True)
    ]
    grid = Grid.of(UTM, (1, 0, WEST, 0, -1, NORTH), (H, W))
    exact = [float((MAP * coverage(s, grid)).sum() / coverage(s, grid).sum()) for s in squares[:6]]
    polygons = geopandas.GeoDataFrame({"top_height": exact}, geometry=squares[:6], crs=UTM).to_crs(
        "EPSG:4326"
    )
    polygons.to_file(tmp_path / "polygons.geojson")
    result = canopy.evaluate(map_path, tmp_path / "polygons.geojson", replicates=0)
    assert result.kind == "plots"
    assert result.overall.n == 6
    assert result.overall["mae_m"].value < 5e-3


def test_a_large_polygon_is_as_exact_as_a_small_one(write: Callable[..., Path], tmp_path: Path) -> None:
    """Its last column of pixels, the only one with trees, is covered by 0.4, its centres are not."""
    heights = np.zeros((500, 520), np.float32)
    heights[:, 450] = 100.0
    plot = box(WEST + 1, NORTH - 499, WEST + 450.4, NORTH - 1)
    polygons = geopandas.GeoDataFrame({"height": [100 * 0.4 / 449.4]}, geometry=[plot], crs=UTM)
    polygons.to_file(tmp_path / "large.gpkg")
    result = canopy.evaluate(write("m.tif", heights), tmp_path / "large.gpkg", replicates=0)
    assert result.overall["mae_m"].value < 2e-3


def test_samples_off_the_map_are_counted_and_said(write: Callable[..., Path], tmp_path: Path) -> None:
    path, *_ = shots(tmp_path / "shots.csv", 60)
    west = MAP.copy()
    west[:, 150:] = np.nan
    result = canopy.evaluate(write("m.tif", west), path, replicates=0)
    assert 10 < result.overall.n < 50
    assert any("off the map" in note for note in result.notes)
    with pytest.raises(InputError, match="no sample lies"):
        canopy.evaluate(write("far.tif", MAP, west=WEST + 9000), path)


def test_what_is_wrong_with_a_table(write: Callable[..., Path], tmp_path: Path) -> None:
    map_path = write("m.tif", MAP)
    path, *_ = shots(tmp_path / "shots.csv", 20)
    plots = geopandas.GeoDataFrame({"dbh": [1.0]}, geometry=[Point(WEST + 50, NORTH - 50)], crs=UTM)
    plots.to_file(tmp_path / "plots.gpkg")
    (tmp_path / "broken.gpkg").write_bytes(b"not a file")
    (tmp_path / "plain.csv").write_text("a,b\n1,2\n")
    cases = [
        ("no height column", tmp_path / "plots.gpkg", {}),
        ("no column 'top'", tmp_path / "plots.gpkg", {"column": "top"}),
        ("no column 'rh_50'", path, {"column": "rh_50"}),
        ("no column 'owner'", path, {"by": ("owner",)}),
        ("not a readable vector file", tmp_path / "broken.gpkg", {}),
        ("no columns lon and lat", tmp_path / "plain.csv", {}),
        ("a table, not a raster", path, {"kind": "chm"}),
        ("no such file", tmp_path / "none.parquet", {}),
        ("expected one table", [path, path], {}),
    ]
    for text, reference, options in cases:
        with pytest.raises((InputError, DataError), match=text):
            canopy.evaluate(map_path, reference, **options)


def test_kinds_are_told_from_files(write: Callable[..., Path], tmp_path: Path) -> None:
    path, *_ = shots(tmp_path / "shots.csv", 5)
    assert guess_kind(path) == "gedi"
    assert guess_kind("lidar.tif") == "chm"
    (tmp_path / "plots.csv").write_text("lon,lat,height\n1,2,3\n")
    assert guess_kind(tmp_path / "plots.csv") == "plots"


def test_columns_become_classes_or_quantiles() -> None:
    codes, names = column_codes(pandas.Series(["b", "a", None, "b"]))
    assert list(codes) == [1, 0, -1, 1]
    assert list(names) == ["a", "b"]
    codes, names = column_codes(pandas.Series(np.arange(100.0)))
    assert len(names) == 5
    assert np.bincount(codes).tolist() == [20, 20, 20, 20, 20]


def test_sample_blocks_are_large_but_enough() -> None:
    rng = np.random.default_rng(0)
    lon, lat = -80 + rng.random(500) * 0.1, 40 + rng.random(500) * 0.1
    blocks = block_samples(lon, lat)
    assert blocks.side_m == 1000
    assert len(blocks.bounds) >= 25
    few = block_samples(lon[:30], lat[:30], 200.0)
    assert few.side_m == 200
    assert len(few.number) == 30


@pytest.mark.parametrize(("separator", "decimal"), [(",", "."), (";", ","), (";", "."), ("\t", ".")])
def test_tables_as_spreadsheets_write_them(
    write: Callable[..., Path], tmp_path: Path, separator: str, decimal: str
) -> None:
    """Any delimiter, decimal commas, a byte-order mark, gaps and -9999; what is dropped is counted aloud."""
    x, y = places(20, seed=3)
    lon, lat = Transformer.from_crs(UTM, "EPSG:4326", always_xy=True).transform(x, y)
    height = np.array([disc(a, b, 10).mean() for a, b in zip(x, y, strict=True)])
    height[3], height[4] = -9999, np.nan
    table = pandas.DataFrame({"Lon": lon, "Lat": lat, "height": height, "site": "a"})
    path = tmp_path / "plots.csv"
    table.to_csv(path, sep=separator, decimal=decimal, index=False, encoding="utf-8-sig")
    result = canopy.evaluate(write("m.tif", MAP), path, by=("site",), replicates=0)
    assert result.kind == "plots" and result.overall.n == 18
    assert result.overall["mae_m"].value < 1e-3
    assert result.provenance["samples"] == {"in_file": 20, "with_height": 18, "scored": 18}
    assert any(note.startswith("1 of 20 rows have an impossible height") for note in result.notes)
    assert any(note.startswith("1 of 20 rows have no number in the column 'height'") for note in result.notes)


def test_metres_in_lon_are_told(write: Callable[..., Path], tmp_path: Path) -> None:
    (tmp_path / "plots.csv").write_text(f"lon;lat;height\n{WEST};{NORTH};3\n")
    with pytest.raises(DataError, match=r"lon up to 400000.*expected degrees"):
        canopy.evaluate(write("m.tif", MAP), tmp_path / "plots.csv")


def test_plots_of_several_layers_are_asked_for(write: Callable[..., Path], tmp_path: Path) -> None:
    x, y = places(12, seed=5)
    for layer, add in (("old", 5.0), ("new", 0.0)):
        means = [disc(a, b, 10).mean() + add for a, b in zip(x, y, strict=True)]
        frame = geopandas.GeoDataFrame({"height": means}, geometry=geopandas.points_from_xy(x, y), crs=UTM)
        frame.to_file(tmp_path / "plots.gpkg", layer=layer)
    with pytest.raises(InputError, match=r"2 layers \(old, new\).*--layer"):
        canopy.evaluate(write("m.tif", MAP), tmp_path / "plots.gpkg")
    for layer, bias in (("old", -5), ("new", 0)):
        result = canopy.evaluate(write("m.tif", MAP), tmp_path / "plots.gpkg", layer=layer, replicates=0)
        assert result.overall["bias_m"].value == pytest.approx(bias, abs=1e-3)
    direct = canopy.evaluate(write("m.tif", MAP), frame, replicates=0)
    assert direct.kind == "plots" and direct.overall["mae_m"].value < 1e-3


def test_many_shots_are_pooled_as_few_are(write: Callable[..., Path], tmp_path: Path) -> None:
    """Shots of many windows of a map: each gets what it gets alone."""
    from canopy.evaluation import samples
    from canopy.evaluation.opening import open_heights

    path, *_ = shots(tmp_path / "shots.csv", 120)
    chosen = samples.load_gedi(path)
    with open_heights(write("m.tif", MAP)) as heights:
        whole = samples.pool_map(heights, chosen, "p98")
    expected = [np.percentile(disc(a, b, 12.5), 98) for a, b in zip(*places(120), strict=True)]
    np.testing.assert_allclose(whole, expected, atol=1e-3)
