from __future__ import annotations

import pickle

import pytest

from canopy import errors


def test_message_is_one_line_with_every_part() -> None:
    error = errors.ImageryError("holds 1 band\nof grey", where="a.tif", expected="RGB", remedy="use --bands")
    assert str(error) == "a.tif: holds 1 band of grey; expected RGB. Use --bands"


@pytest.mark.parametrize(
    "cls", [errors.AreaError, errors.ImageryError, errors.CheckpointError, errors.FetchError]
)
def test_bad_input_is_a_value_error_with_exit_code_2(cls: type[errors.CanopyError]) -> None:
    assert issubclass(cls, ValueError) and cls.exit_code == 2


def test_output_failure_is_an_os_error_with_exit_code_1() -> None:
    assert issubclass(errors.OutputError, OSError) and errors.OutputError.exit_code == 1


def test_errors_survive_the_trip_between_processes() -> None:
    error = pickle.loads(pickle.dumps(errors.AreaError("empty", where="--bbox", remedy="check it")))
    assert isinstance(error, errors.AreaError) and str(error) == "--bbox: empty. Check it"
