"""The driver: every tile once, whatever fails; bounded work; stops cleanly. And the local workers."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest

from canopy.errors import CanopyError, InputError, OutputError
from canopy.region.ledger import Ledger
from canopy.region.rehearse import PretendingEngine, Rehearsal, rehearsed_bytes
from canopy.region.run import LocalEngine, Stop, Tally, drive
from canopy.region.task import How, Outcome, remove_leftovers, tile_path
from canopy.region.tiles import TileTask


class Moody(PretendingEngine):
    """Answers late, in any order, and fails or loses workers by a die."""

    def __init__(self, seed: int, bad: float) -> None:
        super().__init__(slots=5)
        self.die, self.bad, self.made = random.Random(seed), bad, Counter()

    def wait(self, timeout_s: float) -> list[Outcome]:
        task = self._tasks[self.die.randrange(len(self._tasks))]
        self._tasks.remove(task)
        if self.die.random() < self.bad:
            return [
                Outcome(task, self.die.choice(["failed", "died"]), "h", 1.0, reason="bad luck", again=True)
            ]
        self.made[task.id] += 1
        return [Outcome(task, self.die.choice(["done", "done", "empty"]), "h", 1.0, sha256="x", size=1)]


@pytest.mark.parametrize("seed", range(5))
def test_every_tile_is_made_once_whatever_fails(ledger: Ledger, seed: int) -> None:
    total = sum(ledger.counts().values())
    engine = Moody(seed, bad=0.3)
    tally = drive(ledger, engine, attempts=50, retry_wait_s=0.0)
    assert set(engine.made.values()) == {1} and len(engine.made) == total == tally.finished
    assert engine.most_held <= 5
    counts = ledger.counts()
    assert counts["done"] + counts["empty"] == total and tally.retried > 0


def test_a_poison_tile_is_quarantined_and_bad_input_is_not_tried_again(ledger: Ledger) -> None:
    tries: Counter[int] = Counter()

    class Engine(PretendingEngine):
        def _outcome(self, task: TileTask) -> Outcome:
            tries[task.ordinal] += 1
            if task.ordinal == 3:
                return Outcome(task, "died", reason="its worker ended", again=True)
            if task.ordinal == 4:
                return Outcome(task, "failed", reason="a corrupt file", again=False)
            return super()._outcome(task)

    tally = drive(ledger, Engine(slots=4), attempts=3, retry_wait_s=0.0)
    assert (tries[3], tries[4], tally.failed) == (3, 1, 2)
    reasons = {row.task.ordinal: row.reason for row in ledger.rows("failed")}
    assert reasons == {3: "its worker ended (after 3 tries)", 4: "a corrupt file"}


def test_a_full_disk_stops_the_run_and_the_tile_is_kept_for_later(ledger: Ledger) -> None:
    class Engine(PretendingEngine):
        def _outcome(self, task: TileTask) -> Outcome:
            if task.ordinal == 5:
                return Outcome(task, "failed", reason="No space left on device", stop=True)
            return super()._outcome(task)

    with pytest.raises(OutputError, match=r"No space left.*run the same command again"):
        drive(ledger, Engine(slots=1))
    assert ledger.counts()["failed"] == 0 and ledger.counts()["done"] == 5
    ledger.reopen()
    drive(ledger, PretendingEngine())
    assert ledger.counts()["pending"] == 0


def test_stopping_lets_the_tiles_in_work_end(ledger: Ledger) -> None:
    stop = Stop()

    class Engine(PretendingEngine):
        def wait(self, timeout_s: float) -> list[Outcome]:
            stop.asked = True
            return super().wait(timeout_s)

    tally = drive(ledger, Engine(slots=3), stop=stop)
    assert tally.interrupted and tally.done == 3 and ledger.counts()["running"] == 0


def test_the_pace_leaves_out_the_loading_of_the_model(ledger: Ledger) -> None:
    class Engine(PretendingEngine):
        def wait(self, timeout_s: float) -> list[Outcome]:
            return [replace(outcome, seconds=3600.0) for outcome in super().wait(timeout_s)]

    tally = drive(ledger, Engine())
    tally.started -= 7 * 3600  # as if the model had been loaded for hours
    assert tally.km2 * 0.99 < tally.km2_per_hour <= tally.km2  # every tile was begun an hour ago
    assert Tally().km2_per_hour == 0.0


# ---- real processes, without a model ------------------------------------------------------------
def how(ledger: Ledger) -> How:
    return How(str(ledger.path.parent), "rehearsal")


def check_whole(ledger: Ledger) -> None:
    """Every tile done, with the right bytes, and nothing else there."""
    folder = ledger.path.parent
    rows = list(ledger.rows("done"))
    assert len(rows) == sum(ledger.counts().values())
    for row in rows:
        assert tile_path(folder, row.task.id).read_bytes() == rehearsed_bytes(row.task)
    remove_leftovers(folder)
    assert len([p for p in (folder / "tiles").iterdir() if p.suffix == ".tif"]) == len(rows)


def test_killed_workers_are_replaced_and_their_tiles_made(ledger: Ledger) -> None:
    engine = LocalEngine(how(ledger), ["cpu", "cpu"], Rehearsal(seconds=0.02))
    kills = []

    class Killer:
        def update(self, tally: object, in_work: int) -> None:
            if len(kills) < 2 and engine.pids and tally.done >= 4 * (len(kills) + 1):  # type: ignore[attr-defined]
                kills.append(engine.pids[-1])
                os.kill(engine.pids[-1], signal.SIGKILL)

    try:
        tally = drive(ledger, engine, attempts=5, retry_wait_s=0.0, watcher=Killer())
    finally:
        engine.close()
    assert len(kills) == 2 and tally.failed == 0
    check_whole(ledger)


def test_a_shard_drops_what_its_own_tiles_left_and_no_more(tmp_path: Path) -> None:
    tiles = tmp_path / "tiles"
    for name in (".a.tif.xyz.partial", ".a.tif.canopy-xyz", ".b.tif.xyz.partial", ".b.tif.canopy-xyz"):
        (tiles / name).mkdir(parents=True)
    for name in ("a.tif", "a.json", ".a.json.0f.part", ".a.tif.7.partial"):  # half an item, a pretended tile
        (tiles / name).touch()
    assert remove_leftovers(tmp_path, {"a"}) == 4
    left = [".b.tif.canopy-xyz", ".b.tif.xyz.partial", "a.json", "a.tif"]
    assert sorted(p.name for p in tiles.iterdir()) == left
    assert remove_leftovers(tmp_path) == 2


def test_poison_kills_its_worker_and_not_the_run(ledger: Ledger) -> None:
    poison = [row.task.id for row in ledger.rows()][1]
    engine = LocalEngine(how(ledger), ["cpu"], Rehearsal(poison=frozenset([poison])))
    try:
        tally = drive(ledger, engine, attempts=2, retry_wait_s=0.0)
    finally:
        engine.close()
    assert tally.failed == 1
    (failed,) = ledger.rows("failed")
    assert failed.task.id == poison and "SIGKILL" in str(failed.reason)


class Unfit:
    def __call__(self, how: How) -> object:
        raise InputError("the folder is not seen from here")


def test_workers_that_cannot_work_end_the_run(ledger: Ledger) -> None:
    from functools import partial

    engine = LocalEngine(how(ledger), ["cpu"], partial(int, "no number"))  # type: ignore[arg-type]
    try:
        with pytest.raises(CanopyError):
            drive(ledger, engine)
    finally:
        engine.close(kill=True)


DRIVER = """
import sys
from pathlib import Path
from canopy.region.run import drive
from canopy.region.run import LocalEngine
from canopy.region.ledger import Ledger
from canopy.region.rehearse import Rehearsal
from canopy.region.task import How
if __name__ == "__main__":
    folder = Path(sys.argv[1])
    with Ledger(folder / "ledger.sqlite") as ledger:
        ledger.reopen()
        engine = LocalEngine(How(str(folder), "rehearsal"), ["cpu", "cpu"], Rehearsal(seconds=0.1))
        print("go", flush=True)
        drive(ledger, engine)
        engine.close()
"""


def test_a_killed_driver_is_followed_by_its_workers_and_the_next_one_finishes(
    ledger: Ledger, tmp_path: Path
) -> None:
    ledger.close()
    script = tmp_path / "driver.py"
    script.write_text(DRIVER)
    folder = ledger.path.parent
    first = subprocess.Popen([sys.executable, str(script), str(folder)], stdout=subprocess.PIPE)
    assert first.stdout is not None and first.stdout.readline() == b"go\n"
    deadline = time.monotonic() + 120
    while len(list((folder / "tiles").glob("*.tif"))) < 3 and time.monotonic() < deadline:
        time.sleep(0.05)
    first.kill()
    first.wait()
    subprocess.run([sys.executable, str(script), str(folder)], check=True, stdout=subprocess.DEVNULL)
    with Ledger(ledger.path) as after:
        check_whole(after)
