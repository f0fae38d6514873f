"""Whether a pixel has changed between two maps.

That is told from the difference of two uncertain heights. With B - A the change, its
interval is recovered from each map's own interval (the MOVER method; Zou and Donner, Statistics in Medicine
27, 2008, 1693-1702, doi 10.1002/sim.3095), which needs no symmetry of either:

    lower = (b - a) - sqrt((b - l_b)^2 + (u_a - a)^2)
    upper = (b - a) + sqrt((u_b - b)^2 + (a - l_a)^2)

The change is significant where that interval does not hold 0. Both maps' errors count as independent; errors
that two dates of one model share cancel, so for them the rule errs towards "no change".

Bands of single pixels are about as wide as trees are tall. Maps that say how alike their errors are
(`canopy.evaluation.areas`) are judged by means over squares, whose errors are smaller: `SquareRule`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import NormalDist
from typing import Any

import numpy as np
from scipy.ndimage import maximum_filter, uniform_filter

from canopy.errors import InputError
from canopy.evaluation.areas import TAG, AreaModel, area_model_of
from canopy.evaluation.maps import HeightMap

# Where nothing else is known: about the RMSE of the best published models on lidar (Open-Canopy: 4.02 m).
ASSUMED_SIGMA_M = 4.0
# Sides of the squares of `SquareRule`, metres.
SQUARES_M = (32.0, 64.0, 100.0)
SQUARES = (
    f"its model's errors of means over squares of {', '.join(f'{side:g}' for side in SQUARES_M)} m (where "
    "both maps are of one model, without what that has wrong over whole tiles)"
)
# Of the canopy of A: beyond this share "no significant change" says more of the errors than of the trees.
_BLIND_SHARE = 0.1
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


def classify(a: np.ndarray, b: np.ndarray, up: np.ndarray, down: np.ndarray, cover_m: float) -> np.ndarray:
    """Classes (see `CHANGE_CLASSES`) uint8 (h, w) of significant changes; canopy is height > `cover_m`."""
    before, after = a > cover_m, b > cover_m
    return np.select(
        [up & ~before & after, down & before & ~after, up, down],
        [CANOPY_GAIN, CANOPY_LOSS, GAIN, LOSS], NO_CHANGE,
    ).astype(np.uint8)  # fmt: skip


@dataclass(frozen=True)
class SquareRule:
    """Change told from means over squares: 0.1, 0.4 and 1 ha.

    A pixel has changed where some square that holds it has, and its own change is at least half of the least
    significant one: squares are blurred at the edges of a clearing, pixels are not.

    Attributes:
        models: of the errors of A and B. confidence: of a change. gsd_m: of the pixels.
    """

    models: tuple[AreaModel, AreaModel]
    confidence: float
    gsd_m: float

    @property
    def sources(self) -> tuple[str, str]:
        """Where the errors of A and B came from."""
        return (SQUARES,) * 2

    @property
    def halo_px(self) -> int:
        """Pixels round a window that judging it needs."""
        return self.sides_px[-1]

    @property
    def sides_px(self) -> list[int]:
        """Odd sides of the squares."""
        return [round(side / self.gsd_m) // 2 * 2 + 1 for side in SQUARES_M]

    def judge(
        self, a: np.ndarray, b: np.ndarray, valid: np.ndarray, cover_m: float
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Heights with bands (3, h, w) of both; the outer `halo_px` pixels are for the squares alone.

        Returns:
            for the inner pixels: change, and the ends of the interval of the mean change over the square that
            tells most (3, h, w); classes (h, w); and canopy whose whole loss could not be told (h, w).
        """
        own, best = b[0] - a[0], np.zeros(valid.shape)
        up, down = np.zeros((2, *valid.shape), bool)
        ends = np.zeros((2, *valid.shape))
        for side in self.sides_px:
            share = uniform_filter(valid.astype(np.float64), side, mode="constant")

            def mean(x: np.ndarray, side: int = side, share: np.ndarray = share) -> np.ndarray:
                total = uniform_filter(np.where(valid, x, 0.0), side, mode="constant")
                return total / np.maximum(share, 1e-9)

            reach = self.reach(mean((a[2] - a[1]) / 2), mean((b[2] - b[1]) / 2), side)
            change, known = mean(own), share >= 0.5
            for found, sign in ((up, 1), (down, -1)):
                seen = maximum_filter(known & (sign * change > reach), side, mode="constant")
                found |= seen & (sign * own >= reach / 2)
            tells = np.where(known, np.abs(change) / reach, 1e-9)
            better = tells > best
            best = np.where(better, tells, best)
            ends = np.where(better, [change - reach, change + reach], ends)
        # Were all of the largest square to fall to the ground: B would be sure of that.
        blind = (a[0] > cover_m) & (mean(a[0]) <= self.reach(mean((a[2] - a[1]) / 2), np.zeros(1), side))
        inner = np.s_[..., side:-side, side:-side]
        codes = classify(a[0], b[0], up, down, cover_m)
        return np.stack([own, *ends])[inner], codes[inner], blind[inner]

    def reach(self, half_a: np.ndarray, half_b: np.ndarray, side_px: int) -> np.ndarray:
        """How far the interval of the mean change over a square extends, from mean halves of the bands."""
        side_m, square = side_px * self.gsd_m, np.ones((64, 64), bool)
        rho = (model.mean_correlation(square, side_m / 64) for model in self.models)
        return change_reach(self.models, (half_a, half_b), tuple(rho), side_m**2, self.confidence)


def change_reach(
    models: Sequence[AreaModel],
    halves: Sequence[np.ndarray],
    correlations: Sequence[float],
    area_m2: float,
    confidence: float,
) -> np.ndarray:
    """How far the interval of the mean change over an area extends on either side, metres.

    Args:
        models, halves, correlations: of A and B: errors, mean half widths of bands, mean correlations.
    """
    parts = (
        model.factor(area_m2, confidence) * model.sd(half, correlation)
        for model, half, correlation in zip(models, halves, correlations, strict=True)
    )
    return np.hypot(*parts)


def square_models(a: HeightMap, b: HeightMap) -> tuple[AreaModel, AreaModel] | None:
    """The area models of two maps, None where one has none.

    What one model has wrong over whole tiles it has wrong at both dates: it cancels, and is left out.
    """
    if not all(side.has_interval and TAG in side.tags for side in (a, b)):
        return None
    models = area_model_of(a.tags), area_model_of(b.tags)
    hashes = {side.tags.get("CANOPY_MODEL_SHA256") for side in (a, b)}
    if len(hashes) == 1 and None not in hashes:
        models = replace(models[0], plateau=0.0), replace(models[1], plateau=0.0)
    return models


@dataclass(frozen=True)
class PixelRule:
    """Change told of every pixel by itself; the interface is that of `SquareRule`.

    Attributes:
        errors: of A and B. confidence: of a change.
    """

    errors: tuple[MapError, MapError]
    confidence: float
    halo_px: int = 0

    @property
    def sources(self) -> tuple[str, str]:
        """Where the errors of A and B came from."""
        return self.errors[0].source, self.errors[1].source

    def judge(
        self, a: np.ndarray, b: np.ndarray, valid: np.ndarray, cover_m: float
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """As `SquareRule.judge`, with each pixel's own interval."""
        change, lower, upper = stored = difference_interval(a, b, self.errors, z_of(self.confidence))
        # Were it to fall to the ground, its change would be minus its height: would the interval hold 0?
        blind = (a[0] > cover_m) & (a[0] <= upper - change)
        return stored, classify(a[0], b[0], lower > 0, upper < 0, cover_m), blind


def change_rule(
    a: HeightMap, b: HeightMap, sigmas: tuple[float | None, float | None], confidence: float, gsd_m: float
) -> PixelRule | SquareRule:
    """Squares where both maps have area models and no sigma was given, else pixels.

    Raises InputError for a sigma or confidence out of range.
    """
    models = square_models(a, b) if sigmas == (None, None) else None
    if models is not None:
        return SquareRule(models, confidence, gsd_m)
    errors = (
        choose_error("a", sigmas[0], a.level, a.step_m), choose_error("b", sigmas[1], b.level, b.step_m)
    )  # fmt: skip
    return PixelRule(errors, confidence)


def z_of(confidence: float) -> float:
    """Two-sided normal quantile of a confidence. Raises InputError outside 0.5 to 0.9999."""
    if not 0.5 <= confidence <= 0.9999:
        raise InputError(f"{confidence:g}", where="--confidence", expected="0.5 to 0.9999")
    return NormalDist().inv_cdf((1 + confidence) / 2)


def change_notes(rule: Mapping[str, Any]) -> Iterator[str]:
    """What a reader must know of a rule, as compare.json has it."""
    blind = rule["undetectable_canopy_share"]
    if blind > _BLIND_SHARE:
        over, remedy = "", "predict both with --interval 0.9, so that squares are judged, or give"
        if rule["error_a"] == SQUARES:
            over, remedy = " over a hectare", "if you know what is left of errors that both share, give"
        yield (
            f"in {blind:.0%} of A's canopy not even the loss of all of it{over} would be significant: the "
            f"maps' errors are too wide; {remedy} --sigma-a and --sigma-b"
        )
    for side in "ab":
        if rule[f"error_{side}"].startswith("ASSUMED"):
            yield f"the error of {side.upper()} is {rule[f'error_{side}']}"
