"""A region small enough for tests: 200 x 240 px of texture, a quick model, an engine in this process."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import rasterio
from affine import Affine

from canopy.geo.area import AOI
from canopy.geo.grid import Grid
from canopy.region.ledger import Ledger
from canopy.region.plan import RegionSettings
from canopy.region.rehearse import InlineEngine
from canopy.region.task import TILES
from canopy.region.tiles import Tiling

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
def settings(image: Path, small_model: Path, tmp_path: Path) -> Callable[..., RegionSettings]:
    """`settings(grid="utm", ...)`: a region of six UTM tiles of 128 px, in `tmp_path/run`."""

    def make(**more: object) -> RegionSettings:
        given = {
            "out": str(tmp_path / "run"), "images": (str(image),), "model": str(small_model), "grid": "utm",
            "zoom": 19, "tile_px": 128, "device": "cpu", "threads": 1, "attempts": 2,
        }  # fmt: skip
        return RegionSettings(**(given | more))

    return make


@pytest.fixture(scope="session")
def inline() -> type[InlineEngine]:
    """An engine in this process."""
    return InlineEngine


@pytest.fixture
def tiles() -> Tiling:
    """A tiling of 7 x 5 tiles, clipped on all sides."""
    area = Grid.of(UTM, (0.5, 0, 500_010, 0, -0.5, 4_881_990), (400, 600))
    return Tiling("utm", area, 96)


@pytest.fixture
def ledger(tmp_path: Path, tiles: Tiling) -> Ledger:
    """A fresh ledger of those tiles, in a run's folder."""
    (tmp_path / "run" / TILES).mkdir(parents=True)
    made = Ledger(tmp_path / "run" / "ledger.sqlite")
    made.add(tiles.tiles(AOI.from_grid(tiles.area)))
    return made
