"""The parts of pretraining against NumPy and loops: losses, heads, views, the stream, the probe."""

from __future__ import annotations

import multiprocessing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional

from canopy.chips.data import site_weights
from canopy.chips.store import ChipShards
from canopy.models.config import EncoderConfig
from canopy.models.encoder import Encoder
from canopy.training import ssl_losses as losses
from canopy.training.callbacks import effective_rank, feature_std, open_probe, patch_means
from canopy.training.ssl import PixelDecoder, PrototypeHead
from canopy.training.ssl_data import ViewRules, ViewStream, batch_masks, block_mask, crop_box, multi_crop

SHAPES = [(2, 3), (16, 4), (7, 32), (64, 65)]


def randn(*shape, seed=0, grad=False) -> torch.Tensor:
    out = torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
    return out.requires_grad_(grad)


def log_softmax(x: torch.Tensor, temperature: float) -> np.ndarray:
    x = x.double().numpy() / temperature
    e = np.exp(x - x.max(-1, keepdims=True))
    return np.log(e / e.sum(-1, keepdims=True))


# ---- losses ------------------------------------------------------------------------------------------
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("iterations", [1, 3])
def test_sinkhorn_equals_alternating_scaling(shape, iterations):
    logits, (n, k) = randn(*shape) * 0.3, shape
    plan = np.exp(logits.double().numpy() / 0.04)
    plan /= plan.sum()
    for _ in range(iterations):
        plan /= plan.sum(axis=0, keepdims=True) * k  # each prototype 1 / k
        plan /= plan.sum(axis=1, keepdims=True) * n  # each row 1 / n
    plan /= plan.sum(axis=1, keepdims=True)
    np.testing.assert_allclose(losses.sinkhorn(logits, 0.04, iterations), plan, rtol=2e-3, atol=1e-6)
    many = losses.sinkhorn(randn(*shape), 0.5, 300)
    np.testing.assert_allclose(many.sum(dim=0), np.full(k, n / k), rtol=1e-3)  # prototypes used evenly
    far = losses.sinkhorn(randn(8, 6, grad=True) * 50, 0.01)
    assert torch.isfinite(far).all() and not far.requires_grad


def _one_of_two(rank: int, file: str, queue) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=2)
    rows = randn(7, 5).split([3, 4])[rank]  # unequal parts
    queue.put((rank, losses.sinkhorn(rows, 0.3).numpy()))
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


@pytest.mark.parametrize(("globals_", "locals_"), [(2, 0), (2, 6), (3, 2)])
def test_dino_equals_a_loop_over_pairs(globals_, locals_):
    student, teacher = randn(globals_ + locals_, 4, 7), torch.softmax(randn(globals_, 4, 7, seed=1), dim=-1)
    pairs = [
        -(teacher[i].numpy() * log_softmax(student[j], 0.1)).sum(-1).mean()
        for i in range(globals_)
        for j in range(globals_ + locals_)
        if i != j
    ]
    assert float(losses.dino_loss(student, teacher, 0.1)) == pytest.approx(np.mean(pairs), rel=1e-4)


@pytest.mark.parametrize("counts", [(1,), (2, 0, 5), (10, 4, 1, 1)])
def test_ibot_equals_a_loop_over_images(counts):
    image = torch.tensor([i for i, n in enumerate(counts) for _ in range(n)])
    student, teacher = randn(len(image), 17), torch.softmax(randn(len(image), 17, seed=1), dim=-1)
    each = -(teacher.numpy() * log_softmax(student, 0.2)).sum(-1)
    want = sum(each[image.numpy() == i].mean() for i, n in enumerate(counts) if n) / len(counts)
    assert float(losses.ibot_loss(student, teacher, image, len(counts), 0.2)) == pytest.approx(want, rel=1e-4)
    nothing = losses.ibot_loss(randn(0, 5, grad=True), torch.zeros(0, 5), torch.zeros(0, dtype=torch.long), 3)
    nothing.backward()
    assert nothing.item() == 0


def test_no_gradient_reaches_the_teacher():
    teacher = torch.softmax(randn(2, 3, 5), dim=-1).requires_grad_()
    student, image = randn(3, 3, 5, grad=True), torch.arange(6) // 2
    total = losses.dino_loss(student, teacher)
    (total + losses.ibot_loss(student[:2].flatten(0, 1), teacher.flatten(0, 1), image, 3)).backward()
    assert student.grad.abs().sum() > 0 and teacher.grad is None


@pytest.mark.parametrize(("n", "dim"), [(2, 2), (32, 8), (9, 64)])
def test_koleo_equals_a_loop_and_survives_equal_features(n, dim):
    x = randn(n, dim).double().numpy()
    unit = x / np.linalg.norm(x, axis=-1, keepdims=True)
    nearest = [min(np.linalg.norm(unit[i] - unit[j]) for j in range(n) if j != i) for i in range(n)]
    assert float(losses.koleo_loss(randn(n, dim))) == pytest.approx(-np.mean(np.log(nearest)), rel=1e-3)
    same = torch.ones(n, dim, requires_grad=True)
    losses.koleo_loss(same).backward()
    assert torch.isfinite(same.grad).all()


@pytest.mark.parametrize(("rows", "cols", "patch"), [(1, 2, 4), (4, 4, 8)])
def test_mae_equals_a_loop_over_hidden_patches(rows, cols, patch):
    rgb = torch.rand(2, 3, rows * patch, cols * patch, generator=torch.Generator().manual_seed(0))
    predicted = randn(2, rows * cols, patch * patch * 3, grad=True)
    mask = randn(2, rows * cols, seed=3) > 0
    mask[0, 0] = True
    errors = []
    for b, k in mask.nonzero().tolist():
        r, c = k // cols * patch, k % cols * patch
        block = rgb[b, :, r : r + patch, c : c + patch].numpy()
        want = (block - block.mean()) / np.sqrt(block.var(ddof=1) + 1e-6)
        got = predicted[b, k].detach().numpy().reshape(patch, patch, 3).transpose(2, 0, 1)
        errors.append(((got - want) ** 2).mean())
    loss = losses.mae_loss(predicted, rgb, mask, patch)
    assert float(loss.detach()) == pytest.approx(np.mean(errors), rel=1e-4)
    loss.backward()
    assert (predicted.grad.abs().sum(dim=-1) > 0).equal(mask)  # only hidden patches count


# ---- the encoder's tokens, heads ------------------------------------------------------------------------
SIZE: dict[str, Any] = {
    "dim": 16, "depth": 4, "heads": 2, "taps": (0, 1, 2, 3), "norm_taps": True, "layer_scale": None,
}  # fmt: skip
ENCODERS = {
    "rope": EncoderConfig(family="rope", registers=2, **SIZE),
    "vit": EncoderConfig(family="vit", pos_grid=4, **SIZE),
    "stem": EncoderConfig(family="rope", rope_type="cat", rope_rotate_half=False, stem=(4, 4, 8), **SIZE),
}


@pytest.mark.parametrize("kind", ENCODERS)
@pytest.mark.parametrize("drop", [True, False])
def test_hidden_pixels_leak_nowhere(kind, drop):
    encoder, x = Encoder(ENCODERS[kind]).eval(), torch.randn(2, 3, 48, 64)
    mask = torch.zeros(2, 12, dtype=torch.bool)
    mask[:, [0, 1, 5, 11]] = True
    keep = (~mask).nonzero()[:, 1].reshape(2, 8)
    pixels = mask.reshape(2, 1, 3, 1, 4, 1).expand(-1, 3, -1, 16, -1, 16).reshape(x.shape)
    other = torch.where(pixels, torch.randn_like(x) * 9, x)
    how = {"keep": keep} if drop else {"mask_token": torch.randn(16)}
    for a, b in zip(encoder.tokens(x, mask, **how), encoder.tokens(other, mask, **how), strict=True):
        assert torch.equal(a, b)
    assert not torch.allclose(encoder.tokens(x).class_token, encoder.tokens(x, mask, **how).class_token)


def test_prototype_scores_are_cosines():
    head, x = PrototypeHead(8, 5, 16, 4), torch.randn(3, 7, 8) * 100
    scores = head(x)
    with torch.no_grad():
        head.prototypes.mul_(10)
    assert scores.shape == (3, 7, 5) and torch.allclose(scores, head(x), atol=1e-5)
    want = functional.cosine_similarity(head.mlp(x)[..., None, :], head.prototypes, dim=-1)
    assert torch.allclose(want, scores, atol=1e-4)


def test_the_decoder_puts_visible_tokens_in_their_places():
    decoder = PixelDecoder(8, 16, 1, 2, 12).eval()
    visible, keep = torch.randn(2, 3, 8), torch.tensor([[0, 4, 5], [1, 2, 3]])
    order = torch.tensor([2, 0, 1])
    out = decoder(visible, keep, (2, 3))
    assert out.shape == (2, 6, 12)
    assert torch.allclose(out, decoder(visible[:, order], keep[:, order], (2, 3)), atol=1e-5)
    decoder.blocks = torch.nn.ModuleList()  # without mixing, hidden places know only where they are
    out = decoder(visible, keep, (2, 3))
    assert torch.allclose(out[0, [2, 3]], decoder(visible * 2, keep, (2, 3))[0, [2, 3]], atol=1e-5)
    assert not torch.allclose(out[0, 2], out[0, 3], atol=1e-3)


# ---- views ---------------------------------------------------------------------------------------------
def test_crops_have_their_sizes_and_repeat():
    rules = ViewRules(global_px=64, local_px=32, globals=2, locals=3)
    rgb = np.random.default_rng(0).random((3, 90, 120), np.float32)
    valid = np.arange(120)[None] < np.full((90, 1), 100)
    once, twice = (multi_crop(rgb, valid, np.random.default_rng(4), rules) for _ in range(2))
    assert once[0].shape == (2, 3, 64, 64) and once[1].shape == (3, 3, 32, 32)
    assert all(np.array_equal(a, b) for a, b in zip(once, twice, strict=True))
    assert all(v.min() >= 0 and v.max() <= 1 and np.isfinite(v).all() for v in once)
    assert multi_crop(rgb, valid, np.random.default_rng(4), ViewRules(locals=0))[1].shape[0] == 0


@settings(max_examples=60, deadline=None)
@given(h=st.integers(1, 300), w=st.integers(1, 300), seed=st.integers(0, 10**6))
def test_boxes_lie_inside(h, w, seed):
    top, left, height, width = crop_box((h, w), (0.05, 1.0), 4 / 3, np.random.default_rng(seed))
    assert top >= 0 and left >= 0 and height >= 1 and width >= 1
    assert top + height <= h and left + width <= w


@settings(max_examples=60, deadline=None)
@given(h=st.integers(1, 32), w=st.integers(1, 32), ratio=st.floats(0, 1), seed=st.integers(0, 10**6))
def test_masks_have_exactly_the_wanted_size(h, w, ratio, seed):
    assert block_mask((h, w), ratio, np.random.default_rng(seed)).sum() == round(ratio * h * w)
    masks = batch_masks(8, (14, 14), np.random.default_rng(seed))
    assert (masks.any(axis=(1, 2))).sum() == 4 and abs(masks.sum() - 4 * 0.3 * 196) <= 2


def test_processes_share_the_work_of_one(views_dir):
    rules = ViewRules(global_px=32, local_px=16, globals=2, locals=1)
    alone, part = (ViewStream(ChipShards(views_dir, splits=("train",)), 2, rules, 16) for _ in range(2))
    assert alone.make(3).wide.shape == (2, 2, 3, 32, 32) and alone.make(3).masks.shape == (4, 2, 2)
    for part.rank, part.world in ((0, 2), (1, 2)):
        for j in range(3):
            whole = alone.make(2 * j + part.rank)
            assert all(torch.equal(a, b) for a, b in zip(part.make(j), whole, strict=True))


def test_sites_count_by_the_root_of_their_chips(views_dir):
    rows = ChipShards(views_dir).rows[:5]
    weights = site_weights(rows)
    share = sum(w for w, row in zip(weights, rows, strict=True) if row.site == "site0")
    assert weights.sum() == pytest.approx(1) and share == pytest.approx(3**0.5 / (3**0.5 + 2**0.5))
    assert np.allclose(site_weights(rows, 1.0), 0.2)


# ---- the probe ---------------------------------------------------------------------------------------------
def test_effective_rank_and_spread_tell_life_from_collapse():
    full = randn(4000, 16)
    assert 15.5 < effective_rank(full) <= 16.01 and 0.95 < feature_std(full) < 1.05
    point = torch.ones(50, 16) + 1e-4 * full[:50]
    assert effective_rank(point) < 1.1 and feature_std(point) < 1e-3
    values = np.linalg.svd(full[:30].numpy(), compute_uv=False)
    share = values / values.sum()
    assert effective_rank(full[:30]) == pytest.approx(np.exp(-(share * np.log(share)).sum()), rel=1e-3)


def test_patch_means_leave_out_what_is_unknown():
    height = np.arange(16, dtype=np.float32).reshape(4, 4)
    height[0, 0] = np.nan
    seen = np.ones((8, 8), bool)
    seen[4:, 4:7] = False  # 2 x 1 whole label pixels... the lower right patch keeps none of 4
    means = patch_means(height, seen, 2)
    assert means[0, 0] == pytest.approx((1 + 4 + 5) / 3) and means[0, 1] == pytest.approx(4.5)
    assert np.isnan(means[1, 1]) and means[1, 0] == pytest.approx(10.5)


def test_the_probe_prefers_features_that_see(views_dir):
    blind = Encoder(ENCODERS["vit"]).eval()
    torch.nn.init.zeros_(blind.vit.patch_embed.proj.weight)
    probe = open_probe(ChipShards(views_dir), 16, 8, 1)
    assert probe is not None and len(probe.train) == 8 and len(probe.val) == 4
    good = probe.score(lambda x: functional.avg_pool2d(x, 16).flatten(2).mT[0])
    bad = probe.score(lambda x: blind.tokens(x).patches[0])
    assert good["r2"] > 0.8 and good["mae_m"] < 0.6 * good["mae_constant_m"] and bad["r2"] < 0.2
    assert open_probe(ChipShards(views_dir, splits=("train",)), 16, 8, 1) is None
