"""The footprint loss against plain loops: a disc's pixels, what stands for a shot, where it may lie."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from canopy.training.losses import EPS_M, footprint_loss, offsets, pool_discs

RADIUS = 12.5


def pooled_by_loops(height, row, col, radius, top):
    h, w = height.shape
    inside = [
        height[r, c]
        for r in range(h)
        for c in range(w)
        if (r + 0.5 - row) ** 2 + (c + 0.5 - col) ** 2 <= radius**2
    ]
    taken = max(1, math.ceil(top * len(inside) - 1e-6))
    return np.mean(sorted(inside)[-taken:])


def loss_by_loops(pred, shots, top, reach, penalty):
    total = weights = 0.0
    for b, rows in enumerate(shots):
        for row, col, metres, weight, radius in rows:
            if weight <= 0:
                continue
            scale, h, w = radius / RADIUS, *pred[b, 0].shape
            places = [(0.0, 0.0)] + [
                (d * math.sin(k * math.pi / 4), d * math.cos(k * math.pi / 4))
                for d in ((reach / 2, reach) if reach else ())
                for k in range(8)
            ]
            best = None
            for down, right in places:
                r, c = row + down * scale, col + right * scale
                # A disc leaves the map where a pixel centre inside it does.
                ring = [
                    (i, j)
                    for i in range(int(r - radius) - 2, int(r + radius) + 3)
                    for j in range(int(c - radius) - 2, int(c + radius) + 3)
                    if (i + 0.5 - r) ** 2 + (j + 0.5 - c) ** 2 <= radius**2
                ]
                if any(not (0 <= i < h and 0 <= j < w) for i, j in ring):
                    continue
                error = pooled_by_loops(pred[b, 0], r, c, radius, top) - metres
                cost = abs(error) + penalty * math.hypot(down, right)
                best = min(best or (math.inf, 0.0), (cost, error))
            total += weight * (math.sqrt(best[1] ** 2 + EPS_M**2) - EPS_M)
            weights += weight
    return total / weights


def make(shape, count, seed=0, radius=6.0):
    rng = np.random.default_rng(seed)
    pred = rng.uniform(0, 30, shape)
    shots = np.zeros((shape[0], count + 2, 5))
    shots[..., 4] = 1
    h, w = shape[2:]
    for b in range(shape[0]):
        for k in range(count):
            place = rng.uniform(radius, [h - radius, w - radius])
            shots[b, k] = *place, rng.uniform(5, 35), rng.uniform(0.2, 1), radius
    return pred, shots


@pytest.mark.parametrize("shape", [(1, 1, 24, 24), (2, 1, 30, 40), (3, 1, 25, 19)])
@pytest.mark.parametrize("reach", [0.0, 10.0])
def test_against_loops(shape, reach):
    pred, shots = make(shape, 3, seed=sum(shape))
    got = footprint_loss(torch.tensor(pred), torch.tensor(shots), top=0.1, reach_m=reach, penalty=0.05)
    assert got.item() == pytest.approx(loss_by_loops(pred, shots, 0.1, reach, 0.05), rel=1e-5)


@pytest.mark.parametrize("top", [0.02, 0.1, 0.5, 1.0])
def test_what_stands_for_a_disc(top):
    pred, shots = make((1, 1, 40, 40), 4)
    places = torch.tensor(shots[0, :4, :2])[:, None]
    heights, fits = pool_discs(
        torch.tensor(pred), torch.zeros(4, dtype=torch.long), places, torch.tensor(shots[0, :4, 4]), top
    )
    expected = [pooled_by_loops(pred[0, 0], *shot[:2], shot[4], top) for shot in shots[0, :4]]
    assert np.allclose(heights[:, 0], expected) and fits.all()


def test_no_shots_cost_nothing_and_leave_a_gradient_of_nought():
    pred = torch.rand(2, 1, 20, 20, requires_grad=True)
    loss = footprint_loss(pred, torch.zeros(2, 3, 5))
    loss.backward()
    assert loss.item() == 0 and (pred.grad == 0).all()
    assert footprint_loss(pred, torch.zeros(2, 0, 5)).item() == 0


@pytest.mark.parametrize("down", [0.0, 7.0, -7.0])
def test_a_misplaced_shot_is_forgiven_within_its_reach(down):
    height = torch.zeros(1, 1, 80, 80)
    height[..., :30, :] = 20.0  # forest above, meadow below
    shot = torch.tensor([[[30.0 - 13 - 7 + down + 7, 40.0, 20.0, 1.0, RADIUS]]])
    assert footprint_loss(height, shot, top=1.0, penalty=0.0, reach_m=10.0) < 0.05
    far = torch.tensor([[[60.0, 40.0, 20.0, 1.0, RADIUS]]])
    assert footprint_loss(height, far, top=1.0) > 15


def test_gradients_are_finite_reach_the_top_of_the_disc_and_nothing_else():
    pred = (torch.rand(1, 1, 60, 60) * 20).requires_grad_()
    shot = torch.tensor([[[30.0, 30.0, 40.0, 1.0, RADIUS]]])
    footprint_loss(pred, shot, reach_m=0.0).backward()
    moved = pred.grad[0, 0] != 0
    rows, cols = np.mgrid[:60, :60] + 0.5
    disc = torch.tensor((rows - 30) ** 2 + (cols - 30) ** 2 <= RADIUS**2)
    assert torch.isfinite(pred.grad).all() and (moved & ~disc).sum() == 0
    assert moved.sum() == math.ceil(0.1 * int(disc.sum()))
    assert pred.detach()[0, 0][moved].min() > pred.detach()[0, 0][disc & ~moved].max()
    assert (pred.grad[0, 0][moved] < 0).all()  # a shot above the map lifts it


def test_what_lies_outside_the_discs_never_matters():
    pred, shots = make((1, 1, 50, 50), 2, radius=4.0)
    shots[0, :2, :2] = [[15, 15], [20, 18]]
    spoiled = pred.copy()
    spoiled[..., 40:, :] = 1e4
    a, b = (footprint_loss(torch.tensor(p), torch.tensor(shots)).item() for p in (pred, spoiled))
    assert a == b


def test_places_a_shot_may_lie():
    places = offsets(10.0)
    assert places.shape == (17, 2) and (places[0] == 0).all()
    assert torch.allclose(places[1:9].norm(dim=1), torch.tensor(5.0)) and torch.allclose(
        places[9:].norm(dim=1), torch.tensor(10.0)
    )
    assert offsets(0.0).tolist() == [[0.0, 0.0]]
