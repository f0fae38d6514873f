"""The arithmetic of change."""

from __future__ import annotations

import numpy as np
import pytest

from canopy.errors import InputError
from canopy.evaluation.change import (
    CANOPY_GAIN,
    CANOPY_LOSS,
    GAIN,
    LOSS,
    NO_CHANGE,
    MapError,
    choose_error,
    classify,
    difference_interval,
    z_of,
)


def window(heights, lower=None, upper=None):
    return np.stack([layer for layer in (heights, lower, upper) if layer is not None]).astype(float)


def test_sigmas_add_in_quadrature():
    a, b = window([[10.0, 0.0]]), window([[13.0, 0.5]])
    errors = MapError(3.0, None, 0.0, ""), MapError(4.0, None, 0.0, "")
    change, lower, upper = difference_interval(a, b, errors, 2.0)
    np.testing.assert_allclose(change, [[3.0, 0.5]])
    np.testing.assert_allclose(upper - change, 10.0)
    np.testing.assert_allclose(change - lower, 10.0)


def test_interval_bands_of_normal_errors_give_the_same_as_their_sigma():
    z90 = z_of(0.9)
    a = window([[12.0]], np.array([[12 - z90 * 2]]), np.array([[12 + z90 * 2]]))
    b = window([[20.0]], np.array([[20 - z90 * 1.5]]), np.array([[20 + z90 * 1.5]]))
    bands = MapError(None, 0.9, 0.0, ""), MapError(None, 0.9, 0.0, "")
    sigmas = MapError(2.0, None, 0.0, ""), MapError(1.5, None, 0.0, "")
    for confidence in (0.8, 0.95):
        z = z_of(confidence)
        for one, two in zip(
            difference_interval(a, b, bands, z), difference_interval(a, b, sigmas, z), strict=True
        ):
            np.testing.assert_allclose(one, two, rtol=1e-12)


def test_the_rule_errs_at_its_nominal_rate():
    """No change at all, normal errors of the stated size: 5 % are called changed."""
    rng = np.random.default_rng(0)
    truth = rng.uniform(5, 25, (400, 400))
    a, b = window(truth + rng.normal(0, 2, truth.shape)), window(truth + rng.normal(0, 3, truth.shape))
    errors = MapError(2.0, None, 0.0, ""), MapError(3.0, None, 0.0, "")
    _, lower, upper = difference_interval(a, b, errors, z_of(0.95))
    assert np.mean((lower > 0) | (upper < 0)) == pytest.approx(0.05, abs=0.003)


def test_rounding_to_whole_metres_counts():
    """Two maps that are exact but for rounding: sigma of the difference is sqrt(2 / 12) m."""
    tiny = MapError(1e-9, None, 1.0, "")
    change, lower, _ = difference_interval(window([[5.0]]), window([[6.0]]), (tiny, tiny), 1.0)
    assert (change - lower)[0, 0] == pytest.approx(np.sqrt(2 / 12))


def test_asymmetric_bounds_use_the_ends_that_matter():
    """A gain is limited by how low B and how high A may be, a loss by the others."""
    a = window([[10.0]], np.array([[2.0]]), np.array([[11.0]]))
    b = window([[14.0]], np.array([[13.0]]), np.array([[30.0]]))
    bands = MapError(None, 0.9, 0.0, ""), MapError(None, 0.9, 0.0, "")
    change, lower, upper = difference_interval(a, b, bands, z_of(0.9))
    assert lower[0, 0] == pytest.approx(4 - np.sqrt(2))
    assert upper[0, 0] == pytest.approx(4 + np.sqrt(16**2 + 8**2))
    assert change[0, 0] == 4


def test_classes():
    a = np.array([[10.0, 1.0, 10.0, 10.0, 1.0, 1.0]])
    b = np.array([[20.0, 9.0, 5.0, 1.0, 1.8, 2.5]])
    half = np.array([[3.0, 3.0, 3.0, 3.0, 0.5, 3.0]])
    change = b - a
    codes = classify(a, b, change - half, change + half, 2.0)
    assert codes.tolist() == [[GAIN, CANOPY_GAIN, LOSS, CANOPY_LOSS, GAIN, NO_CHANGE]]


def test_whose_error_counts():
    assert choose_error("a", 2.5, 0.9, 0.0).sigma_m == 2.5
    assert choose_error("a", None, 0.9, 0.0).level == 0.9
    assert choose_error("b", None, None, 1.0).source.startswith("ASSUMED")
    with pytest.raises(InputError, match="--sigma-b"):
        choose_error("b", -1.0, None, 0.0)
    with pytest.raises(InputError, match="--confidence"):
        z_of(95)
