"""Losses against plain NumPy over a grid of shapes; on the known pixels only; gradients finite."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from canopy.training import losses

SHAPES = [(1, 1, 4, 4), (2, 1, 12, 16), (3, 1, 9, 7), (1, 1, 1, 20), (2, 1, 33, 8)]
CENTRES = np.linspace(0, 28, 15)  # some targets lie above the last bin


@pytest.fixture(params=SHAPES, ids=str)
def batch(request):
    rng = np.random.default_rng(sum(request.param))
    pred = rng.uniform(0, 30, request.param)
    target = rng.uniform(0, 30, request.param)
    weight = (rng.random(request.param) < 0.7) * rng.uniform(0.2, 2, request.param)
    weight.flat[0] = 1.0
    return pred, target, weight


@pytest.fixture
def scores(batch):
    b, _, h, w = batch[0].shape
    return np.random.default_rng(1).normal(size=(b, len(CENTRES), h, w))


def tensors(*arrays):
    return [torch.tensor(a) for a in arrays]


def mean(values, weight):
    return (values * weight).sum() / weight.sum()


def test_charbonnier_l1_and_silog(batch):
    pred, target, weight = batch
    d = pred - target
    assert losses.charbonnier(*tensors(*batch)).item() == pytest.approx(
        mean(np.sqrt(d**2 + 0.01) - 0.1, weight)
    )
    assert losses.l1(*tensors(*batch)).item() == pytest.approx(mean(np.abs(d), weight))
    g = np.log(pred + 1) - np.log(target + 1)
    expected = np.sqrt(max(mean(g**2, weight) - 0.85 * mean(g, weight) ** 2, 1e-8))
    assert losses.silog(*tensors(*batch)).item() == pytest.approx(expected)


def test_silog_forgives_a_common_factor_the_more_the_nearer_lambda_is_to_one():
    target = torch.rand(1, 1, 8, 8, dtype=torch.float64) * 20 + 5
    twice, ones = 2 * target, torch.ones_like(target)
    assert losses.silog(twice, target, ones, lam=1.0, eps=0.0).item() == pytest.approx(1e-4, abs=1e-6)
    assert losses.silog(twice, target, ones, lam=0.0, eps=0.0).item() == pytest.approx(np.log(2))


def gradient_by_loops(pred, target, weight):
    error, known = (pred - target)[:, 0], weight[:, 0] > 0
    terms = []
    for scale in range(3):
        n, h, w = error.shape
        for dr, dc in ((1, 0), (0, 1)):
            pairs = [
                abs(error[b, r + dr, c + dc] - error[b, r, c])
                for b in range(n)
                for r in range(h - dr)
                for c in range(w - dc)
                if known[b, r, c] and known[b, r + dr, c + dc]
            ]
            terms.append(np.mean(pairs) if pairs else 0.0)
        if scale < 2:
            h, w = h // 2 * 2, w // 2 * 2
            blocks = (n, h // 2, 2, w // 2, 2)
            error, known = (
                error[:, :h, :w].reshape(blocks).mean((2, 4)),
                known[:, :h, :w].reshape(blocks).all((2, 4)),
            )
    return np.mean(terms)


@pytest.mark.parametrize("shape", [(2, 1, 12, 16), (1, 1, 9, 7), (1, 1, 4, 4)])
def test_gradient_loss_against_loops(shape):
    rng = np.random.default_rng(0)
    pred, target = rng.uniform(0, 30, shape), rng.uniform(0, 30, shape)
    weight = (rng.random(shape) < 0.8).astype(float)
    got = losses.gradient_loss(*tensors(pred, target, weight))
    assert got.item() == pytest.approx(gradient_by_loops(pred, target, weight))
    moved = losses.gradient_loss(*tensors(pred + 3.0, target, weight))
    assert moved.item() == pytest.approx(got.item())  # blind to a constant error


def test_two_hot_against_full_cross_entropy(batch, scores):
    _, target, weight = batch
    logp = scores - np.log(np.exp(scores).sum(axis=1, keepdims=True))
    values = np.zeros_like(target)
    for b, _, r, c in np.ndindex(target.shape):
        position = min(target[b, 0, r, c], 28.0) / 2.0
        low = min(int(position), 13)
        mass = np.zeros(15)
        mass[low], mass[low + 1] = 1 - (position - low), position - low
        values[b, 0, r, c] = -(mass * logp[b, :, r, c]).sum()
    got = losses.two_hot_loss(*tensors(scores, target, weight, CENTRES))
    assert got.item() == pytest.approx(mean(values, weight))


def test_ranked_loss_against_a_fine_integral(batch, scores):
    _, target, weight = batch
    p = np.exp(scores) / np.exp(scores).sum(axis=1, keepdims=True)
    x = np.linspace(0, 28, 28_001)[:-1] + 0.0005
    values = np.zeros_like(target)
    some = list(np.ndindex(target.shape))[::7]
    for b, _, r, c in some:
        F = np.cumsum(p[b, :, r, c])[np.searchsorted(CENTRES, x, side="right") - 1]
        values[b, 0, r, c] = ((F - (x >= min(target[b, 0, r, c], 28.0))) ** 2).sum() * 0.001
    only = np.zeros_like(weight)
    for place in some:
        only[place] = weight[place]
    only.flat[0] = 1.0
    got = losses.ranked_loss(*tensors(p, target, only, CENTRES))
    assert got.item() == pytest.approx(mean(values, only), abs=2e-3)


def test_ranked_loss_is_nought_for_certainty_and_grows_with_distance():
    centres = torch.tensor(CENTRES)
    target = torch.full((1, 1, 2, 2), 10.0, dtype=torch.float64)
    ones = torch.ones_like(target)

    def sure_of(height):
        p = torch.zeros(1, 15, 2, 2, dtype=torch.float64)
        p[:, int(height / 2)] = 1
        return losses.ranked_loss(p, target, ones, centres).item()

    assert [sure_of(h) for h in (10, 12, 20)] == pytest.approx([0.0, 2.0, 10.0])


def test_height_factor_is_a_line_between_knots():
    heights = np.array([0.0, 10, 20, 25, 30, 50]).reshape(1, 1, 2, 3)
    knots = ((10.0, 1.0), (30.0, 3.0), (40.0, 2.0))
    got = losses.height_factor(torch.tensor(heights), knots).numpy()
    assert np.allclose(got, np.interp(heights, *zip(*knots, strict=True)))
    assert (losses.height_factor(torch.tensor(heights), ()) == 1).all()
    assert (losses.height_factor(torch.tensor(heights), ((5.0, 2.0),)) == 2).all()


def every_loss(scores):
    bins, centres = torch.tensor(scores), torch.tensor(CENTRES)
    return {
        "charbonnier": losses.charbonnier,
        "l1": losses.l1,
        "silog": losses.silog,
        "gradient": losses.gradient_loss,
        "two_hot": lambda p, t, w: losses.two_hot_loss(bins + p * 0, t, w, centres),
        "ranked": lambda p, t, w: losses.ranked_loss(bins.softmax(1) + p * 0, t, w, centres),
    }


def test_unknown_pixels_have_no_say_and_none_known_is_nought(batch, scores):
    pred, target, weight = tensors(*batch)
    unknown = weight == 0
    for name, loss in every_loss(scores).items():
        before = loss(pred, target, weight).item()
        assert loss(pred, torch.where(unknown, 1e4, target), weight).item() == pytest.approx(before), name
        assert loss(torch.where(unknown, 55.0, pred), target, weight).item() == pytest.approx(before), name
        assert loss(pred, target, torch.zeros_like(weight)).item() == pytest.approx(0.0, abs=1e-3), name


def test_weights_count_in_proportion(batch, scores):
    pred, target, weight = tensors(*batch)
    for name, loss in every_loss(scores).items():
        assert loss(pred, target, 3 * weight).item() == pytest.approx(loss(pred, target, weight).item()), name


@pytest.mark.parametrize("height", [0.0, 1e-7, 30.0, 120.0])
def test_gradients_are_finite_at_the_corners(height):
    for name in ("charbonnier", "l1", "silog", "gradient_loss"):
        for truth in (0.0, height, 40.0):
            pred = torch.full((2, 1, 8, 8), height, requires_grad=True)
            getattr(losses, name)(pred, torch.full_like(pred, truth), torch.ones_like(pred)).backward()
            assert torch.isfinite(pred.grad).all(), (name, truth)
    bins = torch.zeros(1, 15, 4, 4, requires_grad=True)
    target = torch.full((1, 1, 4, 4), height)
    centres = torch.tensor(CENTRES, dtype=torch.float32)
    total = losses.two_hot_loss(bins * 1e3, target, torch.ones_like(target), centres)
    total = total + losses.ranked_loss((bins * 1e3).softmax(1), target, torch.ones_like(target), centres)
    total.backward()
    assert torch.isfinite(bins.grad).all()


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


def test_a_shift_does_not_win_by_losing_labels():
    """Labels that fit badly, at the edge: moved out of the crop they would cost nothing."""
    pred, target, weight = (torch.zeros(1, 1, 20, 20) for _ in range(3))
    target[..., :2, :], weight[..., :2, :] = 20.0, 1.0
    assert losses.best_shift(pred, target, weight, reach=2, penalty=0.1).tolist() == [[0, 0]]
    # Beside labels that stay inside and fit where they are.
    target[..., 5:15, 5:15] = weight[..., 5:15, 5:15] = 1.0
    pred[..., 5:15, 5:15] = 1.0
    assert losses.best_shift(pred, target, weight, reach=2, penalty=0.1).tolist() == [[0, 0]]


@pytest.mark.parametrize("side", [1, 3, 4, 7])
def test_crops_with_hardly_a_label_stay_where_they_are(side):
    pred, target = torch.rand(2, 1, side, side) * 30, torch.rand(2, 1, side, side) * 30
    shifts = losses.best_shift(pred, target, torch.ones_like(pred), reach=2, penalty=0.0)
    assert shifts.tolist() == [[0, 0]] * 2


def test_flat_crops_stay_where_they_are():
    flat = torch.zeros(3, 1, 20, 20)
    shifts = losses.best_shift(flat, flat, torch.ones_like(flat), reach=2, penalty=0.1)
    assert shifts.tolist() == [[0, 0]] * 3


def test_each_crop_has_its_own_shift():
    truth = torch.rand(2, 1, 30, 30) * 30
    labels = torch.cat([losses.shifted(truth[:1], 1, 0), losses.shifted(truth[1:], 0, -2)])
    assert losses.best_shift(truth, labels, torch.ones_like(truth), 2, 0.1).tolist() == [[-1, 0], [0, 2]]
