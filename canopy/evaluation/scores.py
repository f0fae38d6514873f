"""What an evaluation is asked and what it found, and how a score is made of sums.

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
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from pydantic import field_validator
from scipy import stats

from canopy import metrics
from canopy.config import Settings, option
from canopy.errors import InputError
from canopy.labels.catalog import sensor_floor
from canopy.metrics import BIN_NAMES, COLUMN, HeightCounts, percent_of

if TYPE_CHECKING:
    import pandas

KINDS = ("chm", "gedi", "plots")
JOINT_STEP_M = 0.5
_HELP_BY = (
    "site, height, cover, slope, a column, NAME=classes.tif, NAME=zones.gpkg:COLUMN; several with commas."
)
_HELP_STAT = "What a pixel, footprint or plot takes. Default: mean; for GEDI the column's percentile."
_HELP_FLOOR = "Heights below this count as 0 on both sides (NEON's height models: 2, or 0.667 m)."
_HELP_BLOCK = "Side of the blocks resampled for intervals, m. Default: up to 250 m, so that 25 are left."


class Options(Settings):
    """What `evaluate` takes besides the two sides; see there."""

    kind: str | None = option(None, "Default: told from the file.", metavar="chm|gedi|plots")
    by: list[str] = option([], _HELP_BY, metavar="WAY,WAY")
    stat: str | None = option(None, _HELP_STAT, metavar="mean|max|p95")
    floor_m: float | None = option(None, _HELP_FLOOR)
    sensor: str | None = option(None, "The floor by NEON's lidar: gemini, riegl or galaxy.")
    column: str | None = option(None, "Heights of a table, e.g. rh_98.")
    radius_m: float | None = option(None, "Of plots that are points. Default 10; GEDI 12.5.")
    dem: str | Path | None = option(None, "Elevation raster, for slope.")
    image: str | Path | None = option(None, "Imagery to show on the page, beside the heights.")
    block_m: float | None = option(None, _HELP_BLOCK)
    shift: bool = option(True, "Measure the shift.", flags=("--shift/--no-shift",))
    replicates: int = option(1000, "Of the bootstrap; 0: no intervals.")
    seed: int = option(0, "Of the bootstrap.")
    nodata: float | None = option(None, "Missing in the map.")
    reference_nodata: float | None = option(None, "Missing in the reference.")
    band: int | str | None = option(None, "The map's height band, if it has several.", metavar="N|NAME")
    reference_band: int | str | None = option(None, "The reference's, likewise.", metavar="N|NAME")
    layer: str | None = option(None, "Of a vector file with several (plots).")
    map_date: str | None = option(None, "2021, 2021-07 or 2021-07-04.")
    reference_date: str | None = option(None, "Likewise.")

    @field_validator("by", mode="before")
    @classmethod
    def _ways(cls, value: Sequence[str]) -> list[str]:
        """Each may be several, with commas between."""
        return [way.strip() for words in value for way in words.split(",") if way.strip()]

    def check(self) -> Options:
        """The options, or InputError for one that is out of range."""
        if self.kind is not None and self.kind not in KINDS:
            raise InputError(f"{self.kind!r}", where="--kind", expected=", ".join(KINDS))
        if self.stat is not None:
            percent_of(self.stat, "--stat")
        sensor_floor(self.sensor)
        for name, value, low, high in (
            ("--floor-m", self.floor_m, 0, 10), ("--block-m", self.block_m, 0.001, 1e6),
            ("--radius-m", self.radius_m, 0.001, 10_000), ("--replicates", self.replicates, 0, 100_000),
        ):  # fmt: skip
            if value is not None and not low <= value <= high:
                raise InputError(f"{value:g}", where=name, expected=f"{low:g} to {high:g}")
        return self

    @property
    def floor(self) -> float | None:
        """Height below which both sides count as 0; None: what the reference's tags say."""
        return self.floor_m if self.floor_m is not None else sensor_floor(self.sensor) or None


# ---- records --------------------------------------------------------------------------------------
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


@dataclass(frozen=True)
class Scores:
    """All scores of one set of pixels or samples.

    Attributes:
        metrics: name -> score, in the order to print them: n, mae_m, rmse_m, bias_m, r2, r, nmae, block_r2,
            edge_error, cover_{iou,precision,recall,f1}_{2,3,5}m, p{50,95,98}_error_m, ... ; and
            interval_coverage, interval_width_m where the map carries bounds (with a note where they cannot be
            judged).
        by_height: n, bias_m, mae_m, rmse_m (interval_* where bounds are judged) of the pixels by REFERENCE
            height, under "5-10", "60+", ...
    """

    metrics: Mapping[str, Score]
    by_height: Mapping[str, Mapping[str, Score]]

    def __getitem__(self, name: str) -> Score:
        return self.metrics[name]

    @property
    def n(self) -> int:
        """Pixels or samples scored."""
        return int(self.metrics["n"].value or 0)

    def to_dict(self) -> dict[str, Any]:
        """Every metric as {"value", "ci95"}, with a "note" where one is missing; `by_height` per bin."""
        plain: dict[str, Any] = {}
        for name, score in self.metrics.items():
            plain[name] = {"value": score.value, "ci95": list(score.ci95) if score.ci95 else None}
            plain[name] |= {"note": score.note} if score.note else {}
        bins = self.by_height.items()
        value = {name: {k: s.value for k, s in scores.items()} for name, scores in bins}
        ci95 = {
            name: {k: list(s.ci95) if s.ci95 else None for k, s in scores.items()} for name, scores in bins
        }
        return plain | {"by_height": {"value": value, "ci95": ci95}}


@dataclass(frozen=True, eq=False)
class Preview:
    """A small picture of both sides: float32 (h, w) metres, NaN where not scored; ground metres per pixel.

    `image`: the picture that was given, (h, w, 3) in 0..1.
    """

    site: str
    map_m: np.ndarray
    reference_m: np.ndarray
    gsd_m: float
    image: np.ndarray | None = None


@dataclass(frozen=True, eq=False)
class Evaluation:
    """The result of `canopy evaluate`.

    Attributes:
        kind: chm, gedi or plots.
        overall: scores as the map is; corrected: after undoing the measured shift (None: see `shift`).
        shift: where the map's content lies relative to the reference (east_m, north_m, length_m), how well
            structures correlate there and undisplaced (fit, fit_unshifted), how far those of single windows
            scatter (spread_m), how many windows, whether it may be acted upon (sure), why not (note); None
            where it cannot be measured: `shift_note` says why.
        strata: way of cutting -> name of the part -> its scores; empty if none was asked for.
        joint: how often which pair of heights occurs: int (k, k), reference by map, by steps of JOINT_STEP_M.
        blocks: a row per spatial block that has scored pixels: site, crs, west, south, east, north (in that
            CRS), lon, lat (its centre), n, map_mean_m, reference_mean_m, bias_m, mae_m. block_m: their side.
        preview: of the largest reference raster (none for GEDI and plots, which have `samples`).
        samples: lon, lat, reference_m, map_m of a random 20,000 samples at most; None for rasters.
        provenance: plain data: files and their sha256, grids, rules, dates and gap, bootstrap, versions.
        notes: what a reader must know, one sentence each.
    """

    kind: str
    overall: Scores
    corrected: Scores | None
    shift: Mapping[str, Any] | None
    shift_note: str | None
    strata: Mapping[str, Mapping[str, Scores]]
    joint: np.ndarray
    blocks: pandas.DataFrame
    block_m: float
    preview: Preview | None
    samples: pandas.DataFrame | None
    provenance: Mapping[str, Any]
    notes: Sequence[str]

    @property
    def shift_words(self) -> str:
        """Where the map lies: "5.3 m west and 0.4 m north of", "within 0.1 m of"; "" where not measured."""
        if self.shift is None:
            return ""
        sides = (("east_m", "east", "west"), ("north_m", "north", "south"))
        moved = [(round(self.shift[key], 1), plus, minus) for key, plus, minus in sides]
        words = [f"{abs(by):.1f} m {plus if by > 0 else minus}" for by, plus, minus in moved if by]
        return f"{' and '.join(words)} of" if words else "within 0.1 m of"

    def to_dict(self) -> dict[str, Any]:
        """metrics.json: plain data without NaN."""
        shift = self.shift
        plain = {
            "kind": self.kind,
            "overall": self.overall.to_dict(),
            "shift_m": {"east": shift["east_m"], "north": shift["north_m"]} if shift else None,
            "shift": dict(shift) if shift else {"note": self.shift_note},
            "corrected": self.corrected.to_dict() if self.corrected else None,
            "strata": {
                by: {name: scores.to_dict() for name, scores in parts.items()}
                for by, parts in self.strata.items()
            },
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
# More replicates without a value than this and there is no interval.
_MAX_MISSING = 0.05
_CHUNK = 250


@lru_cache(maxsize=2)
def draws(blocks: int, replicates: int, seed: int) -> np.ndarray:
    """How often each block is drawn, int16 (replicates, blocks); rows sum to `blocks`."""
    rng = np.random.default_rng([seed, blocks])
    made = np.zeros((replicates, blocks), np.int16)  # no block is drawn 32,000 times
    for i in range(0, replicates, _CHUNK):
        size = min(_CHUNK, replicates - i)
        made[i : i + size] = rng.multinomial(blocks, np.full(blocks, 1 / blocks), size=size)
    made.flags.writeable = False
    return made


def replicate(rows: np.ndarray, replicates: int, seed: int) -> np.ndarray:
    """Sums of resampled blocks (replicates, fields) from each block's row (blocks, fields)."""
    weights = draws(len(rows), replicates, seed)
    parts = [weights[i : i + _CHUNK].astype(np.float64) @ rows for i in range(0, len(weights), _CHUNK)]
    return np.concatenate(parts)


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
BOUNDED = ("interval_coverage", "interval_width_m")


def score_sums(
    rows: np.ndarray,
    counts: tuple[HeightCounts, HeightCounts],
    *,
    replicates: int,
    seed: int,
    side_m: float,
    absent: Mapping[str, str],
) -> Scores:
    """Scores of one set of pixels.

    Args:
        rows: sums of `canopy.metrics`, (blocks, fields). counts: of the map's and reference's heights.
        replicates: 0 turns intervals off. side_m: of the blocks.
        absent: metrics that cannot be had from this reference -> why.
    """
    used = rows[rows[:, COLUMN["n"]] > 0]
    total = rows.sum(axis=0)
    note = "no intervals were asked for" if not replicates else None
    if note is None and len(used) < LEAST_BLOCKS:
        many = f"{len(used)} block{'s' * (len(used) != 1)} of {side_m:.0f} m"
        note = f"no interval: {many} with data, at least {LEAST_BLOCKS} needed"
    drawn = replicate(used, replicates, seed) if note is None else None

    def with_intervals(
        values: Mapping[str, Any], resampled: Mapping[str, np.ndarray], absent: Mapping[str, str]
    ) -> dict[str, Score]:
        limits = intervals(resampled, len(used)) if resampled else {}
        judged = total[COLUMN["bounded"]] > 0
        made = {}
        for name in (name for name in values if judged or name not in BOUNDED or name in absent):
            value, ends = float(values[name]), limits.get(name)
            if name == "n":
                made[name] = Score(int(value), (int(value), int(value)))
            elif name in absent or not math.isfinite(value):
                made[name] = Score(None, None, absent.get(name, "does not exist for these heights"))
            else:
                why = "no interval: it exists in too few of the resampled sets"
                if name.endswith("_error_m"):
                    why = "no interval is made for percentiles"
                made[name] = Score(value, ends, None if ends else note or why)
        return made

    overall = with_intervals(
        metrics.scores(total) | metrics.percentile_errors(*counts),
        {} if drawn is None else metrics.scores(drawn),
        absent,
    )
    bins = metrics.bin_scores(total)
    resampled = [{} for _ in bins] if drawn is None else metrics.bin_scores(drawn)
    by_height = {
        name: with_intervals(values, of_drawn, {})
        for name, values, of_drawn in zip(BIN_NAMES, bins, resampled, strict=True)
    }
    return Scores(overall, by_height)
