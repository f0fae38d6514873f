"""What a height model is, as frozen data that travels inside its checkpoint.

Everything that changes the arithmetic of a forward pass is a field here, with the published models in
mind: the 2024 release (plain ViT, learned positions) and the 2026 release (DINOv3, rotary positions)
are both settings of the same classes, beside this project's own smaller models.
"""

from __future__ import annotations

from typing import Any, Literal, Self

from pydantic import Field, NonNegativeInt, PositiveInt, model_validator

from canopy.config import Settings, validate_settings

CNN_PATCH_PX = 32  # of a convolutional encoder's deepest map


class _Part(Settings):
    """A config that can be taken with changes; these are validated too."""

    def replaced(self, **changes: Any) -> Self:
        """The same with other values of some fields. Raises ValueError where they do not fit."""
        return type(self)(**{**dict(self), **changes})


class EncoderConfig(_Part):
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

    family: Literal["vit", "rope", "cnn"] = "vit"
    network: str = ""
    widths: tuple[PositiveInt, ...] = ()
    dim: PositiveInt = 1024
    depth: PositiveInt = 24
    heads: PositiveInt = 16
    patch: PositiveInt = 16
    mlp_ratio: float = 4.0
    registers: NonNegativeInt = 0
    layer_scale: float | None = 1e-5
    taps: tuple[NonNegativeInt, ...] = (4, 11, 17, 23)
    norm_taps: bool = False
    norm_eps: float = 1e-6
    qkv_bias: bool = True
    k_bias: bool = False
    pos_grid: PositiveInt = 14
    pos_embed_prefix: bool = True
    pos_resize: Literal["bicubic", "bicubic_aligned"] = "bicubic_aligned"
    rope_type: Literal["cat", "dinov3"] = "dinov3"
    rope_temperature: float = 100.0
    rope_rotate_half: bool = True
    rope_periods: tuple[float, ...] = ()
    stem: tuple[PositiveInt, ...] = ()
    drop_path: float = 0.0

    @model_validator(mode="after")
    def _fits(self) -> Self:
        cnn = self.family == "cnn"
        if cnn != bool(self.network) or (self.widths and not cnn):
            raise ValueError("network, and perhaps widths, go with family 'cnn' alone, which needs a network")
        if cnn:
            if self.patch != CNN_PATCH_PX or self.stem:
                raise ValueError("family 'cnn' has no stem, and a patch of 32: set encoder.patch to 32")
            return self
        if self.family == "rope" and self.rope_type == "cat" and self.rope_rotate_half:
            # timm lays out 'cat' sines for interleaved pairs; rotating halves with them scrambles positions.
            raise ValueError("rope_type 'cat' does not go with rope_rotate_half: set it to false")
        if self.dim % self.heads:
            raise ValueError(f"dim {self.dim} does not divide into {self.heads} heads")
        if self.rope_periods and len(self.rope_periods) * 4 * self.heads != self.dim:
            raise ValueError(
                f"{len(self.rope_periods)} rotary periods for heads of {self.dim // self.heads} channels; "
                "expected one period for every four"
            )
        taps = self.taps
        if len(taps) != 4 or list(taps) != sorted(set(taps)) or taps[-1] >= self.depth:
            raise ValueError(
                f"taps {list(taps)} do not fit {self.depth} blocks; expected four rising block numbers"
            )
        if self.stem and (len(self.stem) != 3 or self.patch % 8):
            raise ValueError(
                f"stem {list(self.stem)} does not fit patch {self.patch}; expected three channel counts and "
                "a patch that is a multiple of 8"
            )
        return self


class DecoderConfig(_Part):
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

    post_channels: tuple[PositiveInt, PositiveInt, PositiveInt, PositiveInt] = (128, 256, 512, 1024)
    fusion: PositiveInt = 256
    hidden: PositiveInt = 32
    project_after_fusion: bool = True
    unit_bias: bool = False
    unit_norm: bool = False
    head: Literal["full", "half"] = "full"
    separable: bool = False
    detail: bool = False
    bins: int = Field(default=256, ge=2)
    bin_min: float = Field(default=0.001, ge=0)
    bin_max: float = 10.0
    spacing: Literal["linear", "log", "blend"] = "linear"
    weights: Literal["relu", "softmax"] = "relu"
    eps: float = 0.1
    scale: float = 10.0

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.bin_min >= self.bin_max:
            raise ValueError(f"{self.bins} bins over {self.bin_min}..{self.bin_max} make no scale")
        return self


class ModelConfig(_Part):
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

    gsd_m: float = Field(default=0.5, gt=0)
    bands: tuple[str, ...] = ("red", "green", "blue")
    crop_px: PositiveInt = 256
    overlap_px: NonNegativeInt = 0
    margin_px: NonNegativeInt = 0
    mean: tuple[float, ...] = (0.420, 0.411, 0.296)
    std: tuple[float, ...] = (0.213, 0.156, 0.143)
    multiple_px: NonNegativeInt = 0
    percentiles: tuple[float, ...] = ()
    encoder: EncoderConfig = EncoderConfig()
    decoder: DecoderConfig = DecoderConfig()

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.decoder.detail and not self.encoder.stem:
            raise ValueError("decoder.detail needs the maps of an encoder stem: set encoder.stem")
        if not len(self.mean) == len(self.std) == len(self.bands):
            raise ValueError(f"{len(self.bands)} bands with {len(self.mean)} means and {len(self.std)} stds")
        if self.multiple_px % self.encoder.patch:
            raise ValueError(
                f"multiple_px {self.multiple_px} is no multiple of the {self.encoder.patch} px patch"
            )
        return self

    @property
    def patch_px(self) -> int:
        """Pixels per token side; the smallest image side."""
        return self.encoder.patch

    @property
    def pad_px(self) -> int:
        """Image sides are padded to multiples of this many pixels."""
        return self.multiple_px or self.encoder.patch

    def to_dict(self) -> dict[str, Any]:
        """Plain nested dict, ready for JSON."""
        return self.model_dump(mode="json")

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Self:
        """Rebuild from `to_dict`; an unknown or ill-typed key raises ConfigError."""
        return validate_settings(cls, values, where="model")
