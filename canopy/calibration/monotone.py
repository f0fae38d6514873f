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
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from scipy.linalg import cholesky, solve_triangular
from scipy.optimize import lsq_linear

from canopy.calibration.discs import Footprints
from canopy.models.intervals import dense_hats

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
