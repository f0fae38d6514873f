"""CogWriter: what is written comes back, whole or not at all."""

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

from canopy.errors import InputError, OutputError
from canopy.geo.cog import BandSpec, CogWriter
from canopy.geo.grid import Grid
from canopy.geo.reading import Raster, read_raster

HEIGHT = [BandSpec("canopy_height")]


def write_cog(path, raster: Raster, bands=None, **options) -> str | None:
    """A whole raster as a file; its sha256."""
    with CogWriter(path, raster.grid, bands or HEIGHT, **options) as writer:
        writer.write(raster.values, raster.valid)
    return writer.sha256


def raster_of(values, valid=None) -> Raster:
    values = np.asarray(values, "float32")
    values = values.reshape((-1, *values.shape[-2:]))
    grid = Grid.of("EPSG:32610", Affine(0.6, 0, 500_000, 0, -0.6, 4_000_000), values.shape[1:])
    return Raster(values, np.ones(grid.shape, bool) if valid is None else valid, grid)


@pytest.fixture
def raster(rng) -> Raster:
    values = rng.uniform(0, 60, (1, 700, 1100))
    values[0, :100, :100] = 0  # bare ground is a height
    return raster_of(values, rng.random((700, 1100)) > 0.1)


@pytest.mark.parametrize(
    ("encoding", "step", "predictor"), [("float32", 0, "3"), ("uint16cm", 0.01, "2"), ("uint8m", 1.0, "2")]
)
def test_a_valid_cog_comes_back(tmp_path, raster, encoding, step, predictor):
    path = tmp_path / "map.tif"
    sha = write_cog(path, raster, encoding=encoding, tags={"CANOPY_MODEL": "m", "B": 2})
    assert sha == hashlib.sha256(path.read_bytes()).hexdigest() and os.listdir(tmp_path) == ["map.tif"]
    valid, errors, warnings = cog_validate(path, strict=True)
    assert valid and not errors and not warnings
    with rasterio.open(path) as ds:
        assert ds.block_shapes == [(512, 512)] and ds.overviews(1) and ds.compression.value == "DEFLATE"
        assert ds.tags(ns="IMAGE_STRUCTURE")["PREDICTOR"] == predictor
        assert ds.descriptions == ("canopy_height",) and ds.units == ("m",) and ds.tags(1)["units"] == "m"
        assert ds.tags()["AREA_OR_POINT"] == "Area" and ds.tags()["CANOPY_MODEL"] == "m"
        assert ds.crs.to_epsg() == 32610 and ds.transform == raster.grid.transform
        assert ds.nodata is not None
    back = read_raster(path)
    assert np.array_equal(back.valid, raster.valid) and back.grid == raster.grid
    assert np.abs(back.values - raster.values)[0][raster.valid].max() <= step / 2 + 1e-5


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


@pytest.mark.parametrize("encoding", ["float32", "uint16cm", "uint8m"])
def test_nodata_is_what_is_not_written_and_is_not_mixed_into_overviews(tmp_path, encoding):
    path = tmp_path / "part.tif"
    grid = raster_of(np.zeros((1, 1200, 1200))).grid
    with CogWriter(path, grid, HEIGHT, encoding=encoding) as writer:
        writer.write(np.full((1, 10, 20), 7.0), np.ones((10, 20), bool), 600, 700)
    back = read_raster(path)
    assert back.valid.sum() == 200 and (back.values[0][back.valid] == 7).all()
    striped = raster_of(np.full((1, 1500, 1500), 20.0), np.indices((1500, 1500)).sum(axis=0) % 3 > 0)
    write_cog(path, striped, encoding=encoding, overwrite=True)
    with rasterio.open(path, overview_level=0) as ds:
        data = ds.read(1, masked=True)
    assert data.count() == data.size
    assert np.allclose(data * (0.01 if encoding == "uint16cm" else 1.0), 20.0, atol=1e-3)


def test_several_bands_and_their_scales(tmp_path):
    bands = [*HEIGHT, BandSpec("quality", "1"), BandSpec("date", "days since 1970-01-01")]
    raster = raster_of(np.array([12.34, 3, 19_876.0])[:, None, None] * np.ones((3, 30, 30)))
    write_cog(tmp_path / "m.tif", raster, bands, encoding="uint16cm")
    assert np.allclose(read_raster(tmp_path / "m.tif").values, raster.values, atol=1e-4)
    with rasterio.open(tmp_path / "m.tif") as ds:
        assert ds.scales == (0.01, 1.0, 1.0)
    assert read_raster(tmp_path / "m.tif", bands=[3]).values.shape == (1, 30, 30)
    with pytest.raises(InputError, match=r"date.*uint8m"):
        write_cog(tmp_path / "n.tif", raster, bands, encoding="uint8m")


@pytest.mark.parametrize(
    ("encoding", "heights", "stored"),
    [
        ("uint16cm", [0, 0.004, 0.125, 655.34, 655.35, 9000, -3], [0, 0, 0.12, 655.34, 655.34, 655.34, 0]),
        ("uint8m", [0.5, 1.5, 253.6, 254.6, 400, -1], [0, 2, 254, 254, 254, 0]),
    ],
)
def test_a_valid_height_is_never_nodata(tmp_path, encoding, heights, stored):
    write_cog(tmp_path / "cm.tif", raster_of([[heights]]), encoding=encoding)
    back = read_raster(tmp_path / "cm.tif")
    assert back.valid.all() and np.allclose(back.values.ravel(), stored, atol=1e-4)


@pytest.mark.parametrize(
    ("crs", "flat"), [("EPSG:4979", 4326), ("EPSG:6340+5703", 6340), ("EPSG:32610+5773", 32610)]
)
def test_only_the_horizontal_part_of_a_crs_is_written(tmp_path, crs, flat):
    grid = Grid.of(crs, Affine(1e-5, 0, 10, 0, -1e-5, 50), (8, 8))
    write_cog(tmp_path / "m.tif", Raster(np.ones((1, 8, 8), "float32"), np.ones((8, 8), bool), grid))
    with rasterio.open(tmp_path / "m.tif") as ds:
        assert ds.crs.to_epsg() == flat


# ---- nothing half done --------------------------------------------------------------------------
def test_a_file_is_kept_until_the_new_one_is_whole(tmp_path, raster):
    path, leftover = tmp_path / "map.tif", tmp_path / ".map.tif.abc.partial"  # of a run that was killed
    leftover.mkdir()
    path.write_text("precious")
    with pytest.raises(InputError, match="--overwrite"):
        CogWriter(path, raster.grid, HEIGHT)
    with pytest.raises(KeyboardInterrupt), CogWriter(path, raster.grid, HEIGHT, overwrite=True) as writer:
        writer.write(raster.values, raster.valid)
        raise KeyboardInterrupt
    assert path.read_text() == "precious" and writer.sha256 is None
    assert sorted(tmp_path.iterdir()) == [leftover, path]
    write_cog(path, raster, overwrite=True)
    assert read_raster(path).valid.any()


def test_what_reads_back_otherwise_is_not_kept(tmp_path, raster, monkeypatch):
    """Damage between the writing and the finished file: one bit of the scratch pixels, half of the result."""
    make = CogWriter._make_cog

    def flipped(self, result):
        data = bytearray(self._scratch.read_bytes())
        with rasterio.open(self._scratch) as ds:
            offset = int(ds.get_tag_item("BLOCK_OFFSET_1_0", "TIFF", bidx=1))
        data[offset + 12345] ^= 0x04
        self._scratch.write_bytes(data)
        make(self, result)

    def cut(self, result):
        make(self, result)
        os.truncate(result, result.stat().st_size // 2)

    for damage, message in ((flipped, "differently"), (cut, r"map\.tif")):
        monkeypatch.setattr(CogWriter, "_make_cog", damage)
        with pytest.raises(OutputError, match=message):
            write_cog(tmp_path / "map.tif", raster)
        assert list(tmp_path.iterdir()) == []


def test_what_cannot_be_written_is_said_before_any_work(tmp_path, raster, monkeypatch):
    for bands, encoding, message in (
        (HEIGHT, "int12", "float32, uint16cm, uint8m"),
        ([], "float32", "no ba"),
    ):
        with pytest.raises(InputError, match=message):
            CogWriter(tmp_path / "m.tif", raster.grid, bands, encoding=encoding)
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(10**9, 10**9, 1000))
    with pytest.raises(OutputError, match="GB free"):
        CogWriter(tmp_path / "map.tif", raster.grid, HEIGHT)
    assert list(tmp_path.iterdir()) == []


def test_windows_are_checked(tmp_path):
    ones, yes, grid = np.ones((1, 5, 5), "float32"), np.ones((5, 5), bool), raster_of(np.zeros((20, 20))).grid
    with (
        pytest.raises(OutputError, match="differently"),
        CogWriter(tmp_path / "m.tif", grid, HEIGHT) as writer,
    ):
        with pytest.raises(OutputError, match="cannot be written"):
            writer.write(ones, yes, 18, 0)
        with pytest.raises(OutputError, match="not finite"):
            writer.write(ones * np.nan, yes)
        writer.write(ones, yes, 3, 3)
        writer.write(ones, yes, 7, 7)
    with pytest.raises(OutputError, match="closed"):
        writer.write(ones, yes)


def test_the_map_takes_its_place_before_its_companions(tmp_path, raster, monkeypatch):
    """A crash in between leaves a new map beside an old item, never the other way round."""
    order, replace = [], os.replace
    monkeypatch.setattr(os, "replace", lambda a, b: (order.append(Path(b).name), replace(a, b)))

    def item(made: Path, sha256: str) -> list[str]:
        assert hashlib.sha256(made.read_bytes()).hexdigest() == sha256
        made.with_suffix(".json").write_text(sha256)
        return ["m.json"]

    with CogWriter(tmp_path / "m.tif", raster.grid, HEIGHT) as writer:
        writer.write(raster.values, raster.valid)
        writer.companions = item
    assert order == ["m.tif", "m.json"] == sorted(order, reverse=True)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["m.json", "m.tif"]


FULL_DISK = """
import resource, signal, sys
import numpy as np
from canopy.errors import OutputError
from canopy.geo.cog import BandSpec, CogWriter
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


@pytest.mark.parametrize("limit", [300_000, 1_000_000, 4_500_000])
def test_a_disk_that_fills_up_for_real(tmp_path, limit):
    """The system refuses bytes beyond a limit: in the scratch file, its overviews, or later in the result."""
    pytest.importorskip("resource")
    command = [sys.executable, "-c", FULL_DISK, str(tmp_path / "map.tif"), str(limit)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.stdout.startswith("refused"), done.stderr
    assert "map.tif" in done.stdout and list(tmp_path.iterdir()) == []


def test_real_neon_maps_are_read(shared):
    path = sorted((shared / "data" / "pairs" / "chm").glob("*.tif"))[0]
    raster = read_raster(path)
    with rasterio.open(path) as ds:
        data, scale = ds.read(1, masked=True), ds.scales[0]
    assert np.array_equal(raster.valid, ~np.ma.getmaskarray(data) & np.isfinite(data.data))
    assert np.allclose(raster.values[0][raster.valid], data.data[raster.valid] * scale, atol=1e-5)
