"""Every setting of a fine-tuning run, typed; a config file holds only what differs from these defaults."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field, field_validator, model_validator

from canopy.config import Settings
from canopy.training.run_settings import ChipPlaces, RunSettings
from canopy.training.schedules import SHAPES, ramp


class DataSettings(Settings):
    """Where the labels are and how often each kind is seen.

    `chips`: a folder of `canopy data chips`, or a list of them. `bare_share`, `tall_share`: chance of a chip
    of that height category; `neon_share`, `synth_share`: chance of a plot or a synthetic chip, where there
    are any.
    `label_share`: share of the training chips that may be used; a smaller share is a subset of a larger
    one, `label_seed` draws another. `include_val`: train on the val chips too, but for those within the
    folder's buffer of a test chip; their scores are then called "seen". `val_chips`: validate on at most so
    many, evenly spaced (the final scores count all).
    `val_sites`: beginnings of sites' names; validation is then on all train and val chips of these sites, and
    training on the others: what a model knows of places it has not seen, without looking at a test chip.
    """

    chips: ChipPlaces = (Path("chips"),)
    bare_share: float = Field(default=0.1, ge=0, le=1)
    tall_share: float = Field(default=0.2, ge=0, le=1)
    neon_share: float = Field(default=0.12, ge=0, lt=1)
    synth_share: float = Field(default=0.12, ge=0, lt=1)
    label_share: float = Field(default=1.0, gt=0, le=1)
    label_seed: int = 0
    include_val: bool = False
    val_chips: int | None = Field(default=None, ge=1)
    val_sites: tuple[str, ...] = ()

    @model_validator(mode="after")
    def _apart(self) -> DataSettings:
        if self.val_sites and self.include_val:
            raise ValueError("val_sites are there to be unseen: no include_val")
        return self


class AugmentSettings(Settings):
    """See canopy.chips.augment.AugmentConfig."""

    colour: float = 1.0
    gsd_low: float = 0.8
    gsd_high: float = 1.25
    gsd_chance: float = 0.5
    hide_chance: float = 0.15
    black_chance: float = 0.15
    turn: bool = True


class Ramp(Settings):
    """A weight that moves from `first` to `last` while the run's progress goes from `begin` to `end`."""

    first: float = Field(ge=0)
    last: float = Field(ge=0)
    begin: float = Field(default=0.0, ge=0, le=1)
    end: float = Field(default=1.0, ge=0, le=1)
    shape: Literal[SHAPES] = "linear"  # type: ignore[valid-type]

    @model_validator(mode="after")
    def _in_order(self) -> Ramp:
        if self.end < self.begin:
            raise ValueError(f"end {self.end} lies before begin {self.begin}")
        return self


Weight = float | Ramp


def weight_at(weight: Weight, progress: float) -> float:
    """Value of a loss weight at `progress` (0..1)."""
    if isinstance(weight, Ramp):
        return ramp(progress, weight.first, weight.last, weight.begin, weight.end, weight.shape)
    return weight


class LossSettings(Settings):
    """Weights of the loss terms (numbers, or `Ramp`s over the run), and how labels are used.

    `shift_*`: labels may move by so many metres (to whole label pixels) to where the prediction fits them,
    at a price per metre, once the share `shift_after` of the run is over: a random model must not choose.
    `height_weight`: pairs (height in metres, factor), joined by straight lines: what a label pixel of that
    height counts. Tall trees are rare, so that without it every error on them is cheap.
    `expect_heights`: a fresh head starts at the training heights' distribution (`start.expect_heights`).
    `footprint_*`: see `footprint_loss.footprint_loss`.
    """

    charbonnier: Weight = 1.0
    l1: Weight = 0.0
    silog: Weight = 0.0
    gradient: Weight = 0.3
    two_hot: Weight = 0.3
    ranked: Weight = 0.0
    footprint: Weight = 0.2
    footprint_top: float = Field(default=0.1, gt=0, le=1)
    footprint_reach_m: float = Field(default=10.0, ge=0)
    footprint_penalty: float = Field(default=0.05, ge=0)
    expect_heights: bool = True
    shift_reach_m: int = 2
    shift_penalty_m: float = 0.1
    shift_after: float = 0.08
    height_weight: tuple[tuple[float, float], ...] = ()

    @field_validator("height_weight")
    @classmethod
    def _rising(cls, value: tuple[tuple[float, float], ...]) -> tuple[tuple[float, float], ...]:
        heights = [h for h, _ in value]
        if heights != sorted(set(heights)) or any(w < 0 for _, w in value):
            raise ValueError("needs rising heights and factors of at least 0")
        return value


class FinetuneSettings(RunSettings):
    """One supervised run. `minutes` bounds it in time, `steps` in work; the first to come ends it.

    With `minutes: null` the learning rate follows the steps alone, and a run is repeatable to the bit.
    """

    minutes: float | None = Field(default=60.0, gt=0)
    steps: int = Field(default=100_000, ge=1)
    batch: int = Field(default=8, ge=1)
    crop_px: int = Field(default=256, ge=16, multiple_of=2)
    lr: float = Field(default=6e-4, gt=0)
    lr_schedule: Literal["cosine", "linear", "constant"] = "cosine"
    warmup: float = Field(default=0.03, ge=0, lt=1)
    weight_decay: float = 0.05
    clip_norm: float = Field(default=1.0, gt=0)
    ema_final: float = Field(default=0.998, ge=0, lt=1)
    workers: int = Field(
        default=0, ge=0
    )  # processes that make batches ahead; what they make does not depend on it
    device: str = "cpu"
    strategy: Literal["auto", "ddp"] = "auto"  # of several devices: auto is ddp
    init_from: Path | None = None  # encoder.safetensors of a pretraining, a model file, or a last.ckpt
    init_part: Literal["auto", "all", "encoder"] = "auto"  # auto: whatever the file is made for
    freeze_encoder: bool = False
    encoder_lr_scale: float = Field(default=1.0, gt=0)
    layer_decay: float = Field(
        1.0, gt=0, le=1
    )  # each transformer block learns this much slower than the next
    tensorboard: bool = True  # where it is installed
    validate_every: int = Field(default=250, ge=1)
    patience: int = Field(default=0, ge=0)  # validations without a better MAE before the run stops; 0 = never
    export: Literal["auto", "best", "last"] = "auto"  # auto: best, or last where val was trained on
    data: DataSettings = DataSettings()
    augment: AugmentSettings = AugmentSettings()
    loss: LossSettings = LossSettings()

    @model_validator(mode="after")
    def _consistent(self) -> FinetuneSettings:
        if self.data.include_val and (self.export == "best" or self.patience):
            raise ValueError("val chips that are trained on can choose nothing: no export: best, no patience")
        if self.processes > 1 and self.device not in ("cpu", "cuda"):
            raise ValueError("several devices need device=cuda or device=cpu to be said")
        if self.init_part != "auto" and self.init_from is None:
            raise ValueError("init_part needs init_from")
        if self.layer_decay < 1 and self.architecture.encoder.family == "cnn":
            raise ValueError("layer_decay is for transformers")
        return self

    @property
    def exports_best(self) -> bool:
        """Whether the best weights by val MAE are exported, rather than the last."""
        return self.export == "best" or (self.export == "auto" and not self.data.include_val)
