"""An int8 network from a model, calibrated on real crops and judged against lidar it was not calibrated on.

Post-training quantisation by NNCF (https://github.com/openvinotoolkit/nncf): weights and activations become
8-bit whole numbers whose scales are measured on the crops. Only the network up to its bin scores is
quantised; heights are made of the scores in fp32, as always.
"""

from __future__ import annotations

import hashlib
import importlib.util
from collections.abc import Sequence
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from canopy.calibration.collect import load_chips, predict_chips
from canopy.chips.store import crop_of
from canopy.errors import InputError
from canopy.inference.backends import Choice, int8_files, settle, write_network
from canopy.runtime import Progress, log

if TYPE_CHECKING:
    import torch

    from canopy.chips.store import Chip
    from canopy.models.height import HeightModel

# Enough to settle the scales: 64 crops of 384 px, 16 of 768 px.
_CALIBRATION_PX = 64 * 384**2
_LEAST_CROPS = 8
# What the documentation promises of int8: so much worse than fp32 at most, in MAE against lidar.
_MOST_LOSS_M = 0.05


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
    from canopy.models.export import to_int8

    if importlib.util.find_spec("nncf") is None:
        raise InputError(
            "NNCF is not installed",
            where="canopy models quantize",
            remedy="pip install 'canopy-height[export]'",
        )
    choice = settle(model, "openvino", "fp32", "cpu")
    path = out if out is not None else int8_files(model, choice)[-1]
    if path.exists() and out is not None and not overwrite:
        raise InputError("exists", where=path, remedy="add --overwrite, or choose another name")
    train, identity = load_chips(data, ("train",))
    judges, _ = load_chips(data, ("val",))
    side = model.config.crop_px
    given = calibration_crops(train, side, crops or max(_LEAST_CROPS, _CALIBRATION_PX // side**2))
    log.info(f"quantising {choice.name} on {len(given)} crops ...")
    parts = to_int8(choice.network(model), given, model.config.encoder.family != "cnn")
    card: dict[str, Any] = {
        "backend": "openvino", "precision": "int8", "part": "scores", "name": choice.name,
        "weights_sha256": choice.weights_sha256, "model_sha256": model.sha256,
        "crop_px": side, "runtime": {package: version(package) for package in ("openvino", "nncf")},
        "calibration": {
            "data_sha256": identity, "crops": len(given),
            "crops_sha256": hashlib.sha256(given.tobytes()).hexdigest(),
        },
    }  # fmt: skip
    write_network(path, parts, card)
    try:
        card["accuracy"] = _judge(model, choice, path, judges, progress)
        write_network(path, parts, card)
    except BaseException:
        path.unlink(missing_ok=True)  # one that nobody has judged is not to be used
        raise
    if card["accuracy"]["loss_m"] > _MOST_LOSS_M:
        log.warning(
            f"int8 is {card['accuracy']['loss_m']:.3f} m worse than fp32; at most {_MOST_LOSS_M} m is usual"
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


def _judge(
    model: HeightModel, choice: Choice, path: Path, chips: Sequence[Chip], progress: Progress | None
) -> dict[str, Any]:
    """fp32 and int8 against the chips' lidar, at 1 m: MAE and bias of each, and how far they are apart."""
    from canopy.models.height import pad_to_multiple

    side, heights = model.config.crop_px, {}
    truth = np.zeros(0)
    for name, one in (("fp32", choice), ("int8", replace(choice, precision="int8", quantised=path))):
        runner = one.open(model, ("height_m", "spread_m"))

        def layers(rgb: torch.Tensor) -> torch.Tensor:
            # Chips may be smaller than a crop, and converted networks take crops alone.
            rows, cols = rgb.shape[-2:]
            return runner.forward(pad_to_multiple(rgb, side).contiguous())[..., :rows, :cols]  # noqa: B023

        scored = list(predict_chips(model, chips, layers=layers, progress=progress))
        heights[name] = np.concatenate([chip.height_m[chip.known] for chip in scored])
        truth = np.concatenate([chip.truth_m[chip.known] for chip in scored])
    table = {
        name: {
            "mae_m": round(float(np.abs(h - truth).mean()), 4),
            "bias_m": round(float((h - truth).mean()), 4),
        }
        for name, h in heights.items()
    }
    apart = np.abs(heights["int8"] - heights["fp32"])
    return {
        "cells": len(truth), "chips": len(chips), "split": "val", **table,
        "loss_m": round(table["int8"]["mae_m"] - table["fp32"]["mae_m"], 4),
        "mean_difference_m": round(float(apart.mean()), 4),
        "p99_difference_m": round(float(np.percentile(apart, 99)), 4),
    }  # fmt: skip
