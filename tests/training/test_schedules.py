"""Schedules: every branch runs, ends meet."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from canopy.training.schedules import SHAPES, ema_decay, lr_factor, ramp, warmup_cosine
from canopy.training.settings import Ramp, weight_at


def test_warmup_rises_to_one_then_cosine_falls_to_the_floor():
    assert warmup_cosine(0.0, 0.1) == pytest.approx(1e-3)
    assert warmup_cosine(0.05, 0.1) == pytest.approx(0.5)
    assert warmup_cosine(0.1, 0.1) == pytest.approx(1.0)
    assert warmup_cosine(0.55, 0.1, floor=0.0) == pytest.approx(0.5)
    assert warmup_cosine(1.0, 0.1, floor=0.02) == pytest.approx(0.02)
    assert warmup_cosine(7.0, 0.1, floor=0.02) == pytest.approx(0.02)


@given(st.floats(0.1, 0.99), st.floats(0.001, 0.01), st.sampled_from(["cosine", "linear", "constant"]))
def test_after_warmup_it_never_rises(progress, step, shape):
    assert lr_factor(progress + step, shape, 0.1) <= lr_factor(progress, shape, 0.1)


def test_linear_and_constant():
    assert lr_factor(0.55, "linear", 0.1, floor=0.0) == pytest.approx(0.5)
    assert lr_factor(1.0, "linear", 0.1, floor=0.01) == pytest.approx(0.01)
    assert lr_factor(0.05, "constant", 0.1) == pytest.approx(0.5) and lr_factor(1.0, "constant", 0.1) == 1.0


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


def test_ramp_shapes_halfway():
    assert ramp(0.5, 0.0, 2.0, 0.0, 1.0) == pytest.approx(1.0)
    assert ramp(0.25, 0.0, 2.0, 0.0, 1.0, "cosine") == pytest.approx(2 * 0.1464466, rel=1e-5)
    assert ramp(0.99, 0.5, 2.0, 0.0, 1.0, "step") == 0.5


def test_a_weight_is_a_number_or_a_ramp():
    assert weight_at(0.3, 0.9) == 0.3
    assert weight_at(Ramp(first=1.0, last=0.0, begin=0.2, end=0.4), 0.3) == pytest.approx(0.5)
    with pytest.raises(ValueError, match="lies before"):
        Ramp(first=0, last=1, begin=0.5, end=0.2)


def test_the_average_forgets_fast_at_first():
    decays = [ema_decay(step, 0.99) for step in range(2000)]
    assert decays[0] == pytest.approx(0.1) and decays[-1] == 0.99
    assert decays == sorted(decays)
