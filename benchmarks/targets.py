"""The targets of the project beside what the benchmarks in a folder measured.

    python benchmarks/targets.py --out bench        # reads bench/*.json, writes bench/targets.json

`make bench` ends with it. A target whose benchmark has not run says so; one that is missed is no error.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import common

WASTE = 1.31  # 512 px crops every 448 px
# The results of all benchmarks by name, as `common.save` wrote them.
Results = dict[str, dict[str, Any]]


@dataclass(frozen=True)
class Target:
    """One line of the table.

    Attributes:
        what: in words; wanted: the limit in words; source: the benchmark's name.
        measure: gives (in words, met) from that benchmark's results and settings; None where they do not say.
    """

    what: str
    wanted: str
    source: str
    measure: Callable[[Any, Any], tuple[str, bool] | None]


def _faster(ways: tuple[str, ...], least: float) -> Callable[[Any, Any], tuple[str, bool] | None]:
    """ViT-L in the fastest of several ways against the loop of the same numbers, edges aside."""

    def measure(results: Any, _: Any) -> tuple[str, bool] | None:
        found = [
            (result, row)
            for result in results
            for row in result["rows"]
            if result["model"].startswith("large") and row["way"] in ways and row["x inside"]
        ]
        if not found:
            return None
        result, row = max(found, key=lambda one: one[1]["x inside"])
        words = (
            f"{row['x inside']:.2f}x: {row['what']}, {result['model']} (by processor time {row['cpu']:.2f}x; "
            f"on {result['side_px']} px with its edges {row['x loop']:.2f}x)"
        )
        return words, row["x inside"] >= least

    return measure


def _overhead(results: Any, _: Any) -> tuple[str, bool]:
    """Wall time of a job over that of its forward passes, the worst of the kinds of source."""
    row = max(results["rows"], key=lambda row: row["wall"])
    words = (
        f"{row['wall']:.3f} ({row['source']}, {row['Mpx']:.1f} Mpx; processor time {row['cpu']:.3f}; "
        f"over the passes within the job {row['in job']:.3f})"
    )
    return words, row["wall"] <= 1.05


def _seams(results: Any, _: Any) -> tuple[str, bool] | None:
    """The least step at a seam that a lattice of little enough waste leaves."""
    rows = [row for row in results["lattices"] if row["waste"] <= WASTE]
    if not rows:
        return None
    row = min(rows, key=lambda row: row["step_p999_m"])
    step = row["step_p999_m"]
    where = f"{row['lattice']}, margin {row['margin']} px"
    words = f"{step:.3f} m (99.9th percentile) at {row['waste']:.2f}x: {where}"
    return words, step < 0.1


def _memory(results: Any, _: Any) -> tuple[str, bool]:
    sides = [int(side) for side in results["sizes"]]
    growth = results["growth"]
    return f"{100 * growth:+.1f} % up to {max(sides):,} px", abs(growth) <= 0.05


def _help(results: Any, _: Any) -> tuple[str, bool]:
    row = next(row for row in results if row["command"] == "canopy --help")
    took, used = row["median wall s"], row["median cpu s"]
    return f"{took:.2f} s (processor {used:.2f} s)", took < 0.4


def _gpu(results: Any, settings: Any) -> tuple[str, bool] | None:
    """The best share of the card's matrix products, over models and modes."""
    rows = [(result["model"], row) for result in results for row in result["passes"]]
    if settings["name"] == "CPU" or not rows:
        return None
    model, row = max(rows, key=lambda one: one[1]["% GEMM"])
    words = f"{row['% GEMM']:.0f} % ({model}, {row['precision']}, {row['mode']}, {settings['name']})"
    return words, row["% GEMM"] >= 30


def _gpu_overhead(results: Any, settings: Any) -> tuple[str, bool] | None:
    """Wall over network time of the flow of a map, the best mode of the default model."""
    rows = [row for result in results if result["model"] == "default" for row in result["map"]]
    if settings["name"] == "CPU" or not rows:
        return None
    row = max(rows, key=lambda row: row["map Mpx/s"])
    words = f"{row['wall / network']:.2f} ({row['precision']}, {row['mode']}, {row['km2/h']:,.0f} km2/h)"
    return words, row["wall / network"] <= 1.10


TARGETS = [
    Target(
        "whole raster on CPU, ViT-L fp32, against the eager loop", ">= 1.4x", "throughput",
        _faster(("openvino", "torch", "onnx"), 1.4),
    ),
    Target(
        "whole raster on CPU, ViT-L int8, against dynamic int8 in the loop", ">= 2.5x", "throughput",
        _faster(("openvino-int8",), 2.5),
    ),
    Target("wall over model time, CPU, default model", "<= 1.05", "pipeline", _overhead),
    Target("wall over network time, GPU, default model", "<= 1.10", "gpu", _gpu_overhead),
    Target("share of the GPU's measured matrix products", ">= 30 %, then 50 %", "gpu", _gpu),
    Target("overlap waste <= 1.31x at seams below 0.1 m", "< 0.1 m", "seams", _seams),
    Target("growth of peak memory from 5,000 px on", "within 5 %", "memory", _memory),
    Target("`canopy --help`", "< 0.4 s", "startup", _help),
]  # fmt: skip


def read_results(folder: Path) -> Results:
    """All benchmarks' results in a folder, by name."""
    found = {}
    for path in sorted(folder.glob("*.json")):
        whole = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(whole, dict) and {"benchmark", "results"} <= set(whole):
            found[whole["benchmark"]] = whole
    return found


def judge(results: Results) -> list[dict[str, Any]]:
    """A row for every target."""
    rows = []
    for target in TARGETS:
        whole = results.get(target.source)
        found = target.measure(whole["results"], whole["settings"]) if whole else None
        rows.append({
            "target": target.what,
            "wanted": target.wanted,
            "measured": found[0] if found else "not measured",
            "met": ("yes" if found[1] else "no") if found else "-",
            "by": f"benchmarks/{target.source}.py",
        })  # fmt: skip
    return rows


def main(argv: list[str] | None = None) -> None:
    parser = common.parser(__doc__)
    options = parser.parse_args(argv)
    folder = options.out or Path("bench")
    rows = judge(read_results(folder))
    common.show("Targets", rows)
    common.save(folder, "targets", {}, rows)


if __name__ == "__main__":
    main()
