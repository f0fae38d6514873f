"""ONNX Runtime on the CPU, in fp32."""

from __future__ import annotations

import contextlib
import copy
import io
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from canopy.inference.backends.openvino_runner import moved
from canopy.inference.backends.parts import ConversionError, tracing

if TYPE_CHECKING:
    from canopy.models.radiometry import Stretch

OPSET = 18


class OnnxRunner:
    """Both parts of a model in ONNX Runtime, crop by crop; see `runner.Runner`."""

    backend = "onnx"
    precision = "fp32"
    alone = True

    def __init__(
        self, scores: Mapping[str, bytes], layers: Mapping[str, bytes], outputs: tuple[str, ...]
    ) -> None:
        """Open for as many threads as torch has now.

        Args:
            scores, layers: model.onnx of a `ScorePart` and a `LayerPart`.
            outputs: the layers.
        """
        self.outputs = outputs
        self.device = torch.device("cpu")
        self.stretch: Stretch | None = None
        self._scores, self._layers = _session(scores["model.onnx"]), _session(layers["model.onnx"])

    def __call__(self, rgb: np.ndarray) -> np.ndarray:
        made = []
        for crop in moved(rgb, self.stretch):
            scores = self._scores.run(None, {"given": crop[None]})[0]
            made.append(self._layers.run(None, {"given": scores})[0][0])
        return np.stack(made)

    def with_radiometry(self, stretch: Stretch | None) -> OnnxRunner:
        other = copy.copy(self)
        other.stretch = stretch
        return other


def _session(model: bytes) -> Any:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.inter_op_num_threads = 1
    options.use_deterministic_compute = True
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])


def to_onnx(part: torch.nn.Module, example: torch.Tensor) -> dict[str, bytes]:
    """A part as model.onnx, from `given` to `made`, of the example's shape.

    Raises:
        ConversionError: torch cannot export it, or it is larger than ONNX's single files may be.
    """
    with tempfile.TemporaryDirectory(prefix="canopy-") as folder:
        path = Path(folder) / "model.onnx"
        try:
            # On errors the exporter prints the whole graph.
            with tracing(), contextlib.redirect_stdout(io.StringIO()):
                torch.onnx.export(
                    part, (example,), path, dynamo=False, opset_version=OPSET,
                    input_names=["given"], output_names=["made"],
                )  # fmt: skip
        except Exception as error:  # the exporter lets its passes' errors through
            line = " ".join(str(error).split())
            raise ConversionError(
                f"the model cannot be exported to ONNX ({line[:160]})", remedy="use --backend torch"
            ) from error
        if len(list(path.parent.iterdir())) > 1:
            raise ConversionError("the model is too large for one ONNX file", remedy="use --backend openvino")
        return {path.name: path.read_bytes()}
