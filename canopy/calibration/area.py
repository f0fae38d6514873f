"""Intervals for the mean (and the sum) of a height map over an area, with correlated errors.

Errors of neighbouring pixels are alike, so they do not average out as independent ones would: ignoring that
makes intervals of stands many times too narrow. Here the error of a pixel i is taken as e_i = w_i z_i, where
w_i is half the width of its 90 % band and z has the correlation rho(d) at distance d, so

    Var(mean over A) = (mean w)^2 * mean over all pairs of places in A of rho(distance),

with rho(d) = nugget at 0 + sum_k c_k exp(-d / a_k) + plateau, fitted to held-out tiles (an empirical
correlogram; Journel and Huijbregts 1978, chapter III). The plateau is what tiles have wrong as a whole; it
never averages out. How many of these standard deviations an interval needs is read off windows of held-out
tiles, size by size (split conformal, with squares of 128 m as the exchangeable unit).

Fitting the error of area means: correlogram and conformal factors from held-out tiles.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
from scipy.optimize import nnls

from canopy.calibration.collect import Scored
from canopy.errors import ConfigError, DataError
from canopy.models.heads import IntervalTable

AREA_LEVELS = (0.5, 0.68, 0.8, 0.9, 0.95)
SIZES_M = (8, 16, 32, 64, 128, 256)
RANGES_M = (3.0, 8.0, 20.0, 60.0, 200.0)
BAND_LEVEL = 0.9
TAG = "CANOPY_AREA_MODEL"
_PAIRS = 4096
# Over bare ground bands close; what remains is the error of the ground itself.
FLOOR_M = 0.3


class AreaInterval(NamedTuple):
    """Mean height of an area and its interval, metres; `sd_m`: the model's deviation of the mean."""

    mean_m: float
    lower_m: float
    upper_m: float
    sd_m: float


@dataclass(frozen=True)
class AreaModel:
    """What is known of errors of means.

    Attributes:
        pull: share of (middle of the band - height) by which truths lie off the heights on average.
        nugget, plateau: of the correlation; weights (r,) go with `RANGES_M`.
        factors: (levels, sizes) standard deviations that an interval extends, by `AREA_LEVELS`, `SIZES_M`.
        facts: what it was fitted on, and how it did elsewhere.
    """

    pull: float
    nugget: float
    plateau: float
    weights: np.ndarray
    factors: np.ndarray
    facts: dict[str, Any] = field(default_factory=dict)

    def correlation(self, distance_m: np.ndarray) -> np.ndarray:
        """rho at distances above 0."""
        waves = np.exp(-np.asarray(distance_m)[..., None] / np.array(RANGES_M))
        return waves @ self.weights + self.plateau

    def mean_correlation(self, inside: np.ndarray, gsd_m: float, *, seed: int = 0) -> float:
        """Mean of rho over all pairs of places in a mask, from a fixed random sample of pairs.

        Args:
            inside: bool (h, w), the area (holes and several parts allowed).
            gsd_m: metres per pixel of the mask, which may be coarser than the map.
        """
        rows, cols = np.nonzero(inside)
        if not len(rows):
            raise DataError("an area without pixels")
        rng = np.random.default_rng(seed)
        one, two = rng.integers(0, len(rows), (2, _PAIRS))
        shake = rng.random((4, _PAIRS))
        dy = rows[one] - rows[two] + shake[0] - shake[1]
        dx = cols[one] - cols[two] + shake[2] - shake[3]
        cells = max(1.0, len(rows) * gsd_m**2)
        return float(self.correlation(np.hypot(dy, dx) * gsd_m).mean() + self.nugget / cells)

    def interval(
        self, mean_m: float, mean_lower_m: float, mean_upper_m: float, correlation: float, area_m2: float,
        level: float = 0.9,
    ) -> AreaInterval:  # fmt: skip
        """The interval from means over the area: of heights, and of both ends of their 90 % bands.

        With `mean_correlation`, this is all that is needed of areas too large to hold in memory.

        Raises:
            ConfigError: a level outside `AREA_LEVELS`.
        """
        width = (mean_upper_m - mean_lower_m) / 2
        sd = float(np.hypot(width * np.sqrt(max(correlation, 0.0)), FLOOR_M))
        centre = mean_m + self.pull * ((mean_lower_m + mean_upper_m) / 2 - mean_m)
        reach = self._factor(level, area_m2) * sd
        lower, upper = min(centre - reach, mean_m), max(centre + reach, mean_m)
        return AreaInterval(mean_m, max(0.0, lower), upper, sd)

    def _factor(self, level: float, area_m2: float) -> float:
        if not AREA_LEVELS[0] <= level <= AREA_LEVELS[-1]:
            raise ConfigError(
                f"an area interval of {level:g}", expected=f"{AREA_LEVELS[0]:g} to {AREA_LEVELS[-1]:g}"
            )
        side = np.log(max(area_m2, 1.0)) / 2
        by_size = [float(np.interp(side, np.log(SIZES_M), row)) for row in self.factors]
        return float(np.interp(level, AREA_LEVELS, by_size))

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return {
            "pull": round(self.pull, 4), "nugget": round(self.nugget, 5), "plateau": round(self.plateau, 5),
            "weights": np.round(self.weights, 5).tolist(), "factors": np.round(self.factors, 3).tolist(),
            "facts": self.facts,
        }  # fmt: skip

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any]) -> AreaModel:
        """Rebuild. Raises DataError where it is no such model."""
        try:
            weights, factors = (np.asarray(raw[k], np.float64) for k in ("weights", "factors"))
            if weights.shape != (len(RANGES_M),) or factors.shape != (len(AREA_LEVELS), len(SIZES_M)):
                raise ValueError("other sizes")
            pull, nugget, plateau = (float(raw[k]) for k in ("pull", "nugget", "plateau"))
            return cls(pull, nugget, plateau, weights, factors, dict(raw.get("facts", {})))
        except (KeyError, TypeError, ValueError) as error:
            raise DataError(f"the area model cannot be used: {error}") from error


def area_interval(
    height_m: np.ndarray, lower_m: np.ndarray, upper_m: np.ndarray, inside: np.ndarray, gsd_m: float,
    model: AreaModel, level: float = 0.9,
) -> AreaInterval:  # fmt: skip
    """The mean height of an area of a map and its interval; times the area, the canopy volume's.

    Args:
        height_m, lower_m, upper_m: (h, w) metres, the bands of `canopy predict --interval 0.9`.
        inside: bool (h, w), the area's pixels; those without a height are left out.
        gsd_m: ground metres per pixel.
        model: of the map, see `area_model_of`.
        level: wanted coverage.

    Raises:
        DataError: no pixel with a height. ConfigError: a level outside `AREA_LEVELS`.
    """
    known = inside & np.isfinite(height_m) & np.isfinite(lower_m) & np.isfinite(upper_m)
    if not known.any():
        raise DataError("an area without a height")
    mean, low, high = (float(v[known].mean(dtype=np.float64)) for v in (height_m, lower_m, upper_m))
    area = float(known.sum()) * gsd_m**2
    return model.interval(mean, low, high, model.mean_correlation(known, gsd_m), area, level)


def area_model_of(tags: Mapping[str, str]) -> AreaModel:
    """The area model in the tags of a map that was predicted with intervals.

    Raises:
        DataError: there is none, or its bands are not 90 % bands.
    """
    if TAG not in tags:
        raise DataError(
            "the map has no interval bands with an area model",
            remedy="predict it with --interval 0.9 and a calibrated model",
        )
    try:
        return AreaModel.from_dict(json.loads(tags[TAG]))
    except ValueError as error:
        raise DataError("the map's area model cannot be read", where=TAG) from error


Tables = IntervalTable | Mapping[str, IntervalTable]

_LAGS_M = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 180)
_LEAST_SIDE, _LEAST_KNOWN = 100, 0.7
# Windows within squares of this side, or within one window if that is larger, count as one unit.
_UNIT_M = 128


def fit_areas(scored: Sequence[Scored], table: Tables, facts: dict[str, Any] | None = None) -> AreaModel:
    """Fit correlation and factors on held-out tiles; `table` is one for all, or one by chip id.

    Raises:
        DataError: fewer than four tiles of 100 m or more.
    """
    tiles = [_Errors.of(chip, table) for chip in scored if min(chip.truth_m.shape) >= _LEAST_SIDE]
    if len(tiles) < 4:
        raise DataError(f"{len(tiles)} held-out tiles", expected="at least 4 of 100 m or more for areas")
    top = sum(float((t.error * t.lean).sum()) for t in tiles)
    pull = float(np.clip(top / max(sum(float((t.lean**2).sum()) for t in tiles), 1e-9), 0.0, 1.0))
    nugget, weights, plateau = _fit_correlation(tiles, pull)
    plain = AreaModel(pull, nugget, plateau, weights, np.ones((len(AREA_LEVELS), len(SIZES_M))))
    factors = np.ones_like(plain.factors)
    for n, size in enumerate(SIZES_M):
        ratio, unit = _ratios(tiles, plain, size)
        if len(ratio):
            factors[:, n] = [_conformal(ratio, unit, level) for level in AREA_LEVELS]
        elif n:
            factors[:, n] = factors[:, n - 1]
    return AreaModel(pull, nugget, plateau, weights, np.maximum.accumulate(factors, axis=0), facts or {})


def area_coverage(
    scored: Sequence[Scored], table: Tables, model: AreaModel, level: float = 0.9
) -> dict[str, dict[str, float]]:
    """Share of simulated square windows whose true mean lies inside, by side in metres, with mean widths."""
    rows: dict[str, dict[str, float]] = {}
    for size in SIZES_M:
        hits, widths = [], []
        whole = model.mean_correlation(np.ones((size, size), bool), 1.0)
        for chip in scored:
            if min(chip.truth_m.shape) < _LEAST_SIDE:
                continue
            lower, upper = _bands(chip, table)
            for place in _windows(chip.known, size):
                known = chip.known[place]
                mean, low, high = (
                    float(v[place][known].mean(dtype=np.float64)) for v in (chip.height_m, lower, upper)
                )
                made = model.interval(mean, low, high, whole, float(known.sum()), level)
                hits.append(made.lower_m <= float(chip.truth_m[place][known].mean()) <= made.upper_m)
                widths.append(made.upper_m - made.lower_m)
        if hits:
            rows[str(size)] = {
                "n": len(hits), "coverage": round(float(np.mean(hits)), 4),
                "mean_width_m": round(float(np.mean(widths)), 2),
            }  # fmt: skip
    return rows


@dataclass(frozen=True)
class _Errors:
    """A tile: error = truth - height, lean = middle of the band - height, width = half the band; 0 gaps."""

    known: np.ndarray
    error: np.ndarray
    lean: np.ndarray
    width: np.ndarray

    @classmethod
    def of(cls, chip: Scored, table: Tables) -> _Errors:
        lower, upper = _bands(chip, table)
        k = chip.known
        h = np.where(k, chip.height_m, 0)
        return cls(
            k, np.where(k, chip.truth_m - h, 0), np.where(k, (lower + upper) / 2 - h, 0),
            np.where(k, (upper - lower) / 2, 0),
        )  # fmt: skip


def _bands(chip: Scored, table: Tables) -> tuple[np.ndarray, np.ndarray]:
    k = chip.known
    table = table if isinstance(table, IntervalTable) else table[chip.id]
    return table.bounds(np.where(k, chip.height_m, 0), np.where(k, chip.spread_m, 0), BAND_LEVEL)


def _fit_correlation(tiles: Sequence[_Errors], pull: float) -> tuple[float, np.ndarray, float]:
    """Nugget, weights and plateau: sum e_i e_j / sum w_i w_j by distance, then non-negative least squares."""
    lags = np.array((0, *_LAGS_M))
    top, bottom, pairs = (np.zeros(len(lags)) for _ in range(3))
    for tile in tiles:
        e = np.where(tile.known, tile.error - pull * tile.lean, 0)
        products = [_autocorrelate(v) for v in (e, tile.width, tile.known.astype(np.float64))]
        n = products[0].shape[0]
        steps = np.fft.fftfreq(n, 1 / n)
        ring = np.rint(np.hypot(steps[:, None], steps[None, :])).astype(np.int64).ravel()
        for total, product in zip((top, bottom, pairs), products, strict=True):
            total += np.bincount(ring, product.ravel(), lags[-1] + 1)[lags]
    seen = bottom > 0
    rho, lag = top[seen] / bottom[seen], lags[seen].astype(np.float64)
    design = np.column_stack([lag == 0, np.exp(-lag[:, None] / np.array(RANGES_M)), np.ones(len(lag))])
    trust = pairs[seen] ** 0.25  # far lags have many pairs, which are anything but independent
    solution, _ = nnls(design * trust[:, None], rho * trust)
    return float(solution[0]), solution[1:-1], float(solution[-1])


def _autocorrelate(values: np.ndarray) -> np.ndarray:
    n = 2 * max(values.shape)
    spectrum = np.fft.rfft2(values, (n, n))
    return np.fft.irfft2(spectrum * spectrum.conj(), (n, n))


def _windows(known: np.ndarray, size: int) -> list[tuple[slice, slice]]:
    """Squares side by side in a tile, at least `_LEAST_KNOWN` of them known; at most 40, evenly picked."""
    h, w = known.shape
    step = min(size, h, w)
    if step < 0.9 * size:
        return []
    places = [
        (slice(r, r + step), slice(c, c + step))
        for r in range(0, h - step + 1, step)
        for c in range(0, w - step + 1, step)
    ]
    places = [p for p in places if known[p].mean() >= _LEAST_KNOWN]
    return places[:: -(-len(places) // 40)] if places else []


def _ratios(tiles: Sequence[_Errors], model: AreaModel, size: int) -> tuple[np.ndarray, np.ndarray]:
    """|error of the mean| in model standard deviations of all windows of a size, and their unit."""
    ratios, owners = [], []
    full = np.sqrt(model.mean_correlation(np.ones((size, size), bool), 1.0))
    for number, tile in enumerate(tiles):
        for place in _windows(tile.known, size):
            k = tile.known[place]
            error = (tile.error - model.pull * tile.lean)[place][k].mean()
            ratios.append(abs(float(error)) / float(np.hypot(tile.width[place][k].mean() * full, FLOOR_M)))
            owners.append((number, place[0].start // _UNIT_M, place[1].start // _UNIT_M))
    if not owners:
        return np.zeros(0), np.zeros(0, np.int64)
    return np.array(ratios), np.unique(np.array(owners), axis=0, return_inverse=True)[1].ravel()


def _conformal(ratio: np.ndarray, unit: np.ndarray, level: float) -> float:
    """What a window of a further unit stays below with chance `level`; every unit counts once."""
    _, number, count = np.unique(unit, return_inverse=True, return_counts=True)
    order = np.argsort(ratio)
    mass = np.cumsum((1 / count[number])[order]) / (len(count) + 1)
    at = int(np.searchsorted(mass, level))
    return float(ratio[order][min(at, len(ratio) - 1)])
