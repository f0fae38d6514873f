"""The footprint gap: how far a model's maps lie below what GEDI sees, even where they are right on average.

A network gives each pixel the height to be expected there, so its maps are smoother than the canopy: the 98th
percentile of a 25 m disc of the map is metres lower than that of the canopy, though the means agree. Matching
RH98 to it would lift every pixel by that gap. So the usual gap of a model is measured on held-out lidar,
travels in its card and in its maps' tags, and only what deviates from it is taken for a bias of the map.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from canopy.calibration.collect import Scored
from canopy.calibration.intervals import weighted_median
from canopy.errors import DataError
from canopy.models.intervals import dense_hats

TAG = "CANOPY_FOOTPRINT_GAP"
CARD_KEY = "footprint_gap"
PERCENTS = (95, 98)
_KNOTS_M = np.array([0.0, 2, 5, 8, 11, 14, 17, 20, 23, 26, 30, 40])
_RADIUS_M, _STEP_M, _LEAST_KNOWN = 12.5, 16, 0.9
_LEAST_DISCS = 30.0


@dataclass(frozen=True)
class FootprintGap:
    """What a disc of the canopy has over the same disc of the map, by the map's percentile there.

    Attributes:
        map_m: (k,) rising, from 0. gap_m: (k,); 0 at 0 m; map + gap rises.
    """

    map_m: np.ndarray
    gap_m: np.ndarray

    def expected(self, map_m: np.ndarray) -> np.ndarray:
        """What GEDI should see over discs whose map percentile is `map_m` (NaN stays NaN)."""
        return map_m + np.interp(map_m, self.map_m, self.gap_m)


def fit_gap(scored: Sequence[Scored], percent: int) -> FootprintGap | None:
    """Median gap by map height on held-out tiles; None where there are too few discs."""
    if not scored:
        return None
    mapped, seen = (np.concatenate(v) for v in zip(*(_discs(chip, percent) for chip in scored), strict=True))
    if len(mapped) < 10 * _LEAST_DISCS:
        return None
    kept, gaps = [0.0], [0.0]
    for knot, weight in zip(_KNOTS_M[1:].tolist(), dense_hats(_KNOTS_M, mapped)[:, 1:].T, strict=True):
        if weight.sum() >= _LEAST_DISCS:
            kept.append(knot)
            gaps.append(weighted_median(seen - mapped, weight))
    if len(kept) < 3:
        return None
    at = np.array(kept)
    # Taller discs of the map are taller discs of the canopy, however the medians fall.
    return FootprintGap(at, np.maximum.accumulate(at + np.array(gaps)) - at)


def gaps_to_dict(scored: Sequence[Scored]) -> dict[str, Any]:
    """JSON-ready gaps of the usual percentiles, for a card; empty where tiles are too few."""
    made = {str(p): fit_gap(scored, p) for p in PERCENTS}
    return {
        p: {"map_m": gap.map_m.tolist(), "gap_m": np.round(gap.gap_m, 2).tolist()}
        for p, gap in made.items()
        if gap is not None
    }


def gap_of(tags: Mapping[str, str], percent: int) -> FootprintGap | None:
    """The gap in a map's tags; None for maps that do not say. Raises DataError for what cannot be read."""
    if TAG not in tags:
        return None
    try:
        raw = json.loads(tags[TAG]).get(str(percent))
        return None if raw is None else FootprintGap(*(np.asarray(raw[k], float) for k in ("map_m", "gap_m")))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError("the map's footprint gap cannot be read", where=TAG) from error


def _discs(chip: Scored, percent: int) -> tuple[np.ndarray, np.ndarray]:
    """Percentiles of map and lidar over 25 m discs on an even lattice of a tile, (n,) each."""
    reach = int(np.ceil(_RADIUS_M))
    steps = np.arange(-reach, reach) + 0.5
    disc = steps[:, None] ** 2 + steps[None, :] ** 2 <= _RADIUS_M**2
    known = chip.known
    pairs = []
    for row in range(reach, known.shape[0] - reach + 1, _STEP_M):
        for col in range(reach, known.shape[1] - reach + 1, _STEP_M):
            place = slice(row - reach, row + reach), slice(col - reach, col + reach)
            inside = disc & known[place]
            if inside.sum() >= _LEAST_KNOWN * disc.sum():
                pairs.append(
                    [np.percentile(v[place][inside], percent) for v in (chip.height_m, chip.truth_m)]
                )
    found = np.array(pairs, np.float64).reshape(-1, 2)
    return found[:, 0], found[:, 1]
