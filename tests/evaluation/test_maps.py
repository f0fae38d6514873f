"""Reading anybody's height map: bands, units, missing values, arrays, and the published quadkey tiles."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import rasterio
from odc.geo import CRS

from canopy.errors import ImageryError, InputError
from canopy.evaluation.grids import common_grid, read_on
from canopy.evaluation.opening import open_heights
from canopy.geo.area import AOI
from canopy.geo.grid import Grid, quadkey_bounds


class Got:
    def __init__(self, values, valid):
        self.height_m, self.upper_m, self.valid = values[0], values[-1], valid


PX = 256  # a published tile has 32768 or 65536: the layout is the same


def quadkey_grid(quadkey: str, px: int) -> Grid:
    """The grid of px x px pixels that fills a quadkey."""
    west, south, east, north = quadkey_bounds(quadkey)
    return Grid.from_bounds((west, south, east, north), "EPSG:3857", (east - west) / px)


def published_tile(
    root: Path, quadkey: str, pixels: np.ndarray, *, nodata: float | None = None, shift_px: float = 0.0,
    mask: np.ndarray | None = None, mask_folder: str = "msk",
) -> Path:  # fmt: skip
    """One uint8 tile of whole metres at its quadkey's place, and its `.tif.msk` (255 = masked, no GDAL
    mark).
    """
    west, _, east, north = quadkey_bounds(quadkey)
    size = (east - west) / pixels.shape[1]
    transform = rasterio.Affine(size, 0, west + shift_px * size, 0, -size, north)
    path = root / "chm" / f"{quadkey}.tif"
    path.parent.mkdir(parents=True, exist_ok=True)
    with rasterio.open(
        path, "w", driver="GTiff", count=1, dtype="uint8", height=pixels.shape[0], width=pixels.shape[1],
        crs="EPSG:3857", transform=transform, nodata=nodata,
    ) as dataset:  # fmt: skip
        dataset.write(pixels[None])
    if mask is not None:
        folder = root / mask_folder
        folder.mkdir(parents=True, exist_ok=True)
        with rasterio.open(
            folder / f"{quadkey}.tif.msk", "w", driver="GTiff", count=1, dtype="uint8",
            height=mask.shape[0], width=mask.shape[1],
        ) as dataset:  # fmt: skip
            dataset.write(mask[None])
    return path


def whole_metres(seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 40, (PX, PX)).astype(np.uint8)


@pytest.mark.parametrize("mask_folder", ["msk", "chm"])
def test_v1_tile_reads_with_its_inverted_mask(tmp_path, mask_folder):
    """255 in the .tif.msk is cloud; 255 in the map is never a height, tagged or not; 0 m stays a height."""
    heights = whole_metres()
    heights[:10] = 0
    heights[20:30, 20:30] = 255
    mask = np.zeros((PX, PX), np.uint8)
    mask[100:120] = 255
    published_tile(tmp_path, "023010212", heights, mask=mask, mask_folder=mask_folder)
    with open_heights(tmp_path) as product:
        assert product.kind == "published v1" and product.step_m == 1.0
        got = Got(*product.read(quadkey_grid("023010212", PX)))
    np.testing.assert_array_equal(got.valid, (heights != 255) & (mask == 0))
    np.testing.assert_array_equal(got.height_m[got.valid], heights[got.valid])
    assert got.valid[:10].all()


def test_a_masked_pixel_never_enters_a_resampled_one(tmp_path):
    heights = np.full((PX, PX), 10, np.uint8)
    heights[100:120] = 200  # under the cloud
    mask = np.where(heights == 200, 255, 0).astype(np.uint8)
    published_tile(tmp_path, "023010212", heights, mask=mask)
    whole = quadkey_grid("023010212", PX)
    px = whole.pixel[0]
    with open_heights(tmp_path) as product:
        moved = Grid.of(
            "EPSG:3857", (px, 0, whole.bounds[0] + 0.3 * px, 0, -px, whole.bounds[3] - 0.4 * px), (PX, PX)
        )
        coarse = quadkey_grid("023010212", PX // 8)
        for grid in (moved, coarse):
            got = Got(*product.read(grid))
            assert got.valid.any() and not got.valid.all()
            np.testing.assert_allclose(got.height_m[got.valid], 10, atol=1e-5)


def test_v2_tiles_of_a_folder_are_one_map(tmp_path):
    """Two neighbouring zoom-10 tiles: a window across their edge has both and no gap."""
    left, right = whole_metres(1), whole_metres(2)
    for name, pixels in (("0230102120", left), ("0230102121", right)):
        published_tile(tmp_path, name, pixels, nodata=255)
    grid = quadkey_grid("0230102120", PX)
    with open_heights(tmp_path) as product:
        assert product.kind == "published v2" and len(product.tiles) == 2
        assert not any("cannot be told apart" in note for note in product.notes)
        got = Got(*product.read(grid.window(10, PX - 20, 50, 40)))
    assert got.valid.all()
    np.testing.assert_array_equal(got.height_m, np.hstack([left, right])[10:60, PX - 20 : PX + 20])


def test_without_mask_or_nodata_the_confusion_is_said(tmp_path):
    published_tile(tmp_path / "v2", "0230102120", whole_metres())
    published_tile(tmp_path / "v1", "023010212", whole_metres())
    for version in ("v1", "v2"):
        with open_heights(tmp_path / version) as product:
            assert any("cannot be told apart" in note for note in product.notes)
            assert any("whole multiples of 1 m" in note for note in product.notes)


def test_a_tile_that_declares_zero_missing_is_followed_and_said(tmp_path):
    heights = whole_metres()
    published_tile(tmp_path, "0230102120", heights, nodata=0)
    with open_heights(tmp_path) as product:
        got = Got(*product.read(quadkey_grid("0230102120", PX)))
        assert any("declare 0 as missing" in note for note in product.notes)
    np.testing.assert_array_equal(got.valid, heights > 0)
    with open_heights(tmp_path, nodata=254) as product:
        assert product.read(quadkey_grid("0230102120", PX))[1].all()


def test_a_quadkey_name_elsewhere_is_no_published_tile(tmp_path):
    path = published_tile(tmp_path, "023010212", whole_metres(), shift_px=50)
    with open_heights(path) as product:
        assert product.kind == "map"


def test_dates_beside_published_tiles(tmp_path):
    published_tile(tmp_path / "v1", "023010212", whole_metres())
    meta = tmp_path / "v1" / "metadata"
    meta.mkdir()
    days = ["2018-05-02", "2020-11-30", "2019-01-01"]
    features = [{"type": "Feature", "geometry": None, "properties": {"acq_date": day}} for day in days]
    (meta / "023010212.geojson").write_text(json.dumps({"type": "FeatureCollection", "features": features}))
    with open_heights(tmp_path / "v1") as product:
        assert product.dates == ("2018-05-02", "2020-11-30")
    published_tile(tmp_path / "v2", "0230102120", whole_metres())
    (tmp_path / "v2" / "metadata").mkdir()
    years = np.array([[17, 17], [21, 0]], np.uint8).repeat(128, 0).repeat(128, 1)
    source = tmp_path / "v2" / "chm" / "0230102120.tif"
    with (
        rasterio.open(source) as tile,
        rasterio.open(tmp_path / "v2" / "metadata" / "0230102120.tif", "w", **tile.profile) as dataset,
    ):
        dataset.write(years[None])
    with open_heights(tmp_path / "v2") as product:
        assert product.dates == ("2017", "2021")


def test_list_file_and_sequence(tmp_path):
    left = published_tile(tmp_path, "0230102120", whole_metres(1))
    right = published_tile(tmp_path, "0230102121", whole_metres(2))
    listing = tmp_path / "tiles.txt"
    listing.write_text(f"# tiles\nchm/{left.name}\n{right}\n")
    for name in (listing, [left, right]):
        with open_heights(name) as product:
            assert len(product.tiles) == 2


def test_compact_encodings_and_interval_bands(write_map, forest):
    heights = forest(60)
    centimetres = np.stack([heights * 100, heights * 90, heights * 120]).round().astype(np.uint16)
    centimetres[:, 5, 5] = 65535
    names = ("canopy_height", "height_lower", "height_upper")
    path = write_map("cm.tif", centimetres, nodata=65535, names=names, tags={"CANOPY_INTERVAL": "0.8"})
    with rasterio.open(path, "r+") as dataset:
        dataset.scales = (0.01, 0.01, 0.01)
    with open_heights(path) as product:
        assert product.has_interval and product.level == 0.8 and product.step_m == pytest.approx(0.01)
        got = Got(*product.read(product.lattice, interval=True))
    assert not got.valid[5, 5] and got.valid.sum() == got.valid.size - 1
    np.testing.assert_allclose(got.height_m[got.valid], heights[got.valid], atol=0.006)
    np.testing.assert_allclose(got.upper_m[got.valid], 1.2 * heights[got.valid], atol=0.006)


def test_bad_inputs_are_named(tmp_path, write_map, forest):
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty.txt").write_text("\n# nothing\n")
    (tmp_path / "text.tif").write_text("not a raster")
    for name, words in (
        ("empty", "no height tiles"), ("empty.txt", "empty list"), ("text.tif", "not a readable raster"),
        ("missing.tif", "no such file"),
    ):  # fmt: skip
        with pytest.raises(ImageryError, match=words):
            open_heights(tmp_path / name)
    rgb = write_map("rgb.tif", np.full((3, 20, 20), 9, np.uint8), nodata=None, names=(), photometric="RGB")
    with pytest.raises(ImageryError, match="colour image"):
        open_heights(rgb)
    published_tile(tmp_path / "mix", "0230102120", whole_metres())
    published_tile(tmp_path / "mix", "023010213", whole_metres())
    with pytest.raises(ImageryError, match="different products"):
        open_heights(tmp_path / "mix")
    wrong = np.zeros((PX // 2, PX), np.uint8)
    published_tile(tmp_path / "wrong", "023010212", whole_metres(), mask=wrong)
    with open_heights(tmp_path / "wrong") as product, pytest.raises(ImageryError, match="mask of 256 x 128"):
        product.read(quadkey_grid("023010212", PX))
    here, there = write_map("here.tif", forest(40)), write_map("there.tif", forest(40), crs="EPSG:32633")
    with open_heights(here) as a, open_heights(there) as b, pytest.raises(InputError, match="do not overlap"):
        common_grid(a, b)


# ---- what people's files are like -----------------------------------------------------------------
def test_impossible_heights_are_missing_before_any_resampling(write_map, forest):
    """A strip at an undeclared nodata value: no coarse pixel, no pixel of another CRS takes a part of it."""
    heights = np.full((100, 100), 20, np.float32)
    strip = np.zeros(heights.shape, bool)
    strip[:, 40:53] = True
    for value, nodata in ((-9999, None), (-3.4028235e38, -3.4e38), (1e20, np.nan)):
        path = write_map("strip.tif", np.where(strip, np.float32(value), heights), nodata=nodata)
        with open_heights(path) as opened:
            own = Got(*opened.read(opened.lattice))
            np.testing.assert_array_equal(own.valid, ~strip)
            note = next(note for note in opened.notes if "impossible heights" in note)
            assert f"{np.float32(value):.6g} m" in note and "undeclared nodata" in note
            t = opened.lattice.transform
            coarse = Grid.of(opened.crs, (3.3, 0, t.c + 0.7, 0, -3.3, t.f), (30, 30))
            for grid in (coarse, AOI.from_grid(opened.lattice).grid("EPSG:32619", 1.5)):
                got = Got(*read_on(opened, grid))
                assert got.valid.any() and not got.valid.all()
                np.testing.assert_allclose(got.height_m[got.valid], 20, rtol=1e-6)


@pytest.mark.parametrize(
    ("unit", "metres"),
    [("ft", 0.3048), ("US survey foot", 1200 / 3937), ("cm", 0.01), ("dm", 0.1), ("metre", 1), ("m", 1)],
)
def test_the_band_says_its_unit(write_map, forest, unit, metres):
    heights = forest(40)
    path = write_map("u.tif", (heights / metres).astype(np.float32))
    with rasterio.open(path, "r+") as dataset:
        dataset.units = (unit,)
    with open_heights(path) as opened:
        np.testing.assert_allclose(opened.read(opened.lattice)[0][0], heights, rtol=1e-5)
        assert any(f"in {unit} and were converted" in note for note in opened.notes) == (metres != 1)


def test_an_unknown_unit_is_refused(write_map, forest):
    path = write_map("u.tif", forest(20))
    with rasterio.open(path, "r+") as dataset:
        dataset.units = ("furlong",)
    with pytest.raises(ImageryError, match=r"heights in 'furlong'.*feet"):
        open_heights(path)


def test_the_band_that_says_canopy_height_is_taken(write_map, forest):
    heights = forest(30)
    ground = np.full_like(heights, 215)
    for names in (("DSM", "DTM", "CHM"), ("zmean", "zsd", "Canopy height (m)"), ("a", "b", "canopy_height")):
        path = write_map("bands.tif", np.stack([ground, ground, heights]), names=names)
        with open_heights(path) as opened:
            np.testing.assert_array_equal(opened.read(opened.lattice)[0][0], heights)


def test_other_bands_are_named_and_asked_for(write_map, forest):
    heights = forest(30)
    path = write_map("z.tif", np.stack([heights + 9, heights]), names=("zmean", "zmax"))
    with pytest.raises(ImageryError, match=r"holds 2 bands \(1 zmean, 2 zmax\).*--band"):
        open_heights(path)
    for band in (2, "2", "zmax", "ZMAX"):
        with open_heights(path, band=band) as opened:
            np.testing.assert_array_equal(opened.read(opened.lattice)[0][0], heights)
    for band in (3, 0, "zmin"):
        with pytest.raises(ImageryError, match=r"no band .*1 zmean, 2 zmax"):
            open_heights(path, band=band)


def test_a_three_dimensional_crs_is_its_horizontal_part(write_map, forest):
    path = write_map("flat.tif", forest(30))
    wkt = CRS("EPSG:32618").proj.to_3d().to_wkt()
    three = write_map("three.tif", forest(30), crs=rasterio.crs.CRS.from_wkt(wkt))
    with open_heights(path) as flat, open_heights(three) as deep:
        assert deep.lattice.is_aligned(flat.lattice) and not deep.crs.proj.to_wkt().count(
            "ellipsoidal height"
        )


def test_arrays_are_read_as_files_are(write_map, forest):
    """As rioxarray opens them: scaled integers, nodata, band names, a lazy array, rows from the south."""
    import rioxarray

    heights = forest(50)
    cm = np.where(heights > 20, 65535, heights * 100).round().astype(np.uint16)
    path = write_map("cm.tif", cm, nodata=65535, tags={"CANOPY_DATES": "2020-05-01"})
    with rasterio.open(path, "r+") as dataset:
        dataset.scales = (0.01,)
    with open_heights(path) as file:
        expected, dates = Got(*file.read(file.lattice)), file.dates
        lattice = file.lattice
    plain = rioxarray.open_rasterio(path)
    masked = rioxarray.open_rasterio(path, mask_and_scale=True, chunks=16)
    for array in (plain, masked, masked.squeeze("band"), masked.isel(y=slice(None, None, -1))):
        with open_heights(array) as opened:
            got = Got(*opened.read(lattice))
            np.testing.assert_array_equal(got.valid, expected.valid)
            np.testing.assert_allclose(got.height_m, expected.height_m, atol=1e-6)
    with open_heights(plain) as opened:
        assert opened.dates == dates


def test_an_array_without_its_place_is_refused():
    import xarray

    with pytest.raises(ImageryError, match="a ndarray is no height map; expected a path"):
        open_heights(np.zeros((4, 5)))

    bare = xarray.DataArray(np.zeros((4, 5)), dims=("y", "x"), coords={"y": [4, 3, 2, 1], "x": range(5)})
    with pytest.raises(ImageryError, match=r"no coordinate reference system.*write_crs"):
        open_heights(bare)
    with pytest.raises(ImageryError, match=r"expected \(y, x\)"):
        open_heights(xarray.DataArray(np.zeros((4, 5)), dims=("row", "column")))
