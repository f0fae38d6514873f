"""Whole rasters through `canopy predict` and a plain loop, in turn: pace, memory, share of the GEMM limit.

    python benchmarks/throughput.py                             # default model and a random ViT-L, minutes
    python benchmarks/throughput.py --models large:768 --rounds 3    # ViT-L alone, 768 x 768 px
    python benchmarks/throughput.py --models default:4096 --ways torch openvino loop

`large` is the published 2024 large layout (ViT-L/16 and the full DPT head) with random weights. The loop is
`rival.py`: 256 px windows every 192 px, PyTorch eager, the image in memory; "loop-int8" with dynamically
quantised Linear layers. Wall time is from the opened image to the finished file, with the model loaded and
warm; every run is a process of its own. Every round also measures the machine's fp32 matrix products (GEMM).
On a machine that others use too, processor seconds (`cpu s`) say more than wall seconds.
"""

from __future__ import annotations

import importlib.util
import json
import sys
import tempfile
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import common
import rival

MODELS = ("default:1024", "large:768")
GSD_M = 0.5
LEGEND = (
    "x loop: times faster than the loop of the same numbers (wall; processor). /model: wall over time in the "
    "model. px seen: by the network per pixel mapped.\nready: model loaded and warm; first: that with the "
    "one-time conversion. diff, max: mean and greatest distance from the map of torch fp32."
)


@dataclass(frozen=True)
class Way:
    """How a raster is predicted.

    Attributes:
        title: for the table.
        options: of `canopy.predict`; None is the plain loop.
        int8: whether numbers are 8-bit; such ways are compared with the loop that does so too.
        package: what must be installed.
    """

    title: str
    options: dict[str, str] | None = None
    int8: bool = False
    package: str = "torch"


WAYS = {
    "torch": Way("torch fp32", {"backend": "torch", "precision": "fp32"}),
    "openvino": Way("OpenVINO fp32", {"backend": "openvino", "precision": "fp32"}, package="openvino"),
    "onnx": Way("ONNX fp32", {"backend": "onnx", "precision": "fp32"}, package="onnxruntime"),
    "openvino-int8": Way(
        "OpenVINO int8", {"backend": "openvino", "precision": "int8"}, int8=True, package="nncf"
    ),
    "loop": Way("loop fp32"),
    "loop-int8": Way("loop dynamic int8", int8=True),
}


# ---- one run, in a process of its own -----------------------------------------------------------
def run_case(case: dict[str, Any]) -> dict[str, Any]:
    """What `case["do"]` asks for; see the functions below."""
    return {"gemm": _gemm, "flops": _flops, "predict": _predict, "loop": _loop}[case["do"]](case)


def _gemm(_: dict[str, Any]) -> dict[str, Any]:
    import torch

    return {"gflops": common.gemm_gflops(), "threads": torch.get_num_threads()}


def _flops(case: dict[str, Any]) -> dict[str, Any]:
    """GFLOP of one forward pass (two per multiply-add) on the model's own crop and on the loop's window."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    import canopy

    model = canopy.load_model(case["model"])
    found = {}
    with torch.inference_mode():
        for side in {model.config.crop_px, rival.WINDOW_PX}:
            counter = FlopCounterMode(display=False)
            with counter:
                model(torch.full((1, 3, side, side), 0.4))
            found[side] = counter.get_total_flops() / 1e9
    return {
        "crop_px": model.config.crop_px,
        "crop_gflop": found[model.config.crop_px],
        "window_gflop": found[rival.WINDOW_PX],
        "parameters": model.parameter_count,
    }


def _predict(case: dict[str, Any]) -> dict[str, Any]:
    """One whole raster through canopy."""
    import canopy
    from canopy.inference.job import prepare
    from canopy.inference.request import Request

    before = common.Clock()
    options = dict(case["options"])
    model = canopy.load_model(case["model"])
    request = Request(
        images=(case["image"],), model=model, out=case["to"], overwrite=True, device="cpu", **options
    )
    job = prepare(request)  # converts where needed, and warms up
    ready = before.read()["wall_s"]
    clock = common.Clock()
    summary = job.run().summary
    return clock.read() | {
        "ready_s": ready,
        "model_s": round(summary.model_seconds, 3),
        "crops": summary.crops_predicted,
        "peak_mb": common.peak_mb(),
    }


def _loop(case: dict[str, Any]) -> dict[str, Any]:
    """The same through the plain loop."""
    import rasterio
    import torch

    import canopy

    before = common.Clock()
    model = canopy.load_model(case["model"])
    if case["int8"]:
        model = rival.compressed(model)
    with torch.inference_mode():
        model(torch.full((1, 3, rival.WINDOW_PX, rival.WINDOW_PX), 0.4))
    with rasterio.open(case["image"]) as dataset:
        crops = rival.windows(dataset.height, dataset.width)
    ready = before.read()["wall_s"]
    clock = common.Clock()
    model_s = rival.predict_loop(model, Path(case["image"]), Path(case["to"]))
    return clock.read() | {
        "ready_s": ready,
        "model_s": round(model_s, 3),
        "crops": crops,
        "peak_mb": common.peak_mb(),
    }


# ---- all runs of a model ------------------------------------------------------------------------
def usable(names: list[str]) -> tuple[list[str], list[str]]:
    """Those ways that this installation has, and a note on each of the others."""
    from canopy.inference.request import Options

    kept, notes = [], []
    for name in names:
        way = WAYS[name]
        if importlib.util.find_spec(way.package) is None:
            notes.append(f"{way.title}: {way.package} is not installed")
        elif way.options and way.options["backend"] != "torch" and "backend" not in Options.__annotations__:
            notes.append(f"{way.title}: this version has no such backend")
        else:
            kept.append(name)
    return kept, notes


def measure(model: str, side: int, ways: list[str], rounds: int, folder: Path) -> dict[str, Any]:
    """All ways of one model on one raster, in turn."""
    image = common.make_image(folder / f"{side}.tif", side)
    where = str(large_model(folder / "large.safetensors") if model == "large" else model)

    def case(name: str) -> dict[str, Any]:
        way, to = WAYS[name], str(folder / f"{model}-{name}.tif")
        files = {"model": where, "image": str(image), "to": to}
        if way.options is None:
            return files | {"do": "loop", "int8": way.int8}
        return files | {"do": "predict", "options": _known(way.options)}

    cases = {name: partial(common.alone, __file__, case(name)) for name in ways}
    cases["gemm"] = partial(common.alone, __file__, {"do": "gemm"})
    first = {name: cases[name]()["ready_s"] for name in ways if WAYS[name].package != "torch"}
    flops = common.alone(__file__, {"do": "flops", "model": where})
    runs = common.in_turn(cases, rounds)
    gemm = common.middle(runs.pop("gemm"), "gflops")
    rows = [_row(name, runs[name], side, flops, gemm) for name in ways]
    for row in rows:
        row["first s"] = first.get(row["way"])
        row["x loop"], row["x loop, cpu"] = (_ratio(runs, row["way"], key) for key in ("wall_s", "cpu_s"))
        row["diff m"], row["max m"] = _difference(folder, model, row["way"])
    return {"model": model, "side_px": side, "gemm_gflops": gemm, **flops, "rows": rows, "runs": runs}


def _known(options: dict[str, str]) -> dict[str, str]:
    """Without those options that this version of canopy does not have."""
    from canopy.inference.request import Options

    return {key: value for key, value in options.items() if key in Options.__annotations__}


def large_model(path: Path) -> Path:
    """The published large layout with random weights, the same on every call."""
    if not path.exists():
        import torch

        from canopy.models.checkpoint import save_checkpoint
        from canopy.models.config import EncoderConfig, ModelConfig
        from canopy.models.height import HeightModel

        torch.manual_seed(0)
        # A LayerScale of 1e-5, as at the start of training, would hide all that the blocks do.
        save_checkpoint(
            path, HeightModel(ModelConfig(encoder=EncoderConfig(layer_scale=0.1))), {"name": "random ViT-L"}
        )
    return path


def _row(
    name: str, runs: list[dict[str, Any]], side: int, flops: dict[str, Any], gemm: float
) -> dict[str, Any]:
    wall, model_s, crops = (common.middle(runs, key) for key in ("wall_s", "model_s", "crops"))
    loop = WAYS[name].options is None
    crop_px = rival.WINDOW_PX if loop else flops["crop_px"]
    gflop = crops * flops["window_gflop" if loop else "crop_gflop"]
    return {
        "way": name,
        "what": WAYS[name].title,
        "wall s": wall,
        "cpu s": common.middle(runs, "cpu_s"),
        "Mpx/s": side**2 / wall / 1e6,
        "km2/h": side**2 * GSD_M**2 / 1e6 / wall * 3600,
        "x loop": None,
        "x loop, cpu": None,
        "/model": wall / model_s,
        "px seen": crops * crop_px**2 / side**2,
        "% GEMM": 100 * gflop / model_s / gemm,
        "peak MB": common.middle(runs, "peak_mb"),
        "ready s": common.middle(runs, "ready_s"),
    }


def _ratio(runs: dict[str, list[dict[str, Any]]], name: str, key: str) -> float | None:
    """How many times faster than the loop of the same kind of numbers."""
    other = "loop-int8" if WAYS[name].int8 else "loop"
    return common.middle(runs[other], key) / common.middle(runs[name], key) if other in runs else None


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
            f"GEMM {found['gemm_gflops']:.0f} GFLOP/s"
        )
        shown = [{key: value for key, value in row.items() if key != "way"} for row in found["rows"]]
        common.show(title, shown, [*notes, LEGEND])
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
    if options.child:
        print(json.dumps(run_case(json.loads(options.child))))
        return
    with tempfile.TemporaryDirectory(dir=options.dir) as folder:
        run(options.models, options.ways, options.rounds, options.out, Path(folder))


if __name__ == "__main__":
    sys.exit(main())
