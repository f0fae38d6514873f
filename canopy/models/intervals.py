"""Bands of given coverage round a predicted height, from a calibration that travels in the model's card.

Here is only what prediction needs; the calibration is fitted in `canopy.calibration.intervals`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from canopy.errors import CheckpointError, ConfigError

CARD_KEY = "intervals"
VERSION = 1
SOFT_M = 0.1  # spreads below this are told apart no further


@dataclass(frozen=True)
class IntervalTable:
    """Distances from a predicted height to the ends of its interval, on a lattice of knots.

    Attributes:
        levels: (l,) shares of truths inside, rising.
        height_m: (k,) knots of predicted height, rising.
        typical_m: (k,) typical spread at each.
        spread: (v,) knots of log((s + 0.1) / (typical + 0.1)), rising.
        below_m, above_m: (l, k, v) distances, not negative.
        facts: JSON-ready: what it was fitted on and how it did elsewhere.
    """

    levels: np.ndarray
    height_m: np.ndarray
    typical_m: np.ndarray
    spread: np.ndarray
    below_m: np.ndarray
    above_m: np.ndarray
    facts: dict[str, Any]

    def bounds(
        self, height_m: np.ndarray, spread_m: np.ndarray, level: float
    ) -> tuple[np.ndarray, np.ndarray]:
        """Lower and upper ends in metres, float32, shaped like `height_m`; 0 <= lower <= height <= upper.

        Levels between the stored ones are interpolated.

        Raises:
            ConfigError: a level outside the stored ones.
        """
        below, above = (self._at_level(t, level) for t in (self.below_m, self.above_m))
        k, v = len(self.height_m), len(self.spread)
        hat_k = hats(self.height_m, height_m)
        hat_v = hats(self.spread, self.relative(height_m, spread_m))
        low, high = (np.zeros(height_m.shape) for _ in range(2))
        for i, wi in hat_k:
            for j, wj in hat_v:
                place = np.minimum(i, k - 1), np.minimum(j, v - 1)
                low += wi * wj * below[place]
                high += wi * wj * above[place]
        lower = np.maximum(height_m - low, 0.0)
        return lower.astype(np.float32), (height_m + high).astype(np.float32)

    def check_level(self, level: float) -> None:
        """Raises ConfigError for a level outside the stored ones."""
        if not self.levels[0] <= level <= self.levels[-1]:
            raise ConfigError(
                f"an interval of {level:g}",
                where="--interval",
                expected=f"{self.levels[0]:g} to {self.levels[-1]:g}",
            )

    def sigma(self, height_m: np.ndarray, spread_m: np.ndarray) -> np.ndarray:
        """A scale of the error in metres: half the width of the 68 % interval, at least 0.1 m."""
        lower, upper = self.bounds(height_m, spread_m, 0.68)
        return np.maximum((upper - lower) / 2, 0.1)

    def relative(self, height_m: np.ndarray, spread_m: np.ndarray) -> np.ndarray:
        """How the spread compares with what is usual at this height: log of their ratio, softened."""
        typical = np.interp(height_m, self.height_m, self.typical_m)
        return np.log((spread_m + SOFT_M) / (typical + SOFT_M))

    def _at_level(self, table: np.ndarray, level: float) -> np.ndarray:
        self.check_level(level)
        right = int(np.clip(np.searchsorted(self.levels, level), 1, len(self.levels) - 1))
        share = (level - self.levels[right - 1]) / (self.levels[right] - self.levels[right - 1])
        return (1 - share) * table[right - 1] + share * table[right]

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready, heights rounded to centimetres."""
        arrays = ("levels", "height_m", "typical_m", "spread", "below_m", "above_m")
        rounded = {
            name: np.round(getattr(self, name), 4 if name == "spread" else 2).tolist() for name in arrays
        }
        return {"version": VERSION, **rounded, "facts": self.facts}

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any]) -> IntervalTable:
        """Rebuild. Raises CheckpointError where it is not such a table."""
        try:
            names = ("levels", "height_m", "typical_m", "spread", "below_m", "above_m")
            arrays = {name: np.asarray(raw[name], np.float64) for name in names}
            table = cls(**arrays, facts=dict(raw.get("facts", {})))
        except (KeyError, TypeError, ValueError) as error:
            raise CheckpointError(f"the model's interval calibration cannot be used: {error}") from error
        shape = len(table.levels), len(table.height_m), len(table.spread)
        if raw.get("version") != VERSION or table.below_m.shape != shape or table.above_m.shape != shape:
            raise CheckpointError(
                "the model's interval calibration has another form", remedy="run canopy calibrate interval"
            )
        return table


def table_of(card: Mapping[str, Any]) -> IntervalTable:
    """The calibration in a model's card.

    Raises:
        ConfigError: there is none; it says how to make one.
    """
    if CARD_KEY not in card:
        raise ConfigError(
            "this model has no interval calibration", where="--interval",
            remedy="make one: canopy calibrate interval MODEL --data CHIPS -o MODEL2.safetensors",
        )  # fmt: skip
    return IntervalTable.from_dict(card[CARD_KEY])


def hats(knots: np.ndarray, x: np.ndarray) -> list[tuple[np.ndarray, np.ndarray]]:
    """The two knots round each x and their weights, constant beyond the outermost."""
    if len(knots) == 1:
        return [(np.zeros(x.shape, np.int64), np.ones(x.shape))]
    left = np.clip(np.searchsorted(knots, x, side="right") - 1, 0, len(knots) - 2)
    share = np.clip((x - knots[left]) / (knots[left + 1] - knots[left]), 0.0, 1.0)
    return [(left, 1 - share), (left + 1, share)]
