"""The guard of every training: what it finds, what it puts back, what it remembers."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from canopy.errors import ConfigError
from canopy.training.callbacks import NanGuard, TrainingError
from canopy.training.run_folder import saved_state

NAN = float("nan")


def test_it_forgets_what_is_long_ago():
    guard, module = NanGuard(forgiven=2, memory=100), nn.Linear(1, 1)
    assert guard.passes(module, 0, loss=1.0)
    assert not guard.passes(module, 1, loss=NAN) and not guard.passes(module, 2, gradient=float("inf"))
    assert not guard.passes(module, 150, loss=NAN)
    again = NanGuard(forgiven=2, memory=100)
    again.load_state_dict(guard.state_dict())
    assert again.skipped == [150] and not again.passes(module, 151, loss=NAN)
    with pytest.raises(TrainingError, match=r"loss is nan at step 152, and so it was at \[150, 151\]"):
        again.passes(module, 152, loss=NAN)


@pytest.mark.parametrize("forgiven", [0, 1])  # also where the run ends: its checkpoint must be good
def test_a_step_left_out_leaves_no_trace(forgiven):
    module = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    kept = {name: value.clone() for name, value in module.state_dict().items()}
    guard = NanGuard(forgiven=forgiven)
    guard.before(module)
    loss = module(torch.randn(2, 3, 8, 8) * 1e25).square().mean()  # the variance overflows, the loss does not
    loss.backward()
    assert torch.isfinite(loss) and not torch.isfinite(module[1].running_var).all()
    if forgiven:
        assert not guard.passes(module, 0, loss=loss.item())
    else:
        with pytest.raises(TrainingError, match="running statistic"):
            guard.passes(module, 0, loss=loss.item())
    assert all(torch.equal(value, kept[name]) for name, value in module.state_dict().items())
    assert all(p.grad is None for p in module.parameters())


def test_a_good_step_is_left_alone():
    module = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    guard = NanGuard()
    guard.before(module)
    module(torch.randn(2, 3, 8, 8)).sum().backward()
    after = module[1].running_var.clone()
    assert guard.passes(module, 0, loss=1.0) and torch.equal(after, module[1].running_var)
    assert all(p.grad is not None for p in module.parameters())


def test_a_checkpoint_of_another_version_is_named():
    for checkpoint in ({}, {"canopy": {"trained_s": 1.0}}):
        with pytest.raises(ConfigError, match="another version"):
            saved_state(checkpoint)
