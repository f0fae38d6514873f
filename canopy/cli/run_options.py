"""Arguments that `canopy train` and `canopy pretrain` share, and what they do around a run."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TypeVar

import typer

from canopy.runtime import setup_logging

if TYPE_CHECKING:
    from pydantic import BaseModel

Config = Annotated[Path, typer.Argument(metavar="CONFIG.yaml", help="What differs from the defaults.")]
Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Override: steps=500 data.chips=DIR.")
]
RunDir = Annotated[Path, typer.Option("-o", "--out", metavar="RUN_DIR", help="Folder of the run.")]
Resume = Annotated[bool, typer.Option("--resume", help="Go on from RUN_DIR/last.ckpt, exactly where it was.")]
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
