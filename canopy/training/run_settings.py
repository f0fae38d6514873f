"""What the settings of pretraining and of fine-tuning share."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, field_validator

from canopy.config import Settings
from canopy.models.config import ModelConfig


def _several(value: Any) -> Any:
    return (value,) if isinstance(value, str | Path) else value


# One folder of `canopy data chips`, or a list of them: `data.chips=[chips,synth]`.
ChipPlaces = Annotated[tuple[Path, ...], BeforeValidator(_several), Field(min_length=1)]


def shown(places: Sequence[Path] | None) -> list[str] | None:
    """Places by name alone, for a card: folders are this machine's business."""
    return None if places is None else [place.name for place in places]


class RunSettings(Settings):
    """What every training run has.

    Attributes:
        threads: of torch, in each process.
        devices, nodes: processes on each machine, and machines. Batches are per process.
        compile: torch.compile what takes the time; costs minutes at the start.
        model: what differs from `ModelConfig`'s defaults.
        licence: of the weights, for the card; whose they are only you can say.
    """

    name: str = "canopy"
    seed: int = Field(default=0, ge=0)
    precision: Literal["32-true", "bf16-mixed"] = "32-true"
    threads: int = Field(default=1, ge=1)
    devices: int = Field(default=1, ge=1)
    nodes: int = Field(default=1, ge=1)
    compile: bool = False
    log_every: int = Field(default=25, ge=1)
    model: dict[str, Any] = Field(default_factory=dict)
    licence: str = "not stated"

    @field_validator("model")
    @classmethod
    def _known_model(cls, value: dict[str, Any]) -> dict[str, Any]:
        ModelConfig.from_dict(value)  # raises on unknown keys
        return value

    @property
    def processes(self) -> int:
        """On all machines together."""
        return self.devices * self.nodes

    @property
    def architecture(self) -> ModelConfig:
        """The model's config with its defaults."""
        return ModelConfig.from_dict(self.model)
