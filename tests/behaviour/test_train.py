"""`canopy train` and `canopy pretrain`: what a run leaves, going on, and checks that leave nothing."""

from __future__ import annotations

import json
import math
from pathlib import Path

import behaviour_support as support
import pytest

TRAIN = support.ROOT / "configs" / "finetune" / "smoke.yaml"
PRETRAIN = support.ROOT / "configs" / "pretrain" / "smoke.yaml"


@pytest.fixture(scope="module")
def trained(chips, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with run/, after four steps, and what was said in told.json."""
    folder = tmp_path_factory.mktemp("train")
    words = ("train", TRAIN, f"data.chips={chips}", "steps=4", "validate_every=2", "tensorboard=false")
    (folder / "told.json").write_text(support.run(folder, *words, "-o", "run", "--json").out)
    return folder


def test_a_run_leaves_settings_logs_checkpoints_and_a_model(canopy, trained, inputs) -> None:
    told, run = json.loads((trained / "told.json").read_text()), trained / "run"
    support.check_keys("train", told)
    assert (
        told["steps"] == 4 and told["val"]["all"]["mae_m"] > 0 and math.isfinite(told["val"]["all"]["mae_m"])
    )
    left = support.names_below(run)
    assert {"config.yaml", "model.safetensors"} <= left
    assert any(name.endswith(".ckpt") for name in left) and any(name.endswith(".csv") for name in left)
    assert "steps: 4" in (run / "config.yaml").read_text()
    facts = canopy("models", "info", run / "model.safetensors", "--json").json
    assert facts["parameters"] > 10_000 and facts["card"]["data"]["train_chips"] == 4
    words = ("predict", inputs / "wood.tif", "--model", run / "model.safetensors", "--backend", "torch")
    assert canopy(*words, "-o", "chm.tif", "--json").json["valid_fraction"] > 0.9


def test_a_run_goes_on(trained, chips) -> None:
    words = (
        "train",
        TRAIN,
        f"data.chips={chips}",
        "steps=6",
        "validate_every=2",
        "tensorboard=false",
        "-o",
        "run",
    )
    assert "--resume" in support.run(trained, *words, code=2).error_line
    told = support.run(trained, *words, "--resume", "--json", "-q").json
    assert told["steps"] == 6


def test_a_pretraining_that_goes_on_and_starts_a_training(canopy, chips, tmp_path) -> None:
    words = ("pretrain", PRETRAIN, f"data.chips={chips}", "-o", "out")
    told = canopy(*words, "steps=2", "--json").json
    support.check_keys("pretrain", told)
    assert told["steps"] == 2 and told["objective"] == "dinov2"
    left = support.names_below(tmp_path / "out")
    assert {"config.yaml", "encoder.safetensors"} <= left and any(name.endswith(".ckpt") for name in left)
    assert canopy(*words, "steps=3", "--resume", "--json").json["steps"] == 3
    start = (
        "train",
        TRAIN,
        f"data.chips={chips}",
        "steps=1",
        "init_from=out/encoder.safetensors",
        "-o",
        "run",
    )
    assert canopy(*start, "tensorboard=false", "--json").json["steps"] == 1


@pytest.mark.parametrize(
    "words", [("train", TRAIN), ("pretrain", PRETRAIN), ("pretrain", PRETRAIN, "objective=mae")]
)
def test_a_check_leaves_nothing(canopy, chips, tmp_path, words: tuple[object, ...]) -> None:
    canopy(*words, f"data.chips={chips}", "-o", "out", "--fast-dev-run")
    assert not list(tmp_path.iterdir())


def test_bad_settings_write_nothing(canopy, chips, tmp_path) -> None:
    for words, says in (
        (("train", TRAIN, f"data.chips={chips}", "lr=quick"), "lr"),
        (("train", TRAIN, f"data.chips={chips}", "learning_rate=1"), "learning_rate"),
        (("train", "none.yaml"), "none.yaml"),
        (("pretrain", PRETRAIN, f"data.chips={chips}", "stepz=3"), "did you mean 'steps'"),
        (("pretrain", PRETRAIN, "data.chips=nowhere"), "canopy data chips"),
        (("pretrain", PRETRAIN, f"data.chips={chips}", "--resume"), "no run to resume"),
    ):
        assert says in canopy(*words, "-o", "out", code=2).error_line
        assert not list(tmp_path.iterdir())
