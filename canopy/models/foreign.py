"""Reading other people's weight files without running their code, and recognising published models in them.

Pickles are opened with `weights_only=True`, always; whatever else a file needs is refused by name. Files are
memory-mapped where their format allows it.
"""

from __future__ import annotations

import functools
import io
import pickle
import re
import warnings
from collections import OrderedDict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

from canopy.errors import CheckpointError
from canopy.models.checkpoint import BARE_WEIGHTS, BUFFERS, RUN_MODEL

# How torch names the parameters of a dynamically quantised layer.
_PACKED = "._packed_params"
# What a training script may have put around the weights.
_NESTS = ("state_dict", "model")
# What wrappers and data-parallel training put in front of every name.
_WRAPPERS = ("", "module.", "chm_module_.", "model.")
_DAMAGED = "copy or download it again"


@functools.cache
def tables() -> dict[str, Any]:
    """How the published models are named and built: published.yaml, which says what is in it."""
    return yaml.safe_load(Path(__file__).with_name("published.yaml").read_text())


@dataclass(frozen=True)
class Weights:
    """The tensors of weight files.

    Attributes:
        tensors: by their original names; quantised layers appear as the `weight` and `bias` they stand for.
        dropped: entries that are not weights of the model, each with the reason.
        quantised: how many layers were stored as 8-bit integers.
    """

    tensors: dict[str, Tensor]
    dropped: dict[str, str] = field(default_factory=dict)
    quantised: int = 0


# ---- which published model --------------------------------------------------------------------------------
def open_published(paths: list[Path]) -> tuple[str, Weights]:
    """Layout ('v1', 'v2' or 'hub') and tensors of a file, a directory of the hub's, or a head and a backbone.

    Raises:
        CheckpointError: a file that cannot be read safely, none of these, or one that lacks its other half.
    """
    opened = [_recognised(open_weights(path), path) for path in paths]
    kinds = [kind for kind, _ in opened]
    if sorted(kinds) == ["v2-backbone", "v2-head"]:
        one, two = (weights for _, weights in opened)
        return "v2", Weights(one.tensors | two.tensors, one.dropped | two.dropped)
    said = " and ".join(tables()["kinds"][kind]["said"] for kind in kinds)
    if len(paths) > 1:
        where = ", ".join(map(str, paths))
        raise CheckpointError(
            f"hold {said}", where=where, expected="the head and the backbone of a v2, or one file alone"
        )
    if kinds[0].startswith("v2-"):
        other = "backbone" if kinds[0] == "v2-head" else "head"
        raise CheckpointError(
            f"is {said} without its {other}", where=paths[0], remedy=f"give the {other} file too: "
            "canopy models convert FILE --backbone OTHER -o MODEL.safetensors",
        )  # fmt: skip
    return opened[0]


def _recognised(weights: Weights, path: Path) -> tuple[str, Weights]:
    """What kind a file is, and its tensors without the prefix of a wrapper."""
    names, kinds = weights.tensors, tables()["kinds"]
    for prefix in _WRAPPERS:
        for kind, row in kinds.items():
            if prefix + row["mark"] in names and all(name.startswith(prefix) for name in names):
                tensors = {name.removeprefix(prefix): tensor for name, tensor in names.items()}
                return kind, Weights(tensors, weights.dropped, weights.quantised)
    hint = None
    if set(BUFFERS) <= set(names):
        hint = BARE_WEIGHTS
    elif any(name.startswith(("model.encoder.", "network.encoder.")) for name in names):
        hint = f"it is the state of a training run: use the run's {RUN_MODEL}"
    elif any(re.match(r"(encoder\.)?(layer\.|blocks\.)\d", name) for name in names):
        hint = "it may be a backbone without a canopy-height head"
    raise CheckpointError(
        f"is none of the published canopy-height models (it holds {', '.join(sorted(names)[:3])}, ...)",
        where=path,
        expected="; ".join(row["said"] for row in kinds.values()),
        remedy=hint,
    )


def renamed(name: str, rules: Iterable[tuple[str, str]]) -> str:
    """A name after each [pattern, replacement] in turn."""
    for pattern, new in rules:
        name = re.sub(pattern, new, name)
    return name


def as_original(layout: str, found: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors under the names of the original v2 files, and what the file calls each."""
    rules = tables()["to_original"].get(layout, ())
    names = {renamed(theirs, rules): theirs for theirs in found}
    tensors = {name: found[theirs] for name, theirs in names.items()}
    # The hub keeps queries, keys and values apart, and leaves out a key bias that is zero.
    for name in [name for name in tensors if re.search(r"\.attn\.q\.(weight|bias)$", name)]:
        query, key, value = (tensors.pop(name.replace(".q.", f".{k}."), None) for k in "qkv")
        if key is None and name.endswith("bias") and query is not None:
            key = torch.zeros_like(query)
        if query is not None and key is not None and value is not None:
            whole = name.replace(".q.", ".qkv.")
            tensors[whole], names[whole] = torch.cat([query, key, value]), names[name]
    return tensors, names


# ---- reading ----------------------------------------------------------------------------------------------
def weight_file(path: Path) -> Path:
    """The file of tensors that a path stands for: model.safetensors of a directory in the hub's layout."""
    return path / "model.safetensors" if path.is_dir() else path


def open_weights(path: Path, *, stand_ins: bool = False) -> Weights:
    """Open a PyTorch pickle, a safetensors file, or a directory in the hub's layout.

    With `stand_ins` a pickle may name classes and functions beside its tensors, as a training run's
    checkpoint does: an empty object of ours takes their place, and nothing of theirs is imported or run.

    Raises:
        CheckpointError: missing, truncated, needing more than plain tensors, or holding none.
    """
    if path.is_dir() and not weight_file(path).is_file():
        raise CheckpointError(
            "holds no model.safetensors", where=path, expected="a directory in the hub's layout"
        )
    path = weight_file(path)
    if not path.is_file():
        raise CheckpointError("no such file", where=path, expected="a checkpoint")
    with path.open("rb") as file:
        first = file.read(9)
    # safetensors: the length of a JSON header, eight bytes, and the header's brace.
    if first[4:] != b"\0\0\0\0{" and (first[:2] == b"PK" or first[:1] == b"\x80"):
        return _from_pickle(path, stand_ins)
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return Weights(load_file(path))
    except (SafetensorError, OSError) as error:
        raise CheckpointError(
            f"is neither a PyTorch nor a whole safetensors file ({error})", where=path, remedy=_DAMAGED
        ) from error


class _StandIn:
    """For a class or function that a pickle names: takes whatever it is given and does nothing."""

    def __init__(self, *_: object, **__: object) -> None:
        pass

    def __setstate__(self, _: object) -> None:
        pass


def _from_pickle(path: Path, stand_ins: bool) -> Weights:
    state = _load(path, stand_ins)
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
    tensors: dict[str, Tensor] = {}
    quantised = 0
    for name, value in state.items():
        base, _, last = name.rpartition(".")
        if name.endswith(_PACKED + ".dtype") or (
            last in ("scale", "zero_point") and f"{base}{_PACKED}.dtype" in state
        ):
            dropped[name] = "quantisation bookkeeping: the weights are dequantised"
        elif name.endswith(_PACKED + _PACKED) and isinstance(value, tuple) and len(value) == 2:
            quantised += 1
            base = name.removesuffix(_PACKED + _PACKED)
            named = zip(("weight", "bias"), value, strict=True)
            tensors |= {f"{base}.{part}": _plain(t) for part, t in named if isinstance(t, Tensor)}
        elif isinstance(value, Tensor):
            quantised += value.is_quantized
            tensors[name.replace(_PACKED, "")] = _plain(value)
        else:
            dropped[name] = f"not a tensor but a {type(value).__name__}"
    if not tensors:
        raise CheckpointError("holds no tensors", where=path, expected="a checkpoint")
    return Weights(tensors, dropped, quantised)


def _plain(tensor: Tensor) -> Tensor:
    return tensor.dequantize() if tensor.is_quantized else tensor


def _load(path: Path, stand_ins: bool) -> Any:
    with path.open("rb") as file:
        is_zip = file.read(2) == b"PK"
    try:
        named = (
            torch.serialization.get_unsafe_globals_in_checkpoint(str(path)) if stand_ins and is_zip else []
        )
        known = torch.serialization.safe_globals(
            # torch fills none but its own kinds of dictionaries
            [(OrderedDict if name.lower().endswith("dict") else _StandIn, name) for name in named]
        )
        with warnings.catch_warnings(), known:
            # torch announces the end of quantised dtypes; these files keep existing.
            warnings.simplefilter("ignore")
            if path.suffix == ".safetensors":  # torch believes the name, not the content
                return torch.load(io.BytesIO(path.read_bytes()), map_location="cpu", weights_only=True)
            return torch.load(path, map_location="cpu", weights_only=True, mmap=is_zip or None)
    except Exception as error:  # torch raises a dozen kinds on damaged archives
        text = re.split(r"\. |; ", " ".join(str(error).split()))[0][:160] or type(error).__name__
        types = _refused_types(path, str(error)) if isinstance(error, pickle.UnpicklingError) else []
        if types:
            raise CheckpointError(
                f"needs {', '.join(types)} to be opened, which could run code",
                where=path,
                expected="nothing but tensors",
                remedy="do not open it any other way unless you trust whoever made it",
            ) from error
        raise CheckpointError(f"is truncated or damaged ({text})", where=path, remedy=_DAMAGED) from error


def _refused_types(path: Path, message: str) -> list[str]:
    """Names of the classes and functions that the pickle asks for beyond tensors."""
    try:
        found = torch.serialization.get_unsafe_globals_in_checkpoint(str(path))
    except Exception:  # not a zip archive: only the message knows
        found = []
    return sorted(set(found) | set(re.findall(r"GLOBAL ([\w.]+\w)", message)))[:6]
