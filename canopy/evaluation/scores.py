"""What an evaluation found: frozen records, and how a score is made of sums.

`Evaluation.to_dict` is metrics.json; its keys are a promise to other people's scripts (docs/evaluation.md).

The 95 % intervals come from a spatial block bootstrap. Neighbouring pixels err alike, so pixels are not
resampled: whole blocks are, with replacement, as many as there are. Everything a metric needs is a sum over
blocks (`canopy.metrics`), so a replicate is a weighted sum of rows and no pixel is read twice; libraries
resample samples, which is why this is ours. The interval is the expanded percentile interval (Hesterberg
2015, The American Statistician 69:371): percentiles are taken a little further out, at the level that
Student's t and the factor sqrt(n / (n - 1)) ask for, because plain ones are too narrow with few blocks.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np
from scipy import stats

from canopy import metrics
from canopy.metrics import COLUMN, HEIGHT_BINS_M, PERCENTILES, HeightCounts

if TYPE_CHECKING:
    import pandas


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
        return asdict(self) | {"length_m": self.length_m}


@dataclass(frozen=True, eq=False)
class JointHistogram:
    """How often which pair of heights occurs: counts[i, j] for reference in edges_m[i:i+2] and map in
    edges_m[j:j+2]; the last bin also takes everything higher, the first everything lower."""

    edges_m: np.ndarray
    counts: np.ndarray


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


@dataclass(frozen=True, eq=False)
class Evaluation:
    """The result of `canopy evaluate`.

    Attributes:
        kind: chm, gedi or plots.
        overall: scores as the map is; corrected: after undoing the measured shift (None: see `shift`).
        shift: None where it cannot be measured; `shift_note` says why.
        strata: in the order of --by; empty if none was asked for.
        blocks: a row per spatial block that has scored pixels: site, crs, west, south, east, north (in that
            CRS), lon, lat (its centre), n, map_mean_m, reference_mean_m, bias_m, mae_m. block_m: their side.
        previews: one per reference raster (none for GEDI and plots, which have `samples`).
        samples: lon, lat, reference_m, map_m of a random 20,000 samples at most; None for rasters.
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
    blocks: pandas.DataFrame
    block_m: float
    previews: tuple[Preview, ...]
    samples: pandas.DataFrame | None
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
        return without_nan(plain)


def without_nan(value: Any) -> Any:
    """JSON has no NaN: None stands for it; numpy numbers become Python's."""
    if isinstance(value, Mapping):
        return {str(k): without_nan(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [without_nan(v) for v in value]
    if isinstance(value, np.generic):
        value = value.item()
    return None if isinstance(value, float) and not math.isfinite(value) else value


# ---- bootstrap ------------------------------------------------------------------------------------
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


@lru_cache(maxsize=2)
def draws(blocks: int, setting: Bootstrap) -> np.ndarray:
    """How often each block is drawn, int16 (replicates, blocks); rows sum to `blocks`."""
    rng = np.random.default_rng([setting.seed, blocks])
    equal = np.full(blocks, 1 / blocks)
    made = np.zeros((setting.replicates, blocks), np.int16)  # no block is drawn 32,000 times
    for i in range(0, setting.replicates, _CHUNK):
        made[i : i + _CHUNK] = rng.multinomial(blocks, equal, size=min(_CHUNK, setting.replicates - i))
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
    # The two quantiles to take: Phi(-+ sqrt(n / (n - 1)) t).
    reach = stats.t.ppf((1 + LEVEL) / 2, blocks - 1) * math.sqrt(blocks / (blocks - 1))
    levels = stats.norm.cdf(-reach), stats.norm.cdf(reach)
    found: dict[str, tuple[float, float] | None] = {}
    for name, drawn in values.items():
        known = drawn[np.isfinite(drawn)]
        found[name] = None
        if len(drawn) > 0 and len(known) >= (1 - _MAX_MISSING) * len(drawn):
            low, high = np.quantile(known, levels)
            found[name] = float(low), float(high)
    return found


# ---- sums to scores -------------------------------------------------------------------------------
# Block histograms from which the percentiles' intervals are made (their values come from exact counts).
HIST_STEP_M, HIST_BINS = 0.2, 401
NO_VALUE = "does not exist for these heights"
_NO_STRATUM_PERCENTILES = "no interval is made for the percentiles of a stratum"
BOUNDED = ("interval_coverage", "interval_width_m")


@dataclass(frozen=True)
class Scoring:
    """How sums become scores.

    Attributes:
        bootstrap: how blocks are resampled. side: of the blocks, in words, for notes.
        absent: metrics that cannot be had from this reference -> why.
    """

    bootstrap: Bootstrap
    side: str
    absent: Mapping[str, str] = field(default_factory=dict)

    def scores(
        self, rows: np.ndarray, counts: Sequence[HeightCounts], hist: np.ndarray | None = None
    ) -> Scores:
        """Scores of one set of pixels.

        Args:
            rows: sums of `canopy.metrics`, (blocks, fields). counts: of the map's and reference's heights.
            hist: heights of both sides by block, (2, blocks, HIST_BINS); None: no interval of percentiles.
        """
        used = rows[:, COLUMN["n"]] > 0
        blocks = int(used.sum())
        total = rows.sum(axis=0)
        values = {k: float(v) for k, v in metrics.scores(total).items()}
        values |= metrics.percentile_errors(*counts)
        bins = metrics.bin_scores(total)
        asked = self.bootstrap.replicates > 0
        note = too_few(blocks, self.side) if asked else "no intervals were asked for"
        limits: dict[str, tuple[float, float] | None] = {}
        bin_limits: list[dict[str, tuple[float, float] | None]] = [{} for _ in bins]
        if note is None:
            drawn = replicate(rows[used], self.bootstrap)
            limits = intervals(metrics.scores(drawn), blocks)
            bin_limits = [intervals(row, blocks) for row in metrics.bin_scores(drawn)]
            if hist is not None:
                limits |= intervals(self._drawn_percentiles(hist[:, used]), blocks)
        bounded = total[COLUMN["bounded"]] > 0
        names = [name for name in values if bounded or name not in BOUNDED or name in self.absent]
        # Histograms per block are kept for the whole only.
        unknown = {} if hist is not None else {f"p{q}_error_m": _NO_STRATUM_PERCENTILES for q in PERCENTILES}
        made = {k: self._score(k, values[k], limits.get(k), note or unknown.get(k)) for k in names}
        by_height = []
        for low, high, row, lim in zip(
            HEIGHT_BINS_M, [*HEIGHT_BINS_M[1:], None], bins, bin_limits, strict=True
        ):
            shown = {k: float(v) for k, v in row.items() if bounded or k not in BOUNDED}
            by_height.append(
                HeightBin(low, high, {k: self._score(k, v, lim.get(k), note) for k, v in shown.items()})
            )
        return Scores(made, tuple(by_height))

    def _score(self, name: str, value: float, limits: tuple[float, float] | None, note: str | None) -> Score:
        if name == "n":
            return Score(int(value), (int(value), int(value)))
        if name in self.absent:
            return Score(None, None, self.absent[name])
        if not np.isfinite(value):
            return Score(None, None, NO_VALUE)
        if limits is None:
            return Score(value, None, note or "no interval: it exists in too few of the resampled sets")
        return Score(value, limits)

    def _drawn_percentiles(self, hist: np.ndarray) -> dict[str, np.ndarray]:
        """pNN_error_m of each replicate, from histograms (2, blocks, bins), linear within a bin."""
        sides = [replicate(side.astype(np.float64), self.bootstrap).cumsum(axis=1) for side in hist]
        return {
            f"p{q}_error_m": np.subtract(*(_quantiles(counts, q / 100) for counts in sides))
            for q in PERCENTILES
        }


def _quantiles(cumulative: np.ndarray, share: float) -> np.ndarray:
    """Height (rows,) below which `share` of each row's counts lies."""
    wanted = share * cumulative[:, -1:]
    at = (cumulative < wanted).sum(axis=1)
    rows = np.arange(len(cumulative))
    above = cumulative[rows, at]
    below = np.where(at > 0, cumulative[rows, np.maximum(at - 1, 0)], 0)
    inside = (wanted[:, 0] - below) / np.maximum(above - below, 1e-12)
    return (at + inside) * HIST_STEP_M
