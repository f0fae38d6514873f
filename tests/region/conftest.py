"""A region small enough for tests: 200 x 240 px of texture, a quick model, workers in this process."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import rasterio
from affine import Affine

from canopy.files import file_sha256
from canopy.region import run as engine
from canopy.region.options import MapOptions
from canopy.region.run import RunResult, prepare_run, start

UTM = "EPSG:32618"
TRANSFORM = Affine(0.5, 0, 500_000, 0, -0.5, 4_882_000)


@pytest.fixture(scope="session")
def image(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A texture of 200 x 240 px with a hole without imagery, taken on 2021-06-15."""
    from scipy import ndimage

    rng = np.random.default_rng(5)
    noise = ndimage.gaussian_filter(rng.normal(size=(3, 200, 240)), (0, 3, 3))
    pixels = np.clip(noise / noise.std() * 35 + 100, 20, 230).astype(np.uint8)
    pixels[:, 60:75, 100:130] = 0
    path = tmp_path_factory.mktemp("imagery") / "texture.tif"
    with rasterio.open(
        path, "w", driver="GTiff", width=240, height=200, count=3, dtype="uint8", crs=UTM,
        transform=TRANSFORM, nodata=0, tiled=True, blockxsize=64, blockysize=64,
    ) as dataset:  # fmt: skip
        dataset.write(pixels)
        dataset.update_tags(TIFFTAG_DATETIME="2021:06:15 10:00:00")
    return path


@pytest.fixture
def options(image: Path, small_model: Path, tmp_path: Path) -> Callable[..., MapOptions]:
    """`options(grid="utm", ...)`: a region of six UTM tiles of 128 px, in `tmp_path/run`."""

    def make(**more: object) -> MapOptions:
        given = {
            "out": str(tmp_path / "run"), "images": (str(image),), "model": str(small_model), "grid": "utm",
            "zoom": 19, "tile_px": 128, "device": "cpu", "threads": 1, "attempts": 2, "backend": "torch",
        }  # fmt: skip
        return MapOptions(**(given | more))

    return make


@pytest.fixture(scope="session")
def near_cluster() -> Iterator[object]:
    """A dask cluster in this process: the same scheduler and workers, without the seconds of a spawn."""
    import torch
    from distributed import Client, LocalCluster

    before = torch.get_num_threads()
    with (
        LocalCluster(
            n_workers=1, threads_per_worker=1, processes=False, dashboard_address="127.0.0.1:0"
        ) as cluster,
        Client(cluster, set_as_default=False) as client,
    ):
        yield client
    torch.set_num_threads(before)


@pytest.fixture
def make_run(near_cluster: object, monkeypatch: pytest.MonkeyPatch) -> Callable[..., RunResult]:
    """`make_run(options, resume=..., ...)`: `prepare_run` and `start`, with the workers of `near_cluster`."""

    @contextmanager
    def near(workers: int) -> Iterator[object]:
        yield near_cluster

    monkeypatch.setattr(engine, "local_cluster", near)

    def make(options: MapOptions, **more: object) -> RunResult:
        known = {key: more.pop(key) for key in ("resume", "overwrite") if key in more}
        region = prepare_run(options, **known)  # type: ignore[arg-type]
        return start(region, overwrite=bool(known.get("overwrite")), **more)  # type: ignore[arg-type]

    return make


@pytest.fixture
def hashes() -> Callable[[Path], dict[str, str]]:
    """`hashes(folder)`: what the tiles of a run hold."""
    return lambda folder: {path.name: file_sha256(path) for path in folder.glob("tiles/*.tif")}
