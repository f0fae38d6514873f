"""`canopy compare` and `canopy stats` at the command line."""

from __future__ import annotations

import json

import geopandas
import numpy as np
import pytest
import rasterio
import shapely


@pytest.fixture
def maps(tmp_path):
    """a.tif and b.tif: 12 m of canopy, a clearing in b."""
    heights = np.full((80, 90), 12, np.float32)
    for name in ("a", "b"):
        with rasterio.open(
            tmp_path / f"{name}.tif", "w", driver="GTiff", count=1, dtype="float32", height=80, width=90,
            crs="EPSG:32618", transform=rasterio.Affine(1, 0, 500_000, 0, -1, 4_882_000), nodata=float("nan"),
        ) as dataset:  # fmt: skip
            dataset.write(heights[None])
        heights[20:40, 30:60] = 0
    return tmp_path


def test_compare_dates(canopy, maps):
    done = canopy("compare", "a.tif", "b.tif", "--as", "dates", "--sigma-a", 2, "--sigma-b", 2, "-o", "out")
    assert done.code == 0, done.err
    assert "canopy lost 0.1 ha" in done.out and "report.html" in done.out
    assert (maps / "out" / "change.tif").is_file() and "significant:" not in done.out
    wide = canopy("compare", "a.tif", "b.tif", "--as", "dates", "--sigma-a", 9, "--sigma-b", 9, "-o", "wide")
    assert "in 100% of A's canopy not even the loss of all of it would be significant" in wide.out + wide.err
    assert (
        json.loads((maps / "wide" / "compare.json").read_text())["change"]["rule"][
            "undetectable_canopy_share"
        ]
        == 1
    )


def test_compare_json_is_one_object(canopy, maps):
    done = canopy("compare", "a.tif", "b.tif", "-o", "out", "--json", "--no-report")
    found = json.loads(done.out)
    assert found["mode"] == "products" and found["overall"]["n"] == 7200


def test_compare_refuses_in_one_line(canopy, maps):
    assert canopy("compare", "a.tif", "b.tif", "-o", "out", "--no-report").code == 0
    for words, says in (
        (("a.tif", "b.tif", "-o", "out"), "--overwrite"),
        (("a.tif", "no.tif", "-o", "new"), "no such file"),
        (("a.tif", "b.tif", "-o", "new", "--as", "twins"), "auto, products, dates"),
        (("a.tif", "b.tif", "-o", "new", "--bbox", "1,1"), "outside the maps"),
    ):
        done = canopy("compare", *words)
        assert done.code == 2 and says in done.error_line and "Traceback" not in done.err
    assert not (maps / "new").exists()


def test_stats(canopy, maps):
    shapes = [shapely.box(500_000, 4_881_950, 500_050, 4_882_000), shapely.box(0, 0, 10, 10)]
    geopandas.GeoDataFrame({"stand": ["x", "y"]}, geometry=shapes, crs="EPSG:32618").to_file(maps / "z.gpkg")
    done = canopy(
        "stats", "b.tif", "--zones", "z.gpkg", "-o", "s.csv", "--percentiles", "10,90", "--above", "3"
    )
    assert done.code == 0 and "1 without valid pixels" in done.out
    header = (maps / "s.csv").read_text().splitlines()[0]
    assert "p10_m,p90_m,cover_3m,cover_3m_ha" in header
    assert (
        max(map(len, (maps / "s.csv").read_text().splitlines()[1].split(","))) <= 16
    )  # no 0.30000000000000004
    assert canopy("stats", "b.tif", "--zones", "z.gpkg", "-o", "s.csv").code == 2
    facts = json.loads(canopy("stats", "b.tif", "--zones", "z.gpkg", "-o", "s.parquet", "--json").out)
    assert facts["zones"] == 2 and facts["without_pixels"] == 1
    elsewhere = maps / "elsewhere.gpkg"
    geopandas.GeoDataFrame(geometry=shapes[1:], crs="EPSG:32618").to_file(elsewhere)
    gone = canopy("stats", "b.tif", "--zones", elsewhere, "-o", "t.csv")
    assert gone.code == 2 and "no polygon meets the map" in gone.error_line and not (maps / "t.csv").exists()
    bad = canopy("stats", "b.tif", "--zones", "z.gpkg", "-o", "t.csv", "--percentiles", "ten")
    assert bad.code == 2 and "--percentiles" in bad.error_line
