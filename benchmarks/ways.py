"""The ways in which `throughput.py` predicts a raster, and one run of each, in a process of its own."""

from __future__ import annotations

import importlib.util
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import common
import rival


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
    "openvino-bf16": Way("OpenVINO bf16", {"backend": "openvino", "precision": "bf16"}, package="openvino"),
    "openvino-int8": Way(
        "OpenVINO int8", {"backend": "openvino", "precision": "int8"}, int8=True, package="nncf"
    ),
    "loop": Way("loop fp32"),
    "loop-int8": Way("loop dynamic int8", int8=True),
}


def usable(names: list[str]) -> tuple[list[str], list[str]]:
    """Those ways whose packages are installed, and a note on each of the others."""
    kept = [name for name in names if importlib.util.find_spec(WAYS[name].package)]
    missing = [WAYS[name] for name in names if name not in kept]
    return kept, [f"{way.title}: {way.package} is not installed" for way in missing]


INT8_CROPS = 8
# The published 2024 large layout as its notebook uses it, and on the larger crops that its overlap pays for.
LARGE = {"large": {"crop_px": 256, "overlap_px": 64}, "large-512": {"crop_px": 512, "overlap_px": 64}}


def large_model(name: str, folder: Path) -> Path:
    """The file of a model of `LARGE`, random weights, the same on every call."""
    path = folder / f"{name}.safetensors"
    if not path.exists():
        import torch

        from canopy.models.checkpoint import save_checkpoint
        from canopy.models.config import EncoderConfig, ModelConfig
        from canopy.models.height import HeightModel

        torch.manual_seed(0)
        # A LayerScale of 1e-5, as at the start of training, would hide all that the blocks do.
        config = ModelConfig(encoder=EncoderConfig(layer_scale=0.1), **LARGE[name])
        save_checkpoint(path, HeightModel(config), {"name": f"random ViT-L, {name}"})
    return path


def run_case(case: dict[str, Any]) -> dict[str, Any]:
    """What `case["do"]` asks for; see the functions below."""
    does = {"gemm": _gemm, "flops": _flops, "ready": _ready, "predict": _predict, "loop": _loop}
    return does[case["do"]](case)


def _gemm(_: dict[str, Any]) -> dict[str, Any]:
    import torch

    return common.gemm() | {"threads": torch.get_num_threads()}


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


def _ready(case: dict[str, Any]) -> dict[str, Any]:
    """Seconds until a raster could be predicted: the model loaded, converted if that was not done, warm."""
    before = common.Clock()
    if "int8" in case:
        _loop_model(case)
    elif case["options"].get("precision") == "int8":
        _job_in_int8(case)
    else:
        _job(case)
    return {"ready_s": before.read()["wall_s"]}


def _job_in_int8(case: dict[str, Any]) -> None:
    """The job; the int8 network is made first where a model has none, on a few synthetic crops: they do for
    its pace, and its accuracy is measured elsewhere (`canopy models quantize`, docs/performance.md)."""
    import numpy as np

    import canopy
    from canopy.calibration.quantize import quantize
    from canopy.chips.store import Chip, ChipRow
    from canopy.chips.write import write_folder
    from canopy.errors import ConfigError

    try:
        _job(case)
        return
    except ConfigError:
        pass
    rgb, chm = common.forest(common.TILE_PX), np.full((common.TILE_PX // 2,) * 2, 10, np.float32)
    splits = ["train"] * INT8_CROPS + ["val"]
    chips = [
        Chip(ChipRow(f"c{i}", "made-up", "synth", s), np.roll(rgb, 37 * i, 1), chm)
        for i, s in enumerate(splits)
    ]
    path = Path(case["to"]).with_suffix(".chips")
    write_folder(path, chips)
    quantize(canopy.load_model(case["model"]), path, crops=INT8_CROPS)
    _job(case)


def _job(case: dict[str, Any]) -> Any:
    """The job of `canopy predict`, which converts the model where needed and warms it up."""
    import canopy
    from canopy.inference.options import OneMapOptions
    from canopy.inference.predict import prepare

    model, options = canopy.load_model(case["model"]), dict(case["options"])
    return prepare(
        OneMapOptions(images=(case["image"],), out=case["to"], overwrite=True, device="cpu", **options),
        model=model,
    )


def _loop_model(case: dict[str, Any]) -> Any:
    """The loop's model, warm."""
    import torch

    import canopy

    model = canopy.load_model(case["model"])
    if case["int8"]:
        model = rival.compressed(model)
    with torch.inference_mode():
        model(torch.full((1, 3, rival.WINDOW_PX, rival.WINDOW_PX), 0.4))
    return model


def _predict(case: dict[str, Any]) -> dict[str, Any]:
    """One whole raster through canopy."""
    before = common.Clock()
    job = _job(case)
    ready = before.read()["wall_s"]
    clock = common.Clock()
    summary = job.run().summary
    return clock.read() | {
        "ready_s": ready,
        "model_s": round(summary.model_seconds, 3),
        "crops": summary.crops_predicted,
        "crop_px": job.plan.lattice.crop_px,
        "stride_px": job.plan.lattice.stride_px,
        "peak_mb": common.peak_mb(),
    }


def _loop(case: dict[str, Any]) -> dict[str, Any]:
    """The same through the plain loop."""
    import rasterio

    before = common.Clock()
    model = _loop_model(case)
    with rasterio.open(case["image"]) as dataset:
        crops = rival.windows(dataset.height, dataset.width)
    ready = before.read()["wall_s"]
    clock = common.Clock()
    model_s = rival.predict_loop(model, Path(case["image"]), Path(case["to"]))
    return clock.read() | {
        "ready_s": ready,
        "model_s": round(model_s, 3),
        "crops": crops,
        "crop_px": rival.WINDOW_PX,
        "stride_px": rival.STEP_PX,
        "peak_mb": common.peak_mb(),
    }


if __name__ == "__main__":
    print(json.dumps(run_case(json.loads(sys.argv[2]))))
