"""Fitting the error of area means: correlogram and conformal factors from held-out tiles."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.optimize import nnls

from canopy.calibration.areas import AREA_LEVELS, BAND_LEVEL, FLOOR_M, RANGES_M, SIZES_M, AreaModel
from canopy.calibration.collect import Scored
from canopy.errors import DataError
from canopy.models.intervals import IntervalTable

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
    hint = table.hint_of(chip.hint_m, BAND_LEVEL)
    return table.bounds(np.where(k, chip.height_m, 0), np.where(k, hint, 0), BAND_LEVEL)


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
