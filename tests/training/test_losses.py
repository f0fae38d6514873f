"""Losses against plain NumPy and loops; on the known pixels only; gradients finite."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from canopy.training import losses
from canopy.training.losses import EPS_M, footprint_loss

SHAPES = [(2, 1, 12, 16), (3, 1, 9, 7), (1, 1, 1, 20)]
CENTRES = np.linspace(0, 28, 15)  # some targets lie above the last bin
RADIUS = 12.5


@pytest.fixture(params=SHAPES, ids=str)
def batch(request):
    rng = np.random.default_rng(sum(request.param))
    pred, target = rng.uniform(0, 30, (2, *request.param))
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


def every_loss(scores):
    bins, centres = torch.tensor(scores), torch.tensor(CENTRES)
    return {
        "charbonnier": losses.charbonnier,
        "silog": losses.silog,
        "gradient": losses.gradient_loss,
        "two_hot": lambda p, t, w: losses.two_hot_loss(bins + p * 0, t, w, centres),
        "ranked": lambda p, t, w: losses.ranked_loss(bins.softmax(1) + p * 0, t, w, centres),
    }


def test_charbonnier_and_silog(batch):
    pred, target, weight = batch
    wanted = mean(np.sqrt((pred - target) ** 2 + 0.01) - 0.1, weight)
    assert losses.charbonnier(*tensors(*batch)).item() == pytest.approx(wanted)
    g = np.log(pred + 1) - np.log(target + 1)
    wanted = np.sqrt(max(mean(g**2, weight) - 0.85 * mean(g, weight) ** 2, 1e-8))
    assert losses.silog(*tensors(*batch)).item() == pytest.approx(wanted)


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
            error = error[:, :h, :w].reshape(blocks).mean((2, 4))
            known = known[:, :h, :w].reshape(blocks).all((2, 4))
    return np.mean(terms)


@pytest.mark.parametrize("shape", [(2, 1, 12, 16), (1, 1, 9, 7), (1, 1, 4, 4)])
def test_gradient_loss_against_loops(shape):
    rng = np.random.default_rng(0)
    pred, target = rng.uniform(0, 30, (2, *shape))
    weight = (rng.random(shape) < 0.8).astype(float)
    got = losses.gradient_loss(*tensors(pred, target, weight))
    assert got.item() == pytest.approx(gradient_by_loops(pred, target, weight))
    moved = losses.gradient_loss(*tensors(pred + 3.0, target, weight))
    assert moved.item() == pytest.approx(got.item())  # blind to a constant error


def test_bins_against_full_cross_entropy_and_a_fine_integral(batch, scores):
    _, target, weight = batch
    p = np.exp(scores) / np.exp(scores).sum(axis=1, keepdims=True)
    x = np.linspace(0, 28, 28_001)[:-1] + 0.0005
    entropy, ranked, some = np.zeros_like(target), np.zeros_like(target), np.zeros_like(weight)
    for b, _, r, c in list(np.ndindex(target.shape))[::7]:
        truth, some[b, 0, r, c] = min(target[b, 0, r, c], 28.0), weight[b, 0, r, c]
        low = min(int(truth / 2), 13)
        mass = np.zeros(15)
        mass[low], mass[low + 1] = 1 - (truth / 2 - low), truth / 2 - low
        entropy[b, 0, r, c] = -(mass * np.log(p[b, :, r, c])).sum()
        F = np.cumsum(p[b, :, r, c])[np.searchsorted(CENTRES, x, side="right") - 1]
        ranked[b, 0, r, c] = ((F - (x >= truth)) ** 2).sum() * 0.001
    got = losses.two_hot_loss(*tensors(scores, target, some, CENTRES))
    assert got.item() == pytest.approx(mean(entropy, some))
    got = losses.ranked_loss(*tensors(p, target, some, CENTRES))
    assert got.item() == pytest.approx(mean(ranked, some), abs=2e-3)


def test_height_factor_is_a_line_between_knots():
    heights = np.array([0.0, 10, 20, 25, 30, 50]).reshape(1, 1, 2, 3)
    knots = ((10.0, 1.0), (30.0, 3.0), (40.0, 2.0))
    got = losses.height_factor(torch.tensor(heights), knots).numpy()
    assert np.allclose(got, np.interp(heights, *zip(*knots, strict=True)))
    assert (losses.height_factor(torch.tensor(heights), ()) == 1).all()
    assert (losses.height_factor(torch.tensor(heights), ((5.0, 2.0),)) == 2).all()


def test_unknown_pixels_have_no_say_and_weights_count_in_proportion(batch, scores):
    pred, target, weight = tensors(*batch)
    unknown = weight == 0
    for name, loss in every_loss(scores).items():
        before = pytest.approx(loss(pred, target, weight).item())
        assert loss(pred, torch.where(unknown, 1e4, target), weight).item() == before, name
        assert loss(torch.where(unknown, 55.0, pred), target, weight).item() == before, name
        assert loss(pred, target, 3 * weight).item() == before, name
        assert loss(pred, target, torch.zeros_like(weight)).item() == pytest.approx(0.0, abs=1e-3), name


@pytest.mark.parametrize("height", [0.0, 1e-7, 30.0, 120.0])
def test_gradients_are_finite_at_the_corners(height):
    for name, loss in every_loss(np.zeros((2, 15, 8, 8)) + 1e3).items():
        for truth in (0.0, height, 40.0):
            pred = torch.full((2, 1, 8, 8), height, requires_grad=True)
            loss(pred, torch.full_like(pred, truth), torch.ones_like(pred)).backward()
            assert torch.isfinite(pred.grad).all(), (name, truth)


# ---- labels that move ----------------------------------------------------------------------------------
@pytest.mark.parametrize("move", [(0, 0), (1, -2), (-2, 2)])
def test_a_planted_shift_is_found_and_undone(move):
    truth = torch.tensor(np.random.default_rng(5).uniform(0, 30, (2, 1, 40, 40)))
    labels = losses.shifted(truth, -move[0], -move[1])
    weight = losses.shifted(torch.ones_like(truth), -move[0], -move[1])
    labels[1], weight[1] = truth[1], 1  # each crop has its own
    pred = (truth + torch.randn_like(truth)).requires_grad_()
    found = losses.best_shift(pred, labels, weight, reach=2, penalty=0.1)
    assert found.tolist() == [list(move), [0, 0]]
    target, weight = losses.align_labels(labels, weight, found)
    known = weight > 0
    assert torch.equal(target[known], truth[known])


def test_a_shift_does_not_win_by_losing_labels():
    """Labels that fit badly, at the edge: moved out of the crop they would cost nothing."""
    pred, target, weight = (torch.zeros(1, 1, 20, 20) for _ in range(3))
    target[..., :2, :], weight[..., :2, :] = 20.0, 1.0
    assert losses.best_shift(pred, target, weight, reach=2, penalty=0.1).tolist() == [[0, 0]]
    # Beside labels that stay inside and fit where they are.
    target[..., 5:15, 5:15] = weight[..., 5:15, 5:15] = 1.0
    pred[..., 5:15, 5:15] = 1.0
    assert losses.best_shift(pred, target, weight, reach=2, penalty=0.1).tolist() == [[0, 0]]


@pytest.mark.parametrize("side", [1, 4, 7])
def test_crops_with_hardly_a_label_stay_where_they_are(side):
    pred, target = torch.rand(2, 1, side, side) * 30, torch.rand(2, 1, side, side) * 30
    shifts = losses.best_shift(pred, target, torch.ones_like(pred), reach=2, penalty=0.0)
    assert shifts.tolist() == [[0, 0]] * 2


# ---- GEDI footprints -----------------------------------------------------------------------------------
def pooled_by_loops(height, row, col, radius, top) -> float | None:
    """None where the disc leaves the map: where a pixel centre inside it does."""
    h, w = height.shape
    inside = [
        (r, c)
        for r in range(int(row - radius) - 2, int(row + radius) + 3)
        for c in range(int(col - radius) - 2, int(col + radius) + 3)
        if (r + 0.5 - row) ** 2 + (c + 0.5 - col) ** 2 <= radius**2
    ]
    if any(not (0 <= r < h and 0 <= c < w) for r, c in inside):
        return None
    taken = max(1, math.ceil(top * len(inside) - 1e-6))
    return float(np.mean(sorted(height[r, c] for r, c in inside)[-taken:]))


def loss_by_loops(pred, shots, top, reach, penalty):
    total = weights = 0.0
    for b, rows in enumerate(shots):
        for row, col, metres, weight, radius in rows[rows[:, 3] > 0]:
            costs = []
            for d in (0, reach / 2, reach):
                for k in range(8):
                    down, right = d * math.sin(k * math.pi / 4), d * math.cos(k * math.pi / 4)
                    scale = radius / RADIUS
                    place = row + down * scale, col + right * scale
                    pooled = pooled_by_loops(pred[b, 0], *place, radius, top)
                    if pooled is not None:
                        costs.append((abs(pooled - metres) + penalty * d, pooled - metres))
            total += weight * (math.sqrt(min(costs)[1] ** 2 + EPS_M**2) - EPS_M)
            weights += weight
    return total / weights


def make(shape, count, seed=0, radius=6.0):
    rng = np.random.default_rng(seed)
    pred, shots = rng.uniform(0, 30, shape), np.zeros((shape[0], count + 2, 5))
    shots[..., 4] = 1
    for b in range(shape[0]):
        for k in range(count):
            place = rng.uniform(radius, [shape[2] - radius, shape[3] - radius])
            shots[b, k] = *place, rng.uniform(5, 35), rng.uniform(0.2, 1), radius
    return pred, shots


@pytest.mark.parametrize("shape", [(1, 1, 24, 24), (2, 1, 30, 40)])
@pytest.mark.parametrize("reach", [0.0, 10.0])
def test_footprints_against_loops(shape, reach):
    pred, shots = make(shape, 3, seed=sum(shape))
    got = footprint_loss(torch.tensor(pred), torch.tensor(shots), top=0.1, reach_m=reach, penalty=0.05)
    assert got.item() == pytest.approx(loss_by_loops(pred, shots, 0.1, reach, 0.05), rel=1e-5)


def test_no_shots_cost_nothing_and_leave_a_gradient_of_nought():
    pred = torch.rand(2, 1, 20, 20, requires_grad=True)
    loss = footprint_loss(pred, torch.zeros(2, 3, 5))
    loss.backward()
    assert loss.item() == 0 and (pred.grad == 0).all()


@pytest.mark.parametrize("down", [0.0, 7.0, -7.0])
def test_a_misplaced_shot_is_forgiven_within_its_reach(down):
    height = torch.zeros(1, 1, 80, 80)
    height[..., :30, :] = 20.0  # forest above, meadow below
    shot = torch.tensor([[[30.0 - 13 - 7 + down + 7, 40.0, 20.0, 1.0, RADIUS]]])
    assert footprint_loss(height, shot, top=1.0, penalty=0.0, reach_m=10.0) < 0.05
    far = torch.tensor([[[60.0, 40.0, 20.0, 1.0, RADIUS]]])
    assert footprint_loss(height, far, top=1.0) > 15


def test_gradients_reach_the_top_of_the_disc_and_nothing_else():
    pred = (torch.rand(1, 1, 60, 60) * 20).requires_grad_()
    shot = torch.tensor([[[30.0, 30.0, 40.0, 1.0, RADIUS]]])
    footprint_loss(pred, shot, reach_m=0.0).backward()
    moved = pred.grad[0, 0] != 0
    rows, cols = np.mgrid[:60, :60] + 0.5
    disc = torch.tensor((rows - 30) ** 2 + (cols - 30) ** 2 <= RADIUS**2)
    assert (moved & ~disc).sum() == 0 and moved.sum() == math.ceil(0.1 * int(disc.sum()))
    assert pred.detach()[0, 0][moved].min() > pred.detach()[0, 0][disc & ~moved].max()
    assert (pred.grad[0, 0][moved] < 0).all()  # a shot above the map lifts it
