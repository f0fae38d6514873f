"""The `canopy` command: one typer app, and the one place where errors become exit codes.

A command's module is imported when the command is asked for, so that `canopy --help` answers at once.
"""

from __future__ import annotations

import importlib
import sys
import traceback
from typing import Annotated, Any, NoReturn

import typer
from typer.core import TyperGroup

from canopy import __version__
from canopy.errors import CanopyError

# Command: where it stands, and its line in the list of --help.
_COMMANDS = {
    "predict": ("canopy.cli.predict:predict", "Map canopy height in metres from RGB imagery."),
    "map": ("canopy.cli.map:map_", "Map a region in tiles: a job of hours or days."),
    "evaluate": ("canopy.cli.evaluate:evaluate", "Score any canopy height map against lidar, GEDI or plots."),
    "compare": ("canopy.cli.compare:compare", "Compare two canopy height maps, in any CRS and pixel size."),
    "stats": ("canopy.cli.compare:stats", "Mean height, percentiles, canopy cover and area per polygon."),
    "trees": ("canopy.cli.compare:trees", "Tree tops and crowns with heights, or heights on given crowns."),
    "serve": ("canopy.cli.compare:serve", "Show height maps in the browser, from this computer alone."),
    "pretrain": ("canopy.cli.train:pretrain", "Pretrain an encoder without labels on chips."),
    "train": ("canopy.cli.train:train", "Train a height model on the chips of `canopy data chips`."),
    "models": ("canopy.cli.models:app", "Models: what there is, and what is in a file."),
    "calibrate": ("canopy.cli.calibrate:app", "Correct a map by GEDI; give a model intervals."),
    "data": ("canopy.cli.data:app", "Data: synthetic scenes, lidar, GEDI and imagery."),
}


class _Commands(TyperGroup):
    """Imports a command once it is asked for."""

    def __init__(self, **given: Any) -> None:
        super().__init__(**given)
        self.commands = dict.fromkeys(_COMMANDS)  # type: ignore[assignment]  # the names, for "did you mean"

    def list_commands(self, ctx: Any) -> list[str]:
        return list(_COMMANDS)

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        if cmd_name not in _COMMANDS:
            return None
        place, line = _COMMANDS[cmd_name]
        module, name = place.split(":")
        found = getattr(importlib.import_module(module), name)
        holder = typer.Typer(add_completion=False, rich_markup_mode=None)
        holder.callback()(lambda: None)  # or a single command would stand for all of it
        if isinstance(found, typer.Typer):
            holder.add_typer(found, name=cmd_name, help=line)
        else:
            holder.command(cmd_name)(found)
        group = typer.main.get_group(holder)
        return group.commands[cmd_name]

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, line) for name, (_, line) in _COMMANDS.items()])


_INTERRUPTED = 130  # 128 and SIGINT, as shells have it

app = typer.Typer(
    name="canopy",
    cls=_Commands,
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


def _refuse_words(error: Any) -> NoReturn:
    """Say what is wrong with the words typed, in one line; the help where a group has no command."""
    told = error.format_message()
    if "\n" in told:  # its text is the help
        error.show()
    else:
        command = error.ctx.command_path if error.ctx else "canopy"
        typer.echo(f"canopy: {told.rstrip('.')}. See {command} --help", err=True)
    sys.exit(error.exit_code)


def main() -> None:
    """Run the command line; exit 0 done, 2 bad input, 3 some tiles failed, 130 Ctrl-C, 1 anything else."""
    try:
        code = app(standalone_mode=False)
        if code == _INTERRUPTED:  # Ctrl-C, which typer ends without a word
            typer.echo("canopy: interrupted; whatever has its final name is whole", err=True)
        sys.exit(code or 0)
    except CanopyError as error:
        typer.echo(f"canopy: {error}", err=True)
        sys.exit(error.exit_code)
    except Exception as error:
        if hasattr(error, "format_message"):  # words that typer cannot take; its kinds of error are private
            _refuse_words(error)
        if {"-v", "--verbose"} & set(sys.argv):
            traceback.print_exc()
        line = " ".join(f"{type(error).__name__}: {error}".split())
        typer.echo(f"canopy: unexpected fault: {line}. Please report it with the output of -v", err=True)
        sys.exit(1)
