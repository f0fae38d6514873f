"""Fitting intervals: how far the truth lies from a prediction, read off held-out ground.

The network's own spread is a hint, not a probability. So for a pixel of predicted height h and spread s, the
errors of held-out cells with like h and like s say how far the truth may lie below and above. This is
split conformal prediction (Vovk et al. 2005), conditional on (h, s) by hat functions on a lattice of knots
(Mondrian classes with soft edges; Guan 2023). The exchangeable unit is a block of ground, not a pixel
(hierarchical conformal prediction: Lee, Barber and Willett 2023): a band counts as wide enough only if it
holds its share of the errors of K blocks and of an imaginary further one whose errors are all infinite. Both
ends move out together, tail by tail, as nested sets (Gupta, Kuchibhotla and Ramdas 2022). Where the lower end
reaches the ground, nothing can lie below it, and the whole risk goes to the upper end. Where the tallest
trees are predicted as usual ones, nearly all of it goes to the lower end: equal tails would leave out just
these.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np

from canopy.calibration.collect import BLOCK_M, Cells
from canopy.errors import DataError
from canopy.models.intervals import LEVELS, SOFT_M, IntervalTable, dense_hats, hats

HEIGHT_CLASSES_M = (0.0, 0.5, 2.0, 5.0, 10.0, 15.0, 20.0, 25.0, 30.0, 40.0, 60.0)
_KNOTS_M = (0.0, 0.25, 0.5, 1, 2, 4, 7, 10, 13, 16, 18, 20, 22, 24, 26, 28, 30, 33, 36, 40)
_SPREAD_QUANTILES = (0.1, 0.5, 0.9)
# A knot needs this many effective blocks, else its neighbours take its cells.
_LEAST_BLOCKS = 25.0
_LEAST_HINTED = 10.0  # 1 in 11 blocks imagined leaves just enough for bands of 90 %
_LEAST_CLASS = 200
_MOST_M = 60.0
# Share of the risk above the upper end, by predicted height, in bands that are to hold nearly always. Of
# cells that are predicted as 15 to 25 m some 4 % are really over 30 m, of those of 5 m next to none.
_UNEQUAL_FROM = 0.9
_ABOVE_AT_M, _ABOVE = (10.0, 16.0), (0.5, 0.05)


def fit_intervals(cells: Cells) -> IntervalTable:
    """Read the table off held-out cells.

    Raises:
        DataError: too few blocks for any knot.
    """
    h, s, y = (np.asarray(v, np.float64) for v in (cells.height_m, cells.spread_m, cells.truth_m))
    knots = _choose_knots(h, cells.block)
    near = _by_knot(knots, h)
    typical = np.array([np.quantile(s[at], 0.5, weights=w, method="inverted_cdf") for at, w in near])
    relative = np.log((s + SOFT_M) / (np.interp(h, knots, typical) + SOFT_M))
    spread = np.unique(np.round(np.quantile(relative, _SPREAD_QUANTILES), 4))
    below, above = (np.zeros((len(LEVELS), len(knots), len(spread))) for _ in range(2))
    for i, (at, by_height) in enumerate(near):
        hat_v = dense_hats(spread, relative[at])
        for j in range(len(spread)):
            weight = by_height * hat_v[:, j]
            if effective_blocks(weight, cells.block[at]) < _LEAST_HINTED:
                weight = by_height  # hardly any cell of this height has such a spread
            some = weight > 1e-6
            chosen = at[some]
            ends = _tails(y[chosen] - h[chosen], weight[some], cells.block[chosen], float(knots[i]))
            below[:, i, j], above[:, i, j] = ends
    # Wider levels contain narrower ones.
    below, above = (np.maximum.accumulate(t, axis=0) for t in (below, above))
    return IntervalTable(np.array(LEVELS), knots, typical, spread, below, above)


def _tails(
    error: np.ndarray, weight: np.ndarray, block: np.ndarray, height_m: float
) -> tuple[np.ndarray, np.ndarray]:
    """Distances below and above (levels,) for the errors truth - prediction round one knot."""
    order = np.argsort(error)
    ranked, mass = error[order].tolist(), np.cumsum(weight[order]) / weight.sum()
    last = len(ranked) - 1
    share = 1.0 / (1.0 + effective_blocks(weight, block))  # the imaginary block's
    below, above = np.zeros(len(LEVELS)), np.zeros(len(LEVELS))
    for n, level in enumerate(LEVELS):
        # Both ends move out together until the known blocks inside outweigh what is wanted of all.
        risk = 1 - min(1.0, level / (1 - share))
        high = risk * float(np.interp(height_m, _ABOVE_AT_M, _ABOVE)) if level >= _UNEQUAL_FROM else risk / 2
        below[n] = max(0.0, -ranked[min(int(np.searchsorted(mass, risk - high, side="left")), last)])
        if below[n] >= height_m:  # the ground: nothing can be lower
            high = risk
        above[n] = max(0.0, ranked[min(int(np.searchsorted(mass, 1 - high, side="left")), last)])
    return np.minimum(below, _MOST_M), np.minimum(above, _MOST_M)


def effective_blocks(weight: np.ndarray, block: np.ndarray) -> float:
    """(sum W)^2 / sum W^2 over the blocks' summed weights: as many equal blocks say as much."""
    sums = np.bincount(block, weight)
    return float(sums.sum() ** 2 / max((sums**2).sum(), 1e-30))


def _choose_knots(height_m: np.ndarray, block: np.ndarray) -> np.ndarray:
    """The knots round which enough blocks have cells; dropping one widens its neighbours."""
    knots, blocks = list(_KNOTS_M), int(block.max(initial=0)) + 1
    while len(knots) > 1:
        sums = np.zeros(len(knots) * blocks)
        for i, w in hats(np.array(knots), height_m):
            sums += np.bincount(i * blocks + block, w, len(sums))
        table = sums.reshape(len(knots), blocks)
        counts = table.sum(axis=1) ** 2 / np.maximum((table**2).sum(axis=1), 1e-30)
        worst = int(np.argmin(counts))
        if counts[worst] >= _LEAST_BLOCKS:
            return np.array(knots)
        del knots[worst]
    raise DataError(
        f"too little held-out ground: {effective_blocks(np.ones(len(block)), block):.0f} blocks",
        expected=f"at least {_LEAST_BLOCKS:.0f} blocks of {BLOCK_M} m",
        remedy="give more chips with --data, or other --splits",
    )


def _by_knot(knots: np.ndarray, x: np.ndarray) -> list[tuple[np.ndarray, np.ndarray]]:
    """For every knot the numbers of the values that its hat function reaches, and their weights."""
    pairs = hats(knots, x)
    number = np.concatenate([i for i, _ in pairs])
    weight = np.concatenate([w for _, w in pairs])
    order = np.argsort(number, kind="stable")
    order = order[weight[order] > 0]
    edges = np.searchsorted(number[order], np.arange(len(knots) + 1))
    parts = [order[a:b] for a, b in itertools.pairwise(edges.tolist())]
    return [(part % len(x), weight[part]) for part in parts]


def coverage(ways: Sequence[tuple[IntervalTable, Cells]], level: float = 0.9) -> dict[str, Any]:
    """How often the truth lies inside, and how wide the bands are, of cells with their tables; JSON-ready.

    Returns:
        `overall`, `by_height` and `by_truth` (classes of predicted and of true height with at least 200
        cells), each with n, coverage, below (share of truths under the band), above, and mean_width_m. Bands
        promise nothing about true heights, which nobody knows beforehand.
    """
    bounds = [table.bounds(cells.height_m, cells.spread_m, level) for table, cells in ways]
    lower, upper = (np.concatenate(ends) for ends in zip(*bounds, strict=True))
    height, truth = (np.concatenate([getattr(c, n) for _, c in ways]) for n in ("height_m", "truth_m"))
    below, above, width = truth < lower, truth > upper, upper - lower

    def row(at: np.ndarray | slice) -> dict[str, float]:
        under, over = float(below[at].mean()), float(above[at].mean())
        return {
            "n": len(below[at]), "coverage": round(1 - under - over, 4), "below": round(under, 4),
            "above": round(over, 4), "mean_width_m": round(float(width[at].mean()), 2),
        }  # fmt: skip

    found: dict[str, Any] = {"level": level, "overall": row(np.s_[:])}
    for name, heights in (("by_height", height), ("by_truth", truth)):
        classes = {
            f"{low:g}-{high:g}": (heights >= low) & (heights < high)
            for low, high in itertools.pairwise(HEIGHT_CLASSES_M)
        }
        found[name] = {key: row(at) for key, at in classes.items() if at.sum() >= _LEAST_CLASS}
    return found
