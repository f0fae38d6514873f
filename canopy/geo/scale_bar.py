"""A scale bar for pictures of maps."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def draw_scale_bar(axes: Axes, shape: tuple[int, ...], metres_per_px: float) -> None:
    """A bar of a round length, about a fifth of a picture (h, w), in its lower left corner."""
    length_m = round_length(shape[1] * metres_per_px / 5)
    label = f"{length_m / 1000:g} km" if length_m >= 1000 else f"{length_m:g} m"
    x, y, width = 0.03, 0.035, length_m / (metres_per_px * shape[1])
    for colour, thick in (("black", 5), ("white", 3)):
        axes.plot(
            [x, x + width], [y, y], transform=axes.transAxes, color=colour, lw=thick, solid_capstyle="butt"
        )
    box = {"facecolor": "black", "alpha": 0.55, "edgecolor": "none", "pad": 1.5}
    axes.text(x, y + 0.02, label, transform=axes.transAxes, color="white", fontsize=8, va="bottom", bbox=box)


def round_length(metres: float) -> float:
    """The largest 1, 2 or 5 times a power of ten that is not above `metres`.

    >>> round_length(437), round_length(0.13)
    (200.0, 0.1)
    """
    power = 10.0 ** np.floor(np.log10(metres))
    return float(max(step * power for step in (1, 2, 5) if step * power <= metres * (1 + 1e-9)))
