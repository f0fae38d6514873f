"""Flips and turns: what is put back lies where it came from, and disagreement becomes spread."""

from __future__ import annotations

import numpy as np
import pytest

from canopy.inference.predictor import over_views


def crops() -> np.ndarray:
    return np.random.default_rng(0).random((2, 3, 12, 12)).astype(np.float32)


def alike(rgb: np.ndarray) -> np.ndarray:
    """The same for all views: a height per pixel, and half of it for spread."""
    height = 10 * rgb[:, 0]
    return np.stack([height, height / 2], axis=1)


def one_sided(rgb: np.ndarray) -> np.ndarray:
    """Adds its column number to the height, whichever way the image lies; a spread of 1."""
    height = 10 * rgb[:, 0] + np.arange(rgb.shape[-1])
    return np.stack([height, np.ones_like(height)], axis=1)


def test_one_view_is_the_network_itself() -> None:
    np.testing.assert_array_equal(over_views(one_sided, crops(), 1), one_sided(crops()))


@pytest.mark.parametrize("views", [2, 4, 8])
def test_a_network_that_does_not_mind_keeps_its_spread(views: int) -> None:
    np.testing.assert_allclose(over_views(alike, crops(), views), alike(crops()), rtol=1e-5)


def test_disagreement_is_added_to_the_spread() -> None:
    rgb = crops()
    made = over_views(one_sided, rgb, 8)
    np.testing.assert_allclose(made[:, 0], one_sided(rgb)[:, 0], rtol=1e-6)
    # The eight symmetries show a pixel in column x, 11 - x, y or 11 - y, each twice.
    y, x = np.mgrid[:12, :12]
    off = np.stack([x - x, 11 - 2 * x, y - x, 11 - y - x])
    np.testing.assert_allclose(made[0, 1], np.sqrt(1 + (off**2).mean(axis=0)), rtol=1e-5)
