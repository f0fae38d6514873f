"""Whether a pixel has changed between two dates: the difference of two uncertain heights. Pure arithmetic.

With B - A the change, the interval of the difference is recovered from each map's own interval (the MOVER
method; Zou and Donner, Statistics in Medicine 27, 2008, 1693-1702, doi 10.1002/sim.3095), which needs no
symmetry of either:

    lower = (b - a) - sqrt((b - l_b)^2 + (u_a - a)^2)
    upper = (b - a) + sqrt((u_b - b)^2 + (a - l_a)^2)

The change is significant where that interval does not hold 0. Both maps' errors count as independent; errors
that two dates of one model share cancel, so for them the rule errs towards "no change".
"""

from __future__ import annotations

from dataclasses import dataclass
from statistics import NormalDist

import numpy as np

from canopy.errors import InputError
from canopy.evaluation.products import HeightWindow

# Where nothing else is known: about the RMSE of the best published models on lidar (Open-Canopy: 4.02 m).
ASSUMED_SIGMA_M = 4.0
NO_CHANGE, GAIN, LOSS, CANOPY_GAIN, CANOPY_LOSS = 1, 2, 3, 4, 5
CLASSES = {
    NO_CHANGE: "no significant change",
    GAIN: "taller",
    LOSS: "lower",
    CANOPY_GAIN: "canopy gained",
    CANOPY_LOSS: "canopy lost",
}


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
            raise InputError(
                f"{sigma_m:g} m", where=f"--sigma-{side}", expected="metres, above 0 and below 100"
            )
        return MapError(sigma_m, None, step_m, f"--sigma-{side} {sigma_m:g} m")
    if level is not None:
        return MapError(None, level, step_m, f"its own {level:.0%} interval bands")
    return MapError(
        ASSUMED_SIGMA_M, None, step_m,
        f"ASSUMED: {ASSUMED_SIGMA_M:g} m, about the RMSE of the best published models; give --sigma-{side}",
    )  # fmt: skip


def half_widths(window: HeightWindow, error: MapError, z: float) -> tuple[np.ndarray, np.ndarray]:
    """Distances (down, up) from a map's height to the ends of its interval of z standard deviations, (h,
    w).
    """
    rounding = error.step_m**2 / 12 * z**2
    if error.sigma_m is not None:
        width = np.full(window.height_m.shape, np.sqrt((z * error.sigma_m) ** 2 + rounding))
        return width, width
    if window.lower_m is None or window.upper_m is None or error.level is None:
        raise InputError("a map without interval bands", expected="height_lower and height_upper")
    factor = z / NormalDist().inv_cdf((1 + error.level) / 2)
    # A calibrated interval may leave its own height outside by rounding; a width is never negative.
    down = factor * np.maximum(window.height_m - window.lower_m, 0).astype(np.float64)
    up = factor * np.maximum(window.upper_m - window.height_m, 0).astype(np.float64)
    return np.sqrt(down**2 + rounding), np.sqrt(up**2 + rounding)


def difference_interval(
    a: HeightWindow, b: HeightWindow, errors: tuple[MapError, MapError], z: float
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Change b - a and the ends (lower, upper) of its interval of z standard deviations, float64 (h, w)
    metres.
    """
    change = b.height_m.astype(np.float64) - a.height_m
    a_down, a_up = half_widths(a, errors[0], z)
    b_down, b_up = half_widths(b, errors[1], z)
    return change, change - np.hypot(b_down, a_up), change + np.hypot(b_up, a_down)


def classify(
    a: np.ndarray, b: np.ndarray, lower: np.ndarray, upper: np.ndarray, cover_m: float
) -> np.ndarray:
    """Classes (see `CLASSES`) uint8 (h, w): only significant changes; canopy is height > `cover_m`."""
    up, down = lower > 0, upper < 0
    before, after = a > cover_m, b > cover_m
    classes = np.full(a.shape, NO_CHANGE, np.uint8)
    classes[up], classes[down] = GAIN, LOSS
    classes[up & ~before & after] = CANOPY_GAIN
    classes[down & before & ~after] = CANOPY_LOSS
    return classes


def z_of(confidence: float) -> float:
    """Two-sided normal quantile of a confidence. Raises InputError outside 0.5 to 0.9999."""
    if not 0.5 <= confidence <= 0.9999:
        raise InputError(f"{confidence:g}", where="--confidence", expected="0.5 to 0.9999")
    return NormalDist().inv_cdf((1 + confidence) / 2)
