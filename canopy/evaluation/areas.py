"""How sure the mean of a height map over an area is, from what the map's tags say of its model's errors.

Errors of neighbouring pixels are alike, so they do not average out as independent ones would: ignoring that
makes intervals of stands many times too narrow. The error of a pixel i is taken as e_i = w_i z_i, where w_i
is half the width of its 90 % band and z has the correlation rho(d) at distance d, so

    Var(mean over A) = (mean w)^2 * mean over all pairs of places in A of rho(distance),

with rho(d) = nugget at 0 + sum_k c_k exp(-d / a_k) + plateau (an empirical correlogram; Journel and
Huijbregts 1978, chapter III). The plateau is what tiles have wrong as a whole; it never averages out. How
many of these standard deviations an interval needs depends on the area's size. `canopy.calibration.area` fits
all of it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any

import numpy as np

from canopy.errors import ConfigError, DataError

AREA_LEVELS = (0.5, 0.68, 0.8, 0.9, 0.95)
SIZES_M = (8, 16, 32, 64, 128, 256)
RANGES_M = (3.0, 8.0, 20.0, 60.0, 200.0)
TAG = "CANOPY_AREA_MODEL"
_PAIRS = 4096
# Over bare ground bands close; what remains is the error of the ground itself.
_FLOOR_M = 0.3
# A shape is drawn with at most this many pixels a side to measure distances within it.
_SHAPE_PX = 256


@dataclass(frozen=True)
class AreaModel:
    """What is known of errors of means.

    Attributes:
        pull: share of (middle of the band - height) by which truths lie off the heights on average.
        nugget, plateau: of the correlation; weights (r,) go with `RANGES_M`.
        factors: (levels, sizes) standard deviations that an interval extends, by `AREA_LEVELS`, `SIZES_M`.
    """

    pull: float
    nugget: float
    plateau: float
    weights: np.ndarray
    factors: np.ndarray

    def correlation(self, distance_m: np.ndarray) -> np.ndarray:
        """rho at distances above 0."""
        waves = np.exp(-np.asarray(distance_m)[..., None] / np.array(RANGES_M))
        return waves @ self.weights + self.plateau

    def mean_correlation(self, inside: np.ndarray, gsd_m: float) -> float:
        """Mean of rho over all pairs of places in a mask, from a fixed random sample of pairs.

        Args:
            inside: bool (h, w), the area (holes and several parts allowed), not empty.
            gsd_m: metres per pixel of the mask, which may be coarser than the map.
        """
        rows, cols = np.nonzero(inside)
        rng = np.random.default_rng(0)
        one, two = rng.integers(0, len(rows), (2, _PAIRS))
        shake = rng.random((4, _PAIRS))
        dy = rows[one] - rows[two] + shake[0] - shake[1]
        dx = cols[one] - cols[two] + shake[2] - shake[3]
        cells = max(1.0, len(rows) * gsd_m**2)
        return float(self.correlation(np.hypot(dy, dx) * gsd_m).mean() + self.nugget / cells)

    def centre_and_sd(self, means: np.ndarray, correlation: float) -> tuple[np.ndarray, np.ndarray]:
        """Expected true means (n,) and their standard deviations, metres; see `interval`."""
        height, low, high = means[..., 0], means[..., 1], means[..., 2]
        return height + self.pull * ((low + high) / 2 - height), self.sd((high - low) / 2, correlation)

    def sd(self, half_m: np.ndarray, correlation: float) -> np.ndarray:
        """Standard deviation of a mean, metres, from the mean half width of the 90 % bands."""
        return np.hypot(half_m * np.sqrt(max(correlation, 0.0)), _FLOOR_M)

    def factor(self, area_m2: np.ndarray | float, level: float) -> np.ndarray:
        """Standard deviations that an interval of an area extends; above 0.95 as normal errors would."""
        known = min(max(level, AREA_LEVELS[0]), AREA_LEVELS[-1])
        by_size = np.array([np.interp(known, AREA_LEVELS, column) for column in self.factors.T])
        beyond = NormalDist().inv_cdf((1 + level) / 2) / NormalDist().inv_cdf((1 + known) / 2)
        return np.interp(np.log(np.maximum(area_m2, 1.0)) / 2, np.log(SIZES_M), by_size) * beyond

    def interval(
        self, means: np.ndarray, correlation: float, area_m2: np.ndarray | float, level: float = 0.9
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Lower and upper ends of intervals and the model's standard deviations, metres, all (n,).

        Args:
            means: (n, 3), over the area: of heights, and of both ends of their 90 % bands.
            correlation: of `mean_correlation`.
        """
        centre, sd = self.centre_and_sd(means, correlation)
        reach = self.factor(area_m2, level) * sd
        lower = np.maximum(np.minimum(centre - reach, means[..., 0]), 0.0)
        return lower, np.maximum(centre + reach, means[..., 0]), sd

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return {
            "pull": round(self.pull, 4), "nugget": round(self.nugget, 5), "plateau": round(self.plateau, 5),
            "weights": np.round(self.weights, 5).tolist(), "factors": np.round(self.factors, 3).tolist(),
        }  # fmt: skip

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any]) -> AreaModel:
        """Rebuild. Raises DataError where it is no such model."""
        try:
            weights, factors = (np.asarray(raw[k], np.float64) for k in ("weights", "factors"))
            if weights.shape != (len(RANGES_M),) or factors.shape != (len(AREA_LEVELS), len(SIZES_M)):
                raise ValueError("other sizes")
            pull, nugget, plateau = (float(raw[k]) for k in ("pull", "nugget", "plateau"))
            return cls(pull, nugget, plateau, weights, factors)
        except (KeyError, TypeError, ValueError) as error:
            raise DataError(f"the area model cannot be used: {error}") from error


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


def check_level(level: float) -> None:
    """Raises ConfigError for a level outside `AREA_LEVELS`."""
    if not AREA_LEVELS[0] <= level <= AREA_LEVELS[-1]:
        expected = f"{AREA_LEVELS[0]:g} to {AREA_LEVELS[-1]:g}"
        raise ConfigError(f"an interval of {level:g}", where="--interval", expected=expected)


class Drawing:
    """A coarse drawing of an area within a window, for the distances in it."""

    def __init__(self, shape: tuple[int, int], gsd_m: float) -> None:
        self._step = max(1, -(-max(shape) // _SHAPE_PX))
        self._share = np.zeros(tuple(-(-n // self._step) for n in shape))
        self._gsd_m = gsd_m * self._step

    def add(self, rows: np.ndarray, cols: np.ndarray, share: np.ndarray) -> None:
        """Pixels (k,) of the window and the share of each that the area covers."""
        np.add.at(self._share, (rows // self._step, cols // self._step), share)

    def correlation(self, model: AreaModel) -> float:
        """Mean correlation of errors within the area; something must have been added."""
        # Partly covered pixels of the drawing count where the area has at least half of the fullest.
        inside = self._share >= 0.5 * min(self._share.max(), self._step**2)
        return model.mean_correlation(inside, self._gsd_m)


class CoverCounts:
    """Ground above a height, when all heights are moved by a share of their bands."""

    # Shares of a band are counted in steps of 1/STEPS, as far as FAR bands.
    STEPS, FAR = 500, 4

    def __init__(self, above_m: float) -> None:
        self.above_m = above_m
        self._by_share = np.zeros(2 * self.FAR * self.STEPS + 2)

    def add(self, values: np.ndarray, weight: np.ndarray) -> None:
        """Add pixels: heights, or heights and both ends of their bands (1 or 3, k), and their ground (k,)."""
        height = values[0]
        over = height > self.above_m
        # How far a pixel's height must be moved, in its band below or above it, to cross the height.
        band = np.where(over, height - values[len(values) // 2], values[-1] - height)
        share = np.abs(height - self.above_m) / np.maximum(band, 1e-9)
        steps = np.minimum(np.floor(share * self.STEPS), self.FAR * self.STEPS).astype(np.int64)
        at = np.where(over, self.FAR * self.STEPS + 1 + steps, self.FAR * self.STEPS - steps)
        self._by_share += np.bincount(at, weight, self._by_share.size)

    def share(self, moved: float) -> float:
        """Share of the ground that is higher, with heights moved up (above 0) or down by a share of bands."""
        if not np.isfinite(moved):
            return float("nan")
        first = self.FAR * self.STEPS + 1 - round(float(np.clip(moved, -self.FAR, self.FAR)) * self.STEPS)
        return float(min(1.0, self._by_share[first:].sum() / self._by_share.sum()))
