"""How fast a GPU maps: images/s, Mpx/s, km2/h at 0.5 m, and the share of the card's measured matrix products.

    python benchmarks/gpu.py --out bench_out           # default model and a random ViT-L, bf16 and fp32
    python benchmarks/gpu.py --models default --modes eager graph compile --batches 16 64 256
    python benchmarks/gpu.py --device cpu --models tiny --batches 2 --map-px 192    # what the tests do

Needs torch, timm and numpy, and no geographic library: imagery comes from memory. Without a CUDA device it
runs on the CPU, with fewer pixels.

    passes    forward passes alone, by mode and batch size; images are crops of the model's own size
    map       the engine's own flow: bytes up, crops cut, network, blending, heights down; wall over the
              network's own time (aim: 1.10)
    sameness  how far heights move with the precision, the batch size and a crop's place in the batch
"""

from __future__ import annotations

import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from types import SimpleNamespace
from typing import Any

import common
import numpy as np

MODELS = ("default", "large")
GSD_M = 0.5
SECONDS = 2.0  # of every measurement, at least
LEGEND = """\
Mpx/s: pixels the network sees; map Mpx/s and km2/h: pixels of the map, overlap paid. % GEMM: of the card's
measured matrix products in the same precision (tensor cores: bf16)."""


def build(name: str) -> Any:
    """A model by name or file, or with random weights: `large` (ViT-L/16, full DPT head), `tiny` (tests)."""
    import torch

    from canopy.models.checkpoint import load_model
    from canopy.models.config import DecoderConfig, EncoderConfig, ModelConfig
    from canopy.models.height import HeightModel

    if name not in ("large", "tiny"):
        return load_model(name)
    torch.manual_seed(0)
    if name == "large":
        return HeightModel(ModelConfig(overlap_px=64)).eval()
    encoder = EncoderConfig(dim=32, depth=4, heads=2, taps=(0, 1, 2, 3))
    decoder = DecoderConfig(post_channels=(8, 8, 8, 8), fusion=8, hidden=8, bins=8)
    return HeightModel(ModelConfig(crop_px=64, overlap_px=16, encoder=encoder, decoder=decoder)).eval()


def gemm_tflops(device: Any, dtype: Any) -> float:
    """Matrix products per second that the device really does, the best of several sizes."""
    import torch

    best = 0.0
    for side in (4096, 8192) if device.type == "cuda" else (512,):
        a, b = (torch.rand(side, side, device=device).to(dtype) for _ in range(2))
        best = max(best, 2 * side**3 / _time_of(lambda a=a, b=b: a @ b, device) / 1e12)
    return best


def _time_of(work: Any, device: Any) -> float:
    """Seconds of one call, over enough of them."""
    _settle(work, device)
    seconds, calls = SECONDS if device.type == "cuda" else SECONDS / 10, 0
    started = time.perf_counter()
    while calls < 3 or time.perf_counter() - started < seconds:
        for _ in range(3):
            work()
        calls += 3
        _wait(device)
    return (time.perf_counter() - started) / calls


def _settle(work: Any, device: Any) -> None:
    for _ in range(2):
        work()
    _wait(device)


def _wait(device: Any) -> None:
    import torch

    if device.type == "cuda":
        torch.cuda.synchronize(device)


def flops_of(model: Any) -> float:
    """Floating-point operations of one crop, two per multiply-add."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    side, counter = model.config.crop_px, FlopCounterMode(display=False)
    with torch.inference_mode(), counter:
        model(torch.full((1, 3, side, side), 0.4))
    return float(counter.get_total_flops())


# ---- forward passes ------------------------------------------------------------------------------
def passes(
    model: Any, device: Any, precision: str, mode: str, batches: list[int], flops: float, gemm: float
) -> list[dict[str, Any]]:
    """A row for every batch size that fits."""
    import torch

    from canopy.inference.backends import StaticRunner

    side, rows = model.config.crop_px, []
    for batch in batches:
        runner = StaticRunner(model, device, precision, mode=mode)
        crops = torch.rand(batch, 3, side, side, device=device)
        try:
            seconds = _time_of(lambda r=runner, c=crops: r.forward(c), device) / batch
        except torch.OutOfMemoryError:
            break
        tflops = flops / seconds / 1e12
        rows.append(
            {
                "precision": precision,
                "mode": runner.mode,
                "batch": batch,
                "images/s": 1 / seconds,
                "Mpx/s": side**2 / seconds / 1e6,
                "TFLOP/s": tflops,
                "% GEMM": 100 * tflops / gemm,
                "peak GB": torch.cuda.max_memory_allocated(device) / 1e9 if device.type == "cuda" else None,
            }
        )
    return rows


# ---- the flow ------------------------------------------------------------------------------------
def whole_map(model: Any, device: Any, precision: str, mode: str, side: int) -> dict[str, Any]:
    """A map of `side` px square through the engine's flow; windows lie ready in memory."""
    import torch

    from canopy.inference.backends import StaticRunner
    from canopy.inference.engine import Flow, Pixels, Transfer
    from canopy.inference.lattice import Canvas, Lattice, plan_windows
    from canopy.inference.layers import Extras
    from canopy.inference.predictor import Predictor
    from canopy.runtime import NoProgress

    lattice = Lattice.of_model(model.config)
    grid: Any = SimpleNamespace(height=side, width=side, origin_rc=(0, 0))
    plan, transfer = plan_windows(grid, lattice), Transfer(device)
    predictor = Predictor(model, runner=StaticRunner(model, device, precision, mode=mode))
    canvas = Canvas(plan, 1, device if device.type == "cuda" else "cpu")
    rng, ready = np.random.default_rng(0), {}

    def pixels(window: Any) -> Any:
        spans = (window.rows, window.cols)
        shape = tuple((len(s.crops) - 1) * lattice.stride_px + lattice.crop_px for s in spans)
        if shape not in ready:
            rgb = rng.integers(0, 256, (3, *shape), np.uint8).astype(np.float32) / np.float32(255)
            valid = np.ones(shape, bool)
            places = tuple((r, c) for r in range(len(spans[0].crops)) for c in range(len(spans[1].crops)))
            ready[shape] = Pixels(
                rgb, transfer.pack(rgb), valid, valid, np.zeros(shape, np.int32), places, {}
            )
        return ready[shape]

    for window in plan:  # made before the clock starts
        pixels(window)
    predictor(torch.rand(predictor.batch_size, 3, lattice.crop_px, lattice.crop_px, device=device))
    warm, mapped = predictor.seconds, 0
    waiting: list[Any] = []
    with ThreadPoolExecutor(1) as pool:
        flow = Flow(predictor, canvas, transfer, lattice, Extras(), pool, NoProgress())
        started = time.perf_counter()
        for window in plan:
            waiting += flow.feed(window, pixels(window))
            while len(waiting) > 2:  # as the engine's writer thread would
                mapped += waiting.pop(0).layers.numpy().size
        waiting += flow.end()
        mapped += sum(one.layers.numpy().size for one in waiting)
        wall = time.perf_counter() - started
    network = predictor.seconds - warm
    return {
        "precision": precision,
        "mode": mode,
        "batch": predictor.batch_size,
        "map Mpx/s": mapped / wall / 1e6,
        "km2/h": mapped * GSD_M**2 / wall * 3600 / 1e6,
        "px seen": plan.n_crops * lattice.crop_px**2 / mapped,
        "wall / network": wall / network,
    }


# ---- sameness ------------------------------------------------------------------------------------
def sameness(model: Any, device: Any, precision: str, batch: int) -> dict[str, Any]:
    """Greatest differences in metres: to fp32 on the CPU, between places of a batch, between batch sizes."""
    import torch

    from canopy.inference.backends import StaticRunner, TorchRunner

    side = model.config.crop_px
    torch.manual_seed(1)
    others = torch.rand(batch, 3, side, side)
    one = torch.nn.functional.interpolate(torch.rand(1, 3, side // 8, side // 8), scale_factor=8.0)[0]
    exact = TorchRunner(model, torch.device("cpu")).forward(torch.stack([one, one]))[0]
    runner = StaticRunner(model, device, precision, mode="eager")

    def at(place: int, size: int) -> Any:
        crops = others[:size].clone()
        crops[place] = one
        return runner.forward(crops.to(device))[place].cpu()

    first = at(0, batch)
    apart = {
        "mean to fp32, m": (first - exact).abs().mean(),
        "max to fp32, m": (first - exact).abs().max(),
        "by place, m": max((at(place, batch) - first).abs().max() for place in (batch // 2, batch - 1)),
        "by batch, m": (at(0, max(2, batch // 2)) - first).abs().max(),
    }
    return {"precision": precision, "batch": batch} | {name: float(value) for name, value in apart.items()}


# ---- all -----------------------------------------------------------------------------------------
def measure(name: str, device: Any, options: Any) -> dict[str, Any]:
    """Everything about one model."""
    import torch

    flops = flops_of(build(name))
    rows, maps, same = [], [], []
    for precision in options.precisions:
        gemm = gemm_tflops(device, torch.bfloat16 if precision == "bf16" else torch.float32)
        for mode in options.modes:
            rows += passes(build(name), device, precision, mode, options.batches, flops, gemm)
            with suppress(torch.OutOfMemoryError):
                maps.append(whole_map(build(name), device, precision, mode, options.map_px))
        same.append(sameness(build(name), device, precision, min(options.batches)))
        for row in rows:
            row.setdefault("GEMM TFLOP/s", gemm)
    crop_px = build(name).config.crop_px
    title = f"{name}: crops of {crop_px} px, {flops / 1e9:.0f} GFLOP each; {_device_name(device)}"
    common.show(f"{title}: passes", rows, [LEGEND])
    common.show(f"{title}: a map of {options.map_px} px square", maps)
    common.show(f"{title}: sameness", same)
    return {
        "model": name,
        "crop_px": crop_px,
        "gflop": flops / 1e9,
        "passes": rows,
        "map": maps,
        "same": same,
    }


def _device_name(device: Any) -> str:
    import torch

    return torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"


def main(argv: list[str] | None = None) -> None:
    parser = common.parser(__doc__)
    parser.add_argument("--models", nargs="+", default=MODELS, help="names, files, large or tiny")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--precisions", nargs="+", choices=("bf16", "fp32"))
    parser.add_argument(
        "--modes", nargs="+", default=("eager", "graph"), choices=("eager", "graph", "compile")
    )
    parser.add_argument("--batches", nargs="+", type=int)
    parser.add_argument("--map-px", type=int, help="side of the map")
    options = parser.parse_args(argv)
    from canopy.runtime import pick_device

    device = pick_device(options.device)
    cuda = device.type == "cuda"
    options.precisions = options.precisions or (["bf16", "fp32"] if cuda else ["fp32"])
    options.modes = options.modes if cuda else [mode for mode in options.modes if mode != "graph"]
    options.batches = options.batches or ([8, 16, 32, 64, 128] if cuda else [2])
    options.map_px = options.map_px or (8192 if cuda else 512)
    if not cuda and options.models == MODELS:
        options.models = ("default",)  # a ViT-L on a CPU: see throughput.py
        print("no CUDA device: the default model alone, on the CPU", file=sys.stderr)
    results = [measure(name, device, options) for name in options.models]
    kept = {key: value for key, value in vars(options).items() if key not in ("out", "child")}
    common.save(options.out, "gpu", kept | {"name": _device_name(device)}, results)


if __name__ == "__main__":
    main()
