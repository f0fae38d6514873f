"""HeightModel: RGB in, metres out. Normalisation, padding and units live inside; nothing is left outside."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from canopy.errors import ConfigError, InputError
from canopy.models.bins import bin_centres, bin_weights, moments, quantiles
from canopy.models.cnn import CnnEncoder, UNetDecoder
from canopy.models.config import DecoderConfig, EncoderConfig, ModelConfig
from canopy.models.decoder import Decoder
from canopy.models.encoder import Encoder
from canopy.models.radiometry import Stretch

__all__ = ["DecoderConfig", "EncoderConfig", "HeightModel", "HeightPrediction", "ModelConfig"]


class HeightPrediction(NamedTuple):
    """Heights and their spread, both (B, 1, H, W), float32 metres, both >= 0."""

    height_m: Tensor
    spread_m: Tensor


class HeightModel(nn.Module):
    """Canopy height from an RGB image.

    `model(rgb)` takes float (B, 3, H, W) in 0..1, any H and W of at least one patch, and returns metres
    (B, 1, H, W) at the same pixels. NaN in the input raises InputError: replace invalid pixels first
    (`canopy.models.fill.fill_invalid`) and mask the output with the same validity.

    Attributes:
        config: what the model is and what it expects.
        card: facts about the weights (data, licence, metrics); filled by `load_model`.
        sha256: hash of the checkpoint file, or None for a model built in memory; `path`: that file.
        stretch: moves the radiometry of the image before anything else; None leaves it (see
            `with_radiometry`).
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.card: dict[str, Any] = {}
        self.sha256: str | None = None
        self.path: Path | None = None
        self.stretch: Stretch | None = None
        self.encoder, self.decoder = _build(config)
        self.mean: Tensor
        self.std: Tensor
        self.centres: Tensor
        self.register_buffer("mean", torch.tensor(config.mean).view(1, -1, 1, 1))
        self.register_buffer("std", torch.tensor(config.std).view(1, -1, 1, 1))
        self.register_buffer("centres", bin_centres(config.decoder))

    @property
    def parameter_count(self) -> int:
        """Number of trainable values."""
        return sum(p.numel() for p in self.parameters())

    def forward(self, rgb: Tensor) -> Tensor:
        """RGB (B, 3, H, W) in 0..1 -> canopy height (B, 1, H, W) in metres."""
        return self.predict(rgb).height_m

    def predict(self, rgb: Tensor) -> HeightPrediction:
        """Like `forward`, with the spread of the bin weights beside the height."""
        height, spread, _ = self.heights_and_scores(rgb)
        return HeightPrediction(height, spread)

    def heights_and_scores(self, rgb: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Height and spread (B, 1, H, W) in metres, and the raw bin scores at the head's own scale.

        Training needs the scores; they cover the padded image, so they line up with the image only
        where H and W are multiples of `config.pad_px`.
        """
        scores, size = self._scores(rgb)
        H, W = rgb.shape[-2:]
        both = self.layers_of(scores, HeightPrediction._fields, size)[..., :H, :W]
        height, spread = both.split(1, dim=1)
        return height, spread, scores

    def layers(self, rgb: Tensor, outputs: Sequence[str] = ("height_m", "spread_m")) -> Tensor:
        """The named maps, in metres, (B, len(outputs), H, W) float32.

        Args:
            rgb: as for `forward`.
            outputs: "height_m", "spread_m", or "q" and a share, e.g. "q0.05": the height below which this
                share of the bin weights lies.

        Raises:
            ConfigError: an unknown name.
        """
        scores, size = self._scores(rgb)
        H, W = rgb.shape[-2:]
        return self.layers_of(scores, outputs, size)[..., :H, :W]

    def layers_of(self, scores: Tensor, outputs: Sequence[str], size: tuple[int, int]) -> Tensor:
        """What `layers` gives, from the bin scores (B, bins, h, w) of an image of `size` pixels."""
        shares = output_shares(outputs)
        scale = self.config.decoder.scale
        # Under autocast the sum over bins would run in bf16, which steps by 0.1 m at 30 m.
        with torch.autocast(scores.device.type, enabled=False):
            weights = bin_weights(scores, self.config.decoder)
            made = dict(zip(HeightPrediction._fields, moments(weights, self.centres, scale), strict=True))
            if shares:
                found = quantiles(weights, self.centres, scale, list(shares.values()))
                made |= dict(zip(shares, found.split(1, dim=1), strict=True))
            stacked = torch.cat([made[name] for name in outputs], dim=1)
        return _at_size(stacked, size)

    def _scores(self, rgb: Tensor) -> tuple[Tensor, tuple[int, int]]:
        """Bin scores (B, bins, h, w) of the padded image, float32, and its size."""
        self._check(rgb)
        padded = pad_to_multiple(self._moved(rgb), self.config.pad_px)
        scores = self.decoder.scores(self.encoder((padded - self.mean) / self.std)).float()
        return scores, (padded.shape[-2], padded.shape[-1])

    def with_radiometry(self, stretch: Stretch | None) -> HeightModel:
        """This model, its weights shared, with every image moved by `stretch` before it is normalised."""
        other = copy.copy(self)
        other.stretch = stretch
        return other

    def _moved(self, rgb: Tensor) -> Tensor:
        if self.stretch is None:
            return rgb
        factor, offset = (rgb.new_tensor(v).view(1, -1, 1, 1) for v in self.stretch.factors())
        return rgb * factor + offset

    def _check(self, rgb: Tensor) -> None:
        bands, patch = len(self.config.bands), self.config.patch_px
        if rgb.ndim != 4 or rgb.shape[1] != bands or not rgb.is_floating_point():
            raise InputError(
                f"the model got a {rgb.dtype} tensor of shape {tuple(rgb.shape)}",
                expected=f"float (B, {bands}, H, W) in 0..1",
            )
        if min(rgb.shape[-2:]) < patch:
            raise InputError(
                f"the image is {rgb.shape[-2]}x{rgb.shape[-1]} px", expected=f"at least {patch}x{patch} px"
            )
        if not torch.isfinite(rgb).all():
            raise InputError(
                "the image holds NaN or infinite values",
                expected="finite RGB in 0..1",
                remedy="fill invalid pixels with canopy.models.fill.fill_invalid and mask the output",
            )


def output_shares(outputs: Sequence[str]) -> dict[str, float]:
    """The share of each quantile among names of `HeightModel.layers`.

    Raises:
        ConfigError: a name that is none of its outputs.
    """
    shares = {}
    for name in outputs:
        if name in HeightPrediction._fields:
            continue
        try:
            shares[name] = float(name.removeprefix("q"))
        except ValueError:
            shares[name] = -1.0
        if not name.startswith("q") or not 0 < shares[name] < 1:
            raise ConfigError(
                f"the model has no output {name!r}",
                expected="height_m, spread_m, or a quantile such as q0.05",
            )
    return shares


def _at_size(maps: Tensor, size: tuple[int, int]) -> Tensor:
    """Maps (B, n, h, w), as fine as `size`; those of a 'half' head are interpolated."""
    if maps.shape[-2:] == size:
        return maps
    return functional.interpolate(maps, size=size, mode="bilinear", align_corners=False)


def _build(config: ModelConfig) -> tuple[Encoder | CnnEncoder, Decoder | UNetDecoder]:
    bands = len(config.bands)
    if config.encoder.family == "cnn":
        network = CnnEncoder(config.encoder, bands)
        return network, UNetDecoder(config.decoder, network.channels)
    return Encoder(config.encoder, bands), Decoder(config.decoder, config.encoder.dim, config.encoder.stem)


def pad_to_multiple(x: Tensor, multiple: int) -> Tensor:
    """Extend the right and lower side of (B, C, H, W) to multiples of `multiple`, mirroring the image."""
    right, below = -x.shape[-1] % multiple, -x.shape[-2] % multiple
    while right or below:
        # Reflection needs more pixels than it pads: a very small image is mirrored more than once.
        across, down = min(right, x.shape[-1] - 1), min(below, x.shape[-2] - 1)
        x = functional.pad(x, (0, across, 0, down), mode="reflect")
        right, below = right - across, below - down
    return x
