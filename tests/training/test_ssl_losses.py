"""Every loss equals an independent computation in NumPy, written from the papers, over a grid of shapes."""

from __future__ import annotations

import multiprocessing
from pathlib import Path

import numpy as np
import pytest
import torch

from canopy.training import ssl_losses as losses

SHAPES = [(2, 3), (5, 5), (16, 4), (7, 32), (64, 65)]


def randn(*shape, seed=0, grad=False) -> torch.Tensor:
    out = torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
    return out.requires_grad_(grad)


def np_softmax(x: np.ndarray) -> np.ndarray:
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def np_unit(x: np.ndarray) -> np.ndarray:
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


# ---- targets -----------------------------------------------------------------------------------------
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("temperature", [0.04, 0.5])
@pytest.mark.parametrize("iterations", [0, 1, 3])
def test_sinkhorn_equals_alternating_scaling(shape, temperature, iterations):
    logits = randn(*shape) * 0.3
    plan = np.exp(logits.double().numpy() / temperature)
    n, k = shape
    plan /= plan.sum()
    for _ in range(iterations):
        plan /= plan.sum(axis=0, keepdims=True) * k  # each prototype 1 / k
        plan /= plan.sum(axis=1, keepdims=True) * n  # each row 1 / n
    plan /= plan.sum(axis=1, keepdims=True)
    np.testing.assert_allclose(losses.sinkhorn(logits, temperature, iterations), plan, rtol=2e-3, atol=1e-6)


@pytest.mark.parametrize("shape", SHAPES)
def test_sinkhorn_sums(shape):
    n, k = shape
    few, many = (losses.sinkhorn(randn(*shape), 0.5, iterations) for iterations in (3, 300))
    for out in (few, many):
        np.testing.assert_allclose(out.sum(dim=1), np.ones(n), rtol=1e-5)
    np.testing.assert_allclose(many.sum(dim=0), np.full(k, n / k), rtol=1e-3)  # prototypes used evenly


def test_sinkhorn_does_not_overflow_and_has_no_gradient():
    out = losses.sinkhorn(randn(8, 6, grad=True) * 50, 0.01)
    assert torch.isfinite(out).all() and not out.requires_grad
    with pytest.raises(ValueError, match="prototypes"):
        losses.sinkhorn(randn(2, 3, 4), 0.1)


def _one_of_two(rank: int, file: str, queue) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=2)
    rows = randn(7, 5).split([3, 4])[rank]  # unequal parts
    centre = losses.updated_centre(torch.zeros(1, 5), rows)
    queue.put((rank, losses.sinkhorn(rows, 0.3).numpy(), centre.numpy()))
    torch.distributed.destroy_process_group()


def test_two_processes_find_what_one_finds(tmp_path: Path):
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    jobs = [context.Process(target=_one_of_two, args=(r, str(tmp_path / "meet"), queue)) for r in range(2)]
    for job in jobs:
        job.start()
    found = sorted((queue.get(timeout=120) for _ in jobs), key=lambda part: part[0])
    for job in jobs:
        job.join()
    whole = losses.sinkhorn(randn(7, 5), 0.3).numpy()
    np.testing.assert_allclose(np.concatenate([part[1] for part in found]), whole, rtol=1e-5)
    alone = losses.updated_centre(torch.zeros(1, 5), randn(7, 5)).numpy()
    for part in found:
        np.testing.assert_allclose(part[2], alone, rtol=1e-5)


@pytest.mark.parametrize("shape", SHAPES)
def test_centring(shape):
    logits, centre = randn(*shape), randn(1, shape[1], seed=1)
    want = np_softmax((logits - centre).numpy() / 0.07)
    np.testing.assert_allclose(losses.centred_softmax(logits, centre, 0.07), want, rtol=1e-4, atol=1e-7)
    moved = losses.updated_centre(centre, logits, 0.9)
    np.testing.assert_allclose(
        moved, 0.9 * centre.numpy() + 0.1 * logits.numpy().mean(0), rtol=1e-4, atol=1e-6
    )


# ---- student against teacher --------------------------------------------------------------------------
@pytest.mark.parametrize(("globals_", "locals_"), [(2, 0), (2, 1), (2, 6), (3, 2)])
@pytest.mark.parametrize(("batch", "prototypes"), [(1, 2), (4, 7), (8, 64)])
def test_dino_equals_a_loop_over_pairs(globals_, locals_, batch, prototypes):
    student = randn(globals_ + locals_, batch, prototypes)
    teacher = torch.softmax(randn(globals_, batch, prototypes, seed=1), dim=-1)
    pairs = []
    for i in range(globals_):
        for j in range(globals_ + locals_):
            if i != j:
                log_p = np.log(np_softmax(student[j].double().numpy() / 0.1))
                pairs.append(-(teacher[i].numpy() * log_p).sum(-1).mean())
    assert float(losses.dino_loss(student, teacher, 0.1)) == pytest.approx(np.mean(pairs), rel=1e-4)


@pytest.mark.parametrize("counts", [(1,), (3, 1), (2, 0, 5), (10, 4, 1, 1)])
@pytest.mark.parametrize("prototypes", [2, 17])
def test_ibot_equals_a_loop_over_images(counts, prototypes):
    image = torch.tensor([i for i, n in enumerate(counts) for _ in range(n)])
    student = randn(len(image), prototypes)
    teacher = torch.softmax(randn(len(image), prototypes, seed=1), dim=-1)
    log_p = np.log(np_softmax(student.double().numpy() / 0.2))
    each = -(teacher.numpy() * log_p).sum(-1)
    want = sum(each[image.numpy() == i].mean() for i, n in enumerate(counts) if n) / len(counts)
    assert float(losses.ibot_loss(student, teacher, image, len(counts), 0.2)) == pytest.approx(want, rel=1e-4)


def test_ibot_without_masked_patches_is_zero_and_still_differentiable():
    student = randn(0, 5, grad=True)
    loss = losses.ibot_loss(student, torch.zeros(0, 5), torch.zeros(0, dtype=torch.long), 3)
    loss.backward()
    assert loss.item() == 0


@pytest.mark.parametrize(("n", "dim"), [(2, 2), (5, 3), (32, 8), (9, 64)])
def test_koleo_equals_a_loop(n, dim):
    unit = np_unit(randn(n, dim).double().numpy())
    nearest = [min(np.linalg.norm(unit[i] - unit[j]) for j in range(n) if j != i) for i in range(n)]
    assert float(losses.koleo_loss(randn(n, dim))) == pytest.approx(-np.mean(np.log(nearest)), rel=1e-3)


def test_koleo_spreads_and_survives_equal_features():
    x = torch.ones(4, 3, requires_grad=True)
    loss = losses.koleo_loss(x)
    loss.backward()
    assert torch.isfinite(loss) and torch.isfinite(x.grad).all()
    near, far = torch.tensor([[1.0, 0.1], [1.0, -0.1]]), torch.tensor([[1.0, 0.0], [-1.0, 0.0]])
    assert losses.koleo_loss(far) < losses.koleo_loss(near)
    with pytest.raises(ValueError, match="n >= 2"):
        losses.koleo_loss(torch.ones(1, 3))


# ---- masked autoencoding --------------------------------------------------------------------------------
@pytest.mark.parametrize(("rows", "cols", "patch"), [(1, 2, 4), (3, 2, 2), (4, 4, 8)])
def test_mae_equals_a_loop_over_hidden_patches(rows, cols, patch):
    rgb = torch.rand(2, 3, rows * patch, cols * patch, generator=torch.Generator().manual_seed(0))
    predicted = randn(2, rows * cols, patch * patch * 3)
    mask = randn(2, rows * cols, seed=3) > 0
    mask[0, 0] = True
    errors = []
    for b in range(2):
        for r in range(rows):
            for c in range(cols):
                if mask[b, r * cols + c]:
                    block = rgb[b, :, r * patch : (r + 1) * patch, c * patch : (c + 1) * patch].numpy()
                    want = (block - block.mean()) / np.sqrt(block.var(ddof=1) + 1e-6)
                    got = predicted[b, r * cols + c].numpy().reshape(patch, patch, 3).transpose(2, 0, 1)
                    errors.append(((got - want) ** 2).mean())
    assert float(losses.mae_loss(predicted, rgb, mask, patch)) == pytest.approx(np.mean(errors), rel=1e-4)


def test_mae_looks_at_hidden_patches_only():
    rgb, mask = torch.rand(1, 3, 8, 8), torch.tensor([[True, False, False, True]])
    predicted = randn(1, 4, 48, grad=True)
    losses.mae_loss(predicted, rgb, mask, 4).backward()
    assert (predicted.grad.abs().sum(dim=-1) > 0).equal(mask)


# ---- gradients, wrong shapes --------------------------------------------------------------------------
def test_no_gradient_reaches_the_teacher():
    teacher = torch.softmax(randn(2, 3, 5), dim=-1).requires_grad_()
    student = randn(3, 3, 5, grad=True)
    flat, image = teacher.flatten(0, 1), torch.arange(6) // 2
    total = losses.dino_loss(student, teacher)
    (total + losses.ibot_loss(student[:2].flatten(0, 1), flat, image, 3)).backward()
    assert student.grad.abs().sum() > 0 and teacher.grad is None


@pytest.mark.parametrize(
    "call",
    [
        lambda: losses.dino_loss(randn(1, 2, 3), randn(2, 2, 3)),
        lambda: losses.dino_loss(randn(3, 2, 3), randn(2, 2, 4)),
        lambda: losses.patchify(randn(1, 3, 9, 8), 4),
        lambda: losses.mae_loss(randn(1, 4, 47), randn(1, 3, 8, 8), torch.ones(1, 4, dtype=torch.bool), 4),
    ],
)
def test_shapes_that_do_not_fit_are_named(call):
    with pytest.raises(ValueError, match=r"\d"):
        call()
