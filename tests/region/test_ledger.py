"""The ledger remembers everything that was entered, whoever dies; and one process works at a tile."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from canopy.errors import DataError, InputError
from canopy.region.ledger import (
    HeldError,
    Ledger,
    Outcome,
    held,
    ledger_path,
    refuse_changes,
    run_id,
    write_pins,
)
from canopy.region.run import remove_leftovers
from canopy.region.tiles import Tile

TILES = [Tile(i, f"t{i}", 0, i, 1.0 + i) for i in range(10)]


@pytest.fixture
def ledger(tmp_path: Path) -> Iterator[Ledger]:
    """A fresh ledger of ten tiles."""
    with Ledger(tmp_path / "ledger.sqlite") as made:
        made.add("run", ((tile, "pending") for tile in TILES))
        yield made


def test_every_pending_tile_comes_once_in_order(ledger: Ledger) -> None:
    seen = []
    for tile, _ in ledger.rows("pending", page=4):
        seen.append(tile)
        ledger.begin(tile)  # what is in work does not come again
        if tile.ordinal % 3 == 0:
            ledger.finish(tile, Outcome("done"))
    assert seen == TILES
    assert ledger.counts()["running"] == 6
    ledger.reopen()
    assert ledger.counts()["pending"] == 6 and ledger.counts()["running"] == 0


def test_rows_come_back_as_they_were_entered_and_the_pace_is_that_of_late(ledger: Ledger) -> None:
    assert ledger.totals()["km2_per_hour"] == 0.0
    made = Outcome("done", 60.0, 7)
    ledger.finish(TILES[2], made)
    ledger.finish(TILES[3], Outcome("failed", 500.0, reason="the host said no"))
    assert list(ledger.rows("done")) == [(TILES[2], made)]
    assert [row.reason for _, row in ledger.rows("failed")] == ["the host said no"]
    totals = ledger.totals()
    assert 0.9 * 3.0 * 60 < totals["km2_per_hour"] <= 3.0 * 60
    assert totals["km2_finished"] == 3.0 and totals["worker_seconds"] == 560.0
    ledger.reopen(retry_failed=True)
    assert ledger.counts()["failed"] == 0 and ledger.counts()["done"] == 1


def test_another_runs_ledger_and_what_is_no_ledger(ledger: Ledger, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="the ledger is another run's"):
        ledger.add("other", ())
    (tmp_path / "other.sqlite").write_text("something else, long enough to be looked at" * 40)
    with pytest.raises(DataError, match="no ledger"):
        Ledger(tmp_path / "other.sqlite")


def test_other_ledgers_are_gathered(tmp_path: Path) -> None:
    (tmp_path / "shards").mkdir()
    for number in (1, 2):
        with Ledger(ledger_path(tmp_path, (number, 2))) as part:
            part.add("r", ((tile, "pending") for tile in TILES if tile.ordinal % 2 == number - 1))
            for tile in TILES[number - 1 : 8 : 2]:
                part.finish(tile, Outcome("failed" if tile.ordinal == 4 else "done", reason="why"))
    with Ledger(ledger_path(tmp_path, (1, 3))) as foreign:
        foreign.add("another", ((tile, "done") for tile in TILES))
    with Ledger(tmp_path / "ledger.sqlite") as whole:
        whole.add("r", ((tile, "pending") for tile in TILES))
        for path in (tmp_path / "shards").iterdir():
            whole.gather(path)
        assert whole.counts() == {"pending": 2, "running": 0, "done": 7, "empty": 0, "failed": 1}
        (tmp_path / "shards" / "00001-of-00002.sqlite").write_text("damaged" * 400)
        whole.gather(tmp_path / "shards" / "00001-of-00002.sqlite")  # left out, and no more
        assert whole.counts()["done"] == 7


HOLDER = """
import os, sys
from pathlib import Path
from canopy.region.ledger import Ledger, Outcome, held
from canopy.region.tiles import Tile
folder = Path(sys.argv[1])
with held(folder), Ledger(folder / "ledger.sqlite") as ledger:
    tiles = [Tile(i, f"t{i}", 0, i, 1.0) for i in range(50)]
    ledger.add("run", ((tile, "pending") for tile in tiles))
    for tile in tiles[:30]:
        ledger.begin(tile)
        if tile.ordinal < 20:
            ledger.finish(tile, Outcome("done"))
    print("held", flush=True)
    sys.stdin.read()
"""


def test_one_process_at_a_run_and_a_killed_one_holds_nothing_and_loses_nothing(tmp_path: Path) -> None:
    words, pipe = [sys.executable, "-c", HOLDER, str(tmp_path)], subprocess.PIPE
    with subprocess.Popen(words, stdout=pipe, stdin=pipe, text=True) as holder:
        assert holder.stdout is not None and holder.stdout.readline() == "held\n"
        for shard in (None, (1, 2)):
            with pytest.raises(HeldError, match="another run is at work here"), held(tmp_path, shard):
                pass
        holder.kill()
    with held(tmp_path), Ledger(tmp_path / "ledger.sqlite") as ledger:
        ledger.reopen()
        assert ledger.counts() == {"pending": 30, "running": 0, "done": 20, "empty": 0, "failed": 0}


def test_a_shard_works_beside_shards_of_the_same_count_only(tmp_path: Path) -> None:
    with held(tmp_path, (1, 2)):
        for other in (None, (1, 3), (1, 2)):
            with pytest.raises(HeldError, match="a shard of this run is at work here"), held(tmp_path, other):
                pass
        with held(tmp_path, (2, 2)):
            pass
    with pytest.raises(FileNotFoundError), held(tmp_path):  # faults inside are not taken for the lock's
        (tmp_path / "nowhere").read_text()


def test_leftovers_are_those_of_the_tiles_that_are_named(tmp_path: Path) -> None:
    folder = tmp_path / "tiles"
    (folder / ".b.tif.canopy-x1").mkdir(parents=True)
    for name in ("a.tif", ".a.tif.1234.part", ".a.json.77.part", ".b.tif.canopy-x1/predicted.tif"):
        (folder / name).touch()
    remove_leftovers(tmp_path, {"a"})
    assert {p.name for p in folder.iterdir()} == {"a.tif", ".b.tif.canopy-x1"}
    remove_leftovers(tmp_path)
    assert [p.name for p in folder.iterdir()] == ["a.tif"]


def test_the_run_file_says_what_changed(tmp_path: Path) -> None:
    pins = {
        "canopy": {"version": "1", "format": 4, "created": "now"},
        "area": {"text": "here", "wkb": "00"},
        "imagery": {"images": ["/a/b.tif"], "sha256": "aa"},
        "model": {"file": "m", "sha256": "m" * 64},
        "map": {"gsd": None, "zoom": 10},
    }
    assert write_pins(tmp_path, pins) == pins
    other = {**pins, "canopy": {"version": "1", "format": 4, "created": "later"},
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
