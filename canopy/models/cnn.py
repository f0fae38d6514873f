"""The conventional rival: a convolutional network of timm's and a U-Net decoder, behind the same HeightModel.

After Ronneberger, Fischer, Brox 2015, "U-Net" (arXiv 1505.04597), with the encoder replaced by a residual
network, as has been usual in remote sensing since. It ends in the same weights over height bins.
"""

from __future__ import annotations

from typing import Any

import timm
import torch
from torch import Tensor, nn
from torch.nn import functional

from canopy.errors import ConfigError
from canopy.models.config import CNN_PATCH_PX, DecoderConfig, EncoderConfig
from canopy.models.decoder import Head
from canopy.models.encoder import Features


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


class UpStep(nn.Module):
    """Double the scale, add the encoder's map of that scale as further channels, two 3x3 convolutions."""

    def __init__(self, before: int, skip: int, width: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(before + skip, width, 3, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(width)

    def forward(self, x: Tensor, skip: Tensor) -> Tensor:
        x = functional.interpolate(x, size=skip.shape[-2:], mode="nearest")
        x = torch.relu(self.norm1(self.conv1(torch.cat([x, skip], dim=1))))
        return torch.relu(self.norm2(self.conv2(x)))


class UNetDecoder(nn.Module):
    """`Features` of a CnnEncoder -> raw bin scores, at half the image's scale (head 'half') or at its own.

    `config.post_channels` are the widths of the up-steps at 1/2, 1/4, 1/8 and 1/16; `config.fusion` is
    not used.
    """

    def __init__(self, config: DecoderConfig, channels: list[int]) -> None:
        super().__init__()
        self.config = config
        skips, widths = channels[-2::-1], config.post_channels[::-1]  # deep to shallow
        befores = [channels[-1], *widths[:-1]]
        self.steps = nn.ModuleList(UpStep(b, s, w) for b, s, w in zip(befores, skips, widths, strict=True))
        self.head = Head(config.replaced(fusion=config.post_channels[0]))

    def forward(self, features: Features) -> Tensor:
        *skips, x = features.maps
        for step, skip in zip(self.steps, reversed(skips), strict=True):
            x = step(x, skip)
        return self.head(x)
