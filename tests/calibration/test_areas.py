"""Intervals of area means: errors that are alike must not average out as if they were not."""

from __future__ import annotations

import json

import numpy as np
import pytest

from canopy.calibration.area import (
    SIZES_M,
    TAG,
    AreaModel,
    area_coverage,
    area_interval,
    area_model_of,
    fit_areas,
)
from canopy.calibration.collect import cells_of
from canopy.calibration.intervals import fit_intervals
from canopy.errors import ConfigError, DataError
from canopy.models.heads import IntervalTable


@pytest.fixture(scope="module")
def fitted(make_tiles) -> tuple[IntervalTable, AreaModel]:
    tiles = make_tiles(16)
    table = fit_intervals(cells_of(tiles))
    return table, fit_areas(tiles, table)


def test_means_of_unseen_windows_are_covered(fitted, make_tiles) -> None:
    rows = area_coverage(make_tiles(12, seed=5), *fitted)
    for size, row in rows.items():
        assert 0.84 <= row["coverage"] <= 1.0, size
    assert rows["64"]["mean_width_m"] < 0.6 * rows["8"]["mean_width_m"]


def test_independent_errors_would_be_far_too_sure(fitted, make_tiles) -> None:
    """What is left out when correlation is ignored: the nugget alone, and every cell by itself."""
    table, model = fitted
    alone = AreaModel(model.pull, float(model.correlation(np.array([0.0]))[0]) + model.nugget, 0.0,
                      np.zeros(len(model.weights)), model.factors)  # fmt: skip
    tiles = make_tiles(8, seed=6)
    assert area_coverage(tiles, table, alone)["32"]["coverage"] < 0.7
    assert area_coverage(tiles, table, model)["32"]["coverage"] > 0.84


def test_correlation_falls_with_area_and_distance(fitted) -> None:
    _, model = fitted
    means = [model.mean_correlation(np.ones((n, n), bool), 1.0) for n in (4, 16, 64, 128)]
    assert means == sorted(means, reverse=True)
    near, far = model.correlation(np.array([1.0, 100.0]))
    assert near > far >= 0


def test_the_pixel_size_of_the_mask_does_not_matter(fitted) -> None:
    _, model = fitted
    fine = model.mean_correlation(np.ones((200, 80), bool), 0.5)
    coarse = model.mean_correlation(np.ones((20, 8), bool), 5.0)
    assert fine == pytest.approx(coarse, rel=0.12)


def test_interval_of_a_polygon_and_its_faults(fitted) -> None:
    _, model = fitted
    height = np.full((40, 40), 18.0)
    lower, upper = height - 6, height + 5
    inside = np.zeros((40, 40), bool)
    inside[5:30, 8:20] = True
    height[5, 8] = np.nan
    made = area_interval(height, lower, upper, inside, 1.0, model)
    assert made.mean_m == pytest.approx(18.0)
    assert 0 <= made.lower_m < made.mean_m < made.upper_m < 23
    narrow = area_interval(height, lower, upper, inside, 1.0, model, 0.5)
    assert narrow.upper_m - narrow.lower_m < made.upper_m - made.lower_m
    with pytest.raises(DataError, match="without a height"):
        area_interval(height, lower, upper, np.zeros_like(inside), 1.0, model)
    with pytest.raises(ConfigError, match="area interval"):
        area_interval(height, lower, upper, inside, 1.0, model, 0.99)


def test_the_model_travels_in_a_maps_tags(fitted) -> None:
    _, model = fitted
    again = area_model_of({TAG: json.dumps(model.to_dict())})
    assert again.factors.shape == model.factors.shape and again.factors.shape[1] == len(SIZES_M)
    np.testing.assert_allclose(again.weights, model.weights, atol=1e-4)
    with pytest.raises(DataError, match=r"--interval 0\.9"):
        area_model_of({})
    with pytest.raises(DataError, match="cannot be"):
        area_model_of({TAG: "{}"})


def test_too_few_tiles_are_refused(make_tiles) -> None:
    tiles = make_tiles(6)
    with pytest.raises(DataError, match="at least 4"):
        fit_areas(tiles[:3], fit_intervals(cells_of(tiles)))
