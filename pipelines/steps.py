"""A chain's steps are `canopy` commands: shown, run in this process, left out where their result is there."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Callable
from pathlib import Path

from canopy.cli.main import app
from canopy.errors import CanopyError


def canopy(*words: object) -> None:
    """`canopy WORDS`; stops the chain where some of it failed."""
    typed = [str(word) for word in words]
    print(shlex.join(["canopy", *typed]), flush=True)
    code = app(typed, standalone_mode=False)
    if code:
        raise SystemExit(int(code))


def step(made: Path, *words: object) -> Path:
    """The same, unless `made`, which the command leaves, is there already; returns it."""
    if not made.exists():
        canopy(*words)
    return made


def run(chain: Callable[[], None]) -> int:
    """Exit code of a chain: errors are one line, as on the command line."""
    try:
        chain()
    except CanopyError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    return 0
