"""The shift between two height maps, measured on synthetic forests."""

from __future__ import annotations

import runpy
from pathlib import Path

import numpy as np
import pytest
from scipy import ndimage

from canopy.evaluation.pixels import ShiftMeter, measure_shift

forest = runpy.run_path(str(Path(__file__).with_name("stand.py")))["forest"]
TRUTH = forest(3, (220, 240)).astype(np.float64)
EVERYWHERE = np.ones(TRUTH.shape, bool)


def displaced(east_px: float, south_px: float) -> np.ndarray:
    """The truth's content moved east and south."""
    return ndimage.shift(TRUTH, (south_px, east_px), order=3, mode="nearest")


@pytest.mark.parametrize(("east", "south"), [(0, 0), (2, 0), (-3.5, 1.25), (0.4, -0.7), (8, -9)])
def test_found_to_a_tenth_of_a_pixel(east: float, south: float) -> None:
    noisy = displaced(east, south) + np.random.default_rng(0).normal(0, 2, TRUTH.shape)
    shift = measure_shift([(noisy, TRUTH, EVERYWHERE)], (1.0, 1.0))
    assert shift is not None
    assert shift.sure
    assert shift.east_m == pytest.approx(east, abs=0.12)
    assert shift.north_m == pytest.approx(-south, abs=0.12)


def test_metres_follow_the_pixel_and_windows_are_pooled() -> None:
    moved = displaced(2, -1)
    meter = ShiftMeter((0.5, 0.6))
    for rows in (np.s_[:110], np.s_[110:]):
        assert meter.add(moved[rows], TRUTH[rows], EVERYWHERE[rows])
    shift = meter.result()
    assert shift is not None
    assert shift.windows == 2
    assert shift.spread_m is not None and shift.spread_m < 0.3
    assert (shift.east_m, shift.north_m) == (pytest.approx(1.0, abs=0.08), pytest.approx(0.6, abs=0.08))


def test_holes_do_not_pull() -> None:
    valid = ndimage.gaussian_filter(np.random.default_rng(5).normal(size=TRUTH.shape), 8) > -0.03
    shift = measure_shift([(np.where(valid, displaced(3, 2), 0), TRUTH, valid)], (1.0, 1.0))
    assert shift is not None
    assert (shift.east_m, shift.north_m) == (pytest.approx(3, abs=0.15), pytest.approx(-2, abs=0.15))


def test_unlike_maps_are_not_sure() -> None:
    shift = measure_shift([(forest(9, TRUTH.shape), TRUTH, EVERYWHERE)], (1.0, 1.0))
    assert shift is not None
    assert not shift.sure
    assert "correlate" in str(shift.note)


def test_nothing_to_measure() -> None:
    flat = np.zeros_like(TRUTH)
    cases = [
        (flat, TRUTH, EVERYWHERE),
        (TRUTH, TRUTH, np.zeros_like(EVERYWHERE)),
        (TRUTH[:15, :15], TRUTH[:15, :15], EVERYWHERE[:15, :15]),
    ]
    assert measure_shift(cases, (1.0, 1.0)) is None
