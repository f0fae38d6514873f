"""`canopy map` at the command line: real worker processes, exit codes, status, planning."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import rasterio


@pytest.fixture
def words(make_image: Callable, model_file: Path) -> list[object]:
    """A region of four tiles."""
    return [
        "map", make_image(), "--model", model_file, "--device", "cpu", "--grid", "utm", "--zoom", 20,
        "--threads", 1, "-o", "run",
    ]  # fmt: skip


def test_a_run_its_status_and_its_going_on(
    canopy: Callable, words: list[object], tmp_path: Path, heights: Callable
) -> None:
    made = canopy(*words, "--json", "--workers", 2)
    assert made.code == 0, made.err
    result = json.loads(made.out)
    assert result["tiles"]["done"] == 4 and result["this_start"]["done"] == 4 and not result["failures"]
    with rasterio.open(tmp_path / "run" / "mosaic") as mosaic:
        assert mosaic.shape == (100, 120)
    assert canopy("predict", *words[1:6], "-o", "once.tif").code == 0
    np.testing.assert_allclose(heights("run/mosaic"), heights("once.tif"), atol=0.01)
    shown = canopy("map", "--status", "run")
    assert shown.code == 0 and "4 of 4 tiles finished" in shown.out
    again = canopy("map", "-o", "run", "--resume", "--json")
    assert again.code == 0 and json.loads(again.out)["this_start"]["done"] == 0
    other = canopy("map", "-o", "run", "--resume", "--zoom", 10)  # typed, though it is the default
    assert other.code == 2 and "map.zoom was 20 and is 10" in other.error_line
    changed = canopy(*words, "--gsd", 1)
    assert changed.code == 2 and "map.gsd was null and is 1.0" in changed.error_line


def test_planning_writes_nothing(canopy: Callable, words: list[object], tmp_path: Path) -> None:
    before = sorted(p.name for p in tmp_path.iterdir())
    plan = canopy(*words, "--dry-run", "--price", 3.6, "--json", "--workers", 2)
    assert plan.code == 0, plan.err
    cost = json.loads(plan.out)
    assert cost["tiles"] == 4 and cost["crops"] > 4 and cost["pixels"] == 12_000
    assert cost["money"] == pytest.approx(3.6 * cost["worker_hours"])
    assert cost["hours"] == pytest.approx(cost["worker_hours"] / 2)
    assert cost["imagery_bytes"] > 3 * 12_000
    assert sorted(p.name for p in tmp_path.iterdir()) == before


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--zoom", 30], "zoom"),
        (["--tile-px", 1000], "power of two"),
        (["--shard", "5/3"], "I/N"),
        (["--grid", "hexagon"], "grid"),
        (["--crs", "EPSG:4326"], "projected"),
    ],
)
def test_bad_options_are_one_line_and_write_nothing(
    canopy: Callable, words: list[object], tmp_path: Path, more: list[object], message: str
) -> None:
    ran = canopy(*words, *more)
    assert ran.code == 2 and message in ran.error_line and len(ran.error_line) < 400
    assert not (tmp_path / "run").exists()


def test_a_folder_without_a_run(canopy: Callable, tmp_path: Path) -> None:
    for words in (["--status", "nowhere"], ["-o", "nowhere", "--resume"], []):
        ran = canopy("map", *words)
        assert ran.code == 2
    assert not (tmp_path / "nowhere").exists()
