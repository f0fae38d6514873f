"""Which runtime carries a model, in which precision, on which device: settled once, before any work.

`auto` stands for OpenVINO in fp32 on a CPU where it is installed, and for torch in fp32 everywhere else. What
is settled is pinned to a regional run and written into a map's tags, since the last bits depend on it.
"""

from __future__ import annotations

import importlib.util
import re
from dataclasses import dataclass, replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from canopy.errors import CanopyError, ConfigError, InputError
from canopy.inference.backends.runner import HEIGHT, Runner, TorchRunner
from canopy.runtime import log, pick_device

if TYPE_CHECKING:
    import torch

    from canopy.inference.backends.store import Converted
    from canopy.models.height import HeightModel

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
            from canopy.inference.backends.openvino_runner import OpenVinoRunner

            runner: Runner = OpenVinoRunner(scores.parts, layers.parts, outputs, self.precision)
        else:
            from canopy.inference.backends.onnx_runner import OnnxRunner

            runner = OnnxRunner(scores.parts, layers.parts, outputs)
        return runner.with_radiometry(model.stretch)

    def _open_torch(self, model: HeightModel, outputs: tuple[str, ...]) -> Runner:
        device = pick_device(self.device)
        if self.precision == "bf16":
            check_bf16(device)
        if self.backend == "torch":
            return TorchRunner(model, device, self.precision, outputs)
        from canopy.inference.backends.static import StaticRunner

        runner = StaticRunner(model, device, self.precision, outputs, mode="compile")
        return runner.with_radiometry(model.stretch)

    def scores(self, model: HeightModel) -> Converted:
        """The converted network: int8 from its file, others from the cache or made now."""
        from canopy.inference.backends.parts import example, parts_of
        from canopy.inference.backends.store import cached, read_converted

        if self.quantised is not None:
            return read_converted(self.quantised)
        return cached(
            self.name,
            self._facts(model, "scores"),
            lambda: self._convert(parts_of(model, (HEIGHT,))[0], example(model)),
            title=_TITLES[self.backend],
        )

    def _layers(self, model: HeightModel, outputs: tuple[str, ...]) -> Converted:
        from canopy.inference.backends.parts import example, parts_of
        from canopy.inference.backends.store import cached

        def make() -> dict[str, bytes]:
            import torch

            network, layers = parts_of(model, outputs)
            with torch.inference_mode():
                shape = network(example(model)).shape
            return self._convert(layers, torch.zeros(shape))

        return cached(self.name, self._facts(model, "layers", outputs), make)

    def _facts(self, model: HeightModel, part: str, outputs: tuple[str, ...] = ()) -> dict[str, Any]:
        """What a conversion depends on. bf16 is made of the fp32 conversion when it is opened."""
        from canopy.inference.backends.parts import CONVERSION

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
            from canopy.inference.backends.openvino_runner import to_openvino

            return to_openvino(part, given)
        from canopy.inference.backends.onnx_runner import to_onnx

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
    from canopy.inference.backends.parts import weights_sha256

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

    from canopy.inference.backends.store import read_card

    for path in int8_places(model, choice.weights_sha256):
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


def int8_places(model: HeightModel, digest: str) -> list[Path]:
    """Where a model's int8 network may lie: beside its file, then in the cache."""
    from canopy.inference.backends.store import folder

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
