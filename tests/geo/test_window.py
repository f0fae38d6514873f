"""read_window: copies, warps and masks, held to a known function of world coordinates."""

from __future__ import annotations

import numpy as np
import pyproj
import pytest
import rasterio
import rasterio.warp
from affine import Affine
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from rasterio.enums import ColorInterp
from shapely.geometry import box

from canopy.errors import ImageryError, InputError
from canopy.geo.area import AOI
from canopy.geo.crs import to_crs
from canopy.geo.grid import Grid
from canopy.geo.reading import open_raster, read_window

ORIGIN = (500_000.0, 4_000_000.0)
NORTH_UP = Affine(1, 0, ORIGIN[0], 0, -1, ORIGIN[1])


def wave(x, y):
    """A smooth surface of UTM 10N coordinates: 0 to 60, slopes below 0.6 per metre."""
    return 30 + 20 * np.sin((x - ORIGIN[0]) / 40) + 10 * np.cos((y - ORIGIN[1]) / 25)


def sampled(transform: Affine, shape, function=wave) -> np.ndarray:
    """float32 (1, h, w): the function at pixel centres."""
    cols, rows = np.meshgrid(np.arange(shape[1]) + 0.5, np.arange(shape[0]) + 0.5)
    x = transform.a * cols + transform.b * rows + transform.c
    y = transform.d * cols + transform.e * rows + transform.f
    return function(x, y)[None].astype("float32")


def expected_on(grid: Grid, source_crs="EPSG:32610") -> np.ndarray:
    cols, rows = np.meshgrid(np.arange(grid.width) + 0.5, np.arange(grid.height) + 0.5)
    t = grid.transform
    x, y = t.a * cols + t.c, t.e * rows + t.f
    move = pyproj.Transformer.from_crs(grid.crs.to_wkt(), source_crs, always_xy=True)
    return wave(*move.transform(x, y))


# ---- copies -----------------------------------------------------------------------------------
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.integers(-80, 150), st.integers(-80, 150), st.integers(1, 120), st.integers(1, 120))
def test_padding_never_changes_inner_pixels(make_tif, row, col, height, width):
    values = np.arange(90 * 110, dtype="uint16").reshape(1, 90, 110)
    path = make_tif(values, NORTH_UP)
    grid = Grid.of("EPSG:32610", NORTH_UP, (90, 110)).window(row, col, height, width)
    with open_raster(path) as ds:
        got, valid = read_window(ds, grid, [1])
    assert got.shape == (1, height, width) and valid.shape == (height, width)
    assert got.dtype == np.float32 and valid.dtype == bool
    rows, cols = np.mgrid[row : row + height, col : col + width]
    inside = (rows >= 0) & (rows < 90) & (cols >= 0) & (cols < 110)
    assert np.array_equal(valid, inside)
    assert np.array_equal(got[0][inside], values[0][rows[inside], cols[inside]])
    assert (got[0][~inside] == 0).all()


def test_equal_crs_of_another_datum_are_copied(make_tif, rng):
    values = rng.uniform(0, 50, (1, 40, 40)).astype("float32")
    with open_raster(make_tif(values, NORTH_UP, "EPSG:26910")) as ds:  # NAD83: no shift to WGS84
        got, valid = read_window(ds, Grid.of("EPSG:32610", NORTH_UP, (40, 40)), [1])
    assert valid.all() and np.array_equal(got, values)


def test_whole_multiples_are_exact_block_means(make_tif, rng):
    values = rng.integers(0, 255, (3, 63, 91), dtype=np.uint8)
    source = Affine(0.1, 0, 500_000.2, 0, -0.1, 4_000_000.4)
    grid = Grid.from_bounds((500_000, 3_999_990, 500_012, 4_000_002), "EPSG:32610", 0.6)
    with open_raster(make_tif(values, source)) as ds:
        got, valid = read_window(ds, grid, [1, 2, 3])
    full = np.full((3, grid.height * 6, grid.width * 6), np.nan)
    # Two source pixels east and, from the grid's top, round((top - 4000000.4) / 0.1) south.
    top = round((grid.bounds[3] - 4_000_000.4) / 0.1)
    left = round((500_000.2 - grid.bounds[0]) / 0.1)
    full[:, top : top + 63, left : left + 91] = values
    blocks = full.reshape(3, grid.height, 6, grid.width, 6)
    counts = np.isfinite(blocks[0]).sum(axis=(1, 3))
    complete = counts == 36
    means = np.nansum(blocks, axis=(2, 4)) / np.maximum(counts, 1)
    assert complete.sum() > 100 and valid[complete].all()
    assert np.allclose(got[:, valid], means[:, valid], atol=1e-4)
    assert not valid[counts == 0].any()


# ---- warps against the known function -----------------------------------------------------------
ROTATED = Affine.translation(*ORIGIN) @ Affine.rotation(27) @ Affine.scale(1, -1)
SHEARED = Affine(0.9, 0.3, ORIGIN[0], 0.2, -1.1, ORIGIN[1])
SOUTH_UP = Affine(1, 0, ORIGIN[0], 0, 1, ORIGIN[1] - 300)
EAST_LEFT = Affine(-1, 0, ORIGIN[0] + 300, 0, -1, ORIGIN[1])
NON_SQUARE = Affine(0.7, 0, ORIGIN[0], 0, -1.2, ORIGIN[1])


@pytest.mark.parametrize("transform", [NORTH_UP, ROTATED, SHEARED, SOUTH_UP, EAST_LEFT, NON_SQUARE])
@pytest.mark.parametrize(
    ("crs", "pixel"),
    [("EPSG:32610", 1.0), ("EPSG:32610", 0.37), ("EPSG:32611", 0.8), ("EPSG:3857", 1.3), ("EPSG:4326", 1e-5)],
)
def test_every_orientation_lands_where_it_should(make_tif, transform, crs, pixel):
    path = make_tif(sampled(transform, (300, 280)), transform)
    corners = [transform @ (140, 150)]
    aoi = AOI.from_bounds(
        (corners[0][0] - 60, corners[0][1] - 60, corners[0][0] + 60, corners[0][1] + 60), 32610
    )
    grid = Grid.from_bounds(aoi.to_crs(crs).geometry.bounds, crs, pixel)
    with open_raster(path) as ds:
        got, valid = read_window(ds, grid, [1])
    assert valid.mean() > 0.99
    # Bilinear interpolation of a surface with curvature 1/80: below 0.02; half a pixel off is 0.3.
    assert np.abs(got[0] - expected_on(grid))[valid].max() < 0.03


@pytest.mark.parametrize("pixel", [2.0, 2.7, 3.0, 4.3, 5.0, 7.9])
def test_shrinking_averages_over_the_target_pixel(make_tif, pixel):
    source = Affine(1, 0, ORIGIN[0] + 0.31, 0, -1, ORIGIN[1] - 0.17)
    path = make_tif(sampled(source, (500, 500)), source)
    grid = Grid.from_bounds((ORIGIN[0] + 50, ORIGIN[1] - 400, ORIGIN[0] + 400, ORIGIN[1] - 50), 32610, pixel)
    fine = Grid.of(32610, grid.transform @ Affine.scale(1 / 16), (grid.height * 16, grid.width * 16))
    mean = expected_on(fine).reshape(grid.height, 16, grid.width, 16).mean(axis=(1, 3))
    with open_raster(path) as ds:
        got, valid = read_window(ds, grid, [1])
    assert valid.all()
    assert np.abs(got[0] - mean).max() < 0.05


def test_shrinking_removes_what_it_cannot_show(make_tif):
    board = (np.indices((400, 400)).sum(axis=0) % 2 * 255).astype("uint8")[None]
    source = Affine(0.1, 0, ORIGIN[0] + 0.03, 0, -0.1, ORIGIN[1])
    grid = Grid.from_bounds((ORIGIN[0] + 5, ORIGIN[1] - 30, ORIGIN[0] + 30, ORIGIN[1] - 5), 32610, 0.43)
    with open_raster(make_tif(board, source)) as ds:
        got, valid = read_window(ds, grid, [1])
    assert valid.all() and np.abs(got - 127.5).max() < 8


@pytest.mark.parametrize("resampling", [None, "bilinear", "nearest"])
def test_resampling_on_request(make_tif, resampling):
    path = make_tif(sampled(NORTH_UP, (200, 200)), NORTH_UP)
    grid = Grid.from_bounds((ORIGIN[0] + 20.3, ORIGIN[1] - 99, ORIGIN[0] + 99, ORIGIN[1] - 20), 32610, 0.7)
    with open_raster(path) as ds:
        got, valid = read_window(ds, grid, [1], resampling=resampling)
        with pytest.raises(InputError, match="resampling"):
            read_window(ds, grid, [1], resampling="lanczos")
    worst = np.abs(got[0] - expected_on(grid)).max()
    assert valid.all()
    assert worst < (0.7 if resampling == "nearest" else 0.02)


# ---- independence of the window -----------------------------------------------------------------
@pytest.mark.parametrize("resampling", [None, "nearest"])
@pytest.mark.parametrize(
    ("crs", "pixel"), [("EPSG:32611", 0.8), ("EPSG:32610", 2.7), ("EPSG:3857", 5.1), ("EPSG:4326", 7e-6)]
)
def test_a_pixel_does_not_depend_on_its_window(make_tif, rng, resampling, crs, pixel):
    values = rng.integers(0, 255, (2, 260, 240), dtype=np.uint8)
    values[:, 60:90, 100:140] = 0
    path = make_tif(values, ROTATED if crs == "EPSG:32611" else NORTH_UP, nodata=0)
    with open_raster(path) as ds:
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


# ---- validity -----------------------------------------------------------------------------------
def test_nodata_neither_bleeds_nor_is_filled(make_tif):
    values = np.full((1, 60, 60), 10.0, dtype="float32")
    values[0, :, 30:] = -9999
    grid = Grid.from_bounds((ORIGIN[0] + 5, ORIGIN[1] - 50, ORIGIN[0] + 55, ORIGIN[1] - 5), 32610, 0.83)
    for resampling in (None, "nearest"):
        with open_raster(make_tif(values, NORTH_UP, nodata=-9999)) as ds:
            got, valid = read_window(ds, grid, [1], resampling=resampling)
        assert np.allclose(got[0][valid], 10.0, atol=1e-5)
        assert (got[0][~valid] == 0).all()
        x = grid.bounds[0] + (np.arange(grid.width) + 0.5) * 0.83 - ORIGIN[0]
        assert valid[:, x < 29].all() and not valid[:, x > 30.0].any()


def test_a_clean_source_is_valid_up_to_its_edge(make_tif):
    """No half-pixel frame is lost: two files that touch leave no gap."""
    left = sampled(NORTH_UP, (50, 50))
    right_at = Affine(1, 0, ORIGIN[0] + 50, 0, -1, ORIGIN[1])
    grid = Grid.from_bounds((ORIGIN[0] + 2, ORIGIN[1] - 48, ORIGIN[0] + 98, ORIGIN[1] - 2), 32610, 0.71)
    for pixel in (0.71, 1.0, 2.3, 2.0, 3.0):
        grid = Grid.from_bounds((ORIGIN[0] + 3, ORIGIN[1] - 45, ORIGIN[0] + 96, ORIGIN[1] - 3), 32610, pixel)
        covered = np.zeros(grid.shape, dtype=bool)
        for name, transform in (("left.tif", NORTH_UP), ("right.tif", right_at)):
            with open_raster(make_tif(left, transform, name=name)) as ds:
                covered |= read_window(ds, grid, [1])[1]
        assert covered.all(), pixel


def test_nan_and_infinity_are_invalid(make_tif):
    values = np.ones((2, 8, 8), dtype="float32")
    values[0, 1, 1], values[1, 2, 2] = np.nan, np.inf
    with open_raster(make_tif(values, NORTH_UP)) as ds:
        got, valid = read_window(ds, Grid.of(32610, NORTH_UP, (8, 8)), [1, 2])
    assert np.isfinite(got).all()
    assert (~valid).sum() == 2 and not valid[1, 1] and not valid[2, 2]


@pytest.mark.parametrize("dtype", ["uint8", "uint16", "int16", "float32"])
def test_a_dark_pixel_is_not_a_collar_but_a_measurement_needs_all_its_bands(make_tif, dtype):
    grid = Grid.of(32610, NORTH_UP, (8, 8))
    image = np.full((3, 8, 8), 9, dtype=dtype)
    image[:, 0, 0], image[2, 1, 1] = 0, 0
    with open_raster(make_tif(image, NORTH_UP, nodata=0)) as ds:
        colours = read_window(ds, grid, [1, 2, 3], colours=True)[1]
        heights = read_window(ds, grid, [1, 2, 3])[1]
    assert (~colours).sum() == 1 and not colours[0, 0]
    assert (~heights).sum() == 2 and not heights[0, 0] and not heights[1, 1]


def test_a_mark_that_is_no_colour_counts_in_one_band(make_tif):
    image = np.full((3, 8, 8), 9, dtype="float32")
    image[1, 3, 3] = -9999
    with open_raster(make_tif(image, NORTH_UP, nodata=-9999)) as ds:
        valid = read_window(ds, Grid.of(32610, NORTH_UP, (8, 8)), [1, 2, 3], colours=True)[1]
    assert (~valid).sum() == 1 and not valid[3, 3]


def test_the_nodata_option_and_marks_beyond_float32(make_tif):
    grid = Grid.of(32610, NORTH_UP, (8, 8))
    image = np.full((3, 8, 8), 9, dtype="uint8")
    image[:, 2] = 255
    with open_raster(make_tif(image, NORTH_UP)) as ds:
        assert read_window(ds, grid, [1, 2, 3])[1].all()
        assert not read_window(ds, grid, [1, 2, 3], nodata=255)[1][2].any()
    heights = np.full((1, 8, 8), 9, dtype="float32")
    heights[0, 4] = np.float32(-3.4e38)
    with open_raster(make_tif(heights, NORTH_UP, nodata=float(np.float32(-3.4e38)))) as ds:
        assert not read_window(ds, grid, [1])[1][4].any()


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
        valid = read_window(ds, Grid.of(32610, NORTH_UP, (16, 16)), [1, 2, 3])[1]
    assert not valid[:3].any() and valid[3:].all()


def test_only_gdals_own_msk_files_are_applied(make_tif, tmp_path):
    """Meta's v1 masks lie beside the maps as .tif.msk and mean the opposite."""
    image = np.full((1, 16, 16), 9, dtype="uint8")
    path = make_tif(image, NORTH_UP, name="map.tif")
    make_tif(np.zeros((1, 16, 16), dtype="uint8"), NORTH_UP, name="map.tif.msk")
    grid = Grid.of(32610, NORTH_UP, (16, 16))
    with open_raster(path) as ds:
        assert read_window(ds, grid, [1])[1].all()
    (tmp_path / "map.tif.msk").unlink()
    with rasterio.Env(GDAL_TIFF_INTERNAL_MASK=False), rasterio.open(path, "r+") as ds:
        ds.write_mask(np.zeros((16, 16), dtype="uint8"))
    assert (tmp_path / "map.tif.msk").exists()
    with open_raster(path) as ds:
        assert not read_window(ds, grid, [1])[1].any()


def test_decode_runs_before_resampling(make_tif):
    """Palette indexes 0 and 2 must never mix to 1."""
    codes = np.zeros((1, 20, 20), dtype="uint8")
    codes[0, :, 10:] = 2
    table = np.array([[10, 0, 0], [99, 99, 99], [30, 0, 0]], dtype="uint8")

    def decode(values, valid):
        return table[values[0]].transpose(2, 0, 1), valid

    grid = Grid.from_bounds((ORIGIN[0] + 2, ORIGIN[1] - 18, ORIGIN[0] + 18, ORIGIN[1] - 2), 32610, 0.7)
    with open_raster(make_tif(codes, NORTH_UP)) as ds:
        got, valid = read_window(ds, grid, [1], decode=decode)
    assert got.shape == (3, *grid.shape) and valid.all()
    assert (got[1:] == 0).all() and got[0].min() >= 9.99 and got[0].max() <= 30.01


def test_a_missing_crs_is_asked_for_and_can_be_given(make_tif):
    values = np.ones((1, 8, 8), dtype="float32")
    grid = Grid.of(32610, NORTH_UP, (8, 8))
    with open_raster(make_tif(values, NORTH_UP, crs=None)) as ds:
        with pytest.raises(ImageryError, match="--crs"):
            read_window(ds, grid, [1])
        assert read_window(ds, grid, [1], crs="EPSG:32610")[1].all()


def test_longitudes_counted_to_360(make_tif):
    source = Affine(0.01, 0, 237.0, 0, -0.01, 46.0)  # 123 W
    values = np.arange(100 * 100, dtype="float32").reshape(1, 100, 100)
    grid = Grid.of(4326, Affine(0.01, 0, -123.0, 0, -0.01, 46.0), (100, 100))
    with open_raster(make_tif(values, source, "EPSG:4326")) as ds:
        got, valid = read_window(ds, grid, [1])
    assert valid.mean() > 0.98
    assert np.abs(got - values)[0][valid].max() < 0.01
    far = grid.window(0, 9000, 4, 4)
    with open_raster(make_tif(values, source, "EPSG:4326")) as ds:
        assert not read_window(ds, far, [1])[1].any()


@pytest.mark.parametrize("crs", ["EPSG:4326", "EPSG:3857"])
def test_a_world_map_has_no_seam_at_the_antimeridian(make_tif, crs):
    """Values follow cos(longitude), which is smooth across 180."""
    half = 180.0 if crs == "EPSG:4326" else np.pi * 6378137.0
    lon = np.radians((np.arange(1440) + 0.5) / 4 - 180)
    values = np.broadcast_to(np.cos(lon), (1, 720, 1440)).astype("float32")
    step = half / 720
    path = make_tif(values, Affine(step, 0, -half, 0, -step, half / 2), crs)
    grid = AOI.from_bounds((178, -17, -178, -16)).grid("EPSG:32701", 5000)
    cols, rows = np.meshgrid(np.arange(grid.width) + 0.5, np.arange(grid.height) + 0.5)
    x, y = grid.xy(rows, cols)
    lon, _ = pyproj.Transformer.from_crs(32701, 4326, always_xy=True).transform(x, y)
    with open_raster(path) as ds:
        got, valid = read_window(ds, grid, [1])
    assert valid.all()
    assert np.abs(got[0] - np.cos(np.radians(lon))).max() < 1e-4


def test_one_pixel_rasters_and_sources_far_away(make_tif):
    one = Affine(10, 0, ORIGIN[0], 0, -10, ORIGIN[1])
    with open_raster(make_tif(np.full((1, 1, 1), 7, dtype="uint8"), one)) as ds:
        for pixel in (1.7, 10.0, 3.0):
            grid = Grid.from_bounds((ORIGIN[0], ORIGIN[1] - 10, ORIGIN[0] + 10, ORIGIN[1]), 32610, pixel)
            got, valid = read_window(ds, grid, [1])
            assert valid.any() and (got[0][valid] == 7).all()
        assert not read_window(ds, grid.window(9000, 9000, 5, 5), [1])[1].any()
        opposite = Grid.of(32660, Affine(1, 0, 5e5, 0, -1, 4e6), (20, 20))
        assert not read_window(ds, opposite, [1])[1].any()


# ---- damage -------------------------------------------------------------------------------------
def test_a_truncated_file_is_an_error_with_its_name_and_place(make_tif, rng):
    values = rng.uniform(0, 50, (1, 1024, 1024)).astype("float32")
    path = make_tif(
        values, NORTH_UP, name="cut.tif", tiled=True, blockxsize=256, blockysize=256, compress="deflate"
    )
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])
    grid = Grid.of(32610, NORTH_UP, (1024, 1024))
    with pytest.raises(ImageryError) as caught, open_raster(path) as ds:
        read_window(ds, grid, [1])
    assert "cut.tif" in str(caught.value)
    with pytest.raises(ImageryError, match=r"rows \d+-\d+, columns \d+-\d+"):
        _read_tail(make_tif, values, grid)


def _read_tail(make_tif, values, grid):
    """A file whose header is whole and whose last blocks hold rubbish."""
    path = make_tif(
        values, NORTH_UP, name="rot.tif", tiled=True, blockxsize=256, blockysize=256, compress="deflate"
    )
    data = bytearray(path.read_bytes())
    with rasterio.open(path) as ds:
        offset = int(ds.get_tag_item("BLOCK_OFFSET_3_3", "TIFF", bidx=1))
    data[offset : offset + 4000] = b"\x00" * 4000
    path.write_bytes(data)
    with open_raster(path) as ds:
        assert read_window(ds, grid.window(0, 0, 256, 256), [1])[1].all()
        read_window(ds, grid.window(700, 700, 324, 324), [1])


def test_jpeg_damage_that_gdal_only_logs_is_an_error(make_tif, rng):
    import scipy.ndimage

    noise = scipy.ndimage.gaussian_filter(rng.uniform(0, 255, (3, 512, 512)), (0, 3, 3))
    image = np.interp(noise, (noise.min(), noise.max()), (0, 255)).astype("uint8")
    path = make_tif(
        image,
        NORTH_UP,
        name="photo.tif",
        tiled=True,
        compress="jpeg",
        photometric="ycbcr",
        blockxsize=256,
        blockysize=256,
    )
    data = bytearray(path.read_bytes())
    with rasterio.open(path) as ds:
        offset = int(ds.get_tag_item("BLOCK_OFFSET_1_1", "TIFF", bidx=1))
        size = int(ds.get_tag_item("BLOCK_SIZE_1_1", "TIFF", bidx=1))
    data[offset + size // 3 : offset + size // 3 + 2] = b"\xff\xd9"  # an early end-of-image marker
    path.write_bytes(data)
    grid = Grid.of(32610, NORTH_UP, (512, 512))
    ds = open_raster(path)
    for _ in range(2):  # the second read may not be served from a cache of wrong pixels
        with pytest.raises(ImageryError, match=r"photo\.tif"):
            read_window(ds if not ds.closed else open_raster(path), grid, [1, 2, 3])


# ---- against GDAL, and what it costs --------------------------------------------------------------
@pytest.mark.parametrize(("crs", "pixel"), [("EPSG:2154", 0.6), ("EPSG:32631", 0.7), ("EPSG:3857", 0.9)])
def test_values_are_gdals_own_bilinear_ones(rng, make_tif, crs, pixel):
    """rasterio.warp.reproject, exact transformer, kernel of one pixel."""
    values = rng.uniform(0, 100, (2, 700, 700)).astype("float32")
    source = Affine(0.8, 0, 500_000, 0, -0.8, 5_000_000)
    move = pyproj.Transformer.from_crs(32631, crs, always_xy=True)
    x, y = move.transform(500_070, 4_999_930)
    grid = Grid.from_bounds((x, y - 350, x + 350, y), crs, pixel)
    reference = np.full((2, *grid.shape), np.nan, dtype="float32")
    rasterio.warp.reproject(
        values,
        reference,
        src_transform=source,
        src_crs="EPSG:32631",
        dst_transform=grid.transform,
        dst_crs=crs,
        dst_nodata=np.nan,
        resampling=rasterio.warp.Resampling.bilinear,
        XSCALE="1",
        YSCALE="1",
    )
    with open_raster(make_tif(values, source, "EPSG:32631")) as ds:
        got, valid = read_window(ds, grid, [1, 2])
    both = valid & np.isfinite(reference[0])
    assert both.mean() > 0.9 and (valid != np.isfinite(reference[0])).sum() <= 4
    # White noise changes by up to 100 a pixel: 0.01 px, what GDAL may be off beside it, is 1.
    assert np.abs(got - reference)[:, both].max() < 1.0
    assert np.abs(got - reference)[:, both].mean() < 0.1


def test_memory_does_not_grow_with_the_shrink():
    """A map of 250 m pixels from an image of 0.6 m (once 11 GB): at most a piece is asked for at a time."""
    from canopy.geo.place import SourcePlace
    from canopy.geo.warp import PIECE_PX, resample

    largest = 0

    def read(row, col, height, width):
        nonlocal largest
        largest = max(largest, height * width)
        return np.ones((1, height, width), "uint8"), np.ones((height, width), bool)

    place = SourcePlace(Affine(0.6, 0, *ORIGIN[:1], 0, -0.6, ORIGIN[1]), to_crs(32610), 9_000, 9_000)
    for crs, pixel in ((32611, 250.0), (32610, 120.0), (32610, 601.3)):
        west, south, east, north = (
            AOI(box(ORIGIN[0], ORIGIN[1] - 5400, ORIGIN[0] + 5400, ORIGIN[1]), 32610)
            .to_crs(crs)
            .geometry.bounds
        )
        values, valid = resample(place, Grid.from_bounds((west, south, east, north), crs, pixel), read, 1)
        assert valid.mean() > 0.7 and (values[0][valid] == 1).all()
    assert 0 < largest <= PIECE_PX**2
