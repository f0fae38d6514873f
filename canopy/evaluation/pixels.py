"""Maps against height rasters, window by window: memory does not grow with the rasters.

`Tally` adds up windows of pixels, or samples, over the spatial blocks that the bootstrap resamples.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
from affine import Affine

from canopy import metrics
from canopy.chips.register import LIMIT_M, ShiftMeter
from canopy.errors import InputError
from canopy.evaluation.grids import SAME_GSD, BlockSums, common_grid, pixel_metres, read_on
from canopy.evaluation.maps import HeightMap
from canopy.evaluation.scores import (
    BOUNDED,
    HIST_BINS,
    HIST_STEP_M,
    Bootstrap,
    JointHistogram,
    MapShift,
    Preview,
    Scores,
    Scoring,
)
from canopy.evaluation.strata import BlockLayout, Stratifier, cells_of
from canopy.geo.grid import Grid
from canopy.metrics import BLOCK_PX, COLUMN, FIELDS, HeightCounts
from canopy.runtime import NoProgress, Progress

MOST_STRATA = 100
JOINT_EDGES_M = np.arange(0, 80.25, 0.5)
# Codes (h, w) or (n,), -1 for none, and the names of the codes so far.
Codes = Mapping[str, tuple[np.ndarray, Sequence[str]]]


# ---- sums -----------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Window:
    """Matched pixels of a window; arrays (h, w), `margin` ones (h + 2, w + 2): a pixel more on every side.

    Attributes:
        margin_map_m, margin_reference_m, margin_valid: metres, and True where both are known.
        block: local block of each pixel; blocks: number of each local block.
        bounds_m: lower and upper end of the map's interval (h, w), NaN where unknown.
    """

    margin_map_m: np.ndarray
    margin_reference_m: np.ndarray
    margin_valid: np.ndarray
    block: np.ndarray
    blocks: np.ndarray
    bounds_m: tuple[np.ndarray, np.ndarray] | None = None

    @property
    def map_m(self) -> np.ndarray:
        return self.margin_map_m[1:-1, 1:-1]

    @property
    def reference_m(self) -> np.ndarray:
        return self.margin_reference_m[1:-1, 1:-1]

    @property
    def valid(self) -> np.ndarray:
        return self.margin_valid[1:-1, 1:-1]

    @cached_property
    def gradients(self) -> metrics.Gradients:
        """Of both sides; computed once for all ways of cutting."""
        return metrics.gradients(self.margin_map_m, self.margin_reference_m, self.margin_valid)

    def sums(self, codes: np.ndarray, count: int) -> np.ndarray:
        """Sums (count, local blocks, fields) of the parts that codes (h, w) of 0 ... count - 1 name."""
        local = len(self.blocks)
        group = np.where(codes >= 0, codes * local + self.block, -1)
        ok = self.valid & (group >= 0)
        p, r = self.map_m[ok], self.reference_m[ok]
        limits = None if self.bounds_m is None else (self.bounds_m[0][ok], self.bounds_m[1][ok])
        sums = metrics.pixel_sums(p, r, group[ok], count * local, limits)
        cell, cells = cells_of(self.valid.shape)
        # A cell lies in one block; the strata of its pixels make one cell each.
        cell_block = np.zeros(cells, np.int64)
        cell_block[cell.ravel()] = self.block.ravel()
        cell_group = (np.arange(count)[:, None] * local + cell_block).ravel()
        sums += metrics.block_sums(p, r, codes[ok] * cells + cell[ok], cell_group, count * local)
        sums += metrics.gradient_sums(self.gradients, group, count * local)
        return sums.reshape(count, local, len(FIELDS))


@dataclass
class _Part:
    """Sums of one stratum: a row per block, and the height counts of the map and the reference."""

    rows: np.ndarray
    counts: tuple[HeightCounts, HeightCounts] = field(
        default_factory=lambda: (HeightCounts(), HeightCounts())
    )

    def count(self, map_m: np.ndarray, reference_m: np.ndarray) -> None:
        for counts, values in zip(self.counts, (map_m, reference_m), strict=True):
            counts.add(values)


class Tally:
    """Adds up windows or samples over `blocks` spatial blocks, whole and by strata (up to 100 per way)."""

    def __init__(self, blocks: int) -> None:
        self.blocks = blocks
        self.whole = _Part(np.zeros((blocks, len(FIELDS))))
        self.strata: dict[str, dict[str, _Part]] = {}
        self.joint = np.zeros((len(JOINT_EDGES_M) - 1,) * 2, np.int64)
        self._hist = np.zeros((2, blocks, HIST_BINS), np.int32)

    def add_window(self, window: Window, strata: Codes | None = None) -> None:
        """Add a window whose upper-left corner is a corner of a 50 px cell; codes are (h, w)."""
        ok = window.valid
        if not ok.any():
            return
        self.whole.rows[window.blocks] += window.sums(np.zeros(ok.shape, np.int64), 1)[0]
        self._add_heights(window.map_m[ok], window.reference_m[ok], window.block[ok], window.blocks)
        for by, (codes, names) in (strata or {}).items():
            sums = window.sums(codes, len(names))
            for code, name in enumerate(names):
                if sums[code, :, COLUMN["n"]].any():
                    part, here = self._part(by, name), ok & (codes == code)
                    part.rows[window.blocks] += sums[code]
                    part.count(window.map_m[here], window.reference_m[here])

    def add_samples(
        self, map_m: np.ndarray, reference_m: np.ndarray, block: np.ndarray, strata: Codes | None = None
    ) -> None:
        """Add footprints or plots (n,); `block` is the number of each one's block, codes are (n,)."""
        self.whole.rows += metrics.pixel_sums(map_m, reference_m, block, self.blocks)
        numbers, local = np.unique(block, return_inverse=True)
        self._add_heights(map_m, reference_m, local, numbers)
        for by, (codes, names) in (strata or {}).items():
            for code, name in enumerate(names):
                here = codes == code
                if here.any():
                    part = self._part(by, name)
                    part.rows += metrics.pixel_sums(map_m[here], reference_m[here], block[here], self.blocks)
                    part.count(map_m[here], reference_m[here])

    def _part(self, by: str, name: str) -> _Part:
        parts = self.strata.setdefault(by, {})
        if name not in parts:
            if len(parts) >= MOST_STRATA:
                raise InputError(
                    f"more than {MOST_STRATA} classes", where=f"--by {by}", remedy="use coarser classes"
                )
            parts[name] = _Part(np.zeros((self.blocks, len(FIELDS))))
        return parts[name]

    def _add_heights(
        self, map_m: np.ndarray, reference_m: np.ndarray, local: np.ndarray, numbers: np.ndarray
    ) -> None:
        self.whole.count(map_m, reference_m)
        top, step = len(JOINT_EDGES_M) - 2, JOINT_EDGES_M[1]
        i, j = (np.clip(np.floor(x / step), 0, top).astype(np.int64) for x in (reference_m, map_m))
        self.joint += np.bincount(i * (top + 1) + j, minlength=(top + 1) ** 2).reshape(top + 1, top + 1)
        for side, values in enumerate((map_m, reference_m)):
            at = np.clip(np.floor(values / HIST_STEP_M), 0, HIST_BINS - 1).astype(np.int64)
            counts = np.bincount(local * HIST_BINS + at, minlength=len(numbers) * HIST_BINS)
            self._hist[side, numbers] += counts.reshape(len(numbers), HIST_BINS).astype(np.int32)

    @property
    def n_by_block(self) -> np.ndarray:
        """Pixels or samples of each block (blocks,)."""
        return self.whole.rows[:, COLUMN["n"]]

    def joint_histogram(self) -> JointHistogram:
        """Pairs of heights so far."""
        return JointHistogram(JOINT_EDGES_M, self.joint)

    def scores(self, how: Scoring) -> Scores:
        """Scores of everything."""
        return how.scores(self.whole.rows, self.whole.counts, self._hist)

    def stratum_scores(self, by: str, names: Sequence[str], how: Scoring) -> list[tuple[str, Scores]]:
        """(name, scores) of the strata of one way of cutting, in the order of `names`."""
        parts = self.strata.get(by, {})
        return [(name, how.scores(parts[name].rows, parts[name].counts)) for name in names if name in parts]


# ---- rasters --------------------------------------------------------------------------------------
# A multiple of 50: windows must not cut the cells of block-R2.
WINDOW_PX = 20 * BLOCK_PX
# Windows in which the shift is measured: enough to average, few enough to be quick.
SHIFT_PX, SHIFT_WINDOWS, SHIFT_CANDIDATES = 400, 16, 48
# A shift below this share of a pixel changes nothing.
_LEAST_SHIFT_PX = 0.05
_PREVIEWS, _PREVIEW_PX, _PREVIEW_TOTAL = 64, 1200, 3_000_000
# What `canopy calibrate interval` calibrates bands on: the pixels of lidar, means of 2 x 2 of a map of 0.5 m.
BAND_CELL_M = 1.0


@dataclass(frozen=True)
class RasterPair:
    """A map and a reference of one place; `site` names it in tables."""

    map: HeightMap
    reference: HeightMap
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

    def floor_of(self, reference: HeightMap) -> float:
        """The floor that counts for a reference."""
        return self.floor_m if self.floor_m is not None else reference.floor_m


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
    grids = [common_grid(pair.reference, pair.map) for pair in pairs]
    layout = BlockLayout.of(grids, rules.block_m)
    shift, note = _measured(pairs, grids, rules, progress)
    offset = _offset_px(shift, grids[0])
    plain = Tally(layout.count)
    corrected = Tally(layout.count) if offset is not None and any(offset) else None
    unbounded = _unbounded(pairs, rules.stat)
    previews: list[Preview] = []
    longest = max(64, min(_PREVIEW_PX, int((_PREVIEW_TOTAL / min(len(pairs), _PREVIEWS)) ** 0.5)))
    windows = [list(_windows(grid, WINDOW_PX)) for grid in grids]
    progress.start(sum(map(len, windows)), "scoring")
    for index, (pair, grid) in enumerate(zip(pairs, grids, strict=True)):
        picture = BlockSums.picture(grid, ("map", "reference"), longest)
        for row, col, shape in windows[index]:
            place = layout.local(index, row, col, shape)
            reader = _PairReader(pair, grid, rules, (row, col), shape, bounds=unbounded is None)
            window = reader.window(place)
            plain.add_window(window, _codes(strata, grid.window(row, col, *shape), window, pair.site))
            picture.add(row, col, window.valid, {"map": window.map_m, "reference": window.reference_m})
            if corrected is not None and offset is not None:
                with pair.map.uncounted():
                    corrected.add_window(reader.window(place, offset))
            progress.advance()
        if len(previews) < _PREVIEWS:
            previews.append(_preview(picture, pair.site, grid))
    if not plain.n_by_block.any():
        raise InputError(
            "no pixel is valid in both", where=f"{pairs[0].map.name}, {pairs[0].reference.name}",
            expected="heights of the same place",
        )  # fmt: skip
    if corrected is None and offset is not None:
        corrected = plain
    absent = {} if unbounded is None else dict.fromkeys(BOUNDED, unbounded)
    return RasterTally(layout, plain, corrected, shift, note, previews, absent)


def _unbounded(pairs: Sequence[RasterPair], stat: str) -> str | None:
    """Why the maps' interval bands cannot be judged; None where they can, or there are none.

    A band is of the mean height of a cell of `BAND_CELL_M`, or of a pixel that is larger: the mean of many
    bands is far too wide an interval of the mean height, and none at all of a percentile. One such pair is
    enough: a coverage over some sites would pass for all's.
    """
    for pair in pairs:
        ours, theirs = pair.map, pair.reference
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
        self.map, self.rules, self.bounds = pair.map, rules, bounds
        row, col = corner
        self.core = grid.window(row, col, *shape)
        self.floor = rules.floor_of(pair.reference)
        reference = read_on(pair.reference, self.core.pad(1), rules.stat)
        # The frame of pixels round the compared area belongs to nobody.
        rows, cols = (np.arange(-1, n + 1) for n in shape)
        rows_in = (row + rows >= 0) & (row + rows < grid.height)
        cols_in = (col + cols >= 0) & (col + cols < grid.width)
        self._known = reference.valid & rows_in[:, None] & cols_in
        self._reference = self._floored(reference.height_m)

    def window(
        self, place: tuple[np.ndarray, np.ndarray], offset: tuple[float, float] = (0.0, 0.0)
    ) -> Window:
        """The window with the map taken from (right, down) pixels further."""
        got = read_on(self.map, moved(self.core.pad(1), offset), self.rules.stat, interval=self.bounds)
        bounds = None
        if got.lower_m is not None and got.upper_m is not None:
            known = got.valid[1:-1, 1:-1]
            low, high = (
                np.where(known, self._floored(end[1:-1, 1:-1]), np.nan) for end in (got.lower_m, got.upper_m)
            )
            bounds = low, high
        return Window(self._floored(got.height_m), self._reference, got.valid & self._known, *place, bounds)

    def _floored(self, heights: np.ndarray) -> np.ndarray:
        return np.where(heights < self.floor, 0, heights) if self.floor else heights


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


def _codes(strata: Sequence[Stratifier], grid: Grid, window: Window, site: str) -> Codes:
    found = {}
    for way in strata:
        codes = way.window(grid, window.reference_m, window.valid, site)
        found[way.by] = (codes, tuple(way.names))
    return found


def _preview(picture: BlockSums, site: str, grid: Grid) -> Preview:
    frame = picture.block_grid()
    map_m, reference_m = (picture.mean(name).astype(np.float32) for name in ("map", "reference"))
    return Preview(site, map_m, reference_m, frame.bounds, str(grid.crs), round(frame.gsd_m, 4))


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
            with pair.map.uncounted(), pair.reference.uncounted():
                ours, theirs = (read_on(side, part, rules.stat) for side in (pair.map, pair.reference))
            used += meter.add(ours.height_m, theirs.height_m, ours.valid & theirs.valid)
        progress.advance()
    found = meter.result()
    if found is None:
        return None, "no window with enough height structure on both sides"
    # Plus 0: the -0.0 of a rounded trifle is 0.0.
    east, north = round(found.right_m, 3) + 0.0, round(-found.down_m, 3) + 0.0
    spread = None if found.spread_m is None else round(found.spread_m, 3)
    fits = round(found.fit, 4), round(found.fit_unshifted, 4)
    shift = MapShift(east, north, *fits, spread, found.windows, found.doubt is None, found.doubt)
    return shift, shift.note


def _offset_px(shift: MapShift | None, grid: Grid) -> tuple[float, float] | None:
    """(right, down) pixels to read the map from; None where nothing may be undone."""
    if shift is None or not shift.sure:
        return None
    mx, my = pixel_metres(grid)
    offset = shift.east_m / mx, -shift.north_m / my
    return offset if np.hypot(*offset) >= _LEAST_SHIFT_PX else (0.0, 0.0)
