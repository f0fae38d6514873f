"""How far a height map lies from its reference, measured on the heights themselves.

Both sides are cut into windows, reduced to structures of crown size (a difference of Gaussians, holes filled
with the local mean), and correlated for all displacements at once by Fourier transform. The surfaces of all
windows are added; their highest point, refined by a parabola through its neighbours, is the displacement.
A displacement is only acted upon (`sure`) when the structures correlate there and the windows agree.

Judging maps by height rasters, window by window: memory does not grow with the rasters.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from affine import Affine
from scipy import fft, ndimage

from canopy.chips.register import peak_of
from canopy.errors import InputError
from canopy.evaluation.maps import SAME_GSD, BlockSums, HeightSide, common_grid, preview_side
from canopy.evaluation.scores import BOUNDED, Bootstrap, MapShift, Preview, Tally, Window
from canopy.evaluation.strata import BlockLayout, Stratifier
from canopy.evaluation.tables import pixel_metres
from canopy.geo.grid import Grid
from canopy.metrics import BLOCK_PX
from canopy.runtime import NoProgress, Progress

LIMIT_M = 10.0
LEAST_FIT = 0.2
_FINE_PX, _COARSE_PX = 0.7, 6.0
_LEAST_VALID = 0.3
_LEAST_SIDE_PX = 24


class ShiftMeter:
    """Takes windows of both sides, then tells the displacement.

    Args:
        pixel_m: ground metres per pixel, (x, y).
        limit_m: largest displacement looked for, at least two pixels.
    """

    def __init__(self, pixel_m: tuple[float, float], limit_m: float = LIMIT_M) -> None:
        self.pixel_m = pixel_m
        self.reach = tuple(max(2, int(np.ceil(limit_m / side))) for side in pixel_m)  # (x, y)
        rows, cols = 2 * self.reach[1] + 1, 2 * self.reach[0] + 1
        self._surface = np.zeros((rows, cols))
        self._power = np.zeros(2)
        self._peaks: list[tuple[float, float]] = []

    def add(self, map_m: np.ndarray, reference_m: np.ndarray, valid: np.ndarray) -> bool:
        """Add a window (h, w) of heights on one grid; False where it tells nothing (small, empty, flat)."""
        if min(valid.shape) < max(_LEAST_SIDE_PX, 2 * max(self.reach)) or valid.mean() < _LEAST_VALID:
            return False
        p, r = (_structure(x, valid) for x in (map_m, reference_m))
        power = (p**2).sum(), (r**2).sum()
        if min(power) < 1e-6 * p.size:
            return False
        surface = _correlate(p, r, self.reach)
        self._surface += surface
        self._power += power
        dy, dx, _ = peak_of(surface)
        self._peaks.append((dx * self.pixel_m[0], dy * self.pixel_m[1]))
        return True

    def result(self) -> MapShift | None:
        """The displacement; None where no window told anything."""
        if not self._peaks:
            return None
        fit = self._surface / np.sqrt(self._power[0] * self._power[1])
        dy, dx, best = peak_of(fit)
        east, north = dx * self.pixel_m[0], -dy * self.pixel_m[1]
        spread = None
        if len(self._peaks) > 1:
            away = np.hypot(*(np.array(self._peaks) - (east, -north)).T)
            spread = float(np.median(away))
        at_zero = float(fit[self.reach[1], self.reach[0]])
        note = self._doubt(best, dx, dy, spread)
        return MapShift(
            round(east, 3) + 0.0, round(north, 3) + 0.0, round(best, 4), round(at_zero, 4),
            None if spread is None else round(spread, 3), len(self._peaks), note is None, note,
        )  # fmt: skip

    def _doubt(self, fit: float, dx: float, dy: float, spread: float | None) -> str | None:
        """Why the displacement may not be acted upon; None where it may."""
        if fit < LEAST_FIT:
            return f"the structures of map and reference hardly correlate ({fit:.2f}, needed {LEAST_FIT})"
        if abs(dx) > self.reach[0] - 0.5 or abs(dy) > self.reach[1] - 0.5:
            return f"at the edge of what was searched ({LIMIT_M:g} m)"
        coarse = max(self.pixel_m)
        if spread is not None and spread > max(1.5 * coarse, 1.5):
            return f"single windows disagree (median distance {spread:.1f} m)"
        return None


def measure_shift(
    windows: Iterable[tuple[np.ndarray, np.ndarray, np.ndarray]],
    pixel_m: tuple[float, float],
    limit_m: float = LIMIT_M,
) -> MapShift | None:
    """Displacement of maps in windows (map_m, reference_m, valid), each (h, w); see `ShiftMeter`."""
    meter = ShiftMeter(pixel_m, limit_m)
    for map_m, reference_m, valid in windows:
        meter.add(map_m, reference_m, valid)
    return meter.result()


def _structure(height_m: np.ndarray, valid: np.ndarray) -> np.ndarray:
    """Heights between two scales, 0 on average and where nothing is known, faded out towards the edges."""
    weight = valid.astype(np.float64)
    local = ndimage.gaussian_filter(weight, _COARSE_PX)
    slow = ndimage.gaussian_filter(np.where(valid, height_m, 0.0), _COARSE_PX) / np.maximum(local, 1e-6)
    detail = ndimage.gaussian_filter(np.where(valid, height_m - slow, 0.0), _FINE_PX)
    rows, cols = (_fade(n) for n in valid.shape)
    detail *= rows[:, None] * cols
    return np.where(valid, detail - detail[valid].mean(), 0.0)


def _fade(size: int) -> np.ndarray:
    edge = max(1, min(16, size // 6))
    ramp = np.ones(size)
    ramp[:edge] = np.sin(np.linspace(0, np.pi / 2, edge, endpoint=False)) ** 2
    ramp[size - edge :] = ramp[:edge][::-1]
    return ramp


def _correlate(p: np.ndarray, r: np.ndarray, reach: tuple[int, ...]) -> np.ndarray:
    """Sum of p[row + dy, col + dx] r[row, col] for |dx|, |dy| within reach; displacement 0 in the middle."""
    shape = [fft.next_fast_len(n + 2 * k, real=True) for n, k in zip(p.shape, reach[::-1], strict=True)]
    product = fft.rfft2(p, shape) * np.conj(fft.rfft2(r, shape))
    surface = fft.irfft2(product, shape)
    rows, cols = (np.arange(-k, k + 1) for k in reach[::-1])
    return surface[np.ix_(rows, cols)]


# A multiple of 50: windows must not cut the cells of block-R2.
WINDOW_PX = 20 * BLOCK_PX
# Windows in which the shift is measured: enough to average, few enough to be quick.
SHIFT_PX, SHIFT_WINDOWS, SHIFT_CANDIDATES = 400, 16, 48
# A shift below this share of a pixel changes nothing.
_LEAST_SHIFT_PX = 0.05
_PREVIEWS, _PREVIEW_PX, _PREVIEW_TOTAL = 64, 1200, 3_000_000


@dataclass(frozen=True)
class RasterPair:
    """A map and a reference of one place; `site` names it in tables."""

    map: HeightSide
    reference: HeightSide
    site: str


@dataclass(frozen=True)
class Rules:
    """How a judgement is done.

    Attributes:
        stat: what a pixel takes from the finer side's pixels in it: mean, max or pNN.
        floor_m: below it both sides count as 0; None: what the reference's tags say.
        shift: whether to measure the shift (and score with it undone).
        block_m: side of the resampled blocks; None: chosen by `BlockLayout.of`.
    """

    stat: str = "mean"
    floor_m: float | None = None
    shift: bool = True
    block_m: float | None = None
    bootstrap: Bootstrap = field(default_factory=Bootstrap)


@dataclass
class RasterTally:
    """What the windows gave: sums, sums with the shift undone, pictures; metrics that cannot be -> why."""

    layout: BlockLayout
    plain: Tally
    corrected: Tally | None
    shift: MapShift | None
    shift_note: str | None
    previews: list[Preview]
    absent: dict[str, str]


def tally_rasters(
    pairs: Sequence[RasterPair],
    rules: Rules,
    strata: Sequence[Stratifier] = (),
    progress: Progress | None = None,
) -> RasterTally:
    """Read all pairs once (and some windows of them before, to measure the shift) and add them up.

    Raises:
        InputError: maps and references that do not overlap, or have no pixel in common.
        ImageryError: a file that cannot be read.
    """
    progress = progress or NoProgress()
    grids = [common_grid(pair.reference.product, pair.map.product) for pair in pairs]
    layout = BlockLayout.of(grids, rules.block_m)
    shift, note = _measured(pairs, grids, rules, progress)
    offset = _offset_px(shift, grids[0])
    plain = Tally(layout.count)
    corrected = Tally(layout.count) if offset is not None and any(offset) else None
    unbounded = _unbounded(pairs, rules.stat)
    previews: list[Preview] = []
    side = _preview_px(len(pairs))
    windows = [list(_windows(grid, WINDOW_PX)) for grid in grids]
    progress.start(sum(map(len, windows)), "scoring")
    for index, (pair, grid) in enumerate(zip(pairs, grids, strict=True)):
        picture = BlockSums(grid, preview_side(grid, side), ("map", "reference"))
        for row, col, shape in windows[index]:
            place = layout.local(index, row, col, shape)
            reader = _PairReader(pair, grid, rules, (row, col), shape, bounds=unbounded is None)
            window = reader.window(place)
            codes = _codes(strata, grid.window(row, col, *shape), window, pair.site)
            plain.add_window(window, codes)
            picture.add(row, col, window.valid, {"map": window.map_m, "reference": window.reference_m})
            if corrected is not None and offset is not None:
                corrected.add_window(reader.window(place, offset))
            progress.advance()
        if len(previews) < _PREVIEWS:
            previews.append(_preview(picture, pair.site, grid))
    if not plain.n:
        raise InputError(
            "no pixel is valid in both",
            where=f"{pairs[0].map.product.name}, {pairs[0].reference.product.name}",
            expected="heights of the same place",
        )
    if corrected is None and offset is not None:
        corrected = plain
    absent = {} if unbounded is None else dict.fromkeys(BOUNDED, unbounded)
    return RasterTally(layout, plain, corrected, shift, note, previews, absent)


# What `canopy calibrate interval` calibrates bands on: the pixels of lidar, means of 2 x 2 of a map of 0.5 m.
BAND_CELL_M = 1.0


def _unbounded(pairs: Sequence[RasterPair], stat: str) -> str | None:
    """Why the maps' interval bands cannot be judged; None where they can, or there are none.

    A band is of the mean height of a cell of `BAND_CELL_M`, or of a pixel that is larger: the mean of many
    bands is far too wide an interval of the mean height, and none at all of a percentile. One such pair is
    enough: a coverage over some sites would pass for all's.
    """
    for pair in pairs:
        ours, theirs = pair.map.product, pair.reference.product
        if ours.has_interval and stat != "mean":
            return f"the map's bands are intervals of a pixel's height, not of the {stat} of pixels"
        cell_m = max(ours.gsd_m, BAND_CELL_M)
        if ours.has_interval and theirs.gsd_m > cell_m * (1 + SAME_GSD):
            return (
                f"the map's bands are intervals of cells of {cell_m:.3g} m: their means over the reference's "
                f"pixels of {theirs.gsd_m:.3g} m are none"
            )
    return None


class _PairReader:
    """Both sides of one window; the reference is read once for all displacements."""

    def __init__(
        self, pair: RasterPair, grid: Grid, rules: Rules, corner: tuple[int, int], shape: tuple[int, int],
        *, bounds: bool,
    ) -> None:  # fmt: skip
        self.pair, self.rules, self.bounds = pair, rules, bounds
        row, col = corner
        self.core = grid.window(row, col, *shape)
        self.margin = self.core.pad(1)
        floor = rules.floor_m if rules.floor_m is not None else pair.reference.floor_m
        self.floor = floor
        self._reference, self._known = pair.reference.read(self.margin, rules.stat)
        # The frame of pixels round the compared area belongs to nobody.
        rows, cols = (np.arange(-1, n + 1) for n in shape)
        rows_in = (row + rows >= 0) & (row + rows < grid.height)
        cols_in = (col + cols >= 0) & (col + cols < grid.width)
        self._known &= rows_in[:, None] & cols_in
        self._reference = np.where(self._reference < floor, 0, self._reference) if floor else self._reference

    def window(
        self, place: tuple[np.ndarray, np.ndarray], offset: tuple[float, float] = (0.0, 0.0)
    ) -> Window:
        """The window with the map taken from (right, down) pixels further."""
        heights, valid = self.pair.map.read(moved(self.margin, offset), self.rules.stat)
        bounds = self.pair.map.read_bounds(moved(self.core, offset)) if self.bounds else None
        if self.floor:
            heights = np.where(heights < self.floor, 0, heights)
            if bounds is not None:
                bounds = tuple(np.where(b < self.floor, 0, b) for b in bounds)  # type: ignore[assignment]
        return Window(heights, self._reference, valid & self._known, *place, bounds)


def moved(grid: Grid, offset: tuple[float, float]) -> Grid:
    """The grid moved by (right, down) pixels, fractions too."""
    if offset == (0.0, 0.0):
        return grid
    px, py = grid.pixel
    x, y = grid.xy(offset[1], offset[0])
    return Grid.of(grid.crs, Affine(px, 0, x, 0, -py, y), grid.shape)


def _windows(grid: Grid, side: int) -> Iterator[tuple[int, int, tuple[int, int]]]:
    for row in range(0, grid.height, side):
        for col in range(0, grid.width, side):
            yield row, col, (min(side, grid.height - row), min(side, grid.width - col))


def _codes(strata: Sequence[Stratifier], grid: Grid, window: Window, site: str) -> dict[str, Any]:
    found = {}
    for way in strata:
        codes = way.window(grid, window.reference_m, window.valid, site)
        found[way.by] = (codes, tuple(way.names))
    return found


# ---- shift ----------------------------------------------------------------------------------------
def _measured(
    pairs: Sequence[RasterPair], grids: Sequence[Grid], rules: Rules, progress: Progress
) -> tuple[MapShift | None, str | None]:
    """One displacement for all pairs, and why there is none."""
    if not rules.shift:
        return None, "not asked for"
    sizes = [pixel_metres(grid) for grid in grids]
    if any(abs(a / b - 1) > 0.05 for size in sizes for a, b in zip(size, sizes[0], strict=True)):
        return None, "the references have pixels of different sizes"
    if max(sizes[0]) > LIMIT_M:
        return None, f"pixels of {max(sizes[0]):.0f} m are too coarse to measure a shift of metres"
    every = [
        (index, row, col, shape)
        for index, grid in enumerate(grids)
        for row, col, shape in _windows(grid, SHIFT_PX)
    ]
    chosen = [every[int(i)] for i in np.unique(np.linspace(0, len(every) - 1, SHIFT_CANDIDATES).round())]
    order = [i for first in range(3) for i in range(first, len(chosen), 3)]  # spread, should few be enough
    meter = ShiftMeter(sizes[0])
    used = 0
    progress.start(len(order), "measuring the shift")
    for i in order:
        index, row, col, shape = chosen[i]
        if used < SHIFT_WINDOWS:
            pair, part = pairs[index], grids[index].window(row, col, *shape)
            (p, p_ok), (r, r_ok) = pair.map.read(part, rules.stat), pair.reference.read(part, rules.stat)
            used += meter.add(p, r, p_ok & r_ok)
        progress.advance()
    for pair in pairs:
        pair.map.strange = pair.reference.strange = 0  # counted again while scoring
    found = meter.result()
    if found is None:
        return None, "no window with enough height structure on both sides"
    return found, found.note


def _offset_px(shift: MapShift | None, grid: Grid) -> tuple[float, float] | None:
    """(right, down) pixels to read the map from; None where nothing may be undone."""
    if shift is None or not shift.sure:
        return None
    mx, my = pixel_metres(grid)
    offset = shift.east_m / mx, -shift.north_m / my
    return offset if np.hypot(*offset) >= _LEAST_SHIFT_PX else (0.0, 0.0)


# ---- pictures -------------------------------------------------------------------------------------
def _preview_px(pairs: int) -> int:
    return max(64, min(_PREVIEW_PX, int((_PREVIEW_TOTAL / min(pairs, _PREVIEWS)) ** 0.5)))


def _preview(picture: BlockSums, site: str, grid: Grid) -> Preview:
    frame = picture.block_grid()
    map_m, reference_m = (picture.mean(name).astype(np.float32) for name in ("map", "reference"))
    return Preview(site, map_m, reference_m, frame.bounds, str(grid.crs), round(frame.gsd_m, 4))
