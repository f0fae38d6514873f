"""Height maps as people have them, brought onto any grid: bands, units, tiles, published maps, arrays."""

from __future__ import annotations

import json
import shutil
from datetime import date
from pathlib import Path

import numpy as np
import pytest
import rasterio
from pyproj import Transformer
from shapely.geometry import box, mapping

from canopy.errors import AreaError, FetchError, ImageryError, InputError
from canopy.evaluation.grids import common_grid, read_on
from canopy.evaluation.opening import open_heights
from canopy.evaluation.published import cut_published
from canopy.geo.area import AOI
from canopy.geo.crs import CRS
from canopy.geo.grid import Grid, quadkey_bounds
from canopy.labels.catalog import label_source
from canopy.runtime import bundled_dir

UTM, WEST, NORTH = "EPSG:32618", 500_000.0, 4_882_000.0
PX = 256  # a published tile has 32768 or 65536: the layout is the same
V1, V2 = "023010212", "0230102120"


def place(quadkey: str, px: int = PX) -> Grid:
    return Grid.of("EPSG:3857", placed(quadkey, px), (px, px))


def placed(quadkey: str, px: int = PX, shift_px: float = 0.0) -> rasterio.Affine:
    west, _, east, north = quadkey_bounds(quadkey)
    size = (east - west) / px
    return rasterio.Affine(size, 0, west + shift_px * size, 0, -size, north)


@pytest.fixture
def published(write_map):
    """`published("v1", quadkey, pixels, ...)`: a tile of whole metres, and its `.tif.msk` (255 = masked)."""

    def write(root, quadkey, pixels, *, nodata=None, shift_px=0.0, mask=None, mask_folder="msk"):
        web = {"crs": "EPSG:3857", "transform": placed(quadkey, shift_px=shift_px), "names": ()}
        if mask is not None:
            none = {"crs": None, "transform": rasterio.Affine.identity(), "nodata": None, "names": ()}
            write_map(f"{root}/{mask_folder}/{quadkey}.tif.msk", mask, **none)
        return write_map(f"{root}/chm/{quadkey}.tif", pixels, nodata=nodata, **web)

    return write


def whole_metres(seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 40, (PX, PX)).astype(np.uint8)


# ---- published maps -------------------------------------------------------------------------------
@pytest.mark.parametrize("mask_folder", ["msk", "chm"])
def test_v1_tile_reads_with_its_inverted_mask(published, tmp_path, mask_folder):
    """255 in the .tif.msk is cloud; 255 in the map is never a height; 0 m stays one; nothing bleeds."""
    heights = whole_metres()
    heights[:10], heights[20:30, 20:30], heights[100:120] = 0, 255, 200
    mask = np.where(heights == 200, 255, 0).astype(np.uint8)
    published("v1", V1, heights, mask=mask, mask_folder=mask_folder)
    with open_heights(tmp_path / "v1") as product:
        assert product.kind == "published v1" and product.step_m == 1.0
        (height,), valid = product.read(place(V1))
        np.testing.assert_array_equal(valid, (heights != 255) & (mask == 0))
        np.testing.assert_array_equal(height[valid], heights[valid])
        t = placed(V1)
        moved = Grid.of("EPSG:3857", (t.a, 0, t.c + 0.3 * t.a, 0, t.e, t.f + 0.4 * t.e), (PX, PX))
        for grid in (moved, place(V1, PX // 8)):
            (height,), valid = product.read(grid)
            assert valid.any() and not valid.all() and height[valid].max() < 41


def test_v2_tiles_of_a_folder_are_one_map(published, tmp_path):
    """Two neighbouring zoom-10 tiles: a window across their edge has both; a list of files is the same."""
    left, right = whole_metres(1), whole_metres(2)
    paths = [published("v2", V2, left, nodata=255), published("v2", "0230102121", right, nodata=255)]
    for name in (tmp_path / "v2", paths):
        with open_heights(name) as product:
            assert product.kind == "published v2" and len(product.tiles) == 2
            assert not any("cannot be told apart" in note for note in product.notes)
            (height,), valid = product.read(place(V2).window(10, PX - 20, 50, 40))
        assert valid.all()
        np.testing.assert_array_equal(height, np.hstack([left, right])[10:60, PX - 20 : PX + 20])


def test_what_published_tiles_do_not_say_is_said(published, tmp_path):
    heights = whole_metres()
    for version, quadkey in (("v1", V1), ("v2", V2)):
        published(version, quadkey, heights)
        with open_heights(tmp_path / version) as product:
            assert any("cannot be told apart" in note for note in product.notes)
            assert any("whole multiples of 1 m" in note for note in product.notes)
    published("zero", V2, heights, nodata=0)
    with open_heights(tmp_path / "zero") as product:
        np.testing.assert_array_equal(product.read(place(V2))[1], heights > 0)
        assert any("declare 0 as missing" in note for note in product.notes)
    with open_heights(tmp_path / "zero", nodata=254) as product:
        assert product.read(place(V2))[1].all() and not any("declare 0" in note for note in product.notes)
    with open_heights(published("elsewhere", V1, heights, shift_px=50)) as product:
        assert product.kind == "map", "its name is a quadkey, its place is another one"


def dated(*days_and_outlines) -> str:
    """A published `metadata/QUADKEY.geojson`: outlines of images with their dates."""
    rows = [
        {"type": "Feature", "properties": {"acq_date": day}, "geometry": outline and mapping(outline)}
        for day, outline in days_and_outlines
    ]
    return json.dumps({"type": "FeatureCollection", "features": rows})


@pytest.mark.parametrize(("version", "quadkey"), [("v1", V1), ("v2", V2)])
def test_dates_beside_published_tiles(published, tmp_path, version, quadkey):
    published(version, quadkey, whole_metres())
    (tmp_path / version / "metadata").mkdir()
    text = dated(("2018-05-02", None), ("2020-11-30", None), ("2019-01-01", None))
    (tmp_path / version / "metadata" / f"{quadkey}.geojson").write_text(text)
    with open_heights(tmp_path / version) as product:
        assert product.dates == ("2018-05-02", "2020-11-30")
        assert any("cannot be told apart" in note for note in product.notes), "dates, but no outlines"


def test_outside_the_outlines_of_its_images_a_silent_tile_is_not_mapped(published, tmp_path):
    """0 m inside them is open ground; a tile that has a mask of its own is believed instead."""
    west_half, heights = half_of(V2), np.zeros((PX, PX), np.uint8)
    published("v2", V2, heights)
    (tmp_path / "v2" / "metadata").mkdir()
    (tmp_path / "v2" / "metadata" / f"{V2}.geojson").write_text(dated(("2020-11-30", west_half)))
    with open_heights(tmp_path / "v2") as product:
        height, valid = product.read(place(V2))
        assert valid[:, : PX // 2 - 1].all() and not valid[:, PX // 2 + 1 :].any() and not height.any()
        assert any("outside the outlines" in note for note in product.notes)
    published("v2", V2, heights, nodata=255)
    with open_heights(tmp_path / "v2") as product:
        assert product.read(place(V2))[1].all() and product.dates == ("2020-11-30",)


def half_of(quadkey: str, east: bool = False):
    """The western or eastern half of a tile, longitude and latitude."""
    west, south, right, north = quadkey_bounds(quadkey)
    middle = (west + right) / 2
    x, y = Transformer.from_crs(3857, 4326, always_xy=True).transform(
        [middle if east else west, right if east else middle], [south, north]
    )
    return box(x[0], y[0], x[1], y[1])


# ---- cut ------------------------------------------------------------------------------------------
@pytest.fixture
def bucket(published, server, tmp_path, monkeypatch):
    """Two neighbouring tiles of each published map, in the real folders of the bucket, on this machine."""
    paths = {"v1": "/forests/v1/alsgedi_global_v6_float", "v2": "/forests/v2/global/dinov3_global_chm_v2_ml3"}
    heights = {}
    for version, keys in (("v1", (V1, "023010213")), ("v2", (V2, "0230102121"))):
        for number, key in enumerate(keys):
            values = whole_metres(number)
            values[:40] = 0  # open ground
            values[-30:] = 255 if version == "v2" else 0  # not mapped
            mask = None
            if version == "v1":
                mask = np.zeros((PX, PX), np.uint8)
                mask[-30:] = 255
            tile = published(version, key, values, mask=mask)
            server.put(f"{paths[version]}/chm/{key}.tif", Path(tile).read_bytes())
            if version == "v1":
                server.put(
                    f"{paths[version]}/msk/{key}.tif.msk",
                    (tmp_path / version / "msk" / f"{key}.tif.msk").read_bytes(),
                )
            outlines = dated(("2018-05-02", half_of(key)), ("2020-11-30", half_of(key, east=True)))
            server.put(f"{paths[version]}/metadata/{key}.geojson", outlines)
            heights[key] = values
    shutil.copytree(bundled_dir("data_manifests"), tmp_path / "mirrored")
    for path in tmp_path.glob("mirrored/labels/meta-*.yaml"):
        path.write_text(path.read_text().replace("https://dataforgood-fb-data.s3.amazonaws.com", server.url))
    monkeypatch.setenv("CANOPY_MANIFESTS", str(tmp_path / "mirrored"))
    return heights


@pytest.mark.parametrize(("version", "keys"), [("v1", (V1, "023010213")), ("v2", (V2, "0230102121"))])
def test_a_published_map_is_cut_with_its_validity_and_dates(bucket, server, tmp_path, version, keys):
    """Across the border of two tiles; the host fails once."""
    lattice = place(keys[0])
    wanted = lattice.window(100, 200, 156, 112)  # 56 px of the first tile, 56 px of the second
    west, south, east, north = wanted.bounds
    inset = lattice.pixel[0] / 4
    area = AOI.from_bounds((west + inset, south + inset, east - inset, north - inset), "EPSG:3857")
    server.fail("/metadata/", times=1, status=503)
    out = tmp_path / "cut.tif"
    facts = cut_published(label_source(f"meta-{version}"), area, out)
    assert (facts["width"], facts["height"]) == (112, 156) and facts["licence"] == "CC BY 4.0"
    with rasterio.open(out) as cut:
        assert cut.descriptions == ("canopy_height", "acquisition_date") and cut.units == ("m", "d")
        assert cut.tags()["CANOPY_DATES"] == "2018-05-02/2020-11-30" and cut.tags()["LICENCE"] == "CC BY 4.0"
        np.testing.assert_allclose(cut.bounds, wanted.bounds)
        raw, valid = cut.read(), cut.dataset_mask() > 0
    truth = np.hstack([bucket[keys[0]][100:, 200:], bucket[keys[1]][100:, :56]])
    known = np.arange(100, PX)[:, None] < PX - 30
    np.testing.assert_array_equal(valid, np.broadcast_to(known, valid.shape))
    np.testing.assert_array_equal(np.where(valid, raw[0] / 100, 0), np.where(valid, truth, 0))
    days = {(date(2018, 5, 2) - date(1970, 1, 1)).days, (date(2020, 11, 30) - date(1970, 1, 1)).days}
    assert set(np.unique(raw[1][valid])) == days and (raw[1][0, :50] == max(days)).all()
    with open_heights(out) as product:
        assert product.dates == ("2018-05-02", "2020-11-30")
        assert product.read(wanted)[1].sum() == valid.sum()


def test_where_no_tile_is_nothing_is_written(bucket, server, tmp_path):
    sea = AOI.from_bbox([0.5, -30.0], size_m=500)
    with pytest.raises(AreaError, match="meta-v2 has no tile there"):
        cut_published(label_source("meta-v2"), sea, tmp_path / "sea.tif")
    here = AOI.from_bounds(place(V2).window(10, 10, 50, 50).bounds, "EPSG:3857")
    server.fail("/chm/.*tif", times=99, status=500)
    with pytest.raises(FetchError, match="answered 500"):
        cut_published(label_source("meta-v2"), here, tmp_path / "sea.tif")
    assert not list(tmp_path.glob("*sea*"))


# ---- what people's files are like -----------------------------------------------------------------
def test_compact_encodings_and_interval_bands(write_map, forest):
    heights = forest(60)
    cm = np.stack([heights * 100, heights * 90, heights * 120]).round().astype(np.uint16)
    cm[:, 5, 5] = 65535
    names = ("canopy_height", "height_lower", "height_upper")
    path = write_map("cm.tif", cm, nodata=65535, names=names, tags={"CANOPY_INTERVAL": "0.8"}, scale=0.01)
    with open_heights(path) as product:
        assert product.has_interval and product.level == 0.8 and product.step_m == pytest.approx(0.01)
        (height, _, upper), valid = product.read(product.lattice, interval=True)
    assert not valid[5, 5] and valid.sum() == valid.size - 1
    np.testing.assert_allclose(height[valid], heights[valid], atol=0.006)
    np.testing.assert_allclose(upper[valid], 1.2 * heights[valid], atol=0.006)


def test_impossible_heights_are_missing_before_any_resampling(write_map):
    """A strip at an undeclared nodata value: no coarse pixel, no pixel of another CRS takes a part of it."""
    strip = np.zeros((100, 100), bool)
    strip[:, 40:53] = True
    for value, nodata in ((-9999, None), (-3.4028235e38, -3.4e38), (1e20, np.nan)):
        heights = np.where(strip, np.float32(value), np.float32(20))
        with open_heights(write_map("strip.tif", heights, nodata=nodata)) as opened:
            np.testing.assert_array_equal(opened.read(opened.lattice)[1], ~strip)
            note = next(note for note in opened.notes if "impossible heights" in note)
            assert ": 13 % of its pixels" in note and f"{np.float32(value):.6g} m" in note
            coarse = Grid.of(UTM, (3.3, 0, WEST + 0.7, 0, -3.3, NORTH), (30, 30))
            for grid in (coarse, AOI.from_grid(opened.lattice).grid("EPSG:32619", 1.5)):
                (height,), valid = read_on(opened, grid)
                assert valid.any() and not valid.all()
                np.testing.assert_allclose(height[valid], 20, rtol=1e-6)


@pytest.mark.parametrize(
    ("unit", "metres"),
    [("ft", 0.3048), ("US survey foot", 1200 / 3937), ("us_survey_feet", 1200 / 3937), ("Meters", 1),
     ("international feet", 0.3048), ("cm", 0.01), ("dm", 0.1), ("m", 1), ("furlong", None)],
)  # fmt: skip
def test_the_band_says_its_unit(write_map, forest, unit, metres):
    heights = forest(40)
    path = write_map("u.tif", (heights / (metres or 1)).astype(np.float32))
    with rasterio.open(path, "r+") as dataset:
        dataset.units = (unit,)
    if metres is None:
        with pytest.raises(ImageryError, match=r"heights in 'furlong'.*feet"):
            open_heights(path)
        return
    with open_heights(path) as opened:
        np.testing.assert_allclose(opened.read(opened.lattice)[0][0], heights, rtol=1e-5)
        assert any(f"in {unit} and were converted" in note for note in opened.notes) == (metres != 1)


def test_which_band_is_the_height(write_map, forest):
    heights = forest(30)
    ground = np.full_like(heights, 215)
    for names in (("DSM", "DTM", "CHM"), ("zmean", "zsd", "Canopy height (m)"), ("a", "b", "canopy_height")):
        with open_heights(write_map("b.tif", np.stack([ground, ground, heights]), names=names)) as opened:
            np.testing.assert_array_equal(opened.read(opened.lattice)[0][0], heights)
    path = write_map("z.tif", np.stack([ground, heights]), names=("zmean", "zmax"))
    with pytest.raises(ImageryError, match=r"holds 2 bands \(1 zmean, 2 zmax\).*--band"):
        open_heights(path)
    for band in (2, "2", "ZMAX"):
        with open_heights(path, band=band) as opened:
            np.testing.assert_array_equal(opened.read(opened.lattice)[0][0], heights)
    for band in (3, 0, "zmin"):
        with pytest.raises(ImageryError, match=r"no band .*1 zmean, 2 zmax"):
            open_heights(path, band=band)


def test_bad_inputs_are_named(published, tmp_path, write_map, forest):
    (tmp_path / "empty").mkdir()
    (tmp_path / "text.tif").write_text("not a raster")
    write_map("rgb.tif", np.full((3, 20, 20), 9, np.uint8), nodata=None, names=(), photometric="RGB")
    published("mix", V2, whole_metres())
    published("mix", "023010213", whole_metres())
    for name, words in (
        ("empty", "no height tiles"), ("text.tif", "not a readable raster"),
        ("missing.tif", "no such file"), ("rgb.tif", "colour image"), ("mix", "different products"),
    ):  # fmt: skip
        with pytest.raises(ImageryError, match=words):
            open_heights(tmp_path / name)
    published("wrong", V1, whole_metres(), mask=np.zeros((PX // 2, PX), np.uint8))
    with open_heights(tmp_path / "wrong") as product, pytest.raises(ImageryError, match="mask of 256 x 128"):
        product.read(place(V1))
    here, there = write_map("here.tif", forest(40)), write_map("there.tif", forest(40), crs="EPSG:32633")
    with open_heights(here) as a, open_heights(there) as b, pytest.raises(InputError, match="do not overlap"):
        common_grid(a, b)


def test_a_three_dimensional_crs_is_its_horizontal_part(write_map, forest):
    wkt = CRS(UTM).proj.to_3d().to_wkt()
    three = write_map("three.tif", forest(30), crs=rasterio.crs.CRS.from_wkt(wkt))
    with open_heights(write_map("flat.tif", forest(30))) as flat, open_heights(three) as deep:
        assert deep.lattice.is_aligned(flat.lattice) and "ellipsoidal height" not in deep.crs.proj.to_wkt()


def test_arrays_are_read_as_files_are(write_map, forest):
    """As rioxarray opens them: scaled integers, nodata, band names, a lazy array, rows from the south."""
    import rioxarray
    import xarray

    heights = forest(50)
    cm = np.where(heights > 20, 65535, heights * 100).round().astype(np.uint16)
    path = write_map("cm.tif", cm, nodata=65535, tags={"CANOPY_DATES": "2020-05-01"}, scale=0.01)
    with open_heights(path) as file:
        expected, dates, lattice = file.read(file.lattice), file.dates, file.lattice
    plain = rioxarray.open_rasterio(path)
    masked = rioxarray.open_rasterio(path, mask_and_scale=True, chunks=16)
    for array in (plain, masked, masked.squeeze("band"), masked.isel(y=slice(None, None, -1))):
        with open_heights(array) as opened:
            for got, was in zip(opened.read(lattice), expected, strict=True):
                np.testing.assert_allclose(got, was, atol=1e-6)
            assert array is not plain or opened.dates == dates
    with open_heights(masked.assign_attrs(units="ft")) as opened:
        np.testing.assert_allclose(opened.read(lattice)[0], expected[0] * 0.3048, atol=1e-5)
    bare = xarray.DataArray(np.zeros((4, 5)), dims=("y", "x"), coords={"y": [4, 3, 2, 1], "x": range(5)})
    for array, words in (
        (np.zeros((4, 5)), "a ndarray is no height map; expected a path"),
        (bare, r"no coordinate reference system.*write_crs"),
        (xarray.DataArray(np.zeros((4, 5)), dims=("row", "column")), r"expected \(y, x\)"),
    ):
        with pytest.raises(ImageryError, match=words):
            open_heights(array)


# ---- onto another grid ----------------------------------------------------------------------------
def loop_mean(values: np.ndarray, gsd: float, grid: Grid) -> tuple[np.ndarray, np.ndarray]:
    """Area-weighted mean over every target pixel by plain loops; valid where half of it is."""
    out, ok = np.zeros(grid.shape), np.zeros(grid.shape, bool)
    side = grid.pixel[0] / gsd
    h, w = values.shape
    for i in range(grid.height):
        for j in range(grid.width):
            x, y = grid.xy(i, j)
            left, top = (x - WEST) / gsd, (NORTH - y) / gsd
            total = area = 0.0
            for r in range(max(0, int(np.floor(top))), min(h, int(np.ceil(top + side)))):
                for c in range(max(0, int(np.floor(left))), min(w, int(np.ceil(left + side)))):
                    high = min(top + side, r + 1) - max(top, r)
                    wide = min(left + side, c + 1) - max(left, c)
                    if high > 0 and wide > 0 and np.isfinite(values[r, c]):
                        total, area = total + high * wide * values[r, c], area + high * wide
            if area >= 0.5 * side**2 - 1e-6:
                out[i, j], ok[i, j] = total / area, True
    return out, ok


@pytest.mark.parametrize(("size", "dx", "dy"), [(1.0, 0.3, 0.7), (2.0, 0.25, 0.5), (3.7, -1.1, 2.2)])
def test_mean_is_exactly_area_weighted_in_any_parts(write_map, monkeypatch, size, dx, dy):
    rng = np.random.default_rng(0)
    values = rng.gamma(2, 5, (26, 31)).astype(np.float32)
    values[rng.random(values.shape) < 0.25] = np.nan
    grid = Grid.of(UTM, (size, 0, WEST + dx, 0, -size, NORTH - dy), (9, 8))
    expected, ok = loop_mean(values, 0.6, grid)
    with open_heights(write_map("a.tif", values, gsd=0.6)) as side:
        (got,), valid = read_on(side, grid, "mean")
        monkeypatch.setattr("canopy.evaluation.grids._SOURCE_PX", 20)
        for whole, parts in zip((got, valid), read_on(side, grid, "mean"), strict=True):
            np.testing.assert_allclose(whole, np.squeeze(parts), atol=1e-9)
    np.testing.assert_array_equal(valid, ok)
    np.testing.assert_allclose(got[ok], expected[ok], rtol=1e-6)
    assert (got[~ok] == 0).all()
