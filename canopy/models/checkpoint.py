"""One file per model: weights, configuration, provenance and metrics, as safetensors.

safetensors holds no code, so opening a stranger's file runs nothing. Matrices may be stored as fp16
(vectors and buffers stay fp32); in memory everything is fp32 again.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from canopy.errors import CheckpointError, ConfigError
from canopy.files import file_sha256, replacing
from canopy.models.config import ModelConfig
from canopy.models.height import HeightModel
from canopy.models.registry import (
    EMBEDDED,
    FORMAT,
    FORMAT_VERSION,
    WEIGHTS_DIR,
    read_header,
    resolve_model,
)

__all__ = ["EMBEDDED", "WEIGHTS_DIR", "load_model", "load_strict", "save_checkpoint"]
_SHOWN = 8  # lines of a key diff that help before they become noise
_BUFFERS = ("mean", "std", "centres")


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
        k: v.half() if half and v.is_floating_point() and v.ndim > 1 and k not in _BUFFERS else v
        for k, v in model.state_dict().items()
    }
    header = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "config": json.dumps(model.config.to_dict()),
        "card": json.dumps(card),
    }
    with replacing(path) as part:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file({k: v.detach().cpu().contiguous() for k, v in state.items()}, part, metadata=header)
        part.chmod(0o644)  # safetensors writes 0600, which nobody else could read
    return file_sha256(path)


def load_model(name_or_path: str | Path = "default", device: str | torch.device = "cpu") -> HeightModel:
    """Load a model by embedded name ('default') or from a file, in eval mode on `device`.

    Returns:
        A HeightModel with `.card` (dict), `.sha256` and `.path` set.

    Raises:
        CheckpointError: no such file, not a canopy model, truncated, or weights that do not fit.
    """
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
    return {k: v.float() if v.is_floating_point() else v for k, v in tensors.items()}


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
