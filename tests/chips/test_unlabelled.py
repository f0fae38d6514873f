"""Images without heights become chips too: for pretraining, with nothing known in their labels."""

from __future__ import annotations

import csv
import runpy

import numpy as np
import pytest
import rasterio
from affine import Affine

from canopy.chips.data import ViewBatches, ViewRules
from canopy.chips.plan import CutRules, SplitRules
from canopy.chips.store import ChipShards
from canopy.chips.write import write_chips

SMALL = ViewRules(global_px=32, local_px=16, locals_=1)


def test_rows_without_a_height_file_are_cut_resampled_and_screened(tmp_path):
    rng = np.random.default_rng(0)
    images = {"sharp": rng.integers(40, 200, (3, 150, 150)), "cloud": np.full((3, 150, 150), 240)}
    lines = ["id,rgb_path,chm_path,site"]
    for i, (name, values) in enumerate(images.items()):
        where = Affine(0.6, 0, 400_000 + 500 * i, 0, -0.6, 4_000_000)
        with rasterio.open(
            tmp_path / f"{name}.tif", "w", driver="GTiff", count=3, dtype="uint8", height=150, width=150,
            crs="EPSG:26917", transform=where,
        ) as file:  # fmt: skip
            file.write(values.astype(np.uint8))
        lines.append(f"{name},{name}.tif,,here")
    (tmp_path / "list.csv").write_text("\n".join(lines) + "\n")
    summary = write_chips(
        tmp_path / "list.csv", tmp_path / "out", CutRules(size_px=256), SplitRules(val=0, test=0)
    )
    assert summary["chips"] == 1 and summary["rejected_by_reason"] == {"cloud": 1}
    shards = ChipShards(tmp_path / "out", splits=("train",))
    chip = shards[0]
    assert chip.row.pair == "sharp" and chip.row.gsd_m == pytest.approx(0.5, abs=0.01)
    assert chip.rgb.shape == (3, 180, 180)  # 150 px of 0.6 m
    assert np.isnan(chip.chm_m).all() and (chip.weight == 0).all() and np.isnan(chip.row.height_p95_m)
    assert ViewBatches(shards, 2, SMALL).make(0).wide.shape == (2, 2, 3, 32, 32)


def test_the_packs_list_holds_out_what_is_for_tests(shared, repo, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(repo / "pipelines"))
    runpy.run_path(str(repo / "pipelines" / "default_model.py"))["write_ssl_table"](shared / "data", tmp_path)
    with (tmp_path / "ssl.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert {r["split"] for r in rows} == {"train", "val"} and len(rows) > 1400
    assert all((tmp_path / r["rgb_path"]).is_file() for r in rows[::50])
    held_out = set()
    for table in ("manifest.csv", "ssl/manifest_ssl.csv"):
        with (shared / "data" / table).open() as file:
            held_out |= {r["id"] for r in csv.DictReader(file) if r["split"].startswith("test")}
    assert held_out and not held_out & {r["id"] for r in rows}
    assert all(r["chm_path"] for r in rows if r["split"] == "val")
