"""The streaming engine: cuts, tiles and batches do not matter; holes stay holes; errors come through."""

from __future__ import annotations

import math
import subprocess
import sys
import threading
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from canopy.errors import CanopyError, ConfigError, ImageryError
from canopy.geo.area import AOI
from canopy.imagery.base import Imagery
from canopy.inference.engine import predict_grid, reader_count
from canopy.inference.lattice import Lattice
from canopy.inference.layers import Extras
from canopy.inference.predictor import resolve_batch


def run(kit, grid, *, model=None, source=None, **options):
    """Heights (h, w) with NaN where invalid, the recorder, and the summary."""
    sink = kit.Recorder(grid, len(options.get("extras", Extras()).bands))
    summary = predict_grid(model or kit.AnalyticModel(), source or kit.FieldSource(), grid, sink, **options)
    assert (sink.times == 1).all(), "every pixel is written exactly once"
    return np.where(sink.valid, sink.values[0], np.nan), sink, summary


def blobs(rows: np.ndarray, cols: np.ndarray) -> np.ndarray:
    """Round holes on the global lattice."""
    return (np.mod(rows, 61) - 30) ** 2 + (np.mod(cols, 47) - 20) ** 2 < 150


@settings(deadline=None, max_examples=25)
@given(
    top=st.integers(0, 150),
    left=st.integers(0, 150),
    height=st.integers(1, 60),
    width=st.integers(1, 60),
    window_px=st.sampled_from([1, 48, 96, 1000]),
    batch=st.sampled_from([1, 3, 16]),
    workers=st.sampled_from([1, 3]),
)
def test_a_part_equals_the_same_pixels_of_the_whole(
    kit, whole, top, left, height, width, window_px, batch, workers
) -> None:
    part, _, _ = run(
        kit,
        whole.grid.window(top, left, height, width),
        source=kit.FieldSource(blobs),
        window_px=window_px,
        batch_size=batch,
        workers=workers,
    )
    expected = whole.heights[top : top + height, left : left + width]
    np.testing.assert_array_equal(np.isnan(part), np.isnan(expected))
    np.testing.assert_allclose(part, expected, rtol=0, atol=1e-4)


@pytest.fixture(scope="module")
def whole(kit) -> SimpleNamespace:
    grid = kit.utm_grid(-4_000_123, 500_077, 210, 210)
    heights, _, _ = run(kit, grid, source=kit.FieldSource(blobs), window_px=64)
    return SimpleNamespace(grid=grid, heights=heights)


def test_the_middle_of_crops_is_the_models_own_answer(kit) -> None:
    """With a margin that drops the zero-padded edge, the blend equals the model run without any crop."""
    grid = kit.utm_grid(0, 0, 100, 130)
    heights, _, _ = run(kit, grid, lattice=Lattice(32, 24, 2))
    around = kit.FieldSource().read(grid.pad(10))
    model = kit.AnalyticModel()
    with torch.no_grad():
        direct = model(torch.from_numpy(around.rgb)[None])[0, 0, 10:-10, 10:-10].numpy()
    np.testing.assert_allclose(heights, direct, atol=1e-4)


@settings(deadline=None, max_examples=20)
@given(seed=st.integers(0, 10_000), share=st.floats(0, 1))
def test_nodata_out_is_invalid_in(kit, seed: int, share: float) -> None:
    def holes(rows: np.ndarray, cols: np.ndarray) -> np.ndarray:
        noise = np.modf(np.abs(np.sin(rows * 12.9898 + cols * 78.233 + seed) * 43758.5453))[0]
        coarse = np.modf(np.abs(np.sin(rows // 40 * 3.1 + cols // 40 * 7.7 + seed) * 958.5453))[0]
        return (noise < share * 0.5) | (coarse < share)

    grid = kit.utm_grid(13, 7, 90, 70)
    _, sink, summary = run(kit, grid, source=kit.FieldSource(holes), window_px=64)
    valid = kit.FieldSource(holes).read(grid).valid
    np.testing.assert_array_equal(sink.valid, valid)
    assert np.isfinite(sink.values[:, sink.valid]).all()
    assert np.isnan(sink.values[:, ~sink.valid]).all()
    assert summary.valid_pixels == valid.sum()
    assert summary.pixels == grid.height * grid.width


def test_an_invalid_image_costs_no_forward_pass(kit) -> None:
    model = kit.AnalyticModel()
    grid = kit.utm_grid(0, 0, 200, 200)
    _, sink, summary = run(kit, grid, model=model, source=kit.FieldSource(lambda r, c: r > -1e9))
    assert model.calls == 0
    assert summary.crops_predicted == 0
    assert not sink.valid.any()
    assert np.isnan(summary.mean_height_m)


def test_only_crops_with_wanted_pixels_are_predicted(kit) -> None:
    model = kit.AnalyticModel()
    grid = kit.utm_grid(0, 0, 240, 240)
    # Columns from 48 on are missing: lattice crops further right have nothing to do.
    _, _, summary = run(
        kit, grid, model=model, source=kit.FieldSource(lambda r, c: c >= 48), lattice=Lattice(32, 24, 2)
    )
    rows, cols = len(Lattice(32, 24, 2).crops_serving(0, 240)), len(Lattice(32, 24, 2).crops_serving(0, 48))
    # A crop left over alone is given twice: a batch of one would take other kernels.
    assert rows * cols == summary.crops_predicted <= model.crops <= rows * cols + summary.windows


def test_outside_the_polygon_is_nodata_and_unread(kit) -> None:
    from shapely.geometry import Point

    grid = kit.utm_grid(0, 0, 300, 300)
    x, y = grid.xy(60, 60)
    disc = AOI(Point(x, y).buffer(40), grid.crs)
    source = kit.FieldSource()
    heights, sink, _ = run(kit, grid, source=source, aoi=disc, window_px=48)
    np.testing.assert_array_equal(sink.valid, disc.mask(grid))
    assert source.reads < 30  # of 169 windows
    everywhere, _, _ = run(kit, grid)
    np.testing.assert_allclose(heights[sink.valid], everywhere[sink.valid], atol=1e-4)


@pytest.mark.parametrize("shape", [(1, 1), (1, 70), (7, 3), (33, 1)])
def test_tiny_areas_have_their_exact_shape(kit, shape: tuple[int, int]) -> None:
    grid = kit.utm_grid(10, 20, *shape)
    # Only these pixels exist: everything around is invalid.
    source = kit.FieldSource(lambda r, c: (r < 10) | (r >= 10 + shape[0]) | (c < 20) | (c >= 20 + shape[1]))
    heights, sink, _ = run(kit, grid, source=source)
    assert heights.shape == shape
    assert sink.valid.all()
    assert np.isfinite(heights).all()


def test_the_date_band_and_one_writer_thread(kit) -> None:
    grid = kit.utm_grid(0, 0, 120, 120)
    _, sink, summary = run(
        kit, grid, source=kit.FieldSource(blobs), extras=Extras(date=True), workers=4, window_px=32
    )
    assert set(np.unique(sink.values[1][sink.valid])) == {18_000.0}
    assert len(sink.threads) == 1
    assert threading.current_thread().name not in sink.threads
    assert (summary.first_day, summary.last_day) == (18_000, 18_000)


def test_statistics_are_those_of_the_map(kit) -> None:
    grid = kit.utm_grid(5, 5, 111, 95)
    heights, sink, summary = run(kit, grid, source=kit.FieldSource(blobs), window_px=40)
    known = heights[sink.valid]
    assert summary.mean_height_m == pytest.approx(known.mean(), rel=1e-5)
    assert summary.cover_2m == pytest.approx((known > 2).mean())
    assert summary.valid_fraction == pytest.approx(sink.valid.mean())


class FailingSource:
    name = "failing"

    def __init__(self, source, after: int, error: Exception) -> None:
        self.source, self.after, self.error = source, after, error

    def read(self, grid) -> Imagery:
        if self.source.reads >= self.after:
            raise self.error
        return self.source.read(grid)


def test_errors_of_reader_and_writer_come_through_unchanged(kit) -> None:
    grid = kit.utm_grid(0, 0, 200, 200)
    broken = FailingSource(kit.FieldSource(), 3, ImageryError("cannot be read", where="a.tif"))
    with pytest.raises(ImageryError, match=r"a\.tif: cannot be read"):
        run(kit, grid, source=broken, window_px=48)

    class FullDisk(kit.Recorder):
        def write(self, *args) -> None:
            raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space"):
        predict_grid(kit.AnalyticModel(), kit.FieldSource(), grid, FullDisk(grid), window_px=48)
    assert not [t for t in threading.enumerate() if t.name.startswith("canopy-")]


def test_an_interrupt_stops_all_threads(kit) -> None:
    class Interrupted(kit.AnalyticModel):
        def forward(self, rgb: torch.Tensor) -> torch.Tensor:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(kit, kit.utm_grid(0, 0, 200, 200), model=Interrupted(), window_px=48)
    assert not [t for t in threading.enumerate() if t.name.startswith("canopy-")]


def test_a_height_that_is_no_number_is_an_error_that_names_the_place(kit) -> None:
    class Faulty(kit.AnalyticModel):
        def forward(self, rgb: torch.Tensor) -> torch.Tensor:
            height = super().forward(rgb)
            height[rgb[:, 1:2] > 0.79] = float("nan")
            return height

    grid = kit.utm_grid(0, 0, 60, 60)
    with pytest.raises(CanopyError, match=r"not a number at \d+ valid pixels.*row \d+, column \d+") as caught:
        run(kit, grid, model=Faulty())
    assert caught.value.exit_code == 1


def test_a_source_of_the_wrong_shape_is_refused(kit) -> None:
    class Shrinking(kit.FieldSource):
        def read(self, grid) -> Imagery:
            return super().read(grid.window(0, 0, grid.height - 1, grid.width))

    with pytest.raises(ImageryError, match="window's shape"):
        run(kit, kit.utm_grid(0, 0, 20, 20), source=Shrinking())


def test_out_of_memory_halves_the_batch_and_says_so(kit) -> None:
    class Small(kit.AnalyticModel):
        def forward(self, rgb: torch.Tensor) -> torch.Tensor:
            if len(rgb) > 2:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return super().forward(rgb)

    grid = kit.utm_grid(0, 0, 90, 90)
    heights, _, summary = run(kit, grid, model=Small(), batch_size=16)
    assert summary.batch_size == 2
    assert len(summary.notes) == 3
    expected, _, _ = run(kit, grid)
    np.testing.assert_allclose(heights, expected, atol=1e-4)


def test_a_batch_of_one_that_does_not_fit_is_an_error(kit) -> None:
    class Huge(kit.AnalyticModel):
        def forward(self, rgb: torch.Tensor) -> torch.Tensor:
            raise torch.OutOfMemoryError("CUDA out of memory")

    with pytest.raises(torch.OutOfMemoryError):
        run(kit, kit.utm_grid(0, 0, 20, 20), model=Huge(), batch_size=4)


@pytest.mark.parametrize(
    ("options", "kind", "words"),
    [
        ({"workers": "many"}, ConfigError, "--workers"),
        ({"batch_size": 0}, ConfigError, "--batch-size"),
        ({"batch_size": "many"}, ConfigError, "--batch-size"),
    ],
)
def test_impossible_settings_are_refused(kit, options, kind, words) -> None:
    with pytest.raises(kind, match=words):
        run(kit, kit.utm_grid(0, 0, 20, 20), **options)


def test_batches_are_full_across_windows(kit) -> None:
    model, grid = kit.AnalyticModel(), kit.utm_grid(3, 4, 150, 190)
    sink = kit.Recorder(grid)
    summary = predict_grid(model, kit.FieldSource(), grid, sink, batch_size=7, window_px=1)
    assert summary.windows > 50
    assert model.calls == math.ceil(summary.crops_predicted / 7)
    assert model.largest_batch == 7


def test_automatic_sizes() -> None:
    assert resolve_batch("auto", "cpu", 256) == resolve_batch("auto", "cpu", 512) == 4
    assert resolve_batch("auto", "cpu", 1024) == resolve_batch("auto", "cpu", 4096) == 1
    assert resolve_batch("auto", "cuda", 256) == 64
    assert resolve_batch("auto", "cuda", 1024) == 4
    assert resolve_batch(3, "cuda", 1024) == 3
    assert reader_count("auto", "cpu") == 2
    assert reader_count(5, "cpu") == reader_count("5") == 5
    assert 1 <= reader_count("auto", "cuda") <= 8


def test_a_gpu_box_needs_no_geographic_library() -> None:
    code = (
        "import sys; sys.modules.update(dict.fromkeys("
        "['rasterio', 'odc', 'pyproj', 'shapely', 'geopandas', 'scipy', 'rioxarray', 'xarray']))\n"
        "import canopy.inference.engine, canopy.inference.backends, canopy.models.export"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-800:]
