"""A monotone height correction, fitted to shots of uncertain place among which many may be wrong.

Model, for shot i with relative height y_i and the map's percentile m_id at its d-th possible place:

    y_i = g(m_id, place_i) + noise        for one unknown d of d = 1..D, equally likely beforehand
    y_i uniform on 0..70 m                for a share eps of gross outliers (clouds, wrong modes)
    g(m, place) = f(m) (1 + c(place)),    f(m) = sum_k s_k ramp_k(m),  s_k > 0 (linear I-splines),  f(0) = 0

Because f rises, it commutes with percentiles: the p-th percentile of the corrected pixels of a disc is f of
the p-th percentile of the pixels; so what is fitted on discs holds for pixels. c is a sum of hat functions
on a coarse lattice. Slopes are drawn to 1 and to each other, c to 0, all as normal priors, so that heights
and places without shots stay as they are. Expectation-maximisation (Dempster et al. 1977) alternates between
who-saw-what and penalised least squares; I-splines: Ramsay 1988.

The two GEDI corrections: the published scalar, and a monotone, spatially varying, shrunken curve.

The curve of `canopy.calibration.monotone` is not taken as it comes: every change is weighed against its own
standard error (bootstrap over blocks of ground, and the fit's covariance, whichever is larger) by the
non-negative garrote of Breiman (1995), d -> d max(0, 1 - (z0 se / d)^2), and a curve that nowhere differs
clearly from none is dropped. What cannot be told from no change becomes no change, exactly; clear changes
stay almost whole.

`canopy calibrate gedi`: correct a height map by GEDI shots, with its own uncertainty and a report.

Diagnostic pictures of calibrations, drawn without a display.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from scipy.linalg import cholesky, solve_triangular
from scipy.optimize import lsq_linear

from canopy import __version__
from canopy.calibration.discs import Footprints, map_grid, read_footprints
from canopy.calibration.intervals import FootprintGap, gap_of
from canopy.errors import ConfigError, DataError, InputError
from canopy.files import replacing
from canopy.models.heads import dense_hats
from canopy.runtime import NoProgress, Progress, log

if TYPE_CHECKING:
    from canopy.calibration.discs import Footprints
    from canopy.geo.grid import Grid


KNOTS_M = np.array([0.0, 2, 5, 8, 11, 14, 17, 20, 24, 28, 33, 40, 50])
OUTLIER_RANGE_M = 70.0
SLOPES = (0.2, 4.0)
TREND_LIMIT = 0.5  # of c, up and down
_BIN_M = 0.05  # sums over shots are kept per 5 cm of map height
_TALLEST_M = 150.0  # no tree is taller
_PRIOR_SLOPE, _PRIOR_STEP = 0.5, 0.3
_LEAST_NOISE_M = 0.3
_STEPS = 60


@dataclass(frozen=True)
class Trend:
    """c(place): hat functions on nodes `spacing_m` apart from `origin_m`; coefficients (rows, cols)."""

    origin_m: tuple[float, float]
    spacing_m: float
    values: np.ndarray

    def weights(self, xy_m: np.ndarray) -> np.ndarray:
        """(n, nodes) bilinear weights of places (n, 2); constant beyond the outermost nodes."""
        rows, cols = self.along(1, xy_m[:, 1]), self.along(0, xy_m[:, 0])
        return (rows[:, :, None] * cols[:, None, :]).reshape(len(xy_m), self.values.size)

    def along(self, axis: int, at_m: np.ndarray) -> np.ndarray:
        """(n, nodes) weights along one axis of places (n,): 0 is x and columns, 1 is y and rows."""
        nodes = np.arange(float(self.values.shape[1 - axis]))
        return dense_hats(nodes, (at_m - self.origin_m[axis]) / self.spacing_m)

    def at(self, xy_m: np.ndarray) -> np.ndarray:
        """(n,) relative change at places."""
        if not self.values.any():
            return np.zeros(len(xy_m))
        return np.clip(self.weights(xy_m) @ self.values.ravel(), -TREND_LIMIT, TREND_LIMIT)


@dataclass(frozen=True)
class Fit:
    """A fitted correction.

    Attributes:
        slopes: (knots - 1,) slopes of f between `KNOTS_M`.
        trend: c(place).
        noise_m: standard deviation of a good shot about the correction.
        outliers: share of shots taken for outliers.
        good: (n,) chance that each shot is none.
        covariance: (knots - 1, knots - 1) of the slopes, given who saw what, priors included.
    """

    slopes: np.ndarray
    trend: Trend
    noise_m: float
    outliers: float
    good: np.ndarray = field(repr=False)
    covariance: np.ndarray = field(repr=False)

    def level(self, map_m: np.ndarray) -> np.ndarray:
        """f(m) without the trend; beyond the last knot it runs on with slope 1."""
        return curve(self.slopes, map_m)

    def sd_m(self, map_m: np.ndarray) -> np.ndarray:
        """Standard deviation of f at heights (n,), from `covariance`."""
        design = ramps(map_m)
        return np.sqrt(np.maximum(np.einsum("nk,kj,nj->n", design, self.covariance, design), 0.0))

    def __call__(self, map_m: np.ndarray, xy_m: np.ndarray) -> np.ndarray:
        """g(m, place): (n,) or (n, d) heights, (n, 2) places."""
        c = self.trend.at(xy_m)
        return self.level(map_m) * (1 + c if map_m.ndim == 1 else 1 + c[:, None])


def curve(slopes: np.ndarray, map_m: np.ndarray) -> np.ndarray:
    """f(m) of given slopes."""
    at_knots = np.concatenate([[0.0], np.cumsum(slopes * np.diff(KNOTS_M))])
    return np.interp(map_m, KNOTS_M, at_knots) + _tail(map_m)


def ramps(map_m: np.ndarray) -> np.ndarray:
    """Heights (n,) -> linear I-splines (n, knots - 1)."""
    return np.clip(map_m[:, None] - KNOTS_M[:-1], 0, np.diff(KNOTS_M))


def _tail(map_m: np.ndarray) -> np.ndarray:
    """What f has beyond the last knot, where no shot decides its slope: that is 1."""
    return np.maximum(map_m - KNOTS_M[-1], 0)


def nodes_for(xy_m: np.ndarray, spacing_m: float) -> Trend:
    """A trend of zeros over places; a single node (no trend) where they span less than two spacings."""
    low, high = xy_m.min(axis=0), xy_m.max(axis=0)
    counts = [int(np.ceil(span / spacing_m)) + 1 if span >= 2 * spacing_m else 1 for span in high - low]
    middle = (low + high) / 2
    origin = [middle[a] - (counts[a] - 1) / 2 * spacing_m for a in (0, 1)]
    return Trend((float(origin[0]), float(origin[1])), spacing_m, np.zeros((counts[1], counts[0])))


def fit_monotone(
    shots: Footprints,
    trend: Trend,
    *,
    weights: np.ndarray | None = None,
    start: Fit | None = None,
    steps: int = _STEPS,
) -> Fit:
    """Fit the model above.

    Args:
        shots: shots beside the map.
        trend: nodes of the spatial trend (its values are not used).
        weights: (n,) how often each shot counts, e.g. of a bootstrap sample.
        start: a fit to begin with; the identity by default.
        steps: most rounds of expectation and maximisation.
    """
    m, y = shots.expect(shots.map_m), shots.height_m[:, None]
    seen = np.isfinite(m)
    heights = np.where(seen, m, 0.0)
    bins = np.minimum((heights / _BIN_M).astype(np.int64), int(_TALLEST_M / _BIN_M))
    counts = np.ones(len(shots)) if weights is None else weights
    places = trend.weights(shots.xy_m)
    fit = start or identity(trend, len(shots))
    spread = 0.05
    for _ in range(steps):
        before = fit.slopes
        factor = 1 + fit.trend.at(shots.xy_m)
        guess = fit.level(heights) * factor[:, None]
        member, good = _who_saw_what(y - guess, seen, fit)
        share = member * counts[:, None]
        noise = max(_LEAST_NOISE_M, float(np.sqrt((share * (y - guess) ** 2).sum() / max(share.sum(), 1e-9))))
        outliers = float(np.clip(1 - (good * counts).sum() / counts.sum(), 0.005, 0.6))
        slopes, covariance = _slopes(bins, share / noise**2, y, factor)
        values = fit.trend.values
        if places.shape[1] > 1:
            values, spread = _trend(places, curve(slopes, heights), y, share / noise**2, spread, values.shape)
        fit = Fit(slopes, Trend(trend.origin_m, trend.spacing_m, values), noise, outliers, good, covariance)
        if np.abs(slopes - before).max() < 1e-4:
            break
    return fit


def identity(trend: Trend, count: int) -> Fit:
    """The fit that changes nothing, for `count` shots."""
    size = len(KNOTS_M) - 1
    return Fit(np.ones(size), trend, 3.0, 0.1, np.ones(count), np.eye(size) * _PRIOR_SLOPE**2)


def _who_saw_what(residual: np.ndarray, seen: np.ndarray, fit: Fit) -> tuple[np.ndarray, np.ndarray]:
    """Chances (n, d) that a shot is good and saw place d, and their sums (n,)."""
    z = residual / fit.noise_m
    density = np.where(seen, np.exp(-0.5 * z * z), 0.0) / (fit.noise_m * np.sqrt(2 * np.pi))
    density *= (1 - fit.outliers) / np.maximum(seen.sum(axis=1, keepdims=True), 1)
    member = density / (density.sum(axis=1, keepdims=True) + fit.outliers / OUTLIER_RANGE_M)
    return member, member.sum(axis=1)


def _slopes(
    bins: np.ndarray, weight: np.ndarray, y: np.ndarray, factor: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Penalised least squares: the slopes and their covariance.

    Sums are gathered per bin of map height first, so that the cost per shot and place is two additions.
    """
    f = np.broadcast_to(factor[:, None], bins.shape).ravel()
    w = weight.ravel()
    size = int(bins.max()) + 1
    square = np.bincount(bins.ravel(), w * f * f, size)
    cross = np.bincount(bins.ravel(), w * f * np.broadcast_to(y, bins.shape).ravel(), size)
    centre = (np.arange(size) + 0.5) * _BIN_M
    cross -= square * _tail(centre)  # the slopes answer for the ramps alone
    design = ramps(centre)
    count = design.shape[1]
    step = np.diff(np.eye(count), axis=0)
    normal = (design * square[:, None]).T @ design + np.eye(count) / _PRIOR_SLOPE**2
    normal += step.T @ step / _PRIOR_STEP**2
    right = design.T @ cross + np.ones(count) / _PRIOR_SLOPE**2
    root = cholesky(normal, lower=True)
    half = solve_triangular(root, np.eye(count), lower=True)
    covariance = half.T @ half
    slopes = covariance @ right
    if slopes.min() < SLOPES[0] or slopes.max() > SLOPES[1]:
        slopes = lsq_linear(root.T, solve_triangular(root, right, lower=True), bounds=SLOPES).x
    return slopes, covariance


def _trend(
    places: np.ndarray, level: np.ndarray, y: np.ndarray, weight: np.ndarray, spread: float,
    shape: tuple[int, ...],
) -> tuple[np.ndarray, float]:  # fmt: skip
    """Ridge for the nodes of c, and the standard deviation of c that this makes likely (empirical Bayes)."""
    square = (weight * level * level).sum(axis=1)
    cross = (weight * level * (y - level)).sum(axis=1)
    normal = (places * square[:, None]).T @ places + np.eye(places.shape[1]) / spread**2
    inverse = np.linalg.inv(normal)
    c = inverse @ (places.T @ cross)
    likely = float(np.sqrt(np.mean(c**2 + np.diag(inverse))))
    return c.reshape(shape), float(np.clip(likely, 0.005, 0.2))


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


HEIGHT_BANDS = ("canopy_height", "height_lower", "height_upper")
ERROR_BAND = "correction_se"
_WINDOW_PX = 1024


@dataclass(frozen=True)
class ScaleFiles:
    """The corrected map and what lies beside it."""

    tif: Path
    diagnostics: Path
    picture: Path

    @classmethod
    def of(cls, out: str | Path) -> ScaleFiles:
        """Names beside `out`; InputError where it is no GeoTIFF's name."""
        tif = Path(out)
        if tif.suffix.lower() not in (".tif", ".tiff"):
            raise InputError("is not a GeoTIFF's name", where=out, expected="a file name ending in .tif")
        return cls(tif, tif.with_suffix(".gedi.json"), tif.with_suffix(".gedi.png"))

    def check(self, inputs: list[Path], overwrite: bool) -> None:
        """Refuse names that exist or name an input. Raises InputError."""
        for path in (self.tif, self.diagnostics, self.picture):
            if path.resolve() in {p.resolve() for p in inputs}:
                raise InputError("is one of the inputs", where=path, remedy="choose another name with -o")
            if path.exists() and not overwrite:
                raise InputError(
                    "exists already", where=path, remedy="add --overwrite, or choose another name with -o"
                )
        if not self.tif.absolute().parent.is_dir():
            raise InputError("no such directory", where=self.tif.absolute().parent, remedy="create it first")


def correct_map(
    map_path: str | Path,
    shots_path: str | Path,
    out: str | Path,
    *,
    method: str = "spline",
    rh: int = 98,
    jitter_m: float = 10.0,
    spacing_m: float = 5_000.0,
    encoding: str = "float32",
    overwrite: bool = False,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Fit a correction on the shots that lie on a map and write the corrected map.

    The result has the map's bands: heights (canopy_height, height_lower, height_upper) corrected, others as
    they were, and `correction_se`, the standard error of the correction in metres. Pixels of 0 m
    stay 0 m; nodata stays nodata. OUT.gedi.json and OUT.gedi.png tell how it was fitted and how it does on
    shots that it was not fitted on.

    Args:
        map_path: a height GeoTIFF in metres, band 1.
        shots_path: table of `canopy data gedi`, or any Parquet or CSV with shot_number, lat, lon and rh_NN.
        out: the GeoTIFF to write.
        method: "spline" or "scalar".
        rh: relative height to compare with the same percentile of the map's pixels in the disc.
        jitter_m: standard deviation of a shot's position error, metres per axis.
        spacing_m: distance between the nodes of the spatial trend; smaller maps have none.
        encoding: of the result, as for `canopy predict`.

    Returns:
        The diagnostics, JSON-ready.

    Raises:
        InputError: whatever is wrong with map, shots or options; nothing was written.
    """
    from canopy.labels.shots import read_shots

    map_path, files = Path(map_path), ScaleFiles.of(out)
    if method not in METHODS:
        raise ConfigError(f"unknown method {method!r}", where="--method", expected=" or ".join(METHODS))
    if not (np.isfinite(jitter_m) and 0 <= jitter_m <= 100):
        raise ConfigError(f"a position error of {jitter_m:g} m", where="--jitter-m", expected="0 to 100")
    if not (np.isfinite(spacing_m) and spacing_m > 0):
        raise ConfigError(f"nodes {spacing_m:g} m apart", where="--trend-m", expected="a number above 0")
    files.check([map_path, Path(shots_path)], overwrite)
    grid = map_grid(map_path)
    gap = _gap(map_path, rh)
    shots = replace(read_footprints(map_path, read_shots(shots_path), rh=rh, sigma_m=jitter_m), gap=gap)
    correction = fit_correction(shots, method, spacing_m=spacing_m)
    scores = held_out(shots, spacing_m=spacing_m)
    report = {
        "map": map_path.name, "shots": Path(shots_path).name, "method": method, "rh": rh,
        "jitter_m": jitter_m, "footprint_gap": "of the map's model" if gap else "not known, taken as none",
        **correction.facts, "held_out": scores,
        "curve": _curve(correction), "limits": _limits(shots),
    }  # fmt: skip
    sha256 = _write(map_path, grid, correction, files.tif, report, encoding, overwrite, progress)
    report |= {"output": files.tif.name, "sha256": sha256}
    _write_report(files, report, shots, correction)
    return report | {"output": str(files.tif), "diagnostics": str(files.diagnostics)}


def _gap(map_path: Path, rh: int) -> FootprintGap | None:
    """The footprint gap in the map's tags; says so where there is none."""
    from canopy.geo.raster import open_raster

    with open_raster(map_path) as dataset:
        gap = gap_of(dataset.tags(), rh)
    if gap is None:
        log.warning(
            f"note: {map_path.name} has no footprint gap of its model: its RH{rh} is matched as it is, which "
            "lifts maps that are smoother than the canopy"
        )
    return gap


def _curve(correction: Correction) -> dict[str, list[float]]:
    at = np.arange(0, 51, 2.5)
    change = correction.heights(at, 1.0) - at
    return {
        "map_m": at.tolist(),
        "change_m": np.round(change, 3).tolist(),
        "se_m": np.round(correction.errors(at, 0.0), 3).tolist(),
    }


def _limits(shots: Footprints) -> dict[str, float]:
    """How far the evidence reaches: percentiles of the map under the shots."""
    values = shots.map_m[np.isfinite(shots.map_m)]
    low, middle, high = np.percentile(values, (5, 50, 95))
    return {"map_p5_m": round(low, 2), "map_median_m": round(middle, 2), "map_p95_m": round(high, 2)}


def _write(
    map_path: Path, grid: Grid, correction: Correction, out: Path, report: dict[str, Any], encoding: str,
    overwrite: bool, progress: Progress | None,
) -> str:  # fmt: skip
    """Correct window by window; returns the file's SHA-256."""
    from canopy.geo.raster import BandSpec, CogWriter, open_raster, read_raster

    progress = progress or NoProgress()
    with open_raster(map_path) as dataset:
        named = [
            dataset.descriptions[i] or ("canopy_height" if i == 0 else f"band_{i + 1}")
            for i in range(dataset.count)
        ]
        units = [dataset.units[i] or "m" for i in range(dataset.count)]
        tags = {k: v for k, v in dataset.tags().items() if k.startswith("CANOPY_")}
    bands = [BandSpec(name, unit) for name, unit in zip(named, units, strict=True)]
    tags |= {
        "CANOPY_CORRECTION": f"gedi {correction.method}, RH{report['rh']}, {report['shots']}",
        "CANOPY_CORRECTION_SHOTS": str(correction.facts["shots"]),
        "CANOPY_CORRECTION_VERSION": __version__,
    }
    corrected = [i for i, name in enumerate(named) if name in HEIGHT_BANDS or i == 0]
    writer = CogWriter(
        out, grid, [*bands, BandSpec(ERROR_BAND, "m")], encoding=encoding, tags=tags, overwrite=overwrite
    )
    tiles = [(r, c) for r in range(0, grid.height, _WINDOW_PX) for c in range(0, grid.width, _WINDOW_PX)]
    progress.start(len(tiles), "correcting")
    with writer:
        for row, col in tiles:
            window = grid.window(
                row, col, min(_WINDOW_PX, grid.height - row), min(_WINDOW_PX, grid.width - col)
            )
            raster = read_raster(map_path, window, bands=list(range(1, len(bands) + 1)))
            values = raster.values.astype(np.float64)
            factor, trend_se = _trend_on(correction, grid, row, col, window.shape)
            error = correction.errors(values[0], trend_se)
            for band in corrected:
                values[band] = correction.heights(values[band], factor)
            stacked = np.concatenate([values, error[None]]).astype(np.float32)
            writer.write(stacked, raster.valid, row, col)
            progress.advance()
    return str(writer.sha256)


def _trend_on(
    correction: Correction, grid: Grid, row: int, col: int, shape: tuple[int, int]
) -> tuple[np.ndarray | float, np.ndarray | float]:
    """1 + the trend, and the trend's standard error, on a window; plain numbers where there is no trend."""
    trend = correction.trend
    if not trend.values.any() and not correction.trend_se.any():
        return 1.0, 0.0
    rows = trend.along(1, (row + 0.5 + np.arange(shape[0])) * grid.gsd_m)
    cols = trend.along(0, (col + 0.5 + np.arange(shape[1])) * grid.gsd_m)
    change = np.clip(rows @ trend.values @ cols.T, -TREND_LIMIT, TREND_LIMIT)
    return 1 + change, rows @ correction.trend_se @ cols.T


def _write_report(
    files: ScaleFiles, report: dict[str, Any], shots: Footprints, correction: Correction
) -> None:

    with replacing(files.diagnostics, "cannot write the report") as part:
        part.write_text(json.dumps(report, indent=2, allow_nan=False) + "\n", encoding="utf-8")
    draw_correction(files.picture, shots, correction, report)


__all__ = ["GRID_M", "ScaleFiles", "correct_map"]


def draw_correction(path: Path, shots: Footprints, correction: Correction, report: dict[str, Any]) -> None:
    """Two panels: shots against the map with the fitted curve, and the change with its standard error."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4.4), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    top = float(max(10.0, np.nanpercentile(shots.map_m, 99.5), np.percentile(shots.height_m, 99)))
    heights = np.arange(0.0, top + 0.1, 0.25)
    level, error = correction.heights(heights, 1.0), correction.errors(heights, 0.0)
    left.plot(shots.reported_m, shots.height_m, ".", ms=3, alpha=0.4, color="tab:blue", label="shots")
    left.plot(heights, shots.expect(heights), "--", color="0.5", lw=1, label="no change")
    left.plot(heights, shots.expect(level), color="tab:red", label=report["method"])
    left.set(xlim=(0, top), ylim=(0, top * 1.15), xlabel=f"map, P{shots.percent} of the disc (m)")
    left.set_ylabel(f"GEDI RH{shots.percent} (m)")
    left.legend(loc="upper left", fontsize=8)
    right.fill_between(heights, level - heights - 2 * error, level - heights + 2 * error, alpha=0.25,
                       color="tab:red", lw=0, label="± 2 standard errors")  # fmt: skip
    right.plot(heights, level - heights, color="tab:red")
    right.axhline(0, color="0.5", lw=1, ls="--")
    right.set(xlim=(0, top), xlabel="map height (m)", ylabel="change (m)", title=_headline(report))
    right.title.set_fontsize(9)
    right.legend(loc="best", fontsize=8)
    save(figure, path)


def _headline(report: dict[str, Any]) -> str:
    scores = report.get("held_out", {})
    if not scores.get("n"):
        return ""
    before, after = scores["before"]["mae_good_m"], scores[report["method"]]["mae_good_m"]
    return f"held-out shots: MAE {before} m before, {after} m after"


def save(figure: Any, path: Path) -> None:
    """Write a figure as PNG, whole or not at all; OutputError where that is impossible."""
    with replacing(path) as part:
        figure.savefig(part, format="png", dpi=130, metadata={"Software": None})
