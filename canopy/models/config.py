"""What a height model is, as frozen data that travels inside its checkpoint.

Everything that changes the arithmetic of a forward pass is a field here, with the published models in
mind: the 2024 release (plain ViT, learned positions) and the 2026 release (DINOv3, rotary positions)
are both settings of the same classes, beside this project's own smaller models.
"""

from __future__ import annotations

import dataclasses
import difflib
import typing
from dataclasses import dataclass, field
from typing import Any, TypeVar

from canopy.errors import ConfigError

T = TypeVar("T")
CNN_PATCH_PX = 32  # of a convolutional encoder's deepest map


@dataclass(frozen=True)
class EncoderConfig:
    """A timm vision transformer and where its features are tapped, or a timm convolutional network.

    Attributes:
        family: 'vit' (learned absolute positions), 'rope' (rotary positions, timm's Eva class), or 'cnn', for
            which only `network`, `widths`, `patch` (32) and `drop_path` count.
        network: timm's name of a convolutional network with maps at 1/2 to 1/32 ('cnn' only).
        widths: channels of a residual network's four stages, where they are not timm's own ('cnn' only).
        dim, depth, heads, mlp_ratio: the transformer's size.
        patch: pixels per token side.
        registers: extra tokens that carry no position (Darcet et al. 2024, arXiv 2309.16588).
        layer_scale: initial LayerScale value; None leaves LayerScale out.
        taps: zero-based blocks whose output goes to the decoder, shallow to deep.
        norm_taps: apply the backbone's final LayerNorm to tapped features.
        norm_eps: epsilon of every LayerNorm.
        qkv_bias: bias on the attention projections ('rope': on queries and values only).
        k_bias: bias on the keys too ('rope' only; rotation makes it matter).
        pos_grid: side, in tokens, of the learned position grid ('vit' only).
        pos_embed_prefix: the learned positions include the class token ('vit' only).
        pos_resize: 'bicubic_aligned' (align_corners, as the 2024 release) or 'bicubic' (timm's own).
        rope_type: timm's name: 'cat' counts tokens, 'dinov3' stretches positions over the image.
        rope_temperature, rope_rotate_half: rotary details.
        rope_periods: the rotary periods themselves, one per four channels of a head, where a checkpoint
            stores rounded ones; empty computes them from the temperature.
        stem: channels of a convolutional stem at 1/2, 1/4 and 1/8 scale in front of the transformer
            (Xiao et al. 2021, arXiv 2106.14881); empty means plain patch embedding.
        drop_path: stochastic depth rate, training only.
    """

    family: str = "vit"
    network: str = ""
    widths: tuple[int, ...] = ()
    dim: int = 1024
    depth: int = 24
    heads: int = 16
    patch: int = 16
    mlp_ratio: float = 4.0
    registers: int = 0
    layer_scale: float | None = 1e-5
    taps: tuple[int, ...] = (4, 11, 17, 23)
    norm_taps: bool = False
    norm_eps: float = 1e-6
    qkv_bias: bool = True
    k_bias: bool = False
    pos_grid: int = 14
    pos_embed_prefix: bool = True
    pos_resize: str = "bicubic_aligned"
    rope_type: str = "dinov3"
    rope_temperature: float = 100.0
    rope_rotate_half: bool = True
    rope_periods: tuple[float, ...] = ()
    stem: tuple[int, ...] = ()
    drop_path: float = 0.0

    def __post_init__(self) -> None:
        if self.family not in ("vit", "rope", "cnn"):
            raise ConfigError(f"encoder family {self.family!r} is unknown", expected="'vit', 'rope' or 'cnn'")
        if (self.family == "cnn") != bool(self.network) or (self.widths and not self.network):
            raise ConfigError(
                f"encoder network {self.network!r} with family {self.family!r}",
                expected="network, and perhaps widths, with family 'cnn' alone",
            )
        if self.family == "cnn":
            if self.patch != CNN_PATCH_PX or self.stem:
                raise ConfigError(
                    "family 'cnn' has no stem, and a patch of 32", remedy="set encoder.patch to 32"
                )
            return
        if self.pos_resize not in ("bicubic", "bicubic_aligned"):
            raise ConfigError(
                f"pos_resize {self.pos_resize!r} is unknown", expected="'bicubic' or 'bicubic_aligned'"
            )
        if self.family == "rope" and self.rope_type == "cat" and self.rope_rotate_half:
            # timm lays out 'cat' sines for interleaved pairs; rotating halves with them scrambles positions.
            raise ConfigError("rope_type 'cat' does not go with rope_rotate_half", remedy="set it to false")
        if self.dim % self.heads:
            raise ConfigError(f"dim {self.dim} does not divide into {self.heads} heads")
        if self.rope_periods and len(self.rope_periods) * 4 * self.heads != self.dim:
            raise ConfigError(
                f"{len(self.rope_periods)} rotary periods for heads of {self.dim // self.heads} channels",
                expected="one period for every four channels of a head",
            )
        if len(self.taps) != 4 or list(self.taps) != sorted(set(self.taps)) or self.taps[-1] >= self.depth:
            raise ConfigError(
                f"taps {list(self.taps)} do not fit {self.depth} blocks", expected="four rising block numbers"
            )
        if self.stem and (len(self.stem) != 3 or self.patch % 8):
            raise ConfigError(
                f"stem {list(self.stem)} does not fit patch {self.patch}",
                expected="three channel counts and a patch that is a multiple of 8",
            )


@dataclass(frozen=True)
class DecoderConfig:
    """A DPT decoder (Ranftl et al. 2021, arXiv 2103.13413) that ends in weights over height bins.

    Attributes:
        post_channels: channels of the four reassembled maps at 4x, 2x, 1x and 0.5x the token grid.
        fusion: channels inside the fusion blocks.
        hidden: channels of the head's inner layer.
        project_after_fusion: a 3x3 convolution between fusion and head (the 2024 release).
        unit_bias: biases in the residual units; unit_norm: batch norm in them.
        head: 'full' (upsample, then weigh bins at full scale) or 'half' (weigh bins at twice the finest
            map's scale, then interpolate metres), which costs about a quarter.
        separable: the fusion blocks' and the head's 3x3 convolutions are a depthwise one and a 1x1 one
            (Howard et al. 2017, arXiv 1704.04861).
        detail: add the encoder stem's maps into the decoder (the idea of ViTMatte's detail stream,
            arXiv 2305.15272), so that crown edges need not pass through 16-pixel tokens.
        bins, bin_min, bin_max: height bins, in units of `scale` metres.
        spacing: 'linear', 'log', or 'blend' (t*log + (1-t)*linear, t falling from 1 to 0).
        weights: 'relu' ((relu + eps) / sum) or 'softmax'.
        eps: the constant of 'relu' weights.
        scale: metres per bin unit.
    """

    post_channels: tuple[int, ...] = (128, 256, 512, 1024)
    fusion: int = 256
    hidden: int = 32
    project_after_fusion: bool = True
    unit_bias: bool = False
    unit_norm: bool = False
    head: str = "full"
    separable: bool = False
    detail: bool = False
    bins: int = 256
    bin_min: float = 0.001
    bin_max: float = 10.0
    spacing: str = "linear"
    weights: str = "relu"
    eps: float = 0.1
    scale: float = 10.0

    def __post_init__(self) -> None:
        for name, value, allowed in (
            ("head", self.head, ("full", "half")),
            ("spacing", self.spacing, ("linear", "log", "blend")),
            ("weights", self.weights, ("relu", "softmax")),
        ):
            if value not in allowed:
                raise ConfigError(f"decoder {name} {value!r} is unknown", expected=" or ".join(allowed))
        if len(self.post_channels) != 4:
            raise ConfigError(f"{len(self.post_channels)} post_channels", expected="four")
        if self.bins < 2 or not 0 <= self.bin_min < self.bin_max:
            raise ConfigError(f"{self.bins} bins over {self.bin_min}..{self.bin_max} make no scale")


@dataclass(frozen=True)
class ModelConfig:
    """A whole height model: what it expects of an image, and how it is built.

    Attributes:
        gsd_m: ground sample distance, in metres, the model was trained at.
        bands: names of the input bands, in order.
        crop_px: side of the square crops it predicts best.
        overlap_px: pixels along a side that neighbouring crops of a map share; 0 stands for three eighths of
            the crop.
        margin_px: outermost pixels of a crop that never reach the map; 0 stands for a sixteenth of the
            overlap.
        mean, std: normalisation of RGB in 0..1; applied inside the model.
        multiple_px: images are padded to multiples of this; 0 stands for the patch. The published models
            want 32, because their decoders stretch odd token grids.
        percentiles: 5th and 95th percentile of each band of the imagery the model was trained on, in 0..1
            (r5, r95, g5, g95, b5, b95); empty where unknown. What `--radiometry match` aims at.
        encoder, decoder: the network.
    """

    gsd_m: float = 0.5
    bands: tuple[str, ...] = ("red", "green", "blue")
    crop_px: int = 256
    overlap_px: int = 0
    margin_px: int = 0
    mean: tuple[float, ...] = (0.420, 0.411, 0.296)
    std: tuple[float, ...] = (0.213, 0.156, 0.143)
    multiple_px: int = 0
    percentiles: tuple[float, ...] = ()
    encoder: EncoderConfig = field(default_factory=EncoderConfig)
    decoder: DecoderConfig = field(default_factory=DecoderConfig)

    def __post_init__(self) -> None:
        if self.decoder.detail and not self.encoder.stem:
            raise ConfigError("decoder.detail needs the maps of an encoder stem", remedy="set encoder.stem")
        if not len(self.mean) == len(self.std) == len(self.bands):
            raise ConfigError(f"{len(self.bands)} bands with {len(self.mean)} means and {len(self.std)} stds")
        if self.multiple_px < 0 or self.multiple_px % self.encoder.patch:
            raise ConfigError(
                f"multiple_px {self.multiple_px}", expected=f"a multiple of the {self.encoder.patch} px patch"
            )
        if self.overlap_px < 0 or self.margin_px < 0 or 2 * self.overlap_px > self.crop_px:
            raise ConfigError(
                f"overlap_px {self.overlap_px}, margin_px {self.margin_px}", expected="at most half a crop"
            )
        if 2 * self.margin_px > self.overlap_px or self.overlap_px % self.encoder.patch:
            raise ConfigError(
                f"overlap_px {self.overlap_px} with margin_px {self.margin_px}",
                expected=f"a multiple of the {self.encoder.patch} px patch that holds both margins",
            )
        if self.percentiles and len(self.percentiles) != 2 * len(self.bands):
            raise ConfigError(f"{len(self.percentiles)} percentiles", expected="two for each band, or none")

    @property
    def patch_px(self) -> int:
        """Pixels per token side: the smallest image side."""
        return self.encoder.patch

    @property
    def pad_px(self) -> int:
        """Image sides are padded to multiples of this many pixels."""
        return self.multiple_px or self.encoder.patch

    def to_dict(self) -> dict[str, Any]:
        """Plain nested dict, ready for JSON."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> ModelConfig:
        """Rebuild from `to_dict`; an unknown or ill-typed key raises ConfigError."""
        return from_plain(cls, values)


def from_plain(cls: type[T], values: object, where: str = "model") -> T:
    """Build a (nested) frozen dataclass from JSON values, strictly: no unknown keys, lists become tuples."""
    if not isinstance(values, dict):
        raise ConfigError(f"{where} is {type(values).__name__}", expected="a mapping")
    hints = typing.get_type_hints(cls)
    names = {f.name for f in dataclasses.fields(cls)}  # type: ignore[arg-type]
    unknown = sorted(set(values) - names)
    if unknown:
        near = difflib.get_close_matches(unknown[0], names, n=1)
        raise ConfigError(
            f"{where} has unknown key {unknown[0]!r}",
            expected=f"perhaps {near[0]!r}" if near else ", ".join(sorted(names)),
        )
    built: dict[str, Any] = {}
    for name, value in values.items():
        if dataclasses.is_dataclass(hints[name]):
            value = from_plain(typing.cast(type, hints[name]), value, f"{where}.{name}")
        elif isinstance(value, list):
            value = tuple(value)
        built[name] = value
    return cls(**built)
