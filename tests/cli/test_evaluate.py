"""`canopy evaluate` at the command line: what it prints, writes, and refuses."""

from __future__ import annotations

import csv
import json
import runpy
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

stand = runpy.run_path(str(Path(__file__).parents[1] / "evaluation" / "stand.py"))


@pytest.fixture
def pair(tmp_path: Path) -> tuple[Path, Path]:
    reference = stand["forest"](0, (120, 150))
    map_m = (reference + np.random.default_rng(0).normal(0.5, 2, reference.shape)).astype(np.float32)
    return (
        stand["write_heights"](tmp_path / "chm.tif", map_m),
        stand["write_heights"](tmp_path / "lidar.tif", reference),
    )


def test_writes_the_promised_files(canopy: Callable, pair: tuple[Path, Path], tmp_path: Path) -> None:
    ran = canopy(
        "evaluate", "chm.tif", "--reference", "lidar.tif", "--by", "height,site", "-o", "report",
        "--replicates", 50, "--json",
    )  # fmt: skip
    assert ran.code == 0, ran.err
    printed, written = json.loads(ran.out), json.loads((tmp_path / "report" / "metrics.json").read_text())
    assert printed == written
    overall = written["overall"]
    promised = "n mae_m rmse_m bias_m r2 block_r2 nmae edge_error cover_iou_2m by_height"
    for name in promised.split():
        assert set(overall[name]) >= {"value", "ci95"}, name
    assert overall["n"]["value"] == 120 * 150
    assert overall["by_height"]["value"]["5-10"]["n"] > 0
    assert written["shift_m"]["east"] == pytest.approx(0, abs=0.1)
    assert str(tmp_path) not in json.dumps(written)  # no folders of anybody's machine
    with (tmp_path / "report" / "by_site.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["site"] for row in rows] == ["lidar"]
    assert float(rows[0]["mae_m"]) == pytest.approx(overall["mae_m"]["value"], rel=1e-4)
    assert (tmp_path / "report" / "blocks.csv").is_file()
    again = canopy("evaluate", "chm.tif", "--reference", "lidar.tif", "-o", "report")
    assert again.code == 2
    assert "--overwrite" in again.error_line


def test_prints_a_table(canopy: Callable, pair: tuple[Path, Path]) -> None:
    ran = canopy("evaluate", "chm.tif", "--reference", "lidar.tif", "--replicates", 0, "--by", "cover")
    assert ran.code == 0, ran.err
    assert "mae_m" in ran.out
    assert "by cover" in ran.out
    assert "date gap is unknown" in ran.out


def test_help_has_an_example(canopy: Callable) -> None:
    ran = canopy("evaluate", "--help")
    assert ran.code == 0
    assert "canopy evaluate chm.tif --reference" in ran.out


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["chm.tif"], "--reference"),
        (["--reference", "lidar.tif"], "MAP.tif"),
        (["chm.tif", "--reference", "gone.tif"], "no such file"),
        (["gone.tif", "--reference", "lidar.tif"], "no such file"),
        (["chm.tif", "--reference", "lidar.tif", "--kind", "lidar"], "--kind"),
        (["chm.tif", "--reference", "lidar.tif", "--by", "owner"], "--by"),
        (["chm.tif", "--reference", "lidar.tif", "--stat", "median"], "--stat"),
        (["chm.tif", "--reference", "lidar.tif", "--floor-m", "-1"], "--floor-m"),
        (["chm.tif", "--reference", "far.tif"], "overlap"),
        (["void.tif", "--reference", "lidar.tif"], "valid in both"),
        (["nocrs.tif", "--reference", "lidar.tif"], "coordinate reference system"),
    ],
)
def test_bad_input_is_one_line_and_nothing_written(
    canopy: Callable, pair: tuple[Path, Path], tmp_path: Path, words: list[str], says: str
) -> None:
    heights = stand["forest"](0, (60, 60))
    stand["write_heights"](tmp_path / "far.tif", heights, west=stand["WEST"] + 9000)
    stand["write_heights"](tmp_path / "void.tif", np.full_like(heights, np.nan))
    stand["write_heights"](tmp_path / "nocrs.tif", heights, crs=None)
    ran = canopy("evaluate", *words, "-o", "report")
    assert ran.code == 2, ran.err
    assert says in ran.error_line
    assert not (tmp_path / "report").exists()
