"""Schedules: every branch runs, ends meet."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from canopy.training.optim import SHAPES, ema_decay, learning_rate, ramp
from canopy.training.settings import Ramp, weight_at

GRID = np.linspace(0, 1, 101)


@pytest.mark.parametrize("shape", ["cosine", "linear"])
@pytest.mark.parametrize("warmup", [0.0, 0.1, 0.5])
def test_the_learning_rate_rises_then_falls(warmup, shape):
    values = np.array([learning_rate(p, 1e-3, 1e-6, warmup, shape) for p in GRID])
    top = round(100 * warmup)
    assert values[top] == values.max() == 1e-3 and values[-1] == 1e-6 and values.min() > 0
    assert (np.diff(values[: top + 1]) > 0).all() and (np.diff(values[top:]) < 0).all()
    if warmup:
        assert values[0] == pytest.approx(1e-6) and values[top // 2] == pytest.approx(5e-4)
    middle = learning_rate((1 + warmup) / 2, 1e-3, 1e-6, warmup, shape)
    assert middle == pytest.approx((1e-3 + 1e-6) / 2)
    assert learning_rate(7.0, 1e-3, 1e-6, warmup, shape) == 1e-6


def test_a_constant_learning_rate_warms_up_too():
    assert learning_rate(0.05, 2.0, 0.1, 0.1, "constant") == pytest.approx(1.0)
    assert learning_rate(0.1, 2.0, 0.1, 0.1, "constant") == learning_rate(1.0, 2.0, 0.1, 0.1, "constant") == 2


@given(st.floats(0.1, 0.99), st.floats(0.001, 0.01), st.sampled_from(["cosine", "linear", "constant"]))
def test_after_warmup_it_never_rises(progress, step, shape):
    later = learning_rate(progress + step, 1.0, 0.01, 0.1, shape)
    assert later <= learning_rate(progress, 1.0, 0.01, 0.1, shape)


@given(
    progress=st.floats(0, 1), first=st.floats(0, 5), last=st.floats(0, 5), begin=st.floats(0, 0.5),
    length=st.floats(0, 0.5), shape=st.sampled_from(SHAPES),
)  # fmt: skip
def test_ramps_stay_between_their_ends_and_reach_them(progress, first, last, begin, length, shape):
    value = ramp(progress, first, last, begin, begin + length, shape)
    assert min(first, last) - 1e-12 <= value <= max(first, last) + 1e-12
    assert ramp(1.0, first, last, begin, begin + length, shape) == last
    if length > 1e-6:
        assert ramp(begin, first, last, begin, begin + length, shape) == first


@pytest.mark.parametrize("shape", ["linear", "cosine"])
@pytest.mark.parametrize(("start", "end"), [(0.04, 0.4), (0.992, 1.0), (1.0, 1e-6), (2.0, 2.0)])
def test_ramps_go_one_way_and_know_no_progress_beyond_the_run(shape, start, end):
    values = [ramp(p, start, end, shape=shape) for p in GRID]
    assert values[0] == start and values[-1] == end and values[50] == pytest.approx((start + end) / 2)
    steps = np.diff(values)
    assert (steps >= -1e-12).all() if end >= start else (steps <= 1e-12).all()
    assert ramp(-1, start, end, shape=shape) == start and ramp(2, start, end, shape=shape) == end


def test_ramp_shapes_on_the_way():
    assert ramp(0.5, 0.0, 2.0) == pytest.approx(1.0)
    assert ramp(0.25, 0.0, 2.0, 0.0, 1.0, "cosine") == pytest.approx(2 * 0.1464466, rel=1e-5)
    assert ramp(0.99, 0.5, 2.0, 0.0, 1.0, "step") == 0.5
    assert ramp(0.01, 0, 1, shape="cosine") < 0.001 and ramp(0.99, 0, 1, shape="cosine") > 0.999


def test_a_weight_is_a_number_or_a_ramp():
    assert weight_at(0.3, 0.9) == 0.3
    assert weight_at(Ramp(first=1.0, last=0.0, begin=0.2, end=0.4), 0.3) == pytest.approx(0.5)
    with pytest.raises(ValueError, match="lies before"):
        Ramp(first=0, last=1, begin=0.5, end=0.2)


def test_the_average_forgets_fast_at_first():
    decays = [ema_decay(step, 0.99) for step in range(2000)]
    assert decays[0] == pytest.approx(0.1) and decays[-1] == 0.99
    assert decays == sorted(decays)
