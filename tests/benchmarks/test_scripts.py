"""Every benchmark at a size of nothing: it runs, and what it says hangs together. Never how fast."""

from __future__ import annotations

import json
from pathlib import Path

import pytest


def results(folder: Path, name: str):
    return json.loads((folder / f"{name}.json").read_text())["results"]


def test_throughput(script, tiny_model, tmp_path, monkeypatch):
    throughput, ways = script("throughput"), script("ways")
    # In this process: a new one for every case would only import torch again.
    monkeypatch.setattr(throughput.common, "alone", lambda _, case: ways.run_case(case))
    throughput.run([f"{tiny_model}:300"], ["torch", "loop"], 1, tmp_path / "out", tmp_path)
    found = results(tmp_path / "out", "throughput")[0]
    ours, loop = found["rows"]
    assert found["crop_px"] == 64 and found["window_gflop"] > found["crop_gflop"] > 0
    assert loop["x loop"] == 1 and ours["x loop"] == pytest.approx(loop["wall s"] / ours["wall s"])
    # 300 px are two windows of 256 px along an axis.
    assert loop["px seen"] == pytest.approx(4 * 256**2 / 300**2)
    assert ours["/model"] >= 1 and ours["px seen"] > 1 and ours["% GEMM"] > 0
    assert ours["diff m"] is None and 0 < loop["diff m"] < loop["max m"] < 100


def test_memory(script, tmp_path):
    memory = script("memory")
    with pytest.raises(SystemExit):
        memory.main(["--sizes", "300", "400", "--out", str(tmp_path)])
    found = results(tmp_path, "memory")
    assert set(found["sizes"]) == {"300", "400"} and abs(found["growth"]) < 0.2
    peaks = {2000: 800, 5000: 900, 20_000: 909}
    assert memory.growth_of({s: {"peak_mb": p} for s, p in peaks.items()}) == pytest.approx(0.01)


def test_evaluate(script, tmp_path):
    with pytest.raises(SystemExit):
        script("evaluate").main(["--sizes", "600", "700", "--out", str(tmp_path)])
    whole = json.loads((tmp_path / "evaluate.json").read_text())
    assert set(whole) == {"benchmark", "machine", "settings", "results"}
    found = whole["results"]["sizes"]["700"]
    assert found["pixels"] == 700**2 and found["peak_mb"] > 50 and found["cpu_s"] > 0


def test_lidar(script, tmp_path):
    pytest.importorskip("laspy")
    found = script("lidar").measure(20_000, 1, tmp_path)
    assert found["points"] == 20_000 and found["Mpoints/s"] > 0 and 5 < found["mean height m"] < 20


def test_gedi(script, tmp_path):
    pytest.importorskip("h5py")
    gedi = script("gedi")
    gedi.make_granule(tmp_path / "a.h5", 50, "auto")
    case = {"path": str(tmp_path / "a.h5"), "area": "all", "filter": "none", "rh": "95,98"}
    assert gedi.measure(case)["kept"] == 8 * 50


def test_workers(script, tiny_model, tmp_path):
    workers = script("workers")
    image = workers.common.make_image(tmp_path / "a.tif", 300)
    found = workers.map_region(image, tmp_path / "run", 1, str(tiny_model))
    assert found["tiles"] >= 1 and found["km2"] == pytest.approx(0.0225, rel=0.1)


def test_one_benchmark_and_the_targets(script, tmp_path, capfd):
    with pytest.raises(SystemExit) as end:
        script("run").main(["--only", "startup", "--out", str(tmp_path)])
    assert not end.value.code
    assert {row["command"] for row in results(tmp_path, "startup")} >= {"canopy --help"}
    rows = {row["by"]: row for row in results(tmp_path, "targets")}
    assert rows["benchmarks/startup.py"]["met"] in ("yes", "no")
    assert rows["benchmarks/memory.py"]["measured"] == "not measured"
    assert "Targets" in capfd.readouterr().out
