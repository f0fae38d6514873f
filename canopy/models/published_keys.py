"""From canopy's parameter names to those of the published checkpoints, and back to tensors.

Names are derived, not listed: every parameter of a `HeightModel` says which original tensors it is made of
(`parts`). Whatever else a checkpoint holds must be on the short list of tensors known to be of no use, each
with its reason; anything beyond that is an error.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from canopy.models.foreign import ForeignFile

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
