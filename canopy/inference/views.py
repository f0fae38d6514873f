"""Flips and quarter turns at prediction: how far the network contradicts itself on the same ground."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np


def over_views(network: Callable[[np.ndarray], np.ndarray], crops: np.ndarray, views: int) -> np.ndarray:
    """What the network gives for crops; with several views, their height and the spread over all views.

    That spread is the standard deviation of the mixture of the views' bin weights about the height of the
    crop as it is: the mean over the views of s_v^2 + (h_v - h)^2, rooted.

    Args:
        network: crops (n, 3, h, w) -> layers (n, l, h, w); heights and spreads, with several views.
        crops: square ones, (n, 3, side, side).
        views: 1 to 8 of the square's symmetries, the crop as it is first.
    """
    made = network(crops)
    if views == 1:
        return made
    height, square = made[:, 0], made[:, 1].astype(np.float64) ** 2
    for view in range(1, views):
        other = _turn(network(_turn(crops, view)), view, back=True)
        square += other[:, 1].astype(np.float64) ** 2 + (other[:, 0].astype(np.float64) - height) ** 2
    return np.stack([height, np.sqrt(square / views).astype(np.float32)], axis=1)


def _turn(maps: np.ndarray, view: int, *, back: bool = False) -> np.ndarray:
    """View 0..7 of (n, c, side, side): quarter turns, mirrored from 4 on; `back` undoes it."""
    turns, mirrored = view % 4, view >= 4
    if back:
        maps = maps[..., ::-1] if mirrored else maps
        return np.rot90(maps, -turns, (-2, -1))
    turned = np.rot90(maps, turns, (-2, -1))
    return np.ascontiguousarray(turned[..., ::-1] if mirrored else turned)
