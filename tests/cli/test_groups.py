"""Options declared once, as fields of a dataclass, reach a command as that dataclass."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import pytest
import typer
from typer.testing import CliRunner

from canopy.cli.options import takes_groups
from canopy.inference.options import OneMapOptions, PredictOptions
from canopy.region.options import PINNED, MapOptions


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


def test_a_pydantic_model_is_a_group_with_its_help_and_its_kinds() -> None:
    seen = []

    @takes_groups
    def paint(options: OneMapOptions) -> None:
        """Paint."""
        seen.append(options)

    app = typer.Typer()
    app.command()(paint)
    run = CliRunner().invoke
    typed = [
        "a.tif",
        "b.tif",
        "-o",
        "x.tif",
        "--gsd",
        "2",
        "--date-band",
        "--batch-size",
        "8",
        "--bbox",
        "1,2",
    ]
    assert run(app, typed).exit_code == 0
    assert run(app, []).exit_code == 0
    assert seen[0].images == ("a.tif", "b.tif") and seen[0].out == "x.tif"
    assert (seen[0].gsd, seen[0].date_band, seen[0].batch_size, seen[0].bbox) == (2.0, True, "8", "1,2")
    assert seen[1] == OneMapOptions()
    assert OneMapOptions.model_fields["nodata"].description.split()[0] in run(app, ["--help"]).output
    assert run(app, ["--gsd", "wide"]).exit_code == 2


def test_what_a_region_pins_are_its_options() -> None:
    assert set(PINNED) <= set(MapOptions.model_fields)
    changed = {name for name in PredictOptions.model_fields if name in MapOptions.__annotations__}
    assert changed == {"crs"}  # which --grid utm has in another sense
