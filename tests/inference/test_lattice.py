"""The crop lattice and the seam weights: every pixel is served, weights sum to one, cuts do not matter."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from canopy.errors import ConfigError
from canopy.inference.lattice import Canvas, Lattice, plan_windows, predict_array, taper
from canopy.models.config import ModelConfig

LATTICES = [Lattice(16, 8, 2), Lattice(16, 12, 1), Lattice(16, 16, 0), Lattice(32, 16, 4), Lattice(20, 10, 0)]


@pytest.mark.parametrize("lattice", LATTICES, ids=str)
def test_weights_are_positive_and_sum_to_one(lattice: Lattice) -> None:
    weights = taper(lattice)
    assert weights.shape == (lattice.served_px,) and weights.min() > 0
    total = np.zeros(12 * lattice.stride_px)
    for start in range(0, len(total) - lattice.served_px, lattice.stride_px):
        total[start : start + lattice.served_px] += weights
    inner = slice(lattice.served_px, -2 * lattice.served_px)
    np.testing.assert_allclose(total[inner], 1.0, atol=1e-12)


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


@settings(deadline=None, max_examples=25)
@given(
    lattice=st.sampled_from(LATTICES), height=st.integers(1, 70), width=st.integers(1, 70),
    row=st.integers(-900, 900), window_px=st.sampled_from([1, 40, 1000]), seed=st.integers(0, 99),
)  # fmt: skip
def test_the_canvas_is_the_weighted_sum_of_all_crops(
    kit, lattice, height, width, row, window_px, seed
) -> None:
    """Against a sum over the whole map in numpy, for crops that contradict each other; each pixel once."""
    plan = plan_windows(kit.utm_grid(row, 7 - row, height, width), lattice, window_px)

    def crop(r: int, c: int) -> np.ndarray:
        return np.random.default_rng((seed, r + 9999, c + 9999)).normal(10, 5, (2, *[lattice.crop_px] * 2))

    expected, crops = np.zeros((2, height + 200, width + 200)), 0
    weights = np.pad(taper(lattice)[:, None] * taper(lattice), lattice.margin_px)
    canvas, found, seen = Canvas(plan, 2), np.full((2, height, width), np.nan), np.zeros((height, width), int)
    for window in plan:
        canvas.begin(window)
        row_off, col_off = plan.offset(window)
        for i, r in enumerate(window.rows):
            for j, c in enumerate(window.cols):
                maps, crops = crop(r, c).astype(np.float32), crops + 1
                canvas.add((i, j), torch.from_numpy(maps))
                top, left = row_off + i * lattice.stride_px + 100, col_off + j * lattice.stride_px + 100
                size = lattice.crop_px
                expected[:, top : top + size, left : left + size] += weights * maps
        rows, cols = plan.final(window)
        place = np.s_[rows.start + row_off : rows.stop + row_off, cols.start + col_off : cols.stop + col_off]
        found[:, *place] = canvas.finish().numpy()
        seen[place] += 1
    assert (seen == 1).all() and crops == plan.n_crops
    np.testing.assert_allclose(found, expected[:, 100 : 100 + height, 100 : 100 + width], rtol=0, atol=1e-5)


def test_which_lattice_a_model_has() -> None:
    for crop, patch in ((256, 16), (224, 14), (16, 16), (32, 16)):
        lattice = Lattice.of_model(SimpleNamespace(crop_px=crop, patch_px=patch))
        assert lattice.stride_px % patch == 0 and lattice.crop_px == crop  # the token grids coincide
    # Files of before there was the field, and stand-ins for models, have none.
    assert ModelConfig.from_dict({"crop_px": 256}) == ModelConfig(crop_px=256)
    assert Lattice.of_model(ModelConfig(crop_px=256)) == Lattice(256, 160, 6)
    assert Lattice.of_model(ModelConfig(crop_px=512, overlap_px=64)) == Lattice(512, 448, 4)
    assert Lattice.of_model(ModelConfig(crop_px=1024, overlap_px=128, margin_px=48)) == Lattice(1024, 896, 48)


@pytest.mark.parametrize("numbers", [(16, 16, 2), (64, 16, 0), (512, -16, 0), (512, 448, 33)], ids=str)
def test_a_lattice_with_gaps_is_refused(numbers: tuple[int, int, int]) -> None:
    with pytest.raises(ConfigError, match="gaps"):
        Lattice(*numbers)


@pytest.mark.parametrize(
    ("height", "width", "crop", "overlap"), [(50, 70, 32, 12), (20, 90, 32, 0), (9, 9, 32, 8)]
)
def test_an_array_predicted_in_crops_is_what_the_network_says_of_it(
    height: int, width: int, crop: int, overlap: int
) -> None:
    """A network that answers pixel by pixel: whatever the crops and their weights, its answer comes out."""
    rng = np.random.default_rng(3)
    rgb, valid = rng.random((3, height, width)).astype(np.float32), rng.random((height, width)) > 0.1

    def network(crops: np.ndarray) -> np.ndarray:
        assert crops.dtype == np.float32 and np.isfinite(crops).all()
        assert len(crops) <= 3 and crops.shape[2:] == (crop, crop)
        return np.stack([crops[:, 0] * 10, crops[:, 1] - crops[:, 2]], axis=1)

    holes = rgb.copy()
    holes[:, ~valid] = np.nan
    made = predict_array(network, holes, valid, crop, overlap, batch=3)
    expected = np.stack([rgb[0] * 10, rgb[1] - rgb[2]])
    np.testing.assert_allclose(made[:, valid], expected[:, valid], rtol=1e-6)
    assert np.isfinite(made).all()


def test_the_seam_between_two_crops_of_an_array_is_a_ramp() -> None:
    """Two crops that contradict each other are cross-faded, not butted."""
    answers = iter([np.zeros((1, 1, 20, 20)), np.ones((1, 1, 20, 20))])
    made = predict_array(
        lambda crops: next(answers), np.zeros((3, 20, 32), np.float32), np.ones((20, 32), bool), 20, 8, 1
    )
    line = made[0, 10]
    assert (line[:12] == 0).all() and (line[20:] == 1).all() and (np.diff(line[11:21]) > 0).all()
