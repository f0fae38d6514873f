"""Every benchmark at a size of nothing: it runs, and what it says hangs together. Never how fast."""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import rasterio


@pytest.fixture
def script(repo: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], ModuleType]:
    """`script("memory")`: the module of benchmarks/memory.py; cases run in this process."""
    monkeypatch.syspath_prepend(str(repo / "benchmarks"))

    def alone(path: str, case: dict) -> dict:
        module = importlib.import_module(Path(path).stem)
        return module.measure(Path(case["folder"])) if "folder" in case else module.run_case(case)

    monkeypatch.setattr(importlib.import_module("common"), "alone", alone)
    return importlib.import_module


def results(folder: Path, name: str):
    whole = json.loads((folder / f"{name}.json").read_text())
    assert whole["benchmark"] == name and whole["machine"]["versions"]["torch"]
    return whole["results"]


def test_the_loop_is_a_fair_rival(script, tmp_path) -> None:
    """It covers every pixel, loses nothing of the model's heights, and sees the published share of pixels."""
    common, rival = script("common"), script("rival")
    for length in (256, 257, 448, 640, 1000):
        covered = np.zeros(length, int)
        for start in rival.starts(length):
            covered[start : start + 256] += 1
        assert covered.min() >= 1 and rival.starts(length)[-1] <= length - 256
    side = 256 + 192 * 20
    assert rival.windows(side, side) * 256**2 / side**2 == pytest.approx((256 / 192) ** 2, rel=0.05)
    image = common.make_image(tmp_path / "a.tif", 500, compress="deflate")
    rival.predict_loop(lambda rgb: 30 * rgb[:, 1:2], image, tmp_path / "b.tif")
    with rasterio.open(image) as source, rasterio.open(tmp_path / "b.tif") as made:
        assert np.allclose(made.read(1), source.read(2) * (30 / 255), atol=1e-4)
        assert made.crs == source.crs and made.transform == source.transform


def test_throughput(script, small_model, tmp_path) -> None:
    words = ["--models", f"{small_model}:300", "--ways", "torch", "loop", "--rounds", "1"]
    script("throughput").main([*words, "--out", str(tmp_path)])
    ours, loop = results(tmp_path, "throughput")[0]["rows"]
    assert loop["x loop"] == 1 and ours["x loop"] == pytest.approx(loop["wall s"] / ours["wall s"])
    # 300 px are two windows of 256 px along an axis.
    assert loop["px seen"] == pytest.approx(4 * 256**2 / 300**2) and ours["px seen"] > 1
    assert ours["diff m"] is None and 0 < loop["diff m"] < loop["max m"] < 100


def test_memory_and_evaluate(script, tmp_path) -> None:
    memory = script("memory")
    for module, sizes in ((memory, ("300", "400")), (script("evaluate"), ("600", "700"))):
        with pytest.raises(SystemExit):
            module.main(["--sizes", *sizes, "--out", str(tmp_path)])
    assert set(results(tmp_path, "memory")["sizes"]) == {"300", "400"}
    found = results(tmp_path, "evaluate")["sizes"]["700"]
    assert found["pixels"] == 700**2 and found["peak_mb"] > 50
    peaks = {2000: 800, 5000: 900, 20_000: 909}
    assert memory.growth_of({s: {"peak_mb": p} for s, p in peaks.items()}) == pytest.approx(0.01)


def test_startup_and_the_targets(script, tmp_path, capsys) -> None:
    script("startup").main(["--times", "1", "--out", str(tmp_path)])
    script("targets").main(["--out", str(tmp_path)])
    rows = {row["by"]: row for row in results(tmp_path, "targets")}
    assert rows["benchmarks/startup.py"]["met"] in ("yes", "no")
    assert rows["benchmarks/memory.py"]["measured"] == "not measured"
    shown = capsys.readouterr().out
    assert "Targets" in shown and "`canopy --help`" in shown


@pytest.mark.parametrize(("ratio", "growth", "met"), [(1.39, 0.051, "no"), (1.41, 0.049, "yes")])
def test_targets_are_judged_by_what_was_measured(script, ratio, growth, met) -> None:
    way = {"way": "openvino", "what": "OpenVINO", "x loop": 0.9, "x inside": ratio, "x cpu": 2.0}
    judged = script("targets").judge({
        "throughput": {"results": [{"model": "large", "side_px": 640, "rows": [way]}]},
        "memory": {"results": {"growth": growth, "sizes": {"5000": {}, "20000": {}}}},
    })  # fmt: skip
    assert [row["met"] for row in judged] == [met, "-", met, "-"], "no int8 was run, and no --help"
