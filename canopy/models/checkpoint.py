"""One file per model: weights, configuration, provenance and metrics, as safetensors.

safetensors holds no code, so opening a stranger's file runs nothing. Matrices may be stored as fp16
(vectors and buffers stay fp32); in memory everything is fp32 again.
"""

from __future__ import annotations

import hashlib
import json
import os
import struct
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from canopy.errors import CheckpointError, ConfigError
from canopy.models.config import ModelConfig
from canopy.models.height import HeightModel

FORMAT_VERSION = "1"
WEIGHTS_DIR = Path(__file__).parent / "weights"
# Names people can type, and the embedded file each stands for.
EMBEDDED = {"default": "canopy-small-v1.safetensors", "canopy-small": "canopy-small-v1.safetensors"}
_SHOWN = 8  # lines of a key diff that help before they become noise


def save_checkpoint(path: str | Path, model: HeightModel, card: dict[str, Any], *, half: bool = True) -> str:
    """Write `model` and its card atomically; return the file's sha256.

    Args:
        path: the `.safetensors` file to write (replaced if it exists).
        model: weights and config to store.
        card: JSON-ready facts: name, date, licence, data ids and hash, metrics.
        half: store matrices as fp16, which halves the file; heights move by millimetres.
    """
    from safetensors.torch import save_file

    path = Path(path)
    state = {
        k: (v.half() if half and v.is_floating_point() and v.ndim > 1 and k not in ("mean", "std") else v)
        for k, v in model.state_dict().items()
    }
    header = {
        "format": "canopy-height",
        "format_version": FORMAT_VERSION,
        "config": json.dumps(model.config.to_dict()),
        "card": json.dumps(card),
    }
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        save_file({k: v.detach().cpu().contiguous() for k, v in state.items()}, temporary, metadata=header)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    return file_sha256(path)


def load_model(name_or_path: str | Path = "default", device: str | torch.device = "cpu") -> HeightModel:
    """Load a model by embedded name ('default') or from a file, in eval mode on `device`.

    Returns:
        A HeightModel with `.card` (dict) and `.sha256` set.

    Raises:
        CheckpointError: no such file, not a canopy model, truncated, or weights that do not fit.
    """
    path = resolve_model(name_or_path)
    header = read_header(path)
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
    model.sha256 = file_sha256(path)
    return model.to(device).eval()


def resolve_model(name_or_path: str | Path) -> Path:
    """The file behind an embedded name or a path; CheckpointError where there is none."""
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
        raise CheckpointError("is a directory", where=path, expected="a .safetensors file")
    if not path.is_file():
        raise CheckpointError(
            f"no model {name!r}", expected=f"a file, or one of: {', '.join(sorted(EMBEDDED))}"
        )
    return path


def read_header(path: Path) -> dict[str, str]:
    """Metadata of a canopy model file, without reading its weights."""
    _check_readable(path)
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            header = file.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise CheckpointError(
            f"is damaged or not a safetensors file ({error})", where=path, remedy="copy or download it again"
        ) from error
    if header.get("format") != "canopy-height" or "config" not in header:
        raise CheckpointError(
            "is a safetensors file without canopy's metadata",
            where=path,
            expected="a file written by canopy",
            remedy="convert it with: canopy models convert",
        )
    if header.get("format_version") != FORMAT_VERSION:
        raise CheckpointError(
            f"has format version {header.get('format_version')}", where=path, expected=FORMAT_VERSION
        )
    return dict(header)


def _check_readable(path: Path) -> None:
    """Tell pickles, empty files and truncation apart before the library's own, terser words."""
    length = path.stat().st_size
    with path.open("rb") as file:
        first = file.read(8)
    if first[:2] == b"PK" or first[:2] in (b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05"):
        raise CheckpointError(
            "is a PyTorch pickle, which can run code when opened",
            where=path,
            expected="a .safetensors model",
            remedy="convert it with: canopy models convert",
        )
    if length < 8:
        raise CheckpointError(f"holds {length} bytes", where=path, expected="a .safetensors model")
    (header_length,) = struct.unpack("<Q", first)
    if header_length > 100_000_000:
        raise CheckpointError("is not a safetensors file", where=path, expected="a .safetensors model")
    if 8 + header_length > length:
        raise CheckpointError(
            "is truncated inside its header", where=path, remedy="copy or download it again"
        )


def _read_tensors(path: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        tensors = load_file(path)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(
            f"is damaged ({error})", where=path, remedy="copy or download it again"
        ) from error
    return {k: v.float() if v.is_floating_point() else v for k, v in tensors.items()}


def load_strict(model: torch.nn.Module, state: dict[str, Tensor], where: object) -> None:
    """Load `state` into `model`; missing, unexpected or misshapen keys raise a readable CheckpointError."""
    difference = state_diff(model.state_dict(), state)
    if difference:
        shown = difference[:_SHOWN] + (
            [f"and {len(difference) - _SHOWN} more"] if len(difference) > _SHOWN else []
        )
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


def file_sha256(path: str | Path) -> str:
    """Hex sha256 of a file."""
    digest = hashlib.sha256()
    with Path(path).open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
