"""`canopy evaluate --benchmark` at the command line, with a real (small) model on images made on the fly."""

from __future__ import annotations

import csv
import json

import numpy as np
import pytest
import rasterio


@pytest.fixture
def pack(tmp_path, make_image):
    """Three tiles of the pack's layout: 0.5 m images of 60 m, heights at 1 m."""
    rows = [("a", "other", "Wood", "val"), ("b", "neon", "Plot", "val"), ("c", "other", "Far", "test"),
            ("d", "other", "Leafless", "test_hard")]  # fmt: skip
    (tmp_path / "pack").mkdir()
    for name, *_ in rows:
        make_image(f"pack/{name}_rgb.tif")
        with rasterio.open(
            tmp_path / "pack" / f"{name}_chm.tif", "w", driver="GTiff", count=1, dtype="uint16",
            height=50, width=60,
            crs="EPSG:32618", transform=rasterio.Affine(1, 0, 500_000, 0, -1, 4_882_000), nodata=65535,
        ) as dataset:  # fmt: skip
            dataset.scales = (0.01,)
            dataset.write(np.random.default_rng(3).integers(0, 3000, (1, 50, 60)).astype(np.uint16))
    with (tmp_path / "pack" / "manifest.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["id", "kind", "site", "split", "rgb_path", "chm_path"])
        writer.writerows([*row, f"{row[0]}_rgb.tif", f"{row[0]}_chm.tif"] for row in rows)
    return tmp_path / "pack"


def test_two_models_in_one_table(canopy, pack, model_file, tmp_path):
    other = tmp_path / "second.safetensors"
    other.write_bytes(model_file.read_bytes())
    done = canopy(
        "evaluate", "--benchmark", "pack", "--model", model_file, "--model", other, "--data-dir", pack,
        "-o", "out", "--replicates", 0, "--group", "val", "--group", "test",
    )  # fmt: skip
    assert done.code == 0, done.err
    table = [line for line in done.out.splitlines() if line.startswith("| ")]
    assert len(table) == 2 + 4 and "MAE m" in table[0]
    assert "| small `" in table[2] and "| second `" in table[3]
    assert "was small trained here? unknown" in done.out
    rows = list(csv.DictReader((tmp_path / "out" / "results.csv").open()))
    assert {r["group"] for r in rows} == {"val", "test"} and all(int(r["n"]) == 3000 for r in rows)
    assert (tmp_path / "out" / "results.md").is_file()
    assert len(list((tmp_path / "out" / "maps").rglob("*.tif"))) == 2  # one file, one hash: predicted once


def test_json_and_refusals(canopy, pack, model_file):
    done = canopy(
        "evaluate", "--benchmark", "pack", "--model", model_file, "--data-dir", pack, "-o", "out", "--json",
        "--replicates", 0, "--group", "val-plots",
    )  # fmt: skip
    found = json.loads(done.out)
    assert found["groups"]["small/val-plots"]["overall"]["n"]["value"] == 3000
    for words, says in (
        (("--benchmark", "packs"), "did you mean 'pack'"),
        (("--benchmark", "pack"), "--data-dir"),
        (("--benchmark", "france", "--data-dir", pack), "canopy data get france-lidar-hd"),
        (("--benchmark", "pack", "--data-dir", pack, "--model", "no-such-model"), "no-such-model"),
        (("--benchmark", "pack", "--data-dir", pack, "--group", "nope"), "--group"),
        (("map.tif", "--benchmark", "pack"), "one or the other"),
        (("map.tif", "--reference", "x.tif", "--model", "default"), "--benchmark NAME"),
        (("map.tif", "--reference", "x.tif", "--device", "cpu"), "Leave --device out"),
        (
            ("--benchmark", "pack", "--by", "slope", "--no-shift"),
            "rules of its own. Leave --by, --no-shift out",
        ),
        (("--benchmark", "pack", "--seed", "0"), "Leave --seed out"),
    ):
        refused = canopy("evaluate", *words)
        assert refused.code == 2 and says in refused.error_line, refused.err
