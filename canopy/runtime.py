"""What every command needs from its surroundings: logging, device, seeds, bundled files, progress."""

from __future__ import annotations

import functools
import logging
import os
import random
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, Protocol

from canopy.errors import CanopyError, ConfigError, InputError

if TYPE_CHECKING:
    import torch


log = logging.getLogger("canopy")


def setup_logging(quiet: bool = False, verbose: bool = False) -> None:
    """Send canopy's log to stderr: warnings only with `quiet`, everything with `verbose`.

    stdout stays free for results and for the single object of `--json`. What libraries warn of is meant for
    developers, and comes with `verbose` alone.
    """
    level = logging.WARNING if quiet else logging.DEBUG if verbose else logging.INFO
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(name)s: %(message)s" if verbose else "%(message)s"))
    log.handlers[:] = [handler]
    log.setLevel(level)
    log.propagate = False
    logging.captureWarnings(True)
    warned = logging.getLogger("py.warnings")
    warned.handlers[:] = [handler if verbose else logging.NullHandler()]
    warned.propagate = False
    if not verbose and not logging.root.handlers:
        logging.root.addHandler(logging.NullHandler())  # or Python prints what has no handler


def bundled_dir(name: str) -> Path:
    """Directory of files shipped with canopy (`data_manifests`, `configs`).

    A checkout has them at its top; an installed wheel carries them inside the package.
    """
    package = Path(__file__).resolve().parent
    for candidate in (package / "_bundled" / name, package.parent / name):
        if candidate.is_dir():
            return candidate
    raise CanopyError(
        f"the bundled folder {name!r} is missing", where=package, remedy="reinstall canopy-height"
    )


def manifests_dir() -> Path:
    """Where the manifest tables are: $CANOPY_MANIFESTS if set, else the shipped ones."""
    override = os.environ.get("CANOPY_MANIFESTS")
    if not override:
        return bundled_dir("data_manifests")
    path = Path(override)
    if not path.is_dir():
        raise ConfigError(
            "not a directory",
            where=f"CANOPY_MANIFESTS={override}",
            expected="a folder laid out like data_manifests/",
        )
    return path


def cache_dir() -> Path:
    """Where downloads are kept: $CANOPY_CACHE if set, else the user's cache directory."""
    import platformdirs

    return Path(os.environ.get("CANOPY_CACHE") or platformdirs.user_cache_dir("canopy"))


def check_device(name: str) -> None:
    """Refuse what is no device's name, whether or not the device is here. Raises InputError."""
    if not re.fullmatch(r"auto|cpu|cuda(:\d+)?|mps", name):
        raise InputError(
            f"unknown device {name!r}", where="--device", expected="auto, cpu, cuda, cuda:N or mps"
        )


def pick_device(name: str = "auto") -> torch.device:
    """The torch device for `auto|cpu|cuda|cuda:N|mps`.

    Raises:
        InputError: the device is unknown or not present on this machine.
    """
    import torch

    check_device(name)
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    device = torch.device(name)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise InputError("no CUDA device here", where=f"--device {name}", remedy="use --device auto or cpu")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise InputError(
            f"only {torch.cuda.device_count()} CUDA device(s) here",
            where=f"--device {name}",
            remedy="use --device cuda",
        )
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise InputError("no MPS device here", where=f"--device {name}", remedy="use --device auto or cpu")
    return device


def seed_everything(seed: int) -> None:
    """Seed Python, NumPy and torch (when it is already in use by the caller)."""
    import numpy as np
    import torch

    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


class Progress(Protocol):
    """What long work reports to: `total` once it is known, then steps done."""

    def start(self, total: int, what: str) -> None: ...
    def advance(self, steps: int = 1) -> None: ...


class NoProgress:
    """Reports nothing; the default of every library function."""

    def start(self, total: int, what: str) -> None:
        pass

    def advance(self, steps: int = 1) -> None:
        pass


@contextmanager
def progress_bar(quiet: bool = False) -> Iterator[Progress]:
    """A progress bar on stderr with rate and time left; silent when stderr is not a terminal."""
    if quiet or not sys.stderr.isatty():
        yield NoProgress()
        return
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )
    from rich.progress import Progress as RichProgress

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with RichProgress(*columns, console=Console(stderr=True), transient=True) as rich_progress:
        yield _RichBar(rich_progress)


class _RichBar:
    def __init__(self, rich_progress) -> None:  # type: ignore[no-untyped-def]
        self._progress = rich_progress
        self._task = rich_progress.add_task("", total=None, visible=False)

    def start(self, total: int, what: str) -> None:
        self._progress.reset(self._task, total=total, description=what, visible=True)

    def advance(self, steps: int = 1) -> None:
        self._progress.advance(self._task, steps)


def load_openvino() -> ModuleType:
    """The module `openvino`, kept from sending anything home.

    Importing it, and every conversion, would report to a web analytics service, from processes forked off
    background threads, and leave an identity in the user's home folder. Where its telemetry package cannot be
    imported, openvino and NNCF use stubs of their own that do nothing.
    """
    sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]
    import openvino

    return openvino


@functools.cache
def openvino_core() -> Any:
    """This process's only `openvino.Core`.

    Each Core's CPU plugin gives the calling thread a signal stack of its own and unmaps it when it is
    destroyed, whichever thread that happens in and whichever stack is in use by then. After two Cores that
    were not destroyed in reverse order, the next signal (Ctrl-C, a child's end) is a segmentation fault.
    """
    return load_openvino().Core()
