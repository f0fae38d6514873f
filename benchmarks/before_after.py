"""Two checkouts of canopy at the same commands, in turn: ratios new / old of time, processor time and memory.

    python benchmarks/before_after.py OLD NEW --out before_after.json          # about 15 minutes
    python benchmarks/before_after.py OLD NEW --large --rounds 3 --model default
    python benchmarks/before_after.py OLD NEW --only evaluate,stats

Each command is a process with one thread and OLD or NEW in front of its path, run with `CHECKOUT/.venv` where
it has one, else with this Python. Processor time and peak memory are those of it and of its children; a small
process between asks for them, because a child's peak begins with its parent's. With several rounds ratios are
of medians. Neither checkout is written to.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import rasterio

PROGRAM = "import sys; sys.argv[0] = 'canopy'; from canopy.cli.main import main; main()"
WATCH = """
import json, resource, subprocess, sys
with open("log", "a") as log:
    status = subprocess.call(sys.argv[1:], stdout=log, stderr=log)
used = resource.getrusage(resource.RUSAGE_CHILDREN)
print(json.dumps([status, used.ru_utime + used.ru_stime, used.ru_maxrss / 1024]))
"""
SMALL = Path(__file__).resolve().parents[1] / "tests" / "behaviour" / "goldens" / "small.safetensors"
UTM, WEST, NORTH = "EPSG:32618", 500_000.0, 4_900_000.0
Row = dict[str, float]


def write(path: Path, tile: np.ndarray, side_px: int, gsd: float, **profile: object) -> Path:
    """A square raster of copies of `tile` (bands, h, w), turned."""
    step = tile.shape[1]
    with rasterio.open(
        path, "w", driver="GTiff", width=side_px, height=side_px, count=len(tile), dtype=tile.dtype, crs=UTM,
        transform=rasterio.Affine(gsd, 0, WEST, 0, -gsd, NORTH), tiled=True, compress="deflate", **profile,
    ) as file:  # fmt: skip
        for row in range(0, side_px, step):
            for col in range(0, side_px, step):
                size = min(step, side_px - row), min(step, side_px - col)
                turned = np.rot90(tile, (row + col) // step, (1, 2))[:, : size[0], : size[1]]
                file.write(turned, window=rasterio.windows.Window(col, row, size[1], size[0]))
    return path


def make_inputs(folder: Path, large: bool) -> None:
    """Images, two height maps of 10,000 px and 400 polygons on them."""
    import geopandas
    from scipy import ndimage
    from shapely.geometry import box

    rng = np.random.default_rng(0)
    noise = ndimage.gaussian_filter(rng.normal(size=(4, 500, 500)), (0, 3, 3), mode="wrap")
    noise /= noise.std()
    rgb = np.clip(noise[:3] * 35 + np.array([90, 110, 70])[:, None, None], 20, 230).astype(np.uint8)
    for side in (1000, 2000, 4000, *((10_000,) if large else ())):
        write(folder / f"image{side}.tif", rgb, side, 0.5, photometric="RGB")
    height = np.round(np.maximum(12 + 8 * noise[3:], 0), 2).astype(np.float32)
    other = np.round(np.maximum(height + noise[:1], 0), 2).astype(np.float32)
    write(folder / "map.tif", height, 10_000, 1.0, nodata=-1)
    write(folder / "lidar.tif", other, 10_000, 1.0, nodata=-1)
    corners = [(WEST + 500 * c, NORTH - 500 * r) for r in range(20) for c in range(20)]
    zones = [box(x + 13.3, y - 481.2, x + 470.8, y - 20.1) for x, y in corners]
    geopandas.GeoDataFrame({"zone": range(400)}, geometry=zones, crs=UTM).to_file(folder / "zones.gpkg")


def cases(model: str, large: bool) -> Iterator[tuple[str, list[str]]]:
    """Names and words of the commands; `{checkout}` is filled in, outputs go to the working folder."""
    network = ["--model", model, "--device", "cpu", "-q"]
    for side in (1000, 4000, *((10_000,) if large else ())):
        yield f"predict {side} px", ["predict", f"../image{side}.tif", *network, "-o", "chm.tif"]
    warped = ["predict", "../image2000.tif", *network, "--crs", "EPSG:32617"]
    yield "predict 2000 px warped", [*warped, "-o", "chm.tif"]
    yield "predict 2000 px warped, 2 m", [*warped, "--gsd", "2", "-o", "chm.tif"]
    yield "data chm", ["data", "chm", "../scene/points.laz", "--workers", "1", "-q", "-o", "chm.tif"]
    yield "evaluate 10000 px", ["evaluate", "../map.tif", "--reference", "../lidar.tif", "-q", "-o", "out"]
    yield "stats 10000 px", ["stats", "../map.tif", "--zones", "../zones.gpkg", "-q", "-o", "stats.csv"]
    tiles = ["--grid", "utm", "--zoom", "17", "--threads", "1"]
    yield "map 1000 px", ["map", "../image1000.tif", *network, *tiles, "-o", "run"]
    smoke = "{checkout}/configs/finetune/smoke.yaml"
    yield "train smoke", ["train", smoke, "data.chips=../chips", "-q", "-o", "run"]


# ---- measurements -----------------------------------------------------------------------------
def measure(checkout: Path, words: list[str], folder: Path) -> Row:
    """Seconds, processor seconds and peak memory in MB of one command, run in an empty folder."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    own = checkout / ".venv" / "bin" / "python"
    python = str(own if own.exists() else sys.executable)
    environment = os.environ | {f"{name}_NUM_THREADS": "1" for name in ("OMP", "OPENBLAS", "MKL")}
    environment |= {"PYTHONPATH": str(checkout), "CANOPY_CACHE": f"{folder.parent}/cache{hash(checkout)}"}
    argv = [python, "-c", PROGRAM, *(word.format(checkout=checkout) for word in words)]
    began = time.perf_counter()
    watched = subprocess.run(
        [python, "-c", WATCH, *argv], cwd=folder, env=environment, capture_output=True, text=True
    )
    wall = time.perf_counter() - began
    status, cpu_s, rss_mb = json.loads(watched.stdout)
    if status:
        said = (folder / "log").read_text()[-2000:]
        raise SystemExit(f"{checkout}: canopy {' '.join(words)} failed:\n{said}")
    return {"wall_s": wall, "cpu_s": cpu_s, "rss_mb": rss_mb}


def main() -> None:
    parser = argparse.ArgumentParser(description="Two checkouts of canopy at the same commands, in turn.")
    parser.add_argument("old", type=Path)
    parser.add_argument("new", type=Path)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--model", default=str(SMALL), help="default: the small network of tests/behaviour")
    parser.add_argument("--large", action="store_true", help="also predict 10,000 px")
    parser.add_argument("--only", default="", help="commands by the beginnings of their names, with commas")
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    checkouts = {"old": given.old.resolve(), "new": given.new.resolve()}
    results, quantities = {}, ("wall_s", "cpu_s", "rss_mb")
    print(f"{'command':30}" + "".join(f"{q:>24} ratio" for q in quantities))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_inputs(folder, given.large)
        # Not measured: chips and points, and what a first run puts into the cache (converted networks).
        measure(checkouts["old"], ["data", "chips", "--synth", "16", "-o", "../chips"], folder / "work")
        measure(checkouts["old"], ["data", "synth", "--size-m", "400", "-o", "../scene"], folder / "work")
        for checkout in checkouts.values():
            first = ["predict", "../image1000.tif", "--model", given.model, "--size-m", "50", "--bbox"]
            measure(checkout, [*first, "44.25,-74.997", "-o", "chm.tif"], folder / "work")
        for case, words in cases(given.model, given.large):
            if not case.startswith(tuple(given.only.split(","))):
                continue
            runs: dict[str, list[Row]] = {"old": [], "new": []}
            for _ in range(given.rounds):
                for side, checkout in checkouts.items():
                    runs[side].append(measure(checkout, words, folder / "work"))
            row = {s: {q: statistics.median(r[q] for r in runs[s]) for q in quantities} for s in runs}
            row["ratio"] = {q: row["new"][q] / row["old"][q] for q in quantities}
            results[case] = row
            old, new, ratio = (row[key] for key in ("old", "new", "ratio"))
            cells = (f"{old[q]:9.1f} -> {new[q]:9.1f} {ratio[q]:5.2f}" for q in quantities)
            print(f"{case:30}" + "".join(f"{cell:>30}" for cell in cells), flush=True)
    if given.out:
        given.out.write_text(json.dumps({"rounds": given.rounds, "commands": results}, indent=2) + "\n")


if __name__ == "__main__":
    main()
