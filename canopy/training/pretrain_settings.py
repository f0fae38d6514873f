"""Every setting of a pretraining run, typed; a config file holds only what differs from these defaults."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field, field_validator, model_validator

from canopy.chips.views import ViewRules
from canopy.config import Settings
from canopy.training.run_settings import ChipPlaces, RunSettings


class DataSettings(Settings):
    """What is looked at.

    Attributes:
        chips: a folder made by `canopy data chips`, or a list; splits: which of its chips.
        site_power: a site counts as its number of chips to this power: 1 draws chips alike, 0 sites alike.
        workers: processes that prepare views ahead.
    """

    chips: ChipPlaces = (Path("chips"),)
    splits: tuple[str, ...] = ("train",)
    site_power: float = Field(default=0.5, ge=0, le=1)
    workers: int = Field(default=0, ge=0)


class ViewSettings(Settings):
    """See canopy.chips.views.ViewRules; areas are shares of a chip."""

    global_px: int = Field(default=224, gt=0)
    local_px: int = Field(default=96, gt=0)
    globals: int = Field(default=2, ge=2)
    locals: int = Field(default=8, ge=0)
    global_area: tuple[float, float] = (0.32, 1.0)
    local_area: tuple[float, float] = (0.05, 0.32)
    aspect: float = Field(default=4 / 3, ge=1)
    colour: float = Field(default=0.8, ge=0)

    @field_validator("global_area", "local_area")
    @classmethod
    def _shares_rise(cls, value: tuple[float, float]) -> tuple[float, float]:
        if not 0 < value[0] <= value[1] <= 1:
            raise ValueError("two rising shares of the chip are needed, above 0 and at most 1")
        return value


class FinalSettings(Settings):
    """The last `share` of the run sees larger views (DINOv2's high-resolution phase); 0 leaves it out."""

    share: float = Field(default=0.0, ge=0, lt=1)
    global_px: int = Field(default=448, gt=0)
    local_px: int = Field(default=192, gt=0)


class GramSettings(Settings):
    """DINOv3's Gram anchoring: from progress `after` on, patches keep the likenesses that the teacher of an
    earlier time saw; it is renewed every `renew_every` steps (0: never). Weight 0 leaves it out."""

    weight: float = Field(default=0.0, ge=0)
    after: float = Field(default=0.7, ge=0, lt=1)
    renew_every: int = Field(default=10_000, ge=0)


class DinoSettings(Settings):
    """DINOv2: heads, temperatures, the teacher's memory, weights of the losses.

    Attributes:
        class_prototypes, patch_prototypes: of the two heads.
        freeze_last: share of the run in which prototypes stay as they began.
        centring: how the teacher's scores become targets.
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
    centring: Literal["sinkhorn", "softmax"] = "sinkhorn"
    freeze_last: float = Field(default=0.01, ge=0, le=1)
    dino_weight: float = Field(default=1.0, ge=0)
    ibot_weight: float = Field(default=1.0, ge=0)
    koleo_weight: float = Field(default=0.1, ge=0)
    gram: GramSettings = GramSettings()


class MaeSettings(Settings):
    """Masked autoencoding.

    Attributes:
        mask: share hidden; unit: hidden and kept in squares of so many patches. A stem sees across the edges
            of what is kept, so larger squares leave it more of what it will meet later.
        width, depth, heads: of the decoder.
        batch, view_px, area: None takes the run's batch and the global views' side and area.
    """

    mask: float = Field(default=0.75, gt=0, lt=1)
    unit: int = Field(default=1, ge=1)
    width: int = Field(default=512, ge=4, multiple_of=4)
    depth: int = Field(default=8, ge=1)
    heads: int = Field(default=16, ge=1)
    batch: int | None = Field(default=None, ge=2)
    view_px: int | None = Field(default=None, gt=0)
    area: tuple[float, float] | None = None


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
    """One pretraining run. It ends after `steps`, or `minutes` of training if those come first.

    Only a run bounded by steps alone repeats bit for bit: minutes are this machine's business.

    Attributes:
        batch: images per process and step.
        layer_decay: factor on the learning rate from each layer to the one below; patch_lr: another one on
            all that lies before the first block.
        keep_every: also keep the checkpoint of every n-th step for good (0: only the last).
        strategy: of several processes: ddp (each holds everything) or fsdp (weights, gradients, the
            optimiser's moments and the teacher are spread over all, see `canopy.training.sharding`).
        model: the height model whose encoder is pretrained.
    """

    name: str = "canopy-encoder"
    objective: Literal["dinov2", "mae"] = "dinov2"
    steps: int = Field(default=100_000, ge=1)
    minutes: float | None = Field(default=None, gt=0)
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
    device: Literal["cpu", "cuda", "auto"] = "cpu"
    strategy: Literal["auto", "ddp", "fsdp"] = "auto"
    checkpoint_every: int = Field(default=250, ge=1)
    keep_every: int = Field(default=0, ge=0)
    data: DataSettings = DataSettings()
    views: ViewSettings = ViewSettings()
    final: FinalSettings = FinalSettings()
    dino: DinoSettings = DinoSettings()
    mae: MaeSettings = MaeSettings()
    probe: ProbeSettings = ProbeSettings()

    @model_validator(mode="after")
    def _views_divide_into_patches(self) -> PretrainSettings:
        if self.processes > 1 and self.device == "auto":
            raise ValueError("several devices need device=cuda or device=cpu to be said")
        if self.strategy == "fsdp" and self.compile:
            raise ValueError("fsdp and compile have not been tried together: choose one")
        if self.architecture.encoder.family == "cnn":
            raise ValueError("only transformers can be pretrained (model.encoder.family vit or rope)")
        patch = self.architecture.patch_px
        rules = self.rules(), self.rules(final=True)
        for side in {r.global_px for r in rules} | {r.local_px for r in rules if r.locals_}:
            if side % patch:
                raise ValueError(f"views of {side} px do not divide into patches of {patch} px")
        if self.objective == "mae" and any(r.global_px % (patch * self.mae.unit) for r in rules):
            raise ValueError(f"views do not divide into squares of mae.unit {self.mae.unit} patches")
        return self

    @property
    def images(self) -> int:
        """Images per process and step."""
        return (self.mae.batch or self.batch) if self.objective == "mae" else self.batch

    def rules(self, final: bool = False) -> ViewRules:
        """How views are cut, in the main or in the final phase. MAE sees one view of each image."""
        v, late = self.views, self.final if final and self.final.share else None
        wide, near = (late.global_px, late.local_px) if late else (v.global_px, v.local_px)
        if self.objective == "mae":
            side = wide if late else self.mae.view_px or wide
            return ViewRules(
                side, side, 1, 0, self.mae.area or v.global_area, v.local_area, v.aspect, v.colour
            )
        return ViewRules(wide, near, v.globals, v.locals, v.global_area, v.local_area, v.aspect, v.colour)
