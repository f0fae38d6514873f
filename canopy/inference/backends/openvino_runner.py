"""OpenVINO on the CPU, in fp32, bf16, or int8 as quantised beforehand."""

from __future__ import annotations

import copy
import tempfile
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from canopy.inference.backends.openvino_core import core, load_openvino
from canopy.inference.backends.parts import ConversionError, tracing

if TYPE_CHECKING:
    from canopy.models.radiometry import Stretch

# int8 models keep their other operations in fp32.
_HINT = {"fp32": "f32", "int8": "f32", "bf16": "bf16"}


class OpenVinoRunner:
    """Both parts of a model, compiled for this CPU; crop by crop. See `runner.Runner`."""

    backend = "openvino"
    alone = True

    def __init__(
        self,
        scores: Mapping[str, bytes],
        layers: Mapping[str, bytes],
        outputs: tuple[str, ...],
        precision: str = "fp32",
    ) -> None:
        """Compile for as many threads as torch has now.

        Args:
            scores, layers: model.xml and model.bin of a `ScorePart` and a `LayerPart`.
            outputs: the layers.
            precision: fp32, bf16 or int8, of the first part.
        """
        self.precision, self.outputs = precision, outputs
        self.device = torch.device("cpu")
        self.stretch: Stretch | None = None
        self._scores = _compile(scores, _HINT[precision]).create_infer_request()
        self._layers = _compile(layers, "f32").create_infer_request()
        self._layers.set_input_tensor(self._scores.get_output_tensor())
        self._lock = threading.Lock()

    def __call__(self, rgb: np.ndarray) -> np.ndarray:
        rgb = moved(rgb, self.stretch)
        made = []
        with self._lock:
            for crop in rgb:
                self._scores.infer({0: crop[None]}, share_inputs=True)
                self._layers.infer()
                made.append(self._layers.get_output_tensor().data[0].copy())
        return np.stack(made)

    def with_radiometry(self, stretch: Stretch | None) -> OpenVinoRunner:
        other = copy.copy(self)
        other.stretch = stretch
        return other


def moved(rgb: np.ndarray, stretch: Stretch | None) -> np.ndarray:
    """Crops (n, 3, h, w) with their radiometry moved, as `HeightModel` does it; contiguous float32."""
    if stretch is not None:
        factor, offset = (np.asarray(v, np.float32).reshape(1, -1, 1, 1) for v in stretch.factors())
        rgb = rgb * factor + offset
    return np.ascontiguousarray(rgb, np.float32)


def _compile(files: Mapping[str, bytes], hint: str) -> Any:
    """One stream, and torch's number of threads: with another number the last bits may differ."""
    settings = {
        # Without these two, processors that have bf16 would use it for fp32 models.
        "INFERENCE_PRECISION_HINT": hint,
        "EXECUTION_MODE_HINT": "ACCURACY" if hint == "f32" else "PERFORMANCE",
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        "NUM_STREAMS": 1,
        # Several workers would all be pinned to the same cores.
        "ENABLE_CPU_PINNING": False,
    }
    model = core().read_model(model=files["model.xml"], weights=files["model.bin"])
    return core().compile_model(model, "CPU", settings)


def to_openvino(part: torch.nn.Module, example: torch.Tensor) -> dict[str, bytes]:
    """A part as OpenVINO's files model.xml and model.bin, weights in fp32.

    Raises:
        ConversionError: OpenVINO cannot.
    """
    return files_of(convert(part, example))


def convert(part: torch.nn.Module, example: torch.Tensor) -> Any:
    """The part as an `openvino.Model` of the example's shape.

    Raises:
        ConversionError: OpenVINO cannot.
    """
    openvino = load_openvino()
    try:
        with tracing():
            traced = torch.jit.trace(part, example, check_trace=False)
            model = openvino.convert_model(traced, example_input=example, input=list(example.shape))
    except Exception as error:  # its front end has no base class of its own
        line = " ".join(str(error).split())
        raise ConversionError(
            f"OpenVINO cannot convert the model ({line[:160]})", remedy="use --backend torch"
        ) from error
    return model


def files_of(model: Any) -> dict[str, bytes]:
    """The bytes of an `openvino.Model`: model.xml and model.bin."""
    openvino = load_openvino()
    with tempfile.TemporaryDirectory(prefix="canopy-") as folder:
        path = Path(folder) / "model.xml"
        openvino.save_model(model, path, compress_to_fp16=False)
        return {name: (Path(folder) / name).read_bytes() for name in ("model.xml", "model.bin")}
