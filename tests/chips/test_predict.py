"""A chip predicted whole: whatever the lattice of crops, every pixel is its crops' weighted mean."""

from __future__ import annotations

import numpy as np
import pytest

from canopy.chips.store import Chip, ChipRow, crop_of, predict_whole


@pytest.fixture
def chip() -> Chip:
    rng = np.random.default_rng(0)
    rgb = rng.integers(1, 256, (3, 100, 140), dtype=np.uint8)
    return Chip(ChipRow("a", "s", "lidar", "val"), rgb, np.ones((50, 70), np.float32))


LATTICES = {
    "one crop, larger than the chip": (160, lambda n: [0], 60.0),
    "side by side": (50, lambda n: [*range(0, n - 50, 50), n - 50], 0.0),
    "overlapping": (64, lambda n: [*range(0, n - 64, 20), n - 64], 24.0),
}


@pytest.mark.parametrize("lattice", LATTICES)
def test_crops_that_agree_are_blended_into_what_they_say(chip: Chip, lattice: str) -> None:
    side, starts, fade_px = LATTICES[lattice]
    asked = []

    def network(crops: np.ndarray) -> np.ndarray:
        asked.append(len(crops))
        return np.stack([crops[:, 0], 2 * crops[:, 1]], axis=1)

    made = predict_whole(network, chip, side, starts, fade_px, batch=3)
    wanted = chip.rgb[:2].astype(float).reshape(2, 50, 2, 70, 2).mean(axis=(2, 4)) / 255
    np.testing.assert_allclose(made, wanted * [[[1]], [[2]]], atol=1e-6)
    assert made.dtype == np.float32 and max(asked) <= 3
    assert sum(asked) == len(starts(100)) * len(starts(140))


def test_a_crop_fades_out_towards_its_edges(chip: Chip) -> None:
    """Two crops that differ: across their overlap the one gives way to the other, evenly."""

    def network(crops: np.ndarray) -> np.ndarray:
        return np.zeros_like(crops[:, :1]) + np.arange(len(crops))[:, None, None, None]

    made = predict_whole(network, chip, 100, lambda n: [0] if n == 100 else [0, 40], 60.0)
    line = made[0, 25]
    assert (line[:20] == 0).all() and (line[50:] == 1).all() and (np.diff(line[19:51]) > 0).all()
    np.testing.assert_allclose(line[20:50], 1 - line[20:50][::-1], atol=1e-6)


def test_what_a_chip_lacks_for_a_crop_is_filled(chip: Chip) -> None:
    chip.rgb[:, :10] = 0  # no image
    crop = crop_of(chip, 0, 100, 64)
    assert crop.shape == (3, 64, 64) and crop.dtype == np.float32 and (crop > 0).all()
    np.testing.assert_array_equal(crop[:, 10:, :40], chip.rgb[:, 10:64, 100:].astype(np.float32) / 255)
