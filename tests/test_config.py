"""Settings are read strictly, and every refusal is one line."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Literal

import pytest
from pydantic import field_validator, model_validator

from canopy import errors
from canopy.config import Settings, load_settings
from canopy.errors import ConfigError


class Optim(Settings):
    learning_rate: float = 1e-3
    decay: float | Literal["auto"] = "auto"

    @field_validator("decay")
    @classmethod
    def _above_zero(cls, value: float | str) -> float | str:
        if value != "auto" and float(value) < 0:
            raise ValueError("must not be negative")
        return value


class Run(Settings):
    steps: int = 10
    share: float = 0.5
    optim: Optim = Optim()

    @model_validator(mode="after")
    def _is_a_share(self) -> Run:
        if self.share > 1:
            raise ValueError(f"a share of {self.share:g}")
        return self


def write(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "run.yaml"
    path.write_text(text)
    return path


def test_file_and_overrides_meet_the_defaults(tmp_path: Path) -> None:
    run = load_settings(Run, write(tmp_path, "steps: 5\n"), ["optim.learning_rate=2e-4"])
    assert run == Run(steps=5, optim=Optim(learning_rate=2e-4))
    assert load_settings(Run, write(tmp_path, "")) == Run()


@pytest.mark.parametrize(
    ("text", "overrides", "words"),
    [
        ("stepz: 5", [], ["'stepz'", "'steps'"]),
        ("optim: {learning_rat: 1}", [], ["'optim.learning_rat'", "'learning_rate'"]),
        ("steps: many", [], ["run.yaml: steps: 'many'; expected a valid integer"]),
        ("optim: {decay: much}", [], ["run.yaml: optim.decay: 'much'; expected a valid number or 'auto'"]),
        ("optim: {decay: -1}", [], ["run.yaml: optim.decay: -1: must not be negative"]),
        ("share: 2", [], ["run.yaml: a share of 2"]),
        ("- a list", [], ["list", "key: value"]),
        ("steps: [1", [], ["not valid YAML"]),
        ("steps: 5\noptim: {}\nsteps: 7", [], ["'steps' is in line 1 and in line 3"]),
        ("", ["steps"], ["key=value"]),
        ("", ["steps.deep=1", "steps=[1"], ["override"]),
        (None, [], ["cannot be read"]),
    ],
)
def test_faults_are_named_in_one_line(
    tmp_path: Path, text: str | None, overrides: list[str], words: list[str]
) -> None:
    path = tmp_path / "none.yaml" if text is None else write(tmp_path, text)
    with pytest.raises(ConfigError) as caught:
        load_settings(Run, path, overrides)
    assert all(word in str(caught.value) for word in words)
    assert "\n" not in str(caught.value)


def test_an_error_is_one_line_with_every_part_also_from_another_process() -> None:
    error = errors.ImageryError("holds 1 band\nof grey", where="a.tif", expected="RGB", remedy="use --bands")
    assert str(error) == "a.tif: holds 1 band of grey; expected RGB. Use --bands"
    again = pickle.loads(pickle.dumps(error))
    assert type(again) is errors.ImageryError and str(again) == str(error)
    assert isinstance(error, ValueError) and error.exit_code == 2
    assert issubclass(errors.OutputError, OSError) and errors.OutputError.exit_code == 1
