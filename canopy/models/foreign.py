"""Reading other people's weight files without running their code, and without holding them in memory.

Pickles are opened with `weights_only=True`, always; whatever else a file needs is refused by name. Tensors
stay in the file (memory-mapped) until they are asked for one by one, so a conversion never holds two models.
"""

from __future__ import annotations

import io
import json
import pickle
import re
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from canopy.errors import CheckpointError

_PACKED = "._packed_params"
# What a training script may have put around the weights.
_NESTS = ("state_dict", "model")
_DAMAGED = "copy or download it again"


@dataclass(frozen=True)
class Stored:
    """A tensor still in its file. `read()` gives it as contiguous float32."""

    shape: tuple[int, ...]
    read: Callable[[], Tensor]


@dataclass(frozen=True)
class ForeignFile:
    """The tensors of one or several weight files.

    Attributes:
        paths: the files, as given.
        tensors: by their original names; quantised layers appear as the `weight` and `bias` they stand for.
        dropped: entries that are not weights of the model, each with the reason.
        quantised: how many layers were stored as 8-bit integers.
    """

    paths: tuple[Path, ...]
    tensors: dict[str, Stored]
    dropped: dict[str, str] = field(default_factory=dict)
    quantised: int = 0

    @property
    def where(self) -> str:
        return ", ".join(str(path) for path in self.paths)

    def without_prefix(self, prefix: str) -> ForeignFile:
        """The same file with `prefix` cut from every name; every name must have it."""
        tensors = {name.removeprefix(prefix): tensor for name, tensor in self.tensors.items()}
        return ForeignFile(self.paths, tensors, self.dropped, self.quantised)


def open_foreign(path: Path) -> ForeignFile:
    """Open a PyTorch pickle or a safetensors file, recognised by its first bytes.

    Raises:
        CheckpointError: missing, truncated, needing more than plain tensors, or holding none.
    """
    if not path.is_file():
        raise CheckpointError("no such file", where=path, expected="a checkpoint")
    with path.open("rb") as file:
        first = file.read(9)
    # safetensors: the length of a JSON header, eight bytes, and the header's brace.
    if first[4:] != b"\0\0\0\0{" and (first[:2] == b"PK" or first[:1] == b"\x80"):
        return _from_pickle(path)
    return open_safetensors(path)


def open_safetensors(*paths: Path) -> ForeignFile:
    """The tensors of one safetensors file, or of the shards of one model.

    Raises:
        CheckpointError: damaged, not safetensors, or a name that is in two shards.
    """
    from safetensors import SafetensorError, safe_open

    tensors: dict[str, Stored] = {}
    for path in paths:
        try:
            with safe_open(path, framework="pt") as file:
                names = list(file.keys())
                found = {n: Stored(tuple(file.get_slice(n).get_shape()), _reader(path, n)) for n in names}
        except (SafetensorError, OSError) as error:
            raise CheckpointError(
                f"is neither a PyTorch nor a whole safetensors file ({error})", where=path, remedy=_DAMAGED
            ) from error
        twice = sorted(set(tensors) & set(found))
        if twice:
            raise CheckpointError(f"holds {twice[0]}, which another shard holds too", where=path)
        tensors |= found
    return ForeignFile(paths, tensors)


def open_shards(index: Path) -> ForeignFile:
    """The model behind a `*.safetensors.index.json`.

    Raises:
        CheckpointError: an index that cannot be read or names files outside its folder, or a missing shard.
    """
    try:
        weight_map: dict[str, str] = json.loads(index.read_text())["weight_map"]
        names = sorted({str(name) for name in weight_map.values()})
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError("is not an index of shards", where=index, remedy=_DAMAGED) from error
    for name in names:
        if Path(name).name != name:
            raise CheckpointError(f"names the shard {name!r}", where=index, expected="plain file names")
        if not (index.parent / name).is_file():
            raise CheckpointError("shard is missing", where=index.parent / name, remedy=_DAMAGED)
    whole = open_safetensors(*(index.parent / name for name in names))
    missing = sorted(set(weight_map) - set(whole.tensors))
    if missing:
        raise CheckpointError(f"lists {missing[0]}, which no shard holds", where=index, remedy=_DAMAGED)
    return whole


def _reader(path: Path, name: str) -> Callable[[], Tensor]:
    def read() -> Tensor:
        from safetensors import safe_open

        with safe_open(path, framework="pt") as file:
            return file.get_tensor(name).float().contiguous()

    return read


def _from_pickle(path: Path) -> ForeignFile:
    state = _load(path)
    dropped: dict[str, str] = {}
    for nest in _NESTS:
        inner = state.get(nest) if isinstance(state, Mapping) else None
        if isinstance(inner, Mapping):
            dropped = {str(k): "beside the weights: state of the training" for k in state if k != nest}
            state = inner
            break
    if not isinstance(state, Mapping) or not all(isinstance(key, str) for key in state):
        raise CheckpointError(
            f"holds a {type(state).__name__}", where=path, expected="a dictionary of named tensors"
        )
    tensors: dict[str, Stored] = {}
    quantised = 0
    for name, value in state.items():
        if name.endswith(_PACKED + _PACKED):
            quantised += 1
            tensors |= _unpacked(name.removesuffix(_PACKED + _PACKED), value, path)
        elif isinstance(value, Tensor) and not _is_quantiser(name, state):
            name = name.replace(_PACKED, "")  # the layout of early releases
            quantised += value.is_quantized
            tensors[name] = Stored(tuple(value.shape), _keeper(value))
        elif _is_quantiser(name, state):
            dropped[name] = "quantisation bookkeeping: the weights are dequantised"
        else:
            dropped[name] = f"not a tensor but a {type(value).__name__}"
    if not tensors:
        raise CheckpointError("holds no tensors", where=path, expected="a checkpoint")
    return ForeignFile((path,), tensors, dropped, quantised)


def _is_quantiser(name: str, state: Mapping[str, Any]) -> bool:
    """Scale, zero point and dtype beside the packed parameters of a dynamically quantised layer."""
    if name.endswith(_PACKED + ".dtype"):
        return True
    base, _, last = name.rpartition(".")
    return last in ("scale", "zero_point") and any(
        f"{base}{_PACKED}{end}" in state for end in (_PACKED, ".dtype")
    )


def _unpacked(base: str, value: Any, path: Path) -> dict[str, Stored]:
    """Weight and bias of a quantised Linear: its packed parameters are a (weight, bias) tuple."""
    if not (isinstance(value, tuple) and len(value) == 2 and isinstance(value[0], Tensor)):
        raise CheckpointError(
            f"{base} holds packed parameters of another kind", where=path, expected="(weight, bias)"
        )
    weight, bias = value
    unpacked = {f"{base}.weight": Stored(tuple(weight.shape), _keeper(weight))}
    if isinstance(bias, Tensor):
        unpacked[f"{base}.bias"] = Stored(tuple(bias.shape), _keeper(bias))
    return unpacked


def _keeper(tensor: Tensor) -> Callable[[], Tensor]:
    def read() -> Tensor:
        plain = tensor.detach()
        return (plain.dequantize() if plain.is_quantized else plain).float().contiguous()

    return read


def _load(path: Path) -> Any:
    with path.open("rb") as file:
        is_zip = file.read(2) == b"PK"
    try:
        with warnings.catch_warnings():
            # torch announces the end of quantised dtypes; these files keep existing.
            warnings.simplefilter("ignore")
            if path.suffix == ".safetensors":  # torch believes the name, not the content
                return torch.load(io.BytesIO(path.read_bytes()), map_location="cpu", weights_only=True)
            return torch.load(path, map_location="cpu", weights_only=True, mmap=is_zip or None)
    except pickle.UnpicklingError as error:
        types = _refused_types(path, str(error))
        if types:
            raise CheckpointError(
                f"needs {', '.join(types)} to be opened, which could run code",
                where=path,
                expected="nothing but tensors",
                remedy="do not open it any other way unless you trust whoever made it",
            ) from error
        raise CheckpointError(
            f"cannot be read as tensors ({_first_sentence(error)})", where=path, remedy=_DAMAGED
        ) from error
    except Exception as error:  # torch raises a dozen kinds on damaged archives
        raise CheckpointError(
            f"is truncated or damaged ({_first_sentence(error)})", where=path, remedy=_DAMAGED
        ) from error


def _refused_types(path: Path, message: str) -> list[str]:
    """Names of the classes and functions that the pickle asks for beyond tensors."""
    try:
        found = torch.serialization.get_unsafe_globals_in_checkpoint(str(path))
    except Exception:  # not a zip archive: only the message knows
        found = []
    return sorted(set(found) | set(re.findall(r"GLOBAL ([\w.]+\w)", message)))[:6]


def _first_sentence(error: Exception) -> str:
    text = " ".join(str(error).split())
    return re.split(r"\. |; ", text)[0][:160] or type(error).__name__
