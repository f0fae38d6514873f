"""`canopy train` and `canopy pretrain` as users run them; tests/behaviour has what they leave."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from canopy.chips.store import Chip, ChipRow
from canopy.chips.write import write_folder
from canopy.models.checkpoint import describe

SMOKE = "configs/finetune/smoke.yaml"


@pytest.fixture
def chips(tmp_path) -> Path:
    """Four training chips with heights; nothing to judge by."""
    rng = np.random.default_rng(0)
    rows = [ChipRow(f"c{i}", "s", "lidar", "train") for i in range(4)]
    rgb = rng.integers(1, 255, (4, 3, 64, 64)).astype(np.uint8)
    chm = rng.uniform(0, 20, (4, 32, 32)).astype(np.float32)
    write_folder(tmp_path / "chips", [Chip(*parts) for parts in zip(rows, rgb, chm, strict=True)])
    return tmp_path / "chips"


def test_weights_that_nothing_judged_are_said_to_be(canopy, repo, chips, tmp_path) -> None:
    words = (f"data.chips={chips}", "steps=1", "licence=CC-BY-4.0", "tensorboard=false", "-o", "run")
    done = canopy("train", repo / SMOKE, *words)
    assert done.code == 0 and "no val chips" in done.err
    assert done.out.strip() == str(Path("run") / "model.safetensors")
    card = describe(tmp_path / "run" / "model.safetensors")["card"]
    assert card["licence"] == "CC-BY-4.0" and "val" not in card


def test_a_config_is_not_written_over_by_its_own_run(refused, repo, chips, tmp_path) -> None:
    own = tmp_path / "run" / "config.yaml"
    own.parent.mkdir()
    own.write_text((repo / SMOKE).read_text())
    assert "one of the inputs" in refused("train", own, f"data.chips={chips}", "steps=2", "-o", "run")


def test_a_card_names_no_folders() -> None:
    from canopy.training.start import without_folders

    given = "canopy train configs/a.yaml data.chips=/home/me/chips -o /runs/x '/a b/c' ../y lr=1e-3"
    assert without_folders(given) == "canopy train configs/a.yaml data.chips=chips -o x 'a b/c' ../y lr=1e-3"
    assert without_folders('"/somewhere/x.yaml" a=/b') == '"x.yaml" a=b'


def test_settings_that_cannot_be(refused, repo, chips) -> None:
    folder = repo / "configs"
    for command, config, word, says in (
        ("train", folder / "finetune" / "smoke.yaml", "device=tpu", "tpu"),
        ("pretrain", folder / "pretrain" / "smoke.yaml", "views.global_px=40", "patches of 16"),
    ):
        assert says in refused(command, config, f"data.chips={chips}", word, "-o", "out")
