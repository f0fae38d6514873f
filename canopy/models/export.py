"""A height model's network in OpenVINO's form, and in int8 by NNCF; and all of a model as ONNX, for others.

What OpenVINO gets is the network from crops of one fixed size to bin scores, which is nearly all of the work.
Heights and spreads are made of the scores by the model itself (`HeightModel.layers_of`), in fp32. An ONNX
file is for programs that know nothing of canopy, so it holds normalisation, bins and metres too.
"""

from __future__ import annotations

import contextlib
import copy
import io
import json
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

from canopy.errors import CanopyError, require
from canopy.models.height import HeightModel
from canopy.runtime import load_openvino, openvino_core

# The bin scores decide the heights and cost 1 % of the work: their layer stays as it is in int8.
_LAST_LAYER = r".*decoder\.head\.conv3.*"

_OVERLAP_PERCENT = 38  # what canopy's own lattice has by default: three eighths


class ConversionError(CanopyError):
    """A runtime cannot take a model over."""


class _Scores(nn.Module):
    """Crops (1, 3, side, side) in 0..1 -> bin scores (1, bins, h, w), as `HeightModel` has them inside."""

    def __init__(self, model: HeightModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, rgb: Tensor) -> Tensor:
        return self.model.scores(rgb)[0]


class _Heights(_Scores):
    """Crops (1, 3, side, side) in 0..1 -> metres (1, 1, side, side)."""

    def forward(self, rgb: Tensor) -> Tensor:
        return self.model.layers(rgb, ("height_m",))


def to_onnx(model: HeightModel, *, deepness: bool = False) -> bytes:
    """The whole model as ONNX: `rgb` float32 (1, 3, side, side) in 0..1 -> `height_m`, metres, same pixels.

    The side is the model's crop size: position embeddings are made for one size, and heights at the edge of
    a crop are worse than inside, so whoever runs it has to overlap crops as canopy's lattice does.

    Args:
        deepness: add what the QGIS plugin Deepness reads of a regression model: ground sample distance in
            centimetres, tile size, overlap in percent, and that bands come in 0..1 without standardisation
            (https://qgis-plugin-deepness.readthedocs.io, "Adding metadata to ONNX model").

    Raises:
        ConversionError: a layer that ONNX does not have. MissingDependencyError: without the extra `export`.
    """
    require("ONNX files", "canopy-height[export]", "onnx", "onnxscript")
    import onnx

    config = model.config
    own = copy.deepcopy(model).cpu().eval().with_radiometry(None)
    given = torch.linspace(0, 1, 3 * config.crop_px**2).view(1, 3, config.crop_px, config.crop_px)
    written = _exported(_Heights(own).eval(), given)
    graph = onnx.load_model_from_string(written)
    told: dict[str, Any] = {
        "source": f"canopy {model.card.get('name', '')}".strip(),
        "sha256": model.sha256 or "",
        "licence": model.card.get("licence", "not stated"),
        "gsd_m": config.gsd_m,
    }
    if deepness:
        told |= {
            "model_type": "Regressor",
            "class_names": {0: "canopy_height_m"},
            "resolution": round(100 * config.gsd_m, 4),
            "tile_size": config.crop_px,
            "tiles_overlap": _OVERLAP_PERCENT,
            "standardization_mean": [0.0] * len(config.bands),
            "standardization_std": [1.0] * len(config.bands),
            "reg_output_scaling": 1.0,
        }
    onnx.helper.set_model_props(graph, {key: json.dumps(value) for key, value in told.items()})
    return bytes(graph.SerializeToString())


def _exported(network: nn.Module, given: Tensor) -> bytes:
    """ONNX of a network for inputs like `given`.

    torch's exporter that traces takes seconds, the newer one a minute; but only that one gets through
    interleaved rotary positions and antialiased position tables.

    Raises:
        ConversionError: neither can.
    """
    problem: Exception | None = None
    for newer in (False, True):
        options: dict[str, Any] = {"verbose": False} if newer else {"opset_version": 17}
        # Either prints the whole graph where it fails.
        with (
            tempfile.TemporaryDirectory(prefix="canopy-") as folder,
            contextlib.redirect_stdout(io.StringIO()),
        ):
            path = Path(folder) / "model.onnx"
            try:
                with torch.no_grad(), warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    torch.onnx.export(
                        network, (given,), path, dynamo=newer, external_data=False,
                        input_names=["rgb"], output_names=["height_m"], **options,
                    )  # fmt: skip
                return path.read_bytes()
            except Exception as error:  # they have no base class of their own
                problem = error
    line = " ".join(str(problem).split())
    raise ConversionError(f"ONNX cannot hold the model ({line[:160]})") from problem


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
