"""OpenVINO as a process may safely have it: without its telemetry, and with one Core that stays.

A height model in two parts that other runtimes can take over, for crops of one fixed size.

The first part, from crops to bin scores, is nearly all of the work; it is converted once and cached, and may
run in low precision. The second, from scores to metres, depends on what is asked for (heights, spread,
quantiles); it is small, always fp32, and converted anew at every start.

OpenVINO on the CPU, in fp32, bf16, or int8 as quantised beforehand.

ONNX Runtime on the CPU, in fp32.

What a runtime does for a prediction, and torch as the first of them.

Which runtime carries a model, in which precision, on which device: settled once, before any work.

`auto` stands for OpenVINO in fp32 on a CPU where it is installed, and for torch in fp32 everywhere else. What
is settled is pinned to a regional run and written into a map's tags, since the last bits depend on it.

A torch model for batches of one shape: recorded as a CUDA graph, or compiled.

Small networks keep a large GPU waiting for the next kernel: a recorded graph starts all of them at once.
Batches on a GPU are always full (see `Predictor`), so one shape is enough; any other number of crops, and any
failure to record or compile, is run eagerly with the same arithmetic.

Converted models on disk: one uncompressed zip each, with a card that holds the hash of every part.

Conversion takes seconds to minutes, so it is done once per model, crop size, runtime and version. Several
processes may want the same conversion at the same time: one makes it, the others wait, and a file appears
whole or not at all. A file that does not match its own hashes is made anew.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import hashlib
import importlib.util
import io
import json
import logging
import os
import re
import sys
import tempfile
import threading
import time
import warnings
import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from canopy.download import only_one
from canopy.errors import CanopyError, CheckpointError, ConfigError, InputError, OutputError
from canopy.files import replacing
from canopy.models.config import ModelConfig
from canopy.runtime import cache_dir, pick_device
from canopy.runtime import log as log_runtime

if TYPE_CHECKING:
    import torch

    from canopy.models.height import HeightModel, Stretch


_ONE_AT_A_TIME = threading.Lock()


def load_openvino() -> ModuleType:
    """The module `openvino`, kept from sending anything home.

    Importing it, and every conversion, would report to a web analytics service, from processes forked off
    background threads, and leave an identity in the user's home folder. Where its telemetry package cannot be
    imported, openvino and NNCF use stubs of their own that do nothing.
    """
    sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]
    import openvino

    return openvino


def core() -> Any:
    """This process's only `openvino.Core`.

    Each Core's CPU plugin gives the calling thread a signal stack of its own and unmaps it when it is
    destroyed, whichever thread that happens in and whichever stack is in use by then. After two Cores that
    were not destroyed in reverse order, the next signal (Ctrl-C, a child's end) is a segmentation fault.
    """
    with _ONE_AT_A_TIME:
        return _made()


@functools.cache
def _made() -> Any:
    return load_openvino().Core()


# Raise whenever conversion changes: cached conversions of before are then made anew.
CONVERSION = 1
_tracing = threading.Lock()


class ConversionError(CanopyError):
    """A runtime cannot take a model over."""


class ScorePart(nn.Module):
    """Crops (1, 3, side, side) in 0..1 -> bin scores (1, bins, h, w), as `HeightModel` has them inside."""

    def __init__(self, model: HeightModel) -> None:
        super().__init__()
        self.encoder, self.decoder = model.encoder, model.decoder
        self.mean: Tensor
        self.std: Tensor
        self.register_buffer("mean", model.mean)
        self.register_buffer("std", model.std)
        self.pad_px = model.config.pad_px

    def forward(self, rgb: Tensor) -> Tensor:
        from canopy.models.height import pad_to_multiple

        padded = pad_to_multiple(rgb, self.pad_px)
        return self.decoder.scores(self.encoder((padded - self.mean) / self.std))


class LayerPart(nn.Module):
    """Bin scores (1, bins, h, w) -> the layers `outputs` (1, len(outputs), side, side) in metres."""

    def __init__(self, model: HeightModel, outputs: tuple[str, ...]) -> None:
        super().__init__()
        self.model, self.outputs = model, outputs
        self.side = model.config.crop_px
        padded = self.side + -self.side % model.config.pad_px
        self.size = padded, padded

    def forward(self, scores: Tensor) -> Tensor:
        return self.model.layers_of(scores, self.outputs, self.size)[..., : self.side, : self.side]


def parts_of(model: HeightModel, outputs: tuple[str, ...]) -> tuple[ScorePart, LayerPart]:
    """Both parts, on the CPU in eval mode; they share the model's weights and leave the model as it is."""
    cpu = model if next(model.parameters()).device.type == "cpu" else copy.deepcopy(model).cpu()
    shared = {id(t): t for t in [*cpu.parameters(), *cpu.buffers()]}
    own = copy.deepcopy(cpu, shared).eval()  # new modules round the same tensors
    own.stretch = None
    if own.config.encoder.family != "cnn":
        _fix_positions(own)
    return ScorePart(own).eval(), LayerPart(own, outputs).eval()


def example(model: HeightModel) -> Tensor:
    """A crop to trace with, (1, 3, side, side): any values do."""
    side = model.config.crop_px
    return torch.linspace(0, 1, 3 * side * side).view(1, 3, side, side)


def _fix_positions(model: HeightModel) -> None:
    """Compute what depends on the crop's size alone: runtimes stumble over resizing position tables."""
    config = model.config
    tokens = (config.crop_px + -config.crop_px % config.pad_px) // config.patch_px
    vit: Any = model.encoder.vit
    if config.encoder.family == "rope":
        table = vit.rope.get_embed(shape=(tokens, tokens)).detach().clone()
        vit.rope = _Constant(table)
        return
    embedded: list[Tensor] = []
    # What the model itself adds to tokens of zeros is its position table at this size.
    with torch.no_grad():
        blank = torch.zeros(1, tokens, tokens, config.encoder.dim)
        embedded.append(vit._pos_embed(blank))
    prefix, first = [t for t in (vit.cls_token, vit.reg_token) if t is not None], vit.num_prefix_tokens
    table = embedded[0].clone()
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
def tracing() -> Iterator[None]:
    """Surroundings in which parts are traced: no gradients, no tracer warnings, rotations all can follow."""
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


def weights_sha256(model: HeightModel) -> str:
    """Hash of what a model computes: its configuration and every tensor, in float32.

    Not the file's: a model may have been changed since it was loaded, and must not get another's conversion.
    """
    # Only what differs from the defaults: a field that is added later changes nothing of older models.
    told = _differences(model.config.to_dict(), ModelConfig().to_dict())
    digest = hashlib.sha256(json.dumps(told, sort_keys=True).encode())
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name}{tuple(tensor.shape)}{tensor.dtype}".encode())
        digest.update(memoryview(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy()))
    return digest.hexdigest()


def _differences(told: dict[str, Any], usual: dict[str, Any]) -> dict[str, Any]:
    found = {}
    for key, value in told.items():
        if isinstance(value, dict):
            value = _differences(value, usual.get(key) or {})
            if value:
                found[key] = value
        elif key not in usual or value != usual[key]:
            found[key] = value
    return found


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


# Layers a runner may be asked for are those of `HeightModel.layers`; this one every model has.
HEIGHT = "height_m"


class Runner(Protocol):
    """A model that is ready to run on one device in one precision.

    Attributes:
        backend: `torch`, `torch-compiled`, `openvino` or `onnx`.
        precision: `fp32`, `bf16` or `int8`.
        device: where it runs.
        outputs: layers of `HeightModel.layers` it gives, in order; the first is `height_m`.
        alone: whether a crop's layers are the same bytes alone and in company of others.
    """

    backend: str
    precision: str
    device: torch.device
    outputs: tuple[str, ...]
    alone: bool

    def __call__(self, rgb: np.ndarray) -> np.ndarray:
        """(n, 3, crop, crop) float32 in 0..1, finite -> (n, len(outputs), crop, crop) float32."""
        ...

    def with_radiometry(self, stretch: Stretch | None) -> Runner:
        """This runner, its weights shared, for images that are moved by `stretch` first."""
        ...


class TorchRunner:
    """The model itself, eager, on any device that torch has; see `Runner`."""

    backend = "torch"
    # A batch of one takes other kernels, and its heights differ in the last bits.
    alone = False

    def __init__(
        self,
        model: HeightModel,
        device: torch.device,
        precision: str = "fp32",
        outputs: tuple[str, ...] = (HEIGHT,),
    ) -> None:
        self.model = model.to(device).eval()
        self.device, self.precision, self.outputs = device, precision, outputs
        # A GPU's convolutions are fastest with the channels innermost; on CPUs it makes no difference.
        self._channels_last = device.type == "cuda" and _is_cnn(model)
        if self._channels_last:
            import torch

            self.model = self.model.to(memory_format=torch.channels_last)

    def __call__(self, rgb: np.ndarray) -> np.ndarray:
        import torch

        return self.forward(torch.from_numpy(rgb).to(self.device)).cpu().numpy()

    def forward(self, rgb: torch.Tensor) -> torch.Tensor:
        """(n, 3, crop, crop) on `device` -> layers (n, len(outputs), crop, crop) float32, there too."""
        import torch

        bf16 = self.precision == "bf16"
        with torch.inference_mode(), torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=bf16):
            rgb = self.arranged(rgb)
            if self.outputs == (HEIGHT,):
                return self.model(rgb).float()
            return self.model.layers(rgb, self.outputs).float()

    def arranged(self, rgb: torch.Tensor) -> torch.Tensor:
        """The same crops in the memory layout that the network is fastest with."""
        import torch

        return rgb.contiguous(memory_format=torch.channels_last) if self._channels_last else rgb

    def with_radiometry(self, stretch: Stretch | None) -> TorchRunner:
        other = copy.copy(self)
        other.model = self.model.with_radiometry(stretch)
        return other


def _is_cnn(model: HeightModel) -> bool:
    encoder = getattr(model.config, "encoder", None)
    return encoder is not None and encoder.family == "cnn"


COMPILED = "torch-compiled"
BACKENDS = ("auto", "torch", COMPILED, "openvino", "onnx")
PRECISIONS = ("auto", "fp32", "bf16", "int8")
_TITLES = {"openvino": "OpenVINO", "onnx": "ONNX Runtime"}
_PACKAGES = {"openvino": "openvino", "onnx": "onnxruntime"}


@dataclass(frozen=True)
class Choice:
    """What was settled.

    Attributes:
        backend: torch, torch-compiled, openvino or onnx.
        precision: fp32, bf16 or int8.
        device: as asked; `cpu` for openvino and onnx.
        name: of the model, for people.
        weights_sha256: of the model, where it is converted.
        quantised: the file with the int8 network, and the hash of that network.
        notes: what the user should know.
    """

    backend: str = "torch"
    precision: str = "fp32"
    device: str = "auto"
    name: str = "model"
    weights_sha256: str = ""
    quantised: Path | None = None
    quantised_sha256: str = ""
    notes: tuple[str, ...] = ()

    @property
    def names(self) -> dict[str, str]:
        """Backend, precision and device, by these names."""
        return {"backend": self.backend, "precision": self.precision, "device": self.device}

    def open(self, model: HeightModel, outputs: tuple[str, ...] = (HEIGHT,)) -> Runner:
        """The model, ready to run; `outputs` as of `HeightModel.layers`.

        Raises:
            InputError: the device is not here. CanopyError: a conversion that failed.
        """
        if self.backend in ("torch", COMPILED):
            return self._open_torch(model, outputs)
        scores, layers = self.scores(model), self._layers(model, outputs)
        if self.backend == "openvino":
            runner: Runner = OpenVinoRunner(scores.parts, layers.parts, outputs, self.precision)
        else:
            runner = OnnxRunner(scores.parts, layers.parts, outputs)
        return runner.with_radiometry(model.stretch)

    def _open_torch(self, model: HeightModel, outputs: tuple[str, ...]) -> Runner:
        device = pick_device(self.device)
        if self.precision == "bf16":
            check_bf16(device)
        if self.backend == "torch":
            return TorchRunner(model, device, self.precision, outputs)

        runner = StaticRunner(model, device, self.precision, outputs, mode="compile")
        return runner.with_radiometry(model.stretch)

    def scores(self, model: HeightModel) -> Converted:
        """The converted network: int8 from its file, others from the cache or made now."""

        if self.quantised is not None:
            return read_converted(self.quantised)
        return cached(
            self.name,
            self._facts(model, "scores"),
            lambda: self._convert(parts_of(model, (HEIGHT,))[0], example(model)),
            title=_TITLES[self.backend],
        )

    def _layers(self, model: HeightModel, outputs: tuple[str, ...]) -> Converted:

        def make() -> dict[str, bytes]:
            import torch

            network, layers = parts_of(model, outputs)
            with torch.inference_mode():
                shape = network(example(model)).shape
            return self._convert(layers, torch.zeros(shape))

        return cached(self.name, self._facts(model, "layers", outputs), make)

    def _facts(self, model: HeightModel, part: str, outputs: tuple[str, ...] = ()) -> dict[str, Any]:
        """What a conversion depends on. bf16 is made of the fp32 conversion when it is opened."""

        return {
            "backend": self.backend,
            "precision": "fp32",
            "part": part,
            "conversion": CONVERSION,
            "runtime": version(_PACKAGES[self.backend]),
            "weights_sha256": self.weights_sha256,
            "crop_px": model.config.crop_px,
            "outputs": list(outputs),
        }

    def _convert(self, part: torch.nn.Module, given: torch.Tensor) -> dict[str, bytes]:
        if self.backend == "openvino":
            return to_openvino(part, given)

        return to_onnx(part, given)


def settle(
    model: HeightModel,
    backend: str = "auto",
    precision: str = "auto",
    device: str | torch.device = "auto",
) -> Choice:
    """Settle backend, precision and device for a model, and convert it now if that has not been done.

    Raises:
        ConfigError: unknown names, or names that do not go together; int8 without an int8 network.
        InputError: the package is not installed, or the hardware lacks bf16.
        CanopyError: the model cannot be converted, and this backend was asked for by name.
    """
    _check_names(backend, precision)
    device = str(device)
    chosen = _backend(model, backend, precision, device)
    kind = "fp32" if precision == "auto" else precision
    if chosen == "torch":
        return Choice("torch", kind, device)
    _check_model(chosen, model)
    if chosen == COMPILED:
        return Choice(COMPILED, kind, device, _name(model))
    _check_runtime(chosen, kind, device)
    choice = Choice(chosen, kind, "cpu", _name(model))
    try:
        return _converted(choice, model)
    except ConfigError:
        raise
    except CanopyError as error:
        if backend != "auto" or kind == "int8":
            raise
        note = f"{error.what}; torch is used instead"
        return Choice("torch", kind, device, notes=(note,))


def _check_names(backend: str, precision: str) -> None:
    for given, known, option in ((backend, BACKENDS, "backend"), (precision, PRECISIONS, "precision")):
        if given not in known:
            raise ConfigError(
                f"unknown {option} {given!r}", where=f"--{option}", expected=f"one of {', '.join(known)}"
            )
    if precision == "int8" and backend not in ("auto", "openvino"):
        raise ConfigError(
            "int8 runs in OpenVINO alone", where=f"--backend {backend}", remedy="use --backend openvino"
        )
    if precision == "bf16" and backend == "onnx":
        raise ConfigError(
            "ONNX Runtime has no bf16 here",
            where="--precision bf16",
            remedy="use --backend openvino or torch",
        )


def _backend(model: HeightModel, backend: str, precision: str, device: str) -> str:
    """The backend that `auto` stands for; others stand for themselves."""
    if backend != "auto":
        return backend
    if precision == "int8":
        return "openvino"
    # A machine without the card that is named may still settle what others will run.
    on_cpu = pick_device(device).type == "cpu" if device == "auto" else device.startswith("cpu")
    return "openvino" if on_cpu and _installed("openvino") and _is_saved(model) else "torch"


def _is_saved(model: HeightModel) -> bool:
    """Whether it is one of ours that came from a file: others would be converted for a single use."""
    from canopy.models.height import HeightModel

    return isinstance(model, HeightModel) and model.sha256 is not None


def _installed(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


def _check_model(backend: str, model: HeightModel) -> None:
    from canopy.models.height import HeightModel

    if not isinstance(model, HeightModel):
        raise ConfigError(
            f"a {type(model).__name__} cannot be converted", where=f"--backend {backend}",
            expected="a HeightModel", remedy="use --backend torch",
        )  # fmt: skip


def _check_runtime(backend: str, precision: str, device: str) -> None:
    """Raises where a backend that was chosen cannot run at all."""
    title = _TITLES[backend]
    if not _installed(_PACKAGES[backend]):
        raise InputError(
            f"{title} is not installed", where=f"--backend {backend}",
            remedy="pip install 'canopy-height[export]', or use --backend torch",
        )  # fmt: skip
    if device != "auto" and not device.startswith("cpu"):
        raise ConfigError(
            f"{title} runs on the CPU here", where=f"--device {device}", remedy="use --backend torch"
        )
    if precision == "bf16":
        import torch

        check_bf16(torch.device("cpu"))


def _converted(choice: Choice, model: HeightModel) -> Choice:
    """The choice with the hash of the weights, once the conversion is there."""

    choice = replace(choice, weights_sha256=weights_sha256(model))
    if choice.precision == "int8":
        return _with_int8(choice, model)
    choice.scores(model)
    return choice


def _with_int8(choice: Choice, model: HeightModel) -> Choice:
    """The choice with the int8 network of a model: beside its file, or in the cache.

    Raises:
        ConfigError: there is none; it says how to make one.
    """
    import hashlib
    import json

    for path in int8_places(model, choice.weights_sha256):
        if not path.is_file():
            continue
        card = read_card(path)
        if card["weights_sha256"] != choice.weights_sha256 or card["crop_px"] != model.config.crop_px:
            log_runtime.warning(f"{path}: was made of other weights, and is not used")
            continue
        digest = hashlib.sha256(json.dumps(card["files"], sort_keys=True).encode()).hexdigest()
        return replace(choice, quantised=path, quantised_sha256=digest)
    raise ConfigError(
        f"{choice.name} has no int8 network yet", where="--precision int8",
        remedy="make one: canopy models quantize MODEL --data CHIPS",
    )  # fmt: skip


def int8_places(model: HeightModel, digest: str) -> list[Path]:
    """Where a model's int8 network may lie: beside its file, then in the cache."""

    beside = [model.path.with_suffix(".int8.zip")] if model.path is not None else []
    return [*beside, folder() / f"{_name(model)}-int8-{digest[:24]}.zip"]


def _name(model: HeightModel) -> str:
    name = str((getattr(model, "card", None) or {}).get("name") or "model")
    return re.sub(r"[^\w.-]+", "-", name)[:40]


def check_bf16(device: torch.device) -> None:
    """Refuse bf16 on a device that would emulate it, which is slower than fp32.

    Raises:
        InputError: a device without bf16 units.
    """
    import torch

    if device.type == "cuda":
        able = torch.cuda.is_bf16_supported(including_emulation=False)
    elif device.type == "cpu":
        known = partial(torch.cpu.get_capabilities().get) if hasattr(torch.cpu, "get_capabilities") else None
        names = ("avx512_bf16", "amx_bf16", "bf16")
        able = any(known(name) for name in names) if known else torch.cpu._is_avx512_bf16_supported()
    else:
        able = False
    if not able:
        raise InputError(
            f"bf16 is not supported on {device}",
            where="--precision bf16",
            remedy="use --precision auto or fp32",
        )


log = logging.getLogger("canopy")
MODES = ("eager", "graph", "compile")
_WARM_UP = 3  # passes before recording: libraries choose their kernels then


class StaticRunner(TorchRunner):
    """See the module's text. The image is not checked for NaN, which would make the host wait for the device.

    Args:
        mode: `graph` (CUDA only), `compile` (torch.compile, which needs a C compiler), or `eager`.
    """

    def __init__(
        self,
        model: HeightModel,
        device: torch.device,
        precision: str = "fp32",
        outputs: tuple[str, ...] = (HEIGHT,),
        mode: str = "graph",
    ) -> None:
        if mode not in MODES:
            raise ConfigError(f"mode {mode!r}", expected=", ".join(MODES))
        super().__init__(model, device, precision, outputs)

        self.mode = mode if mode != "graph" or device.type == "cuda" else "eager"
        self._scores, self._layers = ScorePart(self.model).eval(), LayerPart(self.model, outputs).eval()
        if self.mode == "compile":
            self.backend = "torch-compiled"
            self._compile()
        self._stretch: tuple[torch.Tensor, torch.Tensor] | None = None
        self._graph: torch.cuda.CUDAGraph | None = None
        self._into: torch.Tensor | None = None
        self._made: torch.Tensor | None = None

    def forward(self, rgb: torch.Tensor) -> torch.Tensor:
        """As `TorchRunner.forward`, for finite images."""
        if self._stretch is not None:
            factor, offset = self._stretch
            rgb = rgb * factor + offset
        if self.mode == "graph" and self._graph is None and self._into is None:
            self._record(rgb)
        if self._graph is None or self._into is None or self._made is None or rgb.shape != self._into.shape:
            return self._eager(rgb)
        self._into.copy_(rgb)
        self._graph.replay()
        return self._made.clone()

    def _eager(self, rgb: torch.Tensor) -> torch.Tensor:
        import torch

        bf16 = self.precision == "bf16"
        with torch.inference_mode(), torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=bf16):
            return self._layers(self._scores(self.arranged(rgb)).float()).float()

    def _record(self, rgb: torch.Tensor) -> None:
        import torch

        self._into = rgb.clone()
        side = torch.cuda.Stream(self.device)
        side.wait_stream(torch.cuda.current_stream(self.device))
        try:
            with torch.cuda.stream(side):
                for _ in range(_WARM_UP):
                    self._eager(self._into)
            torch.cuda.current_stream(self.device).wait_stream(side)
            graph = torch.cuda.CUDAGraph()
            # Autocast would keep its copies of the weights in the graph's memory, where the next pass
            # overwrites them.
            with torch.cuda.graph(graph), torch.autocast("cuda", cache_enabled=False, enabled=False):
                self._made = self._eager(self._into)
            self._graph = graph
        except torch.OutOfMemoryError:
            self._into = None
            raise
        except RuntimeError as error:
            log.warning("the network runs kernel by kernel: no CUDA graph (%s)", str(error).split("\n")[0])

    def _compile(self) -> None:
        import torch

        compiled = torch.compile(self._scores, dynamic=False, mode="max-autotune-no-cudagraphs")
        plain = self._scores
        broken = False  # here and not in self: copies with other radiometry share the attempt

        def scores(rgb: torch.Tensor) -> torch.Tensor:
            nonlocal broken
            if broken:
                return plain(rgb)
            try:
                return compiled(rgb)
            except torch.OutOfMemoryError:
                raise
            except Exception as error:  # whatever a compiler may raise
                log.warning("the network is not compiled (%s)", str(error).strip().split("\n")[0][:160])
                broken = True
                return plain(rgb)

        self._scores = scores  # type: ignore[assignment]

    def with_radiometry(self, stretch: Stretch | None) -> StaticRunner:
        import torch

        other = copy.copy(self)
        other._stretch = None
        if stretch is not None:
            factor, offset = (torch.tensor(v, device=self.device) for v in stretch.factors())
            other._stretch = factor.view(1, -1, 1, 1), offset.view(1, -1, 1, 1)
        return other


FORMAT = "canopy-converted"
_CARD = "card.json"
_EPOCH = (1980, 1, 1, 0, 0, 0)  # the same content gives the same bytes


@dataclass(frozen=True)
class Converted:
    """A model in a runtime's own form.

    Attributes:
        parts: the runtime's files by name.
        card: JSON-ready facts: backend, precision, weights_sha256, crop_px, runtime, and of int8 how it was
            calibrated and what it costs.
    """

    parts: Mapping[str, bytes]
    card: dict[str, Any]


def folder() -> Path:
    """Where conversions are kept."""
    return cache_dir() / "backends"


def write_converted(path: Path, converted: Converted) -> None:
    """Write a conversion atomically.

    Raises:
        OutputError: the file cannot be written.
    """
    hashes = {name: hashlib.sha256(data).hexdigest() for name, data in converted.parts.items()}
    card = {"format": FORMAT, **converted.card, "files": hashes}
    with replacing(
        path, "the converted model cannot be written",
        "set CANOPY_CACHE to a folder that can be written, or use --backend torch",
    ) as part:  # fmt: skip
        path.parent.mkdir(parents=True, exist_ok=True)
        with zipfile.ZipFile(part, "w", zipfile.ZIP_STORED) as file:
            for name, data in {_CARD: json.dumps(card, indent=1).encode(), **converted.parts}.items():
                file.writestr(zipfile.ZipInfo(name, _EPOCH), data)


def read_card(path: Path) -> dict[str, Any]:
    """The card of a conversion, without its parts.

    Raises:
        CheckpointError: it is no such file, or it is damaged.
    """
    return _read(path, whole=False).card


def read_converted(path: Path) -> Converted:
    """A conversion, every byte checked.

    Raises:
        CheckpointError: it is no such file, or it is damaged.
    """
    return _read(path, whole=True)


def _read(path: Path, whole: bool) -> Converted:
    try:
        with zipfile.ZipFile(path) as file:
            card = json.loads(file.read(_CARD))
            if not isinstance(card, dict) or card.get("format") != FORMAT:
                raise CheckpointError("is no converted model", where=path)
            parts = {name: file.read(name) for name in card["files"]} if whole else {}
    except (OSError, zipfile.BadZipFile, ValueError, KeyError, NotImplementedError, EOFError) as error:
        raise CheckpointError(f"the converted model cannot be read ({error})", where=path) from error
    for name, data in parts.items():
        if hashlib.sha256(data).hexdigest() != card["files"][name]:
            raise CheckpointError(f"the converted model is damaged in {name}", where=path)
    return Converted(parts, card)


def entry_path(name: str, facts: Mapping[str, Any]) -> Path:
    """The cache's file for a conversion with these facts (among them `backend`, `precision`, `part`)."""
    key = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:24]
    clean = "".join(c if c.isalnum() or c in "-_." else "-" for c in name)[:40]
    return folder() / f"{clean}-{facts['backend']}-{facts['precision']}-{facts['part']}-{key}.zip"


def cached(
    name: str, facts: Mapping[str, Any], make: Callable[[], Mapping[str, bytes]], *, title: str | None = None
) -> Converted:
    """The conversion with these facts, made now if there is none or only a damaged one.

    Args:
        name: of the model, for people.
        facts: what it depends on, JSON-ready; with `backend`, `precision` and `part`.
        make: converts.
        title: of the runtime; with it, the user is told that a conversion is made and what it took.

    Raises:
        OutputError: it cannot be written. Whatever `make` raises.
    """
    path = entry_path(name, facts)
    found = _usable(path)
    if found is not None:
        return found
    _make_folder(path)
    with only_one(path):
        found = _usable(path)  # another process may have made it meanwhile
        if found is not None:
            return found
        started = time.perf_counter()
        if title:
            log_runtime.info(f"converting {name} for {title}, once ...")
        converted = Converted(make(), dict(facts))
        write_converted(path, converted)
        if title:
            seconds = time.perf_counter() - started
            log_runtime.info(f"converted {name} for {title}: {seconds:.0f} s, kept in {path.parent}")
        return converted


def _make_folder(path: Path) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if not os.access(path.parent, os.W_OK):
            raise PermissionError(13, "permission denied")
    except OSError as error:
        raise OutputError(
            f"converted models cannot be kept there ({error.strerror})", where=path.parent,
            remedy="set CANOPY_CACHE to a folder that can be written, or use --backend torch",
        ) from error  # fmt: skip


def _usable(path: Path) -> Converted | None:
    if not path.is_file():
        return None
    try:
        return read_converted(path)
    except CheckpointError as error:
        log_runtime.warning(f"{error}; it is made anew")
        return None
