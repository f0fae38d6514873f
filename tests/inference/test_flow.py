"""What lies between reading and writing: transport, batches across windows, memory, runners of one shape."""

from __future__ import annotations

import math
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from canopy.errors import ConfigError
from canopy.inference import engine as allocator
from canopy.inference.backends import StaticRunner, TorchRunner
from canopy.inference.engine import Flow, Transfer, predict_grid, read_ahead, reader_count
from canopy.inference.lattice import Canvas, Lattice, plan_windows, taper
from canopy.inference.layers import Extras
from canopy.inference.predictor import Predictor, StopWatch, resolve_batch
from canopy.models.config import DecoderConfig, EncoderConfig, ModelConfig
from canopy.models.height import HeightModel, Stretch
from canopy.runtime import NoProgress

CPU = torch.device("cpu")


# ---- transport ----------------------------------------------------------------------------------
def test_bytes_come_back_as_the_very_floats() -> None:
    rgb = (np.arange(256, dtype=np.float32) / np.float32(255))[None, None].repeat(3, 0)
    transfer = Transfer(CPU, as_bytes=True)
    packed = transfer.pack(rgb)
    assert packed.host.dtype == torch.uint8
    np.testing.assert_array_equal(transfer.up(packed).numpy(), rgb)


@pytest.mark.parametrize("odd", [0.5, 1 / 255 + 1e-7, np.nan, 1.5, -1 / 255])
def test_what_is_no_byte_stays_a_float(odd: float) -> None:
    rgb = np.zeros((3, 4, 4), np.float32)
    rgb[1, 2, 3] = odd
    transfer = Transfer(CPU, as_bytes=True)
    packed = transfer.pack(rgb)
    assert packed.host.dtype == torch.float32
    np.testing.assert_array_equal(transfer.up(packed).numpy(), rgb)


def test_a_cpu_copies_nothing() -> None:
    rgb = np.zeros((3, 4, 4), np.float32)
    transfer = Transfer(CPU)
    assert transfer.up(transfer.pack(rgb)).data_ptr() == rgb.ctypes.data
    made = torch.ones(2, 3)
    assert transfer.down(made).numpy().ctypes.data == made.data_ptr()


# ---- blending -----------------------------------------------------------------------------------
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


# ---- batches across windows ---------------------------------------------------------------------
def test_batches_are_full_across_windows(kit) -> None:
    model, grid = kit.AnalyticModel(), kit.utm_grid(3, 4, 150, 190)
    sink = kit.Recorder(grid)
    summary = predict_grid(model, kit.FieldSource(), grid, sink, device="cpu", batch_size=7, window_px=1)
    assert summary.windows > 50
    assert model.calls == math.ceil(summary.crops_predicted / 7)
    assert model.largest_batch == 7


@pytest.mark.parametrize("as_bytes", [False, True])
@pytest.mark.parametrize("batch", [1, 5])
def test_the_flow_gives_the_same_however_pixels_travel(kit, as_bytes: bool, batch: int) -> None:
    def holes(rows: np.ndarray, cols: np.ndarray) -> np.ndarray:
        return (rows % 50 < 9) & (cols % 40 < 12)

    class Bytes(kit.FieldSource):
        """A source of bytes, as most are."""

        def read(self, grid):
            imagery = super().read(grid)
            coded = np.rint(np.nan_to_num(imagery.rgb) * 255).astype(np.float32) / np.float32(255)
            return type(imagery)(coded, imagery.valid, imagery.date, grid)

    grid, lattice = kit.utm_grid(0, 0, 130, 120), Lattice(32, 24, 2)
    plan, transfer = plan_windows(grid, lattice, 50), Transfer(CPU, as_bytes=as_bytes)
    predictor = Predictor(kit.AnalyticModel(), device="cpu", batch_size=batch)
    found = np.zeros(grid.shape, np.float32)
    with ThreadPoolExecutor(2) as pool:
        flow = Flow(predictor, Canvas(plan), transfer, lattice, Extras(), pool, NoProgress())

        def keep(windows) -> None:
            for done in windows:
                place = slice(*done.window.rows.final), slice(*done.window.cols.final)
                found[place] = done.layers.numpy()[0]

        for window, pixels in read_ahead(plan, Bytes(holes), None, transfer, pool, 2):
            assert pixels is not None and (pixels.packed.host.dtype == torch.uint8) == as_bytes
            keep(flow.feed(window, pixels))
        keep(flow.end())
    sink = kit.Recorder(grid)
    predict_grid(kit.AnalyticModel(), Bytes(holes), grid, sink, device="cpu", lattice=lattice)
    np.testing.assert_allclose(found[sink.valid], sink.values[0][sink.valid], rtol=0, atol=1e-5)


def test_automatic_sizes() -> None:
    assert resolve_batch("auto", "cpu", 256) == resolve_batch("auto", "cpu", 512) == 4
    assert resolve_batch("auto", "cpu", 1024) == resolve_batch("auto", "cpu", 4096) == 1
    assert resolve_batch("auto", "cuda", 256) == 64
    assert resolve_batch("auto", "cuda", 1024) == 4
    assert resolve_batch(3, "cuda", 1024) == 3
    assert reader_count("auto", "cpu") == 2
    assert reader_count(5, "cpu") == reader_count("5") == 5
    assert 1 <= reader_count("auto", "cuda") <= 8


def test_the_stopwatch_adds_up() -> None:
    watch = StopWatch(CPU)
    assert watch.seconds == 0
    with watch:
        sum(range(10_000))
    first = watch.seconds
    with watch:
        sum(range(10_000))
    assert 0 < first < watch.seconds


# ---- memory -------------------------------------------------------------------------------------
MEMORY = """
import resource, torch
from canopy.inference.engine import kept_memory

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(20):
        torch.ones(24_000_000)  # 96 MB
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

def resident_mb():
    status = open("/proc/self/status").read().split()
    return int(status[status.index("VmRSS:") + 1]) // 1024

usual = faults()
with kept_memory():
    faults()
    with kept_memory():  # two runs in one process
        pass
    kept, held = faults(), resident_mb()
print(usual, kept, held, resident_mb())
"""


def test_freed_memory_is_kept_while_a_network_runs_and_not_afterwards() -> None:
    if allocator._glibc() is None:
        pytest.skip("only glibc gives memory back eagerly")
    # A process of its own: what other tests have left in the heap would count.
    done = subprocess.run([sys.executable, "-c", MEMORY], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-800:]
    usual, kept, held_mb, afterwards_mb = map(int, done.stdout.split())
    if usual < 1000:
        pytest.skip("this system clears memory in huge pages")
    assert kept < usual / 10
    assert afterwards_mb < held_mb - 80  # what was kept is given back


# ---- one shape ----------------------------------------------------------------------------------
def tiny(family: str) -> HeightModel:
    torch.manual_seed(0)
    decoder = DecoderConfig(post_channels=(8, 8, 8, 8), fusion=8, hidden=8, bins=8)
    if family == "cnn":
        encoder = EncoderConfig(family="cnn", network="resnet10t", patch=32)
    else:
        encoder = EncoderConfig(dim=32, depth=4, heads=2, taps=(0, 1, 2, 3), layer_scale=None)
    return HeightModel(ModelConfig(crop_px=64, encoder=encoder, decoder=decoder)).eval()


@pytest.mark.parametrize("family", ["vit", "cnn"])
def test_a_runner_of_one_shape_equals_the_model(family: str) -> None:
    model, rgb = tiny(family), torch.rand(3, 3, 64, 64)
    outputs = ("height_m", "spread_m")
    expected = TorchRunner(model, CPU, outputs=outputs).forward(rgb)
    # Without a GPU there is no graph to record, and the same arithmetic runs eagerly.
    runner = StaticRunner(model, CPU, outputs=outputs, mode="graph")
    assert runner.mode == "eager"
    torch.testing.assert_close(runner.forward(rgb), expected, rtol=0, atol=1e-5)
    stretch = Stretch((0.1, 0.5) * 3, (0.2, 0.8) * 3)
    moved = TorchRunner(model, CPU, outputs=outputs).with_radiometry(stretch).forward(rgb)
    torch.testing.assert_close(runner.with_radiometry(stretch).forward(rgb), moved, rtol=0, atol=1e-4)
    assert (moved - expected).abs().max() > 1e-3


def test_unknown_modes_are_refused() -> None:
    with pytest.raises(ConfigError, match="eager, graph, compile"):
        StaticRunner(tiny("vit"), CPU, mode="fast")


def test_a_gpu_box_needs_no_geographic_library() -> None:
    code = (
        "import sys; sys.modules.update(dict.fromkeys("
        "['rasterio', 'odc', 'pyproj', 'shapely', 'geopandas', 'scipy', 'rioxarray', 'xarray']))\n"
        "import canopy.inference.engine, canopy.inference.backends, canopy.inference.engine"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-800:]
