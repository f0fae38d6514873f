"""The scripts of pipelines/: what they make of their words."""

from __future__ import annotations

import runpy
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

MATRIX = "set: {steps: 1}\nshares: [1.0]\nseeds: [0]\nruns: [{name: mean, baseline: constant}]\n"


@pytest.fixture
def script(repo: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    """`script("experiments", ...)`: the exit code of a script's main."""

    def run(name: str, *words: object) -> int:
        monkeypatch.setattr(sys, "argv", [name, *map(str, words)])
        main = runpy.run_path(str(repo / "pipelines" / f"{name}.py"), run_name="pipeline")["main"]
        return int(main())

    return run


def test_words_that_are_no_pairs_are_refused(script, tmp_path, capsys) -> None:
    matrix = tmp_path / "matrix.yaml"
    matrix.write_text(MATRIX)
    words = (tmp_path, "-o", tmp_path / "out", "--matrix", matrix, "--list")
    assert script("experiments", *words, "--var", "dinov2=a=b.safetensors") == 0
    assert script("experiments", *words, "--var", "dinov2") == 2
    assert script("score_pack", tmp_path, "--note", "no pair") == 2
    told = capsys.readouterr().err.splitlines()
    assert told == [
        "error: --var: cannot read 'dinov2'; expected NAME=VALUE",
        "error: --note: cannot read 'no pair'; expected NAME=VALUE",
    ]


def test_a_region_takes_its_settings_before_and_after_its_flags(script, repo, tmp_path, capsys) -> None:
    config = tmp_path / "region.yaml"
    config.write_text("imagery: demo\nzoom: 14\n")
    place = ("bbox=44.083,-71.296", "size_m=100")
    out = f"out={tmp_path / 'map'}"
    assert script("predict_region", config, place[0], "--dry-run", place[1], out) == 0
    assert "100 x 100 m" in capsys.readouterr().err
    assert not (tmp_path / "map").exists()
