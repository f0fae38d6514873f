"""Encoders: a timm vision transformer whose inner features are tapped, or a timm convolutional network."""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple, cast

import timm
import torch
from timm.models.eva import Eva, EvaAttention
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.nn import functional

from canopy.errors import ConfigError
from canopy.models.config import CNN_PATCH_PX, EncoderConfig


class Features(NamedTuple):
    """What the decoder gets.

    Attributes:
        maps: four tensors (B, dim, H/patch, W/patch), shallow to deep.
        class_tokens: four tensors (B, dim), the class token after the same blocks.
        pyramid: the stem's maps at 1/2, 1/4 and 1/8 of the image; empty without a stem.
    """

    maps: list[Tensor]
    class_tokens: list[Tensor]
    pyramid: list[Tensor]


class Tokens(NamedTuple):
    """What pretraining gets: the last block's tokens after the final norm (where the config has one).

    Attributes:
        class_token: (B, dim).
        patches: (B, n, dim), row by row; n is rows * cols, or those that were kept.
    """

    class_token: Tensor
    patches: Tensor


class AlignedViT(VisionTransformer):
    """timm's ViT with positions resized bicubically, corners aligned, as the 2024 release was trained."""

    def _pos_embed(self, x: Tensor) -> Tensor:
        B, H, W, C = x.shape
        learned = self.pos_embed
        if learned is None:  # timm allows it, this class does not
            raise RuntimeError("AlignedViT needs learned positions")
        prefix = 0 if self.no_embed_class else self.num_prefix_tokens
        side = int((learned.shape[1] - prefix) ** 0.5)
        grid = learned[:, prefix:].reshape(1, side, side, C).permute(0, 3, 1, 2)
        if (side, side) != (H, W):
            grid = functional.interpolate(grid, size=(H, W), mode="bicubic", align_corners=True)
        tokens = x.reshape(B, H * W, C) + grid.flatten(2).transpose(1, 2)
        first = [t.expand(B, -1, -1) for t in (self.cls_token, self.reg_token) if t is not None]
        head = torch.cat(first, dim=1)
        if prefix:
            head = head + learned[:, :prefix]
        return self.pos_drop(torch.cat([head, tokens], dim=1))


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions with batch norm around a skip (He et al. 2016); keeps the shape."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        inner = torch.relu(self.norm1(self.conv1(x)))
        return torch.relu(x + self.norm2(self.conv2(inner)))


class ConvStem(nn.Module):
    """Image -> maps at 1/2, 1/4 and 1/8 scale: a stride-2 convolution and a residual block each."""

    def __init__(self, bands: int, channels: tuple[int, ...]) -> None:
        super().__init__()
        stages, before = [], bands
        for width in channels:
            down = nn.Conv2d(before, width, 3, stride=2, padding=1, bias=False)
            stages.append(nn.Sequential(down, nn.BatchNorm2d(width), nn.ReLU(), ResidualBlock(width)))
            before = width
        self.stages = nn.ModuleList(stages)

    def forward(self, x: Tensor) -> list[Tensor]:
        maps = []
        for stage in self.stages:
            x = stage(x)
            maps.append(x)
        return maps


def _build(config: EncoderConfig, bands: int, patch: int) -> VisionTransformer | Eva:
    """timm's transformer of a config; `bands` and `patch` are those of what it reads, stem or image."""
    shared: dict[str, Any] = {
        "img_size": patch * config.pos_grid,
        "patch_size": patch,
        "in_chans": bands,
        "num_classes": 0,
        "global_pool": "",
        "embed_dim": config.dim,
        "depth": config.depth,
        "num_heads": config.heads,
        "mlp_ratio": config.mlp_ratio,
        "qkv_bias": config.qkv_bias,
        "init_values": config.layer_scale,
        "dynamic_img_size": True,
        "drop_path_rate": config.drop_path,
        "norm_layer": partial(nn.LayerNorm, eps=config.norm_eps),
    }
    if config.family == "vit":
        plain = AlignedViT if config.pos_resize == "bicubic_aligned" else VisionTransformer
        return plain(**shared, reg_tokens=config.registers, no_embed_class=not config.pos_embed_prefix)
    vit = Eva(
        **shared,
        num_reg_tokens=config.registers,
        use_abs_pos_emb=False,
        use_rot_pos_emb=True,
        rope_type=config.rope_type,
        rope_temperature=config.rope_temperature,
        rope_rotate_half=config.rope_rotate_half,
        use_fc_norm=False,
    )
    if config.k_bias:  # timm keeps zeros there, outside the state
        for module in vit.modules():
            if isinstance(module, EvaAttention):
                module.register_buffer("k_bias", torch.zeros(config.dim), persistent=True)
    if config.rope_periods:
        vit.rope.get_buffer("periods").copy_(torch.tensor(config.rope_periods))
    return vit


class Encoder(nn.Module):
    """Normalised image (B, bands, H, W), sides multiples of the patch -> `Features`.

    State-dict keys: `vit.*` are timm's own names; `stem.*` only where the config has a stem.
    """

    def __init__(self, config: EncoderConfig, bands: int = 3) -> None:
        super().__init__()
        self.config = config
        self.stem = ConvStem(bands, config.stem) if config.stem else None
        # Behind a stem the transformer reads its 1/8 map, so that its tokens still cover `patch` pixels.
        channels, patch = (config.stem[-1], config.patch // 8) if config.stem else (bands, config.patch)
        self.vit = _build(config, channels, patch)
        if not config.norm_taps:
            self.vit.norm = nn.Identity()  # never reached: keep dead weights out of checkpoints

    def forward(self, x: Tensor) -> Features:
        pyramid = self.stem(x) if self.stem is not None else []
        taps = cast(
            list[tuple[Tensor, Tensor]],
            self.vit.forward_intermediates(
                pyramid[-1] if pyramid else x,
                indices=list(self.config.taps),
                return_prefix_tokens=True,
                norm=self.config.norm_taps,
                stop_early=True,
                intermediates_only=True,
            ),
        )
        return Features([m for m, _ in taps], [prefix[:, 0] for _, prefix in taps], pyramid)

    def tokens(
        self,
        x: Tensor,
        mask: Tensor | None = None,
        mask_token: Tensor | None = None,
        keep: Tensor | None = None,
    ) -> Tokens:
        """The last block's tokens, for pretraining; patches can be hidden, and then stay hidden.

        A convolutional stem sees across patch borders, so hidden patches are blanked in the image itself (0,
        the mean colour of a normalised image) before the stem; a `mask_token` takes their place after the
        patch embedding. With `keep` the hidden tokens are dropped instead, positions of the others kept.

        Args:
            x: normalised image (B, bands, H, W), sides multiples of the patch.
            mask: bool (B, rows * cols), True = hidden.
            mask_token: (dim,), goes where `mask` is True.
            keep: whole numbers (B, k), the patches that are not dropped; they should be those not masked.
        """
        vit, patch = self.vit, self.config.patch
        rows, cols = x.shape[-2] // patch, x.shape[-1] // patch
        if mask is not None:
            hidden = mask.reshape(-1, 1, rows, 1, cols, 1).expand(-1, 1, -1, patch, -1, patch)
            x = x.masked_fill(hidden.reshape(-1, 1, *x.shape[-2:]), 0)
        embedded = vit.patch_embed(self.stem(x)[-1] if self.stem is not None else x)  # (B, rows, cols, dim)
        if mask is not None and mask_token is not None:
            here = mask.reshape(-1, rows, cols, 1)
            embedded = torch.where(here, mask_token.to(embedded.dtype), embedded)
        placed = vit._pos_embed(embedded)  # adds the class token and the registers
        h, rope = placed if isinstance(placed, tuple) else (placed, None)
        first = vit.num_prefix_tokens
        if keep is not None:
            kept = h[:, first:].gather(1, keep[..., None].expand(-1, -1, h.shape[-1]))
            h = torch.cat([h[:, :first], kept], dim=1)
            rope = None if rope is None else rope[keep][:, None]  # (B, 1 for all heads, k, channels)
        h = vit.norm_pre(h)
        for block in vit.blocks:
            h = block(h) if rope is None else block(h, rope=rope)
        h = vit.norm(h)
        return Tokens(h[:, 0], h[:, first:])


class CnnEncoder(nn.Module):
    """Normalised image (B, bands, H, W), sides multiples of 32 -> its maps at 1/2, 1/4, 1/8, 1/16 and 1/32.

    State-dict keys: `net.*` are timm's own names.

    Raises:
        ConfigError: timm has no such network, it has no five scales, or it takes no `widths`.
    """

    def __init__(self, config: EncoderConfig, bands: int = 3) -> None:
        super().__init__()
        self.config = config
        # A name with a prefix ("hf-hub:...") would make timm fetch what a config names.
        if not config.network.replace("_", "").isalnum() or not timm.is_model(config.network):
            raise ConfigError(
                f"encoder network {config.network!r} is unknown", expected="a timm name such as 'resnet18'"
            )
        options: dict[str, Any] = {"channels": config.widths} if config.widths else {}
        try:
            net: Any = timm.create_model(
                config.network,
                pretrained=False,
                features_only=True,
                in_chans=bands,
                drop_path_rate=config.drop_path,
                **options,
            )
        except (TypeError, RuntimeError, AttributeError) as error:
            raise ConfigError(f"encoder network {config.network!r} cannot be built ({error})") from error
        scales = list(net.feature_info.reduction())
        if scales != [2, 4, 8, 16, CNN_PATCH_PX]:
            raise ConfigError(
                f"{config.network} has maps at 1/{scales}", expected="maps at 1/2, 1/4, 1/8, 1/16 and 1/32"
            )
        self.net = net
        self.channels: list[int] = list(net.feature_info.channels())

    def forward(self, x: Tensor) -> Features:
        return Features(list(self.net(x)), [], [])
