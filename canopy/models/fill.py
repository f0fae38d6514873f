"""What the network sees where an image has no pixels. The same rule serves training and inference."""

from __future__ import annotations

import numpy as np
from scipy import ndimage

from canopy.errors import InputError

EMPTY_VALUE = 0.4  # close to the mean of aerial imagery: an empty crop looks like nothing in particular


def fill_invalid(rgb: np.ndarray, valid: np.ndarray) -> np.ndarray:
    """Replace invalid pixels by plausible ones.

    A network shown black collars sees dark, tall, shadowed forest or water that is not there, and one shown
    the border's pixels drawn out into streaks sees smooth, low ground: 3 to 5 m too low beside the edges of
    a turned image. So every border is a mirror: a pixel inside the box of valid pixels takes the one as far
    behind its nearest valid neighbour (or the valid one nearest to that); outside, the box is mirrored as
    often as needed, and a small plot in a large crop becomes a plausible continuous scene. Deterministic,
    and a function of this crop's pixels alone.

    Args:
        rgb: float (C, H, W); values where `valid` is False are ignored and may be NaN.
        valid: bool (H, W).

    Returns:
        float32 (C, H, W), finite wherever the valid input is; `rgb` itself where nothing is invalid.

    Raises:
        InputError: where the shapes do not match.
    """
    if rgb.ndim != 3 or valid.shape != rgb.shape[1:]:
        raise InputError(
            f"image {rgb.shape} and validity {valid.shape} do not match", expected="(C, H, W) and (H, W)"
        )
    if valid.all():
        return rgb.astype(np.float32, copy=False)
    rows, cols = np.flatnonzero(valid.any(axis=1)), np.flatnonzero(valid.any(axis=0))
    if rows.size == 0:
        return np.full(rgb.shape, EMPTY_VALUE, np.float32)
    top, bottom, left, right = rows[0], rows[-1] + 1, cols[0], cols[-1] + 1
    box = rgb[:, top:bottom, left:right].astype(np.float32)
    inside = valid[top:bottom, left:right]
    if not inside.all():
        nearest = ndimage.distance_transform_edt(~inside, return_distances=False, return_indices=True)
        away = np.indices(inside.shape) - nearest
        last = np.array(inside.shape)[:, None, None] - 1
        behind = np.clip(nearest - away + np.sign(away), 0, last)  # the neighbour itself is mirrored too
        rows, cols = nearest[:, behind[0], behind[1]]
        box = box[:, rows, cols]
    H, W = valid.shape
    around = ((0, 0), (int(top), int(H - bottom)), (int(left), int(W - right)))
    return np.pad(box, around, mode="symmetric")
