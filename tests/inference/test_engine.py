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
from shapely.geometry import Point

from canopy.errors import CanopyError, ImageryError
from canopy.geo.area import AOI
from canopy.inference.backends import TorchRunner
from canopy.inference.engine import predict_grid, reader_count, resolve_batch
from canopy.inference.lattice import Lattice
from canopy.inference.layers import Extras

# A lattice of crops of 32 px at a stride of 24, whose margin drops the zero-padded edge.
MARGIN = {"overlap_px": 8, "margin_px": 2}


def blobs(rows: np.ndarray, cols: np.ndarray) -> np.ndarray:
    """Round holes on the global lattice."""
    return (np.mod(rows, 61) - 30) ** 2 + (np.mod(cols, 47) - 20) ** 2 < 150


@pytest.fixture(scope="module")
def whole(kit) -> SimpleNamespace:
    grid = kit.utm_grid(-4_000_123, 500_077, 210, 210)
    heights, _, _ = kit.run(grid, source=kit.FieldSource(blobs), window_px=64)
    return SimpleNamespace(grid=grid, heights=heights)


@settings(deadline=None, max_examples=20)
@given(
    top=st.integers(0, 150), left=st.integers(0, 150), height=st.integers(1, 60), width=st.integers(1, 60),
    window_px=st.sampled_from([1, 48, 1000]), batch=st.sampled_from([1, 3, 16]),
    workers=st.sampled_from([1, 3]),
)  # fmt: skip
def test_a_part_equals_the_same_pixels_of_the_whole(
    kit, whole, top, left, height, width, window_px, batch, workers
) -> None:
    part, _, _ = kit.run(
        whole.grid.window(top, left, height, width), source=kit.FieldSource(blobs),
        window_px=window_px, batch_size=batch, workers=workers,
    )  # fmt: skip
    expected = whole.heights[top : top + height, left : left + width]
    np.testing.assert_array_equal(np.isnan(part), np.isnan(expected))
    np.testing.assert_allclose(part, expected, rtol=0, atol=1e-4)


def test_the_middle_of_crops_is_the_models_own_answer(kit) -> None:
    """With a margin that drops the zero-padded edge, the blend equals the model run without any crop."""
    grid = kit.utm_grid(0, 0, 100, 130)
    heights, _, _ = kit.run(grid, model=kit.AnalyticModel(**MARGIN))
    around = kit.FieldSource().read(grid.pad(10))
    direct = kit.AnalyticModel().heights(torch.from_numpy(around.rgb)[None])[0, 0, 10:-10, 10:-10].numpy()
    np.testing.assert_allclose(heights, direct, atol=1e-4)


@settings(deadline=None, max_examples=15)
@given(seed=st.integers(0, 10_000), share=st.floats(0, 1))
def test_nodata_out_is_invalid_in_and_statistics_are_those_of_the_map(kit, seed: int, share: float) -> None:
    def holes(rows: np.ndarray, cols: np.ndarray) -> np.ndarray:
        noise = np.modf(np.abs(np.sin(rows * 12.9898 + cols * 78.233 + seed) * 43758.5453))[0]
        coarse = np.modf(np.abs(np.sin(rows // 40 * 3.1 + cols // 40 * 7.7 + seed) * 958.5453))[0]
        return (noise < share * 0.5) | (coarse < share)

    grid = kit.utm_grid(13, 7, 90, 70)
    heights, sink, summary = kit.run(grid, source=kit.FieldSource(holes), window_px=64)
    valid = kit.FieldSource(holes).read(grid).valid
    np.testing.assert_array_equal(sink.valid, valid)
    assert np.isfinite(sink.values[:, valid]).all() and np.isnan(sink.values[:, ~valid]).all()
    assert (summary.valid_pixels, summary.pixels) == (valid.sum(), valid.size)
    if valid.any():
        assert summary.mean_height_m == pytest.approx(heights[valid].mean(), rel=1e-5)
        assert summary.cover_2m == pytest.approx((heights[valid] > 2).mean())
        assert (summary.first_day, summary.last_day) == (18_000, 18_000)


def test_only_crops_with_wanted_pixels_are_predicted(kit) -> None:
    model, grid = kit.AnalyticModel(**MARGIN), kit.utm_grid(0, 0, 240, 240)
    # Columns from 48 on are missing: lattice crops further right have nothing to do.
    _, _, summary = kit.run(grid, model=model, source=kit.FieldSource(lambda r, c: c >= 48))
    lattice = Lattice(32, 24, 2)
    expected = len(lattice.crops_serving(0, 240)) * len(lattice.crops_serving(0, 48))
    assert expected == summary.crops_predicted == model.crops
    model = kit.AnalyticModel()
    _, sink, summary = kit.run(grid, model=model, source=kit.FieldSource(lambda r, c: r > -1e9))
    assert model.calls == summary.crops_predicted == 0 and not sink.valid.any()
    assert np.isnan(summary.mean_height_m)


def test_outside_the_polygon_is_nodata_and_unread(kit) -> None:
    grid, source = kit.utm_grid(0, 0, 300, 300), kit.FieldSource()
    disc = AOI(Point(*grid.xy(60, 60)).buffer(40), grid.crs)
    heights, sink, _ = kit.run(grid, source=source, aoi=disc, window_px=48)
    np.testing.assert_array_equal(sink.valid, disc.mask(grid))
    assert source.reads < 30  # of 169 windows
    everywhere, _, _ = kit.run(grid)
    np.testing.assert_allclose(heights[sink.valid], everywhere[sink.valid], atol=1e-4)


@pytest.mark.parametrize("shape", [(1, 1), (1, 70), (33, 1)])
def test_tiny_areas_have_their_exact_shape(kit, shape: tuple[int, int]) -> None:
    # Only these pixels exist: everything around is invalid.
    source = kit.FieldSource(lambda r, c: (r < 10) | (r >= 10 + shape[0]) | (c < 20) | (c >= 20 + shape[1]))
    heights, _, _ = kit.run(kit.utm_grid(10, 20, *shape), source=source)
    assert heights.shape == shape and np.isfinite(heights).all()


def test_one_thread_writes_and_batches_are_full_across_windows(kit) -> None:
    model, grid = kit.AnalyticModel(), kit.utm_grid(3, 4, 150, 190)
    _, sink, summary = kit.run(
        grid, model=model, batch_size=7, window_px=1, workers=4, extras=Extras(date=True)
    )
    assert set(np.unique(sink.values[1])) == {18_000.0}
    assert len(sink.threads) == 1 and threading.current_thread().name not in sink.threads
    assert summary.windows > 50
    assert model.calls == math.ceil(summary.crops_predicted / 7) and model.largest_batch == 7


def test_errors_of_reader_writer_and_user_come_through_unchanged_and_stop_all_threads(kit) -> None:
    grid = kit.utm_grid(0, 0, 200, 200)

    class Broken(kit.FieldSource):
        def read(self, grid):
            if self.reads >= 3:
                raise ImageryError("cannot be read", where="a.tif")
            return super().read(grid)

    class FullDisk(kit.Recorder):
        def write(self, *args) -> None:
            raise OSError(28, "No space left on device")

    class Interrupted(kit.AnalyticModel):
        def heights(self, rgb: torch.Tensor) -> torch.Tensor:
            raise KeyboardInterrupt

    with pytest.raises(ImageryError, match=r"a\.tif: cannot be read"):
        kit.run(grid, source=Broken(), window_px=48)
    with pytest.raises(OSError, match="No space"):
        predict_grid(TorchRunner(kit.AnalyticModel()), kit.FieldSource(), grid, FullDisk(grid), window_px=48)
    with pytest.raises(KeyboardInterrupt):
        kit.run(grid, model=Interrupted(), window_px=48)
    assert not [t for t in threading.enumerate() if t.name.startswith("canopy-")]


def test_a_faulty_model_and_a_faulty_source_are_named(kit) -> None:
    class Faulty(kit.AnalyticModel):
        def heights(self, rgb: torch.Tensor) -> torch.Tensor:
            height = super().heights(rgb)
            height[rgb[:, 1:2] > 0.79] = float("nan")
            return height

    class Shrinking(kit.FieldSource):
        def read(self, grid):
            return super().read(grid.window(0, 0, grid.height - 1, grid.width))

    grid = kit.utm_grid(0, 0, 60, 60)
    with pytest.raises(CanopyError, match=r"not a number at \d+ valid pixels.*row \d+, column \d+") as caught:
        kit.run(grid, model=Faulty())
    assert caught.value.exit_code == 1
    with pytest.raises(ImageryError, match="window's shape"):
        kit.run(grid, source=Shrinking())


def test_out_of_memory_halves_the_batch_and_says_so(kit) -> None:
    class Small(kit.AnalyticModel):
        most = 2

        def heights(self, rgb: torch.Tensor) -> torch.Tensor:
            if len(rgb) > self.most:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return super().heights(rgb)

    grid = kit.utm_grid(0, 0, 90, 90)
    heights, _, summary = kit.run(grid, model=Small(), batch_size=16)
    assert summary.batch_size == 2 and len(summary.notes) == 3
    np.testing.assert_allclose(heights, kit.run(grid)[0], atol=1e-4)
    Small.most = 0  # one crop alone does not fit
    with pytest.raises(torch.OutOfMemoryError):
        kit.run(grid, model=Small(), batch_size=4)


def test_automatic_sizes() -> None:
    assert resolve_batch("auto", "cpu", 256) == resolve_batch("auto", "cpu", 512) == 4
    assert resolve_batch("auto", "cpu", 1024) == resolve_batch("auto", "cpu", 4096) == 1
    assert (resolve_batch("auto", "cuda", 256), resolve_batch("auto", "cuda", 1024)) == (64, 4)
    assert resolve_batch(3, "cuda", 1024) == 3
    assert reader_count("auto", "cpu") == 2 and 1 <= reader_count("auto", "cuda") <= 8
    assert reader_count(5, "cpu") == reader_count("5") == 5


def test_a_gpu_box_needs_no_geographic_library() -> None:
    code = (
        "import sys; sys.modules.update(dict.fromkeys("
        "['rasterio', 'odc', 'pyproj', 'shapely', 'geopandas', 'scipy', 'rioxarray', 'xarray']))\n"
        "import canopy.inference.engine, canopy.inference.backends, canopy.models.export"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-800:]
