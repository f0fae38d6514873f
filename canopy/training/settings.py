"""Every setting of a fine-tuning run, typed; a config file holds only what differs from these defaults."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic import Field, field_validator

from canopy.config import Settings
from canopy.models.config import ModelConfig


class DataSettings(Settings):
    """`chips`: the chips file; shares are chances of a sample coming from plots or the synthetic forest."""

    chips: Path = Path("chips.safetensors")
    neon_share: float = 0.12
    synth_share: float = 0.12


class AugmentSettings(Settings):
    """See canopy.chips.augment.AugmentConfig."""

    colour: float = 1.0
    gsd_low: float = 0.8
    gsd_high: float = 1.25
    gsd_chance: float = 0.5
    hide_chance: float = 0.15
    black_chance: float = 0.15


class LossSettings(Settings):
    """Weights of the loss terms, and how far labels may move (metres = label pixels)."""

    charbonnier: float = 1.0
    silog: float = 0.0
    gradient: float = 0.3
    two_hot: float = 0.3
    shift_reach_m: int = 2
    shift_penalty_m: float = 0.1
    shift_after: float = 0.08  # share of the run before labels may move: a random model must not choose


class FinetuneSettings(Settings):
    """One supervised run. `minutes` bounds it in time, `steps` in work; the first to come ends it."""

    name: str = "canopy"
    seed: int = 0
    minutes: float = 60.0
    steps: int = 100_000
    batch: int = 8
    crop_px: int = 256
    lr: float = 6e-4
    weight_decay: float = 0.05
    clip_norm: float = 1.0
    warmup: float = 0.03
    ema_final: float = 0.998
    precision: str = "32-true"
    threads: int = 1
    workers: int = 0  # processes that prepare samples ahead; one keeps the order of samples as with none
    device: str = "cpu"
    init_from: Path | None = None  # a run's last.ckpt whose averaged weights to start from, where they fit
    log_every: int = 25
    validate_every: int = 250
    data: DataSettings = DataSettings()
    augment: AugmentSettings = AugmentSettings()
    loss: LossSettings = LossSettings()
    model: dict[str, Any] = Field(default_factory=dict)

    @field_validator("model")
    @classmethod
    def _known_model(cls, value: dict[str, Any]) -> dict[str, Any]:
        ModelConfig.from_dict(value)  # raises on unknown keys
        return value
