"""Every metric against an independent computation (NumPy, SciPy, plain loops), and exact under cutting."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import ndimage, stats
from whole_arrays import score_arrays

from canopy import metrics

TOL = 1e-9


def scene(seed: int, shape: tuple[int, int] = (130, 171)) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Heights with structure, a map with errors, and a mask with holes."""
    rng = np.random.default_rng(seed)
    reference = np.abs(ndimage.gaussian_filter(rng.normal(0, 60, shape), 3)) * 2
    reference[rng.random(shape) < 0.2] = 0
    reference[:4] += 70
    predicted = np.maximum(0.8 * reference + rng.normal(0.5, 2, shape), -1)
    valid = ndimage.gaussian_filter(rng.normal(size=shape), 4) > -0.05
    return np.round(predicted, 3), np.round(reference, 3), valid


@pytest.fixture(params=range(3))
def masked(request: pytest.FixtureRequest) -> tuple[np.ndarray, np.ndarray, np.ndarray, dict[str, float]]:
    p, r, valid = scene(request.param)
    return p, r, valid, score_arrays(p, r, valid)


def test_pixel_metrics(masked) -> None:
    p, r, valid, got = masked
    p, r = p[valid], r[valid]
    tall = r > 2
    expected = {
        "n": valid.sum(),
        "mae_m": np.mean(np.abs(p - r)),
        "rmse_m": np.sqrt(np.mean((p - r) ** 2)),
        "bias_m": p.mean() - r.mean(),
        "r2": 1 - np.sum((p - r) ** 2) / np.sum((r - r.mean()) ** 2),
        "r": stats.pearsonr(p, r).statistic,
        "nmae": np.mean(np.abs(p - r)[tall] / r[tall]),
        "nmae_plus1": np.mean(np.abs(p - r)[tall] / (r[tall] + 1)),
    }
    for name, value in expected.items():
        assert got[name] == pytest.approx(value, abs=TOL, rel=TOL), name


def test_cover(masked) -> None:
    p, r, valid, got = masked
    for t in (2, 3, 5):
        a, b = {*np.flatnonzero(valid & (p > t))}, {*np.flatnonzero(valid & (r > t))}
        assert got[f"cover_iou_{t}m"] == pytest.approx(len(a & b) / len(a | b), abs=TOL)
        precision, recall = len(a & b) / len(a), len(a & b) / len(b)
        assert got[f"cover_precision_{t}m"] == pytest.approx(precision, abs=TOL)
        assert got[f"cover_recall_{t}m"] == pytest.approx(recall, abs=TOL)
        assert got[f"cover_f1_{t}m"] == pytest.approx(2 * precision * recall / (precision + recall), abs=TOL)


def test_block_r2(masked) -> None:
    p, r, valid, got = masked
    means = []
    for row in range(0, p.shape[0], 50):
        for col in range(0, p.shape[1], 50):
            here = np.s_[row : row + 50, col : col + 50]
            if valid[here].sum() >= 1250:
                means.append((p[here][valid[here]].mean(), r[here][valid[here]].mean()))
    x, y = np.array(means).T
    assert len(means) >= 3
    assert got["block_r2"] == pytest.approx(1 - ((x - y) ** 2).sum() / ((y - y.mean()) ** 2).sum(), abs=TOL)


def test_edge_error(masked) -> None:
    p, r, valid, got = masked
    whole = ndimage.binary_erosion(valid, np.ones((3, 3)), border_value=0)
    p, r = np.where(valid, p, 0), np.where(valid, r, 0)
    gp, gr = (np.hypot(ndimage.sobel(x, 0), ndimage.sobel(x, 1))[whole] for x in (p, r))
    assert got["edge_error"] == pytest.approx(np.abs(gp - gr).sum() / gr.sum(), abs=TOL)
    assert got["edge_error_symmetric"] == pytest.approx(np.abs(gp - gr).sum() / (gp + gr).sum(), abs=TOL)


def test_percentiles(masked) -> None:
    p, r, valid, got = masked
    for q in (50, 95, 98):
        expected = np.percentile(p[valid], q) - np.percentile(r[valid], q)
        assert got[f"p{q}_error_m"] == pytest.approx(expected, abs=TOL)


def test_percentiles_of_unrounded_heights_are_within_a_millimetre() -> None:
    heights = np.random.default_rng(0).gamma(2, 6, 5001)
    counts = metrics.HeightCounts()
    counts.add(heights)
    for q in (0, 1, 50, 95, 98, 100):
        assert counts.percentile(q) == pytest.approx(np.percentile(heights, q), abs=5.01e-4)


def test_height_bins(masked) -> None:
    p, r, valid, _ = masked
    p, r = p[valid], r[valid]
    rows = metrics.bin_scores(metrics.pixel_sums(p, r, np.zeros(p.size, int), 1)[0])
    edges = [0, 2, 5, 10, 15, 20, 30, 60, np.inf]
    for low, high, row in zip(edges[:-1], edges[1:], rows, strict=True):
        here = (r >= low) & (r < high)
        assert row["n"] == here.sum()
        if here.any():
            assert row["bias_m"] == pytest.approx((p - r)[here].mean(), abs=TOL)
            assert row["mae_m"] == pytest.approx(np.abs(p - r)[here].mean(), abs=TOL)
            assert row["rmse_m"] == pytest.approx(np.sqrt(((p - r)[here] ** 2).mean()), abs=TOL)


def test_interval_coverage_and_width() -> None:
    p, r, valid = scene(7)
    low, high = p - 2, p + 3
    low[::5] = np.nan
    got = score_arrays(p, r, valid, (low, high))
    known = valid & np.isfinite(low)
    assert got["interval_coverage"] == pytest.approx(np.mean((r >= low)[known] & (r <= high)[known]), abs=TOL)
    assert got["interval_width_m"] == pytest.approx(5, abs=TOL)
    assert np.isnan(score_arrays(p, r, valid)["interval_coverage"])


def test_a_map_against_itself_is_perfect() -> None:
    _, r, valid = scene(1)
    got = score_arrays(r, r, valid)
    zero = ("mae_m", "rmse_m", "bias_m", "nmae", "edge_error", "p50_error_m", "p95_error_m", "p98_error_m")
    assert [got[name] for name in zero] == [0] * len(zero)
    assert [got[name] for name in ("r2", "block_r2", "cover_iou_2m", "cover_f1_5m")] == [1, 1, 1, 1]
    assert got["r"] == pytest.approx(1, abs=1e-12)


def test_what_does_not_exist_is_nan() -> None:
    flat = np.full((60, 60), 1.0)
    got = score_arrays(flat + 0.5, flat)
    assert got["mae_m"] == 0.5
    assert all(np.isnan(got[k]) for k in ("r2", "r", "nmae", "block_r2", "edge_error", "cover_iou_2m"))
    empty = score_arrays(flat, np.full_like(flat, np.nan))
    assert empty["n"] == 0
    assert np.isnan(empty["mae_m"])
    assert np.isnan(empty["p50_error_m"])


@given(st.integers(0, 2**31), st.integers(1, 6))
def test_sums_add_up_however_pixels_are_cut(seed: int, parts: int) -> None:
    rng = np.random.default_rng(seed)
    p, r = rng.gamma(2, 5, 500), rng.gamma(2, 5, 500)
    whole = metrics.pixel_sums(p, r, np.zeros(500, int), 1)[0]
    group = rng.integers(0, parts, 500)
    rows = metrics.pixel_sums(p, r, group, parts)
    np.testing.assert_allclose(rows.sum(axis=0), whole, rtol=1e-12, atol=1e-9)
    counts, split = metrics.HeightCounts(), metrics.HeightCounts()
    counts.add(p)
    for k in range(parts):
        split.add(p[group == k])
    assert counts.percentile(95) == split.percentile(95)
