"""An int8 network from a model, calibrated on real crops and judged against lidar it was not calibrated on.

Post-training quantisation by NNCF (https://github.com/openvinotoolkit/nncf): weights and activations become
8-bit whole numbers whose scales are measured on the crops. Only the network up to its bin scores is
quantised; heights are made of the scores in fp32, as always.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import logging
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from canopy.calibration.collect import load_chips, predict_chips
from canopy.chips.store import crop_of
from canopy.errors import InputError
from canopy.inference.backends import (
    Choice,
    Converted,
    Runner,
    core,
    int8_places,
    load_openvino,
    settle,
    write_converted,
)
from canopy.runtime import Progress, log

if TYPE_CHECKING:
    import torch

    from canopy.chips.store import Chip
    from canopy.models.height import HeightModel


# Enough to settle the scales: 64 crops of 384 px, 16 of 768 px.
CALIBRATION_PX = 64 * 384**2
LEAST_CROPS = 8
# The bin scores decide the heights and cost 1 % of the work: their layer stays as it is.
LAST_LAYER = r".*decoder\.head\.conv3.*"
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
        data: a data pack, a chips folder or a chips file; `train` calibrates, `val` judges.
        out: the file to write; by default in the cache, where `--precision int8` looks for it.
        crops: how many to calibrate on, spread evenly over the training chips; by default by their size.

    Returns:
        JSON-ready: the file, and the facts in its card.

    Raises:
        InputError: OpenVINO or NNCF is missing, or the data lacks a split; a file that exists.
    """
    _check_nncf()
    choice = settle(model, "openvino", "fp32", "cpu")
    path = out if out is not None else int8_places(model, choice.weights_sha256)[-1]
    if path.exists() and out is not None and not overwrite:
        raise InputError("exists", where=path, remedy="add --overwrite, or choose another name")
    train, identity = load_chips(data, ("train",))
    judges, _ = load_chips(data, ("val",))
    side = model.config.crop_px
    given = calibration_crops(train, side, crops or max(LEAST_CROPS, CALIBRATION_PX // side**2))
    log.info(f"quantising {choice.name} on {len(given)} crops ...")
    parts = to_int8(choice, model, given)
    card: dict[str, Any] = {
        "backend": "openvino", "precision": "int8", "part": "scores", "name": choice.name,
        "weights_sha256": choice.weights_sha256, "model_sha256": model.sha256,
        "crop_px": model.config.crop_px, "runtime": _versions(),
        "calibration": {
            "data_sha256": identity, "crops": len(given),
            "crops_sha256": hashlib.sha256(given.tobytes()).hexdigest(),
        },
    }  # fmt: skip
    write_converted(path, Converted(parts, card))
    try:
        card["accuracy"] = judge(model, choice, path, judges, progress)
        write_converted(path, Converted(parts, card))
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


def to_int8(choice: Choice, model: HeightModel, crops: np.ndarray) -> dict[str, bytes]:
    """The int8 network as model.xml and model.bin; the same crops give the same network."""
    # NNCF asks for a CUDA compiler as it is imported.
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
    load_openvino()
    import nncf

    from canopy.inference.backends import files_of

    nncf.set_log_level(logging.ERROR)
    fp32 = choice.scores(model).parts
    network = core().read_model(model=fp32["model.xml"], weights=fp32["model.bin"])
    transformer = model.config.encoder.family != "cnn"
    # Its bars go to stdout, which is for results.
    bars = sys.stderr if sys.stderr.isatty() and log.isEnabledFor(logging.INFO) else io.StringIO()
    with contextlib.redirect_stdout(bars):
        quantised = nncf.quantize(
            network,
            nncf.Dataset(list(crops[:, None])),
            preset=nncf.QuantizationPreset.MIXED,
            subset_size=len(crops),
            model_type=nncf.ModelType.TRANSFORMER if transformer else None,
            ignored_scope=nncf.IgnoredScope(patterns=[LAST_LAYER], validate=False),
        )
    return files_of(_centred(quantised, network, crops[::2]))


def _centred(quantised: Any, network: Any, crops: np.ndarray) -> Any:
    """The int8 network with the mean of every score moved back to where fp32 has it.

    NNCF does so layer by layer; what is left at the last one would move all heights one way.
    """
    openvino = load_openvino()
    import torch
    from openvino import opset13

    told = {
        "INFERENCE_PRECISION_HINT": "f32",
        "NUM_STREAMS": 1,
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
    }
    fp32, int8 = (core().compile_model(m, "CPU", told) for m in (network, quantised))
    shifts = [(fp32(c[None])[0] - int8(c[None])[0]).mean(axis=(0, 2, 3), dtype=np.float64) for c in crops]
    shift = np.mean(shifts, axis=0).astype(np.float32).reshape(1, -1, 1, 1)
    moved = opset13.add(quantised.get_results()[0].input_value(0), opset13.constant(shift))
    return openvino.Model([opset13.result(moved)], quantised.get_parameters(), "scores")


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
        import torch

        from canopy.models.height import pad_to_multiple

        # Chips may be smaller than a crop, and converted networks take crops alone.
        rows, cols = rgb.shape[-2:]
        crops = pad_to_multiple(rgb, self.config.crop_px).contiguous()
        return torch.from_numpy(self._runner(crops.numpy())[..., :rows, :cols])


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
