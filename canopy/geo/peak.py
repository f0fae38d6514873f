"""The highest point of a correlation surface, finer than its pixels."""

from __future__ import annotations

import numpy as np


def peak_of(surface: np.ndarray) -> tuple[float, float, float]:
    """(down, right) in pixels from the middle of (h, w) to its highest point, and the height there.

    The place is refined by the parabola through the point's neighbours, in each direction.
    """
    row, col = (int(i) for i in np.unravel_index(surface.argmax(), surface.shape))
    return (
        row + _vertex(surface[:, col], row) - surface.shape[0] // 2,
        col + _vertex(surface[row], col) - surface.shape[1] // 2,
        float(surface[row, col]),
    )


def _vertex(line: np.ndarray, at: int) -> float:
    if not 0 < at < len(line) - 1:
        return 0.0
    before, here, after = (float(v) for v in line[at - 1 : at + 2])
    bend = before - 2 * here + after
    return 0.0 if bend >= 0 else 0.5 * (before - after) / bend
