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
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from scipy.optimize import nnls

from canopy.calibration.collect import Scored
from canopy.errors import DataError
from canopy.geo.crs import to_lonlat
from canopy.geo.grid import Grid, tiles_over
from canopy.models.intervals import IntervalTable, at_level, check_level
from canopy.runtime import NoProgress, Progress

if TYPE_CHECKING:
    import geopandas
    import pandas
    from shapely.geometry.base import BaseGeometry

    from canopy.evaluation.maps import HeightMap
    from canopy.evaluation.opening import HeightSource

AREA_LEVELS = (0.5, 0.68, 0.8, 0.9, 0.95)
SIZES_M = (8, 16, 32, 64, 128, 256)
RANGES_M = (3.0, 8.0, 20.0, 60.0, 200.0)
BAND_LEVEL = 0.9
TAG = "CANOPY_AREA_MODEL"
_PAIRS = 4096
# Over bare ground bands close; what remains is the error of the ground itself.
_FLOOR_M = 0.3
_LAGS_M = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 180)
_LEAST_SIDE, _LEAST_KNOWN, _MOST_WINDOWS = 100, 0.7, 40
# Windows within squares of this side, or within one window if that is larger, count as one unit.
_UNIT_M = 128
_TILE_PX = 1024
# A polygon's shape is drawn with at most this many pixels a side to measure distances within it.
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
        sd = np.hypot((high - low) / 2 * np.sqrt(max(correlation, 0.0)), _FLOOR_M)
        return height + self.pull * ((low + high) / 2 - height), sd

    def interval(
        self, means: np.ndarray, correlation: float, area_m2: np.ndarray | float, level: float = 0.9
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Lower and upper ends of intervals and the model's standard deviations, metres, all (n,).

        Args:
            means: (n, 3), over the area: of heights, and of both ends of their 90 % bands.
            correlation: of `mean_correlation`.

        Raises:
            ConfigError: a level outside `AREA_LEVELS`.
        """
        centre, sd = self.centre_and_sd(means, correlation)
        side = np.log(np.maximum(area_m2, 1.0)) / 2
        by_size = np.stack([np.interp(side, np.log(SIZES_M), row) for row in self.factors])
        reach = at_level(AREA_LEVELS, by_size, level) * sd
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


# ---- fitting ----------------------------------------------------------------------------------------------
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


# ---- polygons ---------------------------------------------------------------------------------------------
def zone_intervals(
    height_map: HeightSource,
    zones: str | Path | geopandas.GeoDataFrame,
    level: float = 0.9,
    *,
    progress: Progress | None = None,
) -> pandas.DataFrame:
    """Columns mean_lower_m, mean_upper_m and mean_sd_m, one row per feature of `zones`, in its order.

    The means are over the polygon's pixels of a map that was predicted with bands, weighted by the share of
    each that it covers. NaN where the polygon has no pixel.

    Raises:
        ConfigError: a level outside `AREA_LEVELS`. DataError: a map without 90 % bands and area model.
        InputError: an unreadable map or zones.
    """
    import pandas

    from canopy.evaluation.grids import own_grid
    from canopy.evaluation.opening import open_heights
    from canopy.geo.vector import read_zones

    check_level(AREA_LEVELS, level)
    frame, crs, shapes = read_zones(zones)
    progress = progress or NoProgress()
    progress.start(len(shapes), "intervals")
    rows = []
    with open_heights(height_map) as heights:
        model, grid = area_model_of(heights.tags if heights.has_interval else {}), own_grid(heights)
        for shape in shapes:
            there = None if shape is None else to_lonlat(shape, crs, grid.crs)
            rows.append(_one_zone(heights, grid, there, model, level))
            progress.advance()
    return pandas.DataFrame(rows, index=frame.index, columns=["mean_lower_m", "mean_upper_m", "mean_sd_m"])


def _one_zone(
    heights: HeightMap, grid: Grid, shape: BaseGeometry | None, model: AreaModel, level: float
) -> tuple[float, float, float]:
    """Lower and upper end and standard deviation of one polygon in the map's CRS."""
    from canopy.evaluation.zones import coverage, window_of

    nothing = (float("nan"),) * 3
    window = None if shape is None or shape.is_empty else window_of(grid, shape, grid.bounds)
    if window is None or shape is None:
        return nothing
    step = max(1, -(-max(window.shape) // _SHAPE_PX))
    drawn = np.zeros(tuple(-(-n // step) for n in window.shape))
    sums, weight = np.zeros(3), 0.0
    for tile in tiles_over(window, _TILE_PX):
        share = coverage(shape, tile)
        if share is None:
            continue
        values, valid = heights.read(tile, interval=True)
        share = np.where(valid, share, 0.0)
        sums += (values * share).sum(axis=(1, 2), dtype=np.float64)
        weight += float(share.sum())
        top, left = window.offset_of(tile)
        rows, cols = np.nonzero(share > 0)
        np.add.at(drawn, ((rows + top) // step, (cols + left) // step), share[rows, cols])
    if weight <= 0:
        return nothing
    # Partly covered pixels of the drawing count where the polygon has at least half of the fullest.
    inside = drawn >= 0.5 * min(drawn.max(), step * step)
    rho = model.mean_correlation(inside, grid.gsd_m * step)
    lower, upper, sd = model.interval(sums / weight, rho, weight * grid.gsd_m**2, level)
    return float(lower), float(upper), float(sd)
