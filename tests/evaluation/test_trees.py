"""Trees that are found in heights, and heights on crowns that are given."""

from __future__ import annotations

import importlib

import geopandas
import numpy as np
import pytest
import rasterio
import shapely
from affine import Affine

from canopy.errors import ConfigError, InputError
from canopy.evaluation.trees import find
from canopy.evaluation.trees.table import trees
from canopy.evaluation.zones import stats

WEST, NORTH = 500_000.0, 4_882_000.0


def cones(tops, shape=(120, 150), pixel=(1.0, 1.0)):
    """Heights (h, w) of cones; a top is row, col, height and radius in metres, the radius at half height."""
    rows, cols = np.mgrid[: shape[0], : shape[1]]
    heights = np.zeros(shape)
    for row, col, height, radius in tops:
        away = np.hypot((rows - row) * pixel[0], (cols - col) * pixel[1])
        heights = np.maximum(heights, np.where(away <= radius, height * (1 - away / radius / 2), 0))
    return heights.astype(np.float32)


TOPS = [(20, 20, 20, 4), (20, 32, 24, 5), (60, 64, 30, 6), (63, 100, 12, 3), (100, 127, 18, 4)]


def test_planted_trees_are_found_at_their_place(write_map, tmp_path):
    out = tmp_path / "trees.gpkg"
    found = trees(write_map("a.tif", cones(TOPS)), out, smooth_m=0.3)
    assert len(found) == len(TOPS) and not found.attrs["notes"]
    for row, (y, x, height, radius) in zip(found.itertuples(), sorted(TOPS), strict=True):
        assert (row.x, row.y) == (WEST + x + 0.5, NORTH - y - 0.5) and row.top.within(row.geometry)
        assert row.height_m == pytest.approx(height)
        assert row.crown_m2 == pytest.approx(np.pi * radius**2, rel=0.2)
        assert row.geometry.area == pytest.approx(row.crown_m2, rel=2e-3)
    layers = [geopandas.read_file(out, layer=name) for name in ("crowns", "tops")]
    assert [set(layer.geom_type) for layer in layers] == [{"Polygon"}, {"Point"}]
    assert (layers[1]["height_m"] == found["height_m"]).all() and layers[0].crs == found.crs
    trees(write_map("a.tif", cones(TOPS)), tmp_path / "trees.parquet", smooth_m=0.3)
    assert geopandas.read_parquet(tmp_path / "trees.parquet").equals(found)


def test_block_edges_lose_and_double_no_tree(write_map, forest, monkeypatch):
    heights = forest(300)
    heights[100:140, 90:100] = np.nan
    path = write_map("a.tif", heights)
    whole = trees(path)
    monkeypatch.setattr(find, "BLOCK_PX", 64)
    cut = trees(path)
    assert (
        len(whole) > 200
        and len(find.blocks_of(find.Grid.of("EPSG:32618", Affine(1, 0, 0, 0, -1, 0), (300, 300)))) > 20
    )
    assert cut.drop(columns=["geometry", "top"]).equals(whole.drop(columns=["geometry", "top"]))
    assert (shapely.area(cut.geometry.symmetric_difference(whole.geometry)) == 0).all()
    missing = shapely.box(WEST + 90, NORTH - 140, WEST + 100, NORTH - 100)
    assert cut.geometry.intersection(missing).area.max() == 0
    assert cut.geometry.area.sum() == pytest.approx(cut.union_all().area)  # no pixel is of two trees


@pytest.mark.parametrize("kind", ["feet", "degrees"])
def test_other_units_give_the_same_trees(write_map, kind):
    if kind == "feet":  # of the ground, and of the heights
        transform, crs = Affine(1 / 0.3048006096, 0, 2e6, 0, -1 / 0.3048006096, 7e5), "EPSG:2263"
        path = write_map("f.tif", cones(TOPS) / 0.3048, crs=crs, transform=transform)
        with rasterio.open(path, "r+") as file:
            file.units = ("ft",)
    else:
        transform = Affine(1 / 78_850, 0, -75, 0, -1 / 111_120, 44.95)
        path = write_map("d.tif", cones(TOPS), crs="EPSG:4326", transform=transform)
    found = trees(path, smooth_m=0.3)
    assert found["height_m"].to_list() == pytest.approx([top[2] for top in sorted(TOPS)], rel=1e-4)
    wanted = [np.pi * top[3] ** 2 for top in sorted(TOPS)]
    assert found["crown_m2"].to_numpy() == pytest.approx(np.array(wanted), rel=0.2)
    assert found.crs == rasterio.open(path).crs


def test_crowns_that_are_given_get_heights(write_map, tmp_path):
    rng = np.random.default_rng(0)
    heights = rng.uniform(5, 20, (60, 60)).astype(np.float32)
    bands = np.stack([heights, heights - 2, heights + 3])
    path = write_map("b.tif", bands, names=("canopy_height", "height_lower", "height_upper"))
    shapes = [shapely.box(WEST + 10, NORTH - 20, WEST + 20, NORTH - 10),
              shapely.Point(WEST + 40.3, NORTH - 40.2).buffer(5), shapely.box(0, 0, 1, 1)]  # fmt: skip
    crowns = geopandas.GeoDataFrame({"who": list("abc")}, geometry=shapes, crs="EPSG:32618")
    found, other = trees(path, tmp_path / "h.gpkg", crowns=crowns), stats(path, crowns, percentiles=(95,))
    inside = heights[10:20, 10:20].astype(float)
    assert found["p95_m"][0] == pytest.approx(np.percentile(inside, 95, method="inverted_cdf"), abs=1e-6)
    assert found["mean_lower_m"][0] == pytest.approx(inside.mean() - 2, rel=1e-6)
    assert found["max_upper_m"][0] == pytest.approx(inside.max() + 3, rel=1e-6)
    for name in ("n", "valid_share", "mean_m", "max_m", "p95_m"):
        assert found[name][:2].to_numpy() == pytest.approx(other[name][:2].to_numpy(), abs=1e-3), name
    assert found["n"][2] == 0 and np.isnan(found["p95_m"][2]) and list(found["who"]) == list("abc")
    with pytest.raises(InputError, match="--min-height"):
        trees(path, crowns=crowns, min_height_m=3)


def test_nothing_to_find_and_bad_inputs(write_map, tmp_path):
    bare = write_map("bare.tif", np.zeros((40, 40), np.float32))
    for path in (bare, write_map("none.tif", np.full((40, 40), np.nan, np.float32))):
        found = trees(path, out := tmp_path / f"{path.stem}.gpkg")
        assert not len(found) and "no tree" in found.attrs["notes"][0] and out.exists()
    assert not len(trees(bare, tmp_path / "dry.gpkg", dry_run=True)) and not (tmp_path / "dry.gpkg").exists()
    with pytest.raises(InputError, match="hold several trees"):
        trees(write_map("coarse.tif", np.zeros((40, 40), np.float32), gsd=10))
    for name, value in (("min_height_m", 0), ("smooth_m", -1), ("window", ())):
        with pytest.raises(ConfigError):
            trees(bare, **{name: value})
    with pytest.raises(InputError, match="does not end in"):
        trees(bare, tmp_path / "trees.csv")


def test_tops_of_the_synthetic_forest_are_trees(repo, monkeypatch):
    monkeypatch.syspath_prepend(str(repo / "benchmarks"))
    bench = importlib.import_module("trees")
    scene, height, _ = bench.forest(3, 150.0)
    scores = bench.score(scene, trees(height, min_height_m=5.0), 5.0)
    assert scores["trees"] > 50
    # Trees stand closer in it than the rule's crowns are wide: what is found is true, and not all is found.
    assert scores["hits"] / scores["tops"] > 0.8 and scores["hits"] / scores["trees"] > 0.3
    narrow = bench.score(scene, trees(height, min_height_m=5.0, window=(1.5, 0.1)), 5.0)
    assert narrow["hits"] > 1.3 * scores["hits"]
    assert abs(scores["height"]).mean() < 1.0
