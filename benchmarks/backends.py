"""The network alone in every backend and precision, in turn: seconds per crop, and how far from torch.

    python benchmarks/backends.py                                   # the default model and a U-Net
    python benchmarks/backends.py --models default my.safetensors --data ../shared/data --threads 2

Times are of the forward pass only, medians over rounds in which all cases take their turn on the same
crops: four from val chips of `--data`, else of the synthetic forest. `open s` is what a start costs with the
conversion cached, `convert s` what the first start costs besides. Without an int8 network of its own a model
is quantised for the clock on a few of those crops; its distances then say nothing. `unet` is
configs/finetune/unet.yaml with random weights. Processor seconds (`cpu s`) are what to compare on a machine
that others use too.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import common
import numpy as np

CASES = {
    "torch fp32": ("torch", "fp32"),
    "torch compiled fp32": ("torch-compiled", "fp32"),
    "openvino fp32": ("openvino", "fp32"),
    "onnx fp32": ("onnx", "fp32"),
    "torch bf16": ("torch", "bf16"),
    "openvino bf16": ("openvino", "bf16"),
    "openvino int8": ("openvino", "int8"),
}
ROOT = Path(__file__).resolve().parent.parent


def crops_of(data: Path | None, side: int, count: int) -> np.ndarray:
    """Crops (count, 3, side, side) in 0..1."""
    if data is None:
        forest = common.forest(2 * side).astype(np.float32) / 255
        places = [(r, c) for r in (0, side) for c in (0, side)][:count]
        return np.stack([forest[:, r : r + side, c : c + side] for r, c in places])
    from canopy.calibration.collect import load_chips
    from canopy.calibration.quantize import calibration_crops

    return calibration_crops(load_chips(data, ("val",))[0], side, count)


def model_of(name: str, folder: Path) -> Any:
    """A loaded model; `unet` has random weights."""
    from canopy.models.registry import load_model

    if name != "unet":
        return load_model(name)
    import torch
    import yaml

    from canopy.models.checkpoint import save_checkpoint
    from canopy.models.config import ModelConfig
    from canopy.models.height import HeightModel

    torch.manual_seed(0)
    told = yaml.safe_load((ROOT / "configs/finetune/unet.yaml").read_text())["model"]
    model = HeightModel(ModelConfig.from_dict({"crop_px": 384, **told})).eval()
    save_checkpoint(folder / "unet.safetensors", model, {"name": "unet-random"})
    return load_model(folder / "unet.safetensors")


def open_case(model: Any, backend: str, precision: str, crops: np.ndarray, folder: Path) -> tuple[Any, Any]:
    """(runner, what opening it took); raises CanopyError where this machine cannot."""
    from canopy.errors import ConfigError
    from canopy.inference.backends import settle

    clock = common.Clock()
    facts: dict[str, Any] = {}
    try:
        choice = settle(model, backend, precision, "cpu")
    except ConfigError:
        if precision != "int8":
            raise
        choice = quantised(model, crops, folder)
        facts["note"] = "quantised for the clock"
    _first(choice.open(model), crops)
    facts["convert s"] = clock.read()["cpu_s"]
    clock = common.Clock()
    runner = _first(choice.open(model), crops)
    facts["open s"] = clock.read()["cpu_s"]
    facts["convert s"] = (
        max(0.0, round(facts["convert s"] - facts["open s"], 2)) if backend != "torch" else 0.0
    )
    return runner, facts


def _first(runner: Any, crops: np.ndarray) -> Any:
    """The runner, ready: torch compiles when it sees the first crops."""
    if runner.backend == "torch-compiled":
        runner(crops)
    return runner


def quantised(model: Any, crops: np.ndarray, folder: Path) -> Any:
    """An int8 network that nobody has judged, in a file of its own."""
    from canopy.calibration.quantize import to_int8
    from canopy.inference.backends import Converted, settle, write_converted

    fp32 = settle(model, "openvino", "fp32", "cpu")
    path = folder / f"{fp32.name}.int8.zip"
    write_converted(
        path, Converted(to_int8(fp32, model, crops), {"backend": "openvino", "precision": "int8"})
    )
    return replace(fp32, precision="int8", quantised=path)


def timed(runner: Any, crops: np.ndarray) -> Callable[[], dict[str, Any]]:
    """A case of `common.in_turn`."""

    def run() -> dict[str, Any]:
        clock = common.Clock()
        runner(crops)
        return {key: value / len(crops) for key, value in clock.read().items()}

    return run


def measure(name: str, rounds: int, data: Path | None, folder: Path, wanted: list[str]) -> dict[str, Any]:
    """All cases of one model, in turn."""
    from canopy.errors import CanopyError

    model = model_of(name, folder)
    crops = crops_of(data, model.config.crop_px, 4)
    runners, facts, notes = {}, {}, []
    for title in wanted:
        backend, precision = CASES[title]
        try:
            runners[title], facts[title] = open_case(model, backend, precision, crops, folder)
        except CanopyError as error:
            notes.append(f"{title} left out: {error}")
    maps = {title: runner(crops) for title, runner in runners.items()}
    runs = common.in_turn({title: timed(r, crops) for title, r in runners.items()}, rounds, said=False)
    first = next(iter(runners))
    rows = []
    for title in runners:
        wall, cpu = (common.middle(runs[title], key) for key in ("wall_s", "cpu_s"))
        apart = np.abs(maps[title] - maps[first])
        rows.append(
            {
                "model": name, "case": title, "wall s": wall, "cpu s": cpu,
                "x faster": common.middle(runs[first], "cpu_s") / cpu,
                "open s": facts[title]["open s"], "convert s": facts[title]["convert s"],
                "diff m": float(apart.mean()), "max m": float(apart.max()),
                "note": facts[title].get("note", ""),
            }
        )  # fmt: skip
    return {"model": name, "crop_px": model.config.crop_px, "rows": rows, "runs": runs, "notes": notes}


def main() -> None:
    parser = common.parser(__doc__)
    parser.add_argument("--models", nargs="+", default=["default", "unet"], help="names or files")
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--data", type=Path, help="a data pack or chips, for real crops")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    given = parser.parse_args()
    import torch

    torch.set_num_threads(given.threads)
    with tempfile.TemporaryDirectory() as folder:
        # A cache of its own, so that conversion is timed too.
        os.environ["CANOPY_CACHE"] = folder
        results = [
            measure(name, given.rounds, given.data, Path(folder), given.cases) for name in given.models
        ]
    rows = [row for result in results for row in result["rows"]]
    common.show(
        f"Seconds per crop, {given.threads} thread{'s' if given.threads > 1 else ''}", rows,
        [note for result in results for note in result["notes"]],
    )  # fmt: skip
    settings = {key: value for key, value in vars(given).items() if key not in ("child", "out")}
    common.save(given.out, "backends", settings, results)


if __name__ == "__main__":
    main()
