"""The ledger remembers everything that was committed, whoever dies; one driver at a time."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from canopy.errors import DataError, InputError
from canopy.region import ledger as shards
from canopy.region.ledger import STALE_S, HeldError, Ledger, RunLock, file_system, live_holder, read_holder
from canopy.region.plan import refuse_changes, run_id, write_pins
from canopy.region.tiles import TileTask


def finish(ledger: Ledger, ordinal: int, state: str = "done", **more: object) -> None:
    ledger.finish(ordinal, state, host="h", seconds=1.0, **more)  # type: ignore[arg-type]


def test_every_pending_tile_comes_once_in_order(ledger: Ledger) -> None:
    total = sum(ledger.counts().values())
    feed = ledger.pending(batch=4)
    seen = []
    for task in feed:
        seen.append(task.ordinal)
        ledger.begin(task.ordinal)  # what is in work does not come again
        if task.ordinal % 3 == 0:
            finish(ledger, task.ordinal)
    assert seen == list(range(total))
    assert ledger.counts()["running"] == total - len(range(0, total, 3))
    ledger.reopen()
    assert ledger.counts()["pending"] == ledger.counts()["pending"] and ledger.counts()["running"] == 0


def test_rows_come_back_as_they_were_entered(ledger: Ledger) -> None:
    ledger.begin(2)
    finish(ledger, 2, sha256="ab", size=7, facts={"dates": ["2021-01-01"]})
    finish(ledger, 3, "failed", reason="the host said no")
    (row,) = ledger.rows("done")
    assert (row.task.ordinal, row.attempts, row.sha256, row.bytes) == (2, 1, "ab", 7)
    assert row.facts == {"dates": ["2021-01-01"]} and row.seconds == 1.0 and row.host == "h"
    assert [r.reason for r in ledger.rows("failed")] == ["the host said no"]
    ledger.reopen(retry_failed=True)
    assert ledger.counts()["failed"] == 0


def test_a_killed_writer_loses_nothing_that_was_committed(tmp_path: Path) -> None:
    path = tmp_path / "ledger.sqlite"
    code = """
import os, sys
from pathlib import Path
from canopy.region.ledger import Ledger
from canopy.region.tiles import TileTask
ledger = Ledger(Path(sys.argv[1]))
ledger.add(TileTask(i, f"t{i}", 0, i, 1.0) for i in range(50))
for i in range(30):
    ledger.begin(i)
    ledger.finish(i, "done", host="h", seconds=1.0, sha256="x")
    if i == 19:
        ledger.commit()
os.kill(os.getpid(), 9)
"""
    assert subprocess.run([sys.executable, "-c", code, str(path)], check=False).returncode == -9
    with Ledger(path) as ledger:
        ledger.reopen()
        counts = ledger.counts()
    assert 20 <= counts["done"] <= 30 and counts["done"] + counts["pending"] == 50


def test_the_pace_is_that_of_late(ledger: Ledger) -> None:
    assert ledger.pace() == (0.0, 0.0)
    tasks = list(ledger.pending())
    ledger.finish(tasks[0].ordinal, "done", host="h", seconds=60.0)
    ledger.finish(tasks[1].ordinal, "failed", host="h", seconds=500.0)
    km2, seconds = ledger.pace()
    assert km2 == pytest.approx(tasks[0].km2) and 60 <= seconds < 120
    time.sleep(0.01)
    assert ledger.pace(over_s=0.005) == (0.0, 0.0)


def test_a_ledger_in_a_folder_without_room_can_be_read(
    ledger: Ledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    import sqlite3

    finish(ledger, 1)
    ledger.commit()  # in the log, not yet in the file
    real = sqlite3.connect

    def refuse(name: object, *args: object, **more: object) -> sqlite3.Connection:
        if "mode=ro" in str(name) and str(ledger.path) in str(name):
            raise sqlite3.OperationalError("disk I/O error")  # as where its index cannot be made
        return real(name, *args, **more)  # type: ignore[call-overload, no-any-return]

    monkeypatch.setattr(sqlite3, "connect", refuse)
    with Ledger(ledger.path, read_only=True) as copy:
        assert copy.counts() == ledger.counts() and copy.counts()["done"] == 1


def test_what_is_no_ledger_is_said_so(tmp_path: Path) -> None:
    (tmp_path / "ledger.sqlite").write_text("something else, long enough to be looked at" * 40)
    with pytest.raises(DataError, match="no ledger"):
        Ledger(tmp_path / "ledger.sqlite")
    assert isinstance(file_system(tmp_path), str)


def test_one_driver_at_a_time(tmp_path: Path) -> None:
    with RunLock(tmp_path / ".lock"):
        with (
            pytest.raises(InputError, match="another run is at work here"),
            RunLock(tmp_path / ".lock"),
        ):
            pass
        with (
            pytest.raises(HeldError, match="a shard of this run"),
            RunLock(tmp_path / shards.lock_name((1, 2))),
        ):
            shards.refuse_crossing(tmp_path, None)
    with RunLock(tmp_path / ".lock"):
        assert live_holder(tmp_path / ".lock")["pid"] == os.getpid()
    assert live_holder(tmp_path / ".lock") == {}


def test_a_shard_starts_beside_shards_of_the_same_count_only(tmp_path: Path) -> None:
    done = tmp_path / "shards" / "00001-of-00002.complete"
    done.parent.mkdir()
    shards.mark_complete(tmp_path, (1, 2))
    with (
        pytest.raises(HeldError, match=f"another run is at work here .process {os.getpid()} on"),
        RunLock(tmp_path / ".lock"),
    ):
        shards.refuse_crossing(tmp_path, (1, 2))
    with (
        pytest.raises(HeldError, match=r"a shard of this run .*-00001-of-00003"),
        RunLock(tmp_path / shards.lock_name((1, 3))),
    ):
        shards.refuse_crossing(tmp_path, (1, 2))
    assert done.exists()  # who was refused has changed nothing
    with RunLock(tmp_path / shards.lock_name((2, 2))):
        shards.refuse_crossing(tmp_path, (1, 2))
    assert not done.exists()


def test_a_run_on_another_machine_is_seen_by_a_shard(tmp_path: Path) -> None:
    (tmp_path / ".lock").write_text('{"host": "elsewhere", "pid": 1, "since": 0}')
    with pytest.raises(HeldError, match="process 1 on elsewhere"):
        shards.refuse_crossing(tmp_path, (1, 2))


def test_a_holder_on_another_machine_counts_until_it_is_stale(tmp_path: Path) -> None:
    path = tmp_path / ".lock"
    path.write_text('{"host": "elsewhere", "pid": 1, "since": 0}')
    with pytest.raises(InputError, match="process 1 on elsewhere"), RunLock(path):
        pass
    old = time.time() - 2 * STALE_S
    assert live_holder(path)["host"] == "elsewhere"
    os.utime(path, (old, old))
    assert live_holder(path) == {}
    with RunLock(path):
        pass


def test_a_killed_holder_holds_no_longer(tmp_path: Path) -> None:
    code = """
import os, sys
from pathlib import Path
from canopy.region.ledger import RunLock
with RunLock(Path(sys.argv[1])):
    os.kill(os.getpid(), 9)
"""
    subprocess.run([sys.executable, "-c", code, str(tmp_path / ".lock")], check=False)
    assert read_holder(tmp_path / ".lock") and live_holder(tmp_path / ".lock") == {}
    with RunLock(tmp_path / ".lock"):
        pass


def test_shards_are_gathered(tmp_path: Path) -> None:
    tasks = [TileTask(i, f"t{i}", 0, i, 1.0) for i in range(10)]
    for number in (1, 2):
        with Ledger(shards.ledger_path(tmp_path, (number, 2))) as part:
            part.set("run", "r")
            part.add(task for task in tasks if task.ordinal % 2 == number - 1)
            for task in tasks[number - 1 : 8 : 2]:
                finish(part, task.ordinal, "failed" if task.ordinal == 4 else "done", reason="why")
    with Ledger(tmp_path / "ledger.sqlite") as whole:
        whole.set("run", "r")
        whole.add(tasks)
        assert shards.gather(whole, tmp_path, whole.path) == 8
        assert whole.counts() == {"pending": 2, "running": 0, "done": 7, "empty": 0, "failed": 1}
        assert shards.gather(whole, tmp_path, whole.path) == 0
    shards.mark_complete(tmp_path, (1, 2))
    assert not shards.all_complete(tmp_path, 2)
    shards.mark_complete(tmp_path, (2, 2))
    assert shards.all_complete(tmp_path, 2)


def test_pins_say_what_changed(tmp_path: Path) -> None:
    pins = {
        "canopy": {"version": "1", "format": 1, "created": "now"},
        "area": {"text": "here", "wkb": "00"},
        "imagery": {"images": ["/a/b.tif"], "sha256": "aa"},
        "model": {"file": "m", "sha256": "m" * 64},
        "map": {"gsd": None, "threads": 1},
    }
    assert write_pins(tmp_path, pins) == pins
    other = {**pins, "canopy": {"version": "1", "format": 1, "created": "later"},
             "imagery": {"images": ["/elsewhere/b.tif"], "sha256": "aa"}}  # fmt: skip
    refuse_changes(pins, other, tmp_path)
    assert run_id(pins) == run_id(other)
    assert write_pins(tmp_path, other) == pins  # the first to begin wins
    changed = {**pins, "model": {"file": "m", "sha256": "n" * 64}, "map": {"gsd": 1.0, "threads": 1}}
    with pytest.raises(InputError, match=r"model\.sha256 was .* map\.gsd was null and is 1\.0"):
        refuse_changes(pins, changed, tmp_path)
    with pytest.raises(InputError, match="outline"):
        refuse_changes(pins, {**pins, "area": {"text": "here", "wkb": "01"}}, tmp_path)
