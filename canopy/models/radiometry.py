"""Moving an image's colours onto those a model was trained on.

The published models were trained on satellite mosaics; aerial images are darker, bluer or more contrasty.
Their authors move each band linearly so that its 5th and 95th percentile fall onto the satellite's (Tolan
et al. 2024, arXiv 2304.07213). Here the image's percentiles are measured once per scene and then fixed: were
they measured crop by crop, a pixel's height would depend on how the map is cut.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from canopy.errors import ConfigError

_EXPECTED = "none, match, the target's r5,r95,g5,g95,b5,b95 in 0..1, or the image's six and then the target's"
_Z95 = 1.6448536269514722  # 95th percentile of the standard normal distribution


@dataclass(frozen=True)
class Stretch:
    """Moves percentiles `source` onto `target`, band by band.

    Attributes:
        source, target: 5th and 95th percentile of each band, in the model's units (0..1), in the order
            r5, r95, g5, g95, b5, b95.
    """

    source: tuple[float, ...]
    target: tuple[float, ...]

    def __post_init__(self) -> None:
        if len(self.source) != len(self.target) or not self.source or len(self.source) % 2:
            raise ConfigError(
                f"{len(self.source)} percentiles onto {len(self.target)}", expected="two for each band, both"
            )
        for what, values in (("the image's", self.source), ("the target's", self.target)):
            for low, high in zip(values[::2], values[1::2], strict=True):
                if not (math.isfinite(low) and math.isfinite(high) and low < high):
                    raise ConfigError(
                        f"{what} percentiles {low:.4g} and {high:.4g} leave no contrast",
                        expected="a 5th percentile below the 95th in every band",
                    )

    def factors(self) -> tuple[list[float], list[float]]:
        """Per-band factor and offset: moved = factor * value + offset. Values are not clipped."""
        factor, offset = [], []
        for i in range(0, len(self.source), 2):
            low, high = self.source[i : i + 2]
            wanted_low, wanted_high = self.target[i : i + 2]
            factor.append((wanted_high - wanted_low) / (high - low))
            offset.append(wanted_low - factor[-1] * low)
        return factor, offset

    def describe(self) -> str:
        """`r5,r95,... -> r5,r95,...`, as the tags of a map record it."""
        return " -> ".join(",".join(f"{v:.5g}" for v in values) for values in (self.source, self.target))


@dataclass(frozen=True)
class Wish:
    """What `--radiometry` asks for. `source` None: to be measured; `target` None: the model's own."""

    source: tuple[float, ...] | None = None
    target: tuple[float, ...] | None = None


def parse_radiometry(text: str) -> Wish | None:
    """Read `--radiometry`.

    Args:
        text: `none`; `match` (the image's percentiles, measured, onto the model's); six target percentiles;
            or the image's six followed by the target's six, which measures nothing.

    Returns:
        None for `none`.

    Raises:
        ConfigError: anything else.
    """
    if text == "none":
        return None
    if text == "match":
        return Wish()
    try:
        values = tuple(float(part) for part in text.split(","))
    except ValueError:
        values = ()
    if len(values) not in (6, 12) or not all(0 <= v <= 1 for v in values):
        raise ConfigError(f"cannot read {text!r}", where="--radiometry", expected=_EXPECTED)
    wish = Wish(None, values) if len(values) == 6 else Wish(values[:6], values[6:])
    Stretch(wish.source or wish.target or (), wish.target or ())  # refuses percentiles out of order
    return wish


def normal_percentiles(mean: tuple[float, ...], std: tuple[float, ...]) -> tuple[float, ...]:
    """5th and 95th percentiles of normally distributed bands: mean -+ 1.645 std.

    What is left to say where only mean and standard deviation were published.
    """
    return tuple(round(m + z * s, 4) for m, s in zip(mean, std, strict=True) for z in (-_Z95, _Z95))
