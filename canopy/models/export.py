"""A height model's network in OpenVINO's form, and in int8 by NNCF.

What is converted is the network from crops of one fixed size to bin scores, which is nearly all of the work.
Heights and spreads are made of the scores by the model itself (`HeightModel.layers_of`), in fp32.
"""

from __future__ import annotations

import contextlib
import copy
import io
import logging
import sys
import tempfile
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from canopy.errors import CanopyError
from canopy.models.height import HeightModel
from canopy.runtime import load_openvino, openvino_core

# The bin scores decide the heights and cost 1 % of the work: their layer stays as it is in int8.
_LAST_LAYER = r".*decoder\.head\.conv3.*"


class ConversionError(CanopyError):
    """A runtime cannot take a model over."""


class _Scores(nn.Module):
    """Crops (1, 3, side, side) in 0..1 -> bin scores (1, bins, h, w), as `HeightModel` has them inside."""

    def __init__(self, model: HeightModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, rgb: Tensor) -> Tensor:
        return self.model.scores(rgb)[0]


def to_openvino(model: HeightModel) -> dict[str, bytes]:
    """The network as OpenVINO's files model.xml and model.bin, weights in fp32.

    Raises:
        ConversionError: OpenVINO cannot.
    """
    openvino, side = load_openvino(), model.config.crop_px
    # A copy, which leaves radiometry to the model; any image does to trace it.
    own = copy.deepcopy(model).cpu().eval().with_radiometry(None)
    given = torch.linspace(0, 1, 3 * side * side).view(1, 3, side, side)
    try:
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            traced = torch.jit.trace(_Scores(own).eval(), given, check_trace=False)
            converted = openvino.convert_model(traced, example_input=given, input=list(given.shape))
    except Exception as error:  # its front end has no base class of its own
        line = " ".join(str(error).split())
        raise ConversionError(
            f"OpenVINO cannot convert the model ({line[:160]})", remedy="use --backend torch"
        ) from error
    return _files_of(converted)


def _files_of(converted: Any) -> dict[str, bytes]:
    """The bytes of an `openvino.Model`: model.xml and model.bin."""
    with tempfile.TemporaryDirectory(prefix="canopy-") as folder:
        path = Path(folder) / "model.xml"
        load_openvino().save_model(converted, path, compress_to_fp16=False)
        return {name: (Path(folder) / name).read_bytes() for name in ("model.xml", "model.bin")}


def to_int8(fp32: Mapping[str, bytes], crops: np.ndarray, transformer: bool) -> dict[str, bytes]:
    """The network of `to_openvino` in int8, by NNCF's post-training quantisation; the same every time.

    Args:
        fp32: of `to_openvino`.
        crops: (n, 3, side, side) float32 to measure the scales on.
        transformer: whether the encoder is one.
    """
    # NNCF asks for a CUDA compiler as it is imported.
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
    load_openvino()
    import nncf

    nncf.set_log_level(logging.ERROR)
    network = openvino_core().read_model(model=fp32["model.xml"], weights=fp32["model.bin"])
    # Its bars go to stdout, which is for results.
    verbose = sys.stderr.isatty() and logging.getLogger("canopy").isEnabledFor(logging.INFO)
    with contextlib.redirect_stdout(sys.stderr if verbose else io.StringIO()):
        quantised = nncf.quantize(
            network,
            nncf.Dataset(list(crops[:, None])),
            preset=nncf.QuantizationPreset.MIXED,
            subset_size=len(crops),
            model_type=nncf.ModelType.TRANSFORMER if transformer else None,
            ignored_scope=nncf.IgnoredScope(patterns=[_LAST_LAYER], validate=False),
        )
    return _files_of(_centred(quantised, network, crops[::2]))


def _centred(quantised: Any, network: Any, crops: np.ndarray) -> Any:
    """The int8 network with the mean of every score moved back to where fp32 has it.

    NNCF does so layer by layer; what is left at the last one would move all heights one way.
    """
    openvino = load_openvino()
    from openvino import opset13

    settings = {
        "INFERENCE_PRECISION_HINT": "f32",
        "NUM_STREAMS": 1,
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
    }
    fp32, int8 = (openvino_core().compile_model(m, "CPU", settings) for m in (network, quantised))
    shifts = [(fp32(c[None])[0] - int8(c[None])[0]).mean(axis=(0, 2, 3), dtype=np.float64) for c in crops]
    shift = np.mean(shifts, axis=0).astype(np.float32).reshape(1, -1, 1, 1)
    moved = opset13.add(quantised.get_results()[0].input_value(0), opset13.constant(shift))
    return openvino.Model([opset13.result(moved)], quantised.get_parameters(), "scores")
