"""A height model's network in other runtimes' forms: OpenVINO, ONNX, and int8 by NNCF.

What is converted is the network from crops of one fixed size to bin scores, which is nearly all of the work.
Heights, spreads and quantiles are made of the scores by the model itself (`HeightModel.layers_of`), in fp32.
"""

from __future__ import annotations

import contextlib
import copy
import io
import logging
import sys
import tempfile
import threading
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from canopy.errors import CanopyError
from canopy.models.height import HeightModel
from canopy.runtime import load_openvino, openvino_core

OPSET = 18
# The bin scores decide the heights and cost 1 % of the work: their layer stays as it is in int8.
_LAST_LAYER = r".*decoder\.head\.conv3.*"
_tracing = threading.Lock()


class ConversionError(CanopyError):
    """A runtime cannot take a model over."""


class Scores(nn.Module):
    """Crops (1, 3, side, side) in 0..1 -> bin scores (1, bins, h, w), as `HeightModel` has them inside."""

    def __init__(self, model: HeightModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, rgb: Tensor) -> Tensor:
        return self.model.scores(rgb)[0]


def network_of(model: HeightModel) -> Scores:
    """The part to convert: a copy on the CPU in eval mode, which leaves radiometry to the model."""
    own = copy.deepcopy(model).cpu().eval().with_radiometry(None)
    if own.config.encoder.family != "cnn":
        _fix_positions(own)
    return Scores(own).eval()


def example(model: HeightModel) -> Tensor:
    """A crop to trace with, (1, 3, side, side): any values do."""
    side = model.config.crop_px
    return torch.linspace(0, 1, 3 * side * side).view(1, 3, side, side)


def to_openvino(model: HeightModel) -> dict[str, bytes]:
    """The network as OpenVINO's files model.xml and model.bin, weights in fp32.

    Raises:
        ConversionError: OpenVINO cannot.
    """
    openvino, given = load_openvino(), example(model)
    try:
        with _traceable():
            traced = torch.jit.trace(network_of(model), given, check_trace=False)
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


def to_onnx(model: HeightModel) -> dict[str, bytes]:
    """The network as model.onnx, from `rgb` to `scores`.

    Raises:
        ConversionError: torch cannot export it, or it is larger than ONNX's single files may be.
    """
    with tempfile.TemporaryDirectory(prefix="canopy-") as folder:
        path = Path(folder) / "model.onnx"
        try:
            # On errors the exporter prints the whole graph.
            with _traceable(), contextlib.redirect_stdout(io.StringIO()):
                torch.onnx.export(
                    network_of(model), (example(model),), path, dynamo=False, opset_version=OPSET,
                    input_names=["rgb"], output_names=["scores"],
                )  # fmt: skip
        except Exception as error:  # the exporter lets its passes' errors through
            line = " ".join(str(error).split())
            raise ConversionError(
                f"the model cannot be exported to ONNX ({line[:160]})", remedy="use --backend torch"
            ) from error
        if len(list(path.parent.iterdir())) > 1:
            raise ConversionError("the model is too large for one ONNX file", remedy="use --backend openvino")
        return {path.name: path.read_bytes()}


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


# ---- tracing --------------------------------------------------------------------------------------------
def _fix_positions(model: HeightModel) -> None:
    """Compute what depends on the crop's size alone: runtimes stumble over resizing position tables."""
    config = model.config
    tokens = (config.crop_px + -config.crop_px % config.pad_px) // config.patch_px
    vit: Any = model.encoder.vit
    if config.encoder.family == "rope":
        vit.rope = _Constant(vit.rope.get_embed(shape=(tokens, tokens)).detach().clone())
        return
    # What the model itself adds to tokens of zeros is its position table at this size.
    with torch.no_grad():
        table = vit._pos_embed(torch.zeros(1, tokens, tokens, config.encoder.dim)).clone()
    prefix, first = [t for t in (vit.cls_token, vit.reg_token) if t is not None], vit.num_prefix_tokens
    if vit.no_embed_class:
        table = table[:, first:]
    else:
        table[:, :first] -= torch.cat([t.detach() for t in prefix], dim=1)
    vit.pos_embed = nn.Parameter(table, requires_grad=False)
    if hasattr(vit.patch_embed, "grid_size"):
        vit.patch_embed.grid_size = (tokens, tokens)


class _Constant(nn.Module):
    """Stands for timm's rotary positions where only one size occurs."""

    def __init__(self, table: Tensor) -> None:
        super().__init__()
        self.register_buffer("table", table)

    def get_embed(self, shape: object = None) -> Tensor | nn.Module:
        return self.table


@contextmanager
def _traceable() -> Iterator[None]:
    """Surroundings in which networks are traced: no gradients, no warnings, rotations all can follow."""
    from timm.layers import pos_embed_sincos as rotary

    with _tracing, torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs, rotary.rot = rotary.rot, _rotate
        try:
            yield
        finally:
            rotary.rot = theirs


def _rotate(x: Tensor) -> Tensor:
    """timm's `rot` of interleaved pairs, (a, b) -> (-b, a), the same bits without strided slices."""
    side = x.shape[-1]
    order = torch.arange(side).view(-1, 2).flip(-1).reshape(-1)
    sign = torch.tensor([-1.0, 1.0], dtype=x.dtype).repeat(side // 2)
    return x.index_select(-1, order.to(x.device)) * sign.to(x.device)
