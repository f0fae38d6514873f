"""Fitting what `canopy.evaluation.areas` needs to know of a model: how alike errors are, and how large.

The correlation is fitted to held-out tiles. How many standard deviations an interval needs is read off
windows of held-out tiles, size by size (split conformal, with squares of 128 m as the exchangeable unit).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from scipy.optimize import nnls

from canopy.calibration.collect import Scored
from canopy.errors import DataError
from canopy.evaluation.areas import AREA_LEVELS, RANGES_M, SIZES_M, AreaModel
from canopy.models.intervals import IntervalTable

BAND_LEVEL = 0.9
_LAGS_M = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 180)
_LEAST_SIDE, _LEAST_KNOWN, _MOST_WINDOWS = 100, 0.7, 40
# Windows within squares of this side, or within one window if that is larger, count as one unit.
_UNIT_M = 128


Tables = IntervalTable | Mapping[str, IntervalTable]


class _Tile:
    """A held-out tile: known (h, w); maps (4, h, w) of height, both ends of its band and truth, 0 in gaps."""

    def __init__(self, chip: Scored, table: Tables) -> None:
        table = table if isinstance(table, IntervalTable) else table[chip.id]
        self.known = chip.known
        height, spread, truth = (
            np.where(self.known, v, 0) for v in (chip.height_m, chip.spread_m, chip.truth_m)
        )
        self.maps = np.stack([height, *table.bounds(height, spread, BAND_LEVEL), truth]).astype(np.float64)

    def windows(self, size: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Squares side by side, if well known: means (n, 4), known cells (n,), and units (n, 2)."""
        h, w = self.known.shape
        step = min(size, h, w)
        found = []
        for r in range(0, h - step + 1, step) if step >= 0.9 * size else ():
            for c in range(0, w - step + 1, step):
                square = np.s_[r : r + step, c : c + step]
                cells = self.known[square].sum()
                if cells >= _LEAST_KNOWN * step * step:
                    means = self.maps[:, *square].sum(axis=(1, 2)) / cells
                    found.append((*means, cells, r // _UNIT_M, c // _UNIT_M))
        picked = found[:: max(1, -(-len(found) // _MOST_WINDOWS))]
        table = np.array(picked, np.float64).reshape(-1, 7)
        return table[:, :4], table[:, 4], table[:, 5:]


def _tiles(scored: Sequence[Scored], table: Tables) -> list[_Tile]:
    return [_Tile(chip, table) for chip in scored if min(chip.truth_m.shape) >= _LEAST_SIDE]


def fit_areas(scored: Sequence[Scored], table: Tables) -> AreaModel:
    """Fit correlation and factors on held-out tiles; `table` is one for all, or one by chip id.

    Raises:
        DataError: fewer than four tiles of 100 m or more.
    """
    tiles = _tiles(scored, table)
    if len(tiles) < 4:
        raise DataError(f"{len(tiles)} held-out tiles", expected="at least 4 of 100 m or more for areas")
    errors = [tile.maps[3] - tile.maps[0] for tile in tiles]
    leans = [(tile.maps[1] + tile.maps[2]) / 2 - tile.maps[0] for tile in tiles]
    top = sum(float((e * lean).sum()) for e, lean in zip(errors, leans, strict=True))
    pull = float(np.clip(top / max(sum(float((lean**2).sum()) for lean in leans), 1e-9), 0.0, 1.0))
    nugget, weights, plateau = _fit_correlation(tiles, pull)
    factors = np.ones((len(AREA_LEVELS), len(SIZES_M)))
    plain = AreaModel(pull, nugget, plateau, weights, factors)
    for n, size in enumerate(SIZES_M):
        whole = plain.mean_correlation(np.ones((size, size), bool), 1.0)
        ratios, units = [], []
        for number, tile in enumerate(tiles):
            means, _, unit = tile.windows(size)
            centre, sd = plain.centre_and_sd(means, whole)
            ratios.append(np.abs(means[:, 3] - centre) / sd)
            units.append(np.insert(unit, 0, number, axis=1))
        if any(len(part) for part in ratios):
            factors[:, n] = _conformal(np.concatenate(ratios), np.concatenate(units))
        elif n:
            factors[:, n] = factors[:, n - 1]
    return AreaModel(pull, nugget, plateau, weights, np.maximum.accumulate(factors, axis=0))


def area_coverage(
    ways: Sequence[tuple[Sequence[Scored], Tables, AreaModel]], level: float = 0.9
) -> dict[str, dict[str, float]]:
    """Share of simulated square windows whose true mean lies inside, by side in metres, with mean widths.

    Each part of the chips has its own table and model.
    """
    parts, rows = [(_tiles(scored, table), model) for scored, table, model in ways], {}
    for size in SIZES_M:
        inside: list[bool] = []
        widths: list[float] = []
        for tiles, model in parts:
            whole = model.mean_correlation(np.ones((size, size), bool), 1.0)
            for means, areas, _ in (tile.windows(size) for tile in tiles):
                lower, upper, _ = model.interval(means, whole, areas, level)
                inside.extend((lower <= means[:, 3]) & (means[:, 3] <= upper))
                widths.extend(upper - lower)
        if inside:
            rows[str(size)] = {
                "n": len(inside), "coverage": round(float(np.mean(inside)), 4),
                "mean_width_m": round(float(np.mean(widths)), 2),
            }  # fmt: skip
    return rows


def _fit_correlation(tiles: Sequence[_Tile], pull: float) -> tuple[float, np.ndarray, float]:
    """Nugget, weights and plateau: sum e_i e_j / sum w_i w_j by distance, then non-negative least squares."""
    lags = np.array((0, *_LAGS_M))
    totals = np.zeros((3, len(lags)))
    for tile in tiles:
        height, low, high, truth = tile.maps
        error = truth - height - pull * ((low + high) / 2 - height)
        n = 2 * max(height.shape)
        steps = np.fft.fftfreq(n, 1 / n)
        ring = np.rint(np.hypot(steps[:, None], steps[None, :])).astype(np.int64).ravel()
        for total, values in zip(totals, (error, (high - low) / 2, tile.known * 1.0), strict=True):
            spectrum = np.fft.rfft2(values, (n, n))
            product = np.fft.irfft2(spectrum * spectrum.conj(), (n, n))
            total += np.bincount(ring, product.ravel(), lags[-1] + 1)[lags]
    seen = totals[1] > 0
    top, bottom, pairs = totals[:, seen]
    lag = lags[seen].astype(np.float64)
    design = np.column_stack([lag == 0, np.exp(-lag[:, None] / np.array(RANGES_M)), np.ones(len(lag))])
    trust = pairs**0.25  # far lags have many pairs, which are anything but independent
    solution, _ = nnls(design * trust[:, None], top / bottom * trust)
    return float(solution[0]), solution[1:-1], float(solution[-1])


def _conformal(ratio: np.ndarray, unit: np.ndarray) -> list[float]:
    """What a window of a further unit stays below, by level; every unit (rows of numbers) counts once."""
    _, number, count = np.unique(unit, axis=0, return_inverse=True, return_counts=True)
    order = np.argsort(ratio)
    mass = np.cumsum((1 / count[number.ravel()])[order]) / (len(count) + 1)
    at = np.minimum(np.searchsorted(mass, AREA_LEVELS), len(ratio) - 1)
    return ratio[order][at].tolist()
