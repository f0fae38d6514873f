"""The `canopy` command: one typer app, and the one place where errors become exit codes.

Only light modules are imported here; a command imports what it needs when it runs, so that
`canopy --help` answers at once.
"""

from __future__ import annotations

import sys
import traceback
from typing import Annotated

import typer

from canopy import __version__
from canopy.cli import calibrate, data, models
from canopy.cli.compare import compare, stats
from canopy.cli.evaluate import evaluate
from canopy.cli.map import map_
from canopy.cli.predict import predict
from canopy.cli.train import pretrain, train
from canopy.errors import CanopyError

_INTERRUPTED = 130  # 128 and SIGINT, as shells have it

app = typer.Typer(
    name="canopy",
    help="RGB imagery in, georeferenced canopy height maps out.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"canopy {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    """RGB imagery in, georeferenced canopy height maps out."""


app.command("predict")(predict)
app.command("map")(map_)
app.command("evaluate")(evaluate)
app.command("compare")(compare)
app.command("stats")(stats)
app.command("pretrain")(pretrain)
app.command("train")(train)
app.add_typer(models.app, name="models", help="Models: what there is, and what is in a file.")
app.add_typer(calibrate.app, name="calibrate", help="Correct a map by GEDI; give a model intervals.")
app.add_typer(data.app, name="data", help="Data: synthetic scenes, lidar, GEDI and imagery.")


def main() -> None:
    """Run the command line; exit 0 done, 2 bad input, 3 some tiles failed, 130 Ctrl-C, 1 anything else."""
    try:
        app()
    except CanopyError as error:
        typer.echo(f"canopy: {error}", err=True)
        sys.exit(error.exit_code)
    except SystemExit as stop:
        if stop.code == _INTERRUPTED:  # Ctrl-C, which typer ends without a word
            typer.echo("canopy: interrupted; whatever has its final name is whole", err=True)
        raise
    except Exception as error:
        if {"-v", "--verbose"} & set(sys.argv):
            traceback.print_exc()
        line = " ".join(f"{type(error).__name__}: {error}".split())
        typer.echo(f"canopy: unexpected fault: {line}. Please report it with the output of -v", err=True)
        sys.exit(1)
