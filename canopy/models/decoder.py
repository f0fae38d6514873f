"""Height bins, and the decoders that end in scores of them.

For transformers: DPT, after Ranftl, Bochkovskiy, Koltun 2021, "Vision Transformers for Dense Prediction"
(arXiv 2103.13413): reassemble the tokens at four scales, fuse from coarse to fine through residual
convolution units, and end in a small convolutional head. For convolutional networks, the conventional rival:
a U-Net after Ronneberger, Fischer, Brox 2015 (arXiv 1505.04597), whose encoder is a residual network, as has
been usual in remote sensing since.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from canopy.models.config import DecoderConfig
from canopy.models.encoder import Features


def bin_centres(config: DecoderConfig) -> Tensor:
    """Centres (bins,), float32, in units of `config.scale` metres, rising.

    'linear' and 'log' are evenly spaced in x and log x. 'blend' is t*log + (1-t)*linear with t falling
    evenly from 1 at the first bin to 0 at the last (CHMv2, arXiv 2603.06382): fine steps near the
    ground without the huge last steps of a logarithm.
    """
    low, high, count = config.bin_min, config.bin_max, config.bins
    linear = torch.linspace(low, high, count)
    if config.spacing == "linear":
        return linear
    floor = max(low, 1e-3)  # a logarithm has no zero
    # On the CPU even where a model is only outlined on the meta device: these two are read as numbers.
    first, last = (float(torch.tensor(v, device="cpu").log()) for v in (floor, high))
    log = torch.exp(torch.linspace(first, last, count))
    if config.spacing == "log":
        return log
    t = torch.linspace(1.0, 0.0, count)
    return t * log + (1.0 - t) * linear


def bin_weights(scores: Tensor, config: DecoderConfig) -> Tensor:
    """Scores (B, bins, H, W) -> non-negative weights that sum to 1 over the bins."""
    if config.weights == "softmax":
        return torch.softmax(scores, dim=1)
    positive = torch.relu(scores) + config.eps
    return positive / positive.sum(dim=1, keepdim=True)


def moments(weights: Tensor, centres: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Weighted mean and spread in metres, both (B, 1, H, W).

    The spread is the standard deviation of the bin distribution, sqrt(sum w (bin - mean)^2): how unsure
    the network is between heights. It is not yet a calibrated interval.
    """
    mean = torch.einsum("bkhw,k->bhw", weights, centres).unsqueeze(1)
    square = torch.einsum("bkhw,k->bhw", weights, centres * centres).unsqueeze(1)
    # E[x^2] - mean^2 avoids a (B, bins, H, W) temporary; rounding may dip below zero.
    spread = torch.sqrt((square - mean * mean).clamp_min(0.0))
    return scale * mean, scale * spread


class Readout(nn.Module):
    """Class-token readout 'project': each token sees the class token through a linear layer and GELU."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.linear = nn.Linear(2 * dim, dim)

    def forward(self, tokens: Tensor, class_token: Tensor) -> Tensor:
        B, C, H, W = tokens.shape
        flat = tokens.flatten(2).transpose(1, 2)  # (B, H*W, C)
        both = torch.cat([flat, class_token.unsqueeze(1).expand_as(flat)], dim=2)
        return functional.gelu(self.linear(both)).transpose(1, 2).reshape(B, C, H, W)


class Reassemble(nn.Module):
    """One tap (B, dim, h, w) -> (B, channels, factor*h, factor*w), factor 4, 2, 1 or 0.5."""

    def __init__(self, dim: int, channels: int, factor: float) -> None:
        super().__init__()
        self.readout = Readout(dim)
        self.project = nn.Conv2d(dim, channels, 1)
        self.resize: nn.Module
        if factor > 1:
            self.resize = nn.ConvTranspose2d(channels, channels, int(factor), stride=int(factor))
        elif factor == 1:
            self.resize = nn.Identity()
        else:
            self.resize = nn.Conv2d(channels, channels, 3, stride=2, padding=1)

    def forward(self, tokens: Tensor, class_token: Tensor) -> Tensor:
        return self.resize(self.project(self.readout(tokens, class_token)))


def conv3x3(config: DecoderConfig, inner: int, outer: int, bias: bool = True) -> nn.Module:
    """A 3x3 convolution that keeps the size, in one piece or separable."""
    if not config.separable:
        return nn.Conv2d(inner, outer, 3, padding=1, bias=bias)
    each = nn.Conv2d(inner, inner, 3, padding=1, groups=inner, bias=False)
    return nn.Sequential(each, nn.Conv2d(inner, outer, 1, bias=bias))


class ResidualUnit(nn.Module):
    """Pre-activation residual unit of RefineNet: x + conv(relu(conv(relu(x))))."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        width = config.fusion
        self.conv1 = conv3x3(config, width, width, config.unit_bias)
        self.conv2 = conv3x3(config, width, width, config.unit_bias)
        self.norm1 = nn.BatchNorm2d(width) if config.unit_norm else nn.Identity()
        self.norm2 = nn.BatchNorm2d(width) if config.unit_norm else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        # relu must not work in place: the skip needs x as it was
        inner = self.norm1(self.conv1(torch.relu(x)))
        return x + self.norm2(self.conv2(torch.relu(inner)))


class Fusion(nn.Module):
    """Add a finer map into the running one, refine, upsample to `size`, mix channels."""

    def __init__(self, config: DecoderConfig, first: bool) -> None:
        super().__init__()
        width = config.fusion
        # The deepest level has nothing to add, so its first unit would never run.
        self.unit1 = None if first else ResidualUnit(config)
        self.unit2 = ResidualUnit(config)
        self.out = nn.Conv2d(width, width, 1)

    def forward(self, x: Tensor, finer: Tensor | None, size: tuple[int, int]) -> Tensor:
        if self.unit1 is not None and finer is not None:
            if x.shape[-2:] != finer.shape[-2:]:  # odd token grids
                x = functional.interpolate(x, size=finer.shape[-2:], mode="bilinear", align_corners=False)
            x = x + self.unit1(finer)
        x = self.unit2(x)
        # A 1x1 convolution and a bilinear resize commute; convolving first costs a quarter.
        return functional.interpolate(self.out(x), size=size, mode="bilinear", align_corners=True)


class Head(nn.Module):
    """Fused map -> bin scores, at twice the map's scale ('full') or at its own ('half')."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.full = config.head == "full"
        middle = config.fusion // 2 if self.full else config.hidden
        self.conv1 = conv3x3(config, config.fusion, middle)
        self.conv2 = conv3x3(config, middle, config.hidden)
        self.conv3 = nn.Conv2d(config.hidden, config.bins, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv1(x)
        if self.full:
            x = functional.interpolate(x, scale_factor=2, mode="bilinear", align_corners=True)
        else:
            x = torch.relu(x)
        return self.conv3(torch.relu(self.conv2(x)))


class Decoder(nn.Module):
    """`Features` -> raw bin scores (B, bins, h, w); with patch 16 at full or half the image's scale."""

    FACTORS = (4.0, 2.0, 1.0, 0.5)

    def __init__(self, config: DecoderConfig, dim: int, stem: tuple[int, ...] = ()) -> None:
        super().__init__()
        self.config = config
        self.reassemble = nn.ModuleList(
            Reassemble(dim, c, f) for c, f in zip(config.post_channels, self.FACTORS, strict=True)
        )
        self.lateral = nn.ModuleList(
            nn.Conv2d(c, config.fusion, 3, padding=1, bias=False) for c in config.post_channels
        )
        # Deepest first, in the order they run.
        self.fusions = nn.ModuleList(Fusion(config, first=i == 0) for i in range(4))
        self.project = nn.Conv2d(config.fusion, config.fusion, 3, padding=1)
        if not config.project_after_fusion:
            self.project = nn.Identity()  # type: ignore[assignment]
        widths = stem if config.detail else ()
        self.detail = nn.ModuleList(nn.Conv2d(c, config.fusion, 1) for c in widths)
        self.head = Head(config)

    def forward(self, features: Features) -> Tensor:
        pairs = zip(features.maps, features.class_tokens, strict=True)
        levels = [r(m, c) for r, (m, c) in zip(self.reassemble, pairs, strict=True)]
        levels = [conv(level) for conv, level in zip(self.lateral, levels, strict=True)]
        details = [conv(m) for conv, m in zip(self.detail, features.pyramid, strict=False)]  # 1/2, 1/4, 1/8
        for i, detail in enumerate(details[1:]):
            levels[i] = levels[i] + _resized(detail, levels[i])
        x, finer = levels[3], levels[2::-1]
        for i, fusion in enumerate(self.fusions):
            # The next finer map sets the size; after the last, DPT doubles once more.
            target = finer[i] if i < 3 else None
            size = tuple(target.shape[-2:]) if target is not None else tuple(2 * s for s in x.shape[-2:])
            x = fusion(x, finer[i - 1] if i else None, (int(size[0]), int(size[1])))
        if details:
            x = x + _resized(details[0], x)
        x = self.project(x)
        if self.config.project_after_fusion:
            x = torch.relu(x)
        return self.head(x)


def _resized(detail: Tensor, like: Tensor) -> Tensor:
    if detail.shape[-2:] == like.shape[-2:]:
        return detail
    return functional.interpolate(detail, size=like.shape[-2:], mode="bilinear", align_corners=False)


# ---- U-Net ------------------------------------------------------------------------------------------------
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
