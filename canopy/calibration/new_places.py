"""How much wider bands must be in places that neither training nor calibration has seen.

Held-out blocks of the training places say nothing about a new place: there the network may be wrong by metres
as a whole. So models of the same training that were kept from some places are asked about these. Their bands,
calibrated on places they know, are stretched about the height by the factor f(h) that makes them hold their
share there, at predicted height h. Places count alike, however many cells they have, and a further place is
imagined that is like the worst of them (after Dunn, Wasserman and Ramdas 2023, "Distribution-free prediction
sets for two-layer hierarchical models", whose further place is wrong everywhere: that guarantee takes nine
places for bands of 90 %).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from canopy.calibration.area import area_coverage, fit_areas
from canopy.calibration.collect import BLOCK_M, Scored, cells_of, check_gsd, load_chips, predict_chips
from canopy.calibration.intervals import coverage, effective_blocks, fit_intervals
from canopy.errors import DataError
from canopy.evaluation.areas import AreaModel
from canopy.models.intervals import FLAT_M, LEVELS, IntervalTable, NewPlace, dense_hats
from canopy.runtime import Progress, log

if TYPE_CHECKING:
    from canopy.chips.store import ChipRow

_KNOTS_M = (0.0, 1.0, 4.0, 9.0, 14.0, 19.0, 24.0, 30.0)
_LEAST_BLOCKS = 8.0
_LEAST_PLACES = 3
_MOST_CHIPS, _LEAST_TILES = 12, 12
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
    def held(self) -> np.ndarray:
        """(levels, knots of height, factors): share of truths inside by `_FACTORS`; NaN with few cells."""
        cells = cells_of(self.chips)
        step = -(-len(cells.truth_m) // _MOST_CELLS)
        h, y, spread, block = (
            v[::step] for v in (cells.height_m, cells.truth_m, cells.spread_m, cells.block)
        )
        weights = dense_hats(np.array(_KNOTS_M), h).T
        found = np.full((len(LEVELS), len(_KNOTS_M), len(_FACTORS)), np.nan)
        for n, level in enumerate(LEVELS):
            lower, upper = self.table.bounds(h, spread, level)
            reach = np.maximum(np.where(y < h, h - lower, upper - h), FLAT_M)
            at = np.searchsorted(_FACTORS, np.abs(y - h) / reach)
            for k, w in enumerate(weights):
                if effective_blocks(w, block) >= _LEAST_BLOCKS:
                    found[n, k] = np.bincount(at, w, len(_FACTORS) + 1)[:-1].cumsum() / w.sum()
        return found


def unseen_places(seen: Sequence[Scored], held: Sequence[Scored]) -> list[Unseen]:
    """The places of `held`, with bands calibrated on `seen`; both predicted by the same model."""
    table = fit_intervals(cells_of(seen))
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
    held = np.stack([place.held for place in places])
    factor = np.ones(held.shape[1:3])
    for n, level in enumerate(LEVELS):
        for k in range(len(_KNOTS_M)):
            curves = held[:, n, k][np.isfinite(held[:, n, k, 0])]
            if len(curves):
                share = (curves.sum(axis=0) + curves.min(axis=0)) / (len(curves) + 1)
                factor[n, k] = _FACTORS[min(int(np.searchsorted(share, level)), len(_FACTORS) - 1)]
            elif k:
                factor[n, k] = factor[n, k - 1]  # no place has such heights
    return NewPlace(np.array(_KNOTS_M), factor)


def verify_new_place(places: Sequence[Unseen], level: float = 0.9) -> dict[str, Any]:
    """What bands made wider by all other places hold in each place, JSON-ready.

    Returns:
        `places`: rows by site, each with n, coverage, below, above, mean_width_m and, as `as_seen`, the
        coverage of the bands for places that calibration has seen; `coverage`: their mean over places.
    """
    rows: dict[str, dict[str, float]] = {}
    for place in places:
        cells, new = cells_of(place.chips), fit_new_place(_others(places, place), least=1)
        as_seen = coverage([(place.table, cells)], level)["overall"]["coverage"]
        rows[place.site] = coverage([(place.table.widened(new), cells)], level)["overall"]
        rows[place.site]["as_seen"] = as_seen
    mean = float(np.mean([row["coverage"] for row in rows.values()]))
    return {"level": level, "places": rows, "coverage": round(mean, 4)}


def areas_in_new_places(places: Sequence[Unseen]) -> tuple[AreaModel | None, dict[str, dict[str, float]]]:
    """The area model of new places, and what it covers in each place when made of the others, by side."""
    if sum(len(place.chips) for place in places) < _LEAST_TILES:
        return None, {}

    def fit(some: Sequence[Unseen], new: NewPlace) -> AreaModel:
        tables = {chip.id: place.table.widened(new) for place in some for chip in place.chips}
        return fit_areas([chip for place in some for chip in place.chips], tables)

    ways = []
    for place in places:
        others = _others(places, place)
        new = fit_new_place(others, least=1)
        ways.append((place.chips, place.table.widened(new), fit(others, new)))
    return fit(places, fit_new_place(places)), area_coverage(ways)


def _others(places: Sequence[Unseen], place: Unseen) -> list[Unseen]:
    return [other for other in places if other.site != place.site]


def score_unseen(
    models: Sequence[str | Path], data: str | Path, progress: Progress | None = None
) -> list[Unseen]:
    """Every place that one of the models was kept from, as that model sees it.

    Bands are calibrated on the val chips of places that the model was trained on; of a place it was kept
    from, a dozen of the train and val chips are predicted.
    """
    from canopy.models.registry import load_model

    chips, _ = load_chips(data, ("train", "val"))
    chips = [chip for chip in chips if chip.row.kind != "synth"]
    found: list[Unseen] = []
    for path in models:
        network = load_model(path)
        check_gsd(network, path)
        sites = kept_from(network.card, [chip.row for chip in chips])
        log.info(f"{Path(path).name} was kept from {'; '.join(sites)}")
        known = [c for c in chips if c.row.split == "val" and c.row.site not in sites]
        held = []
        for site in sites:
            # Chips of a few metres, as plots are, are no place.
            large = [c for c in chips if c.row.site == site and min(c.chm_m.shape) >= BLOCK_M]
            held += large[:: max(1, -(-len(large) // _MOST_CHIPS))]
        seen = list(predict_chips(network, known, progress=progress))
        found += unseen_places(seen, list(predict_chips(network, held)))
    return found


# ---- what a model's card says of its training data --------------------------------------------------------
def trained_on(card: Mapping[str, Any], rows: Sequence[ChipRow]) -> list[ChipRow] | None:
    """Which chips a model's card says it was trained on; None where it does not say."""
    data = card.get("data", {})
    if not data.get("train_ids"):
        return None
    whole, held = set(data["train_ids"]), set(() if data.get("val_seen") else data.get("val_ids", ()))
    # Of a pair that was divided between training and validation, the card names the pair in both.
    return [
        row for row in rows
        if _is_named(row.id, whole) and not (row.split != "train" and _is_named(row.id, held))
    ]  # fmt: skip


def _is_named(chip: str, names: set[str]) -> bool:
    """Whether a chip, or the pair that it is cut from, is among names, or one of them is cut from it.

    A chip's name is that of its pair, `-` and the place and settings it was cut at.
    """
    return chip in names or any(n.startswith(f"{chip}-") or chip.startswith(f"{n}-") for n in names)


def kept_from(card: Mapping[str, Any], rows: Sequence[ChipRow]) -> list[str]:
    """Which sites of the chips a model's card says it was not trained on.

    Raises:
        DataError: the card names no training chips, or chips of every site.
    """
    seen = trained_on(card, rows)
    if seen is None:
        raise DataError("the model does not say which chips it was trained on", where="--kept-from")
    sites = dict.fromkeys(row.site for row in rows if row.site not in {row.site for row in seen})
    if not sites:
        raise DataError(
            "the model was trained on every place of the data", where="--kept-from",
            remedy="train one with data.val_sites",
        )  # fmt: skip
    return list(sites)
