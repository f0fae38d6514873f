from __future__ import annotations

from pathlib import Path

import pytest

from canopy.config import Settings, load_settings
from canopy.errors import ConfigError


class Optim(Settings):
    learning_rate: float = 1e-3


class Run(Settings):
    steps: int = 10
    optim: Optim = Optim()


def write(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "run.yaml"
    path.write_text(text)
    return path


def test_file_and_overrides_meet_the_defaults(tmp_path: Path) -> None:
    run = load_settings(Run, write(tmp_path, "steps: 5\n"), ["optim.learning_rate=2e-4"])
    assert run == Run(steps=5, optim=Optim(learning_rate=2e-4))


def test_empty_file_means_defaults(tmp_path: Path) -> None:
    assert load_settings(Run, write(tmp_path, "")) == Run()


@pytest.mark.parametrize(
    ("text", "overrides", "words"),
    [
        ("stepz: 5", [], ["'stepz'", "'steps'"]),
        ("optim: {learning_rat: 1}", [], ["'optim.learning_rat'", "'learning_rate'"]),
        ("steps: many", [], ["steps", "integer"]),
        ("- a list", [], ["list", "key: value"]),
        ("steps: [1", [], ["not valid YAML"]),
        ("", ["steps"], ["key=value"]),
        ("", ["steps.deep=1", "steps=[1"], ["override"]),
    ],
)
def test_faults_are_named_in_one_line(
    tmp_path: Path, text: str, overrides: list[str], words: list[str]
) -> None:
    with pytest.raises(ConfigError) as caught:
        load_settings(Run, write(tmp_path, text), overrides)
    assert all(word in str(caught.value) for word in words)
    assert "\n" not in str(caught.value)


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read"):
        load_settings(Run, tmp_path / "none.yaml")
