"""Options that several commands share, and how a command takes a whole group of them.

What a prediction, a region or an area is asked for is declared once, as fields of a pydantic model with help
texts (`canopy.inference.options`, `canopy.region.options`); `takes_groups` makes a command's options of them.
"""

from __future__ import annotations

import functools
import inspect
import json
import shlex
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar, get_args, get_origin, get_type_hints

import typer

from canopy.config import flags_of, validate_settings
from canopy.errors import refuse_options
from canopy.runtime import setup_logging

if TYPE_CHECKING:
    from pydantic import BaseModel


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


def takes_groups(command: Callable[..., None]) -> Callable[..., None]:
    """Spread those parameters of a typer command that are groups of options into one option per field.

    A group is a pydantic model whose fields are made by `canopy.config.option`; the command gets it, filled.
    Its other parameters stay as they are. Meant as a decorator.
    """
    hints = get_type_hints(command, include_extras=True)
    groups = {name: kind for name, kind in hints.items() if hasattr(kind, "model_fields")}
    spread: list[inspect.Parameter] = []
    for name, parameter in inspect.signature(command).parameters.items():
        if name in groups:
            spread += [_parameter(field, info) for field, info in groups[name].model_fields.items()]
        else:
            spread.append(parameter.replace(annotation=hints[name], kind=inspect.Parameter.KEYWORD_ONLY))

    @functools.wraps(command)
    def run(**given: Any) -> None:
        for name, group in groups.items():
            values = {field: given.pop(field) for field in group.model_fields}
            # What may be repeated is None where it was left out; None says nothing anywhere.
            said = {field: value for field, value in values.items() if value is not None}
            given[name] = validate_settings(group, said)
        command(**given)

    run.__signature__ = inspect.Signature(spread)  # type: ignore[attr-defined]
    return run


def _parameter(name: str, field: Any) -> inspect.Parameter:
    """A field of a group as typer has it in a command's signature."""
    typed = field.json_schema_extra or {}
    if typed.get("argument"):
        info: Any = typer.Argument(metavar=typed["metavar"], help=field.description)
    else:
        info = typer.Option(
            *flags_of(name, field),
            metavar=typed.get("metavar"), help=field.description,
            rich_help_panel=typed.get("panel"), show_default=typed.get("shown", True),
        )  # fmt: skip
    many = typed.get("argument", False) or get_origin(field.annotation) is list
    kind = list[str] | None if many else _typed_as(field.annotation)
    return inspect.Parameter(
        name, inspect.Parameter.KEYWORD_ONLY, default=None if many else field.default,
        annotation=Annotated[kind, info],
    )  # fmt: skip


def _typed_as(annotation: Any) -> Any:
    """What a user types for a field of several types: text where it may be text."""
    choices = get_args(annotation) or (annotation,)
    if all(isinstance(one, str) for one in choices):  # Literal: pydantic says what is expected
        return str
    kind = str if str in choices else choices[0]
    if get_origin(kind) is Annotated:  # of its limits pydantic speaks
        kind = get_args(kind)[0]
    return kind | None if type(None) in choices else kind


DryRun = Annotated[bool, typer.Option("--dry-run", help="Check and say what would be done; stop there.")]


Config = Annotated[
    Path, typer.Argument(metavar="CONFIG", help="What differs from the defaults: a YAML file, or its name.")
]
Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Override: steps=500 data.chips=DIR.")
]
RunDir = Annotated[Path, typer.Option("-o", "--out", metavar="RUN_DIR", help="Folder of the run.")]
RunResume = Annotated[
    bool, typer.Option("--resume", help="Go on from RUN_DIR/last.ckpt, exactly where it was.")
]
FastDevRun = Annotated[
    bool,
    typer.Option(
        "--fast-dev-run", help="Two steps, all that follows them, in a temporary folder, as a check."
    ),
]
S = TypeVar("S", bound="BaseModel")


def settings_of(schema: type[S], config: Path, overrides: list[str] | None, quiet: bool, verbose: bool) -> S:
    """Start logging and read the config; see `load_settings`."""
    from canopy.config import load_settings

    setup_logging(quiet, verbose)
    return load_settings(schema, config, overrides or [])


def command() -> str:
    """How this process was started, for a card."""
    return shlex.join(["canopy", *sys.argv[1:]])
