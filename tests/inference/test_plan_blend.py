"""The crop lattice and the seam weights: every pixel is served, weights sum to one, cuts do not matter."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from canopy.errors import ConfigError
from canopy.geo.grid import Grid
from canopy.inference.lattice import Canvas, Lattice, plan_windows, predict_array, taper
from canopy.models.config import ModelConfig

LATTICES = [Lattice(16, 8, 2), Lattice(16, 12, 1), Lattice(16, 16, 0), Lattice(32, 16, 4), Lattice(20, 10, 0)]


def grid_at(row: int, col: int, height: int, width: int) -> Grid:
    """A one-metre UTM grid whose first pixel has the global index (row, col)."""
    return Grid.of("EPSG:32618", (1.0, 0, float(col), 0, -1.0, float(-row)), (height, width))


@pytest.mark.parametrize("lattice", LATTICES, ids=str)
def test_weights_are_positive_and_sum_to_one(lattice: Lattice) -> None:
    weights = taper(lattice)
    assert weights.shape == (lattice.served_px,)
    assert weights.min() > 0
    total = np.zeros(10 * lattice.stride_px)
    for crop in lattice.crops_serving(0, len(total)):
        for i, weight in enumerate(weights):
            place = crop * lattice.stride_px + i
            if 0 <= place < len(total):
                total[place] += weight
    np.testing.assert_allclose(total, 1.0, atol=1e-12)


@pytest.mark.parametrize("lattice", LATTICES, ids=str)
@given(start=st.integers(-10_000, 10_000), length=st.integers(1, 300))
def test_crops_serving_is_exact(lattice: Lattice, start: int, length: int) -> None:
    crops = lattice.crops_serving(start, start + length)
    touches = [
        k
        for k in range(crops.start - 2, crops.stop + 2)
        if k * lattice.stride_px < start + length and k * lattice.stride_px + lattice.served_px > start
    ]
    assert touches == list(crops)


@settings(deadline=None)
@given(
    lattice=st.sampled_from(LATTICES),
    row=st.integers(-5000, 5000),
    col=st.integers(-5000, 5000),
    height=st.integers(1, 120),
    width=st.integers(1, 120),
    window_px=st.sampled_from([1, 20, 40, 1000]),
)
def test_windows_partition_the_grid_and_blend_to_the_truth(
    lattice: Lattice, row: int, col: int, height: int, width: int, window_px: int
) -> None:
    """Crops cut from a known field, put together by the canvas, give the field back, each pixel once."""
    plan = plan_windows(grid_at(row, col, height, width), lattice, window_px)
    canvas, seen = Canvas(plan), np.zeros((height, width), int)
    result = np.full((height, width), np.nan, np.float32)
    n_crops = 0
    for window in plan:
        read = plan.read_grid(window)
        rows, cols = (np.arange(n) + o for n, o in zip(read.shape, read.origin_rc, strict=True))
        field = np.sin(rows * 0.37)[:, None] * 9 + np.cos(cols * 0.23)[None, :] * 5 + 20
        canvas.begin(window)
        for r in range(len(window.rows.crops)):
            for c in range(len(window.cols.crops)):
                top, left = r * lattice.stride_px, c * lattice.stride_px
                crop = field[top : top + lattice.crop_px, left : left + lattice.crop_px]
                canvas.add(r, c, torch.from_numpy(crop)[None])
                n_crops += 1
        done, place = canvas.finish(), (slice(*window.rows.final), slice(*window.cols.final))
        result[place] = done[0].numpy()
        seen[place] += 1
    assert (seen == 1).all()
    assert n_crops == plan.n_crops
    truth = (
        np.sin((np.arange(height) + row) * 0.37)[:, None] * 9
        + np.cos((np.arange(width) + col) * 0.23) * 5
        + 20
    )
    np.testing.assert_allclose(result, truth, rtol=0, atol=1e-5)


def test_a_lattice_with_gaps_is_refused() -> None:
    with pytest.raises(ConfigError, match="gaps"):
        Lattice(16, 16, 2)
    with pytest.raises(ConfigError, match="gaps"):
        Lattice(64, 16, 0)


@pytest.mark.parametrize(("crop", "patch"), [(256, 16), (224, 14), (512, 16), (16, 16), (32, 16), (64, 16)])
def test_default_lattice_keeps_the_patch_grid(crop: int, patch: int) -> None:
    lattice = Lattice.of(crop, patch)
    assert lattice.stride_px % patch == 0
    assert lattice.crop_px == crop


def test_a_models_overlap_sets_the_lattice_and_old_models_keep_theirs() -> None:
    old = ModelConfig(crop_px=256)
    assert Lattice.of_model(old) == Lattice.of(256, 16) == Lattice(256, 160, 6)
    # Files of before there was the field, and stand-ins for models, have none.
    assert ModelConfig.from_dict({"crop_px": 256}) == old
    assert Lattice.of_model(SimpleNamespace(crop_px=256, patch_px=16)) == Lattice.of(256, 16)
    assert Lattice.of_model(ModelConfig(crop_px=512, overlap_px=64)) == Lattice(512, 448, 4)
    assert Lattice.of_model(ModelConfig(crop_px=1024, overlap_px=128, margin_px=48)) == Lattice(1024, 896, 48)


@pytest.mark.parametrize(
    ("overlap", "margin"), [(-16, 0), (528, 0), (60, 0), (64, 33), (0, 8), (64, -1)], ids=str
)
def test_an_overlap_that_cannot_be_is_refused(overlap: int, margin: int) -> None:
    with pytest.raises(ConfigError, match="overlap_px"):
        ModelConfig(crop_px=512, overlap_px=overlap, margin_px=margin)


@pytest.mark.parametrize(
    ("height", "width", "crop", "overlap"), [(50, 70, 32, 12), (20, 90, 32, 0), (9, 9, 32, 8)]
)
def test_an_array_predicted_in_crops_is_what_the_network_says_of_it(
    height: int, width: int, crop: int, overlap: int
) -> None:
    """A network that answers pixel by pixel: whatever the crops and their weights, its answer comes out."""
    rng = np.random.default_rng(3)
    rgb, valid = rng.random((3, height, width)).astype(np.float32), rng.random((height, width)) > 0.1
    batches = []

    def network(crops: np.ndarray) -> np.ndarray:
        assert crops.dtype == np.float32 and np.isfinite(crops).all()
        batches.append(crops.shape)
        return np.stack([crops[:, 0] * 10, crops[:, 1] - crops[:, 2]], axis=1)

    holes = rgb.copy()
    holes[:, ~valid] = np.nan
    made = predict_array(network, holes, valid, crop, overlap, batch=3)
    expected = np.stack([rgb[0] * 10, rgb[1] - rgb[2]])
    np.testing.assert_allclose(made[:, valid], expected[:, valid], rtol=1e-6)
    assert np.isfinite(made).all() and all(
        n <= 3 and side == (crop, crop) for n, _, *side in batches for side in [tuple(side)]
    )


def test_the_seam_between_two_crops_of_an_array_is_a_ramp() -> None:
    """Two crops that contradict each other are cross-faded, not butted."""
    answers = iter([np.zeros((1, 1, 20, 20)), np.ones((1, 1, 20, 20))])
    made = predict_array(
        lambda crops: next(answers), np.zeros((3, 20, 32), np.float32), np.ones((20, 32), bool), 20, 8, 1
    )
    line = made[0, 10]
    assert (line[:12] == 0).all() and (line[20:] == 1).all() and (np.diff(line[11:21]) > 0).all()


@settings(deadline=None, max_examples=25)
@given(
    lattice=st.sampled_from([Lattice(16, 8, 2), Lattice(16, 12, 1), Lattice(16, 16, 0), Lattice(24, 16, 3)]),
    height=st.integers(1, 70),
    width=st.integers(1, 70),
    row=st.integers(-900, 900),
    window_px=st.sampled_from([1, 40, 1000]),
    seed=st.integers(0, 99),
)
def test_the_canvas_is_the_weighted_sum_of_all_crops(
    kit, lattice, height, width, row, window_px, seed
) -> None:
    """Against a sum over the whole map in numpy, for crops that contradict each other."""
    plan = plan_windows(kit.utm_grid(row, 7 - row, height, width), lattice, window_px)

    def crop(r: int, c: int) -> np.ndarray:
        return np.random.default_rng((seed, r + 9999, c + 9999)).normal(10, 5, (2, *[lattice.crop_px] * 2))

    expected = np.zeros((2, height + 200, width + 200))
    weights = taper(lattice)[:, None] * taper(lattice)
    inner = slice(lattice.margin_px, lattice.crop_px - lattice.margin_px)
    canvas, found = Canvas(plan, 2), np.full((2, height, width), np.nan)
    for window in plan:
        canvas.begin(window)
        for i, r in enumerate(window.rows.crops):
            for j, c in enumerate(window.cols.crops):
                maps = crop(r, c).astype(np.float32)
                canvas.add(i, j, torch.from_numpy(maps))
                top = window.rows.served_from + i * lattice.stride_px + 100
                left = window.cols.served_from + j * lattice.stride_px + 100
                size = lattice.served_px
                expected[:, top : top + size, left : left + size] += weights * maps[:, inner, inner]
        found[:, slice(*window.rows.final), slice(*window.cols.final)] = canvas.finish().numpy()
    np.testing.assert_allclose(found, expected[:, 100 : 100 + height, 100 : 100 + width], rtol=0, atol=1e-5)


def test_finish_needs_begin(kit) -> None:
    canvas = Canvas(plan_windows(kit.utm_grid(0, 0, 20, 20), Lattice(16, 8, 2)))
    with pytest.raises(RuntimeError, match="begin"):
        canvas.finish()
