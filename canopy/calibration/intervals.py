"""Fitting intervals: how far the truth lies from a prediction, read off held-out ground.

The network's own spread is a hint, not a probability. So for a pixel of predicted height h and spread s, the
errors of held-out cells with like h and like s say how far the truth may lie below and above. This is
split conformal prediction (Vovk et al. 2005), conditional on (h, s) by hat functions on a lattice of knots
(Mondrian classes with soft edges; Guan 2023). The exchangeable unit is a block of ground, not a pixel
(hierarchical conformal prediction: Lee, Barber and Willett 2023): a band counts as wide enough only if it
holds its share of the errors of K blocks and of an imaginary further one whose errors are all infinite. Both
ends move out together, tail by tail, as nested sets (Gupta, Kuchibhotla and Ramdas 2022).

Where the lower end reaches the ground, nothing can lie below it, and the whole risk goes to the upper end.

How much wider bands must be in places that neither training nor calibration has seen.

Held-out blocks of the training places say nothing about a new place: there the network may be wrong by metres
as a whole. So models of the same training that were kept from some places are asked about these. Their bands,
calibrated on places they know, are stretched about the height by the factor f(h) that makes them hold their
share there, at predicted height h. Places count alike, however many cells they have, and a further place is
imagined that is like the worst of them (after Dunn, Wasserman and Ramdas 2023, "Distribution-free prediction
sets for two-layer hierarchical models", whose further place is wrong everywhere: that guarantee takes nine
places for bands of 90 %).

The reference of the quality flag "out of domain": how training images look, and how far is too far.

The footprint gap: how far a model's maps lie below what GEDI sees, even where they are right on average.

A network gives each pixel the height to be expected there, so its maps are smoother than the canopy: the 98th
percentile of a 25 m disc of the map is metres lower than that of the canopy, though the means agree. Matching
RH98 to it would lift every pixel by that gap. So the usual gap of a model is measured on held-out lidar,
travels in its card and in its maps' tags, and only what deviates from it is taken for a bias of the map.

`canopy calibrate interval`: give a model file its interval calibration; its tensors stay as they are.
"""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from canopy import __version__
from canopy.calibration.area import AreaModel, area_coverage, fit_areas
from canopy.calibration.collect import (
    BLOCK_M,
    Cells,
    Scored,
    cells_of,
    check_gsd,
    halves,
    load_chips,
    places_of,
    predict_chips,
)
from canopy.errors import CheckpointError, ConfigError, DataError, InputError
from canopy.files import file_sha256, replacing
from canopy.inference.layers import DESCRIPTORS, descriptor
from canopy.models.checkpoint import header_bytes, read_header, resolve_model
from canopy.models.heads import CARD_KEY as INTERVAL_KEY
from canopy.models.heads import (
    FLAT_M,
    LEVELS,
    METHODS,
    SOFT_M,
    IntervalTable,
    NewPlace,
    dense_hats,
    hats,
    table_of,
)
from canopy.runtime import Progress, log

if TYPE_CHECKING:
    from canopy.chips.index import ChipRow
    from canopy.chips.store import Chip
    from canopy.models.height import HeightModel


HEIGHT_CLASSES_M = (0.0, 0.5, 2.0, 5.0, 10.0, 15.0, 20.0, 25.0, 30.0, 40.0, 60.0)
_KNOTS_M = (0.0, 0.25, 0.5, 1, 2, 4, 7, 10, 13, 16, 18, 20, 22, 24, 26, 28, 30, 33, 36, 40)
_SPREAD_QUANTILES = (0.1, 0.5, 0.9)
# A knot needs this many effective blocks, else its neighbours take its cells.
_LEAST_BLOCKS = 25.0
_LEAST_HINTED = 10.0  # 1 in 11 blocks imagined leaves just enough for bands of 90 %
_LEAST_CLASS = 200
_MOST_M = 60.0


def fit_intervals(
    cells: Cells, facts: dict[str, Any] | None = None, *, method: str = "spread"
) -> IntervalTable:
    """Read the table off held-out cells.

    Args:
        cells: with the hints of `method`.
        method: see `IntervalTable`. Quantiles are conformalised (Romano, Patterson and Candes 2019), height
            by height.

    Raises:
        DataError: too few blocks for any knot.
    """
    h, s, y = (np.asarray(v, np.float64) for v in (cells.height_m, cells.hint_m, cells.truth_m))
    knots = _choose_knots(h, cells.block)
    near = _by_knot(knots, h)
    if method == "quantiles":
        typical, spread, relative = np.zeros(len(knots)), np.zeros(1), np.zeros(len(h))
    else:
        typical = np.array([weighted_median(s[at], w) for at, w in near])
        relative = np.log((s + SOFT_M) / (np.interp(h, knots, typical) + SOFT_M))
        spread = np.unique(np.round(np.quantile(relative, _SPREAD_QUANTILES), 4))
    below, above = (np.zeros((len(LEVELS), len(knots), len(spread))) for _ in range(2))
    for i, (at, by_height) in enumerate(near):
        hat_v = dense_hats(spread, relative[at])
        for j in range(len(spread)):
            weight = by_height * hat_v[:, j]
            if effective_blocks(weight, cells.block[at]) < _LEAST_HINTED:
                weight = by_height  # hardly any cell of this height has such a hint
            some = weight > 1e-6
            chosen, weight = at[some], weight[some]
            block = cells.block[chosen]
            if method == "quantiles":
                ends = _beyond_quantiles(h[chosen], s[:, chosen], y[chosen], weight, block)
            else:
                ends = _tails(y[chosen] - h[chosen], weight, block, float(knots[i]))
            below[:, i, j], above[:, i, j] = ends
    if method != "quantiles":
        # Wider levels contain narrower ones.
        below, above = (np.maximum.accumulate(t, axis=0) for t in (below, above))
    return IntervalTable(np.array(LEVELS), knots, typical, spread, below, above, facts or {}, method)


def _beyond_quantiles(
    height_m: np.ndarray, quantiles_m: np.ndarray, truth_m: np.ndarray, weight: np.ndarray, block: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """How far beyond the network's quantiles (2 levels, n) the ends lie round one knot, (levels,) each."""
    share = 1.0 / (1.0 + effective_blocks(weight, block))
    below, above = np.zeros(len(LEVELS)), np.zeros(len(LEVELS))
    for n, level in enumerate(LEVELS):
        low, high = quantiles_m[2 * n], quantiles_m[2 * n + 1]
        inside = min(1.0, level / (1 - share))
        under, over = (_Ranked.of(v, weight) for v in (low - truth_m, truth_m - high))
        # Both tails alike; where the ground takes one of them, the other may hold up to the whole risk.
        for tail in np.linspace(1 - inside, (1 - inside) / 2, 12).tolist():
            below[n], above[n] = under.at(1 - tail), over.at(1 - tail)
            lower = np.clip(low - below[n], 0.0, height_m)
            held = (truth_m >= lower) & (truth_m <= np.maximum(high + above[n], height_m))
            if weight[held].sum() >= inside * weight.sum():
                break
    return np.clip(below, -_MOST_M, _MOST_M), np.clip(above, -_MOST_M, _MOST_M)


class _Ranked(NamedTuple):
    """Weighted values in order."""

    values: np.ndarray
    mass: np.ndarray

    @classmethod
    def of(cls, values: np.ndarray, weight: np.ndarray) -> _Ranked:
        order = np.argsort(values)
        return cls(values[order], np.cumsum(weight[order]) / weight.sum())

    def at(self, share: float) -> float:
        """The smallest value that this share does not exceed."""
        return float(self.values[min(int(np.searchsorted(self.mass, share)), len(self.values) - 1)])


def _tails(
    error: np.ndarray, weight: np.ndarray, block: np.ndarray, height_m: float
) -> tuple[np.ndarray, np.ndarray]:
    """Distances below and above (levels,) for the errors truth - prediction round one knot."""
    order = np.argsort(error)
    ranked, mass = error[order].tolist(), np.cumsum(weight[order]) / weight.sum()
    last = len(ranked) - 1
    share = 1.0 / (1.0 + effective_blocks(weight, block))  # the imaginary block's
    below, above = np.zeros(len(LEVELS)), np.zeros(len(LEVELS))
    for n, level in enumerate(LEVELS):
        # Both ends move out together until the known blocks inside outweigh what is wanted of all.
        inside = min(1.0, level / (1 - share))
        high = (1 - inside) / 2
        below[n] = max(0.0, -ranked[min(int(np.searchsorted(mass, high, side="left")), last)])
        if below[n] >= height_m:  # the ground: nothing can be lower
            high = 1 - inside
        above[n] = max(0.0, ranked[min(int(np.searchsorted(mass, 1 - high, side="left")), last)])
    return np.minimum(below, _MOST_M), np.minimum(above, _MOST_M)


def effective_blocks(weight: np.ndarray, block: np.ndarray) -> float:
    """(sum W)^2 / sum W^2 over the blocks' summed weights: as many equal blocks say as much."""
    sums = np.bincount(block, weight)
    return float(sums.sum() ** 2 / max((sums**2).sum(), 1e-30))


def _choose_knots(height_m: np.ndarray, block: np.ndarray) -> np.ndarray:
    """The knots round which enough blocks have cells; dropping one widens its neighbours."""
    knots, blocks = list(_KNOTS_M), int(block.max(initial=0)) + 1
    while len(knots) > 1:
        sums = np.zeros(len(knots) * blocks)
        for i, w in hats(np.array(knots), height_m):
            sums += np.bincount(i * blocks + block, w, len(sums))
        table = sums.reshape(len(knots), blocks)
        counts = table.sum(axis=1) ** 2 / np.maximum((table**2).sum(axis=1), 1e-30)
        worst = int(np.argmin(counts))
        if counts[worst] >= _LEAST_BLOCKS:
            return np.array(knots)
        del knots[worst]
    raise DataError(
        f"too little held-out ground: {effective_blocks(np.ones(len(block)), block):.0f} blocks",
        expected=f"at least {_LEAST_BLOCKS:.0f} blocks of {BLOCK_M} m",
        remedy="give more chips with --data, or other --splits",
    )


def _by_knot(knots: np.ndarray, x: np.ndarray) -> list[tuple[np.ndarray, np.ndarray]]:
    """For every knot the numbers of the values that its hat function reaches, and their weights."""
    pairs = hats(knots, x)
    number = np.concatenate([i for i, _ in pairs])
    weight = np.concatenate([w for _, w in pairs])
    order = np.argsort(number, kind="stable")
    order = order[weight[order] > 0]
    edges = np.searchsorted(number[order], np.arange(len(knots) + 1))
    parts = [order[a:b] for a, b in itertools.pairwise(edges.tolist())]
    return [(part % len(x), weight[part]) for part in parts]


def weighted_median(values: np.ndarray, weight: np.ndarray) -> float:
    """The smallest of values (n,) with half the weight (n,) at or below it."""
    order = np.argsort(values)
    mass = np.cumsum(weight[order])
    return float(values[order][np.searchsorted(mass, mass[-1] / 2)])


def coverage(table: IntervalTable, cells: Cells, level: float = 0.9) -> dict[str, Any]:
    """How often the truth lies inside, and how wide the bands are, JSON-ready.

    Returns:
        `overall`, `by_height` and `by_truth` (classes of predicted and of true height with at least 200
        cells), each with n, coverage, below (share of truths under the band), above, and mean_width_m. Bands
        promise nothing about true heights, which nobody knows beforehand.
    """
    lower, upper = table.bounds(cells.height_m, table.hint_of(cells.hint_m, level), level)
    below, above = cells.truth_m < lower, cells.truth_m > upper
    found: dict[str, Any] = {"level": level, "overall": _row(below, above, upper - lower)}
    for name, heights in (("by_height", cells.height_m), ("by_truth", cells.truth_m)):
        found[name] = {}
        for low, high in itertools.pairwise(HEIGHT_CLASSES_M):
            at = (heights >= low) & (heights < high)
            if at.sum() >= _LEAST_CLASS:
                found[name][f"{low:g}-{high:g}"] = _row(below[at], above[at], (upper - lower)[at])
    return found


def _row(below: np.ndarray, above: np.ndarray, width: np.ndarray) -> dict[str, float]:
    return {
        "n": len(below),
        "coverage": round(float(1 - below.mean() - above.mean()), 4),
        "below": round(float(below.mean()), 4),
        "above": round(float(above.mean()), 4),
        "mean_width_m": round(float(width.mean()), 2),
    }


def pooled(parts: list[dict[str, Any]]) -> dict[str, Any]:
    """Several `coverage` tables of disjoint cells as one."""
    made: dict[str, Any] = {
        "level": parts[0]["level"],
        "overall": _mean([part["overall"] for part in parts]),
    }
    for by in ("by_height", "by_truth"):
        names = dict.fromkeys(name for part in parts for name in part[by])
        made[by] = {name: _mean([part[by][name] for part in parts if name in part[by]]) for name in names}
    return made


def _mean(rows: list[dict[str, float]]) -> dict[str, float]:
    n = np.array([row["n"] for row in rows], np.float64)
    keys = ("coverage", "below", "above", "mean_width_m")
    return {"n": int(n.sum())} | {k: round(float(n @ [row[k] for row in rows] / n.sum()), 4) for k in keys}


_PLACE_KNOTS_M = (0.0, 1.0, 4.0, 9.0, 14.0, 19.0, 24.0, 30.0)
_LEAST_PLACE_BLOCKS = 8.0
_LEAST_PLACES = 3
MOST_CHIPS, _LEAST_TILES = 12, 12
_MOST_CELLS = 150_000
_FACTORS = np.geomspace(1.0, 12.0, 250)


@dataclass(frozen=True)
class Unseen:
    """A place as a model saw it that was kept from it.

    Attributes:
        site: its name. table: of that model, calibrated on places it knows. chips: of the place.
    """

    site: str
    table: IntervalTable
    chips: list[Scored]

    @cached_property
    def held(self) -> list[list[np.ndarray | None]]:
        """By level and knot of height: the share of truths inside by `_FACTORS`; None with few cells."""
        cells = cells_of(self.chips)
        step = -(-len(cells.truth_m) // _MOST_CELLS)
        h, y, hint, block = (
            v[..., ::step] for v in (cells.height_m, cells.truth_m, cells.hint_m, cells.block)
        )
        weights = dense_hats(np.array(_PLACE_KNOTS_M), h).T
        enough = [effective_blocks(weight, block) >= _LEAST_PLACE_BLOCKS for weight in weights]
        found: list[list[np.ndarray | None]] = []
        for level in LEVELS:
            lower, upper = self.table.bounds(h, self.table.hint_of(hint, level), level)
            reach = np.maximum(np.where(y < h, h - lower, upper - h), FLAT_M)
            at = np.searchsorted(_FACTORS, np.abs(y - h) / reach)
            mass = [np.bincount(at, w, len(_FACTORS) + 1)[:-1].cumsum() / max(w.sum(), 1e-9) for w in weights]
            found.append([m if ok else None for m, ok in zip(mass, enough, strict=True)])
        return found


def unseen_places(seen: Sequence[Scored], held: Sequence[Scored], *, method: str = "spread") -> list[Unseen]:
    """The places of `held`, with bands calibrated on `seen`; both predicted by the same model."""
    table = fit_intervals(cells_of(seen), method=method)
    sites = dict.fromkeys(chip.site for chip in held)
    return [Unseen(site, table, [chip for chip in held if chip.site == site]) for site in sites]


def fit_new_place(places: Sequence[Unseen], *, least: int = _LEAST_PLACES) -> NewPlace:
    """The factors f(h) by level.

    Raises:
        DataError: fewer than `least` places.
    """
    if len(places) < least:
        raise DataError(
            f"{len(places)} places kept from models", expected=f"at least {least}",
            remedy="give more models with --kept-from",
        )  # fmt: skip
    factor = np.ones((len(LEVELS), len(_PLACE_KNOTS_M)))
    for n, level in enumerate(LEVELS):
        for k in range(len(_PLACE_KNOTS_M)):
            curves = np.array([c for place in places if (c := place.held[n][k]) is not None])
            if len(curves):
                share = (curves.sum(axis=0) + curves.min(axis=0)) / (len(curves) + 1)
                factor[n, k] = _FACTORS[min(int(np.searchsorted(share, level)), len(_FACTORS) - 1)]
            elif k:
                factor[n, k] = factor[n, k - 1]  # no place has such heights
    return NewPlace(np.array(_PLACE_KNOTS_M), factor)


def tables_by_chip(places: Sequence[Unseen], new: NewPlace) -> dict[str, IntervalTable]:
    """Each chip's own table, made wider: for areas, see `fit_areas`."""
    return {chip.id: place.table.widened(new) for place in places for chip in place.chips}


def verify_new_place(places: Sequence[Unseen], level: float = 0.9) -> dict[str, Any]:
    """What bands made wider by all other places hold in each place, JSON-ready.

    Returns:
        `places`: rows by site, each with n, coverage, below, above, mean_width_m and, as `as_seen`, the
        coverage of the bands for places that calibration has seen; `coverage`: their mean over places.
    """
    rows: dict[str, dict[str, float]] = {}
    for place in places:
        cells = cells_of(place.chips)
        others = [other for other in places if other.site != place.site]
        made = coverage(place.table.widened(fit_new_place(others, least=1)), cells, level)["overall"]
        rows[place.site] = made | {"as_seen": coverage(place.table, cells, level)["overall"]["coverage"]}
    mean = float(np.mean([row["coverage"] for row in rows.values()]))
    return {"level": level, "places": rows, "coverage": round(mean, 4)}


def areas_in_new_places(places: Sequence[Unseen]) -> tuple[AreaModel | None, dict[str, dict[str, float]]]:
    """The area model of new places, and what it covers in each place when made of the others, by side."""
    if sum(len(place.chips) for place in places) < _LEAST_TILES:
        return None, {}
    rows: dict[str, list[dict[str, float]]] = {}
    for place in places:
        others = [other for other in places if other.site != place.site]
        new = fit_new_place(others, least=1)
        model = fit_areas([c for other in others for c in other.chips], tables_by_chip(others, new))
        for size, row in area_coverage(place.chips, place.table.widened(new), model).items():
            rows.setdefault(size, []).append(row)
    every = [chip for place in places for chip in place.chips]
    made = fit_areas(every, tables_by_chip(places, fit_new_place(places)))
    return made, {
        size: {key: round(float(np.mean([p[key] for p in parts])), 4) for key in ("coverage", "mean_width_m")}
        | {"places": len(parts), "worst": min(p["coverage"] for p in parts)}
        for size, parts in rows.items()
    }


def score_unseen(
    models: Sequence[str | Path], data: str | Path, method: str, progress: Progress | None = None
) -> list[Unseen]:
    """Every place that one of the models was kept from, as that model sees it.

    Bands are calibrated on the val chips of places that the model was trained on; of a place it was kept
    from, up to `MOST_CHIPS` of the train and val chips are predicted.
    """
    from canopy.models.checkpoint import load_model

    chips, _ = load_chips(data, ("train", "val"))
    chips = [chip for chip in chips if chip.row.kind != "synth"]
    ids: dict[str, list[str]] = {}
    for chip in chips:
        ids.setdefault(chip.row.site, []).append(chip.row.id)
    found: list[Unseen] = []
    for path in models:
        network = load_model(path)
        check_gsd(network, path)
        sites = kept_from(network.card, ids)
        log.info(f"{Path(path).name} was kept from {'; '.join(sites)}")
        known = [c for c in chips if c.row.split == "val" and c.row.site not in sites]
        seen = list(predict_chips(network, known, method=method, progress=progress))
        held = [c for site in sites for c in _some([c for c in chips if c.row.site == site])]
        found += unseen_places(seen, list(predict_chips(network, held, method=method)), method=method)
    return found


def _some(chips: Sequence[Chip]) -> Sequence[Chip]:
    """At most `MOST_CHIPS`, evenly picked; chips of a few metres, as plots are, are no place."""
    large = [chip for chip in chips if min(chip.chm_m.shape) >= BLOCK_M]
    return large[:: -(-len(large) // MOST_CHIPS)] if large else []


def trained_on(card: Mapping[str, Any], rows: Sequence[ChipRow]) -> list[ChipRow] | None:
    """Which chips a model's card says it was trained on; None where it does not say."""
    data = card.get("data", {})
    if not data.get("train_ids"):
        return None
    seen = named_in(data["train_ids"], [row.id for row in rows])
    if not data.get("val_seen"):
        # Of a pair that was divided between training and validation, the card names the pair in both.
        seen -= named_in(data.get("val_ids", ()), [row.id for row in rows if row.split != "train"])
    return [row for row in rows if row.id in seen]


def named_in(names: Sequence[str], ids: Sequence[str]) -> set[str]:
    """Which of the chips, or pairs that chips are cut from, are among others, or cut from or into them.

    A chip's name is that of its pair, `-` and the place and settings it was cut at.
    """
    whole = set(names)
    return {
        i for i in ids
        if i in whole or any(n.startswith(f"{i}-") or i.startswith(f"{n}-") for n in whole)
    }  # fmt: skip


def kept_from(card: Mapping[str, Any], sites: Mapping[str, Sequence[str]]) -> list[str]:
    """Which sites (name -> chip ids) a model's card says it was not trained on.

    Raises:
        DataError: the card names no training chips, or chips of every site.
    """
    trained = card.get("data", {}).get("train_ids", ())
    if not trained:
        raise DataError("the model does not say which chips it was trained on", where="--kept-from")
    found = [site for site, ids in sites.items() if not named_in(trained, ids)]
    if not found:
        raise DataError(
            "the model was trained on every place of the data", where="--kept-from",
            remedy="train one with data.val_sites",
        )  # fmt: skip
    return found


_CROP_PX, _STEP_PX = 384, 128
_LEAST_SIDE_PX, _LEAST_VALID = 256, 0.9
# A covariance of fifteen numbers from a few hundred overlapping crops: some of the unit matrix steadies it.
_RIDGE = 0.05
_QUANTILE = 0.97


def fit_domain(inside: Sequence[np.ndarray], unseen: Sequence[np.ndarray]) -> dict[str, Any]:
    """Fit the reference on training images, and set the limit on held-out images of the same places.

    Args:
        inside: uint8 (3, H, W) images the model was trained on, 0,0,0 alone where there is none.
        unseen: held-out images; 97 % of them (mean over their crops) stay within the limit.

    Returns:
        JSON-ready: centre, scale, root, limit, and what they were made of.

    Raises:
        DataError: too few images of 256 px and more.
    """
    trained = [d for image in inside for d in crops_described(image)]
    held_out = [np.array(found) for image in unseen if (found := crops_described(image))]
    if len(trained) < 2 * DESCRIPTORS or not held_out:
        raise DataError(
            f"{len(trained)} training crops and {len(held_out)} held-out images describe no domain",
            expected=f"at least {2 * DESCRIPTORS} crops and one image, of {_LEAST_SIDE_PX} px or more",
        )
    table = np.array(trained)
    centre, scale = table.mean(axis=0), table.std(axis=0) + 1e-6
    mixed = np.cov(((table - centre) / scale).T) * (1 - _RIDGE) + _RIDGE * np.eye(DESCRIPTORS)
    root = np.linalg.cholesky(np.linalg.inv(mixed)).T
    distances = [
        float(np.linalg.norm(((crops - centre) / scale) @ root.T, axis=1).mean()) for crops in held_out
    ]
    return {
        "centre": np.round(centre, 6).tolist(), "scale": np.round(scale, 6).tolist(),
        "root": np.round(root, 4).tolist(), "limit": round(float(np.quantile(distances, _QUANTILE)), 4),
        "training_crops": len(table), "held_out_images": len(held_out),
    }  # fmt: skip


def crops_described(image: np.ndarray) -> list[np.ndarray]:
    """Descriptors of an image's overlapping crops; none of images that are small or have large holes."""
    h, w = image.shape[1:]
    if min(h, w) < _LEAST_SIDE_PX:
        return []
    side = min(_CROP_PX, h, w)
    found = []
    for row in range(0, h - side + 1, _STEP_PX):
        for col in range(0, w - side + 1, _STEP_PX):
            crop = image[:, row : row + side, col : col + side]
            if (crop.max(axis=0) > 0).mean() >= _LEAST_VALID:
                found.append(descriptor(crop.astype(np.float32) / 255.0))
    return found


TAG = "CANOPY_FOOTPRINT_GAP"
CARD_KEY = "footprint_gap"
PERCENTS = (95, 98)
_GAP_M = np.array([0.0, 2, 5, 8, 11, 14, 17, 20, 23, 26, 30, 40])
_RADIUS_M, _STEP_M, _LEAST_KNOWN = 12.5, 16, 0.9
_LEAST_DISCS = 30.0


@dataclass(frozen=True)
class FootprintGap:
    """What a disc of the canopy has over the same disc of the map, by the map's percentile there.

    Attributes:
        map_m: (k,) rising, from 0. gap_m: (k,); 0 at 0 m; map + gap rises.
    """

    map_m: np.ndarray
    gap_m: np.ndarray

    def expected(self, map_m: np.ndarray) -> np.ndarray:
        """What GEDI should see over discs whose map percentile is `map_m` (NaN stays NaN)."""
        return map_m + np.interp(map_m, self.map_m, self.gap_m)


def fit_gap(scored: Sequence[Scored], percent: int) -> FootprintGap | None:
    """Median gap by map height on held-out tiles; None where there are too few discs."""
    if not scored:
        return None
    mapped, seen = (np.concatenate(v) for v in zip(*(_discs(chip, percent) for chip in scored), strict=True))
    if len(mapped) < 10 * _LEAST_DISCS:
        return None
    kept, gaps = [0.0], [0.0]
    for knot, weight in zip(_GAP_M[1:].tolist(), dense_hats(_GAP_M, mapped)[:, 1:].T, strict=True):
        if weight.sum() >= _LEAST_DISCS:
            kept.append(knot)
            gaps.append(weighted_median(seen - mapped, weight))
    if len(kept) < 3:
        return None
    at = np.array(kept)
    # Taller discs of the map are taller discs of the canopy, however the medians fall.
    return FootprintGap(at, np.maximum.accumulate(at + np.array(gaps)) - at)


def gaps_to_dict(scored: Sequence[Scored]) -> dict[str, Any]:
    """JSON-ready gaps of the usual percentiles, for a card; empty where tiles are too few."""
    made = {str(p): fit_gap(scored, p) for p in PERCENTS}
    return {
        p: {"map_m": gap.map_m.tolist(), "gap_m": np.round(gap.gap_m, 2).tolist()}
        for p, gap in made.items()
        if gap is not None
    }


def gap_of(tags: Mapping[str, str], percent: int) -> FootprintGap | None:
    """The gap in a map's tags; None for maps that do not say. Raises DataError for what cannot be read."""
    if TAG not in tags:
        return None
    try:
        raw = json.loads(tags[TAG]).get(str(percent))
        return None if raw is None else FootprintGap(*(np.asarray(raw[k], float) for k in ("map_m", "gap_m")))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError("the map's footprint gap cannot be read", where=TAG) from error


def _discs(chip: Scored, percent: int) -> tuple[np.ndarray, np.ndarray]:
    """Percentiles of map and lidar over 25 m discs on an even lattice of a tile, (n,) each."""
    reach = int(np.ceil(_RADIUS_M))
    steps = np.arange(-reach, reach) + 0.5
    disc = steps[:, None] ** 2 + steps[None, :] ** 2 <= _RADIUS_M**2
    known = chip.known
    pairs = []
    for row in range(reach, known.shape[0] - reach + 1, _STEP_M):
        for col in range(reach, known.shape[1] - reach + 1, _STEP_M):
            place = slice(row - reach, row + reach), slice(col - reach, col + reach)
            inside = disc & known[place]
            if inside.sum() >= _LEAST_KNOWN * disc.sum():
                pairs.append(
                    [np.percentile(v[place][inside], percent) for v in (chip.height_m, chip.truth_m)]
                )
    found = np.array(pairs, np.float64).reshape(-1, 2)
    return found[:, 0], found[:, 1]


_VERIFIED = (0.5, 0.8, 0.9, 0.95)
_Way = tuple[IntervalTable, list[Scored], list[Scored]]


def calibrate_model(
    model: str | Path,
    data: str | Path,
    out: str | Path,
    *,
    method: str | None = None,
    kept_from: Sequence[str | Path] = (),
    splits: Sequence[str] = ("val",),
    report_splits: Sequence[str] = ("test", "test_hard"),
    domain_split: str | None = "train",
    overwrite: bool = False,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Calibrate a model's intervals on held-out chips and write the model with the calibration in its card.

    The chips of `splits` are dealt into two halves by site; a calibration of each is verified on the other,
    so that every block is scored once by a calibration that has not seen it. The one that is stored uses
    both halves. `report_splits` are only reported.

    Args:
        model: an embedded name or a file.
        data: a data pack, a chips folder or a chips file.
        out: the file to write; may be the model itself with `overwrite`.
        method: where the width of bands comes from, one of `METHODS`; by default the model's present one.
        kept_from: models of the same training that were kept from some sites of the data: they tell how much
            wider bands must be in new places (`canopy.calibration.intervals`). Without any, what the model's
            card says of new places stays, which another method cannot use.
        domain_split: its images become the reference of the quality flag "out of domain", if the model was
            trained on them or has no reference yet; None skips it.

    Returns:
        The report, JSON-ready; it is also in the card under "intervals" -> "facts". `seen_in_training` is the
        number of chips that the model was trained on, None where its card does not say.

    Raises:
        InputError: bad names, data or model; nothing was written.
    """
    from canopy.models.checkpoint import load_model

    source, target = resolve_model(model), _check_out(Path(out), overwrite)
    network = load_model(source)
    check_gsd(network, source)
    before = network.card.get(INTERVAL_KEY, {})
    method = check_method(method or before.get("method", "spread"))
    _check_change(before, method, kept_from)
    chips, identity = load_chips(data, splits)
    places, seen = _places(data, chips), _seen_in_training(network, chips)
    scored = list(predict_chips(network, chips, method=method, progress=progress))
    log.info(f"{len(scored)} chips predicted")
    ways = _both_ways(scored, method)
    table, facts = _fit(scored, ways, method)
    facts |= {
        "version": __version__, "data": identity, "splits": list(splits), "block_m": BLOCK_M,
        "chips": len(scored), "seen_in_training": seen,
        "model_sha256": file_sha256(source), "tensors_sha256": tensors_sha256(source),
    }  # fmt: skip
    raw = table.to_dict()
    area = _areas(scored, table, ways, facts)
    raw |= {"area": area.to_dict()} if area is not None else {}
    raw |= _new_place(data, places, kept_from, before, method, facts, progress)
    facts["elsewhere"] = _elsewhere(network, data, report_splits, raw, progress)
    additions: dict[str, Any] = {INTERVAL_KEY: raw | {"facts": facts}, CARD_KEY: gaps_to_dict(scored)}
    if domain_split is not None:
        additions |= _domain(network, data, domain_split, splits)
    sha256 = rewrite_card(source, target, additions)
    return {"model": str(model), "output": str(target), "sha256": sha256, **facts}


def check_method(method: str) -> str:
    """One of `METHODS`; ConfigError for anything else."""
    if method not in METHODS:
        raise ConfigError(f"unknown method {method!r}", where="--method", expected=", ".join(METHODS))
    return method


def _check_change(before: dict[str, Any], method: str, kept_from: Sequence[str | Path]) -> None:
    """Refuse a method that would lose the bands of new places: seen ones are too narrow there."""
    present = before.get("method", "spread")
    if "new_place" in before and method != present and not kept_from:
        raise ConfigError(
            f"the model's bands of new places are those of {present}", where=f"--method {method}",
            remedy=f"keep --method {present}, or give models that were kept from places with --kept-from",
        )  # fmt: skip


def _places(data: str | Path, chips: Sequence[Chip]) -> list[tuple[float, float]]:
    """Where the chips lie: (lon, lat) to about a kilometre, each once."""
    where = places_of(data)
    found = (where[chip.row.id] for chip in chips if chip.row.id in where)
    return sorted({(round(lon, 2), round(lat, 2)) for lon, lat in found})


def _seen_in_training(network: HeightModel, chips: Sequence[Chip]) -> int | None:
    """How many of the chips the model was trained on, with a warning; None where its card does not say."""
    seen = trained_on(network.card, [chip.row for chip in chips])
    if seen:
        log.warning(
            f"warning: the model was trained on {len(seen)} of these {len(chips)} chips, so its bands will "
            "be too narrow elsewhere: calibrate on chips that it has not seen (--data, --splits), or take "
            "the calibration of a sibling that has not seen them (docs/uncertainty.md)"
        )
    return None if seen is None else len(seen)


def _new_place(
    data: str | Path, places: list[tuple[float, float]], kept_from: Sequence[str | Path],
    before: dict[str, Any], method: str, facts: dict[str, Any], progress: Progress | None,
) -> dict[str, Any]:  # fmt: skip
    """The card's part about new places, and where this calibration has been; empty where nothing is known."""
    if kept_from:
        unseen = score_unseen(kept_from, data, method, progress)
        new = fit_new_place(unseen)
        area, facts["areas_in_new_places"] = areas_in_new_places(unseen)
        facts["new_places"] = verify_new_place(unseen)
        raw = new.to_dict() | ({"area": area.to_dict()} if area is not None else {})
    elif "new_place" in before:
        raw, told = before["new_place"], before.get("facts", {})
        facts |= {key: told[key] for key in ("new_places", "areas_in_new_places") if key in told}
    else:
        return {}
    if not places:
        log.warning("note: the data do not say where they lie: every map gets the bands of new places")
    return {"new_place": raw, "places": places}


def _fit(scored: list[Scored], ways: list[_Way], method: str) -> tuple[IntervalTable, dict[str, Any]]:
    """The table of all chips, and what tables of the halves do on each other."""
    table = fit_intervals(cells_of(scored), method=method)
    parts: dict[float, list[dict[str, Any]]] = {level: [] for level in _VERIFIED}
    for made, _, two in ways:
        cells = cells_of(two)
        for level in _VERIFIED:
            parts[level].append(coverage(made, cells, level))
    verified = [pooled(tables) for tables in parts.values() if tables]
    return table, {"verified_on_unseen_halves": verified}


def _both_ways(scored: list[Scored], method: str) -> list[_Way]:
    """Each half with its own table, and the other half to verify it on."""
    one, two = halves(scored)
    if min(len(one), len(two)) < 2:
        raise DataError(
            f"{len(scored)} held-out chips", expected="at least 4", remedy="give more with --data"
        )
    return [(fit_intervals(cells_of(a), method=method), a, b) for a, b in ((one, two), (two, one))]


def _areas(scored: list[Scored], table: IntervalTable, ways: list[_Way], facts: dict[str, Any]) -> Any:
    """The area model of all chips, with its coverage on unseen halves; None where tiles are too few."""
    try:
        rows: dict[str, list[dict[str, float]]] = {}
        for made, one, two in ways:
            for size, row in area_coverage(two, made, fit_areas(one, made)).items():
                rows.setdefault(size, []).append(row)
        model = fit_areas(scored, table)
    except DataError as error:
        log.warning(f"note: no intervals for areas: {error}")
        return None
    facts["areas_on_unseen_halves"] = {size: _pool_rows(parts) for size, parts in rows.items()}
    return model


def _pool_rows(parts: list[dict[str, float]]) -> dict[str, float]:
    n = sum(p["n"] for p in parts)
    return {"n": n} | {
        k: round(sum(p[k] * p["n"] for p in parts) / n, 4) for k in ("coverage", "mean_width_m")
    }


def _elsewhere(
    network: Any, data: str | Path, splits: Sequence[str], raw: dict[str, Any], progress: Progress | None
) -> dict[str, Any]:
    """Coverage on splits that play no part in the calibration, with the bands of new places if there are."""
    found: dict[str, Any] = {}
    seen = IntervalTable.from_dict(raw)
    table = table_of({INTERVAL_KEY: raw | {"places": ()}})
    area = (raw["new_place"] if table.place == "new" else raw).get("area")
    for split in splits:
        try:
            chips, _ = load_chips(data, (split,))
        except DataError:
            continue
        scored = list(predict_chips(network, chips, method=table.method, progress=progress))
        cells = cells_of(scored)
        found[split] = coverage(table, cells)
        if table.place == "new":
            found[split]["as_seen"] = coverage(seen, cells)["overall"]
        if area is not None:
            found[split]["areas"] = area_coverage(scored, table, AreaModel.from_dict(area))
    return found


def _domain(network: HeightModel, data: str | Path, split: str, held_out: Sequence[str]) -> dict[str, Any]:
    """The reference of the flag "out of domain".

    Empty, so that the card's own stays, where the model was not trained on these images (lidar of another
    place says nothing of its domain), or where they are too few.
    """
    from canopy.inference.layers import CARD_KEY as QUALITY_KEY

    try:
        inside, _ = load_chips(data, (split,))
        if QUALITY_KEY in network.card and not trained_on(network.card, [chip.row for chip in inside]):
            return {}
        unseen, _ = load_chips(data, held_out)
        return {QUALITY_KEY: fit_domain([c.rgb for c in inside], [c.rgb for c in unseen])}
    except DataError as error:
        log.warning(f"note: the quality flag's domain stays as it was: {error}")
        return {}


def _check_out(out: Path, overwrite: bool) -> Path:
    if out.suffix.lower() != ".safetensors":
        raise InputError("is not a model file's name", where=out, expected="a name ending in .safetensors")
    if out.exists() and not overwrite:
        raise InputError(
            "exists already", where=out, remedy="add --overwrite, or choose another name with -o"
        )
    if not out.absolute().parent.is_dir():
        raise InputError("no such directory", where=out.absolute().parent, remedy="create it first")
    return out


def tensors_sha256(path: Path) -> str:
    """Hash of a model file's tensor bytes, without its header: the same before and after a calibration."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        file.seek(8 + size)
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def rewrite_card(source: Path, target: Path, additions: dict[str, Any]) -> str:
    """Copy a model file with `additions` in its card, tensor bytes untouched; returns the new file's sha256.

    Raises:
        CheckpointError: the source is no model file. OutputError: the target cannot be written.
    """
    header, table = read_header(source)
    card = json.loads(header.get("card", "{}")) | additions
    before = tensors_sha256(source)
    with replacing(target) as part:
        with source.open("rb") as old, part.open("wb") as new:
            size = int.from_bytes(old.read(8), "little")
            old.seek(8 + size)
            new.write(header_bytes({"__metadata__": header | {"card": json.dumps(card)}} | table))
            while block := old.read(1 << 20):
                new.write(block)
        if tensors_sha256(part) != before:
            raise CheckpointError("tensors changed while the file was written", where=target)
        part.chmod(0o644)
    return file_sha256(target)
