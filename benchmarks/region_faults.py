"""kill -9, twenty times: a regional run whose worker or driver is killed ends as if nothing had happened.

    python benchmarks/region_faults.py                 # the machinery: pretending workers, 20 + 20 kills
    python benchmarks/region_faults.py --real          # `canopy map` with the embedded model, 20 + 20 kills

Each round starts a run, kills one of its processes at a random moment, lets it finish (after a driver's death
by starting it again), and compares: no tile lost, none twice, every byte as in a run that nobody disturbed.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

REHEARSAL = """
import sys
from pathlib import Path
from canopy.geo.aoi import AOI
from canopy.geo.grid import Grid
from canopy.inference.region.drive import drive
from canopy.inference.region.engines import LocalEngine
from canopy.inference.region.ledger import Ledger
from canopy.inference.region.lock import RunLock
from canopy.inference.region.rehearse import Rehearsal
from canopy.inference.region.task import How
from canopy.inference.region.tiling import Tiling

if __name__ == "__main__":
    folder = Path(sys.argv[1])
    (folder / "tiles").mkdir(parents=True, exist_ok=True)
    area = Grid.of("EPSG:32618", (0.5, 0, 500_000, 0, -0.5, 4_000_000), (10 * 64, 10 * 64))
    with RunLock(folder / ".lock"), Ledger(folder / "ledger.sqlite") as ledger:
        if not sum(ledger.counts().values()):
            ledger.add(Tiling("utm", area, 64).tiles(AOI.from_grid(area)))
        ledger.reopen()
        engine = LocalEngine(How(str(folder), "rehearsal"), ["cpu"] * 3, Rehearsal(seconds=0.05))
        try:
            drive(ledger, engine, attempts=10, retry_wait_s=0.1)
        finally:
            engine.close()
"""


def command(folder: Path, real: bool, script: Path) -> list[str]:
    if not real:
        return [sys.executable, str(script), str(folder)]
    main = "from canopy.cli.main import main; main()"
    options = (
        "--imagery demo --bbox 44.083,-71.296 --size-m 250 --grid utm --zoom 19 --workers 2 --threads 1 "
        "--attempts 10 --device cpu -q"
    )
    return [sys.executable, "-c", main, "map", *options.split(), "-o", str(folder)]


def children(pid: int) -> list[int]:
    """Worker processes of a driver (the resource tracker of multiprocessing is none)."""
    import psutil

    try:
        found = psutil.Process(pid).children(recursive=True)
        return [p.pid for p in found if "spawn_main" in " ".join(p.cmdline())]
    except psutil.Error:
        return []


def state(folder: Path) -> dict[str, str]:
    """What a run left: hashes of its tiles, and what the ledger says of each."""
    from canopy.inference.region.ledger import Ledger

    with Ledger(folder / "ledger.sqlite", read_only=True) as ledger:
        rows = {row.task.id: f"{row.state} {row.sha256}" for row in ledger.rows()}
    files = {p.stem: hashlib.sha256(p.read_bytes()).hexdigest() for p in (folder / "tiles").glob("*.tif")}
    return {f"ledger {k}": v for k, v in rows.items()} | {f"file {k}": v for k, v in files.items()}


def one_round(
    folder: Path, real: bool, script: Path, victim: str, seconds: float, die: random.Random
) -> float:
    """One disturbed run; returns when the kill came, as a share of the undisturbed time."""
    run = subprocess.Popen(command(folder, real, script))
    delay = die.uniform(0.15, 0.9) * seconds
    time.sleep(delay)
    if victim == "driver":
        run.send_signal(signal.SIGKILL)
        run.wait()
        time.sleep(1.5)  # the lock is free at once; orphaned workers end within a second
        subprocess.run(command(folder, real, script), check=True)
    else:
        workers = children(run.pid)
        if workers:
            os.kill(die.choice(workers), signal.SIGKILL)
        if run.wait() != 0:
            raise SystemExit(f"the run ended with {run.returncode} after a worker's death")
    return delay / seconds


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=20, help="kills of a worker, and as many of a driver")
    parser.add_argument("--real", action="store_true", help="canopy map with the embedded model")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="folder for region_faults.json")
    options = parser.parse_args()
    die = random.Random(options.seed)
    results: dict[str, object] = {"real": options.real, "rounds": options.rounds}
    with tempfile.TemporaryDirectory() as folder:
        top = Path(folder)
        script = top / "rehearsal.py"
        script.write_text(REHEARSAL)
        started = time.perf_counter()
        subprocess.run(command(top / "quiet", options.real, script), check=True)
        seconds = time.perf_counter() - started
        expected = state(top / "quiet")
        results["tiles"] = sum(1 for key in expected if key.startswith("file"))
        for victim in ("worker", "driver"):
            same = 0
            for number in range(options.rounds):
                here = top / f"{victim}-{number}"
                share = one_round(here, options.real, script, victim, seconds, die)
                found = state(here)
                same += found == expected
                lost = len([k for k in expected if k not in found])
                print(
                    f"{victim} {number + 1:2}: killed at {share:.0%}, lost {lost}, same {found == expected}",
                    flush=True,
                )
                shutil.rmtree(here)
            results[f"{victim}_same"] = same
    ok = results["worker_same"] == results["driver_same"] == options.rounds
    print(json.dumps(results))
    if options.out:
        options.out.mkdir(parents=True, exist_ok=True)
        (options.out / "region_faults.json").write_text(
            json.dumps(results, indent=2) + "\n", encoding="utf-8"
        )
    sys.exit(not ok)


if __name__ == "__main__":
    main()
