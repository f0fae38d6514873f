"""Options declared once, as fields of a dataclass, reach a command as that dataclass."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Annotated

import pytest
import typer
from typer.testing import CliRunner

from canopy.cli.options import PredictionOptions, RegionOptions, takes_groups
from canopy.inference.options import Request
from canopy.region.plan import RegionSettings


@dataclass(frozen=True)
class Colours:
    red: Annotated[int, typer.Option("--red", help="How much red.")] = 1
    names: Annotated[list[str] | None, typer.Argument()] = None


def test_fields_become_options_and_the_rest_stays() -> None:
    seen = []

    @takes_groups
    def paint(
        out: Annotated[str, typer.Option("-o")],
        colours: Colours,
        thick: Annotated[bool, typer.Option("--thick")] = False,
    ) -> None:
        """Paint."""
        seen.append((out, colours, thick))

    app = typer.Typer()
    app.command()(paint)
    run = CliRunner().invoke
    assert run(app, ["a", "b", "-o", "x", "--red", "5", "--thick"]).exit_code == 0
    assert run(app, ["-o", "y"]).exit_code == 0
    assert seen == [("x", Colours(5, ["a", "b"]), True), ("y", Colours(), False)]
    shown = run(app, ["--help"]).output
    assert "How much red." in shown and "Paint." in shown
    assert run(app, ["--red", "5"]).exit_code == 2  # -o has no default


def test_a_field_without_a_default_is_refused() -> None:
    @dataclass
    class Bare:
        count: Annotated[int, typer.Option()]

    def command(bare: Bare) -> None: ...

    command.__annotations__["bare"] = Bare
    with pytest.raises(TypeError, match=r"Bare\.count needs a default"):
        takes_groups(command)


def test_shared_options_are_those_of_what_they_fill() -> None:
    """An option that is added to a group must be known to what the group is poured into, with its default."""
    request = {field.name: field.default for field in fields(Request)}
    region = {name: field.default for name, field in RegionSettings.model_fields.items()}
    for field in fields(PredictionOptions):
        if field.name != "images":
            assert request[field.name] == region[field.name] == field.default, field.name
    for field in fields(RegionOptions):
        if field.name != "out":
            assert region[field.name] == field.default, field.name
