"""Files, directories, VRTs and mosaics as one source."""

from __future__ import annotations

import gc
import json
import os
import threading
from datetime import date
from pathlib import Path

import numpy as np
import pytest
import rasterio
import rasterio.shutil
from affine import Affine
from rasterio.control import GroundControlPoint

from canopy.errors import AreaError, ImageryError, InputError
from canopy.geo.area import AOI
from canopy.geo.grid import Grid
from canopy.imagery.base import check_coverage
from canopy.imagery.open import open_imagery, open_pinned

UTM = "EPSG:32619"
WEST, NORTH = 315_000, 4_884_000


def at(col: float, row: float, pixel: float = 0.5) -> Affine:
    """Transform of an image whose corner is (col, row) half-metre pixels from the common corner."""
    return Affine(pixel, 0, WEST + 0.5 * col, 0, -pixel, NORTH - 0.5 * row)


@pytest.fixture
def tif(make_tif):
    """`tif(values, name, ...)`: as make_tif, photometric RGB."""
    return lambda values, name="image.tif", **more: make_tif(values, name, photometric="RGB", **more)


def vrt_text(file: str) -> str:
    """A three-band VRT over a file that lies beside it."""
    bands = "".join(
        f'<VRTRasterBand dataType="Byte" band="{band}"><ColorInterp>{name}</ColorInterp><SimpleSource>'
        f'<SourceFilename relativeToVRT="1">{file}</SourceFilename><SourceBand>{band}</SourceBand>'
        "</SimpleSource></VRTRasterBand>"
        for band, name in enumerate(("Red", "Green", "Blue"), 1)
    )
    return (
        f'<VRTDataset rasterXSize="80" rasterYSize="64"><SRS>{UTM}</SRS>'
        f"<GeoTransform>{WEST}, 0.5, 0, {NORTH}, 0, -0.5</GeoTransform>{bands}</VRTDataset>"
    )


# ---- one file --------------------------------------------------------------------------------
def test_one_file_keeps_its_grid_and_pads_past_its_edge(tif, rgb):
    source = open_imagery(tif(rgb))
    grid = source.native_grid
    assert grid.shape == (64, 80) and source.native_gsd_m == pytest.approx(0.5, rel=1e-3)
    image = source.read(grid.pad(7))
    assert image.rgb.shape == (3, 78, 94) and image.valid.sum() == 64 * 80
    assert image.valid[7:-7, 7:-7].all() and (image.rgb[:, ~image.valid] == 0).all()
    np.testing.assert_allclose(image.rgb[:, 7:-7, 7:-7] * 255, rgb, atol=1e-4)


def test_no_crs_is_refused_unless_one_is_given(tif, rgb):
    path = tif(rgb, crs=None)
    with pytest.raises(ImageryError, match=r"image\.tif.*--input-crs"):
        open_imagery(path)
    source = open_imagery(path, crs=UTM)
    assert source.native_crs.epsg == 32619 and source.read(source.native_grid).valid.all()
    assert open_imagery(path, fallback_crs=UTM).native_crs.epsg == 32619
    placed = tif(rgb, "placed.tif", crs="EPSG:32618")
    assert open_imagery(placed, fallback_crs=UTM).native_crs.epsg == 32618


def test_input_crs_replaces_what_the_file_says(tif, rgb):
    """Also a CRS of an engineer's own, which has the name of a real one and places nothing."""
    local = 'LOCAL_CS["WGS 84 / UTM zone 19N",UNIT["metre",1]]'
    with pytest.raises(ImageryError, match=r"local\.tif.*places nothing.*--input-crs EPSG"):
        open_imagery(tif(rgb, "local.tif", crs=local))
    for name, crs in (("local.tif", local), ("wrong.tif", "EPSG:32618")):
        source = open_imagery(tif(rgb, name, crs=crs), crs=UTM)
        assert source.native_crs.epsg == 32619 and source.read(source.native_grid).valid.all()
        assert any("--input-crs EPSG:32619 in place of" in note for note in source.notes)


def test_no_georeference_and_control_points_only_are_refused(tif, rgb, tmp_path):
    with pytest.raises(ImageryError, match="no georeferencing"):
        open_imagery(tif(rgb, "plain.tif", transform=Affine.identity()))
    points = [GroundControlPoint(r, c, WEST + c, NORTH - r) for r, c in ((0, 0), (0, 80), (64, 0), (64, 80))]
    path = tmp_path / "gcp.tif"
    settings = {"driver": "GTiff", "width": 80, "height": 64, "count": 3, "dtype": "uint8"}
    with rasterio.open(path, "w", **settings, gcps=points, crs=UTM) as dataset:
        dataset.write(rgb)
    with pytest.raises(ImageryError, match="control points"):
        open_imagery(path)


def test_south_up_and_rotated_images_come_out_north_up(tif, rgb):
    upright = open_imagery(tif(rgb, "up.tif"))
    flipped = tif(rgb[:, ::-1].copy(), "down.tif", transform=Affine(0.5, 0, WEST, 0, 0.5, NORTH - 32))
    # Clockwise turn of the pixels, undone by the b, d terms: x grows with rows, y with columns.
    clockwise = np.rot90(rgb, k=-1, axes=(1, 2)).copy()
    turned = tif(clockwise, "turned.tif", transform=Affine(0, 0.5, WEST, 0.5, 0, NORTH - 32))
    expected = upright.read(upright.native_grid)
    for path, grid in ((flipped, upright.native_grid), (turned, None)):
        source = open_imagery(path)
        assert source.native_grid == grid
        np.testing.assert_allclose(source.read(expected.grid).rgb, expected.rgb, atol=1e-5)


@pytest.mark.parametrize("lon", [179.9999, 288.7])
def test_longitudes_that_cross_180_or_count_to_360_are_read_in_every_window(tif, rgb, lon):
    """In whatever turn image and grid count, the image's own pixels come out."""
    place = Affine(4e-6, 0, lon, 0, -4e-6, 0.001)
    source = open_imagery(tif(rgb, crs="EPSG:4326", transform=place))
    grid = source.area().grid("EPSG:32701" if lon > 179 and lon < 181 else "EPSG:32719", 0.5)
    whole = source.read(grid)
    assert whole.valid.mean() > 0.9
    for left in (0, grid.width // 2):
        part = source.read(grid.window(0, left, grid.height, grid.width // 2))
        here = np.s_[..., left : left + grid.width // 2]
        np.testing.assert_array_equal(part.valid, whole.valid[here])
        np.testing.assert_array_equal(part.rgb, whole.rgb[here])
    same = Grid.of("EPSG:4326", place @ Affine.translation(40, 8), (16, 20))
    turned = Grid.of("EPSG:4326", Affine.translation(-360, 0) @ same.transform, same.shape)
    for window in (same, turned):
        image = source.read(window)
        assert image.valid.all()
        np.testing.assert_allclose(image.rgb * 255, rgb[:, 8:24, 40:60], atol=1.0)


# ---- several files ---------------------------------------------------------------------------
def test_the_first_file_lies_on_top_and_the_next_fills(tif, rgb):
    top = rgb.copy()
    top[:, :, :10] = 0
    first = tif(top, "a.tif", nodata=0, tags={"ACQUISITION_DATE": "2021-07-04"})
    second = tif(255 - rgb, "b_20190102.tif", transform=at(-20, 0))
    source = open_imagery([first, second])
    assert source.native_grid == Grid.of(UTM, at(-20, 0), (64, 100))
    assert source.dates == ("2019-01-02", "2021-07-04")
    image = source.read(Grid.of(UTM, at(-20, 0), (64, 100)))
    assert image.valid.all()
    np.testing.assert_allclose(image.rgb[:, :, 30:] * 255, rgb[:, :, 10:], atol=1e-4)
    np.testing.assert_allclose(image.rgb[:, :, :30] * 255, 255 - rgb[:, :, :30], atol=1e-4)
    assert set(np.unique(image.date[:, 30:])) == {(date(2021, 7, 4) - date(1970, 1, 1)).days}
    assert set(np.unique(image.date[:, :30])) == {(date(2019, 1, 2) - date(1970, 1, 1)).days}
    assert open_imagery([second, first]).scene_ids == tuple(reversed(source.scene_ids))
    assert not source.read(Grid.of(UTM, at(9999, 0), (8, 8))).valid.any()


def test_a_directory_is_sorted_newest_first(tif, rgb, tmp_path):
    for name, value in (("a_20180101", 50), ("b_20220101", 90), ("c", 10)):
        tif(np.full_like(rgb, value), f"scenes/{name}.tif")
    (tmp_path / "scenes" / "readme.txt").write_text("not an image")
    source = open_imagery(tmp_path / "scenes")
    assert [Path(scene).stem[0] for scene in source.scene_ids] == ["b", "a", "c"]
    image = source.read(Grid.of(UTM, at(0, 0), (8, 8)))
    np.testing.assert_allclose(image.rgb * 255, 90, atol=1e-4)
    earlier = open_imagery(tmp_path / "scenes", datetime="2018")
    assert earlier.dates == ("2018-01-01",)
    with pytest.raises(ImageryError, match=r"no image of 2020.*2018-01-01"):
        open_imagery(tmp_path / "scenes", datetime="2020")


def test_coarse_images_among_fine_ones_are_named(tif, rgb):
    source = open_imagery([tif(rgb, "fine.tif"), tif(rgb, "coarse.tif", transform=at(0, 0, 5.0))])
    assert [note for note in source.notes if "coarse.tif: pixels of 5 m among images of 0.5 m" in note]


def test_files_are_closed_with_their_source(tif, rgb):
    """Explicitly, at the end of a block, with their thread, and when the source is dropped."""

    def held() -> list[str]:
        links = [os.readlink(f"/proc/self/fd/{fd}") for fd in os.listdir("/proc/self/fd")
                 if os.path.lexists(f"/proc/self/fd/{fd}")]  # fmt: skip
        return [link for link in links if link.endswith("_held.tif")]

    paths = [tif(rgb, f"{i}_held.tif", transform=at(80 * i, 0)) for i in range(5)]
    grid = Grid.of(UTM, at(0, 0), (64, 400))
    with open_imagery(paths) as source:
        whole = source.read(grid)
        assert whole.valid.all() and held()
        thread = threading.Thread(target=source.read, args=(grid,))
        thread.start()
        thread.join()
        source.close()
        assert held() == []
        np.testing.assert_array_equal(source.read(grid).rgb, whole.rgb)  # opens them again
        assert held()
    assert held() == []
    source.read(grid)
    del source
    gc.collect()
    assert held() == []


def test_pinned_files_are_opened_when_they_are_read(tif, rgb):
    paths = [tif(rgb, "a_20210704.tif"), tif(rgb, "b.tif", transform=at(80, 0))]
    source = open_imagery(paths)
    pin = json.loads(json.dumps(source.pinned()))
    again = open_pinned(pin)
    for fact in ("name", "native_gsd_m", "dates", "scene_ids", "notes", "native_crs"):
        assert getattr(again, fact) == getattr(source, fact)
    assert again.area().lonlat.symmetric_difference(source.area().lonlat).area < 1e-12
    np.testing.assert_array_equal(again.read(source.native_grid).rgb, source.read(source.native_grid).rgb)
    paths[1].unlink()
    assert open_pinned(pin).read(Grid.of(UTM, at(0, 0), (64, 80))).valid.all()


def test_an_empty_directory_and_a_missing_file_say_so(tmp_path):
    with pytest.raises(ImageryError, match="holds no image"):
        open_imagery(tmp_path)
    with pytest.raises(InputError, match=r"nope\.tif.*no such file"):
        open_imagery(tmp_path / "nope.tif")
    with pytest.raises(InputError, match="no image was given"):
        open_imagery([])


# ---- VRT and names ---------------------------------------------------------------------------
@pytest.mark.parametrize(
    "name", ["<VRTDataset/>", "/vsicurl/http://127.0.0.1:1/a.tif", "NETCDF:some.nc:rgb", "  "]
)
def test_names_that_gdal_would_interpret_are_refused(name):
    with pytest.raises(InputError):
        open_imagery(name)
    with pytest.raises(InputError):
        open_imagery([name, name])


def test_a_vrt_with_a_broken_file_is_an_error_every_time(tmp_path):
    path = tmp_path / "mosaic.vrt"
    (tmp_path / "broken.tif").write_bytes(b"II*\0 broken")
    path.write_text(vrt_text("broken.tif"))
    (tmp_path / "outer.vrt").write_text(vrt_text("mosaic.vrt"))
    for name in 4 * ("mosaic.vrt", "outer.vrt"):  # some GDALs raise once and then read zeros
        with pytest.raises(ImageryError, match=rf"{name}.*broken\.tif"):
            open_imagery(tmp_path / name)  # its borders are looked at


def test_a_vrt_of_remote_files_is_refused(tmp_path):
    path = tmp_path / "mosaic.vrt"
    path.write_text(vrt_text("/vsicurl/http://127.0.0.1:9/a.tif?sig=secret").replace('VRT="1"', 'VRT="0"'))
    with pytest.raises(
        ImageryError, match=r"mosaic\.vrt.*127.*give the URLs themselves|Give the URLs"
    ) as caught:
        open_imagery(path)
    assert "secret" not in str(caught.value)


# ---- areas -----------------------------------------------------------------------------------
def test_an_area_without_imagery_is_refused_and_a_swap_is_noticed(tif, rgb):
    source = open_imagery(tif(rgb))
    lon, lat = source.area().centroid_lonlat
    check_coverage(source, AOI.from_bbox([lat, lon], size_m=50))
    with pytest.raises(AreaError, match="no imagery there"):
        check_coverage(source, AOI.from_bbox([lat + 1, lon], size_m=50))
    with pytest.raises(AreaError, match="Swapping latitude and longitude"):
        check_coverage(source, AOI.from_bbox([lon, lat], size_m=50))
    assert source.covers(AOI.from_bbox([lat, lon], size_m=10))
    assert not source.covers(AOI.from_bbox([lat, lon], size_m=1000))


# ---- real files ------------------------------------------------------------------
def test_real_imagery_reads_as_rasterio_reads_it(shared):
    folder = shared / "data" / "pairs" / "rgb"
    for path in sorted(folder.glob("*.tif"))[::40]:
        source = open_imagery(path)
        with rasterio.open(path) as dataset:
            expected = dataset.read()
        image = source.read(source.native_grid)
        assert (expected[:, ~image.valid] <= 16).all(), (
            "only collars are missing, see tests/geo/test_collar.py"
        )
        np.testing.assert_allclose(image.rgb[:, image.valid] * 255, expected[:, image.valid], atol=1e-4)
