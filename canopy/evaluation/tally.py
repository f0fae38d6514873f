"""The sums of one judgement, filled window by window or sample by sample, and the scores made of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

from canopy import metrics
from canopy.errors import InputError
from canopy.evaluation.blocks import cells_of
from canopy.evaluation.bootstrap import Bootstrap, intervals, replicate, too_few
from canopy.evaluation.result import HeightBin, JointHistogram, Score, Scores
from canopy.metrics import COLUMN, FIELDS, HEIGHT_BINS_M, PERCENTILES, HeightCounts

MOST_STRATA = 100
JOINT_EDGES_M = np.arange(0, 80.25, 0.5)
# Block histograms from which the percentiles' intervals are made (their values come from exact counts).
_HIST_STEP_M, _HIST_BINS = 0.2, 401
NO_VALUE = "does not exist for these heights"
_NO_STRATUM_PERCENTILES = "no interval is made for the percentiles of a stratum"
BOUNDED = ("interval_coverage", "interval_width_m")


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


@dataclass
class _Part:
    """Sums of one stratum: a row per block, and its height counts."""

    rows: np.ndarray
    map_counts: HeightCounts = field(default_factory=HeightCounts)
    reference_counts: HeightCounts = field(default_factory=HeightCounts)


class Tally:
    """Adds up windows or samples over `blocks` spatial blocks.

    Strata are given as codes: for each way of cutting (`by`) an int array, -1 for none, and the names of the
    codes. They may grow from one window to the next, up to 100 per way.
    """

    def __init__(self, blocks: int) -> None:
        self.blocks = blocks
        self.whole = _Part(np.zeros((blocks, len(FIELDS))))
        self.strata: dict[str, dict[str, _Part]] = {}
        self.joint = np.zeros((len(JOINT_EDGES_M) - 1,) * 2, np.int64)
        self._hist = np.zeros((2, blocks, _HIST_BINS), np.int32)

    # ---- filling ------------------------------------------------------------------------------
    def add_window(
        self, window: Window, strata: Mapping[str, tuple[np.ndarray, Sequence[str]]] | None = None
    ) -> None:
        """Add a window whose upper-left corner is a corner of a 50 px cell; codes are (h, w)."""
        if not window.valid.any():
            return
        zero = np.zeros(window.valid.shape, np.int64)
        self._add_part(self.whole, _window_sums(window, zero, 1)[0], window.blocks)
        ok = window.valid
        self._count(self.whole, window.map_m[ok], window.reference_m[ok])
        self._add_overall(window.map_m[ok], window.reference_m[ok], window.block[ok], window.blocks)
        for by, (codes, names) in (strata or {}).items():
            sums = _window_sums(window, codes, len(names))
            self._add_strata(by, names, sums, window.blocks, codes, window.valid, window)

    def add_samples(
        self,
        map_m: np.ndarray,
        reference_m: np.ndarray,
        block: np.ndarray,
        strata: Mapping[str, tuple[np.ndarray, Sequence[str]]] | None = None,
    ) -> None:
        """Add footprints or plots (n,); `block` is the number of each one's block, codes are (n,)."""
        self.whole.rows += metrics.pixel_sums(map_m, reference_m, block, self.blocks)
        self._count(self.whole, map_m, reference_m)
        numbers, local = np.unique(block, return_inverse=True)
        self._add_overall(map_m, reference_m, local, numbers)
        for by, (codes, names) in (strata or {}).items():
            for code, name in enumerate(names):
                here = codes == code
                if here.any():
                    part = self._part(by, name)
                    part.rows += metrics.pixel_sums(map_m[here], reference_m[here], block[here], self.blocks)
                    self._count(part, map_m[here], reference_m[here])

    def _part(self, by: str, name: str) -> _Part:
        parts = self.strata.setdefault(by, {})
        if name not in parts:
            if len(parts) >= MOST_STRATA:
                raise InputError(
                    f"more than {MOST_STRATA} classes", where=f"--by {by}", remedy="use coarser classes"
                )
            parts[name] = _Part(np.zeros((self.blocks, len(FIELDS))))
        return parts[name]

    @staticmethod
    def _add_part(part: _Part, sums: np.ndarray, blocks: np.ndarray) -> None:
        part.rows[blocks] += sums

    @staticmethod
    def _count(part: _Part, map_m: np.ndarray, reference_m: np.ndarray) -> None:
        part.map_counts.add(map_m)
        part.reference_counts.add(reference_m)

    def _add_strata(
        self,
        by: str,
        names: Sequence[str],
        sums: np.ndarray,
        blocks: np.ndarray,
        codes: np.ndarray,
        valid: np.ndarray,
        window: Window,
    ) -> None:
        for code, name in enumerate(names):
            if sums[code, :, COLUMN["n"]].any():
                part = self._part(by, name)
                self._add_part(part, sums[code], blocks)
                here = valid & (codes == code)
                self._count(part, window.map_m[here], window.reference_m[here])

    def _add_overall(
        self, map_m: np.ndarray, reference_m: np.ndarray, local: np.ndarray, numbers: np.ndarray
    ) -> None:
        top = len(JOINT_EDGES_M) - 2
        step = JOINT_EDGES_M[1]
        i, j = (np.clip(np.floor(x / step), 0, top).astype(np.int64) for x in (reference_m, map_m))
        self.joint += np.bincount(i * (top + 1) + j, minlength=(top + 1) ** 2).reshape(top + 1, top + 1)
        for side, values in enumerate((map_m, reference_m)):
            at = np.clip(np.floor(values / _HIST_STEP_M), 0, _HIST_BINS - 1).astype(np.int64)
            counts = np.bincount(local * _HIST_BINS + at, minlength=len(numbers) * _HIST_BINS)
            self._hist[side, numbers] += counts.reshape(len(numbers), _HIST_BINS).astype(np.int32)

    # ---- scores -------------------------------------------------------------------------------
    @property
    def n(self) -> int:
        """Pixels or samples so far."""
        return int(self.whole.rows[:, COLUMN["n"]].sum())

    def joint_histogram(self) -> JointHistogram:
        """Pairs of heights so far."""
        return JointHistogram(JOINT_EDGES_M, self.joint)

    def scores(self, setting: Bootstrap, side: str, absent: Mapping[str, str] | None = None) -> Scores:
        """Scores of everything.

        Args:
            side: of the blocks, in words, for notes.
            absent: metrics that cannot be had from this reference -> why.
        """
        return _scores_of(self.whole, setting, side, absent or {}, self._hist)

    def stratum_scores(
        self, by: str, setting: Bootstrap, side: str, absent: Mapping[str, str] | None = None
    ) -> list[tuple[str, Scores]]:
        """(name, scores) of every stratum of one way of cutting, in order of appearance."""
        parts = self.strata.get(by, {})
        return [(name, _scores_of(part, setting, side, absent or {}, None)) for name, part in parts.items()]


def _window_sums(window: Window, codes: np.ndarray, count: int) -> np.ndarray:
    """Sums (count, local blocks, fields) of a window's strata."""
    local = len(window.blocks)
    group = np.where(codes >= 0, codes * local + window.block, -1)
    ok = window.valid & (group >= 0)
    p, r = window.map_m[ok], window.reference_m[ok]
    limits = None if window.bounds_m is None else (window.bounds_m[0][ok], window.bounds_m[1][ok])
    sums = metrics.pixel_sums(p, r, group[ok], count * local, limits)
    cell, cells = cells_of(window.valid.shape)
    # A cell lies in one block; the strata of its pixels make one cell each.
    cell_block = np.zeros(cells, np.int64)
    cell_block[cell.ravel()] = window.block.ravel()
    cell_group = (np.arange(count)[:, None] * local + cell_block).ravel()
    sums += metrics.block_sums(p, r, codes[ok] * cells + cell[ok], cell_group, count * local)
    sums += metrics.gradient_sums(window.gradients, group, count * local)
    return sums.reshape(count, local, len(FIELDS))


def _scores_of(
    part: _Part, setting: Bootstrap, side: str, absent: Mapping[str, str], hist: np.ndarray | None
) -> Scores:
    rows = part.rows
    used = rows[:, COLUMN["n"]] > 0
    blocks = int(used.sum())
    total = rows.sum(axis=0)
    values = {k: float(v) for k, v in metrics.scores(total).items()}
    values |= metrics.percentile_errors(part.map_counts, part.reference_counts)
    bins = [{k: float(v) for k, v in row.items()} for row in metrics.bin_scores(total)]
    note = too_few(blocks, side) if setting.replicates else "no intervals were asked for"
    limits: dict[str, tuple[float, float] | None] = {}
    bin_limits: list[dict[str, tuple[float, float] | None]] = [{} for _ in bins]
    if note is None:
        drawn = replicate(rows[used], setting)
        limits = intervals(metrics.scores(drawn), blocks)
        bin_limits = [intervals(row, blocks) for row in metrics.bin_scores(drawn)]
        if hist is not None:
            limits |= intervals(_drawn_percentiles(hist[:, used], setting), blocks)
    bounded = total[COLUMN["bounded"]] > 0
    names = [name for name in values if bounded or name not in BOUNDED or name in absent]
    # Histograms per block are kept for the whole only.
    unknown = {} if hist is not None else {f"p{q}_error_m": _NO_STRATUM_PERCENTILES for q in PERCENTILES}
    made = {k: _score(k, values[k], limits.get(k), note or unknown.get(k), absent) for k in names}
    edges = [*HEIGHT_BINS_M, None]
    by_height = tuple(
        HeightBin(
            low, high,
            {
                k: _score(k, v, lim.get(k), note, absent)
                for k, v in row.items()
                if bounded or k not in BOUNDED
            },
        )
        for low, high, row, lim in zip(HEIGHT_BINS_M, edges[1:], bins, bin_limits, strict=True)
    )  # fmt: skip
    return Scores(made, by_height)


def _score(
    name: str,
    value: float,
    limits: tuple[float, float] | None,
    note: str | None,
    absent: Mapping[str, str],
) -> Score:
    if name == "n":
        return Score(int(value), (int(value), int(value)))
    if name in absent:
        return Score(None, None, absent[name])
    if not np.isfinite(value):
        return Score(None, None, NO_VALUE)
    if limits is None:
        return Score(value, None, note or "no interval: it exists in too few of the resampled sets")
    return Score(value, limits)


def _drawn_percentiles(hist: np.ndarray, setting: Bootstrap) -> dict[str, np.ndarray]:
    """pNN_error_m of each replicate, from histograms (2, blocks, bins), linear within a bin."""
    sides = [replicate(side.astype(np.float64), setting).cumsum(axis=1) for side in hist]
    found = {}
    for q in PERCENTILES:
        at = [_quantiles(counts, q / 100) for counts in sides]
        found[f"p{q}_error_m"] = at[0] - at[1]
    return found


def _quantiles(cumulative: np.ndarray, share: float) -> np.ndarray:
    wanted = share * cumulative[:, -1:]
    at = (cumulative < wanted).sum(axis=1)
    rows = np.arange(len(cumulative))
    above = cumulative[rows, at]
    below = np.where(at > 0, cumulative[rows, np.maximum(at - 1, 0)], 0)
    inside = (wanted[:, 0] - below) / np.maximum(above - below, 1e-12)
    return (at + inside) * _HIST_STEP_M
