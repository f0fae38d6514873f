"""What the published canopy-height models are: sizes read from their tensors, facts that tensors cannot tell.

v1: Tolan et al. 2024, "Very high resolution canopy height maps from RGB imagery using self-supervised vision
transformer and convolutional decoder trained on aerial lidar" (arXiv 2304.07213).
v2: Brandt et al. 2026, "CHMv2: Improvements in Global Canopy Height Mapping using DINOv3" (arXiv 2603.06382).
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from canopy.config import Settings, validate_settings
from canopy.errors import CheckpointError, ConfigError
from canopy.models.config import DecoderConfig, EncoderConfig, ModelConfig
from canopy.models.foreign import ForeignFile
from canopy.models.radiometry import normal_percentiles

MEAN, STD = (0.420, 0.411, 0.296), (0.213, 0.156, 0.143)
# (release, channels, blocks) -> its name, attention heads, and the blocks whose output the decoder reads.
KNOWN: dict[tuple[str, int, int], tuple[str, int, tuple[int, ...]]] = {
    ("v1", 1280, 32): ("v1-huge", 20, (9, 16, 22, 29)),
    ("v1", 1024, 24): ("v1-large", 16, (4, 11, 17, 23)),
    ("v2", 1024, 24): ("v2-large", 16, (5, 11, 17, 23)),
}
# Of the imagery: the 2024 release worked at 0.5 m; DINOv3's satellite set (493 M images) has 0.6 m.
_GSD_M = {"v1": 0.5, "v2": 0.6}
_CROP_PX = {"v1": 256, "v2": 448}
# Both decoders stretch token grids with an odd side; 32 px are two tokens.
_MULTIPLE_PX = 32
_V2_SCALE = 8.0


class Given(Settings):
    """`--config FILE.json`: what tensors of unusual size cannot tell. Repeated sizes must agree."""

    num_heads: int | None = None
    taps: tuple[int, ...] | None = None
    mean: tuple[float, float, float] | None = None
    std: tuple[float, float, float] | None = None
    gsd_m: float | None = None
    crop_px: int | None = None
    rope_base: float | None = None
    rope_rescale_coords: float | None = None  # a training-time augmentation: without effect here
    embed_dim: int | None = None
    depth: int | None = None
    patch_size: int | None = None
    storage_tokens: int | None = None
    post_process_channels: tuple[int, ...] | None = None
    fusion_channels: int | None = None
    hidden_channels: int | None = None
    bins: int | None = None


def read_given(path: Path | None) -> dict[str, Any]:
    """The JSON of `--config`, unvalidated; empty without one.

    Raises:
        ConfigError: unreadable or not a JSON object.
    """
    if path is None:
        return {}
    try:
        raw = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ConfigError(f"cannot be read ({error})", where=path, expected="a JSON object") from error
    if not isinstance(raw, dict):
        raise ConfigError(f"holds a {type(raw).__name__}", where=path, expected="a JSON object")
    return raw


def config_v1(file: ForeignFile, raw: Mapping[str, Any]) -> tuple[str, ModelConfig]:
    """Name and config of a v1 model.

    Args:
        file: tensors named `backbone.*` and `decode_head.*`.
        raw: the `--config` object.

    Raises:
        CheckpointError: a size that is not published and whose heads or taps `raw` does not give.
        ConfigError: `raw` has unknown keys or disagrees with the tensors.
    """
    given = validate_settings(Given, raw, where="--config")
    encoder = EncoderConfig(**_vit_sizes(file, "backbone."), norm_taps=False, norm_eps=1e-6)
    positions = _shape(file, "backbone.pos_embed", 3)[1] - 1
    encoder = replace(encoder, pos_grid=math.isqrt(positions))
    decoder = DecoderConfig(
        **_head_sizes(file, "decode_head."), spacing="linear", bin_max=10.0, eps=0.1, scale=10.0
    )
    return _finished("v1", encoder, decoder, given, file)


def config_v2(file: ForeignFile, raw: Mapping[str, Any]) -> tuple[str, ModelConfig]:
    """Name and config of a v2 model in its original files; errors as `config_v1`."""
    given = validate_settings(Given, raw, where="--config")
    temperature = given.rope_base or 100.0
    periods = file.tensors["rope_embed.periods"].read() if "rope_embed.periods" in file.tensors else None
    encoder = EncoderConfig(
        **_vit_sizes(file, ""),
        family="rope",
        registers=_shape(file, "storage_tokens", 3)[1],
        norm_taps=True,
        norm_eps=1e-5,
        rope_temperature=temperature,
    )
    if periods is not None:
        # Four channels of a head share a period, so the periods tell the heads.
        encoder = replace(encoder, heads=max(1, encoder.dim // (4 * periods.numel())))
        if not _follows(periods, temperature):
            encoder = replace(encoder, rope_periods=tuple(periods.tolist()))
    decoder = DecoderConfig(**_head_sizes(file, ""), **_v2_bins(96.0))
    return _finished("v2", encoder, decoder, given, file)


def _v2_bins(max_m: float) -> dict[str, Any]:
    """Bins up to `max_m` metres, counted in units of 8 m."""
    return {
        "spacing": "blend",
        "bin_min": 0.001,
        "bin_max": max_m / _V2_SCALE,
        "eps": 1e-8,
        "scale": _V2_SCALE,
    }


def _follows(periods: torch.Tensor, temperature: float) -> bool:
    """Whether the periods are those that the temperature gives; some files store them rounded to bfloat16."""
    exact = temperature ** (torch.arange(periods.numel(), dtype=torch.float32) / periods.numel())
    return bool(torch.allclose(periods.float(), exact, rtol=1e-6, atol=0.0))


def _vit_sizes(file: ForeignFile, prefix: str) -> dict[str, Any]:
    dim, _, patch, _ = _shape(file, f"{prefix}patch_embed.proj.weight", 4)
    hidden = _shape(file, f"{prefix}blocks.0.mlp.fc1.weight", 2)[0]
    start = f"{prefix}blocks."
    numbers = {n.removeprefix(start).split(".")[0] for n in file.tensors if n.startswith(start)}
    return {
        "dim": dim,
        "patch": patch,
        "mlp_ratio": hidden / dim,
        "heads": 1,
        "depth": len(numbers),
        "taps": _evenly(len(numbers)),
    }


def _evenly(depth: int) -> tuple[int, ...]:
    """Four placeholder taps, replaced once the real ones are known."""
    if depth < 4:
        raise CheckpointError(f"the backbone has {depth} blocks", expected="at least four")
    return (depth - 4, depth - 3, depth - 2, depth - 1)


def _head_sizes(file: ForeignFile, prefix: str) -> dict[str, Any]:
    names = [f"{prefix}reassemble_blocks.projects.{i}.conv.weight" for i in range(4)]
    return {
        "post_channels": tuple(_shape(file, name, 4)[0] for name in names),
        "fusion": _shape(file, f"{prefix}convs.0.conv.weight", 4)[0],
        "hidden": _shape(file, f"{prefix}conv_depth.head.2.weight", 4)[0],
        "bins": _shape(file, f"{prefix}conv_depth.head.4.weight", 4)[0],
        "project_after_fusion": f"{prefix}project.conv.weight" in file.tensors,
        "unit_bias": f"{prefix}fusion_blocks.1.res_conv_unit1.conv1.conv.bias" in file.tensors,
    }


def _shape(file: ForeignFile, name: str, ndim: int) -> tuple[int, ...]:
    if name not in file.tensors:
        raise CheckpointError(f"missing {name}", where=file.where, expected="a whole checkpoint")
    shape = file.tensors[name].shape
    if len(shape) != ndim:
        raise CheckpointError(f"{name} has shape {shape}", where=file.where, expected=f"{ndim} dimensions")
    return shape


def _finished(
    release: str, encoder: EncoderConfig, decoder: DecoderConfig, given: Given, file: ForeignFile
) -> tuple[str, ModelConfig]:
    """Add heads and taps, from the published sizes or from `given`, and what a whole release shares."""
    _check_agreement(encoder, decoder, given)
    name, heads, taps = KNOWN.get(
        (release, encoder.dim, encoder.depth), (f"{release}-{encoder.dim}x{encoder.depth}", None, None)
    )
    heads = given.num_heads or heads or (encoder.heads if encoder.heads > 1 else None)
    taps = given.taps or taps
    if heads is None or taps is None:
        raise CheckpointError(
            f"a {release} model of {encoder.dim} channels and {encoder.depth} blocks is not a published "
            "size, and its tensors do not tell its attention heads and taps",
            where=file.where,
            remedy='give --config FILE.json with "num_heads" and "taps"',
        )
    if max(taps) >= encoder.depth:
        raise ConfigError(f"taps {list(taps)} in {encoder.depth} blocks", where="--config")
    # Blocks behind the last tap are never run.
    encoder = replace(encoder, heads=heads, taps=tuple(taps), depth=max(taps) + 1)
    mean, std = given.mean or MEAN, given.std or STD
    return name, ModelConfig(
        gsd_m=given.gsd_m or _GSD_M[release],
        crop_px=given.crop_px or _CROP_PX[release],
        mean=mean,
        std=std,
        multiple_px=max(_MULTIPLE_PX, 2 * encoder.patch),
        percentiles=normal_percentiles(mean, std),
        encoder=encoder,
        decoder=decoder,
    )


def _check_agreement(encoder: EncoderConfig, decoder: DecoderConfig, given: Given) -> None:
    found = {
        "embed_dim": encoder.dim,
        "depth": encoder.depth,
        "patch_size": encoder.patch,
        "storage_tokens": encoder.registers,
        "post_process_channels": decoder.post_channels,
        "fusion_channels": decoder.fusion,
        "hidden_channels": decoder.hidden,
        "bins": decoder.bins,
    }
    for name, size in found.items():
        said = getattr(given, name)
        if said is not None and said != size:
            raise ConfigError(f"{name} is {said}, but the tensors have {size}", where="--config")
