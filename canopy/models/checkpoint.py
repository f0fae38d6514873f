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
WEIGHTS_DIR = Path(__file__).parent / "weights"
# Names people can type, and the embedded file each stands for.
EMBEDDED = {
    "default": "canopy-small-v3.safetensors",
    "canopy-small": "canopy-small-v3.safetensors",
    "canopy-small-v3": "canopy-small-v3.safetensors",
    "canopy-lite": "canopy-lite-v4.safetensors",
    "canopy-lite-v4": "canopy-lite-v4.safetensors",
}
# What a training run leaves in its folder, beside `last.ckpt`.
RUN_MODEL = "model.safetensors"
_PICKLES = (b"PK", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")


def resolve_model(name_or_path: str | Path) -> Path:
    """The file behind an embedded name, a path, or the folder of a training run, which means its model.

    Raises:
        CheckpointError: there is none.
    """
    name = str(name_or_path)
    if name in EMBEDDED:
        path = WEIGHTS_DIR / EMBEDDED[name]
        if not path.is_file():
            raise CheckpointError(
                f"the embedded weights of {name!r} are missing", where=path, remedy="reinstall canopy-height"
            )
        return path
    path = Path(name).expanduser()
    if path.is_dir():
        path = path / RUN_MODEL
        if not path.is_file():
            raise CheckpointError(
                f"is a directory without {RUN_MODEL}", where=path.parent,
                expected="a .safetensors file, or the folder of a finished training run",
            )  # fmt: skip
    if not path.is_file():
        raise CheckpointError(
            f"no model {name!r}", expected=f"a file, or one of: {', '.join(sorted(EMBEDDED))}"
        )
    return path


def read_header(path: Path) -> tuple[dict[str, str], dict[str, Any]]:
    """Metadata and tensor table of a canopy model file, read without its weights.

    Raises:
        CheckpointError: a pickle, a truncated or foreign file, or one without canopy's metadata.
    """
    table = _read_table(path)
    header = table.pop("__metadata__", None) or {}
    if header.get("format") != FORMAT or "config" not in header:
        ours = {"mean", "std", "centres"} <= set(table)
        raise CheckpointError(
            "holds the weights of a canopy model without the description that canopy writes beside them"
            if ours
            else "is a safetensors file without canopy's metadata",
            where=path,
            expected="a file written by canopy",
            remedy="use the file that these weights were loaded from; to save changed weights use "
            "canopy.models.checkpoint.save_checkpoint"
            if ours
            else "if it is a published model: canopy models convert",
        )
    if header.get("format_version") != FORMAT_VERSION:
        raise CheckpointError(
            f"has format version {header.get('format_version')}",
            where=path,
            expected=FORMAT_VERSION,
            remedy="update canopy",
        )
    return header, table


def _read_table(path: Path) -> dict[str, Any]:
    """The JSON header of a safetensors file, after telling pickles, stubs and truncation apart."""
    length = path.stat().st_size
    with path.open("rb") as file:
        first = file.read(8)
        # A header's length may begin like a pickle, but it never fills its upper half.
        if first.startswith(_PICKLES) and first[4:] != bytes(4):
            raise pickle_error(path)
        size = struct.unpack("<Q", first)[0] if len(first) == 8 else 0
        if not 2 <= size <= 100_000_000:
            raise CheckpointError("is not a safetensors file", where=path, expected="a canopy model")
        text = file.read(size) if 8 + size <= length else b""
    if not text:
        raise CheckpointError("is truncated in its header", where=path, remedy="copy or download it again")
    try:
        table = json.loads(text)
        end = max((row["data_offsets"][1] for k, row in table.items() if k != "__metadata__"), default=0)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise CheckpointError("is not a safetensors file", where=path, expected="a canopy model") from error
    if 8 + size + end > length:
        raise CheckpointError(
            f"is truncated: {length} of {8 + size + end} bytes",
            where=path,
            remedy="copy or download it again",
        )
    return table


def header_bytes(header: Mapping[str, Any]) -> bytes:
    """How a safetensors file begins (huggingface.co/docs/safetensors): its header's length, and the header.

    `header`: texts by name in `__metadata__`, and the table of tensors (dtype, shape, data_offsets); their
    bytes follow in its order. Padded so that these start aligned to 8 bytes. Equal bytes for equal headers:
    shards of chips are known by theirs.
    """
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def describe(path: Path) -> dict[str, Any]:
    """JSON-ready facts of a model file: its name, hash, size, what input it expects, and its card."""
    header, table = read_header(path)
    config, card = json.loads(header["config"]), json.loads(header.get("card", "{}"))
    buffers = ("mean", "std", "centres", ".running_mean", ".running_var", ".num_batches_tracked")
    count = sum(math.prod(row["shape"]) for key, row in table.items() if not key.endswith(buffers))
    return {
        "name": card.get("name", path.stem),
        "path": str(path),
        "bytes": path.stat().st_size,
        "sha256": file_sha256(path),
        "bands": config["bands"],
        "gsd_m": config["gsd_m"],
        "crop_px": config["crop_px"],
        "parameters": count,
        "config": config,
        "card": card,
    }


__all__ = ["EMBEDDED", "WEIGHTS_DIR", "load_model", "load_strict", "save_checkpoint"]
_SHOWN = 8  # lines of a key diff that help before they become noise
_BUFFERS = ("mean", "std", "centres")


def pickle_error(path: Path) -> CheckpointError:
    """What to say of a pickle where a model is wanted: most are the state of a training run."""
    run = path.suffix == ".ckpt"
    beside = path.parent / RUN_MODEL
    return CheckpointError(
        "is the state of a training run, not a model" if run else "is a PyTorch pickle, not a canopy model",
        where=path,
        expected="a .safetensors model",
        remedy=f"use {beside}" + ("" if beside.is_file() else ", which a run writes when it has finished")
        if run
        else "if it is a published model: canopy models convert; your own weights: "
        "canopy.models.checkpoint.save_checkpoint",
    )


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
    from safetensors.torch import save

    stored = {
        k: (v.half() if half and v.is_floating_point() and v.ndim > 1 and k not in _BUFFERS else v)
        .detach().cpu().contiguous()
        for k, v in tensors.items()
    }  # fmt: skip
    check_finite(stored, path)
    header = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "config": json.dumps(config.to_dict()),
        "card": json.dumps(card),
    }
    data = memoryview(save(stored))
    # The library writes metadata in an order of its own; the same model shall give the same file.
    size = 8 + struct.unpack("<Q", data[:8])[0]
    table = {"__metadata__": header, **json.loads(bytes(data[8:size]))}
    with replacing(path) as part:
        path.parent.mkdir(parents=True, exist_ok=True)
        with part.open("wb") as file:
            file.write(header_bytes(table))
            file.write(data[size:])
    return file_sha256(path)


def load_model(name_or_path: str | Path = "default", device: str | torch.device = "cpu") -> HeightModel:
    """Load a model by embedded name ('default') or from a file, in eval mode on `device`.

    Returns:
        A HeightModel with `.card` (dict), `.sha256` and `.path` set.

    Raises:
        CheckpointError: no such file, not a canopy model, truncated, or weights that do not fit.
    """
    from canopy.models.height import HeightModel

    path = resolve_model(name_or_path)
    header, _ = read_header(path)
    try:
        config = ModelConfig.from_dict(json.loads(header["config"]))
    except (ConfigError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"the model description cannot be used: {error}",
            where=path,
            remedy="it may come from a newer canopy; update canopy",
        ) from error
    model = HeightModel(config)
    load_strict(model, _read_tensors(path), path)
    model.card = json.loads(header.get("card", "{}"))
    model.sha256, model.path = file_sha256(path), path
    return model.to(device).eval()


def _read_tensors(path: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        tensors = load_file(path)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"is damaged ({error})", where=path, remedy="download it again") from error
    check_finite(tensors, path)
    return {k: v.float() if v.is_floating_point() else v for k, v in tensors.items()}


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


def load_strict(model: torch.nn.Module, state: dict[str, Tensor], where: object) -> None:
    """Load `state` into `model`; missing, unexpected or misshapen keys raise a readable CheckpointError."""
    difference = state_diff(model.state_dict(), state)
    if difference:
        rest = len(difference) - _SHOWN
        shown = difference[:_SHOWN] + ([f"and {rest} more"] if rest > 0 else [])
        raise CheckpointError(
            f"weights do not fit the model ({len(difference)} differences): {'; '.join(shown)}", where=where
        )
    model.load_state_dict(state, strict=True)


def state_diff(expected: dict[str, Tensor], found: dict[str, Tensor]) -> list[str]:
    """Differences in keys and shapes, one short line each, missing ones first."""
    missing = [f"missing {k} {tuple(expected[k].shape)}" for k in expected if k not in found]
    extra = [f"unexpected {k} {tuple(found[k].shape)}" for k in found if k not in expected]
    shapes = [
        f"{k} is {tuple(found[k].shape)}, expected {tuple(expected[k].shape)}"
        for k in expected
        if k in found and found[k].shape != expected[k].shape
    ]
    return missing + extra + shapes


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
    told = _differences(model.config.to_dict(), ModelConfig().to_dict())
    digest = hashlib.sha256(json.dumps(told, sort_keys=True).encode())
    for name, tensor in sorted(state.items()):
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
