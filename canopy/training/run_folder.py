"""RUN_DIR: one process at a time, one set of settings; and what several processes of one run do together."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
import yaml
from filelock import FileLock, Timeout
from pydantic import BaseModel, ValidationError
from torch import Tensor

from canopy.errors import ConfigError
from canopy.files import replacing, told_as_output

T = TypeVar("T")
CONFIG, LAST, LOCK = "config.yaml", "last.ckpt", ".lock"
_FOLDERS = re.compile(r"(?<![^\s='\"])/(?:[^\s/'\"]+/)*(?=[^\s/'\"])")


def first_process() -> bool:
    """Whether this one writes files and says what is going on. Known before the processes have met."""
    from pytorch_lightning.utilities.rank_zero import rank_zero_only

    return not getattr(rank_zero_only, "rank", 0)


def distributed() -> bool:
    """Whether several processes train together."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


@torch.no_grad()
def mean_of_processes(x: Tensor) -> Tensor:
    """The mean of `x` over all processes, without gradient; `x` itself where there is only one."""
    if not distributed():
        return x
    x = x.detach().clone()
    dist.all_reduce(x)
    return x / dist.get_world_size()


def from_all(mine: list[T]) -> list[T]:
    """The lists of all processes, joined in their order."""
    parts: list[list[T]] = [mine]
    if distributed():
        parts = [[] for _ in range(dist.get_world_size())]
        dist.all_gather_object(parts, mine)
    return [x for part in parts for x in part]


@contextmanager
def held(folder: Path, settings: BaseModel, resume: bool, free: frozenset[str]) -> Iterator[None]:
    """Hold `folder` (created) for a run that starts or goes on in it, and write its settings to config.yaml.

    Of several processes of one run the first holds it for all.

    Args:
        folder: RUN_DIR.
        settings: of this call.
        resume: go on with the run in `folder`.
        free: dotted names of settings that a resumed run may change.

    Raises:
        ConfigError: there is a run and `resume` is off, there is none and it is on, settings changed, or
            another process trains there.
        OutputError: it cannot be written.
    """
    if not first_process():
        yield
        return
    _check_place(folder, resume)
    with told_as_output(folder):
        folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(folder / LOCK, timeout=0)
        try:
            lock.acquire()
        except Timeout as error:
            raise ConfigError(
                "another process trains here", where=folder, remedy="wait for it, or choose another folder"
            ) from error
    try:
        _check_place(folder, resume)  # again, for another process may just have begun or ended
        _write_settings(folder, settings, resume, free)
        yield
    finally:
        lock.release()


def _check_place(folder: Path, resume: bool) -> None:
    if resume != (folder / LAST).exists():
        raise ConfigError(
            "holds no run to resume" if resume else "holds a run already",
            where=folder,
            remedy="leave out --resume" if resume else "add --resume, or choose another folder",
        )


def _write_settings(folder: Path, settings: BaseModel, resume: bool, free: frozenset[str]) -> None:
    now = json.loads(settings.model_dump_json())
    if resume and (folder / CONFIG).is_file():
        before = yaml.safe_load((folder / CONFIG).read_text())
        with suppress(ValidationError):  # of another age: the differences will be named
            # With the defaults of settings that have been added since.
            before = json.loads(type(settings).model_validate(before).model_dump_json())
        changed = sorted(_differences(before, now) - free)
        if changed:
            raise ConfigError(
                f"the run was started with other settings: {', '.join(changed)}",
                where=folder,
                remedy="use the same config, or start a new run in another folder",
            )
    with replacing(folder / CONFIG) as part:
        part.write_text(yaml.safe_dump(now, sort_keys=False))


def _differences(a: Any, b: Any, name: str = "") -> set[str]:
    if isinstance(a, dict) and isinstance(b, dict):
        found: set[str] = set()
        for key in a.keys() | b.keys():
            found |= _differences(a.get(key), b.get(key), f"{name}.{key}" if name else key)
        return found
    return set() if a == b else {name}


def without_folders(command: str) -> str:
    """A command as a card may show it: absolute paths by name alone, because folders are this machine's."""
    return _FOLDERS.sub("", command)
