"""CogWriter and Raster: what is written comes back, whole or not at all."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
from collections import namedtuple
from pathlib import Path

import numpy as np
import pytest
import rasterio
from affine import Affine
from rio_cogeo import cog_validate

from canopy.errors import ImageryError, InputError, OutputError
from canopy.geo.cog import BandSpec, CogWriter
from canopy.geo.grid import Grid
from canopy.geo.reading import Raster, read_raster

HEIGHT = [BandSpec("canopy_height")]


def write_cog(path, raster: Raster, bands=None, **options) -> str:
    """A whole raster as a file; its sha256."""
    with CogWriter(path, raster.grid, bands or HEIGHT, **options) as writer:
        writer.write(raster.values, raster.valid)
    assert writer.sha256 is not None
    return writer.sha256


def grid_of(height: int, width: int) -> Grid:
    return Grid.of("EPSG:32610", Affine(0.6, 0, 500_000, 0, -0.6, 4_000_000), (height, width))


@pytest.fixture
def raster(rng) -> Raster:
    grid = grid_of(700, 1100)
    values = rng.uniform(0, 60, (1, *grid.shape)).astype("float32")
    values[0, :100, :100] = 0  # bare ground is a height
    return Raster(values, rng.random(grid.shape) > 0.1, grid)


@pytest.mark.parametrize(
    ("encoding", "step", "predictor"), [("float32", 0, "3"), ("uint16cm", 0.01, "2"), ("uint8m", 1.0, "2")]
)
def test_a_valid_cog_comes_back(tmp_path, raster, encoding, step, predictor):
    path = tmp_path / "map.tif"
    sha = write_cog(path, raster, encoding=encoding, tags={"CANOPY_MODEL": "m", "B": 2})
    assert sha == hashlib.sha256(path.read_bytes()).hexdigest()
    valid, errors, warnings = cog_validate(path, strict=True)
    assert valid and not errors and not warnings
    with rasterio.open(path) as ds:
        assert ds.block_shapes == [(512, 512)] and ds.overviews(1)
        assert ds.compression.value == "DEFLATE"
        assert ds.tags(ns="IMAGE_STRUCTURE")["PREDICTOR"] == predictor
        assert ds.descriptions == ("canopy_height",) and ds.units == ("m",)
        assert ds.tags()["AREA_OR_POINT"] == "Area" and ds.tags()["CANOPY_MODEL"] == "m"
        assert ds.tags(1)["units"] == "m"
        assert ds.crs.to_epsg() == 32610 and ds.transform == raster.grid.transform
        assert ds.nodata is not None
    back = read_raster(path)
    assert np.array_equal(back.valid, raster.valid) and back.grid == raster.grid
    error = np.abs(back.values - raster.values)[0][raster.valid]
    assert error.max() <= step / 2 + 1e-5
    assert os.listdir(tmp_path) == ["map.tif"]


def test_the_bytes_do_not_depend_on_how_it_was_written(tmp_path, raster, rng):
    expected = write_cog(tmp_path / "a.tif", raster, tags={"A": "1", "B": "2"})
    h, w = raster.grid.shape
    windows = [(r, c) for r in range(0, h, 170) for c in range(0, w, 333)]
    rng.shuffle(windows)
    with CogWriter(tmp_path / "b.tif", raster.grid, HEIGHT, tags={"B": "2", "A": "1"}) as writer:
        for r, c in windows:
            here = np.s_[r : min(r + 170, h), c : min(c + 333, w)]
            writer.write(raster.values[:, *here], raster.valid[here], int(r), int(c))
    assert writer.sha256 == expected


def test_what_is_never_written_is_nodata(tmp_path):
    path = tmp_path / "part.tif"
    for encoding in ("float32", "uint16cm", "uint8m"):
        with CogWriter(path, grid_of(1200, 1200), HEIGHT, encoding=encoding, overwrite=True) as writer:
            writer.write(np.full((1, 10, 20), 7.0), np.ones((10, 20), bool), 600, 700)
        back = read_raster(path)
        assert back.valid.sum() == 200 and back.valid[600:610, 700:720].all()
        assert (back.values[0][back.valid] == 7).all()


def test_several_bands_and_their_scales(tmp_path):
    bands = [*HEIGHT, BandSpec("height_upper"), BandSpec("date", unit="days since 1970-01-01")]
    values = np.array([12.34, 23.45, 19_876.0], dtype="float32")[:, None, None] * np.ones(
        (3, 30, 30), "float32"
    )
    raster = Raster(values, np.ones((30, 30), bool), grid_of(30, 30))
    write_cog(tmp_path / "m.tif", raster, bands, encoding="uint16cm")
    back = read_raster(tmp_path / "m.tif")
    assert np.allclose(back.values, values, atol=1e-4)
    with rasterio.open(tmp_path / "m.tif") as ds:
        assert ds.scales == (0.01, 0.01, 1.0)
    assert read_raster(tmp_path / "m.tif", bands=[3]).values.shape == (1, 30, 30)
    with pytest.raises(InputError, match="uint8m"):
        write_cog(tmp_path / "n.tif", raster, bands, encoding="uint8m")


def test_a_valid_height_is_never_nodata(tmp_path):
    values = np.array([0.0, 0.004, 0.125, 0.375, 655.34, 655.35, 9000.0, -3.0], dtype="float32").reshape(
        1, 1, 8
    )
    raster = Raster(values, np.ones((1, 8), bool), grid_of(1, 8))
    write_cog(tmp_path / "cm.tif", raster, encoding="uint16cm")
    back = read_raster(tmp_path / "cm.tif")
    assert back.valid.all()
    assert np.allclose(back.values.ravel(), [0, 0, 0.12, 0.38, 655.34, 655.34, 655.34, 0], atol=1e-4)
    values = np.array([0.5, 1.5, 253.6, 254.6, 400, 0, 1, 2], dtype="float32").reshape(1, 1, 8)
    write_cog(tmp_path / "m.tif", Raster(values, raster.valid, raster.grid), encoding="uint8m")
    back = read_raster(tmp_path / "m.tif")
    assert back.valid.all() and back.values.ravel().tolist() == [0, 2, 254, 254, 254, 0, 1, 2]


@pytest.mark.parametrize("encoding", ["float32", "uint16cm", "uint8m"])
def test_overviews_do_not_mix_nodata_in(tmp_path, encoding):
    grid = grid_of(1500, 1500)
    values = np.full((1, *grid.shape), 20.0, dtype="float32")
    valid = np.indices(grid.shape).sum(axis=0) % 3 > 0
    write_cog(tmp_path / "o.tif", Raster(values, valid, grid), encoding=encoding)
    with rasterio.open(tmp_path / "o.tif", overview_level=0) as ds:
        data = ds.read(1, masked=True)
        assert data.count() == data.size
        step = 0.01 if encoding == "uint16cm" else 1.0
        assert np.allclose(data * step, 20.0, atol=1e-3)


# ---- nothing half done --------------------------------------------------------------------------
def test_an_exception_leaves_nothing(tmp_path, raster):
    path = tmp_path / "map.tif"
    with pytest.raises(RuntimeError), CogWriter(path, raster.grid, HEIGHT) as writer:
        writer.write(raster.values, raster.valid)
        assert [p.name.startswith(".map.tif.") for p in tmp_path.iterdir()] == [True]
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []
    assert writer.sha256 is None


def test_an_existing_file_is_kept_until_the_new_one_is_whole(tmp_path, raster):
    path = tmp_path / "map.tif"
    path.write_text("precious")
    with pytest.raises(InputError, match="--overwrite"):
        CogWriter(path, raster.grid, HEIGHT)
    with pytest.raises(KeyboardInterrupt), CogWriter(path, raster.grid, HEIGHT, overwrite=True) as writer:
        raise KeyboardInterrupt
    assert path.read_text() == "precious" and len(list(tmp_path.iterdir())) == 1
    with CogWriter(path, raster.grid, HEIGHT, overwrite=True) as writer:
        writer.write(raster.values, raster.valid)
    assert read_raster(path).valid.any()


def test_leftovers_of_a_killed_run_are_in_nobodys_way(tmp_path, raster):
    leftover = tmp_path / ".map.tif.abc.partial"
    leftover.mkdir()
    (leftover / "pixels.tif").write_text("half")
    write_cog(tmp_path / "map.tif", raster)
    assert read_raster(tmp_path / "map.tif").valid.any()


@pytest.mark.parametrize("encoding", ["float32", "uint16cm"])
def test_the_read_back_sees_one_flipped_bit(tmp_path, raster, monkeypatch, encoding):
    """Damage between the writing and the finished file: the scratch pixels change under the writer."""
    make = CogWriter._make_cog

    def damaged(self, result):
        scratch = self._scratch
        data = bytearray(scratch.read_bytes())
        with rasterio.open(scratch) as ds:
            offset = int(ds.get_tag_item("BLOCK_OFFSET_1_0", "TIFF", bidx=1))
        data[offset + 12345] ^= 0x04
        scratch.write_bytes(data)
        make(self, result)

    monkeypatch.setattr(CogWriter, "_make_cog", damaged)
    with pytest.raises(OutputError, match="differently"):
        write_cog(tmp_path / "map.tif", raster, encoding=encoding)
    assert list(tmp_path.iterdir()) == []


def test_a_truncated_result_is_not_kept(tmp_path, raster, monkeypatch):
    make = CogWriter._make_cog

    def cut(self, result):
        make(self, result)
        os.truncate(result, result.stat().st_size // 2)

    monkeypatch.setattr(CogWriter, "_make_cog", cut)
    with pytest.raises(OutputError, match=r"map\.tif"):
        write_cog(tmp_path / "map.tif", raster)
    assert list(tmp_path.iterdir()) == []


def test_no_room_on_the_disk_is_said_before_any_work(tmp_path, raster, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(10**9, 10**9, 1000))
    with pytest.raises(OutputError, match="GB free"):
        CogWriter(tmp_path / "map.tif", raster.grid, HEIGHT)
    assert list(tmp_path.iterdir()) == []


def test_bad_paths_and_options(tmp_path, raster):
    grid = raster.grid
    with pytest.raises(InputError, match="no such directory"):
        CogWriter(tmp_path / "no" / "map.tif", grid, HEIGHT)
    with pytest.raises(InputError, match="is a directory"):
        CogWriter(tmp_path, grid, HEIGHT)
    with pytest.raises(InputError, match="float32, uint16cm, uint8m"):
        CogWriter(tmp_path / "m.tif", grid, HEIGHT, encoding="int12")
    with pytest.raises(InputError, match="no bands"):
        CogWriter(tmp_path / "m.tif", grid, [])
    assert list(tmp_path.iterdir()) == []


def test_windows_are_checked(tmp_path):
    ones, yes = np.ones((1, 5, 5), "float32"), np.ones((5, 5), bool)
    with CogWriter(tmp_path / "m.tif", grid_of(20, 20), HEIGHT) as writer:
        for row, col in ((-1, 0), (0, 16), (18, 0)):
            with pytest.raises(OutputError, match="cannot be written"):
                writer.write(ones, yes, row, col)
        with pytest.raises(OutputError, match="not finite"):
            writer.write(ones * np.nan, yes)
        writer.write(ones, yes, 3, 3)
    with pytest.raises(OutputError, match="closed"):
        writer.write(ones, yes)
    with (
        pytest.raises(OutputError, match="differently"),
        CogWriter(tmp_path / "twice.tif", grid_of(20, 20), HEIGHT) as writer,
    ):
        writer.write(ones, yes, 3, 3)
        writer.write(ones, yes, 7, 7)


@pytest.mark.parametrize(
    ("crs", "flat"), [("EPSG:4979", 4326), ("EPSG:6340+5703", 6340), ("EPSG:32610+5773", 32610)]
)
def test_only_the_horizontal_part_of_a_crs_is_written(tmp_path, crs, flat):
    grid = Grid.of(crs, Affine(1e-5, 0, 10, 0, -1e-5, 50), (8, 8))
    with CogWriter(tmp_path / "m.tif", grid, HEIGHT) as writer:
        writer.write(np.ones((1, 8, 8)), np.ones((8, 8), bool))
    with rasterio.open(tmp_path / "m.tif") as ds:
        assert ds.crs.to_epsg() == flat


def test_the_map_takes_its_place_before_its_companions(tmp_path, raster, monkeypatch):
    """A crash in between leaves a new map beside an old item, never the other way round."""
    order, replace = [], os.replace
    monkeypatch.setattr(os, "replace", lambda a, b: (order.append(Path(b).name), replace(a, b)))
    with CogWriter(tmp_path / "m.tif", raster.grid, HEIGHT) as writer:
        writer.write(raster.values, raster.valid)

        def item(made: Path, sha256: str) -> list[str]:
            assert hashlib.sha256(made.read_bytes()).hexdigest() == sha256
            made.with_suffix(".json").write_text(sha256)
            return ["m.json"]

        writer.companions = item
    assert order == ["m.tif", "m.json"]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["m.json", "m.tif"]


# ---- Raster -------------------------------------------------------------------------------------
def test_rasters_check_their_shapes():
    grid = grid_of(4, 5)
    with pytest.raises(InputError):
        Raster(np.zeros((1, 4, 4), "float32"), np.ones((4, 5), bool), grid)
    with pytest.raises(InputError, match="bool"):
        Raster(np.zeros((1, 4, 5), "float32"), np.ones((4, 5)), grid)


def test_read_raster_of_a_window_and_of_anybodys_map(tmp_path, raster, make_tif):
    write_cog(tmp_path / "a.tif", raster)
    window = raster.grid.window(-5, 1090, 50, 30)
    part = read_raster(tmp_path / "a.tif", window)
    assert part.grid == window and part.valid[:5].sum() == 0
    assert np.array_equal(part.valid[5:, :10], raster.valid[:45, 1090:])
    theirs = make_tif(
        np.array([[[1.5, -9999.0]]], dtype="float32"), raster.grid.transform, name="t.tif", nodata=-9999
    )
    got = read_raster(theirs)
    assert got.values[0, 0, 0] == 1.5 and got.valid.tolist() == [[True, False]]
    with pytest.raises(ImageryError, match="no such file"):
        read_raster(tmp_path / "none.tif")


def test_real_neon_maps_are_read(shared):
    folder = shared / "data" / "pairs" / "chm"
    path = sorted(folder.glob("*.tif"))[0]
    raster = read_raster(path)
    with rasterio.open(path) as ds:
        data, scale = ds.read(1, masked=True), ds.scales[0]
    assert np.array_equal(raster.valid, ~np.ma.getmaskarray(data) & np.isfinite(data.data))
    assert np.allclose(raster.values[0][raster.valid], data.data[raster.valid] * scale, atol=1e-5)
    assert isinstance(path, Path)


FULL_DISK = """
import resource, signal, sys
import numpy as np
from canopy.errors import OutputError
from canopy.geo.cog import CogWriter
from canopy.geo.cog import BandSpec
from canopy.geo.grid import Grid

signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[2]), int(sys.argv[2])))
grid = Grid.from_bounds((500_000, 4_000_000, 501_100, 4_000_900), 32610, 1.0)
values = np.random.default_rng(0).uniform(0, 60, (1, *grid.shape)).astype("float32")
try:
    with CogWriter(sys.argv[1], grid, [BandSpec("canopy_height")]) as writer:
        for row in range(0, 900, 100):
            for col in range(0, 1100, 100):
                here = np.s_[row : row + 100, col : col + 100]
                writer.write(values[:, *here], np.ones((100, 100), bool), row, col)
except OutputError as error:
    print("refused", error)
"""


@pytest.mark.parametrize("limit", [300_000, 1_000_000, 3_000_000, 4_500_000])
def test_a_disk_that_fills_up_for_real(tmp_path, limit):
    """The system refuses bytes beyond a limit: in the scratch file, or later in the result."""
    pytest.importorskip("resource")
    command = [sys.executable, "-c", FULL_DISK, str(tmp_path / "map.tif"), str(limit)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.stdout.startswith("refused"), done.stderr
    assert "map.tif" in done.stdout
    assert list(tmp_path.iterdir()) == []
