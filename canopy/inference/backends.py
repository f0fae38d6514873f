"""Which runtime carries a model, in which precision, on which device; and the runtimes themselves.

`auto` stands for OpenVINO in fp32 on a CPU where it is installed, and for torch in fp32 everywhere else. What
is settled is pinned to a regional run and written into a map's tags, since the last bits depend on it.

A model is converted once per weights, crop size and version of OpenVINO, and kept in the cache as one
uncompressed zip with a card. Several processes may want the same conversion at the same time: one makes it,
the others wait, and a file appears whole or not at all.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import json
import re
import threading
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import filelock
import numpy as np

from canopy.errors import CanopyError, CheckpointError, ConfigError, InputError
from canopy.files import replacing, told_as_output
from canopy.runtime import cache_dir, log, openvino_core, pick_device

if TYPE_CHECKING:
    import torch

    from canopy.models.config import ModelConfig
    from canopy.models.height import HeightModel

# Layers a runner may be asked for are those of `HeightModel.layers`; this one every model has.
HEIGHT = "height_m"
BACKENDS = ("auto", "torch", "openvino")
PRECISIONS = ("auto", "fp32", "bf16", "int8")
# Reading, blending and writing beside the model: 0.1 s per Mpx mapped on the model's grid, 0.4 where imagery
# is warped; charged for pixels predicted and pixels mapped.
OVERHEAD_S_PER_PX = 0.15e-6
# Floating-point operations per second that networks of this kind reach in fp32: on a processor per thread.
_RATE = {"cpu": 45e9, "mps": 2e12, "cuda": 15e12}
_FASTER = {"fp32": 1.0, "bf16": 2.0, "int8": 3.0, "openvino": 1.3}
_FORMAT, _CARD = "canopy-converted", "card.json"
# Raise whenever conversion changes: cached conversions of before are then made anew.
_CONVERSION = 3
_EPOCH = (1980, 1, 1, 0, 0, 0)  # the same content gives the same bytes
_NO_CACHE = "set CANOPY_CACHE to a folder that can be written, or use --backend torch"


class TorchRunner:
    """The model itself, eager, on any device that torch has; by default where the model is.

    Attributes:
        backend, precision, device: of the runtime, as a map's tags have them.
        model: that it runs.
        outputs: layers of `HeightModel.layers` it gives, in order; the first is `height_m`.
        most_crops: that the device has room for at a time; None until it ran short of memory.
    """

    backend = "torch"
    most_crops: int | None = None

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
        self._channels_last = device.type == "cuda" and model.config.encoder.family == "cnn"
        if self._channels_last:
            self.model = self.model.to(memory_format=torch.channels_last)

    def forward(self, rgb: torch.Tensor) -> torch.Tensor:
        """(n, 3, crop, crop) in 0..1, finite, on `device` -> (n, len(outputs), crop, crop); both float32."""
        import torch

        bf16 = self.precision == "bf16"
        with torch.inference_mode(), torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=bf16):
            if self._channels_last:
                rgb = rgb.contiguous(memory_format=torch.channels_last)
            return self.model.layers(rgb, self.outputs).float()


class OpenVinoRunner:
    """The network in OpenVINO on this CPU, crop by crop; heights are made by the model. See `TorchRunner`.

    Args:
        files: `model.xml` and `model.bin`: one crop (1, 3, side, side) -> bin scores (1, bins, h, w).
    """

    backend = "openvino"
    most_crops: int | None = None

    def __init__(
        self, model: HeightModel, files: Mapping[str, bytes], precision: str, outputs: tuple[str, ...]
    ) -> None:
        import torch

        self.model, self.precision, self.outputs = model, precision, outputs
        self.device, self._lock = torch.device("cpu"), threading.Lock()
        low = precision == "bf16"  # int8 models keep their other operations in fp32
        settings = {
            # Without these two, processors that have bf16 would use it for fp32 models.
            "INFERENCE_PRECISION_HINT": "bf16" if low else "f32",
            "EXECUTION_MODE_HINT": "PERFORMANCE" if low else "ACCURACY",
            # One stream, and torch's number of threads: with another number the last bits may differ.
            "INFERENCE_NUM_THREADS": torch.get_num_threads(),
            "NUM_STREAMS": 1,
            # Several workers would all be pinned to the same cores.
            "ENABLE_CPU_PINNING": False,
        }
        network = openvino_core().read_model(model=files["model.xml"], weights=files["model.bin"])
        self._request = openvino_core().compile_model(network, "CPU", settings).create_infer_request()

    def forward(self, rgb: torch.Tensor) -> torch.Tensor:
        """As `TorchRunner.forward`."""
        import torch

        side = self.model.config.crop_px
        padded = side + -side % self.model.config.pad_px
        rgb, made = self.model.moved(rgb), []
        with self._lock, torch.inference_mode():
            for crop in rgb.numpy():
                self._request.infer({0: np.ascontiguousarray(crop[None])}, share_inputs=True)
                scores = torch.from_numpy(self._request.get_output_tensor().data)
                made.append(self.model.layers_of(scores, self.outputs, (padded, padded)))
        return torch.cat(made)[..., :side, :side]


Runner = TorchRunner | OpenVinoRunner


# ---- what is used -----------------------------------------------------------------------------
@dataclass(frozen=True)
class Choice:
    """What was settled.

    Attributes:
        backend: torch or openvino.
        precision: fp32, bf16 or int8.
        device: as asked; `cpu` for openvino.
        name: of the model, for people.
        weights_sha256: of the model, where it is converted.
        quantised: the file with the int8 network, and the hash of that network.
        notes: what the user should know.
    """

    backend: str
    precision: str
    device: str
    name: str = "model"
    weights_sha256: str = ""
    quantised: Path | None = None
    quantised_sha256: str = ""
    notes: tuple[str, ...] = ()

    def open(self, model: HeightModel, outputs: tuple[str, ...] = (HEIGHT,)) -> Runner:
        """The model, ready to run; `outputs` as of `HeightModel.layers`.

        Raises:
            InputError: the device is not here. CanopyError: a conversion that failed.
        """
        if self.backend == "openvino":
            return OpenVinoRunner(model, self.network(model), self.precision, outputs)
        device = pick_device(self.device)
        if self.precision == "bf16":
            check_bf16(device)
        return TorchRunner(model, device, self.precision, outputs)

    def network(self, model: HeightModel) -> Mapping[str, bytes]:
        """The converted network's files: int8 from its zip, others from the cache or made now.

        bf16 is made of the fp32 conversion when it is opened.

        Raises:
            OutputError: the cache cannot be written. CanopyError: a conversion that failed.
        """
        if self.quantised is not None:
            return read_network(self.quantised)
        facts = {
            "conversion": _CONVERSION,
            "runtime": version("openvino"),
            "weights_sha256": self.weights_sha256,
            "crop_px": model.config.crop_px,
        }
        key = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:24]
        path = cache_dir() / "backends" / f"{self.name}-openvino-{key}.zip"
        with told_as_output(path.parent, "converted models cannot be kept there", _NO_CACHE):
            path.parent.mkdir(parents=True, exist_ok=True)
            with filelock.FileLock(f"{path}.lock"):
                try:
                    return read_network(path)
                except CheckpointError as error:
                    if path.is_file():
                        log.warning(f"{error}; it is made anew")
                from canopy.models.export import to_openvino

                log.info(f"converting {self.name} for OpenVINO, once; kept in {path.parent} ...")
                files = to_openvino(model)
                write_network(path, files, facts)
                return files


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
    for given, known, option in ((backend, BACKENDS, "backend"), (precision, PRECISIONS, "precision")):
        if given not in known:
            raise ConfigError(
                f"unknown {option} {given!r}", where=f"--{option}", expected=f"one of {', '.join(known)}"
            )
    if precision == "int8" and backend == "torch":
        raise ConfigError(
            "int8 runs in OpenVINO alone", where="--backend torch", remedy="use --backend openvino"
        )
    device, kind = str(device), "fp32" if precision == "auto" else precision
    if not _wants_openvino(model, backend, precision, device):
        return Choice("torch", kind, device)
    _check_openvino(kind, device)
    from canopy.models.checkpoint import weights_sha256

    name = re.sub(r"[^\w.-]+", "-", str(model.card.get("name") or "model"))[:40]
    choice = Choice("openvino", kind, "cpu", name, weights_sha256(model))
    if kind == "int8":
        return _with_int8(choice, model)
    try:
        choice.network(model)
    except CanopyError as error:
        if backend != "auto":
            raise
        return Choice("torch", kind, device, notes=(f"{error.what}; torch is used instead",))
    return choice


def _wants_openvino(model: HeightModel, backend: str, precision: str, device: str) -> bool:
    if backend != "auto" or precision == "int8":
        return backend != "torch"
    # A machine without the card that is named may still settle what others will run.
    on_cpu = pick_device(device).type == "cpu" if device == "auto" else device.startswith("cpu")
    # Models that came from no file would be converted for a single use.
    return on_cpu and model.sha256 is not None and importlib.util.find_spec("openvino") is not None


def _check_openvino(precision: str, device: str) -> None:
    """Raises where it was chosen and cannot run at all."""
    if importlib.util.find_spec("openvino") is None:
        raise InputError(
            "OpenVINO is not installed", where="--backend openvino",
            remedy="pip install 'canopy-height[export]', or use --backend torch",
        )  # fmt: skip
    if device != "auto" and not device.startswith("cpu"):
        raise ConfigError(
            "OpenVINO runs on the CPU here", where=f"--device {device}", remedy="use --backend torch"
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
        remedy="make one: canopy models quantize MODEL --data CHIPS; --precision auto needs none",
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
        known: dict[str, bool] = getattr(torch.cpu, "get_capabilities", dict)()
        able = any(map(known.get, ("avx512_bf16", "amx_bf16", "bf16")))
    if not able:
        raise InputError(
            f"bf16 is not supported on {device}",
            where="--precision bf16",
            remedy="use --precision auto or fp32",
        )


# ---- what it will take ------------------------------------------------------------------------
def seconds_per_crop(model: HeightModel, runner: Runner) -> float:
    """About how long a crop takes on a runtime: a guess to within a factor of two.

    No pass of the network is made for it: its arithmetic is counted, and divided by what processors usually
    do.
    """
    import torch

    kind = runner.device.type
    rate = _RATE.get(kind, _RATE["cpu"]) * (torch.get_num_threads() if kind == "cpu" else 1)
    rate *= _FASTER[runner.precision] * _FASTER.get(runner.backend, 1.0)
    return _operations_per_crop(model.config) / rate


@functools.lru_cache(maxsize=8)
def _operations_per_crop(config: ModelConfig) -> float:
    """Floating-point operations from a crop to its bin scores, counted on a model without weights."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    from canopy.models.height import HeightModel

    with torch.device("meta"), torch.no_grad(), FlopCounterMode(display=False) as counter:
        outline = HeightModel(config).eval()
        side = config.crop_px + -config.crop_px % config.pad_px
        outline.decoder(outline.encoder(torch.zeros(1, len(config.bands), side, side)))
    return float(counter.get_total_flops())


# ---- converted networks on disk ---------------------------------------------------------------
def write_network(path: Path, files: Mapping[str, bytes], card: Mapping[str, Any]) -> None:
    """Write a converted network and its card as one zip, whole or not at all.

    Raises:
        OutputError: the file cannot be written.
    """
    hashes = {name: hashlib.sha256(data).hexdigest() for name, data in files.items()}
    told = json.dumps({"format": _FORMAT, **card, "files": hashes}, indent=1).encode()
    with replacing(path, "the converted model cannot be written", _NO_CACHE) as part:
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
