"""Schedules: every branch runs, ends meet."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from canopy.training.schedules import ema_decay, warmup_cosine


def test_warmup_rises_to_one_then_cosine_falls_to_the_floor():
    assert warmup_cosine(0.0, 0.1) == pytest.approx(1e-3)
    assert warmup_cosine(0.05, 0.1) == pytest.approx(0.5)
    assert warmup_cosine(0.1, 0.1) == pytest.approx(1.0)
    assert warmup_cosine(0.55, 0.1, floor=0.0) == pytest.approx(0.5)
    assert warmup_cosine(1.0, 0.1, floor=0.02) == pytest.approx(0.02)
    assert warmup_cosine(7.0, 0.1, floor=0.02) == pytest.approx(0.02)


@given(st.floats(0.1, 0.99), st.floats(0.001, 0.01))
def test_after_warmup_it_never_rises(progress, step):
    assert warmup_cosine(progress + step, 0.1) <= warmup_cosine(progress, 0.1)


def test_the_average_forgets_fast_at_first():
    decays = [ema_decay(step, 0.99) for step in range(2000)]
    assert decays[0] == pytest.approx(0.1) and decays[-1] == 0.99
    assert decays == sorted(decays)
