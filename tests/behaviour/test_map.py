"""`canopy map`: tiles of both grids, going on after a kill, shards, a dask scheduler; equal heights always.

Every start of a worker imports torch, so runs are few, and each shows several things.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import behaviour_support as support
import numpy as np
import pytest
import rasterio

TILING = ("--grid", "utm", "--zoom", 19, "--threads", 1)


@pytest.fixture(scope="module")
def words(inputs, model) -> tuple[object, ...]:
    """A region of six tiles or so."""
    return ("map", inputs / "wood.tif", "--model", model, "--backend", "torch", "--device", "cpu", "-q")


@pytest.fixture(scope="module")
def whole(words, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run in two shards, and what the gathering of them printed in told.json."""
    folder = tmp_path_factory.mktemp("whole")
    for shard in ("1/2", "2/2"):
        ran = support.run(folder, *words, *TILING, "-o", "run", "--shard", shard, "--json").json
        assert ran["this_start"]["done"] >= 1 and not ran["failures"]
    ran = support.run(folder, "map", "-o", "run", "--resume", "-q", "--json")
    (folder / "told.json").write_text(ran.out)
    return folder


def heights(run: Path) -> np.ndarray:
    """The mosaic of a run, opened as one raster."""
    return support.metres(run / "mosaic")


def same_as(whole: Path, run: Path) -> None:
    """Two runs hold the same tiles, once each, with the same heights."""
    tiles, expected = ({p.name for p in f.joinpath("tiles").rglob("*.tif")} for f in (run, whole / "run"))
    assert tiles == expected
    a, b = heights(run), heights(whole / "run")
    np.testing.assert_array_equal(np.isnan(a), np.isnan(b))
    np.testing.assert_allclose(a, b, atol=0.01)


def test_a_run_in_shards(canopy, whole, words, tmp_path) -> None:
    told, run = json.loads((whole / "told.json").read_text()), whole / "run"
    support.check_keys("map_utm", told)
    assert told["tiles"]["done"] > 3 and told["this_start"]["done"] == 0 and not told["failures"]
    support.check_heights("map_utm", heights(run))
    with rasterio.open(run / "mosaic") as mosaic:
        place = {"crs": mosaic.crs.to_string(), "transform": list(mosaic.transform)[:6]}
    support.check_values("map_utm", place)
    # A region's heights are those of one prediction.
    canopy("predict", *words[1:], "-o", "once.tif")
    np.testing.assert_allclose(heights(run), support.metres(tmp_path / "once.tif"), atol=0.01)
    assert (run / "catalog.json").is_file() and list((run / "tiles").rglob("*.json"))
    catalog = json.loads((run / "catalog.json").read_text())
    assert catalog["type"] in {"Catalog", "Collection"} and catalog["links"]


def test_status_and_going_on(canopy, whole, words) -> None:
    shown = support.run(whole, "map", "--status", "run")
    done = json.loads((whole / "told.json").read_text())["tiles"]["done"]
    assert f"{done} of {done} tiles finished" in shown.out
    status = support.run(whole, "map", "--status", "run", "--json").json
    support.check_keys("map_status", status)
    again = support.run(whole, "map", "-o", "run", "--resume", "--json").json
    assert again["this_start"]["done"] == 0 and again["tiles"]["done"] == done
    changed = support.run(whole, *words, *TILING, "--gsd", 1, "-o", "run", code=2)
    assert "gsd" in changed.error_line
    canopy("map", "--status", "nowhere", code=2)


def test_planning_writes_nothing(canopy, words, tmp_path) -> None:
    plan = canopy(*words, *TILING, "-o", "run", "--dry-run", "--price", 3.6, "--json").json
    support.check_keys("map_plan", plan)
    assert plan["tiles"] > 3 and not list(tmp_path.iterdir())


def test_quadkeys_and_going_on_after_a_kill(canopy, words, tmp_path) -> None:
    tiling = ("--grid", "quadkey", "--zoom", 18, "--threads", 1, "--encoding", "uint16cm")
    running = subprocess.Popen(
        support.program(*words, *tiling, "-o", "run"), cwd=tmp_path, env=support.environment(),
        start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    deadline = time.monotonic() + 120
    while not list((tmp_path / "run").glob("tiles/**/*.tif")) and running.poll() is None:
        assert time.monotonic() < deadline, "no tile within 120 s"
        time.sleep(0.005)
    os.killpg(running.pid, signal.SIGKILL)
    assert running.wait() == -signal.SIGKILL, "it was killed in its work"
    told = canopy("map", "-o", "run", "--resume", "-q", "--json").json
    assert told["tiles"]["done"] > 3 and not told["failures"]
    names = sorted(p.stem for p in (tmp_path / "run" / "tiles").rglob("*.tif"))
    support.check_values("map_quadkey", {"names": names, "tiles": told["tiles"]})
    found = heights(tmp_path / "run")
    support.check_heights("map_quadkey", found, tol_m=0.03, mask_share=0.003)  # warped; in centimetres
    canopy("predict", *words[1:], "--crs", "quadkey", "-o", "once.tif")
    once = support.metres(tmp_path / "once.tif")
    np.testing.assert_array_equal(np.isnan(found), np.isnan(once))
    np.testing.assert_allclose(found, once, atol=0.015)


@pytest.fixture(scope="module")
def scheduler(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a dask scheduler with a worker, both started as from a shell."""
    pytest.importorskip("distributed")
    folder, quiet = tmp_path_factory.mktemp("dask"), dict.fromkeys(("stdout", "stderr"), subprocess.DEVNULL)
    start = partial(subprocess.Popen, cwd=folder, env=support.environment(), start_new_session=True, **quiet)
    dask = [support.sys.executable, "-m", "distributed.cli.dask_scheduler"]
    file = folder / "scheduler.json"
    started = [start([*dask, "--port", "0", "--no-dashboard", "--scheduler-file", file])]
    worker = [support.sys.executable, "-m", "distributed.cli.dask_worker", "--scheduler-file", file]
    started += [start([*worker, "--nthreads", "1", "--no-nanny", "--no-dashboard"])]
    try:
        deadline = time.monotonic() + 60
        while not file.is_file():
            assert time.monotonic() < deadline and started[0].poll() is None
            time.sleep(0.05)
        yield json.loads(file.read_text())["address"]
    finally:
        for process in started:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def test_a_scheduler(canopy, whole, words, scheduler, inputs, tmp_path) -> None:
    """And what becomes of an image with a damaged block: the sound tiles are made, the exit code is 3."""
    told = canopy(*words, *TILING, "-o", "run", "--scheduler", scheduler, "--json").json
    assert not told["failures"]
    same_as(whole, tmp_path / "run")
    blocks = {"tiled": True, "blockxsize": 64, "blockysize": 64, "compress": "deflate"}
    with rasterio.open(inputs / "wood.tif") as image:
        support.write_image(tmp_path / "cut.tif", image.read(), nodata=0, **blocks)
    with rasterio.open(tmp_path / "cut.tif") as image:
        place = [image.get_tag_item(f"BLOCK_{of}_4_3", "TIFF", bidx=1) for of in ("OFFSET", "SIZE")]
    with (tmp_path / "cut.tif").open("r+b") as file:
        file.seek(int(place[0]))
        file.write(b"\xff" * int(place[1]))
    given = [tmp_path / "cut.tif" if word == inputs / "wood.tif" else word for word in words]
    bad = (*TILING, "--attempts", 1, "--scheduler", scheduler, "-o", "bad", "--json")
    told = canopy(*given, *bad, code=3).json
    assert told["tiles"]["failed"] >= 1 and told["tiles"]["done"] >= 1 and told["failures"]
    support.check_keys("map_failed", told)


@pytest.mark.parametrize(
    ("more", "message"),
    [(("--zoom", 30), "zoom"), (("--shard", "5/3"), "I/N"), (("--grid", "hexagon"), "grid")],
)
def test_bad_options_write_nothing(canopy, words, tmp_path, more: tuple[object, ...], message: str) -> None:
    ran = canopy(*words, *more, "-o", "run", code=2)
    assert message in ran.error_line and not (tmp_path / "run").exists()
