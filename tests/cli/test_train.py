"""`canopy train` as users run it."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from canopy.cli.main import app
from canopy.errors import ConfigError
from canopy.models.checkpoint import describe

spec = importlib.util.spec_from_file_location(
    "training_conftest", Path(__file__).parents[1] / "training" / "conftest.py"
)
assert spec and spec.loader
chips = importlib.util.module_from_spec(spec)
spec.loader.exec_module(chips)


@pytest.fixture
def config(tmp_path):
    folder = chips.write_folder(tmp_path / "chips", ["train"] * 3 + ["val"])
    path = tmp_path / "tiny.yaml"
    path.write_text(chips.TINY + f"data: {{chips: {folder}}}\n")
    return path


def call(*args):
    return CliRunner().invoke(app, ["train", *map(str, args)])


def test_a_config_is_not_written_over_by_its_own_run(config, tmp_path):
    (tmp_path / "run").mkdir()
    own = config.rename(tmp_path / "run" / "config.yaml")
    before = own.read_text()
    done = call(own, "steps=2", "-o", tmp_path / "run")
    assert done.exit_code == 2 or "is one of the inputs" in str(done.exception)
    assert own.read_text() == before


def test_train_then_resume_with_json(config, tmp_path):
    done = call(config, "steps=2", "-o", tmp_path / "run")
    assert done.exit_code == 0 and done.stdout.strip() == str(tmp_path / "run" / "model.safetensors")
    assert "step 2" in done.stderr and "val MAE" in done.stderr
    more = call(config, "steps=4", "-o", tmp_path / "run", "--resume", "--json", "-q")
    facts = json.loads(more.stdout)
    assert facts["steps"] == 4 and facts["val"]["all"]["mae_m"] > 0 and more.stderr == ""


def test_weights_that_nothing_judged_are_said_to_be(tmp_path):
    folder = chips.write_folder(tmp_path / "chips", ["train"] * 3)
    path = tmp_path / "tiny.yaml"
    path.write_text(chips.TINY + f"data: {{chips: {folder}}}\n")
    done = call(path, "steps=1", "licence=CC-BY-4.0", "-o", tmp_path / "run")
    assert done.exit_code == 0 and "no val chips" in done.stderr
    card = describe(tmp_path / "run" / "model.safetensors")["card"]
    assert card["licence"] == "CC-BY-4.0" and "val" not in card


def test_a_card_names_no_folders():
    from canopy.training.run_folder import without_folders

    given = "canopy train configs/a.yaml data.chips=/home/me/chips -o /runs/x '/a b/c' ../y lr=1e-3"
    assert without_folders(given) == "canopy train configs/a.yaml data.chips=chips -o x 'a b/c' ../y lr=1e-3"
    assert without_folders('"/somewhere/x.yaml" a=/b') == '"x.yaml" a=b'


def test_fast_dev_run(config, tmp_path):
    done = call(config, "-o", tmp_path / "run", "--fast-dev-run")
    assert done.exit_code == 0 and "work" in done.stdout and not (tmp_path / "run").exists()


def test_bad_input_is_one_line_and_writes_nothing(config, tmp_path):
    for args in (
        (config, "lr=quick"),
        (config, "learning_rate=1"),
        (tmp_path / "none.yaml",),
        (config, "device=tpu"),
    ):
        done = call(*args, "-o", tmp_path / "run")
        assert isinstance(done.exception, ConfigError | ValueError) and not (tmp_path / "run").exists()
    assert "canopy train" in call("--help").stdout
