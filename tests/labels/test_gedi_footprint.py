"""Discs of GEDI shots and statistics over them, against a pixel-by-pixel reference."""

from __future__ import annotations

import numpy as np
import pandas
import pyproj
import pytest

from canopy.errors import InputError
from canopy.geo.crs import transformer
from canopy.geo.grid import Grid
from canopy.labels.footprint import pool_over_disc

UTM = Grid.of("EPSG:32616", (2.0, 0, 700_000, 0, -2.0, 4_200_000), (120, 150))


def shots_on(grid: Grid, count: int, seed: int = 0, margin: float = 12) -> pandas.DataFrame:
    """Places inside a grid, `margin` pixels from its edge."""
    rng = np.random.default_rng(seed)
    rows, cols = (rng.uniform(margin, n - margin, count) for n in grid.shape)
    xy = [grid.xy(row, col) for row, col in zip(rows, cols, strict=True)]
    lon, lat = transformer(grid.crs, "EPSG:4326").transform(*np.array(xy).T)
    return pandas.DataFrame({"lon": lon, "lat": lat})


def reference(values: np.ndarray, grid: Grid, shots: pandas.DataFrame, statistic) -> np.ndarray:  # type: ignore[no-untyped-def]
    """Geodesic distances from every shot to every pixel centre."""
    rows, cols = np.mgrid[: grid.height, : grid.width]
    x = grid.transform.c + grid.transform.a * (cols + 0.5)
    y = grid.transform.f + grid.transform.e * (rows + 0.5)
    lon, lat = transformer(grid.crs, "EPSG:4326").transform(x, y)
    geod, out = pyproj.Geod(ellps="WGS84"), []
    for shot in shots.itertuples():
        _, _, metres = geod.inv(np.full(lon.shape, shot.lon), np.full(lon.shape, shot.lat), lon, lat)
        out.append(statistic(values[metres <= 12.5]))
    return np.array(out)


STATISTICS = {"mean": np.mean, "max": np.max, "p95": lambda v: np.percentile(v, 95), "p50": np.median}
# Web Mercator at 38 N: pixels of 2.5 units are 1.97 m on the ground. Degrees: pixels are not square.
MERCATOR = Grid.of("EPSG:3857", (2.5, 0, -9_400_000, 0, -2.5, 4_580_000), (90, 100))
DEGREES = Grid.of("EPSG:4326", (2e-5, 0, -84.5, 0, -2e-5, 38.0), (90, 100))


@pytest.mark.parametrize("how", STATISTICS)
@pytest.mark.parametrize("grid", [UTM, MERCATOR, DEGREES], ids=["utm", "mercator", "degrees"])
def test_pooling_agrees_with_geodesic_distances(grid, how):
    values = np.random.default_rng(3).gamma(2, 6, grid.shape).astype(np.float32)
    shots = shots_on(grid, 25)
    got = pool_over_disc(values, shots, how, grid=grid)
    wanted = reference(values, grid, shots, STATISTICS[how])
    # UTM's 0.04 % and the curvature may move a centre over the edge here and there.
    assert (np.abs(got - wanted) < 1e-3).mean() >= (0.6 if grid is UTM else 0.85)
    assert np.abs(got - wanted).max() < (0.3 if how in ("mean", "p50") else 8)


def test_pooling_is_exact_in_the_plane_of_a_utm_grid():
    values = np.random.default_rng(3).gamma(2, 6, UTM.shape).astype(np.float32)
    shots = shots_on(UTM, 200, seed=5)
    x, y = transformer("EPSG:4326", UTM.crs).transform(shots.lon.to_numpy(), shots.lat.to_numpy())
    rows, cols = np.mgrid[: UTM.height, : UTM.width]
    for how, statistic in STATISTICS.items():
        wanted = []
        for px, py in zip(x, y, strict=True):
            far = np.hypot(700_001 + 2 * cols - px, 4_199_999 - 2 * rows - py)
            wanted.append(statistic(values[far <= 12.5]))
        assert pool_over_disc(values, shots, how, grid=UTM) == pytest.approx(np.array(wanted), abs=1e-4)


def test_windows_give_what_the_array_gives(monkeypatch):
    from canopy.labels import footprint as gedi_footprint

    values = np.random.default_rng(3).gamma(2, 6, UTM.shape).astype(np.float32)
    values[40:60, 40:60] = np.nan

    def window_of(part: Grid) -> np.ndarray:
        (row, col), reach = UTM.offset_of(part), 100
        wide = np.pad(values, reach, constant_values=np.nan)[row + reach :, col + reach :]
        return wide[: part.height, : part.width]

    shots = shots_on(UTM, 300, seed=1, margin=-20)
    monkeypatch.setattr(gedi_footprint, "_WINDOW_PX", 37)
    monkeypatch.setattr(gedi_footprint, "_GATHER_PX", 5000)
    small = pool_over_disc(window_of, shots, "p95", grid=UTM)
    monkeypatch.undo()
    whole = pool_over_disc(values, shots, "p95", grid=UTM)
    assert 0 < np.isnan(whole).sum() < 250 and np.array_equal(small, whole, equal_nan=True)


def test_how_much_of_a_disc_must_be_seen():
    values = np.full(UTM.shape, 7.0, np.float32)
    middle = shots_on(UTM, 1, margin=59)
    assert pool_over_disc(values, middle, grid=UTM).tolist() == [7.0]
    values[:, ::2] = np.nan
    assert np.isnan(pool_over_disc(values, middle, grid=UTM))
    assert pool_over_disc(values, middle, grid=UTM, min_valid=0.4).tolist() == [7.0]
    values[:] = np.nan
    for how in STATISTICS:
        assert np.isnan(pool_over_disc(values, middle, how, grid=UTM, min_valid=0.01))
    far = pandas.DataFrame({"lon": [10.0, np.nan], "lat": [10.0, 3.0]})
    assert np.isnan(pool_over_disc(values, far, grid=UTM)).all()


def test_pixels_larger_than_the_disc_take_the_one_that_holds_the_shot():
    grid = Grid.of("EPSG:32616", (100.0, 0, 700_000, 0, -100.0, 4_200_000), (6, 5))
    values = np.arange(30, dtype=np.float32).reshape(6, 5)
    lon, lat = transformer(grid.crs, "EPSG:4326").transform([700_290, 700_001], [4_199_890, 4_199_999])
    assert pool_over_disc(values, pandas.DataFrame({"lon": lon, "lat": lat}), grid=grid).tolist() == [
        7.0,
        0.0,
    ]


def test_unknown_statistics_and_sizes():
    shots = shots_on(UTM, 1)
    for how, options, told in (
        ("median", {}, "statistic"), ("p101", {}, "statistic"), ("mean", {"diameter": 0}, "diameter")
    ):  # fmt: skip
        with pytest.raises(InputError, match=told):
            pool_over_disc(np.zeros(UTM.shape), shots, how, grid=UTM, **options)
    with pytest.raises(InputError, match="its grid"):
        pool_over_disc(np.zeros((3, 3)), shots, grid=UTM)
