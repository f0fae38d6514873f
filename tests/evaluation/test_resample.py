"""Bringing a raster onto another grid: against brute force over sub-pixels and plain loops."""

from __future__ import annotations

import runpy
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from canopy.errors import InputError
from canopy.evaluation.grids import read_on
from canopy.evaluation.opening import open_heights
from canopy.geo.grid import Grid
from canopy.metrics import percent_of

stand = runpy.run_path(str(Path(__file__).with_name("stand.py")))
WEST, NORTH, UTM = stand["WEST"], stand["NORTH"], stand["UTM"]


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., Path]:
    """`write("a.tif", heights, gsd=0.5, west=...)` in the test's folder; see stand.py."""
    return lambda name, *bands, **kw: stand["write_heights"](tmp_path / name, *bands, **kw)


def loop_mean(values: np.ndarray, gsd: float, grid: Grid) -> tuple[np.ndarray, np.ndarray]:
    """Area-weighted mean over every target pixel by plain loops; valid where half of it is."""
    out, ok = np.zeros(grid.shape), np.zeros(grid.shape, bool)
    side = grid.pixel[0] / gsd
    h, w = values.shape
    for i in range(grid.height):
        for j in range(grid.width):
            x, y = grid.xy(i, j)
            left, top = (x - WEST) / gsd, (NORTH - y) / gsd
            total = area = 0.0
            for r in range(max(0, int(np.floor(top))), min(h, int(np.ceil(top + side)))):
                for c in range(max(0, int(np.floor(left))), min(w, int(np.ceil(left + side)))):
                    high = min(top + side, r + 1) - max(top, r)
                    wide = min(left + side, c + 1) - max(left, c)
                    if high > 0 and wide > 0 and np.isfinite(values[r, c]):
                        total, area = total + high * wide * values[r, c], area + high * wide
            if area >= 0.5 * side**2 - 1e-6:
                out[i, j], ok[i, j] = total / area, True
    return out, ok


@pytest.mark.parametrize(
    ("size", "dx", "dy"), [(1.0, 0.3, 0.7), (1.3, 0.0, 0.0), (2.0, 0.25, 0.5), (3.7, -1.1, 2.2)]
)
def test_mean_is_exactly_area_weighted(write: Callable[..., Path], size: float, dx: float, dy: float) -> None:
    rng = np.random.default_rng(0)
    values = rng.gamma(2, 5, (26, 31)).astype(np.float32)
    values[rng.random(values.shape) < 0.25] = np.nan
    grid = Grid.of(UTM, (size, 0, WEST + dx, 0, -size, NORTH - dy), (9, 8))
    with open_heights(write("a.tif", values, gsd=0.6)) as side:
        (got,), valid = read_on(side, grid, "mean")
    expected, ok = loop_mean(values, 0.6, grid)
    np.testing.assert_array_equal(valid, ok)
    np.testing.assert_allclose(got[ok], expected[ok], rtol=1e-6)
    assert (got[~ok] == 0).all()


def test_highest_and_percentile_take_the_pixels_of_an_aligned_grid(write: Callable[..., Path]) -> None:
    rng = np.random.default_rng(1)
    values = rng.gamma(2, 5, (24, 24)).astype(np.float32)
    values[rng.random(values.shape) < 0.3] = np.nan
    grid = Grid.of(UTM, (3.0, 0, WEST, 0, -3.0, NORTH), (8, 8))
    cells = values.reshape(8, 3, 8, 3).swapaxes(1, 2).reshape(8, 8, 9)
    enough = np.isfinite(cells).sum(-1) >= 4.5
    with open_heights(write("a.tif", values)) as side:
        ((highest,), valid), ((p95,), _) = read_on(side, grid, "max"), read_on(side, grid, "p95")
    np.testing.assert_array_equal(valid, enough)
    np.testing.assert_allclose(highest[enough], np.nanmax(cells[enough], -1), rtol=1e-6)
    np.testing.assert_allclose(p95[enough], np.nanpercentile(cells[enough], 95, axis=-1), rtol=1e-6)


def test_parts_do_not_show(write: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    from canopy.evaluation import grids as resample

    values = np.random.default_rng(2).gamma(2, 5, (60, 70)).astype(np.float32)
    grid = Grid.of(UTM, (1.7, 0, WEST - 3, 0, -1.7, NORTH + 5), (40, 44))
    with open_heights(write("a.tif", values)) as side:
        for stat in ("mean", "max"):
            whole = read_on(side, grid, stat)
            monkeypatch.setattr(resample, "_SOURCE_PX", 20)
            parts = read_on(side, grid, stat)
            monkeypatch.undo()
            np.testing.assert_array_equal(whole[1], parts[1])
            np.testing.assert_allclose(whole[0], parts[0], atol=1e-9)


@pytest.mark.parametrize("bad", ["median", "p101", "p", "95", ""])
def test_unknown_statistics(bad: str) -> None:
    with pytest.raises(InputError, match="statistic"):
        percent_of(bad, "--stat")
    assert [percent_of(stat) for stat in ("p99.5", "max", "mean")] == [99.5, 100, None]
