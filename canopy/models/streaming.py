"""Writing a safetensors file one tensor at a time, so that a model larger than memory can be written."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from canopy.errors import CheckpointError
from canopy.files import replacing
from canopy.models.registry import header_bytes

_NAMES = {torch.float32: "F32", torch.float16: "F16"}


@dataclass(frozen=True)
class Entry:
    """A tensor to write: its shape is promised first, its values are asked for when their turn comes."""

    shape: tuple[int, ...]
    read: Callable[[], Tensor]
    dtype: torch.dtype = torch.float32

    @property
    def nbytes(self) -> int:
        return torch.Size(self.shape).numel() * self.dtype.itemsize


def write_streaming(path: Path, entries: Mapping[str, Entry], metadata: Mapping[str, str]) -> None:
    """Write `entries` and `metadata` as safetensors; `path` appears only once it is complete.

    Raises:
        CheckpointError: a tensor came with another shape than promised.
        OutputError: it cannot be written.
    """
    header: dict[str, object] = {"__metadata__": dict(metadata)}
    offset = 0
    # Wide types first, as the reference writer does, so that every tensor starts aligned.
    ordered = sorted(entries.items(), key=lambda item: -item[1].dtype.itemsize)
    for name, entry in ordered:
        end = offset + entry.nbytes
        header[name] = {"dtype": _NAMES[entry.dtype], "shape": entry.shape, "data_offsets": [offset, end]}
        offset = end
    with replacing(path) as part:
        path.parent.mkdir(parents=True, exist_ok=True)
        with part.open("wb") as file:
            file.write(header_bytes(header))
            for name, entry in ordered:
                file.write(_bytes(name, entry))


def _bytes(name: str, entry: Entry) -> memoryview:
    tensor = entry.read()
    if tuple(tensor.shape) != entry.shape:
        raise CheckpointError(f"{name} is {tuple(tensor.shape)}", expected=str(entry.shape))
    stored = tensor.to(entry.dtype).contiguous()
    if not bool(torch.isfinite(stored).all()):
        raise CheckpointError(
            f"{name} holds values that are not numbers, or none that {_NAMES[entry.dtype]} can hold",
            remedy="the checkpoint is damaged; or leave --half out",
        )
    return stored.numpy().reshape(-1).view("uint8").data
