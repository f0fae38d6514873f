"""`canopy calibrate interval`: give a model file its interval calibration; its tensors stay as they are.

With it goes the reference of the quality flag "out of domain": how training images look, and how far is too
far.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from canopy import __version__
from canopy.calibration.area import area_coverage, fit_areas
from canopy.calibration.collect import (
    BLOCK_M,
    Scored,
    cells_of,
    check_gsd,
    halves,
    load_chips,
    places_of,
    predict_chips,
)
from canopy.calibration.intervals import coverage, fit_intervals
from canopy.calibration.new_places import (
    areas_in_new_places,
    fit_new_place,
    score_unseen,
    trained_on,
    verify_new_place,
)
from canopy.errors import DataError
from canopy.evaluation.areas import AreaModel
from canopy.files import check_output, file_sha256
from canopy.inference.layers import CARD_KEY as DOMAIN_KEY
from canopy.inference.layers import DESCRIPTORS, descriptor
from canopy.models.checkpoint import load_checkpoint, rewrite_card
from canopy.models.intervals import CARD_KEY as INTERVAL_KEY
from canopy.models.intervals import IntervalTable, table_of
from canopy.models.registry import resolve_model
from canopy.runtime import Progress, log

if TYPE_CHECKING:
    from canopy.chips.store import Chip
    from canopy.models.height import HeightModel

_VERIFIED = (0.5, 0.8, 0.9, 0.95)


def calibrate_model(
    model: str | Path,
    data: str | Path,
    out: str | Path,
    *,
    kept_from: Sequence[str | Path] = (),
    splits: Sequence[str] = ("val",),
    report_splits: Sequence[str] = ("test", "test_hard"),
    overwrite: bool = False,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Calibrate a model's intervals on held-out chips and write the model with the calibration in its card.

    The chips of `splits` are dealt into two halves by site; a calibration of each is verified on the other,
    so that every block is scored once by a calibration that has not seen it. The one that is stored uses
    both halves. `report_splits` are only reported.

    Args:
        model: an embedded name or a file.
        data: a chips folder (`canopy data chips`); its train images become the reference of the quality flag
            "out of domain", if the model was trained on them or has no reference yet.
        out: the file to write.
        kept_from: models of the same training that were kept from some sites of the data: they tell how much
            wider bands must be in new places (`canopy.calibration.new_places`). Without any, what the model's
            card says of new places stays.

    Returns:
        The report, JSON-ready; it is also in the card under "intervals" -> "facts". `seen_in_training` is the
        number of chips that the model was trained on, None where its card does not say.

    Raises:
        InputError: bad names, data or model; nothing was written.
    """
    (target,) = check_output(out, [model, data, *kept_from], overwrite=overwrite, suffixes=(".safetensors",))
    source = resolve_model(model)
    network = load_checkpoint(source)
    check_gsd(network, source)
    chips, identity = load_chips(data, splits)
    facts: dict[str, Any] = {
        "version": __version__, "data": identity, "splits": list(splits), "block_m": BLOCK_M,
        "chips": len(chips), "seen_in_training": _seen_in_training(network, chips),
        "model_sha256": file_sha256(source), "tensors_sha256": _tensors_sha256(source),
    }  # fmt: skip
    scored = list(predict_chips(network, chips, progress=progress))
    log.info(f"{len(scored)} chips predicted")
    table = fit_intervals(cells_of(scored))
    raw = table.to_dict() | _verified(scored, table, facts)
    raw |= _new_place(data, chips, kept_from, network.card.get(INTERVAL_KEY, {}), facts, progress)
    facts["elsewhere"] = _elsewhere(network, data, report_splits, raw, progress)
    additions = {INTERVAL_KEY: raw | {"facts": facts}, **_domain(network, data, splits)}
    sha256 = rewrite_card(source, target, additions)
    return {"model": str(model), "output": str(target), "sha256": sha256, **facts}


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


def _tensors_sha256(path: Path) -> str:
    """Hash of a model file's tensor bytes, without its header: the same before and after a calibration."""
    with path.open("rb") as file:
        file.seek(8 + int.from_bytes(file.read(8), "little"))
        return hashlib.file_digest(file, "sha256").hexdigest()


def _verified(scored: list[Scored], table: IntervalTable, facts: dict[str, Any]) -> dict[str, Any]:
    """The area model of all chips, if they are enough; `facts` get what calibrations of the halves do on each
    other."""
    one, two = halves(scored)
    if min(len(one), len(two)) < 2:
        raise DataError(
            f"{len(scored)} held-out chips", expected="at least 4", remedy="give more with --data"
        )
    ways = [(fit_intervals(cells_of(a)), a, b) for a, b in ((one, two), (two, one))]
    cells = [(made, cells_of(b)) for made, _, b in ways]
    facts["verified_on_unseen_halves"] = [coverage(cells, level) for level in _VERIFIED]
    try:
        models = [(b, made, fit_areas(a, made)) for made, a, b in ways]
        area = fit_areas(scored, table)
    except DataError as error:
        log.warning(f"note: no intervals for areas: {error}")
        return {}
    facts["areas_on_unseen_halves"] = area_coverage(models)
    return {"area": area.to_dict()}


def _new_place(
    data: str | Path, chips: Sequence[Chip], kept_from: Sequence[str | Path], before: dict[str, Any],
    facts: dict[str, Any], progress: Progress | None,
) -> dict[str, Any]:  # fmt: skip
    """The card's part about new places, and where this calibration has been; empty where nothing is known."""
    if kept_from:
        unseen = score_unseen(kept_from, data, progress)
        raw = fit_new_place(unseen).to_dict()
        area, facts["areas_in_new_places"] = areas_in_new_places(unseen)
        facts["new_places"] = verify_new_place(unseen)
        raw |= {"area": area.to_dict()} if area is not None else {}
    elif "new_place" in before:
        raw, told = before["new_place"], before.get("facts", {})
        facts |= {key: told[key] for key in ("new_places", "areas_in_new_places") if key in told}
    else:
        return {}
    places = places_of(chips)
    if not places:
        log.warning("note: the data do not say where they lie: every map gets the bands of new places")
    return {"new_place": raw, "places": places}


def _elsewhere(
    network: HeightModel, data: str | Path, splits: Sequence[str], raw: dict[str, Any],
    progress: Progress | None,
) -> dict[str, Any]:  # fmt: skip
    """Coverage on splits that play no part in the calibration, with the bands of new places if there are."""
    found: dict[str, Any] = {}
    table = table_of({INTERVAL_KEY: raw | {"places": ()}})
    area = (raw["new_place"] if table.place == "new" else raw).get("area")
    for split in splits:
        try:
            chips, _ = load_chips(data, (split,))
        except DataError:
            continue
        scored = list(predict_chips(network, chips, progress=progress))
        found[split] = coverage([(table, cells_of(scored))])
        if area is not None:
            found[split]["areas"] = area_coverage([(scored, table, AreaModel.from_dict(area))])
    return found


# ---- the domain -------------------------------------------------------------------------------------------
_CROP_PX, _STEP_PX = 384, 128
_LEAST_SIDE_PX, _LEAST_VALID = 256, 0.9
# A covariance of fifteen numbers from a few hundred overlapping crops: some of the unit matrix steadies it.
_RIDGE = 0.05
_QUANTILE = 0.97


def _domain(network: HeightModel, data: str | Path, held_out: Sequence[str]) -> dict[str, Any]:
    """The reference of the flag "out of domain".

    Empty, so that the card's own stays, where the model was not trained on these images (lidar of another
    place says nothing of its domain), or where they are too few.
    """
    try:
        inside, _ = load_chips(data, ("train",))
        if DOMAIN_KEY in network.card and not trained_on(network.card, [chip.row for chip in inside]):
            return {}
        unseen, _ = load_chips(data, held_out)
        return {DOMAIN_KEY: fit_domain([c.rgb for c in inside], [c.rgb for c in unseen])}
    except DataError as error:
        log.warning(f"note: the quality flag's domain stays as it was: {error}")
        return {}


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
