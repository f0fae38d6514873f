"""The reference of the quality flag "out of domain": how training images look, and how far is too far."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from canopy.errors import DataError
from canopy.inference.quality import DESCRIPTORS, descriptor

_CROP_PX, _STEP_PX = 384, 128
_LEAST_SIDE_PX, _LEAST_VALID = 256, 0.9
# A covariance of fifteen numbers from a few hundred overlapping crops: some of the unit matrix steadies it.
_RIDGE = 0.05
_QUANTILE = 0.97


def fit_domain(inside: Sequence[np.ndarray], unseen: Sequence[np.ndarray]) -> dict[str, Any]:
    """Fit the reference on training images, and set the limit on held-out images of the same places.

    Args:
        inside: uint8 (3, H, W) images the model was trained on, 0,0,0 alone where there is none.
        unseen: held-out images; 97 % of them (mean over their crops) stay within the limit.

    Returns:
        JSON-ready: centre, scale, root, limit, and what they were made of.

    Raises:
        DataError: too few images of 256 px and more.
    """
    trained = [d for image in inside for d in crops_described(image)]
    held_out = [np.array(found) for image in unseen if (found := crops_described(image))]
    if len(trained) < 2 * DESCRIPTORS or not held_out:
        raise DataError(
            f"{len(trained)} training crops and {len(held_out)} held-out images describe no domain",
            expected=f"at least {2 * DESCRIPTORS} crops and one image, of {_LEAST_SIDE_PX} px or more",
        )
    table = np.array(trained)
    centre, scale = table.mean(axis=0), table.std(axis=0) + 1e-6
    mixed = np.cov(((table - centre) / scale).T) * (1 - _RIDGE) + _RIDGE * np.eye(DESCRIPTORS)
    root = np.linalg.cholesky(np.linalg.inv(mixed)).T
    distances = [
        float(np.linalg.norm(((crops - centre) / scale) @ root.T, axis=1).mean()) for crops in held_out
    ]
    return {
        "centre": np.round(centre, 6).tolist(), "scale": np.round(scale, 6).tolist(),
        "root": np.round(root, 4).tolist(), "limit": round(float(np.quantile(distances, _QUANTILE)), 4),
        "training_crops": len(table), "held_out_images": len(held_out),
    }  # fmt: skip


def crops_described(image: np.ndarray) -> list[np.ndarray]:
    """Descriptors of an image's overlapping crops; none of images that are small or have large holes."""
    h, w = image.shape[1:]
    if min(h, w) < _LEAST_SIDE_PX:
        return []
    side = min(_CROP_PX, h, w)
    found = []
    for row in range(0, h - side + 1, _STEP_PX):
        for col in range(0, w - side + 1, _STEP_PX):
            crop = image[:, row : row + side, col : col + side]
            if (crop.max(axis=0) > 0).mean() >= _LEAST_VALID:
                found.append(descriptor(crop.astype(np.float32) / 255.0))
    return found
