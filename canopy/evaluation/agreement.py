"""How far two maps of one place agree: sums that are filled window by window and give every number at the
end.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from canopy.metrics import HEIGHT_BINS_M, height_bin

COVER_HEIGHTS_M = (2.0, 5.0, 10.0)
WITHIN_M = (1.0, 2.0, 5.0)
JOINT_TOP_M = 80
# Percentiles of differences are read off a histogram of this step: exact to half of it.
STEP_M = 0.05
SPAN_M = 120.0
QUANTILES = (0.05, 0.5, 0.95)


@dataclass
class PairSums:
    """Everything that is summed over the pixels valid in both maps. Differences are B - A.

    `cover[i]` holds the ground areas (A open/canopy, B open/canopy) at `thresholds[i]`, square metres.
    """

    thresholds: Sequence[float] = COVER_HEIGHTS_M
    n: int = 0
    area_m2: float = 0.0
    sums: np.ndarray = field(default_factory=lambda: np.zeros(7))  # a, b, aa, bb, ab, |d|, dd
    within: np.ndarray = field(default_factory=lambda: np.zeros(len(WITHIN_M)))
    differences: np.ndarray = field(default_factory=lambda: np.zeros(round(2 * SPAN_M / STEP_M), np.int64))
    joint: np.ndarray = field(default_factory=lambda: np.zeros((JOINT_TOP_M, JOINT_TOP_M), np.int64))
    by_height: np.ndarray = field(default_factory=lambda: np.zeros((len(HEIGHT_BINS_M), 4)))

    def __post_init__(self) -> None:
        self.cover = np.zeros((len(self.thresholds), 2, 2))

    def add(self, a: np.ndarray, b: np.ndarray, area: np.ndarray) -> None:
        """Add pixels: heights of both maps (n,) in metres and their ground area (n,) in square metres."""
        if not a.size:
            return
        a, b = a.astype(np.float64), b.astype(np.float64)
        d = b - a
        self.n += a.size
        self.area_m2 += float(area.sum())
        self.sums += [a.sum(), b.sum(), a @ a, b @ b, a @ b, np.abs(d).sum(), d @ d]
        self.within += [np.count_nonzero(np.abs(d) <= limit) for limit in WITHIN_M]
        steps = np.clip(((d + SPAN_M) / STEP_M).astype(np.int64), 0, self.differences.size - 1)
        self.differences += np.bincount(steps, minlength=self.differences.size)
        i, j = (np.clip(x, 0, JOINT_TOP_M - 1).astype(np.int64) for x in (a, b))
        self.joint += np.bincount(i * JOINT_TOP_M + j, minlength=JOINT_TOP_M**2).reshape(self.joint.shape)
        for k, threshold in enumerate(self.thresholds):
            state = (a > threshold) * 2 + (b > threshold)
            self.cover[k] += np.bincount(state, weights=area, minlength=4).reshape(2, 2)
        bins = height_bin((a + b) / 2)
        for column, weights in enumerate((None, d, np.abs(d), d * d)):
            self.by_height[:, column] += np.bincount(bins, weights, minlength=len(HEIGHT_BINS_M))

    # ---- results ------------------------------------------------------------------------------
    def overall(self) -> dict[str, float | int | None]:
        """n, area, means, mean difference, MAE, RMSE, r, percentiles, shares within 1, 2, 5 m."""
        n = self.n
        sa, sb, saa, sbb, sab, sabs, sdd = (float(v) for v in self.sums)
        va, vb, cab = saa - sa * sa / n, sbb - sb * sb / n, sab - sa * sb / n
        flat = min(va, vb) <= 1e-9 * n
        return {
            "n": n,
            "area_ha": self.area_m2 / 1e4,
            "mean_a_m": sa / n,
            "mean_b_m": sb / n,
            "mean_difference_m": (sb - sa) / n,
            "mean_absolute_difference_m": sabs / n,
            "rms_difference_m": (sdd / n) ** 0.5,
            "r": None if flat else cab / (va * vb) ** 0.5,
            **{f"p{round(100 * q):02d}_difference_m": self.quantile(q) for q in QUANTILES},
            **{f"within_{limit:g}m": float(s) / n for limit, s in zip(WITHIN_M, self.within, strict=True)},
        }

    def quantile(self, q: float) -> float:
        """Quantile of the differences, exact to half of `STEP_M`."""
        cumulated = np.cumsum(self.differences)
        index = int(np.searchsorted(cumulated, q * cumulated[-1], side="left"))
        return round((index + 0.5) * STEP_M - SPAN_M, 6)

    def cover_rows(self) -> list[dict[str, Any]]:
        """Per threshold: hectares of each combination, share of ground that agrees, and the overlap (IoU)."""
        rows = []
        for threshold, ((open_both, only_b), (only_a, both)) in zip(self.thresholds, self.cover, strict=True):
            union = only_a + only_b + both
            rows.append(
                {
                    "above_m": threshold,
                    "both_ha": both / 1e4,
                    "only_a_ha": only_a / 1e4,
                    "only_b_ha": only_b / 1e4,
                    "neither_ha": open_both / 1e4,
                    "cover_a": (only_a + both) / self.area_m2,
                    "cover_b": (only_b + both) / self.area_m2,
                    "agree": (open_both + both) / self.area_m2,
                    "iou": both / union if union > 0 else None,
                }
            )
        return rows

    def height_rows(self) -> list[dict[str, Any]]:
        """Differences by the mean height of both maps: neither side is taken for the truth."""
        rows = []
        for k, (count, d, absolute, square) in enumerate(self.by_height):
            high = HEIGHT_BINS_M[k + 1] if k + 1 < len(HEIGHT_BINS_M) else None
            rows.append(
                {
                    "low_m": HEIGHT_BINS_M[k],
                    "high_m": high,
                    "n": int(count),
                    "mean_difference_m": d / count if count else None,
                    "mean_absolute_difference_m": absolute / count if count else None,
                    "rms_difference_m": (square / count) ** 0.5 if count else None,
                }
            )
        return rows
