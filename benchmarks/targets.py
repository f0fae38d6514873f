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

# The results of all benchmarks by name, as `common.save` wrote them.
Results = dict[str, dict[str, Any]]


@dataclass(frozen=True)
class Target:
    """One line of the table.

    Attributes:
        what: in words; wanted: the limit in words; source: the benchmark's name.
        measure: gives (in words, met) from that benchmark's results; None where they do not say.
    """

    what: str
    wanted: str
    source: str
    measure: Callable[[Any], tuple[str, bool] | None]


def _faster(ways: tuple[str, ...], least: float) -> Callable[[Any], tuple[str, bool] | None]:
    """ViT-L in the fastest of several ways against the loop of the same numbers, edges aside."""

    def measure(results: Any) -> tuple[str, bool] | None:
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
            f"{row['x inside']:.2f}x: {row['what']}, {result['model']} (processor {row['x cpu']:.2f}x; "
            f"on {result['side_px']} px with its edges {row['x loop']:.2f}x)"
        )
        return words, row["x inside"] >= least

    return measure


def _memory(results: Any) -> tuple[str, bool]:
    sides = [int(side) for side in results["sizes"]]
    growth = results["growth"]
    return f"{100 * growth:+.1f} % up to {max(sides):,} px", abs(growth) <= 0.05


def _help(results: Any) -> tuple[str, bool]:
    row = next(row for row in results if row["command"] == "canopy --help")
    return f"{row['wall s']:.2f} s (processor {row['cpu s']:.2f} s)", row["wall s"] < 0.4


TARGETS = [
    Target(
        "whole raster on CPU, ViT-L fp32, against the eager loop", ">= 1.4x", "throughput",
        _faster(("openvino", "torch"), 1.4),
    ),
    Target(
        "whole raster on CPU, ViT-L int8, against dynamic int8 in the loop", ">= 2.5x", "throughput",
        _faster(("openvino-int8",), 2.5),
    ),
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
        found = target.measure(whole["results"]) if whole else None
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
