"""Bands of given coverage round a predicted height, from a calibration that travels in the model's card.

Here is only what prediction needs; the calibration is fitted in `canopy.calibration.intervals`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from canopy.errors import CheckpointError, ConfigError

CARD_KEY = "intervals"
VERSION = 1
SOFT_M = 0.1  # spreads below this are told apart no further
# In new places no band reaches less far than this.
FLAT_M = 0.25
# Calibration data this near make a place a seen one.
NEAR_KM = 10.0
LonLat = tuple[float, float]
LEVELS = (0.5, 0.68, 0.8, 0.9, 0.95, 0.98)
_ARRAYS = {"levels": 2, "height_m": 2, "typical_m": 2, "spread": 4, "below_m": 2, "above_m": 2}  # digits kept


@dataclass(frozen=True)
class NewPlace:
    """By how much bands are stretched about the height in places that calibration has not seen.

    Attributes:
        height_m: (m,) knots of predicted height, rising.
        factor: (levels, m), at least 1, of the distances from the height; these count as at least `FLAT_M`.
    """

    height_m: np.ndarray
    factor: np.ndarray

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return {"height_m": self.height_m.tolist(), "factor": np.round(self.factor, 3).tolist()}


@dataclass(frozen=True)
class IntervalTable:
    """Distances from a predicted height to the ends of its interval, on a lattice of knots.

    Attributes:
        levels: (l,) shares of truths inside, rising.
        height_m: (k,) knots of predicted height, rising.
        typical_m: (k,) typical spread at each.
        spread: (v,) knots of log((s + 0.1) / (typical + 0.1)), rising.
        below_m, above_m: (l, k, v) distances.
        new_place: for bands of places that calibration has not seen; None for those it has.
    """

    levels: np.ndarray
    height_m: np.ndarray
    typical_m: np.ndarray
    spread: np.ndarray
    below_m: np.ndarray
    above_m: np.ndarray
    new_place: NewPlace | None = None

    @property
    def place(self) -> str:
        """`seen`, or `new` for bands of places that calibration has not seen."""
        return "seen" if self.new_place is None else "new"

    def bounds(
        self, height_m: np.ndarray, spread_m: np.ndarray, level: float
    ) -> tuple[np.ndarray, np.ndarray]:
        """Lower and upper ends in metres, float32, shaped like `height_m`; 0 <= lower <= height <= upper.

        `spread_m` is the network's spread, shaped like `height_m`. Levels between the stored ones are
        interpolated.

        Raises:
            ConfigError: a level outside the stored ones.
        """
        below, above = (at_level(self.levels, t, level) for t in (self.below_m, self.above_m))
        k, v = len(self.height_m), len(self.spread)
        low, high = (np.array(height_m, np.float64) for _ in range(2))
        # How the spread compares with what is usual at this height.
        typical = np.interp(height_m, self.height_m, self.typical_m)
        relative = np.log((spread_m + SOFT_M) / (typical + SOFT_M))
        for i, wi in hats(self.height_m, height_m):
            for j, wj in hats(self.spread, relative):
                place = np.minimum(i, k - 1), np.minimum(j, v - 1)
                low -= wi * wj * below[place]
                high += wi * wj * above[place]
        lower, upper = np.clip(low, 0.0, height_m), np.maximum(high, height_m)
        if self.new_place is not None:
            by_height = at_level(self.levels, self.new_place.factor, level)
            factor = np.interp(height_m, self.new_place.height_m, by_height)
            lower = np.maximum(height_m - factor * np.maximum(height_m - lower, FLAT_M), 0.0)
            upper = height_m + factor * np.maximum(upper - height_m, FLAT_M)
        return lower.astype(np.float32), upper.astype(np.float32)

    def widened(self, new: NewPlace) -> IntervalTable:
        """This table for places that calibration has not seen."""
        return replace(self, new_place=new)

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready, heights rounded to centimetres."""
        rounded = {name: np.round(getattr(self, name), digits).tolist() for name, digits in _ARRAYS.items()}
        return {"version": VERSION, "method": "spread", **rounded}

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any]) -> IntervalTable:
        """Rebuild. Raises CheckpointError where it is not such a table."""
        try:
            given: dict[str, Any] = {name: np.asarray(raw[name], np.float64) for name in _ARRAYS}
            table = cls(**given)
        except (KeyError, TypeError, ValueError) as error:
            raise CheckpointError(f"the model's interval calibration cannot be used: {error}") from error
        shape = len(table.levels), len(table.height_m), len(table.spread)
        known = raw.get("version") == VERSION and raw.get("method", "spread") == "spread"
        if not known or table.below_m.shape != shape or table.above_m.shape != shape:
            raise CheckpointError(
                "the model's interval calibration has another form", remedy="run canopy calibrate interval"
            )
        return table


def check_level(levels: Sequence[float] | np.ndarray, level: float) -> None:
    """Raises ConfigError for a level outside those that a calibration stores."""
    if not levels[0] <= level <= levels[-1]:
        raise ConfigError(
            f"an interval of {level:g}", where="--interval", expected=f"{levels[0]:g} to {levels[-1]:g}"
        )


def at_level(levels: Sequence[float] | np.ndarray, table: np.ndarray, level: float) -> np.ndarray:
    """A table (levels, ...) between its rows. Raises ConfigError, as `check_level`."""
    check_level(levels, level)
    right = int(np.clip(np.searchsorted(levels, level), 1, len(levels) - 1))
    share = (level - levels[right - 1]) / (levels[right] - levels[right - 1])
    return (1 - share) * table[right - 1] + share * table[right]


def table_of(card: Mapping[str, Any], corners: Sequence[LonLat] = ()) -> IntervalTable:
    """The calibration in a model's card, for an area with these corners.

    A card that knows how much wider bands must be in new places gives those of places it has seen only where
    every corner lies within `NEAR_KM` of its calibration data.

    Raises:
        ConfigError: there is none; it says how to make one. CheckpointError: it cannot be used.
    """
    if CARD_KEY not in card:
        raise ConfigError(
            "this model has no interval calibration", where="--interval",
            remedy="make one: canopy calibrate interval MODEL --data CHIPS -o MODEL2.safetensors",
        )  # fmt: skip
    raw = card[CARD_KEY]
    table = IntervalTable.from_dict(raw)
    if "new_place" not in raw or (corners and all(_is_near(raw.get("places", ()), c) for c in corners)):
        return table
    try:
        new = NewPlace(*(np.asarray(raw["new_place"][key], np.float64) for key in ("height_m", "factor")))
        if new.factor.shape != (len(table.levels), len(new.height_m)):
            raise ValueError("other sizes")
        return table.widened(new)
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"the model's bands of new places cannot be used: {error}") from error


def _is_near(places: Sequence[LonLat], lonlat: LonLat) -> bool:
    """Whether one of the places lies within `NEAR_KM`, by haversines."""
    if not len(places):
        return False
    lon, lat = np.radians(np.asarray(places, np.float64)).T
    x, y = np.radians(lonlat)
    half = np.sin((lat - y) / 2) ** 2 + np.cos(lat) * np.cos(y) * np.sin((lon - x) / 2) ** 2
    return bool((2 * 6371.0 * np.arcsin(np.sqrt(half))).min() <= NEAR_KM)


def hats(knots: np.ndarray, x: np.ndarray) -> list[tuple[np.ndarray, np.ndarray]]:
    """The two knots round each x and their weights, constant beyond the outermost."""
    if len(knots) == 1:
        return [(np.zeros(x.shape, np.int64), np.ones(x.shape))]
    left = np.clip(np.searchsorted(knots, x, side="right") - 1, 0, len(knots) - 2)
    share = np.clip((x - knots[left]) / (knots[left + 1] - knots[left]), 0.0, 1.0)
    return [(left, 1 - share), (left + 1, share)]


def dense_hats(knots: np.ndarray, x: np.ndarray) -> np.ndarray:
    """`hats` of all knots: (n, k) for x (n,); rows sum to 1."""
    out = np.zeros((len(x), len(knots)))
    for i, w in hats(knots, x):
        out[np.arange(len(x)), i] += w
    return out
