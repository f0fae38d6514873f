"""The same tiles on a real dask.distributed cluster."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from canopy.errors import CanopyError, InputError
from canopy.region.plan import RegionSettings
from canopy.region.run import ClusterEngine, prepare_run, start
from canopy.region.task import How

distributed = pytest.importorskip("distributed", reason="dask.distributed is not installed")


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The address of a scheduler with one worker, which lives in this process (its own one would only
    import torch again)."""
    import torch

    before = torch.get_num_threads()
    with distributed.LocalCluster(
        n_workers=1, threads_per_worker=2, processes=False, dashboard_address=None, protocol="tcp"
    ) as made:
        yield made.scheduler_address
    torch.set_num_threads(before)


def test_a_cluster_makes_the_same_tiles(
    cluster: str, settings: Callable[..., RegionSettings], inline: type, tmp_path: Path
) -> None:
    here = settings(out=str(tmp_path / "here"))
    start(prepare_run(here), engine=inline)
    there = settings(scheduler=cluster)
    result = start(prepare_run(there))
    assert result.exit_code == 0 and result.counts["done"] > 2

    def hashes(folder: Path) -> dict[str, str]:
        return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in (folder / "tiles").glob("*.tif")}

    assert hashes(tmp_path / "here") == hashes(tmp_path / "run")


def test_a_worker_that_does_not_see_the_run_ends_it(cluster: str, tmp_path: Path) -> None:
    from canopy.region.tiles import TileTask

    engine = ClusterEngine(How(str(tmp_path / "nowhere"), "x"), cluster)
    engine.submit(TileTask(0, "t", 0, 0))
    with pytest.raises(InputError, match="Workers need the same folder"):
        for _ in range(100):
            engine.wait(1.0)
    engine.close(kill=True)


def test_no_scheduler_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("canopy.region.run.CONNECT_S", 1.0)
    with pytest.raises(CanopyError, match="no scheduler with a worker there"):
        ClusterEngine(How("/nowhere", "x"), "tcp://127.0.0.1:1")
