"""Whole rasters through `canopy predict` and a plain loop, in turn: pace, memory, share of the GEMM limit.

    python benchmarks/throughput.py                             # default model and a random ViT-L, minutes
    python benchmarks/throughput.py --models large:768 --rounds 3    # ViT-L alone, 768 x 768 px
    python benchmarks/throughput.py --models default:4096 --ways torch openvino loop

`large` is the published 2024 large layout (ViT-L/16 and the full DPT head) with random weights, on the
published 256 px crops every 192 px; `large-512` the same on 512 px every 448 px. The loop is `rival.py`:
256 px windows every 192 px, PyTorch eager, the image in memory; "loop-int8" with 8-bit Linear layers,
quantised dynamically. Wall time is from the opened image to the finished file, with the model loaded and
warm; each is a process of its own. Every round also measures the machine's fp32 matrix products (GEMM). On
a machine that others use too, processor seconds (`cpu s`) say more than wall seconds.
"""

from __future__ import annotations

import os
import sys
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import common
from ways import LARGE, WAYS, large_model, usable

from canopy.runtime import cache_dir

MODELS = ("default:1024", "large:768")
GSD_M = 0.5
SCRIPT = str(Path(__file__).with_name("ways.py"))
LEGEND = """\
x loop: times faster than the loop of the same numbers; x inside: the same without crops that hang over the
raster's edges, as on a large one; cpu: that by processor time. /model: wall over time in the model.
px seen: by the network per pixel mapped. % GEMM: FLOP per second of the matrix products', in the model by
wall; cpu: of the whole run by processor time. ready: model loaded and warm; first: that with the one-time
conversion. diff, max: mean and greatest distance from the map of torch fp32."""


def measure(model: str, side: int, ways: list[str], rounds: int, folder: Path) -> dict[str, Any]:
    """All ways of one model on one raster, in turn; those that cannot run are left out, with a note."""
    image = common.make_image(folder / f"{side}.tif", side)
    where = str(large_model(model, cache_dir()) if model in LARGE else model)

    def case(name: str) -> dict[str, Any]:
        way, to = WAYS[name], str(folder / f"{model}-{name}.tif")
        files = {"model": where, "image": str(image), "to": to}
        if way.options is None:
            return files | {"do": "loop", "int8": way.int8}
        return files | {"do": "predict", "options": way.options}

    first: dict[str, float | None] = {}
    notes = []
    for name in ways:
        first[name] = None
        if name in ("torch", "loop"):
            continue  # nothing to convert, nothing that could be missing
        try:
            first[name] = common.alone(SCRIPT, case(name) | {"do": "ready"})["ready_s"]
        except RuntimeError as error:
            del first[name]
            notes.append(f"{WAYS[name].title} left out: {str(error).strip().splitlines()[-1]}")
    ways = list(first)
    cases = {name: partial(common.alone, SCRIPT, case(name)) for name in ways}
    cases["gemm"] = partial(common.alone, SCRIPT, {"do": "gemm"})
    flops = common.alone(SCRIPT, {"do": "flops", "model": where})
    runs = common.in_turn(cases, rounds)
    gemm = {key: common.middle(runs["gemm"], key) for key in ("gflops", "gflop_per_cpu_s")}
    rows = [_row(name, runs[name], side, flops, gemm) for name in ways]
    for row in rows:
        row["first s"] = first[row["way"]]
        row["x loop"] = _ratio(runs, row["way"], "wall_s")
        row["x inside"], row["cpu"] = (_inside(runs, row["way"], key) for key in ("wall_s", "cpu_s"))
        row["diff m"], row["max m"] = _difference(folder, model, row["way"])
    facts = {"model": model, "side_px": side, "gemm": gemm, **flops, "notes": notes}
    return facts | {"rows": rows, "runs": runs}


def _row(
    name: str, runs: list[dict[str, Any]], side: int, flops: dict[str, Any], gemm: dict[str, float]
) -> dict[str, Any]:
    wall, cpu, model_s, crops = (common.middle(runs, k) for k in ("wall_s", "cpu_s", "model_s", "crops"))
    crop_px = runs[0]["crop_px"]
    gflop = crops * flops["window_gflop" if WAYS[name].options is None else "crop_gflop"]
    return {
        "way": name,
        "what": WAYS[name].title,
        "wall s": wall,
        "cpu s": cpu,
        "Mpx/s": side**2 / wall / 1e6,
        "km2/h": side**2 * GSD_M**2 / 1e6 / wall * 3600,
        "x loop": None,
        "x inside": None,
        "cpu": None,
        "/model": wall / model_s,
        "px seen": crops * crop_px**2 / side**2,
        "% GEMM": 100 * gflop / model_s / gemm["gflops"],
        "% GEMM, cpu": 100 * gflop / cpu / gemm["gflop_per_cpu_s"],
        "peak MB": common.middle(runs, "peak_mb"),
        "ready s": common.middle(runs, "ready_s"),
    }


def _loop_of(runs: dict[str, list[dict[str, Any]]], name: str) -> str:
    """The loop of the same kind of numbers; that in fp32 for int8 where a model has no other."""
    return "loop-int8" if WAYS[name].int8 and "loop-int8" in runs else "loop"


def _ratio(runs: dict[str, list[dict[str, Any]]], name: str, key: str) -> float | None:
    """How many times faster than the loop of the same kind of numbers, on this raster."""
    other = _loop_of(runs, name)
    return common.middle(runs[other], key) / common.middle(runs[name], key) if other in runs else None


def _inside(runs: dict[str, list[dict[str, Any]]], name: str, key: str) -> float | None:
    """The same on a raster without edges: by the cost of a crop and the ground that it moves on."""
    ratio = _ratio(runs, name, key)
    if ratio is None:
        return None
    ours, loop = runs[name][0], runs[_loop_of(runs, name)][0]
    return ratio * (ours["crops"] * ours["stride_px"] ** 2) / (loop["crops"] * loop["stride_px"] ** 2)


def _difference(folder: Path, model: str, name: str) -> tuple[float | None, float | None]:
    """Mean and greatest difference of a map from canopy's in torch fp32, metres."""
    import numpy as np
    import rasterio

    paths = [folder / f"{model}-{way}.tif" for way in ("torch", name)]
    if not all(path.exists() for path in paths) or name == "torch":
        return None, None
    maps = []
    for path in paths:
        with rasterio.open(path) as dataset:
            maps.append(dataset.read(1))
    apart = np.abs(maps[0] - maps[1])
    return float(apart.mean()), float(apart.max())


def run(models: list[str], ways: list[str], rounds: int, out: Path | None, folder: Path) -> dict[str, Any]:
    """The whole benchmark; see the module's text."""
    kept, notes = usable(ways)
    results = []
    for spec in models:
        model, _, side = spec.rpartition(":")
        found = measure(model, int(side), kept, rounds, folder)
        results.append(found)
        title = (
            f"{model}: {found['parameters'] / 1e6:.0f} M parameters, {found['crop_px']} px crops of "
            f"{found['crop_gflop']:.0f} GFLOP; {side} x {side} px, median of {rounds}; "
            f"GEMM {found['gemm']['gflops']:.0f} GFLOP/s, {found['gemm']['gflop_per_cpu_s']:.0f} per cpu s"
        )
        shown = [{key: value for key, value in row.items() if key != "way"} for row in found["rows"]]
        common.show(title, shown, [*notes, *found["notes"], LEGEND])
    return common.save(
        out, "throughput", {"models": models, "ways": kept, "rounds": rounds, "notes": notes}, results
    )


def main(argv: list[str] | None = None) -> None:
    parser = common.parser(__doc__)
    parser.add_argument(
        "--models", nargs="+", default=list(MODELS), help="NAME:SIDE; `large`, a name or a file"
    )
    parser.add_argument("--ways", nargs="+", default=list(WAYS), choices=list(WAYS))
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--dir", help="where images, maps and models go; default: a temporary folder")
    options = parser.parse_args(argv)
    with tempfile.TemporaryDirectory(dir=options.dir) as folder:
        # Conversions of a random model are not for the user's cache; beside the results they serve again.
        os.environ["CANOPY_CACHE"] = str(((options.out or Path(folder)) / "cache").absolute())
        run(options.models, options.ways, options.rounds, options.out, Path(folder))


if __name__ == "__main__":
    sys.exit(main())
