"""`canopy train` and `canopy pretrain`: what a run leaves, going on, and checks that leave nothing."""

from __future__ import annotations

import json
from pathlib import Path

import behaviour_support as support
import pytest

TRAIN = f"train {support.ROOT}/configs/finetune/smoke.yaml"
PRETRAIN = f"pretrain {support.ROOT}/configs/pretrain/smoke.yaml"


@pytest.fixture(scope="module")
def trained(chips, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with run/, after four steps, and what was said in told.json."""
    folder = tmp_path_factory.mktemp("train")
    words = f"{TRAIN} data.chips={chips} steps=4 validate_every=2 tensorboard=false -o run --json"
    (folder / "told.json").write_text(support.run(folder, words).out)
    return folder


def test_a_run_leaves_settings_logs_checkpoints_and_a_model(canopy, trained, inputs) -> None:
    told, run = json.loads((trained / "told.json").read_text()), trained / "run"
    support.check_keys("train", told)
    assert told["steps"] == 4 and 0 < told["val"]["all"]["mae_m"] < 100
    left = support.names_below(run)
    assert {"config.yaml", "model.safetensors"} <= left
    assert any(name.endswith(".ckpt") for name in left) and any(name.endswith(".csv") for name in left)
    assert "steps: 4" in (run / "config.yaml").read_text()
    facts = canopy("models", "info", run / "model.safetensors", "--json").json
    assert facts["parameters"] > 10_000 and facts["card"]["data"]["train_chips"] == 4
    words = f"predict {inputs}/wood.tif --model {run}/model.safetensors --backend torch -o chm.tif --json"
    assert canopy(words).json["valid_fraction"] > 0.9


def test_a_run_goes_on(trained, chips) -> None:
    words = f"{TRAIN} data.chips={chips} steps=6 validate_every=2 tensorboard=false -o run"
    assert "--resume" in support.run(trained, words, code=2).error_line
    told = support.run(trained, words, "--resume --json -q").json
    assert told["steps"] == 6


def test_a_pretraining_that_goes_on_and_starts_a_training(canopy, chips, tmp_path) -> None:
    words = f"{PRETRAIN} data.chips={chips} -o out"
    told = canopy(words, "steps=2 --json").json
    support.check_keys("pretrain", told)
    assert told["steps"] == 2 and told["objective"] == "dinov2"
    left = support.names_below(tmp_path / "out")
    assert {"config.yaml", "encoder.safetensors"} <= left and any(name.endswith(".ckpt") for name in left)
    assert canopy(words, "steps=3 --resume --json").json["steps"] == 3
    start = f"{TRAIN} data.chips={chips} steps=1 init_from=out/encoder.safetensors tensorboard=false"
    assert canopy(start, "-o run --json").json["steps"] == 1


@pytest.mark.parametrize("words", [TRAIN, PRETRAIN, f"{PRETRAIN} objective=mae"])
def test_a_check_leaves_nothing(canopy, chips, tmp_path, words: str) -> None:
    canopy(words, f"data.chips={chips} -o out --fast-dev-run")
    assert not list(tmp_path.iterdir())


def test_bad_settings_write_nothing(canopy, chips, tmp_path) -> None:
    for words, says in (
        (f"{TRAIN} data.chips={chips} lr=quick", "lr"),
        (f"{TRAIN} data.chips={chips} learning_rate=1", "learning_rate"),
        ("train none.yaml", "none.yaml"),
        (f"{PRETRAIN} data.chips={chips} stepz=3", "did you mean 'steps'"),
        (f"{PRETRAIN} data.chips=nowhere", "canopy data chips"),
        (f"{PRETRAIN} data.chips={chips} --resume", "no run to resume"),
    ):
        assert says in canopy(words, "-o out", code=2).error_line
        assert not list(tmp_path.iterdir())
