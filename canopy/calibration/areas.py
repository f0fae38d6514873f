"""Intervals for the mean (and the sum) of a height map over an area, with correlated errors.

Errors of neighbouring pixels are alike, so they do not average out as independent ones would: ignoring that
makes intervals of stands many times too narrow. Here the error of a pixel i is taken as e_i = w_i z_i, where
w_i is half the width of its 90 % band and z has the correlation rho(d) at distance d, so

    Var(mean over A) = (mean w)^2 * mean over all pairs of places in A of rho(distance),

with rho(d) = nugget at 0 + sum_k c_k exp(-d / a_k) + plateau, fitted to held-out tiles (an empirical
correlogram; Journel and Huijbregts 1978, chapter III). The plateau is what tiles have wrong as a whole; it
never averages out. How many of these standard deviations an interval needs is read off windows of held-out
tiles, size by size (split conformal, with squares of 128 m as the exchangeable unit).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from canopy.errors import ConfigError, DataError

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
