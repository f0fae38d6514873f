"""What the network sees where an image has no pixels. The same rule serves training and inference."""

from __future__ import annotations

import numpy as np
from scipy import ndimage

from canopy.errors import InputError

EMPTY_VALUE = 0.4  # close to the mean of aerial imagery: an empty crop looks like nothing in particular


def fill_invalid(rgb: np.ndarray, valid: np.ndarray) -> np.ndarray:
    """Replace invalid pixels by plausible ones.

    A network shown black collars sees dark, tall, shadowed forest or water that is not there. Holes
    inside the box of valid pixels take their nearest valid neighbour; outside, that box is mirrored as
    often as needed, so that a small plot in a large crop becomes a plausible continuous scene.
    Deterministic, and a function of this crop's pixels alone.

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
        box = box[:, nearest[0], nearest[1]]
    H, W = valid.shape
    around = ((0, 0), (int(top), int(H - bottom)), (int(left), int(W - right)))
    return np.pad(box, around, mode="symmetric")
