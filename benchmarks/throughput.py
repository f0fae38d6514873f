"""Whole rasters through `canopy predict` and a plain loop, in turn: pace, memory, distance of heights.

    python benchmarks/throughput.py                             # default model and a random ViT-L, minutes
    python benchmarks/throughput.py --models large:768 --rounds 3    # ViT-L alone, 768 x 768 px
    python benchmarks/throughput.py --models default:4096 --ways torch openvino loop

`large` is the published 2024 large layout (ViT-L/16 and the full DPT head) with random weights, on the
published 256 px crops every 192 px. The loop is `rival.py`: 256 px windows every 192 px, PyTorch eager, the
image in memory; "loop-int8" with 8-bit Linear layers, quantised dynamically. Wall time is from the opened
image to the finished file, with the model loaded and warm; each is a process of its own. On a machine that
others use too, processor seconds (`cpu s`) say more than wall seconds.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import common
import rival

MODELS = ("default:1024", "large:768")
INT8_CROPS = 8
LEGEND = """\
x loop: times faster than the loop of the same numbers; x inside: the same without crops that hang over the
raster's edges, as on a large one; x cpu: that by processor time. px seen: by the network per pixel mapped.
diff, max: mean and greatest distance from the map of torch fp32."""


@dataclass(frozen=True)
class Way:
    """How a raster is predicted: options of `canopy.predict`, or None for the plain loop."""

    title: str
    options: dict[str, str] | None = None
    int8: bool = False


WAYS = {
    "torch": Way("torch fp32", {"backend": "torch", "precision": "fp32"}),
    "openvino": Way("OpenVINO fp32", {"backend": "openvino", "precision": "fp32"}),
    "openvino-bf16": Way("OpenVINO bf16", {"backend": "openvino", "precision": "bf16"}),
    "openvino-int8": Way("OpenVINO int8", {"backend": "openvino", "precision": "int8"}, int8=True),
    "loop": Way("loop fp32"),
    "loop-int8": Way("loop dynamic int8", int8=True),
}


# ---- one run, in a process of its own -----------------------------------------------------------
def run_case(case: dict[str, Any]) -> dict[str, Any]:
    """Predict `case["image"]` with `case["model"]` in `case["way"]`; with `prepare`, only make ready."""
    import canopy

    way, model, image = WAYS[case["way"]], canopy.load_model(case["model"]), Path(case["image"])
    if way.options is None:
        return _loop(rival.compressed(model) if way.int8 else model, image, case)
    from canopy.errors import ConfigError
    from canopy.inference.options import OneMapOptions
    from canopy.inference.predict import prepare

    options = OneMapOptions(images=(str(image),), out=case["to"], overwrite=True, device="cpu", **way.options)
    try:
        job = prepare(options, model=model)  # converts the network where needed, and warms it up
    except ConfigError:
        if not (way.int8 and case.get("prepare")):
            raise
        make_int8(model, Path(case["to"]))
        job = prepare(options, model=model)
    if case.get("prepare"):
        return {}
    clock = common.Clock()
    summary = job.run().summary
    lattice = job.plan.lattice
    places = {"crops": summary.crops_predicted, "crop_px": lattice.crop_px, "stride_px": lattice.stride_px}
    return clock.read() | places | {"peak_mb": common.peak_mb()}


def _loop(model: Any, image: Path, case: dict[str, Any]) -> dict[str, Any]:
    import rasterio
    import torch

    with torch.inference_mode():
        model(torch.full((1, 3, rival.WINDOW_PX, rival.WINDOW_PX), 0.4))  # warm
    if case.get("prepare"):
        return {}
    with rasterio.open(image) as dataset:
        crops = rival.windows(dataset.height, dataset.width)
    clock = common.Clock()
    rival.predict_loop(model, image, Path(case["to"]))
    places = {"crops": crops, "crop_px": rival.WINDOW_PX, "stride_px": rival.STEP_PX}
    return clock.read() | places | {"peak_mb": common.peak_mb()}


def make_int8(model: Any, near: Path) -> None:
    """Make the int8 network of a model on a few synthetic crops: they do for its pace, and its accuracy is
    measured elsewhere (`canopy models quantize`, docs/performance.md)."""
    import numpy as np

    from canopy.calibration.quantize import quantize
    from canopy.chips.store import Chip, ChipRow
    from canopy.chips.write import write_folder

    rgb, chm = common.forest(common.TILE_PX), np.full((common.TILE_PX // 2,) * 2, 10, np.float32)
    splits = ["train"] * INT8_CROPS + ["val"]
    chips = [
        Chip(ChipRow(f"c{i}", "made-up", "synth", split), np.roll(rgb, 37 * i, 1), chm)
        for i, split in enumerate(splits)
    ]
    write_folder(near.with_suffix(".chips"), chips)
    quantize(model, near.with_suffix(".chips"), crops=INT8_CROPS)


def large_model(folder: Path) -> Path:
    """The file of the published large layout, random weights, the same on every call."""
    path = folder / "large.safetensors"
    if not path.exists():
        import torch

        from canopy.models.checkpoint import save_checkpoint
        from canopy.models.config import EncoderConfig, ModelConfig
        from canopy.models.height import HeightModel

        torch.manual_seed(0)
        # A LayerScale of 1e-5, as at the start of training, would hide all that the blocks do.
        config = ModelConfig(encoder=EncoderConfig(layer_scale=0.1), crop_px=256, overlap_px=64)
        save_checkpoint(path, HeightModel(config), {"name": "random ViT-L"})
    return path


# ---- all ways of one model ----------------------------------------------------------------------
def measure(model: str, side: int, ways: list[str], rounds: int, folder: Path) -> dict[str, Any]:
    """All ways of one model on one raster, in turn; those that cannot run here are left out, with a note."""
    image = common.make_image(folder / f"{side}.tif", side)
    where = str(large_model(folder) if model == "large" else model)
    cases, notes = {}, []
    for name in ways:
        to = folder / f"{Path(model).stem}-{name}.tif"
        case = {"way": name, "model": where, "image": str(image), "to": str(to)}
        try:
            if name not in ("torch", "loop"):
                common.alone(__file__, case | {"prepare": True})
        except RuntimeError as error:
            notes.append(f"{WAYS[name].title} left out: {str(error).strip().splitlines()[-1]}")
            continue
        cases[name] = partial(common.alone, __file__, case)
    runs = common.in_turn(cases, rounds)
    rows = [_row(name, runs, side) for name in cases]
    for row in rows:
        row["diff m"], row["max m"] = _difference(folder, Path(model).stem, row["way"])
    return {"model": model, "side_px": side, "notes": notes, "rows": rows, "runs": runs}


def _row(name: str, runs: dict[str, list[dict[str, Any]]], side: int) -> dict[str, Any]:
    """A line of the table; ratios are to the loop of the same kind of numbers, where there was one."""
    found, own = runs[name][0], {k: common.middle(runs[name], k) for k in ("wall_s", "cpu_s", "peak_mb")}
    row = {
        "way": name,
        "what": WAYS[name].title,
        "wall s": own["wall_s"],
        "cpu s": own["cpu_s"],
        "Mpx/s": side**2 / own["wall_s"] / 1e6,
        "px seen": found["crops"] * found["crop_px"] ** 2 / side**2,
        "peak MB": own["peak_mb"],
        "x loop": None,
        "x inside": None,
        "x cpu": None,
    }
    loop = "loop-int8" if WAYS[name].int8 and "loop-int8" in runs else "loop"
    if loop in runs:
        other = runs[loop][0]
        # What a crop costs, by the ground that it moves on.
        inside = (found["crops"] * found["stride_px"] ** 2) / (other["crops"] * other["stride_px"] ** 2)
        row["x loop"], by_cpu = (common.middle(runs[loop], k) / own[k] for k in ("wall_s", "cpu_s"))
        row["x inside"], row["x cpu"] = row["x loop"] * inside, by_cpu * inside
    return row


def _difference(folder: Path, model: str, name: str) -> tuple[float | None, float | None]:
    """Mean and greatest difference of a map from canopy's in torch fp32, metres."""
    import numpy as np
    import rasterio

    maps, paths = [], [folder / f"{model}-{way}.tif" for way in ("torch", name)]
    if name == "torch" or not paths[0].exists():
        return None, None
    for path in paths:
        with rasterio.open(path) as dataset:
            maps.append(dataset.read(1))
    apart = np.abs(maps[0] - maps[1])
    return float(apart.mean()), float(apart.max())


def main(argv: list[str] | None = None) -> None:
    parser = common.parser(__doc__)
    parser.add_argument("--models", nargs="+", default=MODELS, help="NAME:SIDE; `large`, a name or a file")
    parser.add_argument("--ways", nargs="+", default=list(WAYS), choices=list(WAYS))
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--dir", help="where images, maps and models go; default: a temporary folder")
    options = parser.parse_args(argv)
    if options.child:
        print(json.dumps(run_case(json.loads(options.child))))
        return
    results = []
    with tempfile.TemporaryDirectory(dir=options.dir) as folder:
        # Conversions of a random model are not for the user's cache.
        os.environ["CANOPY_CACHE"] = str(Path(folder, "cache"))
        for spec in options.models:
            model, _, side = spec.rpartition(":")
            found = measure(model, int(side), options.ways, options.rounds, Path(folder))
            results.append(found)
            shown = [{key: value for key, value in row.items() if key != "way"} for row in found["rows"]]
            title = f"{model}, {side} x {side} px, median of {options.rounds}"
            common.show(title, shown, [*found["notes"], LEGEND])
    common.save(options.out, "throughput", {"models": options.models, "rounds": options.rounds}, results)


if __name__ == "__main__":
    sys.exit(main())
