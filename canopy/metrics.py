"""Scores of a height map against a reference: pure NumPy, masked, exact under any cutting into parts.

Everything rests on sums: `pixel_sums`, `block_sums` and `gradient_sums` turn pixels into a row of numbers per
group (a spatial block, a stratum), rows are added, and `scores` turns added rows into metrics. A raster can
be read in windows, strata and bootstrap replicates cost no second reading, and the order does not count (to
the rounding of float64). p is the map, r the reference, e = p - r, all in metres.

    mae = mean |e|        rmse = sqrt(mean e^2)        bias = mean e
    r2 = 1 - sum e^2 / sum (r - mean r)^2              r = Pearson's correlation
    nmae = mean(|e| / r) over r > 2 m;  nmae_plus1 = mean(|e| / (1 + r)) over r > 2 m
    block_r2 = r2 of the means of p and r over blocks of 50 x 50 px, those at least half valid
    edge_error = sum ||grad p| - |grad r|| / sum |grad r|, |grad| by Sobel over 3 x 3 valid pixels;
        edge_error_symmetric divides by sum |grad p| + sum |grad r| instead
    cover at t = pixels higher than t: iou = tp / (tp + fp + fn), precision, recall, f1
    pNN_error = NN-th percentile of p minus that of r (linear between ranks; heights in whole millimetres)

Sources: block-R2 and edge error: Tolan et al. 2024 (RSE 300:113888); nMAE, cover and the height bins: Fogel
et al. 2025 (Open-Canopy, CVPR; its code divides by 1 + r). See docs/evaluation.md.

`percent_of` and `statistic_of` are the statistics that can stand for many pixels, named as `--stat` has them.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise

import numpy as np

from canopy.errors import InputError

HEIGHT_BINS_M = (0.0, 2.0, 5.0, 10.0, 15.0, 20.0, 30.0, 60.0)  # and everything above the last
COVER_M = (2, 3, 5)
PERCENTILES = (50, 95, 98)
NMAE_ABOVE_M = 2.0
BLOCK_PX = 50
BLOCK_VALID_SHARE = 0.5

N_BINS = len(HEIGHT_BINS_M)
# "0-2", "2-5", ... "60+"
BIN_NAMES = (*(f"{low:g}-{high:g}" for low, high in pairwise(HEIGHT_BINS_M)), f"{HEIGHT_BINS_M[-1]:g}+")
_COVER = tuple(f"{what}_{t}" for t in COVER_M for what in ("tp", "fp", "fn"))
_BIN = tuple(f"{w}@{i}" for i in range(N_BINS) for w in ("n", "e", "ae", "ee", "in", "width", "bounded"))
# One row of sums: pixels; relative errors; cover; bounds; height bins; blocks of 50 px; edges.
FIELDS = (
    "n", "p", "r", "pp", "rr", "pr", "e", "ae", "ee",
    "n_tall", "rel", "rel1",
    *_COVER,
    "bounded", "in", "width",
    *_BIN,
    "blocks", "bp", "br", "brr", "bee",
    "edges", "gp", "gr", "gd",
)  # fmt: skip
BIN_SCORES = ("n", "bias_m", "mae_m", "rmse_m", "interval_coverage", "interval_width_m")
COLUMN = {name: i for i, name in enumerate(FIELDS)}


def height_bin(height_m: np.ndarray) -> np.ndarray:
    """Which of the N_BINS bins: 0 for h < 2, ..., N_BINS - 1 for h >= 60. Negative heights are in bin 0."""
    return np.searchsorted(np.asarray(HEIGHT_BINS_M[1:]), height_m, side="right")


# ---- pixels to sums -------------------------------------------------------------------------------
def pixel_sums(
    map_m: np.ndarray,
    reference_m: np.ndarray,
    group: np.ndarray,
    groups: int,
    bounds_m: tuple[np.ndarray, np.ndarray] | None = None,
) -> np.ndarray:
    """Sums over pixels, float64 (groups, len(FIELDS)); the block and edge fields stay 0.

    Args:
        map_m, reference_m: (n,) metres, all of them valid.
        group: int (n,), 0 <= group < groups.
        bounds_m: lower and upper end of the map's interval (n,), NaN where there is none.
    """
    p, r = (np.asarray(x, np.float64) for x in (map_m, reference_m))
    out = np.zeros((groups, len(FIELDS)))
    e, bins = p - r, height_bin(r)
    _add(out, group, {"n": None, "e": e, "ae": np.abs(e), "ee": e * e}, bins)
    _add(out, group, {"p": p, "r": r, "pp": p * p, "rr": r * r, "pr": p * r})
    tall = r > NMAE_ABOVE_M
    ae, above = np.abs(e)[tall], r[tall]
    _add(out, group[tall], {"n_tall": None, "rel": ae / above, "rel1": ae / (1 + above)})
    for t in COVER_M:
        both = 2 * (r > t) + (p > t)
        counts = np.bincount(group * 4 + both, minlength=groups * 4).reshape(groups, 4)
        for name, k in (("tp", 3), ("fp", 1), ("fn", 2)):
            out[:, COLUMN[f"{name}_{t}"]] = counts[:, k]
    if bounds_m is not None:
        low, high = (np.asarray(x, np.float64) for x in bounds_m)
        known = np.isfinite(low) & np.isfinite(high)
        inside = ((r >= low) & (r <= high))[known].astype(np.float64)
        _add(out, group[known], {"bounded": None, "in": inside, "width": (high - low)[known]}, bins[known])
    return out


def _add(
    out: np.ndarray,
    group: np.ndarray,
    weights: Mapping[str, np.ndarray | None],
    bins: np.ndarray | None = None,
) -> None:
    """Sums of weights (None: of ones) per group, and per height bin where `bins` are given."""
    groups = len(out)
    for name, values in weights.items():
        if bins is None:
            out[:, COLUMN[name]] = np.bincount(group, values, groups)
        else:
            total = np.bincount(group * N_BINS + bins, values, groups * N_BINS).reshape(groups, N_BINS)
            out[:, [COLUMN[f"{name}@{i}"] for i in range(N_BINS)]] = total
            out[:, COLUMN[name]] = total.sum(axis=1)  # every pixel is in one bin


def block_sums(
    map_m: np.ndarray,
    reference_m: np.ndarray,
    block: np.ndarray,
    block_group: np.ndarray,
    groups: int,
    block_px: int = BLOCK_PX,
) -> np.ndarray:
    """Sums over 50 px blocks for block-R2, float64 (groups, len(FIELDS)).

    Args:
        map_m, reference_m: (n,) valid pixels.
        block: int (n,), the block that each pixel lies in; a block must be given whole.
        block_group: int (blocks,), the group of each block; -1 leaves it out.
        block_px: side; a block counts with at least half of its block_px^2 pixels.
    """
    out = np.zeros((groups, len(FIELDS)))
    count = np.bincount(block, minlength=len(block_group))
    whole = (count >= BLOCK_VALID_SHARE * block_px**2) & (block_group >= 0)
    p, r = (
        np.bincount(block, np.asarray(x, np.float64), len(block_group))[whole] / count[whole]
        for x in (map_m, reference_m)
    )
    _add(out, block_group[whole], {"blocks": None, "bp": p, "br": r, "brr": r * r, "bee": (p - r) ** 2})
    return out


def sobel(values: np.ndarray) -> np.ndarray:
    """Length of Sobel's gradient (h - 2, w - 2) in units per pixel: the inner pixels of (h, w)."""
    v = np.asarray(values, np.float64)
    down = v[:, :-2] + 2 * v[:, 1:-1] + v[:, 2:]
    right = v[:-2] + 2 * v[1:-1] + v[2:]
    dy, dx = down[2:] - down[:-2], right[:, 2:] - right[:, :-2]
    return np.sqrt(dx * dx + dy * dy) / 8


Gradients = tuple[np.ndarray, np.ndarray, np.ndarray]


def gradients(map_m: np.ndarray, reference_m: np.ndarray, valid: np.ndarray) -> Gradients:
    """Gradient lengths of both and where all 3 x 3 pixels are valid, (h - 2, w - 2) of arrays (h, w)."""
    rows = valid[:-2] & valid[1:-1] & valid[2:]
    known = rows[:, :-2] & rows[:, 1:-1] & rows[:, 2:]
    return sobel(np.where(valid, map_m, 0)), sobel(np.where(valid, reference_m, 0)), known


def gradient_sums(of: Gradients, group: np.ndarray, groups: int) -> np.ndarray:
    """Sums over gradients, float64 (groups, len(FIELDS)); `group`: int (h - 2, w - 2), -1 leaves one out."""
    out = np.zeros((groups, len(FIELDS)))
    chosen = of[2] & (group >= 0)
    p, r = of[0][chosen], of[1][chosen]
    _add(out, group[chosen], {"edges": None, "gp": p, "gr": r, "gd": np.abs(p - r)})
    return out


# ---- sums to scores -------------------------------------------------------------------------------
def scores(sums: np.ndarray) -> dict[str, np.ndarray]:
    """Metrics of added rows (..., len(FIELDS)); every value has shape (...), NaN where it does not exist."""

    def get(name: str) -> np.ndarray:
        return sums[..., COLUMN[name]]

    n = get("n")
    with np.errstate(divide="ignore", invalid="ignore"):
        spread_r = _real(get("rr") - get("r") ** 2 / n, get("rr"))
        spread_p = _real(get("pp") - get("p") ** 2 / n, get("pp"))
        spread_b = _real(get("brr") - get("br") ** 2 / get("blocks"), get("brr"))
        out = {
            **_errors(get, ("n", "mae_m", "rmse_m", "bias_m")),
            "r2": 1 - _ratio(get("ee"), spread_r),
            "r": _ratio(get("pr") - get("p") * get("r") / n, np.sqrt(spread_r * spread_p)),
            "nmae": _ratio(get("rel"), get("n_tall")),
            "nmae_plus1": _ratio(get("rel1"), get("n_tall")),
            "block_r2": 1 - _ratio(get("bee"), spread_b),
            "edge_error": _ratio(get("gd"), get("gr")),
            "edge_error_symmetric": _ratio(get("gd"), get("gp") + get("gr")),
        }
        for t in COVER_M:
            tp, fp, fn = (get(f"{name}_{t}") for name in ("tp", "fp", "fn"))
            out[f"cover_iou_{t}m"] = _ratio(tp, tp + fp + fn)
            out[f"cover_precision_{t}m"] = _ratio(tp, tp + fp)
            out[f"cover_recall_{t}m"] = _ratio(tp, tp + fn)
            out[f"cover_f1_{t}m"] = _ratio(2 * tp, 2 * tp + fp + fn)
        return out | _errors(get, ("interval_coverage", "interval_width_m"))


def bin_scores(sums: np.ndarray) -> list[dict[str, np.ndarray]]:
    """Per height bin: n, bias_m, mae_m, rmse_m, interval_coverage, interval_width_m; each of shape (...)."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return [
            _errors(lambda name, i=i: sums[..., COLUMN[f"{name}@{i}"]], BIN_SCORES)  # type: ignore[misc]
            for i in range(N_BINS)
        ]


def _errors(get: Callable[[str], np.ndarray], names: Sequence[str]) -> dict[str, np.ndarray]:
    """Those of BIN_SCORES that are named, from what `get` gives of a field."""
    found = {
        "n": get("n"),
        "bias_m": _ratio(get("e"), get("n")),
        "mae_m": _ratio(get("ae"), get("n")),
        "rmse_m": np.sqrt(_ratio(get("ee"), get("n"))),
        "interval_coverage": _ratio(get("in"), get("bounded")),
        "interval_width_m": _ratio(get("width"), get("bounded")),
    }
    return {name: found[name] for name in names}


def _ratio(above: np.ndarray, below: np.ndarray) -> np.ndarray:
    return np.where(below > 0, above / below, np.nan)


def _real(spread: np.ndarray, squares: np.ndarray) -> np.ndarray:
    """A sum of squared deviations, 0 where it is only the rounding of the squares it was made from."""
    return np.where(spread > 1e-12 * squares, spread, 0)


# ---- percentiles ----------------------------------------------------------------------------------
class HeightCounts:
    """How often each height occurs, in whole millimetres from -20 to 130 m (beyond: counted at the ends).

    Counts add up without error, so percentiles are exact for heights rounded to the millimetre, however the
    pixels came. Memory: 8 bytes per millimetre up to the highest one.
    """

    LOW_MM, HIGH_MM = -20_000, 130_000

    def __init__(self) -> None:
        self.counts = np.zeros(0, np.int64)

    def add(self, height_m: np.ndarray) -> None:
        """Count heights (n,), metres."""
        mm = np.clip(np.rint(np.asarray(height_m, np.float64) * 1000), self.LOW_MM, self.HIGH_MM)
        counts = np.bincount(mm.astype(np.int64) - self.LOW_MM, minlength=len(self.counts))
        counts[: len(self.counts)] += self.counts
        self.counts = counts

    def percentile(self, percent: float) -> float:
        """As `numpy.percentile` (linear) of the rounded heights; NaN without any."""
        total = int(self.counts.sum())
        if not total:
            return float("nan")
        rank = percent / 100 * (total - 1)
        below, above = int(np.floor(rank)), int(np.ceil(rank))
        at = np.searchsorted(np.cumsum(self.counts), [below, above], side="right") + self.LOW_MM
        return float(at[0] + (at[1] - at[0]) * (rank - below)) / 1000


def percentile_errors(map_counts: HeightCounts, reference_counts: HeightCounts) -> dict[str, float]:
    """pNN_error_m for every NN of PERCENTILES: the map's percentile minus the reference's."""
    return {f"p{q}_error_m": map_counts.percentile(q) - reference_counts.percentile(q) for q in PERCENTILES}


def percent_of(stat: str, where: str | None = None) -> float | None:
    """NN of "pNN", 100 for "max", None for "mean". Raises InputError, naming `where`, for anything else."""
    if stat in ("mean", "max"):
        return 100.0 if stat == "max" else None
    match = re.fullmatch(r"p(\d{1,3}(?:\.\d+)?)", stat)
    if match is None or float(match[1]) > 100:
        raise InputError(
            f"statistic {stat!r}", where=where, expected="mean, max, or a percentile such as p95"
        )
    return float(match[1])


def statistic_of(values: np.ndarray, known: np.ndarray, percent: float | None) -> np.ndarray:
    """Over the known values of the last axis (..., k): float64 (...), 0 where none is known.

    `percent`: see `percent_of`; percentiles are linear between ranks, as numpy's.
    """
    count = known.sum(axis=-1)
    if percent is None:
        return np.where(known, values, 0).sum(axis=-1, dtype=np.float64) / np.maximum(count, 1)
    if percent == 100:
        highest = np.where(known, values, -np.inf).max(axis=-1)
        return np.where(count > 0, highest, 0).astype(np.float64)
    ordered = np.sort(np.where(known, values, np.inf), axis=-1)
    rank = percent / 100 * np.maximum(count - 1, 0)
    low = np.floor(rank).astype(np.int64)
    high = np.minimum(low + 1, np.maximum(count - 1, 0))
    below, above = (np.take_along_axis(ordered, at[..., None], -1)[..., 0] for at in (low, high))
    below, above = (np.where(count > 0, x, 0).astype(np.float64) for x in (below, above))
    return below + (rank - low) * (above - below)
