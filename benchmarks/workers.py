"""`canopy map` with one and with several workers: tiles per minute, and what a further worker adds.

    python benchmarks/workers.py                            # 1 and 2 workers of one thread, the default model
    python benchmarks/workers.py --size 8192 --workers 1 2 4 8

The region is one JPEG raster made on the fly, cut into tiles of 1,024 px. A run's time is counted from its
start, so the workers' own start (each loads the model) is in it; `worker s` is time spent on tiles.
"""

from __future__ import annotations

import json
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import common

TILE_PX = 1024


def map_region(image: Path, out: Path, workers: int, model: str) -> dict[str, Any]:
    """One run of `canopy map`.

    Raises:
        RuntimeError: not all tiles were finished.
    """
    command = [
        *common.canopy_command(), "map", str(image), "--model", model, "--grid", "utm",
        "--tile-px", str(TILE_PX), "--workers", str(workers), "--threads", "1", "--attempts", "1",
        "-o", str(out), "--json", "-q",
    ]  # fmt: skip
    clock = common.Clock()
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    took = clock.read()
    if done.returncode:
        raise RuntimeError(f"canopy map ended with {done.returncode}: {done.stdout[-1000:]}")
    said = json.loads(done.stdout)
    return took | {
        "tiles": said["tiles"]["done"] + said["tiles"]["empty"],
        "km2": said["km2"],
        "tiles_s": said["this_start"]["seconds"],
        "worker_s": said["worker_seconds"],
    }


def main(argv: list[str] | None = None) -> None:
    parser = common.parser(__doc__)
    parser.add_argument("--size", type=int, default=2048, help="side of the raster, pixels")
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--model", default="default")
    parser.add_argument("--dir", help="where image and runs go; default: a temporary folder")
    options = parser.parse_args(argv)
    rows, results = [], {}
    with tempfile.TemporaryDirectory(dir=options.dir) as folder:
        image = common.make_image(Path(folder) / "region.tif", options.size)
        for workers in options.workers:
            found = map_region(image, Path(folder) / f"run{workers}", workers, options.model)
            results[workers] = found
            first = results[options.workers[0]]
            rows.append({
                "workers": workers,
                "tiles": found["tiles"],
                "wall s": found["wall_s"],
                "cpu s": found["cpu_s"],
                "worker s": found["worker_s"],
                "tiles/min": 60 * found["tiles"] / found["tiles_s"],
                "km2/h": 3600 * found["km2"] / found["tiles_s"],
                "x first": first["tiles_s"] / found["tiles_s"],
            })  # fmt: skip
    common.show(
        f"canopy map, {options.size} x {options.size} px, model {options.model}, one thread each", rows
    )
    settings = {"size": options.size, "model": options.model, "tile_px": TILE_PX}
    common.save(options.out, "workers", settings, results)


if __name__ == "__main__":
    main()
