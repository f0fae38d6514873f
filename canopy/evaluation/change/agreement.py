"""Everything that is summed over two maps' common pixels: how far they agree."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from canopy import metrics
from canopy.evaluation.scores import without_nan
from canopy.metrics import COLUMN, FIELDS, HEIGHT_BINS_M, N_BINS, height_bin

WITHIN_M = (1.0, 2.0, 5.0)
JOINT_TOP_M = 80
# Percentiles of differences are read off a histogram of this step: exact to half of it.
STEP_M = 0.05
SPAN_M = 120.0
QUANTILES = (0.05, 0.5, 0.95)


class PairSums:
    """Everything that is summed over the pixels valid in both maps. Differences are B - A.

    `rows` are sums of `canopy.metrics` (B the map, A the reference) by the mean height of both: neither side
    is taken for the truth. `cover[i]` holds the ground areas (A open/canopy, B open/canopy) at
    `thresholds[i]`, square metres.
    """

    def __init__(self, thresholds: Sequence[float]) -> None:
        self.thresholds = thresholds
        self.rows = np.zeros((N_BINS, len(FIELDS)))
        self.within = np.zeros(len(WITHIN_M))
        self.differences = np.zeros(round(2 * SPAN_M / STEP_M), np.int64)
        self.joint = np.zeros((JOINT_TOP_M, JOINT_TOP_M), np.int64)
        self.cover = np.zeros((len(thresholds), 2, 2))

    @property
    def n(self) -> int:
        """Pixels."""
        return int(self.rows[:, COLUMN["n"]].sum())

    def add(self, a: np.ndarray, b: np.ndarray, area: np.ndarray) -> None:
        """Add pixels: heights of both maps (n,) in metres and their ground area (n,) in square metres."""
        self.rows += metrics.pixel_sums(b, a, height_bin((a + b) / 2), N_BINS)
        self.within += [np.count_nonzero(np.abs(b - a) <= limit) for limit in WITHIN_M]
        steps = np.clip(((b - a + SPAN_M) / STEP_M).astype(np.int64), 0, self.differences.size - 1)
        self.differences += np.bincount(steps, minlength=self.differences.size)
        i, j = (np.clip(x, 0, JOINT_TOP_M - 1).astype(np.int64) for x in (a, b))
        self.joint += np.bincount(i * JOINT_TOP_M + j, minlength=JOINT_TOP_M**2).reshape(self.joint.shape)
        for k, threshold in enumerate(self.thresholds):
            state = (a > threshold) * 2 + (b > threshold)
            self.cover[k] += np.bincount(state, weights=area, minlength=4).reshape(2, 2)

    def overall(self) -> dict[str, Any]:
        """n, area, means, mean difference, MAE, RMSE, r, percentiles, shares within 1, 2, 5 m."""
        total, n = self.rows.sum(axis=0), self.n
        scores = metrics.scores(total)
        cumulated = np.cumsum(self.differences)
        at = np.searchsorted(cumulated, np.multiply(QUANTILES, n), side="left")
        quantiles = ((at + 0.5) * STEP_M - SPAN_M).round(6)
        return without_nan({
            "n": n,
            "area_ha": self.cover[0].sum() / 1e4,
            "mean_a_m": total[COLUMN["r"]] / n,
            "mean_b_m": total[COLUMN["p"]] / n,
            "mean_difference_m": scores["bias_m"].item(),
            "mean_absolute_difference_m": scores["mae_m"].item(),
            "rms_difference_m": scores["rmse_m"].item(),
            "r": scores["r"].item(),
            **{f"p{100 * q:02.0f}_difference_m": v for q, v in zip(QUANTILES, quantiles, strict=True)},
            **{f"within_{limit:g}m": s / n for limit, s in zip(WITHIN_M, self.within, strict=True)},
        })  # fmt: skip

    def cover_rows(self) -> list[dict[str, Any]]:
        """Per threshold: hectares of each combination, share of ground that agrees, and the overlap (IoU)."""
        rows = []
        for threshold, cover in zip(self.thresholds, self.cover.tolist(), strict=True):
            (neither, only_b), (only_a, both) = cover
            total, union = neither + only_b + only_a + both, only_a + only_b + both
            rows.append({
                "above_m": threshold,
                "both_ha": both / 1e4,
                "only_a_ha": only_a / 1e4,
                "only_b_ha": only_b / 1e4,
                "neither_ha": neither / 1e4,
                "cover_a": (only_a + both) / total,
                "cover_b": (only_b + both) / total,
                "agree": (neither + both) / total,
                "iou": both / union if union > 0 else None,
            })  # fmt: skip
        return rows

    def height_rows(self) -> list[dict[str, Any]]:
        """Differences by the mean height of both maps."""
        scores = metrics.scores(self.rows)
        columns = ("bias_m", "mae_m", "rmse_m")
        names = ("mean_difference_m", "mean_absolute_difference_m", "rms_difference_m")
        return [
            {
                "low_m": low, "high_m": high, "n": int(scores["n"][k]),
                **{name: without_nan(scores[c][k]) for name, c in zip(names, columns, strict=True)},
            }
            for k, (low, high) in enumerate(zip(HEIGHT_BINS_M, [*HEIGHT_BINS_M[1:], None], strict=True))
        ]  # fmt: skip
