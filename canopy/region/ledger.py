"""The ledger: one SQLite row per tile, so that a run can die at any moment and go on as if it had not.

One process writes a ledger; others may read it. States: `pending`, `running`, `done`, `empty` (nothing to
map, no file), `failed` (with its reason). What runs when a driver dies is pending again when the next one
opens the ledger, and its tile is made anew: its bytes do not depend on who makes it, and how often.

Commits are gathered over half a second; what is lost with the last ones is only time.

One lock per run: two drivers at one folder would do everything twice.

The kernel's lock (`flock`) ends with its process, whatever ended it. On file systems of several machines it
may hold on one of them only, so the lock file also says who holds it, and is touched while it is held.

`--shard I/N`: N processes, on any machines, without a scheduler, at one run.

Shard I makes every N-th tile and keeps a ledger of its own, DIR/shards/I-of-N.sqlite, which no other process
writes: SQLite's locks need not reach from machine to machine. The shard that ends last gathers all ledgers
into DIR/ledger.sqlite and makes catalog and mosaic; `canopy map -o DIR --resume` does so at any time, and
takes over what shards have left.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import shutil
import socket
import sqlite3
import tempfile
import threading
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from canopy.errors import CanopyError, DataError, InputError, OutputError
from canopy.files import replacing
from canopy.region.tiles import TileTask
from canopy.runtime import log

STATES = ("pending", "running", "done", "empty", "failed")
COMMIT_EVERY_S = 0.5
FORMAT = 1
_SCHEMA = """
CREATE TABLE IF NOT EXISTS run (key TEXT PRIMARY KEY, value TEXT) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS tiles (
  ordinal INTEGER PRIMARY KEY,
  id TEXT NOT NULL UNIQUE,
  "row" INTEGER NOT NULL, col INTEGER NOT NULL, km2 REAL NOT NULL,
  state TEXT NOT NULL CHECK (state IN ('pending', 'running', 'done', 'empty', 'failed')),
  attempts INTEGER NOT NULL DEFAULT 0,
  host TEXT, seconds REAL, sha256 TEXT, bytes INTEGER, reason TEXT, facts TEXT, updated REAL
);
CREATE INDEX IF NOT EXISTS tiles_open ON tiles (ordinal) WHERE state IN ('pending', 'running');
CREATE INDEX IF NOT EXISTS tiles_failed ON tiles (ordinal) WHERE state = 'failed';
"""
# File systems of several machines: SQLite's shared memory does not reach across them.
_NETWORK = {"nfs", "nfs4", "lustre", "beegfs", "gpfs", "cifs", "smb3", "ceph", "fuse.sshfs", "9p", "afs"}


@dataclass(frozen=True)
class Row:
    """One tile as the ledger has it; `facts` are statistics and provenance of a finished one."""

    task: TileTask
    state: str
    attempts: int
    host: str | None
    seconds: float | None
    sha256: str | None
    bytes: int | None
    reason: str | None
    facts: dict[str, Any]


_COLUMNS = 'ordinal, id, "row", col, km2, state, attempts, host, seconds, sha256, bytes, reason, facts'


class Ledger:
    """An open ledger; a context manager. Use it from one thread."""

    def __init__(self, path: Path, *, read_only: bool = False) -> None:
        """Open or create the ledger at `path`.

        Raises:
            DataError: no ledger of canopy; OutputError: it cannot be written.
        """
        self.path = path
        self._changed = 0
        self._committed = time.monotonic()
        with self._guard():
            if read_only:
                self._db = _open_to_read(path)
            else:
                self._db = sqlite3.connect(path, isolation_level=None, timeout=30)
                if file_system(path) in _NETWORK:
                    # One writer, and the index of the log in its own memory: safe where memory is not shared.
                    self._db.execute("PRAGMA locking_mode=EXCLUSIVE")
                self._db.execute("PRAGMA journal_mode=WAL")
                self._db.execute("PRAGMA synchronous=NORMAL")
                self._db.executescript(_SCHEMA)

    # ---- the run ------------------------------------------------------------------------------
    def get(self, key: str) -> str | None:
        """A fact about the run."""
        with self._guard():
            found = self._db.execute("SELECT value FROM run WHERE key = ?", (key,)).fetchone()
        return found[0] if found else None

    def set(self, key: str, value: str) -> None:
        """Note a fact about the run, at once."""
        with self._guard():
            self._begin()
            self._db.execute("INSERT OR REPLACE INTO run VALUES (?, ?)", (key, value))
        self.commit()

    # ---- tiles --------------------------------------------------------------------------------
    def add(self, tiles: Iterable[TileTask]) -> int:
        """Enter tiles as pending, all or none; returns how many. The run's first act."""
        rows = ((t.ordinal, t.id, t.row, t.col, t.km2) for t in tiles)
        with self._guard():
            self._begin()
            try:
                # A first start may have died right after entering them.
                self._db.execute("DELETE FROM tiles")
                count = self._db.executemany(
                    'INSERT INTO tiles (ordinal, id, "row", col, km2, state) '
                    "VALUES (?, ?, ?, ?, ?, 'pending')",
                    rows,
                ).rowcount  # fmt: skip
            except BaseException:
                self._db.execute("ROLLBACK")
                raise
        self.commit()
        return max(0, count)

    def reopen(self, retry_failed: bool = False) -> None:
        """Make tiles pending that were running when a driver died, and failed ones if asked."""
        with self._guard():
            self._begin()
            self._db.execute("UPDATE tiles SET state = 'pending' WHERE state = 'running'")
            if retry_failed:
                self._db.execute("UPDATE tiles SET state = 'pending', reason = NULL WHERE state = 'failed'")
        self.commit()

    def pending(self, batch: int = 1000) -> Iterator[TileTask]:
        """Pending tiles in order, each once; memory does not grow with their number."""
        last = -1
        while True:
            with self._guard():
                rows = self._db.execute(
                    "SELECT ordinal, id, \"row\", col, km2 FROM tiles WHERE state IN ('pending', 'running') "
                    "AND state = 'pending' AND ordinal > ? ORDER BY ordinal LIMIT ?",
                    (last, batch),
                ).fetchall()
            if not rows:
                return
            for row in rows:
                yield TileTask(*row)
            last = rows[-1][0]

    def begin(self, ordinal: int) -> None:
        """A tile is being made."""
        self._update("state = 'running', attempts = attempts + 1", (), ordinal)

    def finish(
        self, ordinal: int, state: str, *, host: str, seconds: float, sha256: str | None = None,
        size: int | None = None, reason: str | None = None, facts: Mapping[str, Any] | None = None,
    ) -> None:  # fmt: skip
        """A tile is `done`, `empty`, `failed`, or `pending` once more (with the reason so far)."""
        text = json.dumps(facts, separators=(",", ":")) if facts else None
        self._update(
            "state = ?, host = ?, seconds = ?, sha256 = ?, bytes = ?, reason = ?, facts = ?",
            (state, host, seconds, sha256, size, reason, text),
            ordinal,
        )

    def lose(self, ordinal: int, reason: str) -> None:
        """A finished tile's file is not as it was: it must be made again."""
        self._update("state = 'pending', sha256 = NULL, bytes = NULL, reason = ?", (reason,), ordinal)

    def take(self, row: Row) -> None:
        """Enter what another ledger of the same run knows of a tile."""
        text = json.dumps(row.facts, separators=(",", ":")) if row.facts else None
        self._update(
            "state = ?, attempts = ?, host = ?, seconds = ?, sha256 = ?, bytes = ?, reason = ?, facts = ?",
            (row.state, row.attempts, row.host, row.seconds, row.sha256, row.bytes, row.reason, text),
            row.task.ordinal,
        )

    def rows(self, *states: str) -> Iterator[Row]:
        """Rows in order, of some states or of all."""
        where = f"WHERE state IN ({', '.join('?' * len(states))})" if states else ""
        with self._guard():
            cursor = self._db.execute(f"SELECT {_COLUMNS} FROM tiles {where} ORDER BY ordinal", states)
        while chunk := cursor.fetchmany(1000):
            for r in chunk:
                state, attempts, host, seconds, sha256, size, reason, facts = r[5:]
                yield Row(
                    TileTask(*r[:5]), state, attempts, host, seconds, sha256, size, reason,
                    json.loads(facts) if facts else {},
                )  # fmt: skip

    def counts(self) -> dict[str, int]:
        """Tiles by state."""
        with self._guard():
            found = dict(self._db.execute("SELECT state, COUNT(*) FROM tiles GROUP BY state").fetchall())
        return {state: found.get(state, 0) for state in STATES}

    def totals(self) -> dict[str, float]:
        """Square kilometres (all and finished), worker seconds and bytes so far."""
        with self._guard():
            row = self._db.execute(
                "SELECT TOTAL(km2), TOTAL(CASE WHEN state IN ('done', 'empty') THEN km2 END), "
                "TOTAL(seconds), TOTAL(bytes) FROM tiles"
            ).fetchone()
        return dict(zip(("km2", "km2_finished", "worker_seconds", "bytes"), row, strict=True))

    def pace(self, over_s: float = 3600.0) -> tuple[float, float]:
        """(km2, seconds): what was finished lately, and in how long a time until now."""
        now = time.time()
        with self._guard():
            km2, since = self._db.execute(
                "SELECT TOTAL(km2), MIN(updated - seconds) FROM tiles "
                "WHERE state IN ('done', 'empty') AND seconds > 0 AND updated > ?",
                (now - over_s,),
            ).fetchone()
        return km2, now - since if since is not None else 0.0

    # ---- writing ------------------------------------------------------------------------------
    def _update(self, what: str, values: tuple[Any, ...], ordinal: int) -> None:
        with self._guard():
            self._begin()
            self._db.execute(
                f"UPDATE tiles SET {what}, updated = ? WHERE ordinal = ?", (*values, time.time(), ordinal)
            )
            self._changed += 1
        if time.monotonic() - self._committed > COMMIT_EVERY_S:
            self.commit()

    def _begin(self) -> None:
        if not self._db.in_transaction:
            self._db.execute("BEGIN IMMEDIATE")

    def commit(self) -> None:
        """Put what was gathered on the disk."""
        with self._guard():
            if self._db.in_transaction:
                self._db.execute("COMMIT")
        self._changed, self._committed = 0, time.monotonic()

    def commit_if_due(self) -> None:
        """Commit what has waited long enough."""
        if self._changed and time.monotonic() - self._committed > COMMIT_EVERY_S:
            self.commit()

    def close(self) -> None:
        """Commit and close; the log is folded into the file."""
        try:
            self.commit()
        finally:
            self._db.close()

    def __enter__(self) -> Ledger:
        return self

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        self.close()

    @contextmanager
    def _guard(self) -> Iterator[None]:
        """SQLite's errors in canopy's words."""
        try:
            yield
        except sqlite3.DatabaseError as error:
            text = str(error)
            if "not a database" in text or "malformed" in text:
                raise DataError("is no ledger of canopy map", where=self.path) from error
            if isinstance(error, sqlite3.OperationalError):
                remedy = "make room, and run the same command again to go on" if "full" in text else None
                raise OutputError(
                    f"the ledger cannot be used ({text})", where=self.path, remedy=remedy
                ) from error
            raise CanopyError(f"the ledger refused ({text})", where=self.path) from error


def _open_to_read(path: Path) -> sqlite3.Connection:
    """Open a ledger that is not ours to write.

    Even a reader of a write-ahead log needs a file beside it. Where the disk is full, or the folder may not
    be written, a copy is read instead.
    """

    def connect(place: Path) -> sqlite3.Connection:
        db = sqlite3.connect(f"file:{place}?mode=ro", uri=True, isolation_level=None, timeout=2)
        db.execute("SELECT 1 FROM tiles LIMIT 1").fetchone()
        return db

    try:
        return connect(path)
    except sqlite3.OperationalError:
        if not path.is_file():
            raise
    with tempfile.TemporaryDirectory(prefix="canopy-ledger-") as folder:
        for end in ("", "-wal"):
            with contextlib.suppress(FileNotFoundError):
                shutil.copyfile(f"{path}{end}", f"{folder}/ledger{end}")
        copy = connect(Path(folder, "ledger"))
        memory = sqlite3.connect(":memory:", isolation_level=None)
        copy.backup(memory)
        copy.close()
        return memory


def file_system(path: Path) -> str:
    """Type of the file system that holds a path (`ext4`, `nfs4`, ...); '' where the system does not say."""
    try:
        lines = Path("/proc/self/mounts").read_text(encoding="utf-8").splitlines()
    except OSError:
        return ""
    where = path.absolute().parent.resolve()
    best, kind = -1, ""
    for line in lines:
        parts = line.split()
        point = Path(parts[1].replace("\\040", " "))
        if where.is_relative_to(point) and len(point.parts) >= best:
            best, kind = len(point.parts), parts[2]
    return kind


RENEW_S = 15.0
# A holder on another machine that was not heard of for this long is taken for dead.
STALE_S = 120.0


class HeldError(InputError):
    """Another process is at work in a run's folder."""


class RunLock:
    """Hold `path` while a run is driven; a context manager.

    Raises HeldError, on entering, when another process holds it; the message says which.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._handle: int | None = None
        self._stop = threading.Event()

    def __enter__(self) -> RunLock:
        try:
            handle = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o644)
        except OSError as error:
            raise OutputError(f"cannot be written ({error.strerror})", where=self.path) from error
        try:
            if _is_taken(handle, self.path):
                raise HeldError(
                    f"another run is at work here ({describe_holder(self.path)})",
                    where=self.path.parent,
                    remedy="wait for it, or stop it first; --status shows how far it is",
                )
            text = json.dumps({"host": socket.gethostname(), "pid": os.getpid(), "since": time.time()})
            os.ftruncate(handle, 0)
            os.pwrite(handle, text.encode(), 0)
        except BaseException:
            os.close(handle)
            raise
        self._handle = handle
        threading.Thread(target=self._renew, name="canopy-lock", daemon=True).start()
        return self

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        self._stop.set()
        if self._handle is not None:
            # Emptied, not removed: removing would let a third process lock a file that is no longer there.
            with contextlib.suppress(OSError):
                os.ftruncate(self._handle, 0)
            os.close(self._handle)
            self._handle = None

    def _renew(self) -> None:
        while not self._stop.wait(RENEW_S):
            with contextlib.suppress(OSError):
                os.utime(self.path)


def _is_taken(handle: int, path: Path, look: bool = False) -> bool:
    """Whether another process holds a lock, whose kernel's part is taken here if not.

    With `look` that part is shared with all who only look.
    """
    asked = False
    try:
        import fcntl

        fcntl.flock(handle, (fcntl.LOCK_SH if look else fcntl.LOCK_EX) | fcntl.LOCK_NB)
        asked = True
    except ImportError:  # not on this system: the file's words have to do
        pass
    except OSError as error:
        if error.errno in (errno.EWOULDBLOCK, errno.EACCES, errno.EAGAIN):
            return True
    holder = read_holder(path)
    # For processes of this machine the kernel has just answered, if it could be asked.
    foreign = not asked or holder.get("host") != socket.gethostname()
    return bool(holder) and foreign and _is_fresh(path)


def _is_fresh(path: Path) -> bool:
    """Whether the holder that a lock names was heard of a moment ago."""
    return time.time() - path.stat().st_mtime < STALE_S


def is_held(path: Path) -> bool:
    """Whether another process holds a lock; takes nothing."""
    try:
        handle = os.open(path, os.O_RDONLY)
    except OSError:
        return False
    try:
        return _is_taken(handle, path, look=True)
    finally:
        os.close(handle)


def read_holder(path: Path) -> dict[str, object]:
    """Who holds (or held) a lock: host, pid, since; empty when nobody."""
    try:
        found = json.loads(path.read_text(encoding="utf-8") or "{}")
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def live_holder(path: Path) -> dict[str, object]:
    """Who holds a lock, as `read_holder`; empty also when its process was killed and could not clear it."""
    holder = read_holder(path)
    if not holder:
        return {}
    try:
        # Elsewhere than on POSIX, signal 0 is no question: Windows has it for Ctrl-C.
        if os.name == "posix" and holder.get("host") == socket.gethostname():
            os.kill(int(str(holder["pid"])), 0)
        elif not _is_fresh(path):
            return {}
    except PermissionError:  # it lives, and is another user's
        return holder
    except (OSError, KeyError, ValueError):
        return {}
    return holder


def describe_holder(path: Path) -> str:
    """`process 123 on host x`, as far as the lock file says."""
    holder = read_holder(path)
    return f"process {holder['pid']} on {holder['host']}" if holder else "its process is not known"


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
