"""Bad and odd inputs through the command line: the right behaviour of each, and nothing written on exit 2."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
import rasterio


@pytest.fixture
def predict(canopy, model_file, tmp_path):
    """Run `canopy predict`; on exit 2 check that the error is one line and that nothing was written."""

    def run(*words: object, code: int = 0):
        before = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*")}
        done = canopy("predict", *words, "--model", model_file, "-o", "chm.tif")
        assert done.code == code, done.err
        if code:
            assert done.out == ""
            assert done.error_line.startswith("canopy: ")
            assert "Traceback" not in done.err
            assert {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*")} == before, "something was written"
        return done

    return run


def grey(height: int = 100, width: int = 120) -> np.ndarray:
    return np.full((1, height, width), 90, np.uint8)


def rgb(height: int = 100, width: int = 120, seed: int = 0) -> np.ndarray:
    from scipy import ndimage

    rng = np.random.default_rng(seed)
    noise = ndimage.gaussian_filter(rng.normal(size=(3, height, width)), (0, 3, 3))
    return np.clip(noise / noise.std() * 35 + 100, 20, 230).astype(np.uint8)


# ---- 1-8: bands and values --------------------------------------------------------------------
def test_01_rgba_alpha_is_validity_and_said(predict, make_image, heights) -> None:
    alpha = np.full((1, 100, 120), 255, np.uint8)
    alpha[:, 20:40, 30:70] = 0
    image = make_image(
        pixels=np.concatenate([rgb(), alpha]), colours=("red", "green", "blue", "alpha"), photometric="RGB"
    )
    done = predict(image)
    np.testing.assert_array_equal(np.isnan(heights("chm.tif")), alpha[0] == 0)
    assert "alpha" in done.err


def test_02_infrared_band_is_left_out_by_name(predict, make_image, heights) -> None:
    pixels = np.concatenate([rgb(), grey()])
    four = make_image(
        "four.tif", pixels, descriptions=("Red", "Green", "Blue", "NIR"), photometric="MINISBLACK"
    )
    predict(four)
    named = heights("chm.tif")
    predict(make_image("three.tif", rgb(), photometric="RGB"), "--overwrite")
    np.testing.assert_array_equal(named, heights("chm.tif"))


def test_02_ambiguous_bands_ask_for_bands(predict, make_image) -> None:
    unnamed = make_image(pixels=np.concatenate([rgb(), grey(), grey()]), photometric="MINISBLACK")
    assert "--bands" in predict(unnamed, code=2).error_line
    predict(unnamed, "--bands", "1,2,3")


def test_03_uint16_needs_a_scale(predict, make_image, heights) -> None:
    wide = make_image("wide.tif", rgb().astype(np.uint16) * 40, photometric="RGB")
    assert "--scale" in predict(wide, code=2).error_line
    predict(wide, "--scale", 255 * 40)
    scaled = heights("chm.tif")
    predict(make_image("narrow.tif", rgb(), photometric="RGB"), "--overwrite")
    np.testing.assert_allclose(scaled, heights("chm.tif"), atol=1e-3)


def test_04_palette_is_expanded(predict, make_image, heights) -> None:
    index = (rgb()[:1] // 64).astype(np.uint8)
    colours = {i: (40 + 30 * i, 60 + 20 * i, 30 + 10 * i, 255) for i in range(4)}
    predict(make_image("palette.tif", index, colormap=colours))
    expanded = heights("chm.tif")
    table = np.array([colours[i][:3] for i in range(4)], np.uint8)
    predict(make_image("plain.tif", table[index[0]].transpose(2, 0, 1), photometric="RGB"), "--overwrite")
    np.testing.assert_array_equal(expanded, heights("chm.tif"))


def test_05_one_grey_band_is_refused(predict, make_image) -> None:
    image = make_image(pixels=grey())
    assert "image.tif" in predict(image, code=2).error_line


def test_06_band_order_follows_colour_interpretation(predict, make_image, heights) -> None:
    predict(make_image("bgr.tif", rgb()[::-1], colours=("blue", "green", "red"), photometric="MINISBLACK"))
    swapped = heights("chm.tif")
    predict(make_image("rgb.tif", rgb(), photometric="RGB"), "--overwrite")
    np.testing.assert_array_equal(swapped, heights("chm.tif"))


def test_07_float_needs_a_scale_and_08_nan_becomes_nodata(predict, make_image, heights) -> None:
    pixels = (rgb() / 255).astype(np.float32)
    pixels[1, 10:20, 10:30] = np.nan
    pixels[2, 50, 60] = np.inf
    image = make_image(pixels=pixels, photometric="RGB")
    assert "--scale" in predict(image, code=2).error_line
    predict(image, "--scale", "1")
    np.testing.assert_array_equal(np.isnan(heights("chm.tif")), ~np.isfinite(pixels).all(axis=0))


# ---- 9-12: validity ---------------------------------------------------------------------------
def test_09_black_collar_warns_and_takes_nodata(predict, make_image, heights) -> None:
    pixels = rgb(300, 300)
    pixels[:, :, :120] = 0
    image = make_image(pixels=pixels, photometric="RGB")
    assert "--nodata" in predict(image).err
    assert np.isfinite(heights("chm.tif")).all()
    assert "40.0 % of the pixels with heights are pure black" in predict(image, "--overwrite").err
    predict(image, "--nodata", "0", "--overwrite")
    np.testing.assert_array_equal(np.isnan(heights("chm.tif")), (pixels == 0).all(axis=0))


def test_10_nodata_and_alpha_are_intersected(predict, make_image, heights) -> None:
    pixels, alpha = rgb(), np.full((1, 100, 120), 255, np.uint8)
    pixels[:, :30] = 0
    alpha[:, :, :40] = 0
    image = make_image(
        pixels=np.concatenate([pixels, alpha]), nodata=0, colours=("red", "green", "blue", "alpha"),
        photometric="RGB",
    )  # fmt: skip
    predict(image)
    expected = (pixels != 0).all(axis=0) & (alpha[0] > 0)
    np.testing.assert_array_equal(np.isfinite(heights("chm.tif")), expected)


def test_11_an_image_without_a_valid_pixel_maps_to_nodata(predict, make_image, heights) -> None:
    done = predict(make_image(pixels=np.zeros((3, 100, 120), np.uint8), nodata=0, photometric="RGB"))
    assert np.isnan(heights("chm.tif")).all()
    assert "no valid pixel" in done.out


def test_12_masked_cloud_is_nodata_never_zero(predict, make_image, heights) -> None:
    mask = np.ones((100, 120), bool)
    mask[40:60, 40:80] = False
    predict(make_image(pixels=rgb(), mask=mask, photometric="RGB"))
    np.testing.assert_array_equal(np.isfinite(heights("chm.tif")), mask)


# ---- 13-21: place and size --------------------------------------------------------------------
def test_13_no_crs(predict, make_image, heights) -> None:
    image = make_image(pixels=rgb(), crs=None, photometric="RGB")
    assert "--input-crs" in predict(image, code=2).error_line
    predict(image, "--crs", "EPSG:32618")
    first = heights("chm.tif")
    predict(image, "--input-crs", "EPSG:32618", "--overwrite")
    np.testing.assert_array_equal(first, heights("chm.tif"))


@pytest.mark.parametrize("imagery", ["swissimage", "https://tiles.example/{z}/{x}/{y}.png"])
def test_13_the_maps_crs_goes_with_web_tiles(predict, imagery) -> None:
    place = ("--imagery", imagery, "--bbox", "46.9,7.4", "--size-m", "100")
    assert "EPSG:2056" in predict(*place, "--crs", "EPSG:2056", "--dry-run").err
    assert "--input-crs" in predict(*place, "--input-crs", "EPSG:2056", "--dry-run", code=2).error_line


def test_14_degrees_become_metres(predict, make_image) -> None:
    step = 0.5 / 111_320
    image = make_image(
        pixels=rgb(),
        crs="EPSG:4326",
        transform=rasterio.Affine(step, 0, -71.3, 0, -step, 44.1),
        photometric="RGB",
    )
    predict(image)
    with rasterio.open("chm.tif") as made:
        assert made.crs.to_epsg() == 32619
        assert made.res == (0.5, 0.5)


def test_15_files_of_two_zones_make_one_map(predict, make_image, heights) -> None:
    from pyproj import Transformer

    # Two pieces on either side of the border of zones 18 and 19, at 72 degrees west.
    west = make_image("west.tif", rgb(seed=1), photometric="RGB",
                      transform=rasterio.Affine(0.5, 0, 740_000, 0, -0.5, 4_882_000))  # fmt: skip
    x, y = Transformer.from_crs(32618, 32619, always_xy=True).transform(740_060.0, 4_882_000.0)
    east = make_image("east.tif", rgb(seed=2), photometric="RGB", crs="EPSG:32619",
                      transform=rasterio.Affine(0.5, 0, x, 0, -0.5, y))  # fmt: skip
    done = predict(west, east)
    share = np.isfinite(heights("chm.tif")).mean()
    assert 0.8 < share <= 1
    assert "2 more" not in done.err


def test_16_outside_the_projections_domain(predict, make_image) -> None:
    # Web Mercator ends before the pole; a UTM zone on the other side of the Earth is no home either.
    pole = make_image(pixels=rgb(), crs="EPSG:3413", transform=rasterio.Affine(0.5, 0, 0, 0, -0.5, 30))
    predict(pole, "--bands", "1,2,3", "--crs", "EPSG:3857", code=2)


def test_17_rotated_image_is_warped(predict, make_image, heights) -> None:
    turned = (
        rasterio.Affine.translation(500_000, 4_882_000)
        * rasterio.Affine.rotation(30)
        * rasterio.Affine.scale(0.5, -0.5)
    )
    predict(make_image(pixels=rgb(), transform=turned, photometric="RGB"))
    with rasterio.open("chm.tif") as made:
        assert made.transform.b == made.transform.d == 0
        share = np.isfinite(heights("chm.tif")).sum() * 0.25 / (100 * 120 * 0.25)
    assert share == pytest.approx(1, abs=0.05)


def test_18_south_up_equals_north_up(predict, make_image, heights) -> None:
    predict(make_image("north.tif", rgb(), photometric="RGB"))
    north = heights("chm.tif")
    upside_down = rasterio.Affine(0.5, 0, 500_000, 0, 0.5, 4_882_000 - 50)
    predict(make_image("south.tif", rgb()[:, ::-1], transform=upside_down, photometric="RGB"), "--overwrite")
    np.testing.assert_allclose(north, heights("chm.tif"), atol=1e-3)


def test_19_area_across_the_antimeridian(predict, make_image, heights) -> None:
    from pyproj import Transformer

    x, y = Transformer.from_crs(4326, 32601, always_xy=True).transform(-180.0, -16.5)
    image = make_image(
        pixels=rgb(),
        crs="EPSG:32601",
        transform=rasterio.Affine(0.5, 0, x - 30, 0, -0.5, y + 25),
        photometric="RGB",
    )
    done = predict(image)
    assert "179." in done.err or "180." in done.err
    assert np.isfinite(heights("chm.tif")).mean() > 0.85
    # West > east is legal: the same area by its bounds.
    predict(image, "--bounds", "179.9998,-16.5001,-179.9998,-16.4999", "--overwrite")
    assert np.isfinite(heights("chm.tif")).mean() > 0.9


def test_20_near_the_pole_a_polar_crs_is_used(predict, make_image) -> None:
    image = make_image(
        pixels=rgb(),
        crs="EPSG:3413",
        transform=rasterio.Affine(0.5, 0, 100_000, 0, -0.5, 100_000),
        photometric="RGB",
    )
    predict(image)
    with rasterio.open("chm.tif") as made:
        assert made.crs.to_epsg() == 32661


def test_21_other_gsd_is_resampled_and_coarse_is_warned_of(predict, make_image) -> None:
    coarse = make_image(
        pixels=rgb(), transform=rasterio.Affine(1.5, 0, 500_000, 0, -1.0, 4_882_000), photometric="RGB"
    )
    done = predict(coarse)
    with rasterio.open("chm.tif") as made:
        assert made.res == (0.5, 0.5)
        assert (made.height, made.width) == (200, 360)
    assert "less certain" in done.err


# ---- 22-26: areas -----------------------------------------------------------------------------
@pytest.mark.parametrize("shape", [(1, 1), (3, 40), (15, 15)])
def test_22_tiny_images_keep_their_shape(predict, make_image, heights, shape) -> None:
    predict(make_image(pixels=rgb(100, 120)[:, : shape[0], : shape[1]], photometric="RGB"))
    made = heights("chm.tif")
    assert made.shape == shape
    assert np.isfinite(made).all()


def test_23_an_area_past_the_edge_has_its_full_shape(predict, make_image, heights) -> None:
    image = make_image(pixels=rgb(), photometric="RGB")
    predict(image, "--bounds", "499990,4881940,500080,4882010", "--bounds-crs", "EPSG:32618")
    made = heights("chm.tif")
    assert made.shape == (140, 180)
    inside = np.zeros(made.shape, bool)
    inside[20:120, 20:140] = True
    np.testing.assert_array_equal(np.isfinite(made), inside)


def geojson(path: Path, coordinates: list, crs: str | None = None) -> Path:
    import json

    feature = {
        "type": "Feature",
        "properties": {},
        "geometry": {"type": "Polygon", "coordinates": coordinates},
    }
    path.write_text(json.dumps({"type": "FeatureCollection", "features": [feature] if coordinates else []}))
    return path


def test_24_no_overlap_and_empty_area(predict, make_image, tmp_path) -> None:
    image = make_image(pixels=rgb(), photometric="RGB")
    predict(image, "--bbox", "10.0,10.0", "--size-m", "100", code=2)
    predict(image, "--aoi", geojson(tmp_path / "empty.geojson", []), code=2)
    predict(image, "--bounds", "1,1,1,2", code=2)


def test_25_swapped_order_is_recognised(predict, make_image, tmp_path) -> None:
    image = make_image(pixels=rgb(), photometric="RGB")
    line = predict(image, "--bbox", "-75.0,44.09,-74.999,44.08", code=2).error_line
    assert "swap" in line.lower() or "order" in line.lower()
    assert "latitude" in predict(image, "--bbox", "-91.5,44.09", "--size-m", "50", code=2).error_line
    # Self-crossing: repaired (or refused in one line), never a traceback.
    bow = [[[-75.0, 44.0911], [-74.9994, 44.0908], [-74.9994, 44.0911], [-75.0, 44.0908], [-75.0, 44.0911]]]
    done = predict(image, "--aoi", geojson(tmp_path / "bow.geojson", bow))
    assert done.code == 0


def test_26_too_large_is_refused_with_its_cost(predict, make_image) -> None:
    image = make_image(pixels=rgb(), photometric="RGB")
    line = predict(image, "--bbox", "44.0,-75.1,45.5,-73.0", code=2).error_line
    assert "px" in line and "tiles" in line and "GB" in line and "--max-pixels" in line
    assert re.search(r"~\d+ (h|days)", line), "the time is said too"
    assert "--max-pixels" in predict(image, "--max-pixels", "1000", code=2).error_line
    # A coarse map of a large area is small, but its prediction is not.
    predict(image, "--bbox", "44.0,-75.1,45.5,-73.0", "--gsd", "100", code=2)


# ---- 27 and 46: damaged and hostile files -----------------------------------------------------
def test_27_truncated_image_names_file_and_place(predict, make_image) -> None:
    image = make_image(pixels=rgb(900, 900), tiled=True, blockxsize=256, blockysize=256, compress="deflate",
                       photometric="RGB")  # fmt: skip
    image.write_bytes(image.read_bytes()[: image.stat().st_size * 2 // 3])
    line = predict(image, code=2).error_line
    assert "image.tif" in line


def test_46_names_and_files_that_are_not_what_they_seem(predict, tmp_path) -> None:
    predict("/vsizip/a.zip/a.tif", code=2)
    predict("<VRTDataset/>", code=2)
    hidden = tmp_path / "hidden.tif"
    hidden.write_text('<VRTDataset rasterXSize="1" rasterYSize="1"><SRS>EPSG:4326</SRS></VRTDataset>')
    predict(hidden, code=2)


def test_missing_things_are_named(predict, canopy, make_image, tmp_path, small_model) -> None:
    assert "nowhere.tif" in predict("nowhere.tif", code=2).error_line
    image = make_image(pixels=rgb(), photometric="RGB")
    assert canopy("predict", image, "--model", "nothing", "-o", "x.tif").code == 2
    assert canopy("predict", image, "--imagery", "demo", "-o", "x.tif").code == 2
    assert canopy("predict", "-o", "x.tif").code == 2
    uncalibrated = canopy("predict", image, "--model", small_model, "--interval", "0.9")
    assert uncalibrated.code == 2 and "--interval" in uncalibrated.err
    assert not Path("x.tif").exists()


def test_without_imagery_the_best_source_is_chosen_and_said(
    predict, tmp_path, monkeypatch, make_image
) -> None:
    """Two sources of a private manifest folder cover the place: the better-ranked one is used."""
    manifests, images = tmp_path / "manifests" / "imagery", tmp_path / "images"
    manifests.mkdir(parents=True)
    images.mkdir()
    make_image("images/a.tif", pixels=rgb(), photometric="RGB")
    for name, rank in (("second-best", 2), ("very-best", 1)):
        (manifests / f"{name}.yaml").write_text(
            f"name: {name}\ntitle: A test source\nkind: dir\nhref: {images}\ngsd_m: 0.5\nlicence: CC0-1.0\n"
            f'attribution: nobody\ndates: "2020/2021"\ncoverage: [-76, 44, -74, 45]\nrank: {rank}\n'
        )
    monkeypatch.setenv("CANOPY_MANIFESTS", str(tmp_path / "manifests"))
    done = predict("--bbox", "44.0909,-74.9996", "--size-m", "20")
    assert "very-best" in done.err
    with rasterio.open("chm.tif") as made:
        assert "very-best" in made.tags()["CANOPY_IMAGERY"]
    assert "no named source" in predict("--bbox", "10,10", "--size-m", "20", "--overwrite", code=2).error_line
