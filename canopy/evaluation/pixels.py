"""Maps against height rasters, window by window: memory does not grow with the rasters.

`Tally` adds up windows of pixels, or samples, over the spatial blocks that the bootstrap resamples.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from canopy import metrics
from canopy.chips.register import LIMIT_M, ShiftMeter
from canopy.errors import InputError
from canopy.evaluation.grids import SAME_GSD, BlockSums, common_grid, pixel_metres, read_on
from canopy.evaluation.maps import HeightMap
from canopy.evaluation.scores import BOUNDED, JOINT_STEP_M, Options, Preview, Scores, score_sums
from canopy.evaluation.strata import BlockLayout, Way, cells_of
from canopy.geo.grid import Grid
from canopy.imagery.open import open_imagery
from canopy.metrics import BLOCK_PX, COLUMN, FIELDS, HeightCounts
from canopy.runtime import NoProgress, Progress

MOST_STRATA = 100
JOINT_BINS = 160
# Codes (h, w) or (n,), -1 for none, and the names of the codes so far.
Codes = Mapping[str, tuple[np.ndarray, Sequence[str]]]


# ---- sums -----------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Matched:
    """Pixels of a window (h, w), or footprints or plots (n,), of both sides.

    Attributes:
        map_m, reference_m, valid: metres, and True where both are known.
        block: local block of each; blocks: number of each local block.
        gradients: of both sides, computed once for all ways of cutting; None for what has no neighbours.
        bounds_m: lower and upper end of the map's interval (2, h, w), NaN where unknown.
    """

    map_m: np.ndarray
    reference_m: np.ndarray
    valid: np.ndarray
    block: np.ndarray
    blocks: np.ndarray
    gradients: metrics.Gradients | None = None
    bounds_m: np.ndarray | None = None

    def sums(self, codes: np.ndarray, count: int) -> np.ndarray:
        """Sums (count, local blocks, fields) of the parts that codes of 0 ... count - 1 name, -1 none."""
        local = len(self.blocks)
        group = np.where(codes >= 0, codes * local + self.block, -1)
        ok = self.valid & (group >= 0)
        p, r = self.map_m[ok], self.reference_m[ok]
        limits = None if self.bounds_m is None else (self.bounds_m[0][ok], self.bounds_m[1][ok])
        sums = metrics.pixel_sums(p, r, group[ok], count * local, limits)
        if self.gradients is not None:
            cell, cells = cells_of(self.valid.shape)
            # A cell lies in one block; the strata of its pixels make one cell each.
            cell_block = np.zeros(cells, np.int64)
            cell_block[cell.ravel()] = self.block.ravel()
            cell_group = (np.arange(count)[:, None] * local + cell_block).ravel()
            sums += metrics.block_sums(p, r, codes[ok] * cells + cell[ok], cell_group, count * local)
            sums += metrics.gradient_sums(self.gradients, group, count * local)
        return sums.reshape(count, local, len(FIELDS))


class _Part:
    """Sums of one stratum: a row per block, and the height counts of the map and the reference."""

    def __init__(self, blocks: int) -> None:
        self.rows = np.zeros((blocks, len(FIELDS)))
        self.counts = HeightCounts(), HeightCounts()


class Tally:
    """Adds up what matched over `blocks` spatial blocks, whole and by strata (up to 100 per way)."""

    def __init__(self, blocks: int) -> None:
        self.blocks = blocks
        self.whole = _Part(blocks)
        self.strata: dict[str, dict[str, _Part]] = {"": {"": self.whole}}
        self.joint = np.zeros((JOINT_BINS, JOINT_BINS), np.int64)

    def add(self, seen: Matched, strata: Codes) -> None:
        """Add footprints or plots, or a window whose upper-left corner is a corner of a 50 px cell."""
        ok = seen.valid
        if not ok.any():
            return
        everything = {"": (np.zeros(ok.shape, np.int64), ("",))}
        for by, (codes, names) in {**everything, **strata}.items():
            sums = seen.sums(codes, len(names))
            for code, name in enumerate(names):
                if sums[code, :, COLUMN["n"]].any():
                    part, here = self._part(by, name), ok & (codes == code)
                    part.rows[seen.blocks] += sums[code]
                    for counts, heights in zip(part.counts, (seen.map_m, seen.reference_m), strict=True):
                        counts.add(heights[here])
        steps = (
            np.floor(side[ok] / JOINT_STEP_M).astype(np.int64) for side in (seen.reference_m, seen.map_m)
        )
        i, j = (np.clip(step, 0, JOINT_BINS - 1) for step in steps)
        self.joint += np.bincount(i * JOINT_BINS + j, minlength=JOINT_BINS**2).reshape(self.joint.shape)

    def _part(self, by: str, name: str) -> _Part:
        parts = self.strata.setdefault(by, {})
        if name not in parts:
            if len(parts) >= MOST_STRATA:
                raise InputError(
                    f"more than {MOST_STRATA} classes", where=f"--by {by}", remedy="use coarser classes"
                )
            parts[name] = _Part(self.blocks)
        return parts[name]

    @property
    def n_by_block(self) -> np.ndarray:
        """Pixels or samples of each block (blocks,)."""
        return self.whole.rows[:, COLUMN["n"]]

    def scores(
        self, names: Mapping[str, Sequence[str]], **how: Any
    ) -> tuple[Scores, dict[str, dict[str, Scores]]]:
        """Scores of everything, and of the strata by way and name in the order of `names`.

        `how`: see `score_sums`.
        """
        made = {
            by: {
                name: score_sums(parts[name].rows, parts[name].counts, **how)
                for name in shown
                if name in (parts := self.strata.get(by, {}))
            }
            for by, shown in {"": ("",), **names}.items()
        }
        return made.pop("")[""], made


# ---- rasters --------------------------------------------------------------------------------------
# A multiple of 50: windows must not cut the cells of block-R2.
WINDOW_PX = 20 * BLOCK_PX
# Windows in which the shift is measured: enough to average, few enough to be quick.
SHIFT_PX, SHIFT_WINDOWS, SHIFT_CANDIDATES = 400, 16, 48
# A shift below this share of a pixel changes nothing.
_LEAST_SHIFT_PX = 0.05
# What `canopy calibrate interval` calibrates bands on: the pixels of lidar, means of 2 x 2 of a map of 0.5 m.
BAND_CELL_M = 1.0


@dataclass(frozen=True)
class RasterPair:
    """A map and a reference of one place; `site` names it in tables."""

    map: HeightMap
    reference: HeightMap
    site: str


@dataclass
class RasterTally:
    """What the windows gave: sums, sums with the shift undone, pictures; metrics that cannot be -> why."""

    layout: BlockLayout
    plain: Tally
    corrected: Tally | None
    shift: dict[str, Any] | None
    shift_note: str | None
    preview: Preview
    absent: dict[str, str]


def tally_rasters(
    pairs: Sequence[RasterPair],
    options: Options,
    strata: Sequence[Way] = (),
    progress: Progress | None = None,
) -> RasterTally:
    """Read all pairs once (and some windows of them before, to measure the shift) and add them up.

    Raises:
        InputError: maps and references that do not overlap, or have no pixel in common.
        ImageryError: a file that cannot be read.
    """
    progress, stat = progress or NoProgress(), options.stat or "mean"
    source = None if options.image is None else open_imagery(str(options.image))
    grids = [common_grid(pair.reference, pair.map) for pair in pairs]
    layout = BlockLayout(grids, options.block_m)
    shift, note = _measured(pairs, grids, stat, progress) if options.shift else (None, "not asked for")
    offset = _offset_px(shift, grids[0])
    plain = Tally(layout.count)
    corrected = None if offset is None else Tally(layout.count) if any(offset) else plain
    unbounded = _unbounded(pairs, stat)
    preview, most = None, -1
    windows = [list(_windows(grid, WINDOW_PX)) for grid in grids]
    progress.start(sum(map(len, windows)), "scoring")
    for index, (pair, grid) in enumerate(zip(pairs, grids, strict=True)):
        picture = BlockSums.picture(grid, ("map", "reference"))
        for row, col, part in windows[index]:
            place = layout.local(index, row, col, part.shape)
            read = _reader(pair, grid, part, place, options.floor, stat, bounds=unbounded is None)
            window = read((0.0, 0.0))
            seen = window.reference_m, window.valid, pair.site
            plain.add(window, {way.by: (way.codes(part, *seen), way.names) for way in strata})
            picture.add(row, col, window.valid, {"map": window.map_m, "reference": window.reference_m})
            if corrected is not None and corrected is not plain and offset is not None:
                corrected.add(read(offset), {})
            progress.advance()
        if picture.count.sum() > most:
            ours, theirs = (picture.mean(name).astype(np.float32) for name in ("map", "reference"))
            where, most = picture.block_grid(), picture.count.sum()
            image = None
            if source is not None:
                shown = source.read(where)
                image = np.where(shown.valid, shown.rgb, 0.8).transpose(1, 2, 0)  # grey where there is none
            preview = Preview(pair.site, ours, theirs, round(where.gsd_m, 4), image)
    if not plain.n_by_block.any():
        for side in (pairs[0].map, pairs[0].reference):
            _ = side.notes  # refuses what is no canopy height, the likelier reason
        raise InputError(
            "no pixel is valid in both", where=f"{pairs[0].map.name}, {pairs[0].reference.name}",
            expected="heights of the same place",
        )  # fmt: skip
    absent = {} if unbounded is None else dict.fromkeys(BOUNDED, unbounded)
    assert preview is not None  # there is a pair
    return RasterTally(layout, plain, corrected, shift, note, preview, absent)


def _unbounded(pairs: Sequence[RasterPair], stat: str) -> str | None:
    """Why the maps' interval bands cannot be judged; None where they can, or there are none.

    A band is of the mean height of a cell of `BAND_CELL_M`, or of a pixel that is larger: the mean of many
    bands is far too wide an interval of the mean height, and none at all of a percentile. One such pair is
    enough: a coverage over some sites would pass for all's.
    """
    for pair in (pair for pair in pairs if pair.map.has_interval):
        if stat != "mean":
            return f"the map's bands are intervals of a pixel's height, not of the {stat} of pixels"
        cell_m = max(pair.map.gsd_m, BAND_CELL_M)
        if pair.reference.gsd_m > cell_m * (1 + SAME_GSD):
            return (
                f"the map's bands are intervals of cells of {cell_m:.3g} m: their means over the reference's "
                f"pixels of {pair.reference.gsd_m:.3g} m are none"
            )
    return None


def _reader(
    pair: RasterPair, grid: Grid, part: Grid, place: tuple[np.ndarray, np.ndarray], floor_m: float | None,
    stat: str, *, bounds: bool,
) -> Callable[[tuple[float, float]], Matched]:  # fmt: skip
    """Reads a window (`part` of `grid`) with the map taken from (right, down) pixels further.

    The reference is read once for all displacements.
    """
    floor_m = pair.reference.floor_m if floor_m is None else floor_m
    core = part.pad(1)
    values, known = read_on(pair.reference, core, stat)
    reference = np.where(values[0] < floor_m, 0, values[0])
    # The frame of pixels round the compared area belongs to nobody.
    row, col = grid.offset_of(core)
    rows, cols = row + np.arange(core.height), col + np.arange(core.width)
    known &= ((rows >= 0) & (rows < grid.height))[:, None] & (cols >= 0) & (cols < grid.width)

    def window(offset: tuple[float, float]) -> Matched:
        got, valid = read_on(pair.map, moved(core, offset), stat, interval=bounds)
        got, valid = np.where(got < floor_m, 0, got) if floor_m else got, valid & known
        gradients = metrics.gradients(got[0], reference, valid)
        inner = np.s_[1:-1, 1:-1]
        ends = np.where(valid, got[1:], np.nan)[:, 1:-1, 1:-1] if len(got) == 3 else None
        return Matched(got[0][inner], reference[inner], valid[inner], *place, gradients, ends)

    return window


def moved(grid: Grid, offset: tuple[float, float]) -> Grid:
    """The grid moved by (right, down) pixels, fractions too."""
    if offset == (0.0, 0.0):
        return grid
    px, py = grid.pixel
    x, y = grid.xy(offset[1], offset[0])
    return Grid.of(grid.crs, (px, 0, x, 0, -py, y), grid.shape)


def _windows(grid: Grid, side: int) -> Iterator[tuple[int, int, Grid]]:
    for row in range(0, grid.height, side):
        for col in range(0, grid.width, side):
            shape = min(side, grid.height - row), min(side, grid.width - col)
            yield row, col, grid.window(row, col, *shape)


# ---- shift ----------------------------------------------------------------------------------------
def _measured(
    pairs: Sequence[RasterPair], grids: Sequence[Grid], stat: str, progress: Progress
) -> tuple[dict[str, Any] | None, str | None]:
    """One displacement for all pairs, and why there is none."""
    sizes = [pixel_metres(grid) for grid in grids]
    if any(abs(a / b - 1) > 0.05 for size in sizes for a, b in zip(size, sizes[0], strict=True)):
        return None, "the references have pixels of different sizes"
    if max(sizes[0]) > LIMIT_M:
        return None, f"pixels of {max(sizes[0]):.0f} m are too coarse to measure a shift of metres"
    every = [
        (pair, part)
        for pair, grid in zip(pairs, grids, strict=True)
        for _, _, part in _windows(grid, SHIFT_PX)
    ]
    chosen = [every[int(i)] for i in np.unique(np.linspace(0, len(every) - 1, SHIFT_CANDIDATES).round())]
    meter, used = ShiftMeter(sizes[0]), 0
    progress.start(len(chosen), "measuring the shift")
    for i in (i for first in range(3) for i in range(first, len(chosen), 3)):  # spread, if few are enough
        if used < SHIFT_WINDOWS:
            pair, part = chosen[i]
            (ours, a), (theirs, b) = (read_on(side, part, stat) for side in (pair.map, pair.reference))
            used += meter.add(ours[0], theirs[0], a & b)
        progress.advance()
    found = meter.result()
    if found is None:
        return None, "no window with enough height structure on both sides"
    # Plus 0: the -0.0 of a rounded trifle is 0.0.
    shift = {
        "east_m": round(found.right_m, 3) + 0.0,
        "north_m": round(-found.down_m, 3) + 0.0,
        "fit": round(found.fit, 4),
        "fit_unshifted": round(found.fit_unshifted, 4),
        "spread_m": None if found.spread_m is None else round(found.spread_m, 3),
        "windows": found.windows,
        "sure": found.doubt is None,
        "note": found.doubt,
        "length_m": math.hypot(found.right_m, found.down_m),
    }
    return shift, found.doubt


def _offset_px(shift: Mapping[str, Any] | None, grid: Grid) -> tuple[float, float] | None:
    """(right, down) pixels to read the map from; None where nothing may be undone."""
    if shift is None or not shift["sure"]:
        return None
    mx, my = pixel_metres(grid)
    offset = shift["east_m"] / mx, -shift["north_m"] / my
    return offset if math.hypot(*offset) >= _LEAST_SHIFT_PX else (0.0, 0.0)
