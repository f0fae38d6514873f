"""Options and output that every command shares."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Annotated, Any

import typer

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


def print_json(result: Mapping[str, Any]) -> None:
    """Print the one machine-readable object of `--json` on stdout."""
    typer.echo(json.dumps(result, indent=2, allow_nan=False, default=str))
