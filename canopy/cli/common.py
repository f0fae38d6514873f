"""Options and output that every command shares."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Annotated, Any

import typer

from canopy.errors import refuse_options

Quiet = Annotated[bool, typer.Option("-q", "--quiet", help="Say only what went wrong.")]
Verbose = Annotated[
    bool, typer.Option("-v", "--verbose", help="Say more; show tracebacks of unexpected faults.")
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout and nothing else there.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace outputs that exist.")]


def was_typed(context: typer.Context, name: str) -> bool:
    """Whether the user gave a parameter of the command, be it its default."""
    source = context.get_parameter_source(name)
    return source is not None and source.name != "DEFAULT"


def refuse_given(context: typer.Context, *names: str, where: str, because: str) -> None:
    """Refuse those parameters of a command that were typed and have no part in what it will do.

    Args:
        context: of the running command.
        names: of its parameters, as Python has them.
        where: the option that leaves them without use.
        because: why, in a few words.
    """
    typed = {
        _as_typed(parameter, context.params[name]): True
        for parameter in context.command.params
        if (name := parameter.name) in names and was_typed(context, name)
    }
    refuse_options(typed, where=where, because=because)


def _as_typed(parameter: Any, value: object) -> str:
    """`--shift`, or `--no-shift` where that was said."""
    return str((parameter.secondary_opts if value is False else parameter.opts)[-1])


def print_json(result: Mapping[str, Any]) -> None:
    """Print the one machine-readable object of `--json` on stdout."""
    typer.echo(json.dumps(result, indent=2, allow_nan=False, default=str))
