"""The published models in their original layouts, with random weights, and v1 as plain arithmetic.

Names and shapes are written down here from the description of the releases, not derived from canopy's own
tables, so that the two can disagree. Loaded by path from the tests (there are no packages under tests/).
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

MEAN, STD = (0.420, 0.411, 0.296), (0.213, 0.156, 0.143)


class Random:
    """Tensors of a size at which a deep network neither dies nor explodes."""

    def __init__(self, seed: int) -> None:
        self.generator = torch.Generator().manual_seed(seed)

    def __call__(self, *shape: int, scale: float | None = None, about: float = 0.0) -> Tensor:
        fan_in = max(1, torch.Size(shape[1:]).numel()) if len(shape) > 1 else 25
        scale = fan_in**-0.5 if scale is None else scale
        return about + scale * torch.randn(*shape, generator=self.generator)


def _blocks(random: Random, prefix: str, dim: int, depth: int, mask: bool) -> dict[str, Tensor]:
    state = {}
    for i in range(depth):
        b = f"{prefix}blocks.{i}."
        for norm in ("norm1", "norm2"):
            state[f"{b}{norm}.weight"] = random(dim, scale=0.1, about=1.0)
            state[f"{b}{norm}.bias"] = random(dim, scale=0.1)
        for name, out, into in (
            ("attn.qkv", 3 * dim, dim),
            ("attn.proj", dim, dim),
            ("mlp.fc1", 4 * dim, dim),
            ("mlp.fc2", dim, 4 * dim),
        ):
            state[f"{b}{name}.weight"] = random(out, into)
            state[f"{b}{name}.bias"] = random(out, scale=0.1)
        if mask:
            keep = torch.ones(3, dim)
            keep[1] = 0.0
            state[f"{b}attn.qkv.bias_mask"] = keep.flatten()
        state[f"{b}ls1.gamma"] = random(dim, scale=0.02, about=0.2)
        state[f"{b}ls2.gamma"] = random(dim, scale=0.02, about=0.2)
    return state


def _head(
    random: Random, prefix: str, dim: int, post: tuple[int, ...], fusion: int, hidden: int, v1: bool
) -> dict[str, Tensor]:
    state: dict[str, Tensor] = {}

    def layer(name: str, *shape: int, bias: int | None = None) -> None:
        state[f"{prefix}{name}.weight"] = random(*shape)
        if bias is not None:
            state[f"{prefix}{name}.bias"] = random(bias, scale=0.1)

    for i, channels in enumerate(post):
        layer(f"reassemble_blocks.projects.{i}.conv", channels, dim, 1, 1, bias=channels)
        layer(f"reassemble_blocks.readout_projects.{i}.0", dim, 2 * dim, bias=dim)
        layer(f"convs.{i}.conv", fusion, channels, 3, 3)
        if i != 2:
            side = (4, 2, 1, 3)[i]
            layer(f"reassemble_blocks.resize_layers.{i}", channels, channels, side, side, bias=channels)
        layer(f"fusion_blocks.{i}.project.conv", fusion, fusion, 1, 1, bias=fusion)
        for unit in (1, 2) if i else (2,):
            for conv in (1, 2):
                name = f"fusion_blocks.{i}.res_conv_unit{unit}.conv{conv}.conv"
                layer(name, fusion, fusion, 3, 3, bias=None if v1 else fusion)
    if v1:
        layer("project.conv", fusion, fusion, 3, 3, bias=fusion)
    layer("conv_depth.head.0", fusion // 2, fusion, 3, 3, bias=fusion // 2)
    layer("conv_depth.head.2", hidden, fusion // 2, 3, 3, bias=hidden)
    layer("conv_depth.head.4", 256, hidden, 1, 1, bias=256)
    return state


def v1_state(
    dim: int, depth: int, post: tuple[int, ...], fusion: int = 256, hidden: int = 32, seed: int = 0
) -> dict[str, Tensor]:
    """`state_dict` of a v1 checkpoint."""
    random = Random(seed)
    state = {
        "backbone.cls_token": random(1, 1, dim, scale=0.5),
        "backbone.pos_embed": random(1, 197, dim, scale=0.3),
        "backbone.mask_token": random(1, dim),
        "backbone.patch_embed.proj.weight": random(dim, 3, 16, 16),
        "backbone.patch_embed.proj.bias": random(dim, scale=0.1),
    }
    state |= _blocks(random, "backbone.", dim, depth, mask=False)
    state |= {"backbone.norm.weight": random(dim, about=1.0), "backbone.norm.bias": random(dim)}
    return state | _head(random, "decode_head.", dim, post, fusion, hidden, v1=True)


def v2_states(
    dim: int,
    depth: int,
    heads: int,
    post: tuple[int, ...],
    fusion: int = 256,
    hidden: int = 128,
    seed: int = 0,
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Backbone and head state dicts of the original v2 files."""
    random = Random(seed)
    quarter = dim // heads // 4
    backbone = {
        "cls_token": random(1, 1, dim, scale=0.5),
        "storage_tokens": random(1, 4, dim, scale=0.5),
        "mask_token": random(1, dim),
        "patch_embed.proj.weight": random(dim, 3, 16, 16),
        "patch_embed.proj.bias": random(dim, scale=0.1),
        "rope_embed.periods": 100.0 ** (torch.arange(quarter, dtype=torch.float32) / quarter),
    }
    backbone |= _blocks(random, "", dim, depth, mask=True)
    for norm in ("norm", "local_cls_norm"):
        backbone |= {
            f"{norm}.weight": random(dim, scale=0.1, about=1.0),
            f"{norm}.bias": random(dim, scale=0.1),
        }
    return backbone, _head(random, "", dim, post, fusion, hidden, v1=False)


def hub_state(backbone: dict[str, Tensor], head: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same weights under the names of the hub edition."""
    state = {
        "backbone.embeddings.cls_token": backbone["cls_token"],
        "backbone.embeddings.register_tokens": backbone["storage_tokens"],
        "backbone.embeddings.mask_token": backbone["mask_token"].unsqueeze(0),
        "backbone.embeddings.patch_embeddings.weight": backbone["patch_embed.proj.weight"],
        "backbone.embeddings.patch_embeddings.bias": backbone["patch_embed.proj.bias"],
        "backbone.norm.weight": backbone["norm.weight"],
        "backbone.norm.bias": backbone["norm.bias"],
    }
    renamed = (("attn.proj", "attention.o_proj"), ("mlp.fc1", "mlp.up_proj"), ("mlp.fc2", "mlp.down_proj"),
               ("ls1.gamma", "layer_scale1.lambda1"), ("ls2.gamma", "layer_scale2.lambda1"))  # fmt: skip
    for name, value in backbone.items():
        if not name.startswith("blocks.") or name.endswith("bias_mask"):
            continue
        new = "backbone.model.layer." + name.removeprefix("blocks.")
        if ".attn.qkv." in name:
            for letter, third in zip("qkv", value.chunk(3), strict=True):
                if not (letter == "k" and name.endswith("bias")):
                    state[new.replace("attn.qkv", f"attention.{letter}_proj")] = third.clone()
            continue
        for old, modern in renamed:
            new = new.replace(old, modern)
        state[new] = value
    for name, value in head.items():
        new = name
        for old, modern in (
            ("reassemble_blocks.projects.", "reassemble_stage.layers."), ("reassemble_blocks.resize_layers.",
            "reassemble_stage.layers."), ("reassemble_blocks.", "reassemble_stage."),
            ("fusion_blocks.", "fusion_layers."), (".project.conv.", ".projection."),
            ("res_conv_unit", "residual_layer"), (".conv1.conv.", ".convolution1."),
            (".conv2.conv.", ".convolution2."),
        ):  # fmt: skip
            new = new.replace(old, modern)
        if "resize_layers" in name:
            stem, _, last = new.rpartition(".")
            new = f"{stem}.resize.{last}"
        if "reassemble_blocks.projects." in name:
            new = new.replace(".conv.", ".projection.")
        if name.startswith("convs."):
            new = new.replace(".conv.", ".")
        state[f"head.{new}"] = value
    return state


@torch.inference_mode()
def v1_forward(state: dict[str, Tensor], rgb: Tensor, heads: int, taps: tuple[int, ...]) -> Tensor:
    """v1 as arithmetic on its own state dict: RGB (B, 3, H, W) in 0..1 -> metres (B, 1, H, W)."""
    p, q = (lambda n: state[f"backbone.{n}"]), (lambda n: state.get(f"decode_head.{n}"))
    x = (rgb - torch.tensor(MEAN).view(1, 3, 1, 1)) / torch.tensor(STD).view(1, 3, 1, 1)
    x = functional.conv2d(x, p("patch_embed.proj.weight"), p("patch_embed.proj.bias"), stride=16)
    B, C, h, w = x.shape
    grid = p("pos_embed")[:, 1:].reshape(1, 14, 14, C).permute(0, 3, 1, 2)
    grid = functional.interpolate(grid, size=(h, w), mode="bicubic", align_corners=True)
    x = (x + grid).flatten(2).transpose(1, 2)
    x = torch.cat([(p("cls_token") + p("pos_embed")[:, :1]).expand(B, -1, -1), x], dim=1)
    features = []
    for i in range(max(taps) + 1):
        b = f"blocks.{i}."

        def norm(t: Tensor, which: str, b: str = b) -> Tensor:
            return functional.layer_norm(t, (C,), p(f"{b}{which}.weight"), p(f"{b}{which}.bias"), 1e-6)

        def linear(t: Tensor, which: str, b: str = b) -> Tensor:
            return functional.linear(t, p(f"{b}{which}.weight"), p(f"{b}{which}.bias"))

        qkv = linear(norm(x, "norm1"), "attn.qkv").reshape(B, -1, 3, heads, C // heads).permute(2, 0, 3, 1, 4)
        scores = (qkv[0] @ qkv[1].transpose(-2, -1)) * (C // heads) ** -0.5
        mixed = (scores.softmax(dim=-1) @ qkv[2]).transpose(1, 2).reshape(B, -1, C)
        x = x + p(f"{b}ls1.gamma") * linear(mixed, "attn.proj")
        x = x + p(f"{b}ls2.gamma") * linear(functional.gelu(linear(norm(x, "norm2"), "mlp.fc1")), "mlp.fc2")
        if i in taps:
            features.append(x)

    def conv(t: Tensor, name: str, padding: int = 0, stride: int = 1) -> Tensor:
        return functional.conv2d(t, q(f"{name}.weight"), q(f"{name}.bias"), stride=stride, padding=padding)

    def unit(t: Tensor, name: str) -> Tensor:
        inner = conv(functional.relu(t), f"{name}.conv1.conv", padding=1)
        return t + conv(functional.relu(inner), f"{name}.conv2.conv", padding=1)

    levels = []
    for i, tokens in enumerate(features):
        both = torch.cat([tokens[:, 1:], tokens[:, :1].expand(-1, h * w, -1)], dim=-1)
        name = f"reassemble_blocks.readout_projects.{i}.0"
        read = functional.gelu(functional.linear(both, q(f"{name}.weight"), q(f"{name}.bias")))
        level = conv(read.transpose(1, 2).reshape(B, C, h, w), f"reassemble_blocks.projects.{i}.conv")
        name = f"reassemble_blocks.resize_layers.{i}"
        if i < 2:
            level = functional.conv_transpose2d(
                level, q(f"{name}.weight"), q(f"{name}.bias"), stride=(4, 2)[i]
            )
        elif i == 3:
            level = conv(level, name, padding=1, stride=2)
        levels.append(conv(level, f"convs.{i}.conv", padding=1))
    fused = levels[3]
    for i in range(4):
        if i:
            fused = fused + unit(levels[3 - i], f"fusion_blocks.{i}.res_conv_unit1")
        fused = unit(fused, f"fusion_blocks.{i}.res_conv_unit2")
        fused = functional.interpolate(fused, scale_factor=2, mode="bilinear", align_corners=True)
        fused = conv(fused, f"fusion_blocks.{i}.project.conv")
    fused = functional.relu(conv(fused, "project.conv", padding=1))
    fused = conv(fused, "conv_depth.head.0", padding=1)
    fused = functional.interpolate(fused, scale_factor=2, mode="bilinear", align_corners=True)
    weights = functional.relu(
        conv(functional.relu(conv(fused, "conv_depth.head.2", padding=1)), "conv_depth.head.4")
    )
    weights = weights + 0.1
    weights = weights / weights.sum(dim=1, keepdim=True)
    return 10.0 * torch.einsum("bkhw,k->bhw", weights, torch.linspace(0.001, 10.0, 256)).unsqueeze(1)
