"""What `canopy data chips` is asked for: how pairs are cut, and how chips without a split get one.

Nothing heavy is imported: the command line makes its options of these fields.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from canopy.config import Settings, option

BUFFER_M = 50.0  # between training and test chips


class CutOptions(Settings):
    """How chips are cut; equal options and files give equal chips.

    The last chip of a row may be half or one and a half times as long as `size_px`. Labels are registered
    because crowns lean as far as `most_shift_m` in ordinary aerial images of mountains; chips with a larger
    shift are rejected.
    """

    size_px: Annotated[int, Field(ge=32, multiple_of=2)] = option(256, "Side of a chip's image, pixels.")
    gsd_m: Annotated[float, Field(ge=0.05, le=10)] = option(
        0.5, "Ground metres per image pixel; labels get twice it.", flags=("--gsd",)
    )
    rule: Literal["mean", "max"] = option(
        "mean", "Several label pixels become one: mean or max.", flags=("--label-rule",)
    )
    undo_shift: bool = option(
        True, "Measure and undo the shift of labels.", flags=("--register/--no-register",)
    )
    most_shift_m: Annotated[float, Field(gt=0, le=12)] = option(
        10.0, "Undo shifts up to this; reject chips beyond it.", flags=("--max-shift-m",)
    )
    rh: Annotated[int, Field(ge=0, le=100)] = option(98, "Relative height of GEDI shots (column gedi_path).")


class SplitOptions(Settings):
    """How chips without a split get one: whole blocks of ground, whole sites, a buffer around test chips."""

    buffer_m: Annotated[float, Field(ge=0)] = option(
        BUFFER_M, "Drop train chips closer than this to a test chip."
    )
    block_m: Annotated[float, Field(gt=0)] = option(
        1000.0, "Blocks that go to one split as a whole, where none is given."
    )
    val: Annotated[float, Field(ge=0)] = option(0.1, "Share of blocks for validation.")
    test: Annotated[float, Field(ge=0)] = option(0.1, "Share of blocks for testing.")
    held_out: list[str] = option(
        [], "Site (or pattern) that is test as a whole; repeat.", flags=("--hold-out",)
    )
    seed: int = option(0, "Of the splits, or of the first synthetic chip.")

    @model_validator(mode="after")
    def _leaves_training(self) -> SplitOptions:
        if self.val + self.test >= 1:
            raise ValueError(f"val {self.val:g} and test {self.test:g} leave nothing to train on")
        return self
