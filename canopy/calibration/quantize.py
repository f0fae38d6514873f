"""An int8 network from a model, calibrated on real crops and judged against lidar it was not calibrated on.

Post-training quantisation by NNCF (https://github.com/openvinotoolkit/nncf): weights and activations become
8-bit whole numbers whose scales are measured on the crops. Only the network up to its bin scores is
quantised; heights are made of the scores in fp32, as always.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from canopy.calibration.collect import load_chips, predict_chips
from canopy.chips.store import crop_of
from canopy.errors import InputError
from canopy.inference.backends import Choice, Runner, int8_files, settle, write_network
from canopy.runtime import Progress, log

if TYPE_CHECKING:
    import torch

    from canopy.chips.store import Chip
    from canopy.models.height import HeightModel


# Enough to settle the scales: 64 crops of 384 px, 16 of 768 px.
CALIBRATION_PX = 64 * 384**2
LEAST_CROPS = 8
OUTPUTS = ("height_m", "spread_m")
# What issue and documentation promise of int8: so much worse than fp32 at most, in MAE against lidar.
MOST_LOSS_M = 0.05


def quantize(
    model: HeightModel,
    data: str | Path,
    out: Path | None = None,
    *,
    crops: int | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Make the int8 network of a model and measure what it costs.

    Args:
        model: of `load_model`.
        data: a chips folder; `train` calibrates, `val` judges.
        out: the file to write; by default in the cache, where `--precision int8` looks for it.
        crops: how many to calibrate on, spread evenly over the training chips; by default by their size.

    Returns:
        JSON-ready: the file, and the facts in its card.

    Raises:
        InputError: OpenVINO or NNCF is missing, or the data lacks a split; a file that exists.
    """
    _check_nncf()
    from canopy.models.export import to_int8

    choice = settle(model, "openvino", "fp32", "cpu")
    path = out if out is not None else int8_files(model, choice)[-1]
    if path.exists() and out is not None and not overwrite:
        raise InputError("exists", where=path, remedy="add --overwrite, or choose another name")
    train, identity = load_chips(data, ("train",))
    judges, _ = load_chips(data, ("val",))
    side = model.config.crop_px
    given = calibration_crops(train, side, crops or max(LEAST_CROPS, CALIBRATION_PX // side**2))
    log.info(f"quantising {choice.name} on {len(given)} crops ...")
    parts = to_int8(choice.network(model), given, model.config.encoder.family != "cnn")
    card: dict[str, Any] = {
        "backend": "openvino", "precision": "int8", "part": "scores", "name": choice.name,
        "weights_sha256": choice.weights_sha256, "model_sha256": model.sha256,
        "crop_px": model.config.crop_px, "runtime": _versions(),
        "calibration": {
            "data_sha256": identity, "crops": len(given),
            "crops_sha256": hashlib.sha256(given.tobytes()).hexdigest(),
        },
    }  # fmt: skip
    write_network(path, parts, card)
    try:
        card["accuracy"] = judge(model, choice, path, judges, progress)
        write_network(path, parts, card)
    except BaseException:
        path.unlink(missing_ok=True)  # one that nobody has judged is not to be used
        raise
    if card["accuracy"]["loss_m"] > MOST_LOSS_M:
        log.warning(
            f"int8 is {card['accuracy']['loss_m']:.3f} m worse than fp32; at most {MOST_LOSS_M} m is usual"
        )
    return {"output": str(path), **card}


def calibration_crops(chips: Sequence[Chip], side: int, count: int) -> np.ndarray:
    """Crops (n, 3, side, side) float32 from chips evenly spread, always the same ones.

    Holes are filled as in prediction, and so is what a chip lacks for a crop: its image is mirrored.
    """
    picked = np.linspace(0, len(chips) - 1, min(count, len(chips))).round().astype(int)
    made = []
    for number, index in enumerate(picked):
        chip = chips[index]
        _, height, width = chip.rgb.shape
        # Corner after corner, so that all parts of chips come in.
        top = (number % 2) * max(0, height - side)
        left = (number // 2 % 2) * max(0, width - side)
        if chip.image_valid[top : top + side, left : left + side].any():
            made.append(crop_of(chip, top, left, side))
    return np.stack(made)


def judge(
    model: HeightModel, choice: Choice, path: Path, chips: Sequence[Chip], progress: Progress | None = None
) -> dict[str, Any]:
    """fp32 and int8 against the chips' lidar, at 1 m: MAE and bias of each, and how far they are apart."""
    int8 = replace(choice, precision="int8", quantised=path)
    runs = [_Carried(c.open(model, OUTPUTS), model) for c in (choice, int8)]
    scored = [list(predict_chips(run, chips, progress=progress)) for run in runs]  # type: ignore[arg-type]
    known = [chip.known for chip in scored[0]]
    truth = np.concatenate([c.truth_m[k] for c, k in zip(scored[0], known, strict=True)])
    fp, q = (np.concatenate([c.height_m[k] for c, k in zip(s, known, strict=True)]) for s in scored)
    table = {
        name: {
            "mae_m": round(float(np.abs(h - truth).mean()), 4),
            "bias_m": round(float((h - truth).mean()), 4),
        }
        for name, h in (("fp32", fp), ("int8", q))
    }
    apart = np.abs(q - fp)
    return {
        "cells": len(truth), "chips": len(chips), "split": "val", **table,
        "loss_m": round(table["int8"]["mae_m"] - table["fp32"]["mae_m"], 4),
        "mean_difference_m": round(float(apart.mean()), 4),
        "p99_difference_m": round(float(np.percentile(apart, 99)), 4),
    }  # fmt: skip


class _Carried:
    """A runner where `predict_chips` expects a model."""

    def __init__(self, runner: Runner, model: HeightModel) -> None:
        self._runner, self.config = runner, model.config

    def eval(self) -> _Carried:
        return self

    def layers(self, rgb: torch.Tensor, outputs: tuple[str, ...]) -> torch.Tensor:
        from canopy.models.height import pad_to_multiple

        # Chips may be smaller than a crop, and converted networks take crops alone.
        rows, cols = rgb.shape[-2:]
        crops = pad_to_multiple(rgb, self.config.crop_px).contiguous()
        return self._runner.forward(crops)[..., :rows, :cols]


def _check_nncf() -> None:
    import importlib.util

    if importlib.util.find_spec("nncf") is None:
        raise InputError(
            "NNCF is not installed",
            where="canopy models quantize",
            remedy="pip install 'canopy-height[export]'",
        )


def _versions() -> dict[str, str]:
    from importlib.metadata import version

    return {package: version(package) for package in ("openvino", "nncf")}
