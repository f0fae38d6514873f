"""Rasters of others: which are opened, and their pixels on any grid, held to a known function and to GDAL."""

from __future__ import annotations

import numpy as np
import pyproj
import pytest
import rasterio
import rasterio.shutil
import rasterio.warp
import scipy.ndimage
from affine import Affine
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from rasterio.enums import ColorInterp

from canopy.errors import ImageryError, InputError
from canopy.geo.area import AOI
from canopy.geo.crs import to_crs
from canopy.geo.grid import Grid
from canopy.geo.place import SourcePlace
from canopy.geo.reading import open_raster, read_raster, read_window
from canopy.geo.warp import PIECE_PX, resample

X0, Y0 = 500_000.0, 4_000_000.0
NORTH_UP = Affine(1, 0, X0, 0, -1, Y0)
IMAGE = np.full((1, 20, 20), 5, dtype="uint8")


def grid_of(*shape: int) -> Grid:
    return Grid.of(32610, NORTH_UP, shape)


@pytest.fixture
def tif(make_tif):
    """`tif(values (b, h, w), transform, crs, name)`: a GeoTIFF."""

    def make(values, transform=NORTH_UP, crs="EPSG:32610", name="in.tif", **profile):
        return make_tif(values, name, transform=transform, crs=crs, **profile)

    return make


# ---- opening ------------------------------------------------------------------------------------
def _vrt(source: str, relative: int = 1) -> str:
    return f"""<VRTDataset rasterXSize="20" rasterYSize="20"><SRS>EPSG:32610</SRS>
      <GeoTransform>500000, 1, 0, 4000000, 0, -1</GeoTransform>
      <VRTRasterBand dataType="Byte" band="1"><SimpleSource>
      <SourceFilename relativeToVRT="{relative}">{source}</SourceFilename><SourceBand>1</SourceBand>
      </SimpleSource></VRTRasterBand></VRTDataset>"""


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("/vsizip/a.zip/b.tif", "virtual path"),
        ("<VRTDataset/>", "inline XML"),
        ("GTIFF_DIR:1:a.tif", "GTIFF_DIR"),
        ("s3://bucket/a.tif", "s3"),
        ("", "empty"),
        ("nowhere.tif", "no such file"),
        (".", "folder"),
        ("http://", "URL"),
    ],
)
def test_names_that_are_not_opened(name, message):
    with pytest.raises(ImageryError, match=message):
        open_raster(name)


def test_the_formats_that_open_and_others(tif, tmp_path):
    source = tif(IMAGE)
    for driver, name in (("PNG", "a.png"), ("JPEG", "a.jpg"), ("JP2OpenJPEG", "a.jp2")):
        rasterio.shutil.copy(source, tmp_path / name, driver=driver, WORLDFILE="YES")
        with open_raster(tmp_path / name) as ds:
            assert ds.driver == driver and ds.shape == (20, 20)
    (tmp_path / "x.tif").write_bytes(b"hello world" * 30)
    (tmp_path / "x.asc").write_text("ncols 2\nnrows 2\nxllcorner 0\nyllcorner 0\ncellsize 1\n1 2\n3 4\n")
    for name in ("x.tif", "x.asc"):
        with pytest.raises(ImageryError, match=rf"{name}: not a readable raster"):
            open_raster(tmp_path / name)
    (tmp_path / "a.wld").unlink()
    for left in tmp_path.glob("a.*.aux.xml"):
        left.unlink()
    with pytest.raises(ImageryError, match="no georeferencing"):
        open_raster(tmp_path / "a.png")
    assert open_raster(tmp_path / "a.png", georeferenced=False).shape == (20, 20)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (_vrt("none.tif"), "not there"),
        (_vrt("/vsizip/x.zip/a.tif", 0), "virtual path"),
        (_vrt("&lt;VRTDataset/&gt;", 0), "inline XML"),
        (_vrt("in.tif").replace("<VRTRasterBand ", '<VRTRasterBand subClass="VRTRawRasterBand" '), ""),
        (_vrt("some.vrt"), "refers to itself"),
        ("<VRTDataset>", "readable VRT"),
    ],
)
def test_a_vrt_opens_beside_its_files_and_never_under_another_name(tif, tmp_path, text, message):
    tif(IMAGE)
    path, hidden = tmp_path / "some.vrt", tmp_path / "hidden.tif"
    path.write_text(_vrt("in.tif"))
    assert open_raster(path).read(1).max() == 5
    hidden.write_text(_vrt("in.tif"))
    with pytest.raises(ImageryError, match="not a readable raster"):
        open_raster(hidden)
    path.write_text(text)
    with pytest.raises(ImageryError, match=rf"some\.vrt.*{message}"), open_raster(path) as ds:
        read_window(ds, grid_of(20, 20), [1])


# ---- copies -------------------------------------------------------------------------------------
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.integers(-80, 150), st.integers(-80, 150), st.integers(1, 120), st.integers(1, 120))
def test_padding_never_changes_inner_pixels(tif, row, col, height, width):
    values = np.arange(90 * 110, dtype="uint16").reshape(1, 90, 110)
    with open_raster(tif(values, NORTH_UP, "EPSG:26910")) as ds:  # NAD83: no shift to WGS84
        got, valid = read_window(ds, grid_of(90, 110).window(row, col, height, width), [1])
    assert got.shape == (1, height, width) and got.dtype == np.float32 and valid.dtype == bool
    rows, cols = np.mgrid[row : row + height, col : col + width]
    inside = (rows >= 0) & (rows < 90) & (cols >= 0) & (cols < 110)
    assert np.array_equal(valid, inside)
    assert np.array_equal(got[0][inside], values[0][rows[inside], cols[inside]])
    assert (got[0][~inside] == 0).all()


def test_whole_multiples_are_exact_block_means(tif, rng):
    values = rng.integers(0, 255, (3, 63, 91), dtype=np.uint8)
    source = Affine(0.1, 0, 500_000.2, 0, -0.1, 4_000_000.4)
    grid = Grid.from_bounds((500_000, 3_999_990, 500_012, 4_000_002), "EPSG:32610", 0.6)
    with open_raster(tif(values, source)) as ds:
        got, valid = read_window(ds, grid, [1, 2, 3])
    full = np.full((3, grid.height * 6, grid.width * 6), np.nan)
    top, left = round((grid.bounds[3] - 4_000_000.4) / 0.1), round((500_000.2 - grid.bounds[0]) / 0.1)
    full[:, top : top + 63, left : left + 91] = values
    blocks = full.reshape(3, grid.height, 6, grid.width, 6)
    counts = np.isfinite(blocks[0]).sum(axis=(1, 3))
    means = np.nansum(blocks, axis=(2, 4)) / np.maximum(counts, 1)
    assert (counts == 36).sum() > 100 and valid[counts == 36].all() and not valid[counts == 0].any()
    assert np.allclose(got[:, valid], means[:, valid], atol=1e-4)


def test_scale_and_offset_and_alpha_of_a_whole_raster(tif):
    image = np.full((2, 8, 8), 100, dtype="uint8")
    path = tif(image, nodata=0)
    with rasterio.open(path, "r+") as ds:
        ds.scales, ds.offsets = (0.5, 1.0), (-3.0, 0.0)
        ds.colorinterp = (ColorInterp.gray, ColorInterp.alpha)
    raster = read_raster(path)
    assert raster.values.shape == (1, 8, 8) and (raster.values == 47).all() and raster.valid.all()
    assert read_raster(path, grid_of(9, 9)).valid.sum() == 64


# ---- warps against a known function -------------------------------------------------------------
def wave(x, y):
    """A smooth surface of UTM 10N coordinates: 0 to 60, slopes below 0.6 per metre."""
    return 30 + 20 * np.sin((x - X0) / 40) + 10 * np.cos((y - Y0) / 25)


def sampled(transform: Affine, shape) -> np.ndarray:
    """float32 (1, h, w): the wave at pixel centres."""
    cols, rows = np.meshgrid(np.arange(shape[1]) + 0.5, np.arange(shape[0]) + 0.5)
    return wave(*(transform @ (cols, rows)))[None].astype("float32")


def expected_on(grid: Grid) -> np.ndarray:
    cols, rows = np.meshgrid(np.arange(grid.width) + 0.5, np.arange(grid.height) + 0.5)
    move = pyproj.Transformer.from_crs(grid.crs.to_wkt(), "EPSG:32610", always_xy=True)
    return wave(*move.transform(*grid.xy(rows, cols)))


ROTATED = Affine.translation(X0, Y0) @ Affine.rotation(27) @ Affine.scale(1, -1)
SHEARED = Affine(0.9, 0.3, X0, 0.2, -1.1, Y0)
SOUTH_UP = Affine(1, 0, X0, 0, 1, Y0 - 300)
EAST_LEFT = Affine(-1, 0, X0 + 300, 0, -1, Y0)
NON_SQUARE = Affine(0.7, 0, X0, 0, -1.2, Y0)


@pytest.mark.parametrize("transform", [NORTH_UP, ROTATED, SHEARED, SOUTH_UP, EAST_LEFT, NON_SQUARE])
@pytest.mark.parametrize(("crs", "pixel"), [(32610, 0.37), (32611, 0.8), (3857, 1.3), (4326, 1e-5)])
def test_every_orientation_lands_where_it_should(tif, transform, crs, pixel):
    x, y = transform @ (140, 150)
    aoi = AOI.from_bounds((x - 60, y - 60, x + 60, y + 60), 32610)
    grid = Grid.from_bounds(aoi.to_crs(crs).geometry.bounds, crs, pixel)
    with open_raster(tif(sampled(transform, (300, 280)), transform)) as ds:
        got, valid = read_window(ds, grid, [1])
    assert valid.mean() > 0.99
    # Bilinear interpolation of a surface with curvature 1/80: below 0.02; half a pixel off is 0.3.
    assert np.abs(got[0] - expected_on(grid))[valid].max() < 0.03


@pytest.mark.parametrize("pixel", [2.0, 2.7, 3.0, 4.3, 7.9])
def test_shrinking_averages_over_the_target_pixel(tif, pixel):
    source = Affine(1, 0, X0 + 0.31, 0, -1, Y0 - 0.17)
    grid = Grid.from_bounds((X0 + 50, Y0 - 400, X0 + 400, Y0 - 50), 32610, pixel)
    fine = Grid.of(32610, grid.transform @ Affine.scale(1 / 16), (grid.height * 16, grid.width * 16))
    mean = expected_on(fine).reshape(grid.height, 16, grid.width, 16).mean(axis=(1, 3))
    board = (np.indices((500, 500)).sum(axis=0) % 2 * 255).astype("float32")
    with open_raster(tif(np.stack([sampled(source, (500, 500))[0], board]), source)) as ds:
        got, valid = read_window(ds, grid, [1, 2])
    assert valid.all()
    assert np.abs(got[0] - mean).max() < 0.05
    if pixel > 4:  # what cannot be shown is gone
        assert np.abs(got[1] - 127.5).max() < 16


@pytest.mark.parametrize(("crs", "pixel"), [(2154, 0.6), (32631, 0.7), (3857, 0.9)])
def test_values_are_gdals_own_bilinear_ones(rng, tif, crs, pixel):
    """rasterio.warp.reproject, exact transformer, kernel of one pixel."""
    values = rng.uniform(0, 100, (2, 700, 700)).astype("float32")
    source = Affine(0.8, 0, 500_000, 0, -0.8, 5_000_000)
    x, y = pyproj.Transformer.from_crs(32631, crs, always_xy=True).transform(500_070, 4_999_930)
    grid = Grid.from_bounds((x, y - 350, x + 350, y), crs, pixel)
    reference = np.full((2, *grid.shape), np.nan, dtype="float32")
    rasterio.warp.reproject(
        values, reference, src_transform=source, src_crs="EPSG:32631", dst_transform=grid.transform,
        dst_crs=f"EPSG:{crs}", dst_nodata=np.nan, resampling=rasterio.warp.Resampling.bilinear,
        XSCALE="1", YSCALE="1",
    )  # fmt: skip
    with open_raster(tif(values, source, "EPSG:32631")) as ds:
        got, valid = read_window(ds, grid, [1, 2])
    both = valid & np.isfinite(reference[0])
    assert both.mean() > 0.9 and (valid != np.isfinite(reference[0])).sum() <= 4
    # White noise changes by up to 100 a pixel: 0.01 px, what GDAL may be off beside it, is 1.
    assert np.abs(got - reference)[:, both].max() < 1.0 and np.abs(got - reference)[:, both].mean() < 0.1


@pytest.mark.parametrize("resampling", [None, "nearest"])
@pytest.mark.parametrize(("crs", "pixel"), [(32611, 0.8), (32610, 2.7), (3857, 5.1), (4326, 7e-6)])
def test_a_pixel_does_not_depend_on_its_window(tif, rng, resampling, crs, pixel):
    values = rng.integers(0, 255, (2, 260, 240), dtype=np.uint8)
    values[:, 60:90, 100:140] = 0
    with open_raster(tif(values, ROTATED if crs == 32611 else NORTH_UP, nodata=0)) as ds:
        area = AOI.from_bounds(rasterio.transform.array_bounds(260, 240, NORTH_UP), 32610)
        grid = Grid.from_bounds(area.to_crs(crs).geometry.bounds, crs, pixel)
        whole, whole_valid = read_window(ds, grid, [1, 2], resampling=resampling)
        assert 0.2 < whole_valid.mean() < 1
        for _ in range(25):
            h, w = (int(n) for n in rng.integers(1, 60, 2))
            r, c = int(rng.integers(0, grid.height - 1)), int(rng.integers(0, grid.width - 1))
            got, valid = read_window(ds, grid.window(r, c, h, w), [1, 2], resampling=resampling)
            h, w = min(h, grid.height - r), min(w, grid.width - c)
            assert np.array_equal(valid[:h, :w], whole_valid[r : r + h, c : c + w])
            assert np.array_equal(got[:, :h, :w], whole[:, r : r + h, c : c + w])


def test_longitudes_counted_to_360(tif):
    source = Affine(0.01, 0, 237.0, 0, -0.01, 46.0)  # 123 W
    values = np.arange(100 * 100, dtype="float32").reshape(1, 100, 100)
    grid = Grid.of(4326, Affine(0.01, 0, -123.0, 0, -0.01, 46.0), (100, 100))
    with open_raster(tif(values, source, "EPSG:4326")) as ds:
        got, valid = read_window(ds, grid, [1])
        assert valid.mean() > 0.98 and np.abs(got - values)[0][valid].max() < 0.01
        assert not read_window(ds, grid.window(0, 9000, 4, 4), [1])[1].any()


@pytest.mark.parametrize("crs", ["EPSG:4326", "EPSG:3857"])
def test_a_world_map_has_no_seam_at_the_antimeridian(tif, crs):
    """Values follow cos(longitude), which is smooth across 180."""
    half = 180.0 if crs == "EPSG:4326" else np.pi * 6378137.0
    lon = np.radians((np.arange(1440) + 0.5) / 4 - 180)
    values = np.broadcast_to(np.cos(lon), (1, 720, 1440)).astype("float32")
    path = tif(values, Affine(half / 720, 0, -half, 0, -half / 720, half / 2), crs)
    grid = AOI.from_bounds((178, -17, -178, -16)).grid("EPSG:32701", 5000)
    cols, rows = np.meshgrid(np.arange(grid.width) + 0.5, np.arange(grid.height) + 0.5)
    lon, _ = pyproj.Transformer.from_crs(32701, 4326, always_xy=True).transform(*grid.xy(rows, cols))
    with open_raster(path) as ds:
        got, valid = read_window(ds, grid, [1])
    assert valid.all() and np.abs(got[0] - np.cos(np.radians(lon))).max() < 1e-4


def test_little_is_asked_for_at_a_time():
    """A map of 250 m pixels from an image of 0.6 m (once 11 GB), and a world map at the antimeridian."""
    largest = 0

    def read(row, col, height, width):
        nonlocal largest
        largest = max(largest, height * width)
        return np.ones((1, height, width), "uint8"), np.ones((height, width), bool)

    place = SourcePlace(Affine(0.6, 0, X0, 0, -0.6, Y0), to_crs(32610), 9_000, 9_000)
    for crs, pixel in ((32611, 250.0), (32610, 120.0), (32610, 601.3)):
        bounds = AOI.from_bounds((X0, Y0 - 5400, X0 + 5400, Y0), 32610).to_crs(crs).geometry.bounds
        values, valid = resample(place, Grid.from_bounds(bounds, crs, pixel), read, 1)
        assert valid.mean() > 0.7 and (values[0][valid] == 1).all()
    world = SourcePlace(Affine(1e-4, 0, -180, 0, -1e-4, 90), to_crs(4326), 1_800_000, 3_600_000)
    fiji = AOI.from_bounds((179.99, -17, -179.99, -16.98)).grid("EPSG:32701", 10.0)
    assert resample(world, fiji, read, 1)[1].all()
    assert 0 < largest <= PIECE_PX**2


# ---- validity -----------------------------------------------------------------------------------
def test_nodata_neither_bleeds_nor_is_filled(tif):
    values = np.full((1, 60, 60), 10.0, dtype="float32")
    values[0, :, 30:] = -9999
    grid = Grid.from_bounds((X0 + 5, Y0 - 50, X0 + 55, Y0 - 5), 32610, 0.83)
    x = grid.bounds[0] + (np.arange(grid.width) + 0.5) * 0.83 - X0
    with open_raster(tif(values, nodata=-9999)) as ds:
        with pytest.raises(InputError, match="resampling"):
            read_window(ds, grid, [1], resampling="lanczos")
        for resampling in (None, "bilinear", "nearest"):
            got, valid = read_window(ds, grid, [1], resampling=resampling)
            assert np.allclose(got[0][valid], 10.0, atol=1e-5) and (got[0][~valid] == 0).all()
            assert valid[:, x < 29].all() and not valid[:, x > 30.0].any()


def test_a_clean_source_is_valid_up_to_its_edge(tif):
    """No half-pixel frame is lost: two files that touch leave no gap."""
    right_at = Affine(1, 0, X0 + 50, 0, -1, Y0)
    for pixel in (0.71, 1.0, 2.3, 2.0, 3.0):
        grid = Grid.from_bounds((X0 + 3, Y0 - 45, X0 + 96, Y0 - 3), 32610, pixel)
        covered = np.zeros(grid.shape, dtype=bool)
        for name, transform in (("left.tif", NORTH_UP), ("right.tif", right_at)):
            with open_raster(tif(sampled(NORTH_UP, (50, 50)), transform, name=name)) as ds:
                covered |= read_window(ds, grid, [1])[1]
        assert covered.all(), pixel


@pytest.mark.parametrize("dtype", ["uint8", "uint16", "int16", "float32"])
def test_a_dark_pixel_is_not_a_collar_but_a_measurement_needs_all_its_bands(tif, dtype):
    image = np.full((3, 8, 8), 9, dtype=dtype)
    image[:, 0, 0], image[2, 1, 1] = 0, 0
    with open_raster(tif(image, nodata=0)) as ds:
        colours = read_window(ds, grid_of(8, 8), [1, 2, 3], colours=True)[1]
        heights = read_window(ds, grid_of(8, 8), [1, 2, 3])[1]
    assert (~colours).sum() == 1 and not colours[0, 0]
    assert (~heights).sum() == 2 and not heights[0, 0] and not heights[1, 1]


def test_marks_of_missing_pixels(tif):
    """NaN, infinity, a mark that is no colour, one that is given, one beyond float32."""
    values = np.full((3, 8, 8), 9, dtype="float32")
    values[0, 1, 1], values[1, 2, 2], values[1, 3, 3] = np.nan, np.inf, -9999
    values[0, 4] = np.float32(-3.4e38)
    with open_raster(tif(values, nodata=-9999)) as ds:
        got, valid = read_window(ds, grid_of(8, 8), [1, 2, 3], colours=True)
    assert np.isfinite(got).all() and sorted(zip(*np.nonzero(~valid), strict=True)) == [
        (1, 1),
        (2, 2),
        (3, 3),
    ]
    with open_raster(tif(values, nodata=float(np.float32(-3.4e38)))) as ds:
        assert not read_window(ds, grid_of(8, 8), [1])[1][4].any()
        assert not read_window(ds, grid_of(8, 8), [3], nodata=9)[1].any()


def test_alpha_nodata_and_internal_mask_are_intersected(tmp_path):
    path = tmp_path / "rgba.tif"
    image = np.full((4, 16, 16), 200, dtype="uint8")
    image[3, 0] = 0  # alpha
    image[:3, 1] = 7  # nodata
    profile = {"driver": "GTiff", "height": 16, "width": 16, "count": 4, "dtype": "uint8"}
    with (
        rasterio.Env(GDAL_TIFF_INTERNAL_MASK=True),
        rasterio.open(path, "w", crs="EPSG:32610", transform=NORTH_UP, nodata=7, **profile) as ds,
    ):
        ds.colorinterp = (ColorInterp.red, ColorInterp.green, ColorInterp.blue, ColorInterp.alpha)
        ds.write(image)
        mask = np.full((16, 16), 255, dtype="uint8")
        mask[2] = 0
        ds.write_mask(mask)
    with open_raster(path) as ds:
        valid = read_window(ds, grid_of(16, 16), [1, 2, 3])[1]
    assert not valid[:3].any() and valid[3:].all()


def test_only_gdals_own_msk_files_are_applied(tif, tmp_path):
    """Meta's v1 masks lie beside the maps as .tif.msk and mean the opposite."""
    path = tif(np.full((1, 16, 16), 9, dtype="uint8"), name="map.tif")
    tif(np.zeros((1, 16, 16), dtype="uint8"), name="map.tif.msk")
    with open_raster(path) as ds:
        assert read_window(ds, grid_of(16, 16), [1])[1].all()
    (tmp_path / "map.tif.msk").unlink()
    with rasterio.Env(GDAL_TIFF_INTERNAL_MASK=False), rasterio.open(path, "r+") as ds:
        ds.write_mask(np.zeros((16, 16), dtype="uint8"))
    with open_raster(path) as ds:
        assert not read_window(ds, grid_of(16, 16), [1])[1].any()


def test_decode_runs_before_resampling(tif):
    """Palette indexes 0 and 2 must never mix to 1."""
    codes = np.zeros((1, 20, 20), dtype="uint8")
    codes[0, :, 10:] = 2
    table = np.array([[10, 0, 0], [99, 99, 99], [30, 0, 0]], dtype="uint8")
    grid = Grid.from_bounds((X0 + 2, Y0 - 18, X0 + 18, Y0 - 2), 32610, 0.7)
    with open_raster(tif(codes)) as ds:
        got, valid = read_window(
            ds, grid, [1], decode=lambda values, ok: (table[values[0]].transpose(2, 0, 1), ok)
        )
    assert got.shape == (3, *grid.shape) and valid.all()
    assert (got[1:] == 0).all() and got[0].min() >= 9.99 and got[0].max() <= 30.01


def test_places_that_cannot_be_and_sources_far_away(tif):
    with open_raster(tif(np.ones((1, 8, 8), "float32"), crs=None)) as ds:
        assert read_window(ds, grid_of(8, 8), [1], crs="EPSG:32610")[1].all()
        with pytest.raises(ImageryError, match="edit-info --crs"):
            read_window(ds, grid_of(8, 8), [1])
    with open_raster(tif(IMAGE, NORTH_UP, "EPSG:4326")) as ds, pytest.raises(ImageryError, match="degr"):
        read_window(ds, grid_of(8, 8), [1])
    one = Affine(10, 0, X0, 0, -10, Y0)
    with open_raster(tif(np.full((1, 1, 1), 7, dtype="uint8"), one)) as ds:
        for pixel in (1.7, 10.0, 3.0):
            grid = Grid.from_bounds((X0, Y0 - 10, X0 + 10, Y0), 32610, pixel)
            got, valid = read_window(ds, grid, [1])
            assert valid.any() and (got[0][valid] == 7).all()
        assert not read_window(ds, grid.window(9000, 9000, 5, 5), [1])[1].any()
        opposite = Grid.of(32660, Affine(1, 0, 5e5, 0, -1, 4e6), (20, 20))
        assert not read_window(ds, opposite, [1])[1].any()


# ---- damage -------------------------------------------------------------------------------------
TILED = {"tiled": True, "blockxsize": 256, "blockysize": 256}


def test_damage_is_an_error_with_its_name_and_place(tif, rng):
    values = rng.uniform(0, 50, (1, 1024, 1024)).astype("float32")
    grid = grid_of(1024, 1024)
    path = tif(values, name="rot.tif", compress="deflate", **TILED)
    data = bytearray(path.read_bytes())
    with rasterio.open(path) as ds:
        offset = int(ds.get_tag_item("BLOCK_OFFSET_3_3", "TIFF", bidx=1))
    data[offset : offset + 4000] = b"\x00" * 4000
    path.write_bytes(data)
    with open_raster(path) as ds:
        assert read_window(ds, grid.window(0, 0, 256, 256), [1])[1].all()
        with pytest.raises(
            ImageryError, match=r"rot\.tif: unreadable pixels in rows \d+-\d+, columns \d+-\d+"
        ):
            read_window(ds, grid.window(700, 700, 324, 324), [1])
    path.write_bytes(data[: len(data) // 2])
    with pytest.raises(ImageryError, match=r"rot\.tif"), open_raster(path) as ds:
        read_window(ds, grid, [1])


def test_jpeg_damage_that_gdal_only_logs_is_an_error(tif, rng):
    noise = scipy.ndimage.gaussian_filter(rng.uniform(0, 255, (3, 512, 512)), (0, 3, 3))
    image = np.interp(noise, (noise.min(), noise.max()), (0, 255)).astype("uint8")
    path = tif(image, name="photo.tif", compress="jpeg", photometric="ycbcr", **TILED)
    data = bytearray(path.read_bytes())
    with rasterio.open(path) as ds:
        offset, size = (
            int(ds.get_tag_item(f"BLOCK_{what}_1_1", "TIFF", bidx=1)) for what in ("OFFSET", "SIZE")
        )
    data[offset + size // 3 : offset + size // 3 + 2] = b"\xff\xd9"  # an early end-of-image marker
    path.write_bytes(data)
    for _ in range(2):  # the second read may not be served from a cache of wrong pixels
        with pytest.raises(ImageryError, match=r"photo\.tif"):
            read_window(open_raster(path), grid_of(512, 512), [1, 2, 3])
