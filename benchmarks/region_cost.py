"""What a county, a state and a country take: the plans of configs/region/*.yaml, at a measured pace.

    python benchmarks/region_cost.py                     # measures the network on one thread of this machine
    python benchmarks/region_cost.py --crop-s 0.012      # of another machine, or a GPU (canopy map --dry-run)

Each config is planned (not run) over a square of its size around the demo's place, as if there were imagery
everywhere. The pace is processor time of one thread, which other work on the machine hardly changes, and
reading, blending and writing at `canopy.inference.estimate.OVERHEAD_S_PER_PX`.
"""

from __future__ import annotations

import argparse
import math
import tempfile
import time
from pathlib import Path
from typing import Any

from region_small import report

CONFIGS = Path(__file__).parents[1] / "configs" / "region"
KM2 = {"county": 2_000, "state": 60_000, "country": 550_000}
PLACE = "44.083,-71.296"
CROPS = 6


def crop_cpu_s() -> float:
    """Processor seconds of one crop of the default model on one thread, in the default backend."""
    import numpy as np
    import torch

    from canopy.inference.backends import settle
    from canopy.models.registry import load_model

    torch.set_num_threads(1)
    model = load_model("default")
    runner = settle(model, device="cpu").open(model)
    rgb = np.full((1, 3, model.config.crop_px, model.config.crop_px), 0.4, np.float32)
    runner(rgb)
    started = time.process_time()
    for _ in range(CROPS):
        runner(rgb)
    return (time.process_time() - started) / CROPS


def plan(name: str, km2: float, crop_s: float, measured: bool, out: Path) -> dict[str, Any]:
    """Tiles, crops, bytes, hours and money of one config."""
    from canopy.config import load_settings
    from canopy.region.plan import RegionSettings
    from canopy.region.run import prepare_run, region_cost

    given = {
        "imagery": "demo", "bbox": PLACE, "size_m": 1000 * math.sqrt(km2), "out": str(out / name),
        "device": "cpu", "scheduler": "local", "workers": 1,
    }  # fmt: skip
    for_gpu = load_settings(RegionSettings, CONFIGS / f"{name}.yaml", [f"out={name}"]).device == "cuda"
    overrides = [f"{key}={value}" for key, value in given.items()]
    settings = load_settings(RegionSettings, CONFIGS / f"{name}.yaml", overrides)
    cost = region_cost(prepare_run(settings), crop_s)
    found = {
        "km2": round(cost.km2), "tiles": cost.tiles, "crops": cost.crops,
        "map_gb": round(cost.map_bytes / 1e9), "imagery_gb": round(cost.imagery_bytes / 1e9),
        "km2_per_worker_hour": round(cost.km2_per_hour, 1), "worker_hours": round(cost.worker_hours),
    }  # fmt: skip
    if not (measured and for_gpu):  # a GPU's price says nothing of a core's hours
        found |= {"price": settings.price, "money": round(cost.money or 0, 1)}
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--crop-s", type=float, help="seconds of a crop, instead of measuring")
    parser.add_argument("--out", type=Path, help="folder for region_cost.json")
    options = parser.parse_args()
    crop_s = options.crop_s or crop_cpu_s()
    results: dict[str, Any] = {"crop_s": round(crop_s, 4)}
    with tempfile.TemporaryDirectory() as folder:
        for name, km2 in KM2.items():
            results[name] = plan(name, km2, crop_s, options.crop_s is None, Path(folder))
    report(results, options.out, "region_cost")


if __name__ == "__main__":
    main()
