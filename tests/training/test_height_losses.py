"""Losses against plain numpy, on the known pixels only."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from canopy.training import height_losses as losses


@pytest.fixture
def batch():
    rng = np.random.default_rng(0)
    pred = rng.uniform(0, 30, (2, 1, 12, 16))
    target = rng.uniform(0, 30, (2, 1, 12, 16))
    weight = (rng.random((2, 1, 12, 16)) < 0.7).astype(float)
    return pred, target, weight


def tensors(*arrays):
    return [torch.tensor(a) for a in arrays]


def test_charbonnier_and_silog(batch):
    pred, target, weight = batch
    known = weight > 0
    d = (pred - target)[known]
    expected = (np.sqrt(d**2 + 0.01) - 0.1).mean()
    assert losses.charbonnier(*tensors(*batch)).item() == pytest.approx(expected)
    g = (np.log(pred + 1) - np.log(target + 1))[known]
    expected = np.sqrt((g**2).mean() - 0.85 * g.mean() ** 2)
    assert losses.silog(*tensors(*batch)).item() == pytest.approx(expected)


def test_gradient_loss_against_loops(batch):
    pred, target, weight = batch
    error, known = (pred - target)[:, 0], weight[:, 0] > 0
    terms = []
    for scale in range(3):
        down = [
            abs(e[r + 1, c] - e[r, c])
            for e, k in zip(error, known, strict=True)
            for r in range(e.shape[0] - 1)
            for c in range(e.shape[1])
            if k[r, c] and k[r + 1, c]
        ]
        right = [
            abs(e[r, c + 1] - e[r, c])
            for e, k in zip(error, known, strict=True)
            for r in range(e.shape[0])
            for c in range(e.shape[1] - 1)
            if k[r, c] and k[r, c + 1]
        ]
        terms += [np.mean(down) if down else 0.0, np.mean(right) if right else 0.0]
        if scale < 2:
            n, h, w = error.shape
            blocks = (n, h // 2, 2, w // 2, 2)
            error, known = error.reshape(blocks).mean((2, 4)), known.reshape(blocks).all((2, 4))
    assert losses.gradient_loss(*tensors(*batch)).item() == pytest.approx(np.mean(terms))


def test_two_hot_against_full_cross_entropy(batch):
    _, target, weight = batch
    centres = np.linspace(0, 28, 15)  # some targets lie above the last bin
    scores = np.random.default_rng(1).normal(size=(2, 15, 12, 16))
    logp = scores - np.log(np.exp(scores).sum(axis=1, keepdims=True))
    total = []
    for b, _, r, c in np.argwhere(weight > 0):
        position = min(target[b, 0, r, c], 28.0) / 2.0
        low = min(int(position), 13)
        mass = np.zeros(15)
        mass[low], mass[low + 1] = 1 - (position - low), position - low
        total.append(-(mass * logp[b, :, r, c]).sum())
    got = losses.two_hot_loss(*tensors(scores, target, weight, centres))
    assert got.item() == pytest.approx(np.mean(total))


def test_unknown_pixels_have_no_say(batch):
    pred, target, weight = tensors(*batch)
    spoiled = torch.where(weight > 0, target, 1e4)
    for loss in (losses.charbonnier, losses.silog, losses.gradient_loss):
        assert loss(pred, spoiled, weight).item() == pytest.approx(loss(pred, target, weight).item())
        assert loss(pred, target, torch.zeros_like(weight)).item() == pytest.approx(0.0, abs=1e-3)


@pytest.mark.parametrize("move", [(0, 0), (1, -2), (-2, 2), (2, 1)])
def test_a_planted_shift_is_found_and_undone(move):
    rng = np.random.default_rng(5)
    truth = torch.tensor(rng.uniform(0, 30, (1, 1, 40, 40)))
    labels = losses.shifted(truth, -move[0], -move[1])
    weight = losses.shifted(torch.ones_like(truth), -move[0], -move[1])
    pred = (truth + torch.randn_like(truth)).requires_grad_()
    found = losses.best_shift(pred, labels, weight, reach=2, penalty=0.1)
    assert found.tolist() == [list(move)]
    target, weight = losses.align_labels(labels, weight, found)
    known = weight > 0
    assert torch.equal(target[known], truth[known])
    assert losses.charbonnier(pred, target, weight) < 1.0


def test_flat_crops_stay_where_they_are():
    flat = torch.zeros(3, 1, 20, 20)
    shifts = losses.best_shift(flat, flat, torch.ones_like(flat), reach=2, penalty=0.1)
    assert shifts.tolist() == [[0, 0]] * 3


def test_each_crop_has_its_own_shift():
    truth = torch.rand(2, 1, 30, 30) * 30
    labels = torch.cat([losses.shifted(truth[:1], 1, 0), losses.shifted(truth[1:], 0, -2)])
    assert losses.best_shift(truth, labels, torch.ones_like(truth), 2, 0.1).tolist() == [[-1, 0], [0, 2]]
