"""Every setting of a fine-tuning and of a pretraining run, typed.

A config file holds only what differs from these defaults.
"""

from __future__ import annotations

from typing import Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from canopy.chips.augment import AugmentSettings
from canopy.chips.data import ChipPlaces, DataSettings
from canopy.config import Settings
from canopy.models.config import ModelConfig
from canopy.training.optim import SHAPES, ramp
from canopy.training.ssl_data import PretrainDataSettings, ViewRules


class RunSettings(Settings):
    """What every training run has.

    Attributes:
        minutes, steps: bound the run in time and in work; the first to come ends it. With minutes None all
            schedules follow the steps alone, and a run is repeatable to the bit.
        threads: of torch, in each process.
        devices, nodes: processes on each machine, and machines. Batches are per process.
        strategy: how Lightning spreads the work: auto, ddp, fsdp, or any other name that it knows.
        compile: torch.compile the transformer blocks; costs minutes at the start.
        tensorboard: log there too, where it is installed.
        model: what differs from `ModelConfig`'s defaults, or from the model in `init_from`. `encoder.init` is
            an encoder that others pretrained (`models.pretrained.open_encoder`), which says how it is built.
        licence: of the weights, for the card; None: what the training data's manifest says.
    """

    name: str = "canopy"
    steps: int = Field(default=100_000, ge=1)
    minutes: float | None = Field(default=None, gt=0)
    seed: int = Field(default=0, ge=0)
    device: str = "cpu"
    precision: Literal["32-true", "bf16-mixed"] = "32-true"
    threads: int = Field(default=1, ge=1)
    devices: int = Field(default=1, ge=1)
    nodes: int = Field(default=1, ge=1)
    strategy: str = "auto"
    compile: bool = False
    tensorboard: bool = True
    log_every: int = Field(default=25, ge=1)
    model: dict[str, Any] = Field(default_factory=dict)
    licence: str | None = None

    @field_validator("model")
    @classmethod
    def _known_model(cls, value: dict[str, Any]) -> dict[str, Any]:
        _without_init(value)  # raises on unknown keys
        return value

    @model_validator(mode="after")
    def _say_the_device(self) -> Self:
        if self.processes > 1 and self.device not in ("cpu", "cuda"):
            raise ValueError("several devices need device=cuda or device=cpu to be said")
        return self

    @property
    def processes(self) -> int:
        """On all machines together."""
        return self.devices * self.nodes

    @property
    def architecture(self) -> ModelConfig:
        """The model's config with its defaults."""
        return _without_init(self.model)

    @property
    def encoder_init(self) -> str | None:
        """`model.encoder.init`."""
        encoder = self.model.get("encoder")
        return encoder.get("init") if isinstance(encoder, dict) else None


def _without_init(model: dict[str, Any]) -> ModelConfig:
    """The config of `model`, in which `encoder.init` is no part of the network."""
    encoder = model.get("encoder", {})
    inside = {k: v for k, v in encoder.items() if k != "init"} if isinstance(encoder, dict) else encoder
    return ModelConfig.from_dict({**model, "encoder": inside})


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
    `footprint_*`: see `losses.footprint_loss`.
    """

    charbonnier: Weight = 1.0
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
    """One supervised run.

    Attributes:
        workers: processes that make batches ahead; what they make does not depend on it.
        init_from: a model's name or file, whose description then holds where `model` says nothing else;
            encoder.safetensors of a pretraining; or a last.ckpt.
        layer_decay: each transformer block learns this much slower than the next.
        patience: validations without a better MAE before the run stops; 0 = never.
        export: the best weights by val MAE, or the last; always the last where val was trained on.
    """

    minutes: float | None = Field(default=60.0, gt=0)
    batch: int = Field(default=8, ge=1)
    crop_px: int = Field(default=256, ge=16, multiple_of=2)
    lr: float = Field(default=6e-4, gt=0)
    warmup: float = Field(default=0.03, ge=0, lt=1)
    weight_decay: float = 0.05
    clip_norm: float = Field(default=1.0, gt=0)
    ema_final: float = Field(default=0.998, ge=0, lt=1)
    workers: int = Field(default=0, ge=0)
    init_from: str | None = None
    freeze_encoder: bool = False
    layer_decay: float = Field(default=1.0, gt=0, le=1)
    validate_every: int = Field(default=250, ge=1)
    patience: int = Field(default=0, ge=0)
    export: Literal["best", "last"] = "best"
    data: DataSettings = DataSettings()
    augment: AugmentSettings = AugmentSettings()
    loss: LossSettings = LossSettings()

    @model_validator(mode="after")
    def _consistent(self) -> FinetuneSettings:
        if self.data.include_val and self.patience:
            raise ValueError("val chips that are trained on can choose nothing: no patience")
        if self.encoder_init and self.init_from:
            raise ValueError("init_from and model.encoder.init both bring an encoder: give one")
        if self.layer_decay < 1 and self.architecture.encoder.family == "cnn":
            raise ValueError("layer_decay is for transformers")
        return self

    @property
    def exports_best(self) -> bool:
        """Whether the best weights by val MAE are exported, rather than the last."""
        return self.export == "best" and not self.data.include_val


class DinoSettings(Settings):
    """DINOv2: heads, temperatures, the teacher's memory, weights of the losses.

    Attributes:
        class_prototypes, patch_prototypes: of the two heads.
        freeze_last: share of the run in which prototypes stay as they began.
    """

    class_prototypes: int = Field(default=65_536, ge=2)
    patch_prototypes: int = Field(default=65_536, ge=2)
    hidden: int = Field(default=2048, ge=1)
    bottleneck: int = Field(default=256, ge=1)
    student_temperature: float = Field(default=0.1, gt=0)
    teacher_temperature: float = Field(default=0.07, gt=0)
    teacher_temperature_start: float = Field(default=0.04, gt=0)
    temperature_warmup: float = Field(default=0.3, ge=0, le=1)
    momentum: float = Field(default=0.992, ge=0, le=1)
    momentum_end: float = Field(default=1.0, ge=0, le=1)
    freeze_last: float = Field(default=0.01, ge=0, le=1)
    dino_weight: float = Field(default=1.0, ge=0)
    ibot_weight: float = Field(default=1.0, ge=0)
    koleo_weight: float = Field(default=0.1, ge=0)


class MaeSettings(Settings):
    """Masked autoencoding.

    Attributes:
        mask: share hidden; unit: hidden and kept in squares of so many patches. A stem sees across the edges
            of what is kept, so larger squares leave it more of what it will meet later.
        width, depth, heads: of the decoder.
    """

    mask: float = Field(default=0.75, gt=0, lt=1)
    unit: int = Field(default=1, ge=1)
    width: int = Field(default=512, ge=4, multiple_of=4)
    depth: int = Field(default=8, ge=1)
    heads: int = Field(default=16, ge=1)


class ProbeSettings(Settings):
    """How useful are the frozen features? A ridge from patches to height, every `every` steps (0: never).

    Attributes:
        labels: chips with heights, one folder or several; None takes those of `data.chips`.
        chips: how many train chips are fitted and how many val chips scored.
    """

    every: int = Field(default=500, ge=0)
    labels: ChipPlaces | None = None
    chips: int = Field(default=32, ge=1)


class PretrainSettings(RunSettings):
    """One pretraining run.

    Attributes:
        batch: images per process and step.
        layer_decay: factor on the learning rate from each layer to the one below; patch_lr: another one on
            all that lies before the first block.
        keep_every: also keep the checkpoint of every n-th step for good (0: only the last).
        model: the height model whose encoder is pretrained.
    """

    name: str = "canopy-encoder"
    objective: Literal["dinov2", "mae"] = "dinov2"
    batch: int = Field(default=64, ge=2)
    lr: float = Field(default=1e-3, gt=0)
    lr_end: float = Field(default=1e-6, ge=0)
    warmup: float = Field(default=0.08, ge=0, lt=1)
    weight_decay: float = Field(default=0.04, ge=0)
    weight_decay_end: float = Field(default=0.4, ge=0)
    betas: tuple[float, float] = (0.9, 0.999)
    clip_norm: float = Field(default=3.0, ge=0)
    layer_decay: float = Field(default=0.9, gt=0, le=1)
    patch_lr: float = Field(default=0.2, gt=0, le=1)
    checkpoint_every: int = Field(default=250, ge=1)
    keep_every: int = Field(default=0, ge=0)
    data: PretrainDataSettings = PretrainDataSettings()
    views: ViewRules = ViewRules()
    dino: DinoSettings = DinoSettings()
    mae: MaeSettings = MaeSettings()
    probe: ProbeSettings = ProbeSettings()

    @model_validator(mode="after")
    def _views_divide_into_patches(self) -> PretrainSettings:
        if self.architecture.encoder.family == "cnn":
            raise ValueError("only transformers can be pretrained (model.encoder.family vit or rope)")
        if self.views.globals < 2 and self.objective == "dinov2":
            raise ValueError("views.globals: DINOv2 compares at least two")
        if self.encoder_init and "patch" not in self.model["encoder"]:
            return self  # the encoder says it when it is opened
        patch, rules = self.architecture.patch_px, self.rules
        for side in (rules.global_px, rules.local_px if rules.locals else patch):
            if side % patch:
                raise ValueError(f"views of {side} px do not divide into patches of {patch} px")
        if self.objective == "mae" and rules.global_px % (patch * self.mae.unit):
            raise ValueError(f"views do not divide into squares of mae.unit {self.mae.unit} patches")
        return self

    @property
    def rules(self) -> ViewRules:
        """How views are cut; MAE sees one view of each image."""
        return (
            self.views
            if self.objective == "dinov2"
            else self.views.model_copy(update={"globals": 1, "locals": 0})
        )
