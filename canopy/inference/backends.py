"""Which runtime carries a model, in which precision, on which device; and the runtimes themselves.

`auto` stands for OpenVINO in fp32 on a CPU where it is installed, and for torch in fp32 everywhere else. What
is settled is pinned to a regional run and written into a map's tags, since the last bits depend on it.

A model is converted once per weights, crop size, runtime and version, and kept in the cache as one
uncompressed zip with a card. Several processes may want the same conversion at the same time: one makes it,
the others wait, and a file appears whole or not at all.
"""

from __future__ import annotations

import copy
import hashlib
import importlib.util
import json
import os
import re
import threading
import time
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import filelock
import numpy as np

from canopy.errors import CanopyError, CheckpointError, ConfigError, InputError, OutputError
from canopy.files import replacing
from canopy.runtime import cache_dir, log, openvino_core, pick_device

if TYPE_CHECKING:
    import torch

    from canopy.models.height import HeightModel, Stretch

# Layers a runner may be asked for are those of `HeightModel.layers`; this one every model has.
HEIGHT = "height_m"
BACKENDS = ("auto", "torch", "openvino", "onnx")
PRECISIONS = ("auto", "fp32", "bf16", "int8")
_TITLES = {"openvino": "OpenVINO", "onnx": "ONNX Runtime"}
_PACKAGES = {"openvino": "openvino", "onnx": "onnxruntime"}
# int8 models keep their other operations in fp32.
_HINTS = {"fp32": "f32", "int8": "f32", "bf16": "bf16"}
_FORMAT, _CARD = "canopy-converted", "card.json"
# Raise whenever conversion changes: cached conversions of before are then made anew.
_CONVERSION = 2
_EPOCH = (1980, 1, 1, 0, 0, 0)  # the same content gives the same bytes


class Runner(Protocol):
    """A model that is ready to run on one device in one precision.

    Attributes:
        backend: `torch`, `openvino` or `onnx`.
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

    def forward(self, rgb: torch.Tensor) -> torch.Tensor:
        """(n, 3, crop, crop) in 0..1, finite, on `device` -> (n, len(outputs), crop, crop); both float32."""
        ...

    def with_radiometry(self, stretch: Stretch | None) -> Runner:
        """This runner, its weights shared, for images that are moved by `stretch` first."""
        ...


class TorchRunner:
    """The model itself, eager, on any device that torch has; by default where the model is. See `Runner`."""

    backend = "torch"
    # A batch of one takes other kernels, and its heights differ in the last bits.
    alone = False

    def __init__(
        self,
        model: HeightModel,
        device: torch.device | None = None,
        precision: str = "fp32",
        outputs: tuple[str, ...] = (HEIGHT,),
    ) -> None:
        import torch

        if device is None:
            device = next((t.device for t in model.parameters()), torch.device("cpu"))
        self.model = model.to(device).eval()
        self.device, self.precision, self.outputs = device, precision, outputs
        # A GPU's convolutions are fastest with the channels innermost; on CPUs it makes no difference.
        encoder = getattr(model.config, "encoder", None)
        self._channels_last = device.type == "cuda" and encoder is not None and encoder.family == "cnn"
        if self._channels_last:
            self.model = self.model.to(memory_format=torch.channels_last)

    def forward(self, rgb: torch.Tensor) -> torch.Tensor:
        import torch

        from canopy.models.height import HeightModel

        bf16 = self.precision == "bf16"
        with torch.inference_mode(), torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=bf16):
            if self._channels_last:
                rgb = rgb.contiguous(memory_format=torch.channels_last)
            if isinstance(self.model, HeightModel):
                # Crops are finite; to ask again would make the host wait for a GPU at every batch.
                return self.model.layers(rgb, self.outputs, finite=True).float()
            made = self.model(rgb) if self.outputs == (HEIGHT,) else self.model.layers(rgb, self.outputs)
            return made.float()

    def with_radiometry(self, stretch: Stretch | None) -> TorchRunner:
        other = copy.copy(self)
        other.model = self.model.with_radiometry(stretch)
        return other


class ConvertedRunner:
    """The network in another runtime on this CPU, crop by crop; heights are made by the model. See `Runner`.

    Args:
        scores: one crop (1, 3, side, side) -> bin scores (1, bins, h, w), valid until the next call.
    """

    alone = True

    def __init__(
        self,
        backend: str,
        precision: str,
        model: HeightModel,
        scores: Callable[[np.ndarray], np.ndarray],
        outputs: tuple[str, ...] = (HEIGHT,),
    ) -> None:
        import torch

        self.backend, self.precision, self.outputs = backend, precision, outputs
        self.device = torch.device("cpu")
        self._model, self._scores, self._lock = model, scores, threading.Lock()

    def forward(self, rgb: torch.Tensor) -> torch.Tensor:
        import torch

        side = self._model.config.crop_px
        padded = side + -side % self._model.config.pad_px
        rgb, made = self._model.moved(rgb), []
        with self._lock, torch.inference_mode():
            for crop in rgb.numpy():
                scores = torch.from_numpy(self._scores(np.ascontiguousarray(crop[None])))
                made.append(self._model.layers_of(scores, self.outputs, (padded, padded)))
        return torch.cat(made)[..., :side, :side]

    def with_radiometry(self, stretch: Stretch | None) -> ConvertedRunner:
        other = copy.copy(self)
        other._model = self._model.with_radiometry(stretch)
        return other


def _openvino_scores(files: Mapping[str, bytes], precision: str) -> Callable[[np.ndarray], np.ndarray]:
    """One stream, and torch's number of threads: with another number the last bits may differ."""
    import torch

    hint = _HINTS[precision]
    settings = {
        # Without these two, processors that have bf16 would use it for fp32 models.
        "INFERENCE_PRECISION_HINT": hint,
        "EXECUTION_MODE_HINT": "ACCURACY" if hint == "f32" else "PERFORMANCE",
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        "NUM_STREAMS": 1,
        # Several workers would all be pinned to the same cores.
        "ENABLE_CPU_PINNING": False,
    }
    model = openvino_core().read_model(model=files["model.xml"], weights=files["model.bin"])
    request = openvino_core().compile_model(model, "CPU", settings).create_infer_request()

    def scores(crop: np.ndarray) -> np.ndarray:
        request.infer({0: crop}, share_inputs=True)
        return request.get_output_tensor().data

    return scores


def _onnx_scores(files: Mapping[str, bytes]) -> Callable[[np.ndarray], np.ndarray]:
    import onnxruntime
    import torch

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.inter_op_num_threads = 1
    options.use_deterministic_compute = True
    options.log_severity_level = 3
    providers = ["CPUExecutionProvider"]
    session = onnxruntime.InferenceSession(files["model.onnx"], options, providers=providers)
    return lambda crop: session.run(None, {"rgb": crop})[0]


# ---- what is used -----------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Choice:
    """What was settled.

    Attributes:
        backend: torch, openvino or onnx.
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
        if self.backend == "torch":
            device = pick_device(self.device)
            if self.precision == "bf16":
                check_bf16(device)
            return TorchRunner(model, device, self.precision, outputs)
        files = self.network(model)
        scores = _onnx_scores(files) if self.backend == "onnx" else _openvino_scores(files, self.precision)
        return ConvertedRunner(self.backend, self.precision, model, scores, outputs)

    def network(self, model: HeightModel) -> Mapping[str, bytes]:
        """The converted network's files: int8 from its zip, others from the cache or made now.

        bf16 is made of the fp32 conversion when it is opened.
        """
        if self.quantised is not None:
            return read_network(self.quantised)
        facts = {
            "backend": self.backend,
            "conversion": _CONVERSION,
            "runtime": version(_PACKAGES[self.backend]),
            "weights_sha256": self.weights_sha256,
            "crop_px": model.config.crop_px,
        }

        def make() -> Mapping[str, bytes]:
            from canopy.models.export import to_onnx, to_openvino

            return to_onnx(model) if self.backend == "onnx" else to_openvino(model)

        return _cached(self.name, _TITLES[self.backend], facts, make)


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
    from canopy.models.height import HeightModel

    _check_names(backend, precision)
    device = str(device)
    chosen = _backend(model, backend, precision, device)
    kind = "fp32" if precision == "auto" else precision
    if chosen == "torch":
        return Choice("torch", kind, device)
    if not isinstance(model, HeightModel):
        raise ConfigError(
            f"a {type(model).__name__} cannot be converted", where=f"--backend {chosen}",
            expected="a HeightModel", remedy="use --backend torch",
        )  # fmt: skip
    _check_runtime(chosen, kind, device)
    from canopy.models.checkpoint import weights_sha256

    name = re.sub(r"[^\w.-]+", "-", str(model.card.get("name") or "model"))[:40]
    choice = Choice(chosen, kind, "cpu", name, weights_sha256(model))
    if kind == "int8":
        return _with_int8(choice, model)
    try:
        choice.network(model)
    except CanopyError as error:
        if backend != "auto":
            raise
        return Choice("torch", kind, device, notes=(f"{error.what}; torch is used instead",))
    return choice


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
    from canopy.models.height import HeightModel

    if backend != "auto":
        return backend
    if precision == "int8":
        return "openvino"
    # A machine without the card that is named may still settle what others will run.
    on_cpu = pick_device(device).type == "cpu" if device == "auto" else device.startswith("cpu")
    # Models that came from no file would be converted for a single use.
    saved = isinstance(model, HeightModel) and model.sha256 is not None
    return "openvino" if on_cpu and _installed("openvino") and saved else "torch"


def _installed(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


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


def _with_int8(choice: Choice, model: HeightModel) -> Choice:
    """The choice with the int8 network of a model: beside its file, or in the cache.

    Raises:
        ConfigError: there is none; it says how to make one.
    """
    for path in int8_files(model, choice):
        if not path.is_file():
            continue
        card = read_card(path)
        if card["weights_sha256"] != choice.weights_sha256 or card["crop_px"] != model.config.crop_px:
            log.warning(f"{path}: was made of other weights, and is not used")
            continue
        digest = hashlib.sha256(json.dumps(card["files"], sort_keys=True).encode()).hexdigest()
        return replace(choice, quantised=path, quantised_sha256=digest)
    raise ConfigError(
        f"{choice.name} has no int8 network yet", where="--precision int8",
        remedy="make one: canopy models quantize MODEL --data CHIPS",
    )  # fmt: skip


def int8_files(model: HeightModel, choice: Choice) -> list[Path]:
    """Where a model's int8 network may lie: beside its file, then in the cache."""
    beside = [model.path.with_suffix(".int8.zip")] if model.path is not None else []
    return [*beside, cache_dir() / "backends" / f"{choice.name}-int8-{choice.weights_sha256[:24]}.zip"]


def check_bf16(device: torch.device) -> None:
    """Refuse bf16 on a device that would emulate it, which is slower than fp32.

    Raises:
        InputError: a device without bf16 units.
    """
    import torch

    able = False
    if device.type == "cuda":
        able = torch.cuda.is_bf16_supported(including_emulation=False)
    elif device.type == "cpu":
        known = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else None
        names = ("avx512_bf16", "amx_bf16", "bf16")
        able = any(map(known.get, names)) if known else torch.cpu._is_avx512_bf16_supported()
    if not able:
        raise InputError(
            f"bf16 is not supported on {device}",
            where="--precision bf16",
            remedy="use --precision auto or fp32",
        )


# ---- converted networks on disk ---------------------------------------------------------------------------
def write_network(path: Path, files: Mapping[str, bytes], card: Mapping[str, Any]) -> None:
    """Write a converted network and its card as one zip, whole or not at all.

    Raises:
        OutputError: the file cannot be written.
    """
    hashes = {name: hashlib.sha256(data).hexdigest() for name, data in files.items()}
    told = json.dumps({"format": _FORMAT, **card, "files": hashes}, indent=1).encode()
    with replacing(
        path, "the converted model cannot be written",
        "set CANOPY_CACHE to a folder that can be written, or use --backend torch",
    ) as part:  # fmt: skip
        path.parent.mkdir(parents=True, exist_ok=True)
        with zipfile.ZipFile(part, "w", zipfile.ZIP_STORED) as file:
            for name, data in {_CARD: told, **files}.items():
                file.writestr(zipfile.ZipInfo(name, _EPOCH), data)


def read_card(path: Path) -> dict[str, Any]:
    """The card of a converted network. Raises CheckpointError: it is no such file, or it is damaged."""
    return _read(path, files=False)[0]


def read_network(path: Path) -> dict[str, bytes]:
    """The files of a converted network, every byte checked. Raises CheckpointError, as `read_card`."""
    return _read(path, files=True)[1]


def _read(path: Path, files: bool) -> tuple[dict[str, Any], dict[str, bytes]]:
    try:
        with zipfile.ZipFile(path) as file:
            card = json.loads(file.read(_CARD))
            if not isinstance(card, dict) or card.get("format") != _FORMAT:
                raise CheckpointError("is no converted model", where=path)
            return card, {name: file.read(name) for name in card["files"]} if files else {}
    except (OSError, zipfile.BadZipFile, ValueError, KeyError, NotImplementedError, EOFError) as error:
        raise CheckpointError(f"the converted model cannot be read ({error})", where=path) from error


def _cached(
    name: str, title: str, facts: dict[str, Any], make: Callable[[], Mapping[str, bytes]]
) -> Mapping[str, bytes]:
    """The network with these facts, made now if there is none or only a damaged one.

    Raises:
        OutputError: it cannot be kept. Whatever `make` raises.
    """
    key = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:24]
    path = cache_dir() / "backends" / f"{name}-{facts['backend']}-{key}.zip"
    found = _usable(path)
    if found is not None:
        return found
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if not os.access(path.parent, os.W_OK):
            raise PermissionError(13, "permission denied")
    except OSError as error:
        raise OutputError(
            f"converted models cannot be kept there ({error.strerror})", where=path.parent,
            remedy="set CANOPY_CACHE to a folder that can be written, or use --backend torch",
        ) from error  # fmt: skip
    with filelock.FileLock(f"{path}.lock"):
        found = _usable(path)  # another process may have made it meanwhile
        if found is not None:
            return found
        started = time.perf_counter()
        log.info(f"converting {name} for {title}, once ...")
        files = make()
        write_network(path, files, facts)
        log.info(f"converted in {time.perf_counter() - started:.0f} s, kept in {path.parent}")
        return files


def _usable(path: Path) -> dict[str, bytes] | None:
    if not path.is_file():
        return None
    try:
        return read_network(path)
    except CheckpointError as error:
        log.warning(f"{error}; it is made anew")
        return None
