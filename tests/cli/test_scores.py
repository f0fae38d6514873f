"""`canopy evaluate`, `compare` and `stats` at the command line: what they print, and what they refuse."""

from __future__ import annotations

import csv
import json

import geopandas
import numpy as np
import pytest
import rasterio
import shapely

METRE = rasterio.Affine(1, 0, 500_000, 0, -1, 4_882_000)


@pytest.fixture
def maps(make_image, tmp_path):
    """a.tif and b.tif: 80 x 90 m with 12 m of canopy, a clearing in b; far.tif, void.tif and nocrs.tif;
    stands.gpkg: a stand on the map and one off it, which elsewhere.gpkg has alone."""
    heights = np.full((1, 80, 90), 12, np.float32)
    make_image("a.tif", heights, transform=METRE, nodata=float("nan"))
    heights[:, 20:40, 30:60] = 0
    make_image("b.tif", heights, transform=METRE, nodata=float("nan"))
    make_image("far.tif", heights, transform=rasterio.Affine.translation(9000, 0) @ METRE)
    make_image("nocrs.tif", heights, transform=METRE, crs=None)
    make_image("void.tif", heights * np.nan, transform=METRE, nodata=float("nan"))
    stands = [shapely.box(500_000, 4_881_950, 500_050, 4_882_000), shapely.box(0, 0, 10, 10)]
    stands = geopandas.GeoDataFrame({"stand": ["x", "y"]}, geometry=stands, crs="EPSG:32618")
    stands.to_file(tmp_path / "stands.gpkg")
    stands.iloc[1:].to_file(tmp_path / "elsewhere.gpkg")
    return tmp_path


def test_evaluate_prints_a_table(canopy, maps) -> None:
    ran = canopy("evaluate", "b.tif", "--reference", "a.tif", "--replicates", 0, "--by", "cover")
    assert ran.code == 0 and "mae_m" in ran.out and "by cover" in ran.out and "date gap is unknown" in ran.out


def test_change_that_could_not_be_seen_is_said(canopy, maps) -> None:
    words = ("compare", "a.tif", "b.tif", "--as", "dates", "--no-report")
    done = canopy(*words, "--sigma-a", 2, "--sigma-b", 2, "-o", "out")
    assert done.code == 0 and "canopy lost 0.1 ha" in done.out and "significant:" not in done.out
    wide = canopy(*words, "--sigma-a", 9, "--sigma-b", 9, "-o", "wide")
    assert "in 100% of A's canopy not even the loss of all of it would be significant" in wide.out + wide.err
    rule = json.loads((maps / "wide" / "compare.json").read_text())["change"]["rule"]
    assert rule["undetectable_canopy_share"] == 1


def test_stats_are_short_numbers(canopy, maps) -> None:
    done = canopy("stats", "b.tif", "--zones", "stands.gpkg", "-o", "s.csv")
    assert done.code == 0 and "1 without valid pixels" in done.out
    row = (maps / "s.csv").read_text().splitlines()[1]
    assert max(map(len, row.split(","))) <= 16, "no 0.30000000000000004"


EVALUATE = "evaluate", "b.tif", "--reference", "a.tif"


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("evaluate", "b.tif"), "--reference"),
        (("evaluate", "--reference", "a.tif"), "MAP.tif"),
        (("evaluate", "b.tif", "--reference", "gone.tif"), "no such file"),
        (("evaluate", "b.tif", "--reference", "far.tif"), "overlap"),
        (("evaluate", "void.tif", "--reference", "a.tif"), "valid in both"),
        (("evaluate", "nocrs.tif", "--reference", "a.tif"), "rio edit-info --crs"),
        ((*EVALUATE, "--kind", "lidar"), "--kind"),
        ((*EVALUATE, "--by", "owner"), "--by"),
        ((*EVALUATE, "--stat", "median"), "--stat"),
        ((*EVALUATE, "--floor-m", "-1"), "--floor-m"),
        ((*EVALUATE, "--benchmark", "pack"), "one or the other"),
        ((*EVALUATE, "--model", "default"), "--benchmark NAME"),
        ((*EVALUATE, "--device", "cpu"), "Leave --device out"),
        (("evaluate", "--benchmark", "packs"), "did you mean 'pack'"),
        (("evaluate", "--benchmark", "pack"), "--data-dir"),
        (("evaluate", "--benchmark", "france", "--data-dir", "."), "canopy data get france-lidar-hd"),
        (("evaluate", "--benchmark", "pack", "--by", "slope", "--no-shift"), "Leave --by, --no-shift out"),
        (("stats", "b.tif", "--zones", "elsewhere.gpkg", "-o", "t.csv"), "no polygon meets the map"),
        (("compare", "far.tif", "nocrs.tif", "-o", "out"), "coordinate reference system"),
    ],
)
def test_bad_input_is_one_line_and_nothing_written(refused, maps, words, says) -> None:
    report = ("-o", "report") if words[0] == "evaluate" else ()
    assert says in refused(*words, *report)


def test_two_models_in_one_table(canopy, refused, make_image, model_file, tmp_path) -> None:
    """On a pack of three tiles; one network under two names predicts once."""
    rows = [("a", "other", "Wood", "val"), ("b", "neon", "Plot", "val"), ("c", "other", "Far", "test")]
    lines = ["id,kind,site,split,rgb_path,chm_path"]
    cm = np.random.default_rng(3).integers(0, 3000, (1, 50, 60)).astype(np.uint16)
    for name, *facts in rows:
        make_image(f"pack/{name}_rgb.tif")
        with rasterio.open(
            make_image(f"pack/{name}_chm.tif", cm, transform=METRE, nodata=65535), "r+"
        ) as chm:
            chm.scales = (0.01,)
        lines.append(",".join([name, *facts, f"{name}_rgb.tif", f"{name}_chm.tif"]))
    (tmp_path / "pack" / "manifest.csv").write_text("\n".join(lines) + "\n")
    other = tmp_path / "second.safetensors"
    other.write_bytes(model_file.read_bytes())
    words = ("evaluate", "--benchmark", "pack", "--data-dir", "pack", "--replicates", 0)
    models = ("--model", model_file, "--model", other)
    done = canopy(*words, *models, "--group", "val", "--group", "test", "-o", "out")
    assert done.code == 0, done.err
    table = [line for line in done.out.splitlines() if line.startswith("| ")]
    assert len(table) == 2 + 4 and "| small `" in table[2] and "| second `" in table[3]
    assert "was small trained here? unknown" in done.out
    with (tmp_path / "out" / "results.csv").open() as file:
        found = list(csv.DictReader(file))
    assert {row["group"] for row in found} == {"val", "test"} and all(row["n"] == "3000" for row in found)
    assert len(list((tmp_path / "out" / "maps").rglob("*.tif"))) == 2
    assert "--group" in refused(*words, "--group", "nope", "-o", "new")
    assert "no-such" in refused(*words, "--group", "val", "--model", "no-such", "-o", "new")
