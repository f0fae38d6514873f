"""The ledger remembers everything that was entered, whoever dies; and one process works at a tile."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from canopy.errors import DataError, InputError
from canopy.region.ledger import HeldError, Ledger, Outcome, held, ledger_path
from canopy.region.plan import refuse_changes, run_id, write_pins
from canopy.region.task import remove_leftovers
from canopy.region.tiles import Tile


def tiles_of(ledger: Ledger, state: str = "pending") -> list[Tile]:
    return [tile for tile, _ in ledger.rows(state)]


def test_every_pending_tile_comes_once_in_order(ledger: Ledger) -> None:
    total = sum(ledger.counts().values())
    seen = []
    for tile, _ in ledger.rows("pending", page=4):
        seen.append(tile.ordinal)
        ledger.begin(tile)  # what is in work does not come again
        if tile.ordinal % 3 == 0:
            ledger.finish(tile, Outcome("done"))
    assert seen == list(range(total))
    running = total - len(range(0, total, 3))
    assert ledger.counts()["running"] == running
    ledger.reopen()
    assert ledger.counts()["pending"] == running and ledger.counts()["running"] == 0


def test_rows_come_back_as_they_were_entered(ledger: Ledger) -> None:
    second, third = tiles_of(ledger)[2:4]
    made = Outcome("done", 1.5, "h", "ab", 7, None, {"dates": ["2021-01-01"]})
    ledger.finish(second, made)
    ledger.finish(third, Outcome("failed", reason="the host said no"))
    assert list(ledger.rows("done")) == [(second, made)]
    assert [row.reason for _, row in ledger.rows("failed")] == ["the host said no"]
    ledger.reopen(retry_failed=True)
    assert ledger.counts()["failed"] == 0 and ledger.counts()["done"] == 1


def test_the_pace_is_that_of_late(ledger: Ledger) -> None:
    assert ledger.totals()["km2_per_hour"] == 0.0
    one, two, *_ = tiles_of(ledger)
    ledger.finish(one, Outcome("done", 60.0))
    ledger.finish(two, Outcome("failed", 500.0))
    totals = ledger.totals()
    assert 0.9 * one.km2 * 60 < totals["km2_per_hour"] <= one.km2 * 60
    assert totals["km2_finished"] == pytest.approx(one.km2) and totals["worker_seconds"] == 560.0


def test_a_killed_writer_loses_nothing(tmp_path: Path) -> None:
    path = tmp_path / "ledger.sqlite"
    code = """
import os, sys
from pathlib import Path
from canopy.region.ledger import Ledger, Outcome
from canopy.region.tiles import Tile
ledger, tiles = Ledger(Path(sys.argv[1])), [Tile(i, f"t{i}", 0, i, 1.0) for i in range(50)]
ledger.add("run", ((tile, "pending") for tile in tiles))
for tile in tiles[:30]:
    ledger.begin(tile)
    if tile.ordinal < 20:
        ledger.finish(tile, Outcome("done"))
os.kill(os.getpid(), 9)
"""
    assert subprocess.run([sys.executable, "-c", code, str(path)], check=False).returncode == -9
    with Ledger(path) as ledger:
        ledger.reopen()
        assert ledger.counts() == {"pending": 30, "running": 0, "done": 20, "empty": 0, "failed": 0}


def test_another_runs_ledger_and_what_is_no_ledger(ledger: Ledger, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="the ledger is another run's"):
        ledger.add("other", ())
    (tmp_path / "ledger.sqlite").write_text("something else, long enough to be looked at" * 40)
    with pytest.raises(DataError, match="no ledger"):
        Ledger(tmp_path / "ledger.sqlite")


def test_other_ledgers_are_gathered(tmp_path: Path) -> None:
    tiles = [Tile(i, f"t{i}", 0, i, 1.0) for i in range(10)]
    (tmp_path / "shards").mkdir()
    for number in (1, 2):
        with Ledger(ledger_path(tmp_path, (number, 2))) as part:
            part.add("r", ((tile, "pending") for tile in tiles if tile.ordinal % 2 == number - 1))
            for tile in tiles[number - 1 : 8 : 2]:
                part.finish(tile, Outcome("failed" if tile.ordinal == 4 else "done", reason="why"))
    with Ledger(ledger_path(tmp_path, (1, 3))) as foreign:
        foreign.add("another", ((tile, "done") for tile in tiles))
    with Ledger(tmp_path / "ledger.sqlite") as whole:
        whole.add("r", ((tile, "pending") for tile in tiles))
        for path in (tmp_path / "shards").iterdir():
            whole.gather(path)
        assert whole.counts() == {"pending": 2, "running": 0, "done": 7, "empty": 0, "failed": 1}
        (tmp_path / "shards" / "00001-of-00002.sqlite").write_text("damaged" * 400)
        whole.gather(tmp_path / "shards" / "00001-of-00002.sqlite")  # left out, and no more
        assert whole.counts()["done"] == 7


# ---- who may work where -----------------------------------------------------------------------
HOLDER = """
import sys, time
from pathlib import Path
from canopy.region.ledger import held
with held(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


def test_one_process_at_a_run_and_a_killed_one_holds_no_longer(tmp_path: Path) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(tmp_path)], stdout=subprocess.PIPE, text=True
    ) as holder:
        assert holder.stdout is not None and holder.stdout.readline() == "held\n"
        for shard in (None, (1, 2)):
            told = rf"another run is at work here \(process {holder.pid} on"
            with pytest.raises(HeldError, match=told), held(tmp_path, shard):
                pass
        holder.kill()
    with held(tmp_path):
        assert json.loads((tmp_path / ".lock.json").read_text())["pid"] == os.getpid()
    assert not (tmp_path / ".lock.json").exists()


def test_a_shard_works_beside_shards_of_the_same_count_only(tmp_path: Path) -> None:
    with held(tmp_path, (1, 2)):
        for other in (None, (1, 3), (1, 2)):
            with pytest.raises(HeldError, match="a shard of this run is at work here"), held(tmp_path, other):
                pass
        with held(tmp_path, (2, 2)):
            pass


def test_faults_inside_the_block_are_not_taken_for_the_locks(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError), held(tmp_path):
        (tmp_path / "nowhere").read_text()
    with held(tmp_path):
        pass


def test_leftovers_are_those_of_the_tiles_that_are_named(tmp_path: Path) -> None:
    folder = tmp_path / "tiles"
    folder.mkdir()
    (folder / "a.tif").touch()
    (folder / ".a.tif.1234.part").touch()
    (folder / ".a.json.77.part").touch()
    (folder / ".b.tif.canopy-x1").mkdir()
    (folder / ".b.tif.canopy-x1" / "predicted.tif").touch()
    assert remove_leftovers(tmp_path, {"a"}) == 2 and (folder / ".b.tif.canopy-x1").exists()
    assert remove_leftovers(tmp_path) == 1 and [p.name for p in folder.iterdir()] == ["a.tif"]


# ---- the run file -----------------------------------------------------------------------------
def test_the_run_file_says_what_changed(tmp_path: Path) -> None:
    pins = {
        "canopy": {"version": "1", "format": 2, "created": "now"},
        "area": {"text": "here", "wkb": "00"},
        "imagery": {"images": ["/a/b.tif"], "sha256": "aa"},
        "model": {"file": "m", "sha256": "m" * 64},
        "map": {"gsd": None, "zoom": 10},
    }
    assert write_pins(tmp_path, pins) == pins
    time.sleep(0.01)
    other = {**pins, "canopy": {"version": "1", "format": 2, "created": "later"},
             "imagery": {"images": ["/elsewhere/b.tif"], "sha256": "aa"}}  # fmt: skip
    refuse_changes(pins, other, tmp_path)
    assert run_id(pins) == run_id(other)
    assert write_pins(tmp_path, other) == pins  # the first to begin wins
    changed = {**pins, "model": {"file": "m", "sha256": "n" * 64}, "map": {"gsd": 1.0, "zoom": 10}}
    with pytest.raises(InputError, match=r"model\.sha256 was .* map\.gsd was null and is 1\.0"):
        refuse_changes(pins, changed, tmp_path)
    moved = {**pins, "area": {"text": "here", "wkb": "01"}}
    assert run_id(moved) != run_id(pins)
    with pytest.raises(InputError, match="outline"):
        refuse_changes(pins, moved, tmp_path)
