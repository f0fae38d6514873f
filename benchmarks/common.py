"""What the benchmarks share: facts about the machine, cases in turn, made-up images, tables and JSON.

A benchmark is a script with `--out DIR`. It prints one table and writes `DIR/NAME.json`:
`{"benchmark", "machine", "settings", "results"}`. What is compared is run in turn (one round of every case,
then the next round), so that a change of the machine's load meets all cases alike; ratios are of the rounds'
medians. A case that reports memory runs in a process of its own (`alone`).
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

TILE_PX = 512
# What decides how fast a network runs on a CPU.
INSTRUCTION_SETS = ("avx2", "avx512f", "avx512_vnni", "avx_vnni", "avx512_bf16", "amx_tile", "asimd", "bf16")
PACKAGES = ("canopy-height", "torch", "numpy", "rasterio", "openvino")


# ---- arguments and results ----------------------------------------------------------------------
def parser(doc: str | None) -> argparse.ArgumentParser:
    """A parser with `--out` and the hidden `--child` of `alone`."""
    made = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--out", type=Path, help="folder for the results as JSON")
    made.add_argument("--child", help=argparse.SUPPRESS)
    return made


def save(out: Path | None, name: str, settings: Mapping[str, Any], results: Any) -> dict[str, Any]:
    """The benchmark's JSON, written to `out/name.json` where a folder was given."""
    whole = {"benchmark": name, "machine": machine(), "settings": settings, "results": results}
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
        (out / f"{name}.json").write_text(json.dumps(whole, indent=2, default=str) + "\n", encoding="utf-8")
    return whole


def show(title: str, rows: Sequence[Mapping[str, Any]], notes: Iterable[str] = ()) -> None:
    """Print rows as a table, with the machine above and the notes below; columns are the first row's keys."""
    from rich.box import SIMPLE
    from rich.console import Console
    from rich.table import Table

    console = Console(width=None if sys.stdout.isatty() else 220, highlight=False)
    table = Table(
        title=title, title_justify="left", caption="\n".join(notes), caption_justify="left", box=SIMPLE
    )
    for name in rows[0] if rows else ():
        numeric = all(isinstance(row.get(name), int | float | None) for row in rows)
        table.add_column(name, justify="right" if numeric else "left", no_wrap=True)
    for row in rows:
        table.add_row(*(text(row.get(name)) for name in rows[0]))
    console.print(table)
    console.print(machine_line(), style="dim")


def text(value: Any) -> str:
    """A number as a table shows it: three significant digits, whole numbers whole."""
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)


# ---- the machine --------------------------------------------------------------------------------
def machine() -> dict[str, Any]:
    """What a reader needs to judge a number: processor, instruction sets, load, versions, commit."""
    facts = _cpu_facts()
    return {
        "cpu": facts["name"],
        "cpus": os.process_cpu_count() if hasattr(os, "process_cpu_count") else os.cpu_count(),
        "instruction_sets": facts["sets"],
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "versions": {name: version for name in PACKAGES if (version := _version(name))},
        "threads": os.environ.get("OMP_NUM_THREADS", "all"),
        "load_1min": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
        "commit": _commit(),
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


def machine_line() -> str:
    """`machine()` in a line."""
    m = machine()
    return (
        f"{m['cpu']}, {m['cpus']} CPUs ({', '.join(m['instruction_sets'])}), threads {m['threads']}, "
        f"load {m['load_1min']}; torch {m['versions'].get('torch')}; commit {m['commit']}"
    )


def _cpu_facts() -> dict[str, Any]:
    lines: dict[str, str] = {}
    info = Path("/proc/cpuinfo")
    for line in info.read_text().splitlines() if info.exists() else ():
        key, _, value = line.partition(":")
        lines.setdefault(key.strip(), value.strip())
    flags = (lines.get("flags") or lines.get("Features") or "").split()
    return {
        "name": lines.get("model name") or platform.processor() or platform.machine(),
        "sets": [name for name in INSTRUCTION_SETS if name in flags],
    }


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _commit() -> str:
    here = Path(__file__).resolve().parent
    try:
        found = subprocess.run(
            ["git", "describe", "--always", "--dirty"], cwd=here, capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return found.stdout.strip()


# ---- running ------------------------------------------------------------------------------------
def alone(script: str, case: Mapping[str, Any]) -> dict[str, Any]:
    """Run one case in a new process: `script --child CASE`, whose last line of stdout is its JSON result.

    Raises:
        RuntimeError: it failed; the end of its stderr is in the message.
    """
    done = subprocess.run(
        [sys.executable, script, "--child", json.dumps(case)], capture_output=True, text=True
    )
    if done.returncode:
        raise RuntimeError(f"{Path(script).name} {dict(case)} failed:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def in_turn(
    cases: Mapping[str, Callable[[], dict[str, Any]]], rounds: int
) -> dict[str, list[dict[str, Any]]]:
    """Results of every case, round by round; a line on stderr for each."""
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in cases}
    for number in range(rounds):
        for name, run in cases.items():
            started = time.perf_counter()
            found[name].append(run())
            took = time.perf_counter() - started
            print(f"  round {number + 1}/{rounds}, {name}: {took:.1f} s", file=sys.stderr, flush=True)
    return found


def middle(runs: Sequence[Mapping[str, Any]], key: str) -> float:
    """Median of `key` over the rounds."""
    return float(statistics.median(run[key] for run in runs))


class Clock:
    """Wall and processor seconds since it was made; processor time counts all threads and ended children."""

    def __init__(self) -> None:
        self._wall, self._cpu = time.perf_counter(), _cpu_seconds()

    def read(self) -> dict[str, float]:
        """`wall_s` and `cpu_s`."""
        return {
            "wall_s": round(time.perf_counter() - self._wall, 3),
            "cpu_s": round(_cpu_seconds() - self._cpu, 3),
        }


def _cpu_seconds() -> float:
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


def peak_mb() -> float:
    """Highest resident memory of this process so far, in MB of 2^20 bytes."""
    status = Path("/proc/self/status")
    if status.exists():
        # Not ru_maxrss, which a new process inherits from the one that started it.
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return round(int(line.split()[1]) / 1024)
    divisor = 2**20 if sys.platform == "darwin" else 2**10
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / divisor)


# ---- images -------------------------------------------------------------------------------------
def make_image(path: Path, side: int, *, compress: str = "jpeg", every_px: int = 0) -> Path:
    """A tiled RGB GeoTIFF of the synthetic forest, `side` px square; one 512 px tile of it is repeated.

    Args:
        path: the file.
        side: pixels of 0.5 m.
        compress: jpeg, or deflate for exact values.
        every_px: only one tile every so many pixels is filled, the rest is nodata (0, no block is written);
            0 fills all. For large rasters and slow networks.
    """
    import rasterio
    from rasterio.windows import Window

    block = forest(TILE_PX)
    profile: dict[str, Any] = {
        "driver": "GTiff", "width": side, "height": side, "count": 3, "dtype": "uint8",
        "crs": "EPSG:32618", "transform": rasterio.Affine(0.5, 0, 500_000, 0, -0.5, 4_900_000), "tiled": True,
        "blockxsize": TILE_PX, "blockysize": TILE_PX, "compress": compress, "sparse_ok": True,
    }  # fmt: skip
    if compress == "jpeg":
        profile |= {"photometric": "ycbcr"}
    if every_px:
        profile |= {"nodata": 0}
    with rasterio.open(path, "w", **profile) as dataset:
        for row in range(0, side, TILE_PX):
            for col in range(0, side, TILE_PX):
                if every_px and (row % every_px >= TILE_PX or col % every_px >= TILE_PX):
                    continue
                height, width = min(TILE_PX, side - row), min(TILE_PX, side - col)
                dataset.write(block[:, :height, :width], window=Window(col, row, width, height))
    return path


@functools.cache
def forest(side: int) -> Any:
    """RGB uint8 (3, side, side) of the synthetic forest; no pixel is 0,0,0. Not to be written to."""
    import numpy as np

    from canopy.synth.forest import SceneSpec
    from canopy.synth.render import render

    return np.maximum(render(SceneSpec(gsd_m=0.5), 300.0, 300.0, side, side).rgb, 1)


def cheap_model() -> Any:
    """Height = 30 x green, for the torch backend: no work for a network, but all the reading and writing."""
    import torch

    from canopy.models.config import DecoderConfig, EncoderConfig, ModelConfig
    from canopy.models.height import HeightModel

    class Cheap(HeightModel):
        def layers(self, rgb: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
            return 30 * rgb[:, 1:2]

    # What it says to be is only counted, for the estimate of time.
    encoder = EncoderConfig(dim=32, depth=4, heads=2, taps=(0, 1, 2, 3), layer_scale=None)
    decoder = DecoderConfig(post_channels=(8, 8, 8, 8), fusion=8, hidden=8, bins=8)
    return Cheap(ModelConfig(gsd_m=0.5, crop_px=256, encoder=encoder, decoder=decoder)).eval()
