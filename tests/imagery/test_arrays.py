"""xarray in and out: a source as a lazy array, an array as a source."""

from __future__ import annotations

import gc

import dask
import dask.array
import numpy as np
import pytest
import rioxarray
import xarray

from canopy.errors import ImageryError, InputError
from canopy.geo.area import AOI
from canopy.geo.grid import Grid
from canopy.imagery.open import open_imagery

UTM = "EPSG:32619"


def test_a_source_as_a_lazy_array_reads_chunk_by_chunk(make_tif, rgb):
    values = rgb.copy()
    values[:, :9] = 0
    source = open_imagery(make_tif(values, photometric="RGB", nodata=0))
    array = source.to_xarray(chunk_px=32)
    assert array.dims == ("band", "y", "x") and list(array.band.values) == ["red", "green", "blue"]
    assert dask.is_dask_collection(array) and array.chunks == ((3,), (32, 32), (32, 32, 16))
    assert array.rio.crs.to_epsg() == 32619 and array.rio.transform() == source.native_grid.transform
    read: list[Grid] = []
    real = source.read
    source.read = lambda grid: read.append(grid) or real(grid)
    part = array[:, 40:50, 70:80].compute()
    assert [grid.shape for grid in read] == [(32, 16)]
    np.testing.assert_allclose(part * 255, values[:, 40:50, 70:80], atol=1e-4)
    whole = array.compute()
    assert np.isnan(whole.values[:, :9]).all() and not whole.valid.values[:9].any()
    np.testing.assert_allclose(whole.values[:, 9:] * 255, values[:, 9:], atol=1e-4)
    assert whole.valid.values[9:].all()


def test_an_array_may_have_another_crs_size_and_area(make_tif, rgb):
    source = open_imagery(make_tif(rgb, photometric="RGB"))
    lon, lat = source.area().centroid_lonlat
    part = source.to_xarray(area=AOI.from_bbox([lat, lon], size_m=8), crs="EPSG:3857", gsd_m=1.5)
    assert part.rio.crs.to_epsg() == 3857 and part.notnull().all() and 5 <= part.sizes["x"] <= 7
    with pytest.raises(InputError, match="area is not known"):
        open_imagery("https://h.example/{z}/{x}/{y}.png").to_xarray()


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("chunks", [None, 32])
def test_an_opened_raster_is_a_source_like_its_file(make_tif, rgb, masked, chunks):
    values = rgb.copy()
    values[:, :9] = 0
    values[0, 20] = 0  # red alone is no nodata
    path = make_tif(values, "a_20210704.tif", photometric="RGB", nodata=None if masked else 0)
    by_name = open_imagery(path, nodata=None if not masked else 0)
    array = rioxarray.open_rasterio(path, masked=masked, chunks=chunks)
    source = open_imagery(array, nodata=0 if masked else None)
    assert source.native_grid == by_name.native_grid and source.dates == by_name.dates == ("2021-07-04",)
    assert source.area().geometry.equals(by_name.area().geometry) and len(source.notes) == len(by_name.notes)
    for grid in (source.native_grid.pad(5), source.area().grid("EPSG:3857", 0.9)):
        mine, theirs = source.read(grid), by_name.read(grid)
        np.testing.assert_array_equal(mine.valid, theirs.valid)
        np.testing.assert_allclose(mine.rgb, theirs.rgb, atol=1 / 255)


def test_what_a_source_shows_is_itself_a_source(make_tif, rgb):
    source = open_imagery(make_tif(rgb, photometric="RGB"))
    again = open_imagery(source.to_xarray())
    np.testing.assert_allclose(again.read(source.native_grid).rgb * 255, rgb, atol=1e-4)
    south_up = source.to_xarray().isel(y=slice(None, None, -1)).transpose("x", "band", "y")
    np.testing.assert_allclose(open_imagery(south_up).read(source.native_grid).rgb * 255, rgb, atol=1e-4)


def test_bands_follow_their_names_and_the_user(make_tif, rgb):
    four = np.concatenate([rgb, rgb[:1] // 2])
    array = rioxarray.open_rasterio(make_tif(four, photometric="MINISBLACK", alpha="NO"))
    with pytest.raises(ImageryError, match="4 bands"):
        open_imagery(array)
    named = array.assign_attrs(long_name=("nir", "blue", "green", "red"))
    for source in (open_imagery(named), open_imagery(array, bands="4,3,2")):
        np.testing.assert_allclose(source.read(source.native_grid).rgb * 255, four[[3, 2, 1]], atol=1e-4)


def test_arrays_that_are_no_image_are_told_like_files(make_tif, rgb):
    array = rioxarray.open_rasterio(make_tif(rgb, photometric="RGB"))
    plain = xarray.DataArray(rgb, dims=("band", "y", "x"), coords={"y": array.y.values, "x": array.x.values})
    uneven = array.assign_coords(x=315_000 + np.arange(80.0) ** 1.2)
    for wrong, options, message in (
        (plain, {}, r"DataArray: no coordinate reference system"),
        (array[0], {}, r"1 colour band.*Give a colour image"),
        (array[:1], {}, r"1 colour band"),
        (array.astype("uint16"), {}, r"uint16 pixels.*--scale"),
        (array.astype("complex64"), {}, r"complex64"),
        (array.to_dataset(name="a"), {}, r"Dataset.*expected a DataArray"),
        (array.expand_dims("time"), {}, r"not an image.*band.*expected a DataArray"),
        (array.drop_vars(["x", "y"]), {}, r"no even coordinates y"),
        (uneven, {}, r"no even coordinates x"),
        (array, {"nodata": 300}, r"no pixel of uint8 can be 300"),
    ):
        with pytest.raises(InputError, match=message):
            open_imagery(wrong, **options)
    assert open_imagery(plain, crs=UTM).native_crs.epsg == 32619
    grey = array.copy(data=np.repeat(rgb[:1], 3, axis=0))
    assert any("grey" in note for note in open_imagery(grey).notes)


def test_the_file_of_an_array_goes_with_its_source(make_tif, rgb, tmp_path, monkeypatch):
    array = rioxarray.open_rasterio(make_tif(rgb, "a/image.tif", photometric="RGB"), chunks=16)
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(folder))
    with pytest.raises(InputError, match="band 9"):
        open_imagery(array, bands="1,2,9")
    assert not list(folder.iterdir())
    source = open_imagery(array)
    assert source.read(source.native_grid).valid.all() and list(folder.iterdir())
    del source
    gc.collect()
    assert not list(folder.iterdir())
