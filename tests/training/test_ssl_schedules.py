"""Schedules at their ends, in the middle, and in between."""

from __future__ import annotations

import numpy as np
import pytest

from canopy.training import ssl_schedules as s

GRID = np.linspace(0, 1, 101)


@pytest.mark.parametrize("shape", [s.linear, s.cosine])
@pytest.mark.parametrize(("start", "end"), [(0.04, 0.4), (0.992, 1.0), (1.0, 1e-6), (2.0, 2.0)])
def test_from_start_to_end(shape, start, end):
    values = [shape(p, start, end) for p in GRID]
    assert values[0] == pytest.approx(start) and values[-1] == pytest.approx(end)
    assert values[50] == pytest.approx((start + end) / 2)
    steps = np.diff(values)
    assert (steps >= -1e-12).all() if end >= start else (steps <= 1e-12).all()
    assert shape(-1, start, end) == pytest.approx(start) and shape(2, start, end) == pytest.approx(end)


def test_a_cosine_leaves_and_arrives_slowly():
    assert s.cosine(0.01, 0, 1) < 0.001 and s.cosine(0.99, 0, 1) > 0.999
    assert s.cosine(0.25, 0, 1) == pytest.approx((1 - np.sqrt(0.5)) / 2)


@pytest.mark.parametrize("warmup", [0.0, 0.1, 0.5])
def test_the_learning_rate_rises_then_falls(warmup):
    values = np.array([s.warmup_cosine_to(p, 1e-3, 1e-6, warmup) for p in GRID])
    top = round(100 * warmup)
    assert values[top] == pytest.approx(1e-3) and values.max() == pytest.approx(1e-3)
    assert values[-1] == pytest.approx(1e-6)
    assert (np.diff(values[: top + 1]) > 0).all() and (np.diff(values[top:]) < 0).all()
    if warmup:
        assert values[0] == 0 and values[top // 2] == pytest.approx(1e-3 * (top // 2) / top)
    middle = s.warmup_cosine_to((1 + warmup) / 2, 1e-3, 1e-6, warmup)
    assert middle == pytest.approx((1e-3 + 1e-6) / 2)


@pytest.mark.parametrize("warmup", [-0.1, 1.0])
def test_a_warmup_over_everything_is_refused(warmup):
    with pytest.raises(ValueError, match="warm-up"):
        s.warmup_cosine_to(0.5, 1, 0, warmup)


@pytest.mark.parametrize("warmup", [0.0, 0.3, 1.0])
def test_the_temperature_rises_and_stays(warmup):
    values = np.array([s.warmup_constant(p, 0.04, 0.07, warmup) for p in GRID])
    assert (np.diff(values) >= 0).all() and values[-1] == pytest.approx(0.07)
    assert values[0] == pytest.approx(0.04 if warmup else 0.07)
    assert (values[warmup <= GRID] == 0.07).all()


def test_layers_further_down_learn_more_slowly():
    factors = [s.layer_factor(i, 6, 0.8) for i in range(6)]
    assert factors[-1] == 1 and factors[0] == pytest.approx(0.8**5)
    assert np.allclose(np.array(factors[:-1]) / factors[1:], 0.8)
    assert s.layer_factor(2, 6, 1.0) == 1
    with pytest.raises(ValueError, match="layer 6"):
        s.layer_factor(6, 6, 0.8)
