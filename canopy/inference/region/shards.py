"""`--shard I/N`: N processes, on any machines, without a scheduler, at one run.

Shard I makes every N-th tile and keeps a ledger of its own, DIR/shards/I-of-N.sqlite, which no other process
writes: SQLite's locks need not reach from machine to machine. The shard that ends last gathers all ledgers
into DIR/ledger.sqlite and makes catalog and mosaic; `canopy map -o DIR --resume` does so at any time, and
takes over what shards have left.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path

from canopy.errors import CanopyError
from canopy.files import replacing
from canopy.inference.region.ledger import Ledger
from canopy.inference.region.lock import HeldError, describe_holder, is_held
from canopy.runtime import log

FOLDER = "shards"
LOCK = ".lock"


def _stem(shard: tuple[int, int]) -> str:
    return f"{shard[0]:05d}-of-{shard[1]:05d}"


def ledger_path(folder: Path, shard: tuple[int, int]) -> Path:
    """The ledger of one shard."""
    (folder / FOLDER).mkdir(exist_ok=True)
    return folder / FOLDER / f"{_stem(shard)}.sqlite"


def lock_name(shard: tuple[int, int] | None) -> str:
    """The lock of one shard, or of a whole run, in the run's folder."""
    return f"{LOCK}-{_stem(shard)}" if shard else LOCK


def mark_complete(folder: Path, shard: tuple[int, int]) -> None:
    """Say that a shard has no open tile left; its ledger is closed by now."""
    path = folder / FOLDER / f"{_stem(shard)}.complete"
    with replacing(path) as part:
        part.write_text(json.dumps({"shard": shard}) + "\n", encoding="utf-8")


def all_complete(folder: Path, count: int) -> bool:
    """Whether every one of `count` shards has said so."""
    return all((folder / FOLDER / f"{_stem((i, count))}.complete").is_file() for i in range(1, count + 1))


def refuse_crossing(folder: Path, shard: tuple[int, int] | None) -> None:
    """Only the other shards of the same N may be at work beside a shard, and nobody beside a whole run.

    Others would make the same tiles, and drop what is half-made as left over. Everybody takes its own lock
    first and looks at the others' then, so that of two that begin at once one sees the other.

    Raises:
        HeldError: who is at work.
    """
    if shard is None:
        paths = sorted(folder.glob(f"{LOCK}-*-of-*"))
    else:
        beside = f"-of-{shard[1]:05d}"
        paths = [path for path in sorted(folder.glob(f"{LOCK}*")) if not path.name.endswith(beside)]
    for path in paths:
        if is_held(path):
            who = "another run" if path.name == LOCK else "a shard of this run"
            raise HeldError(
                f"{who} is at work here ({describe_holder(path)}, {path.name})",
                where=folder, remedy="wait for it, or stop it first; --status shows how far it is",
            )  # fmt: skip
    if shard is not None:
        (folder / FOLDER / f"{_stem(shard)}.complete").unlink(missing_ok=True)


def ledgers(folder: Path) -> Iterator[Path]:
    """The ledgers of all shards that ever worked here."""
    if (folder / FOLDER).is_dir():
        pattern = re.compile(r"\d+-of-\d+\.sqlite$")
        yield from sorted(p for p in (folder / FOLDER).iterdir() if pattern.fullmatch(p.name))


def gather(ledger: Ledger, folder: Path, own: Path) -> int:
    """Take over from all other ledgers of the run what this one does not know yet; returns how many tiles.

    A ledger that cannot be read now (its shard is at work on another machine) is left out: its tiles are then
    only made twice, with the same bytes.
    """
    others = [path for path in (folder / "ledger.sqlite", *ledgers(folder)) if path != own and path.is_file()]
    if not others:
        return 0
    states = {row.task.ordinal: row.state for row in ledger.rows()}
    count = 0
    for path in others:
        try:
            with Ledger(path, read_only=True) as other:
                if other.get("run") != ledger.get("run"):
                    continue
                for row in other.rows("done", "empty", "failed"):
                    mine = states.get(row.task.ordinal)
                    if mine in ("pending", "running") or (mine == "failed" and row.state != "failed"):
                        ledger.take(row)
                        states[row.task.ordinal] = row.state
                        count += 1
        except CanopyError as error:
            log.info(f"{path.name} is left out: {error}")
    ledger.commit()
    return count
