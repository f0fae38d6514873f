"""The two GEDI corrections: the published scalar, and a monotone, spatially varying, shrunken curve.

The curve of `canopy.calibration.monotone` is not taken as it comes: every change is weighed against its own
standard error (bootstrap over blocks of ground, and the fit's covariance, whichever is larger) by the
non-negative garrote of Breiman (1995), d -> d max(0, 1 - (z0 se / d)^2), and a curve that nowhere differs
clearly from none is dropped. What cannot be told from no change becomes no change, exactly; clear changes
stay almost whole.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from canopy.calibration.discs import Footprints
from canopy.calibration.monotone import Trend, fit_monotone, nodes_for
from canopy.errors import ConfigError, DataError

METHODS = ("spline", "scalar")
LEAST_SHOTS = 20
GRID_M = np.arange(0.0, 60.01, 0.25)
# A change must be this many standard errors before any of it is made.
_GARROTE_Z = 2.5
# Some height must change by this many: among a dozen knots, one passes 2.5 by chance too often.
_CLEAR_Z = 3.5
# No height changes by more than this share of itself, or this many metres where that is more.
_CAP_SHARE, _CAP_M = 0.75, 1.0
_REPLICATES, _REPLICATE_STEPS = 24, 15
_FOLDS = 5
_PERCENTILES = np.arange(50, 100, 5)


@dataclass(frozen=True)
class Correction:
    """A correction of heights; 0 m stays 0 m and order is kept.

    Attributes:
        method: "spline" or "scalar".
        level_m: corrected heights at `GRID_M`, without the trend.
        se_m: their standard errors.
        trend: relative change by place.
        trend_se: standard error of the relative change at each node, the shape of `trend.values`.
        facts: JSON-ready numbers about the fit.
    """

    method: str
    level_m: np.ndarray
    se_m: np.ndarray
    trend: Trend
    trend_se: np.ndarray
    facts: dict[str, Any]

    def heights(self, map_m: np.ndarray, factor: np.ndarray | float) -> np.ndarray:
        """Corrected heights; `factor` is 1 + the trend at each."""
        level = np.interp(map_m, GRID_M, self.level_m) + self._beyond(map_m)
        cap = np.maximum(_CAP_SHARE * map_m, np.minimum(_CAP_M, map_m))
        return np.clip(level * factor, map_m - cap, map_m + cap)

    def errors(self, map_m: np.ndarray, trend_se: np.ndarray | float) -> np.ndarray:
        """Standard error of the corrected heights, metres; 0 at 0 m."""
        level_se = np.interp(map_m, GRID_M, self.se_m)
        return np.hypot(level_se, map_m * trend_se)

    def __call__(self, map_m: np.ndarray, xy_m: np.ndarray) -> np.ndarray:
        """Corrected heights (n,) of heights (n,) at places (n, 2)."""
        return self.heights(map_m, 1 + self.trend.at(xy_m))

    def _beyond(self, map_m: np.ndarray) -> np.ndarray:
        slope = self.level_m[-1] / GRID_M[-1] if self.method == "scalar" else 1.0
        return np.maximum(map_m - GRID_M[-1], 0) * slope


def fit_correction(shots: Footprints, method: str = "spline", *, spacing_m: float = 5_000.0) -> Correction:
    """Fit one of the `METHODS`.

    Raises:
        ConfigError: an unknown method. DataError: fewer than `LEAST_SHOTS` shots.
    """
    if method not in METHODS:
        raise ConfigError(f"unknown method {method!r}", where="--method", expected=" or ".join(METHODS))
    if len(shots) < LEAST_SHOTS:
        raise DataError(
            f"{len(shots)} shots on the map",
            expected=f"at least {LEAST_SHOTS}",
            remedy="use shots of a larger area or a looser filter",
        )
    return _scalar(shots) if method == "scalar" else _spline(shots, spacing_m)


def _scalar(shots: Footprints) -> Correction:
    """One factor that matches the percentiles of map and shots (as published: Tolan et al. 2024).

    It uses the reported places and every shot, as the published one does. It cannot lift zeros.
    """
    known = shots.take(np.isfinite(shots.reported_m))
    factor = _factor(known)
    draws = [_factor(known.take(np.repeat(np.arange(len(known)), times))) for times in _resamples(known)]
    error = float(np.std(draws, ddof=1))
    none = Trend((0.0, 0.0), 1.0, np.zeros((1, 1)))
    facts = {"factor": round(factor, 4), "factor_se": round(error, 4), "shots": len(shots)}
    return Correction("scalar", GRID_M * factor, GRID_M * error, none, np.zeros((1, 1)), facts)


def _factor(shots: Footprints) -> float:
    """Least squares through 0 of the shots' percentiles on the map's; 1 where the map has nothing."""
    observed, mapped = (np.percentile(v, _PERCENTILES) for v in (shots.height_m, shots.reported_m))
    return float(observed @ mapped / max(mapped @ mapped, 1e-9)) if mapped.any() else 1.0


def _spline(shots: Footprints, spacing_m: float) -> Correction:
    trend = nodes_for(shots.xy_m, spacing_m)
    fit = fit_monotone(shots, trend)
    # Refits of the same shots, begun at their fit.
    draws = [
        fit_monotone(shots, trend, weights=times.astype(np.float64), start=fit, steps=_REPLICATE_STEPS)
        for times in _resamples(shots)
    ]
    levels = np.stack([draw.level(GRID_M) for draw in draws])
    spread = np.maximum(fit.sd_m(GRID_M), levels.std(axis=0, ddof=1))
    trend_se = np.stack([draw.trend.values for draw in draws]).std(axis=0, ddof=1)
    change = _garrote(fit.level(GRID_M) - GRID_M, spread)
    if shots.gap is not None:
        # The curve is one of what discs should show; pixels change by the same share as their discs.
        expected = shots.gap.expected(GRID_M)
        share = np.divide(GRID_M, expected, out=np.ones_like(GRID_M), where=expected > 0)
        change = np.interp(expected, GRID_M, change) * share
        spread = np.interp(expected, GRID_M, spread) * share
    # The garrote may bend the curve back where evidence ends: heights must not change places.
    level = np.maximum.accumulate(np.maximum(GRID_M + change, 0.0))
    level[0] = 0.0
    # The ridge has shrunk the trend already: here only the gate counts, and what is within its error.
    values = _garrote(fit.trend.values, np.maximum(trend_se, 1e-6), z0=1.0)
    facts = {
        "shots": len(shots),
        "outlier_share": round(fit.outliers, 4),
        "noise_m": round(fit.noise_m, 3),
        "trend_nodes": list(trend.values.shape),
        "trend_range": [round(float(values.min()), 4), round(float(values.max()), 4)],
    }
    return Correction(
        "spline", level, spread, Trend(trend.origin_m, trend.spacing_m, values), trend_se, facts
    )


def _garrote(change: np.ndarray, error: np.ndarray, z0: float = _GARROTE_Z) -> np.ndarray:
    z = np.divide(np.abs(change), error, out=np.zeros(change.shape), where=error > 0)
    if z.max(initial=0.0) < _CLEAR_Z:
        return np.zeros(change.shape)
    return change * np.maximum(0.0, 1.0 - (z0 / np.maximum(z, 1e-9)) ** 2)


def _resamples(shots: Footprints) -> Iterator[np.ndarray]:
    """`_REPLICATES` times (n,) how often each shot counts when blocks are drawn with replacement."""
    rng = np.random.default_rng(0)
    block = blocks_of(shots.xy_m)
    count = int(block.max()) + 1
    for _ in range(_REPLICATES):
        yield np.bincount(rng.integers(0, count, count), minlength=count)[block]


def blocks_of(xy_m: np.ndarray) -> np.ndarray:
    """(n,) number of the block of ground each shot lies in: about 64 blocks, of at least 120 m."""
    span = np.ptp(xy_m, axis=0)
    side = max(120.0, float(np.sqrt(max(span[0], 1.0) * max(span[1], 1.0)) / 8))
    cells = np.floor((xy_m - xy_m.min(axis=0)) / side).astype(np.int64)
    _, block = np.unique(cells, axis=0, return_inverse=True)
    return block.ravel()


def held_out(shots: Footprints, *, spacing_m: float = 5_000.0) -> dict[str, Any]:
    """Scores of no correction, the scalar and the spline on shots that their fit has not seen.

    Blocks of ground are dealt into `_FOLDS` parts; each part is scored by fits on the others, at the shots'
    reported places. Values in metres; `mae_good_m` leaves out shots that the spline's fit on the
    other parts calls outliers, so that clouds do not drown the comparison. `before` and `scalar` compare the
    map's percentile itself with the shot, as published; `usual` and `spline` add the map's footprint gap,
    where it is known.
    """
    block = blocks_of(shots.xy_m)
    fold = np.random.default_rng(1).permutation(int(block.max()) + 1)[block] % _FOLDS
    errors: dict[str, list[np.ndarray]] = {}
    good: list[np.ndarray] = []
    for number in range(_FOLDS):
        test, train = fold == number, fold != number
        if not test.any() or train.sum() < LEAST_SHOTS:
            continue
        outer = shots.take(test & np.isfinite(shots.reported_m))
        made = {name: fit_correction(shots.take(train), name, spacing_m=spacing_m) for name in METHODS}
        for name, error in _errors(outer, made).items():
            errors.setdefault(name, []).append(error)
        good.append(_plausible(outer, made["spline"]))
    if not good:
        return {"n": 0}
    return _table({name: np.concatenate(parts) for name, parts in errors.items()}, np.concatenate(good))


def scores_on(shots: Footprints, corrections: dict[str, Correction]) -> dict[str, Any]:
    """The scores of `held_out` for shots that no part of the corrections was fitted on."""
    shots = shots.take(np.isfinite(shots.reported_m))
    if not len(shots):
        return {"n": 0}
    return _table(_errors(shots, corrections), _plausible(shots, corrections["spline"]))


def _errors(shots: Footprints, corrections: dict[str, Correction]) -> dict[str, np.ndarray]:
    """Map minus shot at the reported places, (n,) each."""
    there, xy = shots.reported_m, shots.xy_m
    made = {"before": there, "usual": shots.expect(there)}
    made["scalar"] = corrections["scalar"](there, xy)
    made["spline"] = shots.expect(corrections["spline"](there, xy))
    return {name: values - shots.height_m for name, values in made.items()}


def _plausible(shots: Footprints, spline: Correction) -> np.ndarray:
    """(n,) whether some disc that a shot may have seen explains it under a correction fitted elsewhere."""
    scale = max(3.0, 4 * float(spline.facts["noise_m"]))
    corrected = spline(np.nan_to_num(shots.map_m).ravel(), np.repeat(shots.xy_m, shots.map_m.shape[1], 0))
    nearest = np.abs(shots.expect(corrected).reshape(shots.map_m.shape) - shots.height_m[:, None])
    return np.where(np.isfinite(shots.map_m), nearest, np.inf).min(axis=1) < scale


def _table(errors: dict[str, np.ndarray], kept: np.ndarray) -> dict[str, Any]:
    rows = {name: _scores(error, kept) for name, error in errors.items()}
    return {"n": len(kept), "n_good": int(kept.sum()), **rows}


def _scores(error: np.ndarray, kept: np.ndarray) -> dict[str, float | None]:
    fine = error[kept]
    return {
        "mae_m": round(float(np.abs(error).mean()), 3),
        "median_error_m": round(float(np.median(error)), 3),
        "mae_good_m": round(float(np.abs(fine).mean()), 3) if len(fine) else None,
        "bias_good_m": round(float(fine.mean()), 3) if len(fine) else None,
    }
