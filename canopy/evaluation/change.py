"""What two maps of one place say of each other, pixel by pixel: whether it has changed, how far they agree.

Whether a pixel has changed is told from the difference of two uncertain heights. With B - A the change, its
interval is recovered from each map's own interval (the MOVER method; Zou and Donner, Statistics in Medicine
27, 2008, 1693-1702, doi 10.1002/sim.3095), which needs no symmetry of either:

    lower = (b - a) - sqrt((b - l_b)^2 + (u_a - a)^2)
    upper = (b - a) + sqrt((u_b - b)^2 + (a - l_a)^2)

The change is significant where that interval does not hold 0. Both maps' errors count as independent; errors
that two dates of one model share cancel, so for them the rule errs towards "no change".
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any

import numpy as np

from canopy import metrics
from canopy.errors import InputError
from canopy.evaluation.scores import without_nan
from canopy.metrics import COLUMN, FIELDS, HEIGHT_BINS_M, N_BINS, height_bin

# Where nothing else is known: about the RMSE of the best published models on lidar (Open-Canopy: 4.02 m).
ASSUMED_SIGMA_M = 4.0
NO_CHANGE, GAIN, LOSS, CANOPY_GAIN, CANOPY_LOSS = 1, 2, 3, 4, 5
CHANGE_CLASSES = {
    NO_CHANGE: "no significant change",
    GAIN: "taller",
    LOSS: "lower",
    CANOPY_GAIN: "canopy gained",
    CANOPY_LOSS: "canopy lost",
}


# ---- whether a pixel has changed ------------------------------------------------------------------
@dataclass(frozen=True)
class MapError:
    """How uncertain one map's pixel is.

    Attributes:
        sigma_m: standard deviation in metres; None: the map's own interval bands.
        level: nominal coverage of those bands.
        step_m: what heights are rounded to; adds a uniform error of one step.
        source: where this came from, for the report.
    """

    sigma_m: float | None
    level: float | None
    step_m: float
    source: str


def choose_error(side: str, sigma_m: float | None, level: float | None, step_m: float) -> MapError:
    """The error of a map: what the user says, else its interval bands, else the stated assumption.

    Raises InputError for a sigma that is not above 0.
    """
    if sigma_m is not None:
        if not 0 < sigma_m < 100:
            expected = "metres, above 0 and below 100"
            raise InputError(f"{sigma_m:g} m", where=f"--sigma-{side}", expected=expected)
        return MapError(sigma_m, None, step_m, f"--sigma-{side} {sigma_m:g} m")
    if level is not None:
        return MapError(None, level, step_m, f"its own {level:.0%} interval bands")
    return MapError(
        ASSUMED_SIGMA_M, None, step_m,
        f"ASSUMED: {ASSUMED_SIGMA_M:g} m, about the RMSE of the best published models; give --sigma-{side}",
    )  # fmt: skip


def half_widths(heights: np.ndarray, error: MapError, z: float) -> tuple[np.ndarray, np.ndarray]:
    """Distances (down, up) from a height to the ends of its interval of z standard deviations, (h, w).

    `heights`: metres (1, h, w), or (3, h, w) with the ends of the map's own interval.
    """
    rounding = error.step_m**2 / 12 * z**2
    if error.level is None:
        width = np.full(heights.shape[1:], np.sqrt((z * (error.sigma_m or 0)) ** 2 + rounding))
        return width, width
    factor = z / NormalDist().inv_cdf((1 + error.level) / 2)
    # A calibrated interval may leave its own height outside by rounding; a width is never negative.
    down, up = factor * np.maximum([heights[0] - heights[1], heights[2] - heights[0]], 0)
    return np.sqrt(down**2 + rounding), np.sqrt(up**2 + rounding)


def difference_interval(
    a: np.ndarray, b: np.ndarray, errors: tuple[MapError, MapError], z: float
) -> np.ndarray:
    """Change b - a and the ends (lower, upper) of its interval of z standard deviations, metres (3, h, w)."""
    change = b[0] - a[0]
    a_down, a_up = half_widths(a, errors[0], z)
    b_down, b_up = half_widths(b, errors[1], z)
    return np.stack([change, change - np.hypot(b_down, a_up), change + np.hypot(b_up, a_down)])


def classify(
    a: np.ndarray, b: np.ndarray, lower: np.ndarray, upper: np.ndarray, cover_m: float
) -> np.ndarray:
    """Classes (see `CHANGE_CLASSES`) uint8 (h, w): significant changes; canopy is height > `cover_m`."""
    up, down = lower > 0, upper < 0
    before, after = a > cover_m, b > cover_m
    return np.select(
        [up & ~before & after, down & before & ~after, up, down],
        [CANOPY_GAIN, CANOPY_LOSS, GAIN, LOSS], NO_CHANGE,
    ).astype(np.uint8)  # fmt: skip


def z_of(confidence: float) -> float:
    """Two-sided normal quantile of a confidence. Raises InputError outside 0.5 to 0.9999."""
    if not 0.5 <= confidence <= 0.9999:
        raise InputError(f"{confidence:g}", where="--confidence", expected="0.5 to 0.9999")
    return NormalDist().inv_cdf((1 + confidence) / 2)


# ---- how far two maps agree -----------------------------------------------------------------------
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
