"""Real processes: the same heights from every kind of worker, and nothing lost, twice or other when they die.

CANOPY_KILLS=20 kills twenty times instead of twice.
"""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import numpy as np
import psutil
import pytest
import rasterio

from canopy.region.ledger import Ledger
from canopy.region.options import MapOptions
from canopy.region.run import prepare_run, start

KILLS = int(os.environ.get("CANOPY_KILLS", "2"))
CANOPY = [sys.executable, "-c", "from canopy.cli.main import main; main()"]
Make = Callable[..., MapOptions]


@pytest.fixture
def words(image: Path, small_model: Path) -> list[str]:
    """`canopy map` over thirty tiles."""
    return [
        *CANOPY, "map", str(image), "--model", str(small_model), "--device", "cpu", "--backend", "torch",
        "--grid", "utm", "--zoom", "21", "--attempts", "30",
    ]  # fmt: skip


def map_region(words: list[str], folder: Path, *more: object, code: int = 0) -> None:
    ran = subprocess.run([*words, "-o", folder, *map(str, more)], capture_output=True, text=True, check=False)
    assert ran.returncode == code, ran.stderr


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


@pytest.fixture
def expected(options: Make, make_run: Callable, tmp_path: Path) -> np.ndarray:
    """What the region's tiles hold, made in this process."""
    make_run(options(out=str(tmp_path / "expected"), zoom=21))
    return heights(tmp_path / "expected")


@contextmanager
def process(*words: object) -> Iterator[subprocess.Popen[bytes]]:
    with subprocess.Popen([str(word) for word in words], stderr=subprocess.DEVNULL) as started:
        try:
            yield started
        finally:
            started.kill()


@contextmanager
def shell_cluster(folder: Path, workers: int) -> Iterator[tuple[str, list[subprocess.Popen[bytes]]]]:
    """`dask scheduler` and some `dask worker`s, as a user starts them; the scheduler's address."""
    facts = folder / "scheduler.json"
    dask = [sys.executable, "-m", "dask"]
    options = ["--scheduler-file", facts, "--no-dashboard"]
    with ExitStack() as stack:
        enter = stack.enter_context
        enter(process(*dask, "scheduler", "--port", 0, "--host", "127.0.0.1", *options))
        mine = ["--nthreads", 1, "--local-directory", folder, *options]
        started = [enter(process(*dask, "worker", *mine)) for _ in range(workers)]
        deadline = time.monotonic() + 60
        while not (facts.is_file() and facts.stat().st_size) and time.monotonic() < deadline:
            time.sleep(0.1)
        yield json.loads(facts.read_text())["address"], started


def test_local_processes_a_cluster_from_the_shell_and_shards_give_equal_heights(
    words: list[str], expected: np.ndarray, tmp_path: Path
) -> None:
    map_region(words, tmp_path / "local", "--workers", 2)
    check_same(tmp_path / "local", expected)
    with shell_cluster(tmp_path, 2) as (address, _):
        map_region(words, tmp_path / "cluster", "--scheduler", address)
        check_same(tmp_path / "cluster", expected)
        for number in (1, 2):  # a shard is a filter, whoever makes its tiles
            map_region(words, tmp_path / "shards", "--scheduler", address, "--shard", f"{number}/2")
        check_same(tmp_path / "shards", expected)


def started_tiles(folder: Path) -> int:
    return len(list((folder / "tiles").glob("*.tif"))) if (folder / "tiles").is_dir() else 0


def workers_of(driver: subprocess.Popen[bytes]) -> list[psutil.Process]:
    """The processes in which a driver's tiles are made."""
    return [
        child for child in psutil.Process(driver.pid).children(recursive=True)
        if "spawn_main" in " ".join(child.cmdline())
    ]  # fmt: skip


def test_kills_at_random_moments_lose_and_double_nothing(
    words: list[str], expected: np.ndarray, tmp_path: Path
) -> None:
    die, folder, kills = random.Random(os.environ.get("CANOPY_KILLS_SEED", "7")), tmp_path / "run", 0
    rounds = 0
    while kills < KILLS:
        rounds += 1
        folder = tmp_path / f"run-{rounds}"
        ended = False
        while not ended and kills < KILLS:
            before = started_tiles(folder)
            driver = subprocess.Popen([*words, "-o", folder, "--workers", "2", "-q"])
            victim = die.choice(["driver", "worker"])
            while driver.poll() is None and started_tiles(folder) <= before:  # let there be progress
                time.sleep(0.05)
            time.sleep(die.uniform(0.0, 1.0))
            if driver.poll() is None:
                with_tiles = workers_of(driver)
                if victim == "worker" and with_tiles:
                    die.choice(with_tiles).send_signal(signal.SIGKILL)
                    driver.wait()
                else:
                    driver.kill()
                    driver.wait()
                    _, alive = psutil.wait_procs(with_tiles, timeout=30)
                    assert not alive, "workers outlive their driver"
                kills += 1
                print(f"kill {kills}: {victim} with {started_tiles(folder)} tiles there")
            ended = driver.returncode == 0
        map_region(words, folder)
        check_same(folder, expected)


def test_a_poison_tile_is_quarantined_and_the_run_goes_on(
    options: Make, words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    region = prepare_run(options(attempts=2, workers=2))
    poison = list(region.tiling.tiles(region.aoi))[1].id
    # Read by the workers as they start: the tile kills whoever makes it, as a bad driver does.
    (tmp_path / "sitecustomize.py").write_text(
        "import os\n"
        "from canopy.region import task\n"
        "make = task.TileMaker.make\n"
        f"poison = {poison!r}\n"
        "task.TileMaker.make = lambda self, tile: os._exit(9) if tile.id == poison else make(self, tile)\n"
    )
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")
    result = start(region)
    assert result.exit_code == 3 and result.tally.retried == 1
    assert result.failures == [(poison, "its worker died while it had the tile (after 2 tries)")]
    assert result.counts["done"] == sum(result.counts.values()) - 1


def test_ctrl_c_lets_the_tiles_in_work_end_and_says_so(words: list[str], tmp_path: Path) -> None:
    folder = tmp_path / "run"
    driver = subprocess.Popen(
        [*words, "-o", folder, "--workers", "2"], stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    while started_tiles(folder) < 2 and driver.poll() is None:
        time.sleep(0.05)
    os.killpg(driver.pid, signal.SIGINT)  # as a terminal does: to the driver and to its workers
    _, told = driver.communicate(timeout=60)
    assert driver.returncode == 130
    assert "stopping after the tiles in work" in told and "Run the same command again" in told
    assert "Traceback" not in told
    with Ledger(folder / "ledger.sqlite") as ledger:
        counts = ledger.counts()
    assert counts["running"] == 0 and counts["done"] == started_tiles(folder) < sum(counts.values())
    assert not [path for path in (folder / "tiles").iterdir() if path.name.startswith(".")]
