"""The list of images that pretraining may see."""

from __future__ import annotations

import csv
import runpy


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
