"""What decoders cost on top of one encoder: those of configs/experiments/heads.yaml, with random weights.

    python benchmarks/heads.py
    python benchmarks/heads.py --side 256 --rounds 5

GFLOP are multiply-adds times two for a crop, counted by torch. Processor seconds are of one forward pass,
medians over rounds in which all take their turn. How well each head predicts is for
`python pipelines/experiments.py CHIPS -o DIR --matrix configs/experiments/heads.yaml --var encoder=MODEL`.
"""

from __future__ import annotations

import importlib.util
import os
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import common
import numpy as np

MATRIX = Path(__file__).resolve().parent.parent / "configs" / "experiments" / "heads.yaml"


def heads(base: Any) -> dict[str, Any]:
    """Configurations of models by the name of their head, with the encoder of `base`."""
    from canopy.models.config import ModelConfig
    from canopy.training.experiments import load_matrix

    found = {}
    for line in load_matrix(MATRIX, []).runs:
        changes = line.set.get("model", {}).get("decoder", {})
        told = base.to_dict()
        found[line.name] = ModelConfig.from_dict(told | {"decoder": told["decoder"] | changes})
    return found


def gflop(config: Any, side: int) -> tuple[float, float]:
    """(whole model, encoder alone) for one crop."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    from canopy.models.height import HeightModel

    model, rgb = HeightModel(config).eval(), torch.zeros(1, 3, side, side)
    counted = []
    for part in (model, model.encoder):
        with torch.inference_mode(), FlopCounterMode(display=False) as count:
            part(rgb)
        counted.append(count.get_total_flops() / 1e9)
    return counted[0], counted[1]


def timed(config: Any, backend: str, name: str, folder: Path) -> Callable[[], dict[str, Any]]:
    """A case of `common.in_turn`: one crop through one backend."""
    from canopy.inference.backends.choose import settle
    from canopy.models.checkpoint import load_model, save_checkpoint
    from canopy.models.height import HeightModel

    path = folder / f"{name}.safetensors"
    if not path.exists():
        save_checkpoint(path, HeightModel(config).eval(), {"name": name})
    model = load_model(path)
    runner = settle(model, backend, "fp32", "cpu").open(model)
    crop = common.forest(config.crop_px)[None].astype(np.float32) / 255

    def run() -> dict[str, Any]:
        clock = common.Clock()
        runner(crop)
        return clock.read()

    return run


def main(argv: list[str] | None = None) -> None:
    parser = common.parser(__doc__)
    parser.add_argument("--side", type=int, help="of the crop, px; default: the default model's")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", nargs="+", help="these heads alone")
    options = parser.parse_args(argv)
    from canopy.models.checkpoint import load_model

    base = load_model("default").config
    base = replace(base, crop_px=options.side or base.crop_px, overlap_px=0, margin_px=0)
    configs = {name: config for name, config in heads(base).items() if name in (options.only or [name])}
    backends = [b for b in ("torch", "openvino") if importlib.util.find_spec(b)]
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        os.environ["CANOPY_CACHE"] = folder
        cases = {f"{n}, {b}": timed(c, b, n, Path(folder)) for n, c in configs.items() for b in backends}
        found = common.in_turn(cases, options.rounds)
    for name, config in configs.items():
        whole, encoder = gflop(config, 256)
        row = {"head": name, "GFLOP at 256 px": whole, "of that the head": whole - encoder}
        row |= {f"{b} cpu s": common.middle(found[f"{name}, {b}"], "cpu_s") for b in backends}
        rows.append(row)
    common.show(f"Decoders on one encoder, {base.crop_px} px crops", rows)
    common.save(options.out, "heads", {"side_px": base.crop_px, "rounds": options.rounds}, rows)


if __name__ == "__main__":
    main()
