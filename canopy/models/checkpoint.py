"""One file per model: weights, configuration, provenance and metrics, as safetensors.

safetensors holds no code, so opening a stranger's file runs nothing. Matrices may be stored as fp16
(vectors and buffers stay fp32); in memory everything is fp32 again.
"""

from __future__ import annotations

import hashlib
import json
import math
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from canopy.errors import CheckpointError, ConfigError
from canopy.files import file_sha256, replacing
from canopy.models.config import ModelConfig

# torch takes seconds to import, and listing models needs none of it.
if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from canopy.models.height import HeightModel

FORMAT = "canopy-height"
FORMAT_VERSION = "1"
BUFFERS = ("mean", "std", "centres")  # of a HeightModel, beside its parameters
# What a training run leaves in its folder, beside `last.ckpt`.
RUN_MODEL = "model.safetensors"
BARE_WEIGHTS = (
    "these are the weights of a canopy model without the description that canopy writes beside them: use the "
    "file that they were loaded from; to save changed weights use canopy.models.checkpoint.save_checkpoint"
)
_PICKLES = (b"PK", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")
_SHOWN = 8  # lines of a difference that help before they become noise


# ---- reading ----------------------------------------------------------------------------------------------
def load_checkpoint(path: str | Path, device: str | torch.device = "cpu") -> HeightModel:
    """Load a canopy model file, in eval mode on `device`; names and others' files: `canopy.load_model`.

    Returns:
        A HeightModel with `.card` (dict), `.sha256` and `.path` set.

    Raises:
        CheckpointError: no such file, not a canopy model, truncated, or weights that do not fit.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    from canopy.models.height import HeightModel

    path = Path(path)
    header, _ = read_header(path)
    try:
        config = ModelConfig.from_dict(json.loads(header["config"]))
    except (ConfigError, ValueError) as error:
        raise CheckpointError(
            f"the model description cannot be used: {error}",
            where=path,
            remedy="it may come from a newer canopy; update canopy",
        ) from error
    try:
        tensors = load_file(path)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"is damaged ({error})", where=path, remedy="download it again") from error
    check_finite(tensors, path)
    model = HeightModel(config)
    load_strict(model, {k: v.float() if v.is_floating_point() else v for k, v in tensors.items()}, path)
    model.card = json.loads(header.get("card", "{}"))
    model.sha256, model.path = file_sha256(path), path
    return model.to(device).eval()


def read_header(path: Path) -> tuple[dict[str, str], dict[str, tuple[int, ...]]]:
    """Metadata and shapes of tensors of a canopy model file, read without its weights.

    Raises:
        CheckpointError: a pickle, a truncated or foreign file, or one without canopy's metadata.
    """
    from safetensors import SafetensorError, safe_open

    if not path.is_file():
        raise CheckpointError("no such model file", where=path)
    with path.open("rb") as file:
        first = file.read(8)
    # A header's length may begin like a pickle, but it never fills its upper half.
    if first.startswith(_PICKLES) and first[4:] != bytes(4):
        raise pickle_error(path)
    try:
        with safe_open(path, framework="numpy") as file:
            header = file.metadata() or {}
            shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise CheckpointError(
            f"is not a safetensors file, or a truncated one ({error})", where=path, expected="a canopy model",
            remedy="copy or download it again",
        ) from error  # fmt: skip
    if header.get("format") != FORMAT or "config" not in header:
        ours = set(BUFFERS) <= set(shapes)
        raise CheckpointError(
            "is a safetensors file without canopy's metadata", where=path,
            expected="a file written by canopy",
            remedy=BARE_WEIGHTS if ours else "if it is a published model: canopy models convert",
        )  # fmt: skip
    if header.get("format_version") != FORMAT_VERSION:
        raise CheckpointError(
            f"has format version {header.get('format_version')}",
            where=path,
            expected=FORMAT_VERSION,
            remedy="update canopy",
        )
    return header, shapes


def pickle_error(path: Path) -> CheckpointError:
    """What to say of a pickle where a model is wanted: most are the state of a training run."""
    if path.suffix != ".ckpt":
        return CheckpointError(
            "is a PyTorch pickle, not a canopy model", where=path, expected="a .safetensors model",
            remedy="if it is a published model: canopy models convert; your own weights: "
            "canopy.models.checkpoint.save_checkpoint",
        )  # fmt: skip
    beside = path.parent / RUN_MODEL
    return CheckpointError(
        "is the state of a training run, not a model", where=path, expected="a .safetensors model",
        remedy=f"use {beside}" + ("" if beside.is_file() else ", which a run writes when it has finished"),
    )  # fmt: skip


def describe(path: Path) -> dict[str, Any]:
    """JSON-ready facts of a model file: its name, hash, size, what input it expects, and its card."""
    header, shapes = read_header(path)
    config, card = json.loads(header["config"]), json.loads(header.get("card", "{}"))
    buffers = (*BUFFERS, ".running_mean", ".running_var", ".num_batches_tracked")
    return {
        "name": card.get("name", path.stem),
        "path": str(path),
        "bytes": path.stat().st_size,
        "sha256": file_sha256(path),
        "bands": config["bands"],
        "gsd_m": config["gsd_m"],
        "crop_px": config["crop_px"],
        "parameters": sum(math.prod(shape) for k, shape in shapes.items() if not k.endswith(buffers)),
        "config": config,
        "card": card,
    }


# ---- writing ----------------------------------------------------------------------------------------------
def save_checkpoint(path: str | Path, model: HeightModel, card: dict[str, Any], *, half: bool = True) -> str:
    """Write `model` and its card atomically; return the file's sha256.

    Args:
        path: the `.safetensors` file to write (replaced if it exists).
        model: weights and config to store.
        card: JSON-ready facts: name, date, licence, data ids and hash, metrics.
        half: store matrices as fp16, which halves the file; heights move by millimetres.
    """
    return write_model(Path(path), model.state_dict(), model.config, card, half=half)


def write_model(
    path: Path, tensors: Mapping[str, Tensor], config: ModelConfig, card: dict[str, Any], *, half: bool
) -> str:
    """Write the tensors of a model of this configuration, whole or not at all; return the file's sha256.

    Raises:
        CheckpointError: a value that is not a number, or none that fp16 can hold.
        OutputError: the file cannot be written.
    """
    import torch

    def stored(name: str) -> Tensor:
        value = tensors[name].detach().cpu()
        if value.is_floating_point():
            value = value.half() if half and value.ndim > 1 and name not in BUFFERS else value.float()
        return value.contiguous()

    kinds = {torch.float32: "F32", torch.float16: "F16", torch.int64: "I64"}
    table: dict[str, Any] = {
        "__metadata__": {
            "format": FORMAT,
            "format_version": FORMAT_VERSION,
            "config": json.dumps(config.to_dict()),
            "card": json.dumps(card),
        }
    }
    end = 0
    # Wide numbers first, so that all are aligned; one at a time, as a model may be as large as the memory.
    names = sorted(tensors, key=lambda name: (-stored(name).itemsize, name))
    for name in names:
        value = stored(name)
        check_finite({name: value}, path)
        place = [end, end + value.nbytes]
        table[name] = {"dtype": kinds[value.dtype], "shape": list(value.shape), "data_offsets": place}
        end = place[1]
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as part, part.open("wb") as file:
        file.write(_header_bytes(table))
        for name in names:
            file.write(stored(name).view(-1).view(torch.uint8).numpy().tobytes())
    return file_sha256(path)


def rewrite_card(source: Path, target: Path, additions: dict[str, Any]) -> str:
    """Copy a model file with `additions` in its card, tensor bytes untouched; returns the new file's sha256.

    Raises:
        CheckpointError: the source is no model file. OutputError: the target cannot be written.
    """
    read_header(source)
    with source.open("rb") as file:
        table, tensors = json.loads(file.read(struct.unpack("<Q", file.read(8))[0])), file.read()
    table["__metadata__"]["card"] = json.dumps(
        json.loads(table["__metadata__"].get("card", "{}")) | additions
    )
    with replacing(target) as part:
        part.write_bytes(_header_bytes(table) + tensors)
    return file_sha256(target)


def _header_bytes(header: Mapping[str, Any]) -> bytes:
    """How a safetensors file begins: its header's length, and the header, padded so that tensors are aligned.

    The library writes metadata in an order of its own; here the same model gives the same file.
    """
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


# ---- checking ---------------------------------------------------------------------------------------------
def check_finite(tensors: Mapping[str, Tensor], where: object) -> None:
    """Refuse weights that are not numbers: some runtimes would make a smooth map of them.

    Raises:
        CheckpointError: names the first tensor.
    """
    import torch

    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise CheckpointError(
                f"{name} holds values that are not numbers"
                + (", or none that fp16 can hold" if tensor.dtype == torch.float16 else ""), where=where,
                remedy="the weights are damaged: train, convert or download them again",
            )  # fmt: skip


def load_strict(
    model: torch.nn.Module, state: dict[str, Tensor], where: object, remedy: str | None = None
) -> None:
    """Load `state` into `model`; missing, unexpected or misshapen keys raise a readable CheckpointError."""
    expected, found = ({k: tuple(t.shape) for k, t in s.items()} for s in (model.state_dict(), state))
    wrong = differences(expected, found)
    if wrong:
        raise CheckpointError(f"weights do not fit the model ({wrong})", where=where, remedy=remedy)
    model.load_state_dict(state, strict=True)


def differences(expected: Mapping[str, tuple[int, ...]], found: Mapping[str, tuple[int, ...]]) -> str:
    """`N differences: ...` in names and shapes of tensors, missing ones first; empty where there are none."""
    lines = [f"missing {k} {expected[k]}" for k in expected if k not in found]
    lines += [f"unexpected {k} {found[k]}" for k in found if k not in expected]
    shared = [k for k in expected if k in found]
    lines += [f"{k} is {found[k]}, expected {expected[k]}" for k in shared if found[k] != expected[k]]
    shown = lines[:_SHOWN] + ([f"and {len(lines) - _SHOWN} more"] if len(lines) > _SHOWN else [])
    return f"{len(lines)} differences: {'; '.join(shown)}" if lines else ""


def weights_sha256(model: HeightModel) -> str:
    """Hash of what a model computes: its configuration and every tensor, in float32.

    Not the file's: a model may have been changed since it was loaded, and must not get another's conversion.

    Raises:
        CheckpointError: a weight that is not a number.
    """
    import torch

    state = model.state_dict()
    check_finite(state, model.path or "the model")
    # Only what differs from the defaults: a field that is added later changes nothing of older models.
    told = model.config.model_dump(mode="json", exclude_defaults=True)
    digest = hashlib.sha256(json.dumps(told, sort_keys=True).encode())
    for name, tensor in sorted(state.items()):
        digest.update(f"{name}{tuple(tensor.shape)}{tensor.dtype}".encode())
        digest.update(memoryview(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy()))
    return digest.hexdigest()
