"""A region from a failing server: passing faults cost time, lasting ones their tiles, never a pixel."""

from __future__ import annotations

import importlib.util
import random
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import rasterio

from canopy.download import RetryPolicy, use_policy
from canopy.region.options import MapOptions
from canopy.region.run import prepare_run, start

Make = Callable[..., MapOptions]


@pytest.fixture(scope="module")
def servers() -> ModuleType:
    spec = importlib.util.spec_from_file_location("servers", Path(__file__).parents[1] / "servers.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    import sys

    sys.modules["servers"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def server(servers: ModuleType) -> Iterator[object]:
    running = servers.start()
    with use_policy(RetryPolicy(attempts=8, first_wait_s=0.01, longest_wait_s=0.2, timeout_s=5.0)):
        yield running
    running.shutdown()
    running.server_close()


def pixels(folder: Path) -> np.ndarray:
    with rasterio.open(folder / "mosaic") as mosaic:
        return mosaic.read()


def test_passing_faults_are_outlasted(
    options: Make, make_run: Callable, server, servers: ModuleType, image: Path, tmp_path: Path,
) -> None:  # fmt: skip
    make_run(options(out=str(tmp_path / "file")))
    url = server.put("/texture.tif", image.read_bytes(), "image/tiff")
    die, faults = random.Random(4), []
    kinds = [{"status": 429}, {"status": 503}, {"cut_after": 300}, {"delay_s": 0.05}]

    def sometimes(path: str, first: int) -> object:
        if die.random() >= 0.2:
            return None
        faults.append(path)
        return servers.Fault(re.compile("."), 1, **die.choice(kinds))

    server.take_fault = sometimes
    result = make_run(options(images=(url,)))
    assert result.exit_code == 0 and result.counts["failed"] == 0 and faults
    assert pixels(tmp_path / "run").tobytes() == pixels(tmp_path / "file").tobytes()


def test_lasting_faults_fail_their_tiles_with_the_reason(
    options: Make, make_run: Callable, server, servers: ModuleType, image: Path, tmp_path: Path,
) -> None:  # fmt: skip
    make_run(options(out=str(tmp_path / "file")))
    content = image.read_bytes()
    url = server.put("/texture.tif", content, "image/tiff")
    with use_policy(RetryPolicy(attempts=2, first_wait_s=0.01, longest_wait_s=0.05, timeout_s=5.0)):
        region = prepare_run(options(images=(url,), readers=1))
        bad = range(len(content) // 2, len(content) * 4 // 5)  # pixels; the directory lies at the end
        server.take_fault = lambda path, first: (
            servers.Fault(re.compile("."), 1, 500) if first in bad else None
        )
        result = start(region)
    assert result.exit_code == 3 and 0 < result.counts["failed"] < sum(result.counts.values())
    assert all("127.0.0.1" in reason and "(after 2 tries)" in reason for _, reason in result.failures)
    found, expected = pixels(tmp_path / "run"), pixels(tmp_path / "file")
    made = np.isfinite(found)
    assert made.any() and np.array_equal(found[made], expected[made])
