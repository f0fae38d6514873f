"""A height model in two parts that other runtimes can take over, for crops of one fixed size.

The first part, from crops to bin scores, is nearly all of the work; it is converted once and cached, and may
run in low precision. The second, from scores to metres, depends on what is asked for (heights, spread,
quantiles); it is small, always fp32, and converted anew at every start.
"""

from __future__ import annotations

import copy
import hashlib
import json
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from canopy.errors import CanopyError
from canopy.models.config import ModelConfig

if TYPE_CHECKING:
    from canopy.models.height import HeightModel

# Raise whenever conversion changes: cached conversions of before are then made anew.
CONVERSION = 1
_tracing = threading.Lock()


class ConversionError(CanopyError):
    """A runtime cannot take a model over."""


class ScorePart(nn.Module):
    """Crops (1, 3, side, side) in 0..1 -> bin scores (1, bins, h, w), as `HeightModel` has them inside."""

    def __init__(self, model: HeightModel) -> None:
        super().__init__()
        self.encoder, self.decoder = model.encoder, model.decoder
        self.mean: Tensor
        self.std: Tensor
        self.register_buffer("mean", model.mean)
        self.register_buffer("std", model.std)
        self.pad_px = model.config.pad_px

    def forward(self, rgb: Tensor) -> Tensor:
        from canopy.models.height import pad_to_multiple

        padded = pad_to_multiple(rgb, self.pad_px)
        return self.decoder.scores(self.encoder((padded - self.mean) / self.std))


class LayerPart(nn.Module):
    """Bin scores (1, bins, h, w) -> the layers `outputs` (1, len(outputs), side, side) in metres."""

    def __init__(self, model: HeightModel, outputs: tuple[str, ...]) -> None:
        super().__init__()
        self.model, self.outputs = model, outputs
        self.side = model.config.crop_px
        padded = self.side + -self.side % model.config.pad_px
        self.size = padded, padded

    def forward(self, scores: Tensor) -> Tensor:
        return self.model.layers_of(scores, self.outputs, self.size)[..., : self.side, : self.side]


def parts_of(model: HeightModel, outputs: tuple[str, ...]) -> tuple[ScorePart, LayerPart]:
    """Both parts, on the CPU in eval mode; they share the model's weights and leave the model as it is."""
    cpu = model if next(model.parameters()).device.type == "cpu" else copy.deepcopy(model).cpu()
    shared = {id(t): t for t in [*cpu.parameters(), *cpu.buffers()]}
    own = copy.deepcopy(cpu, shared).eval()  # new modules round the same tensors
    own.stretch = None
    if own.config.encoder.family != "cnn":
        _fix_positions(own)
    return ScorePart(own).eval(), LayerPart(own, outputs).eval()


def example(model: HeightModel) -> Tensor:
    """A crop to trace with, (1, 3, side, side): any values do."""
    side = model.config.crop_px
    return torch.linspace(0, 1, 3 * side * side).view(1, 3, side, side)


def _fix_positions(model: HeightModel) -> None:
    """Compute what depends on the crop's size alone: runtimes stumble over resizing position tables."""
    config = model.config
    tokens = (config.crop_px + -config.crop_px % config.pad_px) // config.patch_px
    vit: Any = model.encoder.vit
    if config.encoder.family == "rope":
        table = vit.rope.get_embed(shape=(tokens, tokens)).detach().clone()
        vit.rope = _Constant(table)
        return
    embedded: list[Tensor] = []
    # What the model itself adds to tokens of zeros is its position table at this size.
    with torch.no_grad():
        blank = torch.zeros(1, tokens, tokens, config.encoder.dim)
        embedded.append(vit._pos_embed(blank))
    prefix, first = [t for t in (vit.cls_token, vit.reg_token) if t is not None], vit.num_prefix_tokens
    table = embedded[0].clone()
    if vit.no_embed_class:
        table = table[:, first:]
    else:
        table[:, :first] -= torch.cat([t.detach() for t in prefix], dim=1)
    vit.pos_embed = nn.Parameter(table, requires_grad=False)
    if hasattr(vit.patch_embed, "grid_size"):
        vit.patch_embed.grid_size = (tokens, tokens)


class _Constant(nn.Module):
    """Stands for timm's rotary positions where only one size occurs."""

    def __init__(self, table: Tensor) -> None:
        super().__init__()
        self.register_buffer("table", table)

    def get_embed(self, shape: object = None) -> Tensor | nn.Module:
        return self.table


@contextmanager
def tracing() -> Iterator[None]:
    """Surroundings in which parts are traced: no gradients, no tracer warnings, rotations all can follow."""
    from timm.layers import pos_embed_sincos as rotary

    with _tracing, torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs, rotary.rot = rotary.rot, _rotate
        try:
            yield
        finally:
            rotary.rot = theirs


def _rotate(x: Tensor) -> Tensor:
    """timm's `rot` of interleaved pairs, (a, b) -> (-b, a), the same bits without strided slices."""
    side = x.shape[-1]
    order = torch.arange(side).view(-1, 2).flip(-1).reshape(-1)
    sign = torch.tensor([-1.0, 1.0], dtype=x.dtype).repeat(side // 2)
    return x.index_select(-1, order.to(x.device)) * sign.to(x.device)


def weights_sha256(model: HeightModel) -> str:
    """Hash of what a model computes: its configuration and every tensor, in float32.

    Not the file's: a model may have been changed since it was loaded, and must not get another's conversion.
    """
    # Only what differs from the defaults: a field that is added later changes nothing of older models.
    told = _differences(model.config.to_dict(), ModelConfig().to_dict())
    digest = hashlib.sha256(json.dumps(told, sort_keys=True).encode())
    for name, tensor in sorted(model.state_dict().items()):
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
