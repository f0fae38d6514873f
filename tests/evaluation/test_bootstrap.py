"""Block bootstrap: intervals hold the truth as often as they say, and blocks matter."""

from __future__ import annotations

import numpy as np
import pytest

from canopy import metrics
from canopy.evaluation.pixels import LEAST_WANTED, BlockLayout
from canopy.evaluation.scores import draws, intervals, replicate
from canopy.geo.grid import Grid

SIDE, BLOCKS_PER_SIDE = 20, 6  # pixels per block, blocks per side of a field


def field(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """A field of heights and errors that are alike over a few pixels; (n,) map, reference, block."""
    n = SIDE * BLOCKS_PER_SIDE
    # Errors: white noise smeared over 5 x 5 pixels by a box (no SciPy: cheap and exactly of known variance).
    padded = rng.normal(size=(2, n + 4, n + 4)).cumsum(1).cumsum(2)
    padded = np.pad(padded, ((0, 0), (1, 0), (1, 0)))
    smooth = (padded[:, 5:, 5:] - padded[:, :-5, 5:] - padded[:, 5:, :-5] + padded[:, :-5, :-5]) / 5
    reference, error = 15 + 4 * smooth[0], 0.5 + 2 * smooth[1]
    rows, cols = np.indices((n, n)) // SIDE
    return (reference + error).ravel(), reference.ravel(), (rows * BLOCKS_PER_SIDE + cols).ravel()


def test_intervals_cover_the_truth_at_their_nominal_rate() -> None:
    # Errors are normal with mean 0.5 and standard deviation 2, independent of the height.
    from scipy import stats

    truth = {
        "bias_m": 0.5,
        "rmse_m": np.sqrt(4 + 0.25),
        "mae_m": stats.foldnorm(0.25, scale=2).mean(),
    }
    rng, blocks, fields = np.random.default_rng(0), BLOCKS_PER_SIDE**2, 240
    hits = dict.fromkeys(truth, 0)
    naive = 0
    for k in range(fields):
        p, r, block = field(rng)
        rows = metrics.pixel_sums(p, r, block, blocks)
        found = intervals(metrics.scores(replicate(rows, 300, k % 5)), blocks)
        for name, value in truth.items():
            low, high = found[name]
            hits[name] += low <= value <= high
        error = p - r
        naive += abs(error.mean() - 0.5) <= 1.96 * error.std() / np.sqrt(error.size)
    rates = {name: count / fields for name, count in hits.items()}
    assert all(0.90 <= rate <= 0.98 for rate in rates.values()), rates
    # Resampling pixels instead would be right less than six times in ten.
    assert naive / fields < 0.6


def test_replicates_are_sums_of_drawn_blocks() -> None:
    rows = np.random.default_rng(1).random((12, 3))
    weights = draws(12, 40, 7)
    assert weights.shape == (40, 12)
    assert (weights.sum(axis=1) == 12).all()
    np.testing.assert_allclose(replicate(rows, 40, 7), weights @ rows)
    np.testing.assert_array_equal(draws(12, 40, 7), weights)


def test_few_blocks_give_a_reason_and_missing_values_no_interval() -> None:
    drawn = np.full(100, np.nan)
    drawn[:90] = 1.0
    assert intervals({"x": drawn, "y": np.arange(100.0)}, 20)["x"] is None


@pytest.mark.parametrize(
    ("height", "width", "gsd", "expected"),
    [
        (2000, 2000, 1.0, 250), (1000, 1000, 1.0, 200), (256, 256, 1.0, 50), (4000, 4000, 0.5, 500),
        (300, 300, 30.0, 50),
    ],
)  # fmt: skip
def test_block_side_is_the_largest_that_leaves_enough(
    height: int, width: int, gsd: float, expected: int
) -> None:
    grid = Grid.of("EPSG:32617", (gsd, 0, 4e5, 0, -gsd, 4.2e6), (height, width))
    layout = BlockLayout([grid])
    assert layout.side_px == expected
    assert layout.side_px % metrics.BLOCK_PX == 0
    assert layout.count >= LEAST_WANTED or expected == 50


def test_blocks_number_every_pixel_of_every_raster_once() -> None:
    grids = [Grid.of("EPSG:32617", (1, 0, 4e5, 0, -1, 4.2e6), shape) for shape in ((130, 260), (70, 50))]
    layout = BlockLayout(grids, side_m=50)
    seen = []
    for index, grid in enumerate(grids):
        for row in range(0, grid.height, 100):
            for col in range(0, grid.width, 100):
                shape = min(100, grid.height - row), min(100, grid.width - col)
                local, numbers = layout.local(index, row, col, shape)
                assert local.max() < len(numbers)
                seen.append(np.unique(numbers[local]))
    raster, bounds = layout.outlines()
    assert len(bounds) == layout.count == 3 * 6 + 2
    assert set(np.concatenate(seen)) == set(range(layout.count))
    assert raster[-1] == 1 and bounds[-1].tolist() == [4e5, 4.2e6 - 70, 4e5 + 50, 4.2e6 - 50]


def test_sides_grow_when_there_would_be_too_many_blocks() -> None:
    grid = Grid.of("EPSG:32617", (1, 0, 4e5, 0, -1, 4.2e6), (20_000, 20_000))
    layout = BlockLayout([grid])
    assert layout.count <= 1600
    assert layout.side_m == pytest.approx(500, rel=1e-3)
