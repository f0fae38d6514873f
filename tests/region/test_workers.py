"""Real processes: nothing is lost, twice or other when workers or their driver die or are stopped.

That local processes, a cluster and shards give equal heights is shown in tests/behaviour/test_map.py.
CANOPY_KILLS=20 kills twenty times more.
"""

from __future__ import annotations

import contextlib
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import psutil
import rasterio

from canopy.region.ledger import Ledger
from canopy.region.options import MapOptions
from canopy.region.run import status

MORE_KILLS = int(os.environ.get("CANOPY_KILLS", "0"))
CANOPY = [sys.executable, "-c", "from canopy.cli.main import main; main()"]


def heights(folder: Path) -> np.ndarray:
    with rasterio.open(folder / "mosaic") as mosaic:
        return mosaic.read()


def check_same(folder: Path, expected: np.ndarray) -> None:
    """No tile lost, twice or other, nothing left over, and the ledger knows it."""
    with Ledger(folder / "ledger.sqlite", read_only=True) as ledger:
        done = {f"{tile.id}.tif" for tile, _ in ledger.rows("done")}
        assert ledger.counts()["done"] == len(done) and ledger.counts()["failed"] == 0
        assert sum(ledger.counts().values()) == len(done) + ledger.counts()["empty"]
    assert {path.name for path in (folder / "tiles").iterdir() if path.suffix != ".json"} == done
    found = heights(folder)
    assert np.array_equal(np.isnan(found), np.isnan(expected))
    np.testing.assert_allclose(found, expected, atol=0.01, rtol=0)


def started_tiles(folder: Path) -> int:
    return len(list(folder.glob("tiles/*.tif")))


def workers_of(driver: subprocess.Popen[str]) -> list[psutil.Process]:
    """The processes in which a driver's tiles are made."""
    children = psutil.Process(driver.pid).children(recursive=True)
    workers = []
    for child in children:
        with contextlib.suppress(psutil.NoSuchProcess):  # it may end meanwhile, as a zombie too
            if "spawn_main" in " ".join(child.cmdline()):
                workers.append(child)
    return workers


def interrupt(driver: subprocess.Popen[str], folder: Path) -> None:
    """Ctrl-C as a terminal has it, to driver and workers: the tiles in work end, and it says so."""
    os.killpg(driver.pid, signal.SIGINT)
    _, told = driver.communicate(timeout=100)
    assert driver.returncode == 130 and "Traceback" not in told
    assert "stopping after the tiles in work" in told and "Run the same command again" in told
    counts = status(folder)["tiles"]
    assert counts["running"] == 0 and counts["done"] == started_tiles(folder) < sum(counts.values())
    assert not [path for path in (folder / "tiles").iterdir() if path.name.startswith(".")]


def kill_worker(driver: subprocess.Popen[str], folder: Path) -> None:
    """The driver gives its tile to another one and goes on; here it is killed a little later."""
    if victims := workers_of(driver):
        victims[0].kill()
    time.sleep(1.0)
    kill_driver(driver, folder)


def kill_driver(driver: subprocess.Popen[str], folder: Path) -> None:
    mine = workers_of(driver)
    driver.kill()
    driver.wait()
    _, alive = psutil.wait_procs(mine, timeout=30)
    assert not alive, "workers outlive their driver"


def test_stops_and_kills_lose_and_double_nothing(
    options: Callable[..., MapOptions], make_run: Callable, image: Path, small_model: Path, tmp_path: Path
) -> None:
    make_run(options(out=str(tmp_path / "expected"), zoom=21))
    expected, die = heights(tmp_path / "expected"), random.Random(7)
    words = [
        *CANOPY, "map", image, "--model", small_model, "--device", "cpu", "--backend", "torch", "--grid",
        "utm", "--zoom", "21", "--attempts", "30",
    ]  # fmt: skip
    victims = [interrupt, kill_worker]
    victims += die.choices([kill_worker, kill_driver], k=MORE_KILLS)
    rounds = 1
    for victim in victims:
        folder = tmp_path / f"run-{rounds}"
        before = started_tiles(folder)
        driver = subprocess.Popen(
            [*map(str, words), "-o", folder, "--workers", "2"], stderr=subprocess.PIPE, text=True,
            start_new_session=True,
        )  # fmt: skip
        while driver.poll() is None and started_tiles(folder) <= before:  # let there be progress
            time.sleep(0.02)
        if victim is not interrupt:
            time.sleep(die.uniform(0.0, 0.5))
        if driver.poll() is None:
            victim(driver, folder)
        else:  # nothing was left to kill: on to a fresh run
            # Workers of a driver killed before may have outlived it, and this run, for a moment.
            make_run(MapOptions(out=str(folder)), resume=True)
            check_same(folder, expected)
            rounds += 1
    make_run(MapOptions(out=str(folder)), resume=True)
    check_same(folder, expected)
