"""HeightModel: RGB in, metres out. Normalisation, padding and units live inside; nothing is left outside.

Also what it is shown where an image has no pixels (the same rule serves training and inference), and how an
image's colours are moved onto those a model was trained on: the published models learned satellite mosaics;
aerial images are darker, bluer or more contrasty. Their authors move each band linearly so that its 5th and
95th percentile fall onto the satellite's (Tolan et al. 2024, arXiv 2304.07213). Here the image's percentiles
are measured once per scene and then fixed: were they measured crop by crop, a pixel's height would depend on
how the map is cut.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from canopy.errors import ConfigError, InputError
from canopy.models.config import ModelConfig
from canopy.models.decoder import Decoder, UNetDecoder, bin_centres, bin_weights, moments
from canopy.models.encoder import CnnEncoder, Encoder

V1_AERIAL = "v1-aerial"
MEASURED = ("match", V1_AERIAL)  # values of `--radiometry` that look at the image
OUTPUTS = ("height_m", "spread_m")
EMPTY_VALUE = 0.4  # close to the mean of aerial imagery: an empty crop looks like nothing in particular


def fill_invalid(rgb: np.ndarray, valid: np.ndarray) -> np.ndarray:
    """Replace invalid pixels by plausible ones.

    A network shown black collars sees dark, tall, shadowed forest or water that is not there, and one shown
    the border's pixels drawn out into streaks sees smooth, low ground: 3 to 5 m too low beside the edges of
    a turned image. So every border is a mirror: a pixel inside the box of valid pixels takes the one as far
    behind its nearest valid neighbour (or the valid one nearest to that); outside, the box is mirrored as
    often as needed, and a small plot in a large crop becomes a plausible continuous scene. Deterministic,
    and a function of this crop's pixels alone.

    Args:
        rgb: float (C, H, W); values where `valid` is False are ignored and may be NaN.
        valid: bool (H, W).

    Returns:
        float32 (C, H, W), finite wherever the valid input is; `rgb` itself where nothing is invalid.

    Raises:
        InputError: where the shapes do not match.
    """
    from scipy import ndimage

    if rgb.ndim != 3 or valid.shape != rgb.shape[1:]:
        raise InputError(
            f"image {rgb.shape} and validity {valid.shape} do not match", expected="(C, H, W) and (H, W)"
        )
    if valid.all():
        return rgb.astype(np.float32, copy=False)
    rows, cols = np.flatnonzero(valid.any(axis=1)), np.flatnonzero(valid.any(axis=0))
    if rows.size == 0:
        return np.full(rgb.shape, EMPTY_VALUE, np.float32)
    top, bottom, left, right = rows[0], rows[-1] + 1, cols[0], cols[-1] + 1
    box = rgb[:, top:bottom, left:right].astype(np.float32)
    inside = valid[top:bottom, left:right]
    if not inside.all():
        nearest = ndimage.distance_transform_edt(~inside, return_distances=False, return_indices=True)
        away = np.indices(inside.shape) - nearest
        last = np.array(inside.shape)[:, None, None] - 1
        behind = np.clip(nearest - away + np.sign(away), 0, last)  # the neighbour itself is mirrored too
        rows, cols = nearest[:, behind[0], behind[1]]
        box = box[:, rows, cols]
    H, W = valid.shape
    around = ((0, 0), (int(top), int(H - bottom)), (int(left), int(W - right)))
    return np.pad(box, around, mode="symmetric")


_Z95 = 1.6448536269514722  # 95th percentile of the standard normal distribution
Percentiles = tuple[float, ...]  # 5th and 95th of each band, in 0..1: r5, r95, g5, g95, b5, b95


@dataclass(frozen=True)
class Stretch:
    """Moves percentiles `source` onto `target`, band by band."""

    source: Percentiles
    target: Percentiles

    def __post_init__(self) -> None:
        if len(self.source) != len(self.target) or not self.source or len(self.source) % 2:
            raise ConfigError(
                f"{len(self.source)} percentiles onto {len(self.target)}", expected="two for each band, both"
            )
        for values in (self.source, self.target):
            for low, high in zip(values[::2], values[1::2], strict=True):
                if not (math.isfinite(low) and math.isfinite(high) and low < high):
                    raise ConfigError(
                        f"percentiles {low:.4g} and {high:.4g} leave no contrast",
                        expected="a 5th percentile below the 95th in every band",
                    )

    def factors(self) -> tuple[list[float], list[float]]:
        """Per-band factor and offset: moved = factor * value + offset. Values are not clipped."""
        source, target = np.reshape(self.source, (-1, 2)), np.reshape(self.target, (-1, 2))
        factor = np.diff(target)[:, 0] / np.diff(source)[:, 0]
        return factor.tolist(), (target[:, 0] - factor * source[:, 0]).tolist()

    def describe(self) -> str:
        """`r5,r95,... -> r5,r95,...`, as the tags of a map record it."""
        return " -> ".join(",".join(f"{v:.5g}" for v in values) for values in (self.source, self.target))


def parse_radiometry(text: str) -> tuple[Percentiles | None, Percentiles | None] | None:
    """Read `--radiometry`.

    Args:
        text: `none`; `match` (the image's percentiles, measured, onto the model's); `v1-aerial` (onto those
            that v1's network predicts); six target percentiles; or the image's six followed by the target's
            six, which measures nothing.

    Returns:
        None for `none`; else what is said of the image's percentiles and of the target's.

    Raises:
        ConfigError: anything else.
    """
    if text == "none":
        return None
    if text in MEASURED:
        return None, None
    try:
        values = tuple(float(part) for part in text.split(","))
    except ValueError:
        values = ()
    if len(values) not in (6, 12) or not all(0 <= v <= 1 for v in values):
        raise ConfigError(
            f"cannot read {text!r}", where="--radiometry",
            expected="none, match, v1-aerial, the target's r5,r95,g5,g95,b5,b95 in 0..1, or the image's six "
            "and these",
        )  # fmt: skip
    source, target = (values[:6] if len(values) == 12 else None), values[-6:]
    Stretch(source or target, target)  # refuses percentiles out of order
    return source, target


def normal_percentiles(mean: tuple[float, ...], std: tuple[float, ...]) -> tuple[float, ...]:
    """5th and 95th percentiles of normally distributed bands: mean -+ 1.645 std.

    What is left to say where only mean and standard deviation were published.
    """
    return tuple(round(m + z * s, 4) for m, s in zip(mean, std, strict=True) for z in (-_Z95, _Z95))


class HeightModel(nn.Module):
    """Canopy height from an RGB image.

    `model(rgb)` takes float (B, 3, H, W) in 0..1, any H and W of at least one patch, and returns metres
    (B, 1, H, W) at the same pixels. NaN in the input raises InputError: replace invalid pixels first
    (`canopy.models.height.fill_invalid`) and mask the output with the same validity.

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
        self.encoder: Encoder | CnnEncoder
        self.decoder: Decoder | UNetDecoder
        if config.encoder.family == "cnn":
            self.encoder = CnnEncoder(config.encoder, len(config.bands))
            self.decoder = UNetDecoder(config.decoder, self.encoder.channels)
        else:
            self.encoder = Encoder(config.encoder, len(config.bands))
            self.decoder = Decoder(config.decoder, config.encoder.dim, config.encoder.stem)
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
        """RGB (B, 3, H, W) in 0..1 -> canopy height (B, 1, H, W) in metres.

        Raises:
            InputError: another shape or kind of numbers, or NaN, for which nothing else here looks: on a GPU
                that would mean to wait for it at every batch.
        """
        if not torch.isfinite(rgb).all():
            raise InputError(
                "the image holds NaN or infinite values",
                expected="finite RGB in 0..1",
                remedy="fill invalid pixels with canopy.models.height.fill_invalid and mask the output",
            )
        return self.layers(rgb, OUTPUTS[:1])

    def heights_and_scores(self, rgb: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Height and spread (B, 1, H, W) in metres, and the raw bin scores at the head's own scale.

        Training needs the scores; they cover the padded image, so they line up with the image only
        where H and W are multiples of `config.pad_px`.
        """
        scores, size = self.scores(rgb)
        H, W = rgb.shape[-2:]
        height, spread = self.layers_of(scores, OUTPUTS, size)[..., :H, :W].split(1, dim=1)
        return height, spread, scores

    def layers(self, rgb: Tensor, outputs: Sequence[str] = OUTPUTS) -> Tensor:
        """The named maps, in metres, (B, len(outputs), H, W) float32.

        Args:
            rgb: as for `forward`; NaN is not looked for.
            outputs: of "height_m" and "spread_m", how unsure the network is between heights.

        Raises:
            ConfigError: an unknown name.
        """
        scores, size = self.scores(rgb)
        H, W = rgb.shape[-2:]
        return self.layers_of(scores, outputs, size)[..., :H, :W]

    def layers_of(self, scores: Tensor, outputs: Sequence[str], size: tuple[int, int]) -> Tensor:
        """What `layers` gives, from the bin scores (B, bins, h, w) of an image of `size` pixels."""
        unknown = set(outputs) - set(OUTPUTS)
        if unknown:
            raise ConfigError(f"the model has no output {unknown.pop()!r}", expected=" or ".join(OUTPUTS))
        # Under autocast the sum over bins would run in bf16, which steps by 0.1 m at 30 m.
        with torch.autocast(scores.device.type, enabled=False):
            weights = bin_weights(scores, self.config.decoder)
            both = moments(weights, self.centres, self.config.decoder.scale)
            maps = torch.cat([both[OUTPUTS.index(name)] for name in outputs], dim=1)
        if maps.shape[-2:] == size:
            return maps
        return functional.interpolate(maps, size=size, mode="bilinear", align_corners=False)

    def scores(self, rgb: Tensor) -> tuple[Tensor, tuple[int, int]]:
        """Bin scores (B, bins, h, w) of the padded image, float32, and its size."""
        self._check(rgb)
        padded = pad_to_multiple(self.moved(rgb), self.config.pad_px)
        scores = self.decoder(self.encoder((padded - self.mean) / self.std)).float()
        return scores, (padded.shape[-2], padded.shape[-1])

    def with_radiometry(self, stretch: Stretch | None) -> HeightModel:
        """This model, its weights shared, with every image moved by `stretch` before it is normalised."""
        other = copy.copy(self)
        other.stretch = stretch
        return other

    def moved(self, rgb: Tensor) -> Tensor:
        """The image (B, 3, H, W) with its radiometry moved by `stretch`, if there is one."""
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


def pad_to_multiple(x: Tensor, multiple: int) -> Tensor:
    """Extend the right and lower side of (B, C, H, W) to multiples of `multiple`, mirroring the image."""
    right, below = -x.shape[-1] % multiple, -x.shape[-2] % multiple
    while right or below:
        # Reflection needs more pixels than it pads: a very small image is mirrored more than once.
        across, down = min(right, x.shape[-1] - 1), min(below, x.shape[-2] - 1)
        x = functional.pad(x, (0, across, 0, down), mode="reflect")
        right, below = right - across, below - down
    return x
