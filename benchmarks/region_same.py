"""The same bytes, however a region is made: 1, 2, 4 workers, dask clusters, shards, and one `canopy predict`.

    python benchmarks/region_same.py                       # 25 tiles with a small model, both grids
    python benchmarks/region_same.py --model default --grids utm

Every way is the real command in processes of its own. Two clusters: `LocalCluster` with processes, and
`dask scheduler` with `dask worker` started as from a shell, of which one worker process is killed with
SIGKILL while it has a tile; its nanny starts another.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from region_small import canopy, left_behind, map_command, report, small_image, small_model, tile_hashes

SIDE = 5
GRIDS: dict[str, list[object]] = {"utm": [], "quadkey": ["--grid", "quadkey", "--zoom", 19]}


def alone(words: list[str], *more: object) -> None:
    subprocess.run([*words, *(str(word) for word in more)], check=True, stderr=subprocess.DEVNULL)


def shards(words: list[str], count: int) -> None:
    """Three at once, as a job array has them."""
    runs = [subprocess.Popen([*words, "--shard", f"{i}/{count}"]) for i in range(1, count + 1)]
    if any(run.wait() for run in runs):
        raise SystemExit("a shard failed")


@contextlib.contextmanager
def local_cluster() -> Iterator[tuple[str, None]]:
    from distributed import LocalCluster

    with LocalCluster(
        n_workers=2, threads_per_worker=1, processes=True, dashboard_address=None, protocol="tcp"
    ) as cluster:
        yield cluster.scheduler_address, None


@contextlib.contextmanager
def shell_cluster(folder: Path) -> Iterator[tuple[str, int]]:
    """`dask scheduler` and `dask worker`; also gives the process id of the latter's nannies."""
    file = folder / "scheduler.json"
    dask = [sys.executable, "-m", "dask"]
    quiet: dict[str, Any] = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL, "cwd": folder}
    scheduler = subprocess.Popen(
        [*dask, "scheduler", "--host", "127.0.0.1", "--port", "0", "--scheduler-file", str(file),
         "--no-dashboard"], **quiet,
    )  # fmt: skip
    worker = None
    try:
        worker = subprocess.Popen(
            [*dask, "worker", "--scheduler-file", str(file), "--nworkers", "2", "--nthreads", "1",
             "--no-dashboard"], **quiet,
        )  # fmt: skip
        while not file.exists():
            time.sleep(0.2)
        import json

        yield json.loads(file.read_text())["address"], worker.pid
    finally:
        for process in (worker, scheduler):
            if process is not None:
                process.terminate()
                process.wait()


def kill_one(nannies: int, run: subprocess.Popen[bytes], tiles: Path) -> bool:
    """Kill a dask worker process (not its nanny) once a few tiles are there."""
    import psutil

    while run.poll() is None and len(list(tiles.glob("*.tif"))) < 3:
        time.sleep(0.02)
    for process in psutil.Process(nannies).children(recursive=True):
        if "spawn_main" in " ".join(process.cmdline()) and run.poll() is None:
            os.kill(process.pid, signal.SIGKILL)
            return True
    return False


def on_cluster(words: list[str], folder: Path, make: Callable[[], Any]) -> bool:
    with make() as (address, nannies):
        run = subprocess.Popen([*words, "--scheduler", address], stderr=subprocess.DEVNULL)
        killed = kill_one(nannies, run, folder / "tiles") if nannies else False
        if run.wait():
            raise SystemExit("the run on a cluster failed")
        return killed


def same_pixels(mosaic: Path, once: Path) -> bool:
    import rasterio

    with rasterio.open(mosaic) as a, rasterio.open(once) as b:
        return a.transform == b.transform and a.crs == b.crs and a.read().tobytes() == b.read().tobytes()


def one_grid(top: Path, grid: str, image: Path, model: object) -> dict[str, Any]:
    """Make the region in every way; says of each whether it is the first one's bytes."""
    results: dict[str, Any] = {}

    def words(name: str) -> list[str]:
        return map_command(top / name, image, model, *GRIDS[grid])

    def check(name: str, **more: object) -> None:
        found = left_behind(top / name)
        same = found["files"] == tile_hashes(top / "workers-1") and not (found["twice"] or found["strays"])
        same &= (top / name / "mosaic").read_bytes() == (top / "workers-1" / "mosaic").read_bytes()
        results[name] = {"same": same, "tiles": len(found["files"]), **more}
        print(grid, name, results[name], flush=True)

    for count in (1, 2, 4):
        alone(words(f"workers-{count}"), "--workers", count)
        check(f"workers-{count}")
    shards(words("shards-3"), 3)
    check("shards-3")
    on_cluster(words("dask-local-cluster"), top / "dask-local-cluster", local_cluster)
    check("dask-local-cluster")
    killed = on_cluster(words("dask-shell"), top / "dask-shell", lambda: shell_cluster(top))
    check("dask-shell", worker_killed=killed)
    once = top / "once.tif"
    crs = ["--crs", "quadkey"] if grid == "quadkey" else []
    alone(canopy("predict", image, "--model", model, "--device", "cpu", "-q", "-o", once, *crs))
    results["predict"] = {"same": same_pixels(top / "workers-1" / "mosaic", once)}
    print(grid, "predict", results["predict"], flush=True)
    return results


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", help="a model instead of the small one")
    parser.add_argument("--grids", nargs="+", choices=GRIDS, default=list(GRIDS))
    parser.add_argument("--out", type=Path, help="folder for region_same.json")
    options = parser.parse_args()
    # Bytes agree at equal threads; `canopy predict` takes torch's number, which this settles.
    os.environ["OMP_NUM_THREADS"] = "1"
    results = {}
    with tempfile.TemporaryDirectory() as name:
        top = Path(name)
        image = small_image(top / "image.tif", SIDE)
        model = options.model or small_model(top / "small.safetensors")
        for grid in options.grids:
            (top / grid).mkdir()
            results[grid] = one_grid(top / grid, grid, image, model)
            shutil.rmtree(top / grid)
    report(results, options.out, "region_same")
    sys.exit(not all(way["same"] for grid in results.values() for way in grid.values()))


if __name__ == "__main__":
    main()
