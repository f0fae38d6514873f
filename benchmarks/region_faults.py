"""kill -9, twenty times: a regional run whose worker or driver is killed ends as if nothing had happened.

    python benchmarks/region_faults.py                  # the machinery: pretending workers, 20 + 20 kills
    python benchmarks/region_faults.py --real           # `canopy map` with a small model, 20 + 20 kills
    python benchmarks/region_faults.py --real --victims driver --rounds 4 --kills 5

Each round starts a run of 25 tiles on two workers, kills one of its processes when a random number of tiles
is there (none included: workers are then still loading), goes on (after a driver's death by starting it
again), perhaps kills again, and compares with a run that nobody disturbed: no tile lost, none twice, every
byte the same, nothing left over.
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from region_small import left_behind, map_command, report, small_image, small_model

SIDE = 5
REHEARSAL = """
import sys
from pathlib import Path
from canopy.geo.area import AOI
from canopy.geo.grid import Grid
from canopy.region.run import drive
from canopy.region.run import LocalEngine
from canopy.region.ledger import Ledger
from canopy.region.ledger import RunLock
from canopy.region.rehearse import Rehearsal
from canopy.region.task import How, remove_leftovers
from canopy.region.tiles import Tiling

if __name__ == "__main__":
    folder = Path(sys.argv[1])
    (folder / "tiles").mkdir(parents=True, exist_ok=True)
    area = Grid.of("EPSG:32618", (0.5, 0, 500_000, 0, -0.5, 4_000_000), (5 * 64, 5 * 64))
    with RunLock(folder / ".lock"), Ledger(folder / "ledger.sqlite") as ledger:
        if not sum(ledger.counts().values()):
            ledger.add(Tiling("utm", area, 64).tiles(AOI.from_grid(area)))
        ledger.reopen()
        engine = LocalEngine(How(str(folder), "rehearsal"), ["cpu"] * 2, Rehearsal(seconds=0.05))
        try:
            drive(ledger, engine, attempts=10, retry_wait_s=0.1)
        finally:
            engine.close()
        remove_leftovers(folder)  # as `canopy map` does at its end
        (folder / "mosaic").write_text("".join(f"tiles/{row.task.id}.tif<" for row in ledger.rows("done")))
"""


def workers_of(pid: int) -> list[int]:
    """Worker processes of a driver (the resource tracker of multiprocessing is none)."""
    import psutil

    try:
        found = psutil.Process(pid).children(recursive=True)
        return [p.pid for p in found if "spawn_main" in " ".join(p.cmdline())]
    except psutil.Error:
        return []


def wait_for(run: subprocess.Popen[bytes], folder: Path, tiles: int, victim: str, jitter_s: float) -> int:
    """Wait until `tiles` tiles are there and the victim lives; returns how many there were then."""
    count = 0
    while run.poll() is None:
        count = len(list((folder / "tiles").glob("*.tif"))) if (folder / "tiles").is_dir() else 0
        if count >= tiles and (victim == "driver" or workers_of(run.pid)):
            time.sleep(jitter_s)
            break
        time.sleep(0.02)
    return count


def kill_drivers(words: list[str], folder: Path, when: list[int], die: random.Random) -> list[int]:
    """One run whose driver is killed at each of some numbers of tiles; says how many there were then."""
    hits = []
    for tiles in when:
        run = subprocess.Popen(words, stderr=subprocess.DEVNULL)
        there = wait_for(run, folder, tiles, "driver", die.uniform(0.0, 0.3))
        run.send_signal(signal.SIGKILL)
        if run.wait() == -signal.SIGKILL:
            hits.append(there)
    # At once: the last one's workers may still be ending.
    subprocess.run(words, check=True)
    return hits


def kill_workers(words: list[str], folder: Path, when: list[int], die: random.Random) -> list[int]:
    """The same, with a random worker each time, in one run that has to live through it."""
    hits = []
    run = subprocess.Popen(words, stderr=subprocess.DEVNULL)
    for tiles in when:
        there = wait_for(run, folder, tiles, "worker", die.uniform(0.0, 0.3))
        workers = workers_of(run.pid)
        if workers:
            os.kill(die.choice(workers), signal.SIGKILL)
            hits.append(there)
    if run.wait() != 0:
        raise SystemExit(f"the run ended with {run.returncode} after a worker's death")
    return hits


def compare(found: dict[str, Any], expected: dict[str, Any]) -> dict[str, int]:
    """Tiles lost, twice, with other bytes or another state than undisturbed; files left over."""
    rows, files = expected["rows"], expected["files"]
    done = [tile for tile in rows if rows[tile][0] == "done"]
    other = [tile for tile in {*rows, *found["rows"]} if found["rows"].get(tile) != rows.get(tile)]
    return {
        "lost": sum(t not in found["files"] or t not in found["mosaic"] for t in done),
        "twice": found["twice"],
        "other_bytes": sum(found["files"].get(t) != files[t] for t in done),
        "other_rows": len(other),
        "strays": len(found["strays"]),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=20, help="runs for each kind of victim")
    parser.add_argument("--kills", type=int, default=1, help="kills in each run")
    parser.add_argument("--victims", nargs="+", choices=("worker", "driver"), default=["worker", "driver"])
    parser.add_argument("--real", action="store_true", help="canopy map instead of pretending workers")
    parser.add_argument("--model", help="with --real: a model instead of the small one")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="folder for region_faults.json")
    options = parser.parse_args()
    die = random.Random(options.seed)
    totals: dict[str, dict[str, int]] = {}
    with tempfile.TemporaryDirectory() as name:
        top = Path(name)
        (top / "rehearsal.py").write_text(REHEARSAL)
        image, model = top / "image.tif", options.model or top / "small.safetensors"
        if options.real:
            small_image(image, SIDE)
            if not options.model:
                small_model(top / "small.safetensors")

        def words(folder: Path) -> list[str]:
            if options.real:
                return map_command(folder, image, model, "--workers", 2)
            return [sys.executable, str(top / "rehearsal.py"), str(folder)]

        subprocess.run(words(top / "quiet"), check=True)
        expected = left_behind(top / "quiet")
        for victim in options.victims:
            kill = kill_workers if victim == "worker" else kill_drivers
            total = totals[victim] = {"kills": 0}
            for number in range(options.rounds):
                folder = top / f"{victim}-{number}"
                when = sorted(die.randrange(SIDE * SIDE - 2) for _ in range(options.kills))
                hits = kill(words(folder), folder, when, die)
                found = compare(left_behind(folder), expected)
                print(f"{victim} {number + 1}: killed with {hits} tiles there, {found}", flush=True)
                total["kills"] += len(hits)
                for key, count in found.items():
                    total[key] = total.get(key, 0) + count
                shutil.rmtree(folder)
    wrong = sum(count for total in totals.values() for key, count in total.items() if key != "kills")
    results = {"real": options.real, "rounds": options.rounds, "tiles": len(expected["rows"]), **totals}
    report(results, options.out, "region_faults")
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
