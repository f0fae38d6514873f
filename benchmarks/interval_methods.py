"""Which hint makes the best bands: `python benchmarks/interval_methods.py PACK [--model MODEL]`.

Spread of the bin weights, their quantiles (conformalised), and the spread over flips and turns, on the
val chips, each half verified with the calibration of the other. What counts: mean width at equal coverage,
and how evenly coverage falls on heights, on wide and narrow bands, and on tiles.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import common
import numpy as np

from canopy.calibration.collect import Scored, cells_of, halves, load_chips, predict_chips
from canopy.calibration.intervals import coverage, fit_intervals, pooled
from canopy.models.checkpoint import load_model
from canopy.models.heads import METHODS

LEVEL = 0.9


def main(argv: list[str] | None = None) -> None:
    parser = common.parser(__doc__)
    parser.add_argument("pack", type=Path)
    parser.add_argument("--model", default="default", help="one that has not seen the val chips")
    parser.add_argument("--methods", default=",".join(METHODS))
    parser.add_argument("--every", type=int, default=1, help="take every n-th chip of a site")
    options = parser.parse_args(argv)
    model, (chips, _) = load_model(options.model), load_chips(options.pack, ("val",))
    sites = {c.row.site: [d for d in chips if d.row.site == c.row.site] for c in chips}
    chips = [chip for found in sites.values() for chip in found[:: options.every]]
    found: dict[str, dict[str, Any]] = {}
    for method in options.methods.split(","):
        started = time.perf_counter()
        scored = list(predict_chips(model, chips, method=method))
        seconds = (time.perf_counter() - started) / len(chips)
        found[method] = compare(scored, method) | {"seconds_per_chip": round(seconds, 2)}
    common.show(f"{100 * LEVEL:.0f} % bands on {len(chips)} chips", [_row(*item) for item in found.items()])
    common.save(options.out, "interval_methods", {"model": options.model, "every": options.every}, found)


def compare(scored: Sequence[Scored], method: str) -> dict[str, Any]:
    """Numbers of one method, from both halves."""
    one, two = halves(scored)
    inside, width, tile, n = [], [], [], 0
    others: dict[float, list[dict[str, Any]]] = {0.8: [], LEVEL: [], 0.95: []}
    for known, unseen in ((one, two), (two, one)):
        table, cells = fit_intervals(cells_of(known), method=method), cells_of(unseen)
        for level, rows in others.items():
            rows.append(coverage(table, cells, level))
        lower, upper = table.bounds(cells.height_m, table.hint_of(cells.hint_m, LEVEL), LEVEL)
        inside.append((cells.truth_m >= lower) & (cells.truth_m <= upper))
        width.append(upper - lower)
        tile.append(cells.chip + n)
        n += len(unseen)
    held, wide, number = (np.concatenate(v) for v in (inside, width, tile))
    thirds = np.digitize(wide, np.quantile(wide, (1 / 3, 2 / 3)))
    by_tile = [held[number == t].mean() for t in range(n) if (number == t).sum() > 5000]
    table = pooled(others[LEVEL])
    levels = [pooled(rows)["overall"] for rows in others.values()]
    equal = np.interp(LEVEL, [row["coverage"] for row in levels], [row["mean_width_m"] for row in levels])
    return {
        "overall": table["overall"],
        "width_at_equal_coverage_m": round(float(equal), 2),
        "by_height": {k: row["coverage"] for k, row in table["by_height"].items()},
        "by_width_third": [round(float(held[thirds == t].mean()), 4) for t in range(3)],
        "tiles_sd": round(float(np.std(by_tile)), 4), "tiles_worst": round(float(min(by_tile)), 4),
    }  # fmt: skip


def _row(method: str, result: dict[str, Any]) -> dict[str, Any]:
    heights = result["by_height"].values()
    return {
        "method": method, "coverage %": round(100 * result["overall"]["coverage"], 1),
        "width m": result["overall"]["mean_width_m"],
        f"width m at {100 * LEVEL:.0f} %": result["width_at_equal_coverage_m"],
        "by height %": f"{100 * min(heights):.1f} to {100 * max(heights):.1f}",
        "by width third %": ", ".join(f"{100 * v:.1f}" for v in result["by_width_third"]),
        "tiles: sd, worst %": f"{100 * result['tiles_sd']:.1f}, {100 * result['tiles_worst']:.1f}",
        "s/chip": result["seconds_per_chip"],
    }  # fmt: skip


if __name__ == "__main__":
    main()
