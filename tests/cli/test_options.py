"""Options declared once, as fields of a pydantic model, reach a command as that model."""

from __future__ import annotations

import typer
from typer.testing import CliRunner

from canopy.cli import main
from canopy.cli.options import takes_groups
from canopy.inference.options import OneMapOptions, PredictOptions
from canopy.region.options import PINNED, MapOptions

TYPED = "a.tif b.tif -o x.tif --gsd 2 --date-band --batch-size 8 --bbox 1,2 --thick"


def test_a_pydantic_model_is_a_group_with_its_help_and_its_kinds() -> None:
    seen = []

    @takes_groups
    def paint(options: OneMapOptions, thick: bool = False) -> None:
        """Paint."""
        seen.append((options, thick))

    app = typer.Typer()
    app.command()(paint)
    run = CliRunner().invoke
    assert run(app, TYPED.split()).exit_code == 0
    assert run(app, []).exit_code == 0
    given, thick = seen[0]
    assert given.images == ("a.tif", "b.tif") and given.out == "x.tif" and thick
    assert (given.gsd, given.date_band, given.batch_size, given.bbox) == (2.0, True, "8", "1,2")
    assert seen[1] == (OneMapOptions(), False)
    shown = run(app, ["--help"]).output
    assert OneMapOptions.model_fields["nodata"].description.split()[0] in shown and "Paint." in shown
    assert run(app, ["--gsd", "wide"]).exit_code == 2
    assert "--workers <int>" in run(main.app, ["data", "chm", "--help"]).output  # a field with limits


def test_what_a_region_pins_are_its_options() -> None:
    assert set(PINNED) <= set(MapOptions.model_fields)
    changed = {name for name in PredictOptions.model_fields if name in MapOptions.__annotations__}
    assert changed == {"crs"}  # which --grid utm has in another sense


def test_words_that_cannot_be_taken_are_refused_in_one_line(canopy) -> None:
    for words, told in (
        (["predict", "a.tif", "--gsd", "x"], "Invalid value for '--gsd'"),
        (["stats", "a.tif"], "Missing option '--zones'"),
        (["data", "chm", "--bogus"], "No such option: --bogus"),
    ):
        ran = canopy(*words)
        assert ran.code == 2 and ran.out == "" and len(ran.err.splitlines()) == 1
        assert ran.err.startswith(f"canopy: {told}") and ran.err.strip().endswith("--help")
    assert "Commands:" in canopy("models").err + canopy("models").out
