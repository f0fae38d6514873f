"""What a run remembers in its folder: run.json (what it is pinned to), the ledger, and who is at work.

The ledger has one SQLite row per tile, so that a run can die at any moment and go on. States: `pending`,
`running`, `done`, `empty` (nothing to map, no file), `failed` (with its reason). What was running when a
driver died is pending again when the next one starts: a tile's file is renamed into place when it is whole,
so making it twice changes nothing.

One process writes a ledger. Shards (`--shard I/N`) may run on machines that share nothing but the folder, so
each has a ledger of its own, DIR/shards/I-of-N.sqlite; the whole run (`--resume`) gathers them.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import sqlite3
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from canopy.errors import CanopyError, DataError, InputError, OutputError
from canopy.files import told_as_output, write_json
from canopy.region.tiles import Tile
from canopy.runtime import log

RUN_FILE = "run.json"
FORMAT = 4
LEDGER = "ledger.sqlite"
SHARDS = "shards"
LOCK = ".lock"
STATES = ("pending", "running", "done", "empty", "failed")
# Where something lies may differ from machine to machine; what it is may not.
_FREE = ("canopy.created", "area.wkb", "imagery.images", "imagery.imagery", "imagery.pin", "model.file")
_SCHEMA = """
CREATE TABLE IF NOT EXISTS run (key TEXT PRIMARY KEY, value TEXT) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS tiles (
  ordinal INTEGER PRIMARY KEY,
  id TEXT NOT NULL UNIQUE,
  "row" INTEGER NOT NULL, col INTEGER NOT NULL, km2 REAL NOT NULL,
  state TEXT NOT NULL CHECK (state IN ('pending', 'running', 'done', 'empty', 'failed')),
  attempts INTEGER NOT NULL DEFAULT 0,
  seconds REAL, bytes INTEGER, reason TEXT, updated REAL
);
CREATE INDEX IF NOT EXISTS tiles_by_state ON tiles (state, ordinal);
"""

Pins = dict[str, Any]


# ---- the run file -----------------------------------------------------------------------------
def read_pins(folder: Path) -> Pins | None:
    """The run file of a folder; None where there is none. Raises DataError."""
    path = folder / RUN_FILE
    try:
        pins = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise DataError(f"cannot be read ({error})", where=path, expected="the settings of a run") from error
    if not isinstance(pins, dict) or pins.get("canopy", {}).get("format") != FORMAT:
        raise DataError("is of another kind or another version of canopy", where=path)
    return pins


def write_pins(folder: Path, pins: Pins) -> Pins:
    """Write the run file; of several shards that begin at once one wins, and all get its pins.

    Raises:
        OutputError: the folder cannot be written.
    """
    path = folder / RUN_FILE
    with told_as_output(path), FileLock(folder / f".{RUN_FILE}.lock"):
        if not path.exists():
            write_json(path, pins)
    return read_pins(folder) or pins


def run_id(pins: Pins) -> str:
    """Hash of all that is pinned."""
    plain = {path: value for path, value in _leaves(pins) if path == "area.wkb" or path not in _FREE}
    return hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()


def refuse_changes(old: Pins, new: Pins, folder: Path) -> None:
    """Compare what a run is pinned to with what is asked now.

    Raises:
        InputError: what differs, old and new.
    """
    before, after = dict(_leaves(old)), dict(_leaves(new))
    changed = [
        f"{path} was {_short(before.get(path))} and is {_short(after.get(path))}"
        for path in dict.fromkeys([*before, *after])
        if path not in _FREE and before.get(path) != after.get(path)
    ]
    if not changed and before.get("area.wkb") != after.get("area.wkb"):
        changed = ["the area's outline changed"]
    if changed:
        raise InputError(
            f"the run there was begun with other settings: {'; '.join(changed[:4])}",
            where=folder,
            remedy="choose another -o for a new run, undo the change, or begin anew with --overwrite",
        )


def _leaves(value: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, item in value.items():
        if isinstance(item, Mapping) and f"{prefix}{key}" not in _FREE:
            yield from _leaves(item, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", item


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:24]}...{text[-8:]}"


# ---- the ledger -------------------------------------------------------------------------------
@dataclass(frozen=True)
class Outcome:
    """What became of a tile; what is in its map stands in the STAC item beside it.

    Attributes:
        state: `done`, `empty`, `failed`, or `pending` where it has to be made another time.
        seconds: of work; bytes: of the file of a tile that is done.
        reason: why there is no file, in one line.
        again: another try may help where it failed; stop: the whole run has to stop (the disk is full).
    """

    state: str
    seconds: float = 0.0
    bytes: int | None = None
    reason: str | None = None
    again: bool = False
    stop: bool = False


class Ledger:
    """An open ledger; a context manager. Use it from one thread."""

    def __init__(self, path: Path | None, *, read_only: bool = False) -> None:
        """Open or create the ledger at `path`; None: one in memory, to gather others in.

        Raises:
            DataError: no ledger of canopy; OutputError: it cannot be opened or written.
        """
        self.path = path
        with self._told():
            place = _uri(path, "ro" if read_only else "rwc") if path else "file::memory:"
            self._db = sqlite3.connect(place, uri=True, timeout=30)
            if read_only:
                self._db.execute("SELECT 1 FROM tiles LIMIT 1").fetchone()
            else:
                self._db.executescript(_SCHEMA)

    def get(self, key: str) -> str | None:
        """A fact about the run."""
        found = self._ask("SELECT value FROM run WHERE key = ?", key)
        return found[0][0] if found else None

    def set(self, key: str, value: str) -> None:
        """Note a fact about the run."""
        self._write("INSERT OR REPLACE INTO run VALUES (?, ?)", (key, value))

    def add(self, run: str, tiles: Iterable[tuple[Tile, str]]) -> None:
        """Enter the tiles of a run, each with its first state (`pending` or `empty`); all of them or none.

        Raises:
            InputError: the ledger is another run's.
        """
        known = self.get("run")
        if known not in (None, run):
            raise InputError(
                "the ledger is another run's", where=self.path,
                remedy="choose another -o, or use --overwrite",
            )  # fmt: skip
        if known is not None:
            return
        rows = ((t.ordinal, t.id, t.row, t.col, t.km2, state) for t, state in tiles)
        with self._told(), self._db:
            self._db.executemany(
                'INSERT INTO tiles (ordinal, id, "row", col, km2, state) VALUES (?, ?, ?, ?, ?, ?)', rows
            )
            self._db.execute("INSERT INTO run VALUES ('run', ?)", (run,))

    def reopen(self, retry_failed: bool = False) -> None:
        """Make tiles pending that were running when a driver died, and failed ones if asked."""
        self._write("UPDATE tiles SET state = 'pending' WHERE state IN ('running', ?)",
                    ("failed" if retry_failed else "running",))  # fmt: skip
        self._write("UPDATE tiles SET attempts = 0 WHERE state = 'pending'", ())

    def begin(self, tile: Tile) -> None:
        """A tile is being made."""
        self._write(
            "UPDATE tiles SET state = 'running', attempts = attempts + 1 WHERE ordinal = ?", (tile.ordinal,)
        )

    def finish(self, tile: Tile, outcome: Outcome) -> None:
        """Enter what became of a tile."""
        self._write(
            "UPDATE tiles SET state = ?, seconds = ?, bytes = ?, reason = ?, updated = ? WHERE ordinal = ?",
            (outcome.state, outcome.seconds, outcome.bytes, outcome.reason, time.time(), tile.ordinal),
        )

    def attempts(self, tile: Tile) -> int:
        """How often a tile was begun in this start of the run."""
        return int(self._ask("SELECT attempts FROM tiles WHERE ordinal = ?", tile.ordinal)[0][0])

    def rows(self, state: str, page: int = 1000) -> Iterator[tuple[Tile, Outcome]]:
        """Tiles of a state in order, each once; memory does not grow with their number."""
        last = -1
        while found := self._ask(
            'SELECT ordinal, id, "row", col, km2, seconds, bytes, reason FROM tiles '
            "WHERE state = ? AND ordinal > ? ORDER BY ordinal LIMIT ?", state, last, page,
        ):  # fmt: skip
            for *tile, seconds, size, reason in found:
                yield Tile(*tile), Outcome(state, seconds or 0.0, size, reason)
            last = found[-1][0]

    def failures(self) -> list[tuple[str, str]]:
        """Tiles that failed, with the reason."""
        return [(tile.id, outcome.reason or "") for tile, outcome in self.rows("failed")]

    def counts(self) -> dict[str, int]:
        """Tiles by state."""
        found = dict(self._ask("SELECT state, COUNT(*) FROM tiles GROUP BY state"))
        return {state: found.get(state, 0) for state in STATES}

    def totals(self) -> dict[str, float]:
        """Square kilometres (all, finished, and an hour lately), worker seconds and bytes so far."""
        now = time.time()
        [(km2, finished, seconds, size)] = self._ask(
            "SELECT TOTAL(km2), TOTAL(CASE WHEN state IN ('done', 'empty') THEN km2 END), "
            "TOTAL(seconds), TOTAL(bytes) FROM tiles"
        )
        [(lately, since)] = self._ask(
            "SELECT TOTAL(km2), MIN(updated - seconds) FROM tiles "
            "WHERE state IN ('done', 'empty') AND updated > ?", now - 3600,
        )  # fmt: skip
        pace = lately / max(1e-3, now - since) * 3600 if since else 0.0
        return {
            "km2": km2, "km2_finished": finished, "worker_seconds": seconds, "bytes": size,
            "km2_per_hour": pace,
        }  # fmt: skip

    def gather(self, other: Path, tiles: str = "known") -> None:
        """Take over what another ledger of the same run has finished and this one has not.

        A ledger that cannot be read now (its shard is at work elsewhere) is left out: its tiles are only made
        twice then.

        Args:
            tiles: `known`, those that this ledger has; or `all`.
        """
        of = "ordinal IN (SELECT ordinal FROM main.tiles)" if tiles == "known" else "true"
        columns = ("state", "attempts", "seconds", "bytes", "reason", "updated")
        try:
            with self._told():
                self._db.execute("ATTACH ? AS other", (_uri(other, "ro"),))
            with self._told(), self._db:
                found = self._db.execute("SELECT value FROM other.run WHERE key = 'run'").fetchone()
                if found == (self.get("run"),):
                    self._db.execute(
                        f"INSERT INTO main.tiles SELECT * FROM other.tiles WHERE {of} ON CONFLICT (ordinal) "
                        f"DO UPDATE SET {', '.join(f'{name} = excluded.{name}' for name in columns)} "
                        "WHERE state IN ('pending', 'running', 'failed') "
                        "AND excluded.state IN ('done', 'empty', 'failed')"
                    )
        except CanopyError as error:
            log.info(f"{other.name} is left out: {error}")
        finally:
            with contextlib.suppress(sqlite3.Error):  # it may not have been attached
                self._db.execute("DETACH other")

    def close(self) -> None:
        self._db.close()

    def __enter__(self) -> Ledger:
        return self

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        self.close()

    def _ask(self, question: str, *values: Any) -> list[tuple[Any, ...]]:
        with self._told():
            return self._db.execute(question, values).fetchall()

    def _write(self, statement: str, values: tuple[Any, ...]) -> None:
        with self._told(), self._db:
            self._db.execute(statement, values)

    @contextmanager
    def _told(self) -> Iterator[None]:
        """SQLite's errors in canopy's words."""
        try:
            yield
        except sqlite3.DatabaseError as error:
            text = str(error)
            if "not a database" in text or "malformed" in text or "no such table" in text:
                raise DataError("is no ledger of canopy map", where=self.path) from error
            remedy = "make room, and run the same command again to go on" if "full" in text else None
            raise OutputError(
                f"the ledger cannot be used ({text})", where=self.path, remedy=remedy
            ) from error


def _uri(path: Path, mode: str) -> str:
    """A database's address for SQLite, whatever its name has in it."""
    return f"{path.absolute().as_uri()}?mode={mode}"


# ---- who is at work ---------------------------------------------------------------------------
def ledger_path(folder: Path, shard: tuple[int, int] | None) -> Path:
    """The ledger of a whole run, or of one of its shards."""
    return folder / SHARDS / f"{shard[0]:05d}-of-{shard[1]:05d}.sqlite" if shard else folder / LEDGER


def lock_of(folder: Path, ledger: Path) -> Path:
    """The lock of who writes a ledger."""
    return folder / (LOCK if ledger.name == LEDGER else f"{LOCK}-{ledger.stem}")


class HeldError(InputError):
    """Another process is at work in a run's folder."""


@contextmanager
def held(folder: Path, shard: tuple[int, int] | None = None) -> Iterator[None]:
    """Hold a run's folder, or a shard's part of it; the system lets go of it when the process ends.

    Shards of the same N may be at work beside each other, and nobody beside a whole run: others would make
    the same tiles. Everybody takes its own lock first and looks at the others' then, so that of two that
    begin at once one sees the other.

    Raises:
        HeldError: another process is at work there; OutputError: the folder cannot be written.
    """
    path = lock_of(folder, ledger_path(folder, shard))
    beside = f"-of-{shard[1]:05d}" if shard else " "
    lock = FileLock(path)
    try:
        lock.acquire(blocking=False)
    except Timeout:
        raise _held(path) from None
    except OSError as error:
        raise OutputError(f"cannot be written ({error.strerror})", where=path) from error
    try:
        for other in sorted(folder.glob(f"{LOCK}*")):
            if other != path and not other.name.endswith(beside) and is_held(other):
                raise _held(other)
        yield
    finally:
        lock.release()


def _held(lock: Path) -> HeldError:
    return HeldError(
        f"{'another run' if lock.name == LOCK else 'a shard of this run'} is at work here",
        where=lock.parent, remedy="wait for it, or stop it first; --status shows who it is and how far",
    )  # fmt: skip


def is_held(lock: Path) -> bool:
    """Whether another process holds a lock."""
    try:
        with FileLock(lock, blocking=False):
            return False
    except Timeout:
        return True
    except OSError:  # a folder that only may be looked at
        return False
