"""The list of images that pretraining may see."""

from __future__ import annotations

import csv
import subprocess
import sys


def test_the_packs_list_holds_out_what_is_for_tests(shared, repo, tmp_path):
    words = [sys.executable, "pipelines/ssl_manifest.py", str(shared / "data"), "-o", str(tmp_path)]
    ran = subprocess.run(words, cwd=repo, capture_output=True, text=True, timeout=300)
    assert ran.returncode == 0, ran.stderr
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
