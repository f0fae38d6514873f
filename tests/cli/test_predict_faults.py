"""Odd and bad images and areas: the right behaviour of each, and nothing written where there is none."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import rasterio
import rasterio.shutil
from pyproj import Transformer
from rasterio.enums import ColorInterp

RED, GREEN, BLUE, ALPHA = ColorInterp.red, ColorInterp.green, ColorInterp.blue, ColorInterp.alpha
PALETTE = {i: (40 + 30 * i, 60 + 20 * i, 30 + 10 * i, 255) for i in range(4)}


@pytest.fixture
def bad(refused: Callable, model_file: Path) -> Callable[..., str]:
    """The one line of a `canopy predict` that is refused."""

    def run(*words: object) -> str:
        line = refused("predict", *words, "--model", model_file, "-o", "chm.tif")
        assert line.startswith("canopy: ")
        return line

    return run


def with_band(rgb: np.ndarray, value: int) -> np.ndarray:
    """A fourth band."""
    return np.concatenate([rgb, np.full((1, *rgb.shape[1:]), value, rgb.dtype)])


# ---- bands and values -------------------------------------------------------------------------
def test_the_same_picture_in_other_files(predict, make_image, heights, rgb) -> None:
    predict(make_image("plain.tif"))
    expected = heights("chm.tif")
    upside_down = rasterio.Affine(0.5, 0, 500_000, 0, 0.5, 4_882_000 - 50)
    four = {"pixels": with_band(rgb, 90), "photometric": "MINISBLACK"}
    for given, words in (
        (four | {"descriptions": ("Red", "Green", "Blue", "NIR")}, ()),
        ({"pixels": rgb[::-1], "colors": (BLUE, GREEN, RED), "photometric": "MINISBLACK"}, ()),
        ({"pixels": with_band(rgb, 90)[[3, 0, 1, 2]], "photometric": "MINISBLACK"}, ("--bands", "2,3,4")),
        ({"pixels": rgb.astype(np.uint16) * 40}, ("--scale", 255 * 40)),
        ({"pixels": (rgb / 255).astype(np.float32)}, ("--scale", 1)),
        ({"pixels": rgb[:, ::-1], "transform": upside_down}, ()),
        ({"crs": None}, ("--input-crs", "EPSG:32618")),
        ({"crs": None}, ("--crs", "EPSG:32618")),
    ):
        predict(make_image("other.tif", **given), *words)
        np.testing.assert_allclose(heights("chm.tif"), expected, atol=1e-3, err_msg=f"{list(given)} {words}")


def test_a_palette_is_expanded(predict, make_image, heights, rgb) -> None:
    index = (rgb[:1] // 64).astype(np.uint8)
    predict(make_image("palette.tif", index, colormap=PALETTE))
    expanded = heights("chm.tif")
    table = np.array([PALETTE[i][:3] for i in range(4)], np.uint8)
    predict(make_image("plain.tif", table[index[0]].transpose(2, 0, 1)))
    np.testing.assert_array_equal(expanded, heights("chm.tif"))


def test_only_what_is_valid_has_a_height(predict, make_image, heights, rgb) -> None:
    hole = np.zeros(rgb.shape[1:], bool)
    hole[20:40, 30:70] = True
    clear, black = with_band(rgb, 255), rgb.copy()
    clear[3, hole] = 0
    black[:, hole] = 0
    both, gaps = clear.copy(), (rgb / 255).astype(np.float32)
    both[:3, :30] = 0
    gaps[1, hole], gaps[2, 50, 60] = np.nan, np.inf
    four, dot = {"colors": (RED, GREEN, BLUE, ALPHA)}, np.zeros_like(hole)
    dot[50, 60] = True
    edge = np.zeros_like(hole)
    edge[:30] = True
    for given, words, missing in (
        ({"pixels": clear, **four}, (), hole),
        ({"pixels": both, "nodata": 0, **four}, (), hole | edge),
        ({"mask": ~hole}, (), hole),
        ({"pixels": black}, ("--nodata", 0), hole),
        ({"pixels": gaps}, ("--scale", 1), hole | dot),
        ({"pixels": np.zeros_like(rgb), "nodata": 0}, (), np.ones_like(hole)),
    ):
        done = predict(make_image(**given), *words)
        np.testing.assert_array_equal(np.isnan(heights("chm.tif")), missing, err_msg=f"{list(given)} {words}")
        assert "colors" not in given or "alpha" in done.err
    assert "no valid pixel" in done.out


def test_a_black_collar_is_warned_of(predict, make_image, heights, rgb) -> None:
    rgb[:, :, :48] = 0
    done = predict(make_image(pixels=rgb))
    assert "--nodata" in done.err and "40.0 % of the pixels with heights are pure black" in done.err
    assert np.isfinite(heights("chm.tif")).all()


def test_a_collar_that_was_compressed_has_no_heights(predict, make_image, heights, rgb) -> None:
    rgb[:, :, :43] = 0
    jpeg = {"compress": "jpeg", "photometric": "ycbcr", "tiled": True, "blockxsize": 64, "blockysize": 64}
    done = predict(make_image(pixels=rgb, **jpeg))
    whole = heights("chm.tif")
    assert "image.tif: a border of 0 in an image compressed with loss" in done.err
    assert "pure black" not in done.err and "--nodata" not in done.err
    assert np.isnan(whole[:, :43]).mean() > 0.95 and np.isfinite(whole[:, 43:]).all()
    predict(
        "image.tif", "--bounds", "500018,4881960,500040,4881980", "--bounds-crs", "EPSG:32618", out="part.tif"
    )
    np.testing.assert_allclose(heights("part.tif"), whole[40:80, 36:80], atol=0.01)


def test_bands_that_say_too_little(bad, make_image, rgb) -> None:
    for given, says in (
        ({"pixels": rgb[:1]}, "image.tif"),
        ({"pixels": np.concatenate([rgb, rgb[:2]]), "photometric": "MINISBLACK"}, "--bands"),
        ({"pixels": rgb.astype(np.uint16) * 40}, "--scale"),
        ({"pixels": (rgb / 255).astype(np.float32)}, "--scale"),
        ({"crs": None}, "--input-crs"),
    ):
        assert says in bad(make_image(**given))


# ---- place and size ---------------------------------------------------------------------------
@pytest.mark.parametrize("imagery", ["swissimage", "https://tiles.example/{z}/{x}/{y}.png"])
def test_the_maps_crs_goes_with_web_tiles(canopy, bad, model_file, imagery) -> None:
    place = ("--imagery", imagery, "--bbox", "46.9,7.4", "--size-m", "100", "--dry-run")
    planned = canopy("predict", *place, "--crs", "EPSG:2056", "--model", model_file, "-o", "x.tif")
    assert planned.code == 0 and "EPSG:2056" in planned.err
    assert "--input-crs" in bad(*place, "--input-crs", "EPSG:2056")


def test_the_ends_of_the_earth(predict, bad, make_image) -> None:
    # Web Mercator ends before the pole.
    pole = make_image("pole.tif", crs="EPSG:3413", transform=rasterio.Affine(0.5, 0, 0, 0, -0.5, 30))
    bad(pole, "--bands", "1,2,3", "--crs", "EPSG:3857")
    near = rasterio.Affine(0.5, 0, 100_000, 0, -0.5, 100_000)
    predict(make_image(crs="EPSG:3413", transform=near))
    with rasterio.open("chm.tif") as made:
        assert made.crs.to_epsg() == 32661, "a polar system"


def test_an_area_across_the_antimeridian(predict, make_image, heights) -> None:
    x, y = Transformer.from_crs(4326, 32601, always_xy=True).transform(-180.0, -16.5)
    image = make_image(crs="EPSG:32601", transform=rasterio.Affine(0.5, 0, x - 30, 0, -0.5, y + 25))
    done = predict(image)
    assert "179." in done.err or "180." in done.err
    assert np.isfinite(heights("chm.tif")).mean() > 0.85
    # West > east is legal: the same area by its bounds.
    predict(image, "--bounds", "179.9998,-16.5001,-179.9998,-16.4999")
    assert np.isfinite(heights("chm.tif")).mean() > 0.9


def test_a_rotated_image_is_warped(predict, make_image, heights) -> None:
    corner = rasterio.Affine.translation(500_000, 4_882_000)
    turned = corner @ rasterio.Affine.rotation(30) @ rasterio.Affine.scale(0.5, -0.5)
    predict(make_image(transform=turned))
    with rasterio.open("chm.tif") as made:
        assert made.transform.b == made.transform.d == 0
    assert np.isfinite(heights("chm.tif")).sum() == pytest.approx(100 * 120, rel=0.05)


def test_other_pixels_are_resampled_and_coarse_ones_warned_of(predict, make_image) -> None:
    done = predict(make_image(transform=rasterio.Affine(1.5, 0, 500_000, 0, -1.0, 4_882_000)))
    with rasterio.open("chm.tif") as made:
        assert made.res == (0.5, 0.5) and made.shape == (200, 360)
    assert "less certain" in done.err


@pytest.mark.parametrize("shape", [(1, 1), (3, 40), (15, 15)])
def test_tiny_images_keep_their_shape(predict, make_image, heights, rgb, shape) -> None:
    predict(make_image(pixels=rgb[:, : shape[0], : shape[1]]))
    made = heights("chm.tif")
    assert made.shape == shape and np.isfinite(made).all()


# ---- areas ------------------------------------------------------------------------------------
def test_an_area_past_the_edge_has_its_full_shape(predict, make_image, heights) -> None:
    predict(make_image(), "--bounds", "499990,4881940,500080,4882010", "--bounds-crs", "EPSG:32618")
    inside = np.zeros((140, 180), bool)
    inside[20:120, 20:140] = True
    np.testing.assert_array_equal(np.isfinite(heights("chm.tif")), inside)


def test_areas_that_cannot_be(bad, make_image, tmp_path) -> None:
    image = make_image()
    (tmp_path / "empty.geojson").write_text('{"type": "FeatureCollection", "features": []}')
    for words, says in (
        (("--bbox", "10.0,10.0", "--size-m", "100"), "no imagery there"),
        (("--aoi", "empty.geojson"), "empty.geojson"),
        (("--bounds", "1,1,1,2"), "--bounds"),
        (("--bbox", "-75.0,44.0911,-74.9995,44.0908"), "Swapping"),
        (("--bbox", "-91.5,44.09", "--size-m", "50"), "latitude"),
        (("--max-pixels", "1000"), "--max-pixels"),
        # A coarse map of a large area is small, but its prediction is not.
        (("--bbox", "44.0,-75.1,45.5,-73.0", "--gsd", "100"), "--max-pixels"),
    ):
        assert says in bad(image, *words)
    line = bad(image, "--bbox", "44.0,-75.1,45.5,-73.0")
    assert "px" in line and "tiles" in line and "GB" in line and re.search(r"~\d+ (h|days)", line)


def test_a_polygon_that_crosses_itself_is_repaired(predict, make_image, tmp_path) -> None:
    bow = [[[-75.0, 44.0911], [-74.9994, 44.0908], [-74.9994, 44.0911], [-75.0, 44.0908], [-75.0, 44.0911]]]
    (tmp_path / "bow.geojson").write_text(json.dumps({"type": "Polygon", "coordinates": bow}))
    predict(make_image(), "--aoi", "bow.geojson")


# ---- damaged and hostile files ----------------------------------------------------------------
def test_files_that_are_not_what_they_seem(bad, make_image, tmp_path) -> None:
    cut = make_image(
        "cut.tif", tiled=True,
        blockxsize=16, blockysize=16, compress="deflate",
    )  # fmt: skip
    cut.write_bytes(cut.read_bytes()[: cut.stat().st_size * 2 // 3])
    hidden = '<VRTDataset rasterXSize="1" rasterYSize="1"><SRS>EPSG:4326</SRS></VRTDataset>'
    (tmp_path / "hidden.tif").write_text(hidden)
    for image, says in (
        (cut, "cut.tif"), ("hidden.tif", "hidden.tif"), ("nowhere.tif", "nowhere.tif"),
        ("/vsizip/a.zip/a.tif", "a.tif"), ("<VRTDataset/>", "VRTDataset"),
    ):  # fmt: skip
        assert says in bad(image)
    assert "--imagery" in bad()


def test_one_of_several_images_is_damaged(bad, predict, make_image, tmp_path, rgb) -> None:
    """No file behind a link, no image in a file, a file cut short: refused, or left out with one note."""
    folder = tmp_path / "tiles"
    good = make_image("tiles/good.tif")
    beside = rasterio.Affine(0.5, 0, 500_060, 0, -0.5, 4_882_000)
    cut = folder / "cut.tif"
    rasterio.shutil.copy(make_image("far.tif", np.tile(rgb, (1, 5, 5)), transform=beside), cut, driver="COG")
    cut.write_bytes(cut.read_bytes()[: cut.stat().st_size * 2 // 3])
    (folder / "text.tif").write_text("no image")
    (folder / "link.tif").symlink_to("nowhere.tif")
    everything = sorted(folder.iterdir())
    for given in (["tiles"], everything):
        line = bad(*given)
        assert "cut.tif: unreadable pixels" in line and "--on-damaged skip" in line
        done = predict(*given, "--on-damaged", "skip", out="done.tif")
        (note,) = (line for line in done.err.splitlines() if "left out" in line)
        assert "3 of 4 images left out" in note and all(
            f"{name}.tif (" in note for name in ("cut", "link", "text")
        )
        with rasterio.open("done.tif") as made:
            assert made.shape == rgb.shape[1:]
    cut.unlink()
    assert "link.tif: a link to a file that is not there" in bad("tiles")
    good.unlink()
    assert "link.tif" in bad("tiles", "--on-damaged", "skip"), "nothing is left"
    assert "fail" in bad("tiles", "--on-damaged", "mend")
    assert "gone.tif" in bad(make_image("a.tif"), "gone.tif", "--on-damaged", "skip"), "a name is not damage"
