"""Which GEDI shots are good enough, by named filters, and how much a shot counts in training.

strict: quality_flag = 1, degrade_flag = 0, sensitivity above 0.95 (0.98 within the tropics, where the canopy
    is denser), landsat_water_persistence below 10 %, urban_proportion below 50 %. For training and scores.
loose: sensitivity at least 0.5, that of algorithm setting 2 above 0.7, and the ground within 150 m of the
    digital elevation model. For maps of large areas, where numbers make up for noise.
none: every shot that has a place.

A missing value never passes. A rejected shot is counted once, under the first criterion that it fails.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from canopy.errors import InputError

Columns = Mapping[str, np.ndarray]
# Half the width of the tropics, degrees.
TROPICS_LAT = 23.44
# Coverage beams carry half the energy of the full-power ones (Dubayah et al. 2020).
BEAM_WEIGHT = {"full": 1.0, "coverage": 0.5}


@dataclass(frozen=True)
class Criterion:
    """A rule that a shot passes or not; `needs` are the columns it looks at."""

    name: str
    needs: tuple[str, ...]
    passes: Callable[[Columns], np.ndarray]


def _sensitive(shots: Columns) -> np.ndarray:
    return shots["sensitivity"] > np.where(np.abs(shots["lat"]) < TROPICS_LAT, 0.98, 0.95)


def _small(column: str, limit: int) -> Callable[[Columns], np.ndarray]:
    # Flags and shares of a missing value are -1.
    return lambda shots: (shots[column] >= 0) & (shots[column] < limit)


def _near_dem(shots: Columns) -> np.ndarray:
    return np.abs(shots["elev_lowestmode"] - shots["dem"]) < 150.0


FILTERS: dict[str, tuple[Criterion, ...]] = {
    "strict": (
        Criterion("quality_flag", ("quality_flag",), lambda shots: shots["quality_flag"] == 1),
        Criterion("degrade_flag", ("degrade_flag",), lambda shots: shots["degrade_flag"] == 0),
        Criterion("sensitivity", ("sensitivity",), _sensitive),
        Criterion("water", ("landsat_water_persistence",), _small("landsat_water_persistence", 10)),
        Criterion("urban", ("urban_proportion",), _small("urban_proportion", 50)),
    ),
    "loose": (
        Criterion("sensitivity", ("sensitivity",), lambda shots: shots["sensitivity"] >= 0.5),
        Criterion("sensitivity_a2", ("sensitivity_a2",), lambda shots: shots["sensitivity_a2"] > 0.7),
        Criterion("elevation", ("elev_lowestmode", "dem"), _near_dem),
    ),
    "none": (),
}


def filter_named(name: str) -> tuple[Criterion, ...]:
    """The criteria of a filter. Raises InputError for an unknown name."""
    if name not in FILTERS:
        raise InputError(f"no filter {name!r}", where="--filter", expected=", ".join(FILTERS))
    return FILTERS[name]


def apply_filter(
    criteria: tuple[Criterion, ...], shots: Columns, count: int
) -> tuple[np.ndarray, dict[str, int]]:
    """Which of `count` shots pass, bool (count,), and how many each criterion was the first to reject."""
    good, rejected = np.ones(count, bool), {}
    for criterion in criteria:
        with np.errstate(invalid="ignore"):  # a comparison with a missing value is a rejection
            passed = good & criterion.passes(shots)
        rejected[criterion.name] = int(good.sum() - passed.sum())
        good = passed
    return good, rejected


def shot_weights(beam_type: str | None, sensitivity: np.ndarray) -> np.ndarray:
    """How much each shot counts in the footprint loss, float32 (n,) in 0..1; GEDI scores count all alike.

    The beam's share (full power 1, coverage 0.5) times a ramp in sensitivity, the canopy cover through which
    the pulse still reaches the ground: 0 at 0, 0.25 at 0.5 (the loose filter's limit), 1 from 0.95 up. A
    missing sensitivity counts as 0.5, an unknown beam as a coverage beam. Flags are the filters' business.
    """
    known = np.where(np.isfinite(sensitivity), sensitivity, 0.5)
    ramp = np.interp(known, [0.0, 0.5, 0.95], [0.0, 0.25, 1.0])
    return (BEAM_WEIGHT.get(beam_type or "", BEAM_WEIGHT["coverage"]) * ramp).astype(np.float32)
