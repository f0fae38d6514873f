"""The parts of pretraining: heads, monitor, probe, stream."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional

from canopy.chips.data import site_weights
from canopy.chips.store import ChipShards
from canopy.chips.write import write_folder
from canopy.errors import DataError
from canopy.models.config import EncoderConfig
from canopy.models.encoder import Encoder
from canopy.training.callbacks import (
    HeightProbe,
    Patches,
    effective_rank,
    feature_std,
    open_probe,
    patch_means,
    ridge,
)
from canopy.training.ssl import PixelDecoder, PrototypeHead, sine_positions
from canopy.training.ssl_data import ViewRules, ViewStream

SIZE: dict[str, Any] = {
    "dim": 16,
    "depth": 4,
    "heads": 2,
    "taps": (0, 1, 2, 3),
    "norm_taps": True,
    "layer_scale": None,
}
CONFIGS = {
    "rope": EncoderConfig(family="rope", registers=2, **SIZE),
    "vit": EncoderConfig(family="vit", pos_grid=4, **SIZE),
    "stem": EncoderConfig(family="rope", rope_type="cat", rope_rotate_half=False, stem=(4, 4, 8), **SIZE),
}


# ---- the encoder's tokens --------------------------------------------------------------------------------
@pytest.mark.parametrize("kind", CONFIGS)
def test_tokens_are_the_last_normalised_features(kind):
    encoder, x = Encoder(CONFIGS[kind]).eval(), torch.randn(2, 3, 48, 64)
    features, tokens = encoder(x), encoder.tokens(x)
    assert torch.allclose(features.maps[-1].flatten(2).mT, tokens.patches, atol=1e-5)
    assert torch.allclose(features.class_tokens[-1], tokens.class_token, atol=1e-5)
    everything = torch.arange(12).expand(2, -1)
    assert torch.allclose(encoder.tokens(x, keep=everything).patches, tokens.patches, atol=1e-5)


@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.parametrize("drop", [True, False])
def test_hidden_pixels_leak_nowhere(kind, drop):
    encoder, x = Encoder(CONFIGS[kind]).eval(), torch.randn(2, 3, 48, 64)
    mask = torch.zeros(2, 12, dtype=torch.bool)
    mask[:, [0, 1, 5, 11]] = True
    keep = (~mask).nonzero()[:, 1].reshape(2, 8)
    pixels = mask.reshape(2, 1, 3, 1, 4, 1).expand(-1, 3, -1, 16, -1, 16).reshape(x.shape)
    other = torch.where(pixels, torch.randn_like(x) * 9, x)
    how = {"keep": keep} if drop else {"mask_token": torch.randn(16)}
    for a, b in zip(encoder.tokens(x, mask, **how), encoder.tokens(other, mask, **how), strict=True):
        assert torch.equal(a, b)
    assert not torch.allclose(encoder.tokens(x).class_token, encoder.tokens(x, mask, **how).class_token)


def test_dropped_tokens_leave_the_others_where_they_were():
    """A neighbour counts by its distance, also when all between is dropped."""
    encoder = Encoder(CONFIGS["rope"]).eval()
    with torch.no_grad():
        for block in encoder.vit.blocks:  # as they begin, small weights look everywhere alike
            block.attn.qkv.weight.mul_(30)
    x = torch.randn(1, 3, 48, 64)
    x[..., 32:, 48:] = x[..., :16, 16:32]  # patch 11 looks like patch 1
    near, far = (encoder.tokens(x, keep=torch.tensor([k])).patches for k in ([0, 1], [0, 11]))
    assert not torch.allclose(near[0, 0], far[0, 0], atol=1e-4)


# ---- heads ---------------------------------------------------------------------------------------------
def test_prototype_scores_are_cosines():
    head = PrototypeHead(8, 5, 16, 4)
    x = torch.randn(3, 7, 8) * 100
    scores = head(x)
    assert scores.shape == (3, 7, 5) and scores.abs().max() <= 1 + 1e-5
    with torch.no_grad():
        head.prototypes.mul_(10)
    assert torch.allclose(scores, head(x), atol=1e-5)
    want = functional.cosine_similarity(head.mlp(x)[..., None, :], head.prototypes, dim=-1)
    assert torch.allclose(want, scores, atol=1e-4)


def test_the_decoder_puts_visible_tokens_in_their_places():
    decoder = PixelDecoder(8, 16, 1, 2, 12).eval()
    visible, keep = torch.randn(2, 3, 8), torch.tensor([[0, 4, 5], [1, 2, 3]])
    assert decoder(visible, keep, (2, 3)).shape == (2, 6, 12)
    order = torch.tensor([2, 0, 1])
    assert torch.allclose(
        decoder(visible, keep, (2, 3)), decoder(visible[:, order], keep[:, order], (2, 3)), atol=1e-5
    )
    decoder.blocks = torch.nn.ModuleList()  # without mixing, hidden places know only where they are
    out = decoder(visible, keep, (2, 3))
    assert torch.allclose(out[0, [1, 2, 3]][1:], decoder(visible * 2, keep, (2, 3))[0, [2, 3]], atol=1e-5)


def test_every_place_has_its_own_sines():
    p = sine_positions((5, 7), 16)
    assert p.shape == (35, 16) and p.abs().max() <= 1
    assert torch.cdist(p, p).fill_diagonal_(9).min() > 0.01
    assert p[8, 0] == pytest.approx(math.sin(1)) and p[8, 8] == pytest.approx(math.sin(1))
    with pytest.raises(ValueError, match="18"):
        sine_positions((2, 2), 18)


# ---- monitor -------------------------------------------------------------------------------------------
def test_effective_rank_and_spread_tell_life_from_collapse():
    rng = torch.Generator().manual_seed(0)
    full = torch.randn(4000, 16, generator=rng)
    assert 15.5 < effective_rank(full) <= 16.01 and 0.95 < feature_std(full) < 1.05
    flat = full[:, :3] @ torch.randn(3, 16, generator=rng)
    assert 1.5 < effective_rank(flat) <= 3.01
    point = torch.ones(50, 16) + 1e-4 * full[:50]
    assert effective_rank(point) < 1.1 and feature_std(point) < 1e-3


def test_effective_rank_is_the_entropy_of_singular_values():
    x = torch.randn(30, 7, generator=torch.Generator().manual_seed(0))
    values = np.linalg.svd(x.numpy(), compute_uv=False)
    share = values / values.sum()
    assert effective_rank(x) == pytest.approx(np.exp(-(share * np.log(share)).sum()), rel=1e-3)


# ---- probe -----------------------------------------------------------------------------------------------
def test_ridge_equals_the_normal_equations():
    rng = np.random.default_rng(0)
    x, wanted = rng.normal(3, 2, (40, 6)), rng.normal(3, 2, (9, 6))
    y = x @ rng.normal(size=6) + 5 + rng.normal(0, 1, 40)
    got = ridge(x, y, wanted)
    mean, std = x.mean(0), x.std(0)
    z, zw, n = (x - mean) / std, (wanted - mean) / std, len(x)
    best = None
    for penalty in np.logspace(-4, 2, 7) * n:  # the same choice, the long way
        hat = z @ np.linalg.inv(z.T @ z + penalty * np.eye(6)) @ z.T
        rest = y - y.mean() - hat @ (y - y.mean())
        error = rest @ rest / (n - np.trace(hat)) ** 2
        if best is None or error < best[0]:
            best = error, zw @ np.linalg.solve(z.T @ z + penalty * np.eye(6), z.T @ (y - y.mean())) + y.mean()
    np.testing.assert_allclose(got, best[1], rtol=1e-8)
    assert np.isfinite(ridge(np.ones((5, 3)), np.arange(5.0), np.ones((2, 3)))).all()


def test_patch_means_leave_out_what_is_unknown():
    height = np.arange(16, dtype=np.float32).reshape(4, 4)
    height[0, 0] = np.nan
    seen = np.ones((8, 8), bool)
    seen[4:, 4:7] = False  # 2 x 1 whole label pixels... the lower right patch keeps none of 4
    means = patch_means(height, seen, 2)
    assert means[0, 0] == pytest.approx((1 + 4 + 5) / 3) and means[0, 1] == pytest.approx(4.5)
    assert np.isnan(means[1, 1]) and means[1, 0] == pytest.approx(10.5)


def test_the_probe_prefers_features_that_see(views_dir):
    probe = open_probe(views_dir, 16, 8, 0.5)
    assert probe is not None and len(probe.train.images) == 8 and len(probe.val.images) == 4

    class Seeing(torch.nn.Module):
        """Patches' mean colours as features."""

        def __init__(self):
            super().__init__()
            self.anchor = torch.nn.Parameter(torch.zeros(1))

        def tokens(self, x):
            from canopy.models.encoder import Tokens

            return Tokens(x.mean((2, 3)), functional.avg_pool2d(x, 16).flatten(2).mT)

    blind = Encoder(CONFIGS["vit"]).eval()
    torch.nn.init.zeros_(blind.vit.patch_embed.proj.weight)
    good, bad = (probe.score(e, lambda x: x) for e in (Seeing(), blind))
    assert good["r2"] > 0.8 and good["mae_m"] < 0.6 * good["mae_constant_m"] and bad["r2"] < 0.2


def test_no_labels_no_probe(views_dir, tmp_path):
    shards = ChipShards(views_dir, splits=("train",))
    write_folder(tmp_path / "one_split", [shards[0]])
    assert open_probe(tmp_path / "one_split", 16, 8, 0.5) is None
    with pytest.raises(DataError, match="no such chips"):
        open_probe(tmp_path / "none", 16, 8, 0.5)
    with pytest.raises(DataError, match="train"):
        HeightProbe(Patches([], []), Patches([], []))


# ---- the stream ------------------------------------------------------------------------------------------
SMALL = ViewRules(global_px=32, local_px=16, globals=2, locals=1)
LARGE = SMALL.model_copy(update={"global_px": 64, "local_px": 32})


def stream_of(views_dir, **more) -> ViewStream:
    shards = ChipShards(views_dir, splits=("train",))
    return ViewStream(shards, 2, SMALL, LARGE, **{"late_from": 3, "patch_px": 16, "seed": 0} | more)


def test_views_grow_at_the_end(views_dir):
    stream = stream_of(views_dir)
    assert [stream.make(i).wide.shape[-1] for i in (0, 2, 3, 9)] == [32, 32, 64, 64]
    assert stream.make(3).masks.shape == (4, 4, 4)
    timed = stream_of(views_dir, late_from=None)
    assert timed.make(5).near.shape[-1] == 16
    timed.go_late()
    assert timed.make(5).near.shape[-1] == 32


def test_processes_share_the_work_of_one(views_dir):
    alone = stream_of(views_dir, late_from=99)
    for rank in range(2):
        part = stream_of(views_dir, late_from=99)
        part.rank, part.world = rank, 2
        for j in range(3):
            assert all(torch.equal(a, b) for a, b in zip(part.make(j), alone.make(2 * j + rank), strict=True))


def test_sites_count_by_the_root_of_their_chips(views_dir):
    rows = ChipShards(views_dir).rows[:5]
    sites = [r.site for r in rows]
    weights = site_weights(rows)
    share = sum(w for w, s in zip(weights, sites, strict=True) if s == "site0")
    assert weights.sum() == pytest.approx(1) and share == pytest.approx(3**0.5 / (3**0.5 + 2**0.5))
    assert np.allclose(site_weights(rows, 1.0), 0.2)
