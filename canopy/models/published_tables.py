"""Reading other people's weight files without running their code, and without holding them in memory.

Pickles are opened with `weights_only=True`, always; whatever else a file needs is refused by name. Tensors
stay in the file (memory-mapped) until they are asked for one by one, so a conversion never holds two models.

From canopy's parameter names to those of the published checkpoints, and back to tensors.

Names are derived, not listed: every parameter of a `HeightModel` says which original tensors it is made of
(`parts`). Whatever else a checkpoint holds must be on the short list of tensors known to be of no use, each
with its reason; anything beyond that is an error.

What the published canopy-height models are: sizes read from their tensors, facts that tensors cannot tell.

v1: Tolan et al. 2024, "Very high resolution canopy height maps from RGB imagery using self-supervised vision
transformer and convolutional decoder trained on aerial lidar" (arXiv 2304.07213).
v2: Brandt et al. 2026, "CHMv2: Improvements in Global Canopy Height Mapping using DINOv3" (arXiv 2603.06382).
"""

from __future__ import annotations

import io
import json
import math
import pickle
import re
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from canopy.config import Settings, validate_settings
from canopy.errors import CheckpointError, ConfigError
from canopy.models.config import DecoderConfig, EncoderConfig, ModelConfig
from canopy.models.height import normal_percentiles

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


Shape = tuple[int, ...]


@dataclass(frozen=True)
class Part:
    """One parameter of ours, made of tensors of theirs.

    Attributes:
        sources: original names with the shapes they must have.
        combine: the original tensors, in order -> ours.
    """

    sources: Mapping[str, Shape]
    combine: Callable[..., Tensor] = lambda tensor: tensor


# Decoder: ours, the original files' and the hub edition's names. v1 puts `decode_head.` before the original.
_DECODER = (
    (
        r"decoder\.reassemble\.(\d)\.readout\.linear\.",
        r"reassemble_blocks.readout_projects.\1.0.",
        r"head.reassemble_stage.readout_projects.\1.0.",
    ),
    (
        r"decoder\.reassemble\.(\d)\.project\.",
        r"reassemble_blocks.projects.\1.conv.",
        r"head.reassemble_stage.layers.\1.projection.",
    ),
    (
        r"decoder\.reassemble\.(\d)\.resize\.",
        r"reassemble_blocks.resize_layers.\1.",
        r"head.reassemble_stage.layers.\1.resize.",
    ),
    (r"decoder\.lateral\.(\d)\.", r"convs.\1.conv.", r"head.convs.\1."),
    (
        r"decoder\.fusions\.(\d)\.unit(\d)\.conv(\d)\.",
        r"fusion_blocks.\1.res_conv_unit\2.conv\3.conv.",
        r"head.fusion_layers.\1.residual_layer\2.convolution\3.",
    ),
    (
        r"decoder\.fusions\.(\d)\.out\.",
        r"fusion_blocks.\1.project.conv.",
        r"head.fusion_layers.\1.projection.",
    ),
    (r"decoder\.project\.", r"project.conv.", r"head.project."),
    (r"decoder\.head\.conv1\.", r"conv_depth.head.0.", r"head.conv_depth.head.0."),
    (r"decoder\.head\.conv2\.", r"conv_depth.head.2.", r"head.conv_depth.head.2."),
    (r"decoder\.head\.conv3\.", r"conv_depth.head.4.", r"head.conv_depth.head.4."),
)
_V2_ENCODER = ((r"reg_token$", "storage_tokens"), (r"\.gamma_(\d)$", r".ls\1.gamma"))
_HUB_ENCODER = (
    (r"^cls_token$", "embeddings.cls_token"),
    (r"^reg_token$", "embeddings.register_tokens"),
    (r"^patch_embed\.proj\.", "embeddings.patch_embeddings."),
    (r"\.gamma_(\d)$", r".layer_scale\1.lambda1"),
    (r"\.attn\.proj\.", ".attention.o_proj."),
    (r"\.mlp\.fc1\.", ".mlp.up_proj."),
    (r"\.mlp\.fc2\.", ".mlp.down_proj."),
)
_PRETRAINING = "only used while the backbone was pretrained"
_NEVER_RUN = "never run: behind the last tapped block"
_UNUSED: dict[str, tuple[tuple[str, str], ...]] = {
    "v1": (
        (r"backbone\.mask_token$", _PRETRAINING),
        (r"backbone\.norm\.(weight|bias)$", "the decoder reads features from before the final norm"),
        (
            r"decode_head\.fusion_blocks\.0\.res_conv_unit1\..*",
            "never run: the deepest level has nothing to add",
        ),
    ),
    "v2": (
        (r"mask_token$", _PRETRAINING),
        (r"local_cls_norm\.(weight|bias)$", _PRETRAINING),
        (r"rope_embed\.periods$", "kept in the config, or equal to what the temperature gives"),
        (r"blocks\.\d+\.attn\.qkv\.bias_mask$", "applied to the bias"),
        (r"fusion_blocks\.0\.res_conv_unit1\..*", "never run: the deepest level has nothing to add"),
    ),
    "hub": (
        (r"backbone\.embeddings\.mask_token$", _PRETRAINING),
        (r"backbone\.(model\.)?rope_embeddings\.inv_freq$", "computed from the config's rope_theta"),
    ),
}
_BLOCK = {
    "v1": r"backbone\.blocks\.(\d+)\.",
    "v2": r"blocks\.(\d+)\.",
    "hub": r"backbone\.(?:model\.)?layer\.(\d+)\.",
}


def parts(layout: str, shapes: Mapping[str, Shape], file: ForeignFile) -> dict[str, Part]:
    """What each of our parameters is made of.

    Args:
        layout: 'v1', 'v2' (original files) or 'hub'.
        shapes: names and shapes of our parameters.
        file: the checkpoint; only tells which spelling of a layout it uses.
    """
    return {name: _part(layout, name, shape, file) for name, shape in shapes.items()}


def _part(layout: str, name: str, shape: Shape, file: ForeignFile) -> Part:
    if name.startswith("decoder."):
        prefix = "decode_head." if layout == "v1" else ""
        for ours, original, hub in _DECODER:
            theirs, count = re.subn("^" + ours, hub if layout == "hub" else prefix + original, name)
            if count:
                return Part({theirs: shape})
        raise ValueError(f"no rule for {name}")
    inner = name.removeprefix("encoder.vit.")
    if layout == "v1":
        return Part({f"backbone.{inner}": shape})
    block = re.match(r"blocks\.(\d+)\.attn\.(qkv\.weight|[qkv]_bias)$", inner)
    if block:
        rule = _hub_attention if layout == "hub" else _v2_attention
        return rule(int(block[1]), block[2], shape, file)
    for ours, theirs in _HUB_ENCODER if layout == "hub" else _V2_ENCODER:
        inner = re.sub(ours, theirs, inner)
    return Part({f"backbone.{_hub_block(inner, file)}" if layout == "hub" else inner: shape})


def _hub_block(name: str, file: ForeignFile) -> str:
    """`blocks.3.x` -> `layer.3.x` or, in files of newer transformers, `model.layer.3.x`."""
    newer = any(known.startswith("backbone.model.layer.") for known in file.tensors)
    return re.sub(r"^blocks\.", "model.layer." if newer else "layer.", name)


def _v2_attention(block: int, what: str, shape: Shape, file: ForeignFile) -> Part:
    base = f"blocks.{block}.attn.qkv"
    if what == "qkv.weight":
        return Part({f"{base}.weight": shape})
    third = "qkv".index(what[0])
    whole: Shape = (3 * shape[0],)
    sources: dict[str, Shape] = {f"{base}.bias": whole} | (
        {f"{base}.bias_mask": whole} if f"{base}.bias_mask" in file.tensors else {}
    )
    return Part(sources, lambda *tensors: masked_bias(*tensors).chunk(3)[third])


def masked_bias(bias: Tensor, mask: Tensor | None = None) -> Tensor:
    """The bias that acts: zero where the mask is zero, whatever the file holds there (it may be NaN)."""
    return bias if mask is None else torch.where(mask == 0, torch.zeros_like(bias), bias * mask)


def _hub_attention(block: int, what: str, shape: Shape, file: ForeignFile) -> Part:
    base = "backbone." + _hub_block(f"blocks.{block}.attention.", file)
    if what == "qkv.weight":
        each = (shape[0] // 3, *shape[1:])
        return Part({f"{base}{k}_proj.weight": each for k in "qkv"}, lambda *tensors: torch.cat(tensors))
    return Part({f"{base}{what[0]}_proj.bias": shape})


def unused(layout: str, depth: int, file: ForeignFile) -> dict[str, str]:
    """Tensors of the checkpoint that the model does without, each with its reason.

    Args:
        depth: blocks that the model runs.
    """
    reasons = {}
    for name in file.tensors:
        block = re.match(_BLOCK[layout], name)
        if block and int(block[1]) >= depth:
            reasons[name] = _NEVER_RUN
        for pattern, reason in _UNUSED[layout]:
            if re.match(pattern, name):
                reasons[name] = reason
        if layout == "hub" and name.endswith(".k_proj.bias"):
            reasons.setdefault(name, "zero everywhere")
    return reasons


def key_bias_in_use(layout: str, file: ForeignFile) -> bool:
    """Whether any attention key has a bias other than zero."""
    for name, tensor in file.tensors.items():
        if layout == "hub" and name.endswith(".k_proj.bias"):
            bias = tensor.read()
        elif layout == "v2" and name.endswith(".attn.qkv.bias"):
            mask = file.tensors.get(f"{name}_mask")
            bias = masked_bias(tensor.read(), mask.read() if mask else None).chunk(3)[1]
        else:
            continue
        if bool((bias != 0).any()):
            return True
    return False


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
