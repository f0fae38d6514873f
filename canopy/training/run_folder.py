"""Several processes that train together: who is first, and sums and means over all of them.

RUN_DIR: one process at a time, one set of settings, tables that a resumed run goes on writing.
"""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
import yaml
from pydantic import BaseModel, ValidationError
from torch import Tensor

from canopy.errors import ConfigError, OutputError
from canopy.files import replacing

T = TypeVar("T")


def distributed() -> bool:
    """Whether several processes train together."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def first_process() -> bool:
    """Whether this one writes files and says what is going on. Known before the processes have met."""
    from pytorch_lightning.utilities.rank_zero import rank_zero_only

    return not getattr(rank_zero_only, "rank", 0)


@torch.no_grad()
def mean_of_processes(x: Tensor) -> Tensor:
    """The mean of `x` over all processes, without gradient; `x` itself where there is only one."""
    if not distributed():
        return x
    x = x.detach().clone()
    dist.all_reduce(x)
    return x / dist.get_world_size()


def longest(seconds: float, device: torch.device) -> float:
    """The slowest process's time. What follows a clock must follow one clock: rates, and when to stop."""
    if not distributed():
        return seconds
    x = torch.tensor(seconds, dtype=torch.float32, device=device)
    dist.all_reduce(x, op=dist.ReduceOp.MAX)
    return float(x)


def from_all(mine: list[T]) -> list[T]:
    """The lists of all processes, joined in their order."""
    parts: list[list[T]] = [mine]
    if distributed():
        parts = [[] for _ in range(dist.get_world_size())]
        dist.all_gather_object(parts, mine)
    return [x for part in parts for x in part]


def share_of(count: int) -> range:
    """Which of `count` things this process does."""
    if not distributed():
        return range(count)
    return range(dist.get_rank(), count, dist.get_world_size())


_FOLDERS = re.compile(r"(?<![^\s='\"])/(?:[^\s/'\"]+/)*(?=[^\s/'\"])")
CONFIG, LAST, LOCK = "config.yaml", "last.ckpt", ".lock"
STATE, STATE_FORMAT = "canopy", 2  # key of a run's own state in its checkpoint; raise it when that changes


@contextmanager
def held(folder: Path, settings: BaseModel, resume: bool, free: frozenset[str]) -> Iterator[None]:
    """Hold `folder` for a run that may start or go on in it (`locked`, `check_run`). Of several processes of
    one run the first holds it for all.

    Raises:
        ConfigError, OutputError: it may not, or cannot; then nothing is written.
    """
    if not first_process():
        yield
        return
    _check_place(folder, resume)
    with locked(folder):
        check_run(folder, settings, resume, free)
        yield


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold `folder` (created) for this process.

    Raises:
        ConfigError: another process trains in it.
        OutputError: it cannot be written.
    """
    import fcntl

    try:
        folder.mkdir(parents=True, exist_ok=True)
        handle = (folder / LOCK).open("a")
    except OSError as error:
        raise OutputError(f"cannot be written ({error.strerror or error})", where=folder) from error
    with handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise ConfigError(
                "another process trains here", where=folder, remedy="wait for it, or choose another folder"
            ) from error
        yield


def check_run(folder: Path, settings: BaseModel, resume: bool, free: frozenset[str]) -> None:
    """See that a run may start or go on in `folder`, and write its resolved settings to config.yaml.

    Args:
        folder: RUN_DIR.
        settings: of this call.
        resume: go on with the run in `folder`.
        free: dotted names of settings that a resumed run may change.

    Raises:
        ConfigError: there is a run and `resume` is off, there is none and it is on, or settings changed.
    """
    _check_place(folder, resume)
    now = json.loads(settings.model_dump_json())
    if resume and (folder / CONFIG).is_file():
        before = _with_defaults(yaml.safe_load((folder / CONFIG).read_text()), type(settings))
        changed = sorted(_differences(before, now) - free)
        if changed:
            raise ConfigError(
                f"the run was started with other settings: {', '.join(changed)}",
                where=folder,
                remedy="use the same config, or start a new run in another folder",
            )
    (folder / CONFIG).write_text(yaml.safe_dump(now, sort_keys=False))


def _check_place(folder: Path, resume: bool) -> None:
    if resume != (folder / LAST).exists():
        raise ConfigError(
            "holds no run to resume" if resume else "holds a run already",
            where=folder,
            remedy="leave out --resume" if resume else "add --resume, or choose another folder",
        )


def saved_state(checkpoint: Mapping[str, Any]) -> dict[str, Any]:
    """A run's own state in its checkpoint. ConfigError where another version of canopy wrote it."""
    state = checkpoint.get(STATE, {})
    if state.get("format") != STATE_FORMAT:
        raise ConfigError(
            "is of a run of another version of canopy",
            where=LAST,
            remedy="finish the run with that version, or start a new one",
        )
    return dict(state)


def _with_defaults(raw: Any, schema: type[BaseModel]) -> Any:
    """A run's settings with those that have been added to `schema` since it was started."""
    try:
        return json.loads(schema.model_validate(raw).model_dump_json())
    except ValidationError:
        return raw  # of another age: the differences will be named


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


class Table:
    """A CSV file that grows by rows with a column `step`; its columns are those of the first row.

    A resumed run drops the rows after its checkpoint, so that no step is there twice.
    """

    def __init__(self, path: Path, resume_at: int | None = None) -> None:
        self.path = path
        self.columns: list[str] | None = None
        if resume_at is None or not path.is_file():
            path.unlink(missing_ok=True)
            return
        with path.open(newline="") as file:
            reader = csv.DictReader(file)
            kept = [row for row in reader if row.get("step", "").isdigit() and int(row["step"]) <= resume_at]
            self.columns = list(reader.fieldnames or [])
        with replacing(path) as part, part.open("w", newline="") as file:
            writer = csv.DictWriter(file, self.columns, lineterminator="\n")
            writer.writeheader()
            writer.writerows(kept)

    def add(self, row: Mapping[str, Any]) -> None:
        """Append a row; names that are no columns are left out."""
        first = self.columns is None
        self.columns = self.columns or list(row)
        with self.path.open("a", newline="") as file:
            writer = csv.DictWriter(file, self.columns, extrasaction="ignore", lineterminator="\n")
            if first:
                writer.writeheader()
            writer.writerow({k: f"{v:.6g}" if isinstance(v, float) else v for k, v in row.items()})
