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

from canopy.calibration.area import AreaModel, area_coverage, fit_areas
from canopy.calibration.collect import (
    BLOCK_M,
    Scored,
    cells_of,
    check_gsd,
    load_chips,
    predict_chips,
)
from canopy.calibration.intervals import coverage, effective_blocks, fit_intervals
from canopy.errors import DataError
from canopy.models.heads import (
    FLAT_M,
    LEVELS,
    IntervalTable,
    NewPlace,
    dense_hats,
)
from canopy.runtime import Progress, log

if TYPE_CHECKING:
    from canopy.chips.store import Chip, ChipRow


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
        h, y, spread, block = (
            v[::step] for v in (cells.height_m, cells.truth_m, cells.spread_m, cells.block)
        )
        weights = dense_hats(np.array(_PLACE_KNOTS_M), h).T
        enough = [effective_blocks(weight, block) >= _LEAST_PLACE_BLOCKS for weight in weights]
        found: list[list[np.ndarray | None]] = []
        for level in LEVELS:
            lower, upper = self.table.bounds(h, spread, level)
            reach = np.maximum(np.where(y < h, h - lower, upper - h), FLAT_M)
            at = np.searchsorted(_FACTORS, np.abs(y - h) / reach)
            mass = [np.bincount(at, w, len(_FACTORS) + 1)[:-1].cumsum() / max(w.sum(), 1e-9) for w in weights]
            found.append([m if ok else None for m, ok in zip(mass, enough, strict=True)])
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
    models: Sequence[str | Path], data: str | Path, progress: Progress | None = None
) -> list[Unseen]:
    """Every place that one of the models was kept from, as that model sees it.

    Bands are calibrated on the val chips of places that the model was trained on; of a place it was kept
    from, up to `MOST_CHIPS` of the train and val chips are predicted.
    """
    from canopy.models.registry import load_model

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
        seen = list(predict_chips(network, known, progress=progress))
        held = [c for site in sites for c in _some([c for c in chips if c.row.site == site])]
        found += unseen_places(seen, list(predict_chips(network, held)))
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
