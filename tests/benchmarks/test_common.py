"""What the benchmarks share: turns, processes of their own, images and results."""

from __future__ import annotations

import json

import numpy as np
import pytest
import rasterio


def test_cases_run_in_turn(script):
    seen = []
    cases = {name: (lambda name=name: seen.append(name) or {"wall_s": len(seen)}) for name in "ab"}
    found = script("common").in_turn(cases, 2, said=False)
    assert seen == ["a", "b", "a", "b"]
    assert script("common").middle(found["b"], "wall_s") == 3


def test_a_case_of_its_own(script, tmp_path):
    path = tmp_path / "case.py"
    path.write_text("import sys\nprint('noise')\nprint(sys.argv[2])\n")
    assert script("common").alone(str(path), {"side": 3}) == {"side": 3}
    path.write_text("raise SystemExit('no such model')\n")
    with pytest.raises(RuntimeError, match="no such model"):
        script("common").alone(str(path), {})


def test_results_name_the_machine(script, tmp_path, capsys):
    common = script("common")
    common.save(tmp_path / "new", "x", {"size": 1}, [{"a": 1}])
    whole = json.loads((tmp_path / "new" / "x.json").read_text())
    assert whole["benchmark"] == "x" and whole["results"] == [{"a": 1}]
    assert {"cpu", "cpus", "instruction_sets", "versions", "commit", "load_1min"} <= set(whole["machine"])
    assert whole["machine"]["versions"]["torch"]
    common.show("A title", [{"name": "n", "pace": 1234.5, "none": None}], ["a note"])
    shown = capsys.readouterr().out
    assert "A title" in shown and "1,23" in shown and "a note" in shown


def test_numbers_as_text(script):
    text = script("common").text
    assert [text(v) for v in (None, 0.12345, 12345.6, 12345, True, "x")] == [
        "-", "0.123", "12,346", "12,345", "True", "x"
    ]  # fmt: skip


def test_images(script, tmp_path):
    common = script("common")
    with rasterio.open(common.make_image(tmp_path / "a.tif", 700)) as dataset:
        full = dataset.read()
        assert dataset.shape == (700, 700) and dataset.count == 3 and dataset.block_shapes[0] == (512, 512)
    assert full.any(axis=0).all()
    sparse = common.make_image(tmp_path / "b.tif", 1536, compress="deflate", every_px=1024)
    with rasterio.open(sparse) as dataset:
        filled = dataset.read().any(axis=0)
    assert filled[:512, :512].all() and filled[1024:, 1024:].all() and filled.mean() == pytest.approx(4 / 9)


def test_limits_of_the_machine_are_numbers(script):
    common = script("common")
    clock = common.Clock()
    found = common.gemm(seconds=0.05, side=128)
    assert found["gflops"] > 0 and found["gflop_per_cpu_s"] > 0 and found["library"]
    assert common.peak_mb() > 50
    assert np.isfinite(list(clock.read().values())).all()
