"""What an evaluation found: frozen records, from which metrics.json, the tables and the report are written.

`Evaluation.to_dict` is metrics.json; its keys are a promise to other people's scripts (docs/evaluation.md).

95 % intervals by spatial block bootstrap, from each block's sums alone.

Neighbouring pixels err alike, so pixels are not resampled: whole blocks are, with replacement, as many as
there are. Everything a metric needs is a sum over blocks (`canopy.metrics`), so a replicate is a weighted sum
of rows and no pixel is read twice. The interval is the expanded percentile interval (Hesterberg 2015, The
American Statistician 69:371): percentiles are taken a little further out, at the level that Student's t and
the factor sqrt(n / (n - 1)) ask for, because plain ones are too narrow with few blocks.

The sums of one judgement, filled window by window or sample by sample, and the scores made of them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from typing import Any

import numpy as np
from scipy import stats

from canopy import metrics
from canopy.errors import InputError
from canopy.evaluation.strata import cells_of
from canopy.metrics import COLUMN, FIELDS, HEIGHT_BINS_M, PERCENTILES, HeightCounts


@dataclass(frozen=True)
class Score:
    """One number with its uncertainty.

    Attributes:
        value: None where it does not exist (no pixels, a constant map, no such thing for this reference).
        ci95: lower and upper end of the 95 % interval; None where it cannot be given.
        note: why `value` or `ci95` is None.
    """

    value: float | None
    ci95: tuple[float, float] | None = None
    note: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """{"value": x, "ci95": [lo, hi]}, with "note" where something is missing."""
        plain: dict[str, Any] = {"value": self.value, "ci95": list(self.ci95) if self.ci95 else None}
        return plain | ({"note": self.note} if self.note else {})


@dataclass(frozen=True)
class HeightBin:
    """Scores of the pixels whose REFERENCE height lies in low_m <= h < high_m (high_m None: no upper end)."""

    low_m: float
    high_m: float | None
    scores: Mapping[str, Score]  # n, bias_m, mae_m, rmse_m; interval_* where bounds are judged

    @property
    def name(self) -> str:
        """ "5-10", "60+"."""
        return f"{self.low_m:g}+" if self.high_m is None else f"{self.low_m:g}-{self.high_m:g}"


@dataclass(frozen=True)
class Scores:
    """All scores of one set of pixels or samples.

    Attributes:
        metrics: name -> score, in the order to print them: n, mae_m, rmse_m, bias_m, r2, r, nmae, block_r2,
            edge_error, cover_{iou,precision,recall,f1}_{2,3,5}m, p{50,95,98}_error_m, ... ; and
            interval_coverage, interval_width_m where the map carries bounds (with a note where they cannot be
            judged).
        by_height: the same pixels by reference height.
    """

    metrics: Mapping[str, Score]
    by_height: tuple[HeightBin, ...]

    def __getitem__(self, name: str) -> Score:
        return self.metrics[name]

    @property
    def n(self) -> int:
        """Pixels or samples scored."""
        return int(self.metrics["n"].value or 0)

    def to_dict(self) -> dict[str, Any]:
        """Every metric as {"value", "ci95"}; `by_height` has both per bin."""
        bins = {b.name: b.scores for b in self.by_height}
        value = {name: {k: s.value for k, s in scores.items()} for name, scores in bins.items()}
        ci95 = {
            name: {k: list(s.ci95) if s.ci95 else None for k, s in scores.items()}
            for name, scores in bins.items()
        }
        plain = {name: score.to_dict() for name, score in self.metrics.items()}
        return plain | {"by_height": {"value": value, "ci95": ci95}}


@dataclass(frozen=True)
class Stratum:
    """Scores of one part: `by` is what it was cut by ("site", "slope", a column), `name` is the part."""

    by: str
    name: str
    scores: Scores


@dataclass(frozen=True)
class MapShift:
    """Where the map lies relative to the reference: the map's content is displaced by (east_m, north_m).

    Attributes:
        fit: correlation (-1..1) of the structures at this displacement; fit_unshifted: at none.
        spread_m: how far the displacements of single windows scatter round it (None: one window).
        windows: how many were used.
        sure: whether it may be acted upon; `note` says why not.
    """

    east_m: float
    north_m: float
    fit: float
    fit_unshifted: float
    spread_m: float | None
    windows: int
    sure: bool
    note: str | None = None

    @property
    def length_m(self) -> float:
        """Length of the displacement."""
        return math.hypot(self.east_m, self.north_m)

    def to_dict(self) -> dict[str, Any]:
        """All facts, for metrics.json's "shift"."""
        names = (
            "east_m",
            "north_m",
            "length_m",
            "fit",
            "fit_unshifted",
            "spread_m",
            "windows",
            "sure",
            "note",
        )
        return {name: getattr(self, name) for name in names}


@dataclass(frozen=True, eq=False)
class JointHistogram:
    """How often which pair of heights occurs: counts[i, j] for reference in edges_m[i:i+2] and map in
    edges_m[j:j+2]; the last bin also takes everything higher, the first everything lower."""

    edges_m: np.ndarray
    counts: np.ndarray


@dataclass(frozen=True, eq=False)
class BlockTable:
    """One row per spatial block that has scored pixels; every array is (blocks,).

    Attributes:
        site: name of the reference (index into `sites`).
        west, south, east, north: of the block in the CRS `crs[site]`, lon, lat: its centre in degrees.
        n, map_mean_m, reference_mean_m, bias_m, mae_m: of its pixels or samples.
        side_m: side of the blocks, ground metres.
    """

    sites: tuple[str, ...]
    crs: tuple[str, ...]
    side_m: float
    site: np.ndarray
    west: np.ndarray
    south: np.ndarray
    east: np.ndarray
    north: np.ndarray
    lon: np.ndarray
    lat: np.ndarray
    n: np.ndarray
    map_mean_m: np.ndarray
    reference_mean_m: np.ndarray
    bias_m: np.ndarray
    mae_m: np.ndarray

    def __len__(self) -> int:
        return len(self.n)


@dataclass(frozen=True, eq=False)
class Preview:
    """A small picture of both sides on one grid; float32 (h, w) metres, NaN where not scored, h, w <= 1500.

    Attributes:
        bounds: (west, south, east, north) in `crs`; gsd_m: ground metres per preview pixel.
    """

    site: str
    map_m: np.ndarray
    reference_m: np.ndarray
    bounds: tuple[float, float, float, float]
    crs: str
    gsd_m: float

    @property
    def error_m(self) -> np.ndarray:
        """Map minus reference."""
        return self.map_m - self.reference_m


@dataclass(frozen=True, eq=False)
class Samples:
    """Footprints or plots that were scored (a random 20,000 where there are more); arrays are (n,)."""

    lon: np.ndarray
    lat: np.ndarray
    reference_m: np.ndarray
    map_m: np.ndarray


@dataclass(frozen=True, eq=False)
class Evaluation:
    """The result of `canopy evaluate`.

    Attributes:
        kind: chm, gedi or plots.
        overall: scores as the map is; corrected: after undoing the measured shift (None: see `shift`).
        shift: None where it cannot be measured; `shift_note` says why.
        strata: in the order of --by; empty if none was asked for.
        previews: one per reference raster (none for GEDI and plots, which have `samples`).
        provenance: plain data: files and their sha256, grids, rules, dates and gap, bootstrap, versions.
        notes: what a reader must know, one sentence each.
    """

    kind: str
    overall: Scores
    corrected: Scores | None
    shift: MapShift | None
    shift_note: str | None
    strata: tuple[Stratum, ...]
    joint: JointHistogram
    blocks: BlockTable
    previews: tuple[Preview, ...]
    samples: Samples | None
    provenance: Mapping[str, Any]
    notes: tuple[str, ...] = field(default=())

    def to_dict(self) -> dict[str, Any]:
        """metrics.json: plain data without NaN."""
        strata: dict[str, dict[str, Any]] = {}
        for stratum in self.strata:
            strata.setdefault(stratum.by, {})[stratum.name] = stratum.scores.to_dict()
        shift = self.shift
        plain = {
            "kind": self.kind,
            "overall": self.overall.to_dict(),
            "shift_m": {"east": shift.east_m, "north": shift.north_m} if shift else None,
            "shift": shift.to_dict() if shift else {"note": self.shift_note},
            "corrected": self.corrected.to_dict() if self.corrected else None,
            "strata": strata,
            "notes": list(self.notes),
            "provenance": dict(self.provenance),
        }
        return _without_nan(plain)


def _without_nan(value: Any) -> Any:
    """JSON has no NaN: None stands for it; numpy numbers become Python's."""
    if isinstance(value, Mapping):
        return {str(k): _without_nan(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_without_nan(v) for v in value]
    if isinstance(value, np.generic):
        value = value.item()
    return None if isinstance(value, float) and not math.isfinite(value) else value


LEVEL = 0.95
LEAST_BLOCKS = 10
REPLICATES = 1000
# More replicates without a value than this and there is no interval.
_MAX_MISSING = 0.05
_CHUNK = 250


@dataclass(frozen=True)
class Bootstrap:
    """How blocks are resampled. `replicates` 0 turns intervals off."""

    replicates: int = REPLICATES
    seed: int = 0


def draws(blocks: int, setting: Bootstrap) -> np.ndarray:
    """How often each block is drawn, int16 (replicates, blocks); rows sum to `blocks`."""
    return _draws(blocks, setting.replicates, setting.seed)


@lru_cache(maxsize=2)
def _draws(blocks: int, replicates: int, seed: int) -> np.ndarray:
    rng = np.random.default_rng([seed, blocks])
    equal = np.full(blocks, 1 / blocks)
    made = np.zeros((replicates, blocks), np.int16)  # no block is drawn 32,000 times
    for i in range(0, replicates, _CHUNK):
        made[i : i + _CHUNK] = rng.multinomial(blocks, equal, size=min(_CHUNK, replicates - i))
    made.flags.writeable = False
    return made


def replicate(rows: np.ndarray, setting: Bootstrap) -> np.ndarray:
    """Sums of resampled blocks (replicates, fields) from each block's row (blocks, fields)."""
    weights = draws(len(rows), setting)
    parts = [weights[i : i + _CHUNK].astype(np.float64) @ rows for i in range(0, len(weights), _CHUNK)]
    return np.concatenate(parts)


def too_few(blocks: int, side: str) -> str | None:
    """Why there can be no interval with so few blocks; None where there can."""
    if blocks >= LEAST_BLOCKS:
        return None
    many = f"{blocks} block{'s' * (blocks != 1)}"
    return f"no interval: {many} of {side} with data, at least {LEAST_BLOCKS} needed"


def intervals(values: Mapping[str, np.ndarray], blocks: int) -> dict[str, tuple[float, float] | None]:
    """Interval of each metric from its replicates (replicates,); None where too many have no value."""
    low, high = _levels(blocks)
    found: dict[str, tuple[float, float] | None] = {}
    for name, drawn in values.items():
        known = drawn[np.isfinite(drawn)]
        enough = len(drawn) > 0 and len(known) >= (1 - _MAX_MISSING) * len(drawn)
        if not enough:
            found[name] = None
            continue
        ends = np.quantile(known, [low, high])
        found[name] = float(ends[0]), float(ends[1])
    return found


def _levels(blocks: int) -> tuple[float, float]:
    """The two quantiles to take: Phi(-+ sqrt(n / (n - 1)) t)."""
    reach = stats.t.ppf((1 + LEVEL) / 2, blocks - 1) * math.sqrt(blocks / (blocks - 1))
    return float(stats.norm.cdf(-reach)), float(stats.norm.cdf(reach))


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
