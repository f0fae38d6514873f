"""What scheduling costs: a million tiles through the real tiling, ledger and driver, without a model.

    python benchmarks/region_scale.py    # 1,000,000 tiles, and 10,000 finished ones resumed
    python benchmarks/region_scale.py --tiles 50000 --finished 1000

Reports the driver's peak memory, milliseconds per tile, the time to open the ledger again, and how long
`start` takes on a finished run whose tiles lie on the disk (no engine may be made there: no forward pass).
"""

from __future__ import annotations

import argparse
import hashlib
import json
import logging
import math
import resource
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

TILE_PX = 2048
TILE_M = 40.0  # a UTM tile of zoom 20
LIMIT_MS, LIMIT_RESUME_S = 5.0, 30.0


def peak_mb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def million(tiles: int, folder: Path) -> dict[str, float]:
    """Enter, drive and reopen `tiles` tiles."""
    from canopy.geo.area import AOI
    from canopy.geo.grid import Grid
    from canopy.inference.target import pixel_at
    from canopy.region.ledger import Ledger
    from canopy.region.rehearse import PretendingEngine
    from canopy.region.run import drive
    from canopy.region.tiles import Tiling

    side = math.ceil(math.sqrt(tiles))
    pixel = pixel_at(26)
    area = Grid.of(
        "EPSG:3857", (pixel, 0, 0.0, 0, -pixel, 6_000_000 // pixel * pixel), (side * TILE_PX, side * TILE_PX)
    )
    tiling = Tiling("quadkey", area, TILE_PX)
    before = peak_mb()
    started = time.perf_counter()
    with Ledger(folder / "ledger.sqlite") as ledger:
        entered = ledger.add(tiling.tiles(AOI.from_grid(area)))
        enter_s = time.perf_counter() - started
        entered_mb = peak_mb()
        engine = PretendingEngine(slots=256, fail_every=1000)
        started = time.perf_counter()
        tally = drive(ledger, engine, attempts=2, retry_wait_s=0.01)
        drive_s = time.perf_counter() - started
    started = time.perf_counter()
    with Ledger(folder / "ledger.sqlite") as ledger:
        ledger.reopen()
        counts = ledger.counts()
        left = sum(1 for _ in ledger.pending())
        reopen_s = time.perf_counter() - started
    assert tally.finished == entered == counts["done"] + counts["failed"] and left == 0
    return {
        "tiles": entered,
        "enter_s": round(enter_s, 2),
        "ms_per_tile": round(1000 * drive_s / entered, 4),
        "tiles_per_s": round(entered / drive_s),
        "reopen_s": round(reopen_s, 2),
        "most_in_flight": engine.most_held,
        "failed": counts["failed"],
        "memory_before_mb": round(before),
        "memory_entered_mb": round(entered_mb),
        "memory_peak_mb": round(peak_mb()),
        "ledger_mb": round((folder / "ledger.sqlite").stat().st_size / 1e6),
    }


class TemplateEngine:
    """Finishes every tile at once with a valid GeoTIFF of its size: a run that looks finished."""

    slots = 64

    def __init__(self, folder: Path, tiling: Any) -> None:
        self.folder, self.tiling = folder, tiling
        self.tasks: list[Any] = []
        self.made: dict[tuple[int, int], bytes] = {}

    def submit(self, task: Any) -> None:
        self.tasks.append(task)

    def wait(self, timeout_s: float) -> list[Any]:
        from canopy.region.task import Outcome, tile_path

        outcomes = []
        for task in self.tasks:
            content = self._template(self.tiling.offset(task.row, task.col)[2:])
            tile_path(self.folder, task.id).write_bytes(content)
            facts = {"pixels": 1, "valid": 1, "mean_m": 1.0, "max_m": 1.0, "cover_2m": 0.0,
                     "dates": ["2023-07-01"], "scenes": ["scene"]}  # fmt: skip
            digest = hashlib.sha256(content).hexdigest()
            outcomes.append(Outcome(task, "done", "here", 1.0, sha256=digest, size=len(content), facts=facts))
        self.tasks.clear()
        return outcomes

    def _template(self, shape: tuple[int, int]) -> bytes:
        import numpy as np

        from canopy.geo.grid import Grid
        from canopy.geo.raster import BandSpec, CogWriter

        if shape not in self.made:
            path = self.folder / "template.tif"
            grid = Grid.of("EPSG:32618", (0.5, 0, 500_000, 0, -0.5, 4_000_000), shape)
            with CogWriter(path, grid, [BandSpec("canopy_height")], overwrite=True) as writer:
                writer.write(np.full((1, *shape), 7, np.float32), np.ones(shape, bool))
            self.made[shape] = path.read_bytes()
            path.unlink()
        return self.made[shape]

    def close(self, kill: bool = False) -> None:
        pass


def finished(tiles: int, folder: Path) -> dict[str, float]:
    """Make a run of `tiles` finished tiles, catalog and mosaic included, and start it again."""
    import numpy as np
    import rasterio

    from canopy.region.plan import RegionSettings
    from canopy.region.run import prepare_run, start

    side = round(math.ceil(math.sqrt(tiles)) * TILE_M / 0.6)  # pixels of the image
    image = folder / "image.tif"
    profile = {
        "driver": "GTiff", "width": side, "height": side, "count": 3, "dtype": "uint8", "crs": "EPSG:32618",
        "transform": rasterio.Affine(0.6, 0, 480_000, 0, -0.6, 4_800_000), "tiled": True,
        "compress": "deflate", "sparse_ok": True,
    }  # fmt: skip
    with rasterio.open(image, "w", **profile) as dataset:
        dataset.write(np.full((3, 64, 64), 90, np.uint8), window=((0, 64), (0, 64)))
    settings = RegionSettings(
        out=str(folder / "run"), images=(str(image),), grid="utm", zoom=20, tile_px=128, device="cpu"
    )
    prepared = prepare_run(settings)
    started = time.perf_counter()
    result = start(prepared, engine=lambda how: TemplateEngine(folder / "run", prepared.tiling))
    first_s = time.perf_counter() - started
    started = time.perf_counter()
    prepared = prepare_run(settings)
    again = start(prepared, engine=_no_engine)
    return {
        "finished_tiles": result.counts["done"],
        "first_s": round(first_s, 1),
        "resume_s": round(time.perf_counter() - started, 2),
        "same": again.counts == result.counts,
    }


def _no_engine(how: object) -> SimpleNamespace:
    raise AssertionError("a finished run must not start workers")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tiles", type=int, default=1_000_000, help="tiles of the simulated run")
    parser.add_argument(
        "--finished", type=int, default=10_000, help="tiles of the finished run; 0: leave out"
    )
    parser.add_argument("--out", type=Path, help="folder for region_scale.json")
    options = parser.parse_args()
    logging.getLogger("canopy").setLevel(logging.ERROR)  # a thousand rehearsed failures need no line each
    results: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as folder:
        results |= million(options.tiles, Path(folder))
    if options.finished:
        with tempfile.TemporaryDirectory() as folder:
            results |= finished(options.finished, Path(folder))
    for key, value in results.items():
        print(f"{key:20} {value:>12,}" if not isinstance(value, bool) else f"{key:20} {value}")
    if options.out:
        options.out.mkdir(parents=True, exist_ok=True)
        (options.out / "region_scale.json").write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    sys.exit(results["ms_per_tile"] > LIMIT_MS or results.get("resume_s", 0) > LIMIT_RESUME_S)


if __name__ == "__main__":
    main()
