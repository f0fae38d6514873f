"""Which bands are red, green and blue and what is white: rows 1 to 10 of the fault table."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import rasterio
import rasterio.shutil
from affine import Affine
from rasterio.enums import ColorInterp as C

from canopy.errors import ImageryError, InputError
from canopy.imagery.open import open_imagery

RGB = (C.red, C.green, C.blue)


def read_all(path: Path, **options):
    source = open_imagery(path, **options)
    return source, source.read(source.native_grid)


def test_alpha_0_and_nodata_are_invalid_and_both_are_said(make_tif, rgb):
    alpha = np.full((1, 64, 80), 255, np.uint8)
    rgb[:, 0], alpha[0, 1:10], alpha[0, 10:20] = 0, 0, 90
    path = make_tif(np.concatenate([rgb, alpha]), colors=(*RGB, C.alpha), photometric="RGB", nodata=0)
    source, image = read_all(path)
    assert not image.valid[:10].any() and image.valid[10:].all() and (image.rgb[:, :10] == 0).all()
    np.testing.assert_allclose(image.rgb[:, 10:], rgb[:, 10:] / 255, atol=1e-6)
    assert any("both alpha and a nodata value" in note for note in source.notes)


@pytest.mark.parametrize(
    ("colours", "names", "bands"),
    [
        ((C.alpha, *RGB), (), (2, 3, 4)),
        ((*RGB, C.undefined), (), (1, 2, 3)),
        ((C.blue, C.green, C.red), (), (3, 2, 1)),
        ((C.gray, C.undefined, C.undefined, C.undefined), ("NIR", "Blue", "Green", "Red"), (4, 3, 2)),
    ],
)
def test_bands_are_found_by_interpretation_or_description(make_tif, rgb, colours, names, bands):
    values = np.full((len(colours), 64, 80), 255, np.uint8)
    values[[band - 1 for band in bands]] = rgb
    path = make_tif(values, colors=colours, descriptions=names, photometric="MINISBLACK", alpha="NO")
    _, image = read_all(path)
    np.testing.assert_allclose(image.rgb, rgb / 255, atol=1e-6)
    assert image.valid.all()


@pytest.mark.parametrize("count", [1, 2])
def test_grey_is_refused(make_tif, rgb, count):
    with pytest.raises(ImageryError, match="red, green and blue"):
        open_imagery(make_tif(rgb[:count]))


@pytest.mark.parametrize(
    ("kind", "top", "white"), [("uint16", 3000, 4095), ("uint16", 60000, 65535), ("float32", 0.9, 1)]
)
def test_other_types_need_an_explicit_scale(make_tif, rgb, kind, top, white):
    values = (rgb / rgb.max() * top).astype(kind)
    path = make_tif(values, photometric="RGB")
    with pytest.raises(ImageryError, match=rf"{kind} pixels.*up to {values.max():g}.*--scale {white:g}"):
        open_imagery(path)
    _, image = read_all(path, scale=white)
    np.testing.assert_allclose(image.rgb, values / np.float32(white), rtol=1e-5)


@pytest.mark.parametrize("bands", ["1,2", "1,1,2", "0,1,2", "r,g,b", "1,2,9"])
def test_bands_that_cannot_be_meant(make_tif, rgb, bands):
    path = make_tif(rgb, photometric="RGB")
    with pytest.raises(InputError, match="band"):
        open_imagery(path, bands=bands)
    with pytest.raises(InputError, match="--scale"):
        open_imagery(path, scale=float("nan"))


# ---- what a file says of itself against what it is --------------------------------------------
@pytest.mark.parametrize(
    ("order", "names", "bands"),
    [
        ((2, 1, 0), ("Blue", "Green", "Red"), "3,2,1"),
        ((0, 0, 1, 2), ("nir", "red", "green", "blue"), "2,3,4"),
        ((0, 0, 1), ("NIR", "Red", "Green"), None),
    ],
)
def test_descriptions_against_colours_are_asked_about(make_tif, rgb, order, names, bands):
    """GDAL calls the first bands of any uint8 file red, green, blue; heights of other colours are wrong."""
    colours = (*RGB, C.alpha)[: len(order)]
    path = make_tif(rgb[list(order)], descriptions=names, colors=colours, photometric="RGB")
    with pytest.raises(ImageryError, match=f"--bands {bands}" if bands else "described as NIR"):
        open_imagery(path)
    if bands:
        _, image = read_all(path, bands=bands)
        np.testing.assert_allclose(image.rgb, rgb / 255, atol=1e-6)


def test_a_nodata_that_no_pixel_can_have_is_refused(make_tif, rgb):
    path = make_tif(rgb, photometric="RGB")
    for value in (300, -9999, 0.5, float("nan")):
        with pytest.raises(ImageryError, match="no pixel of uint8 can be"):
            open_imagery(path, nodata=value)
    open_imagery(path, nodata=255)


def test_a_black_border_is_told_of_whatever_else_is_declared(make_tif, rgb):
    values = rgb.copy()
    values[:, :, :20] = 0
    for options in ({}, {"nodata": 255}):
        source = open_imagery(make_tif(values, photometric="RGB", **options))
        assert any("constant border of 0" in note for note in source.notes)
    assert open_imagery(make_tif(values, photometric="RGB"), nodata=0).notes == []
    assert open_imagery(make_tif(values, photometric="RGB", nodata=0)).notes == []


def test_a_scale_that_makes_all_black_or_white_is_told_of(make_tif, rgb):
    path = make_tif(rgb.astype(np.uint16) * 16, photometric="RGB")
    assert any("all but black" in note for note in open_imagery(path, scale=4_000_000).notes)
    assert any("all but white" in note for note in open_imagery(path, scale=1).notes)
    assert open_imagery(path, scale=4080).notes == []


def test_scale_tags_and_grey_are_told_of(make_tif, rgb):
    path = make_tif(np.repeat(rgb[:1], 3, axis=0), photometric="RGB")
    with rasterio.open(path, "r+") as file:
        file.scales, file.offsets = (1e-4,) * 3, (-0.1,) * 3
    scaled, grey = open_imagery(path).notes
    assert "not applied" in scaled and "grey" in grey


def test_tiles_of_one_lattice_share_a_grid(make_tif, rgb):
    """One half a pixel off has a grid of its own."""
    first = make_tif(rgb, "a.tif", photometric="RGB")
    with rasterio.open(first) as file:
        place = file.transform
    height, width = rgb.shape[1:]
    second = make_tif(rgb, "b.tif", photometric="RGB", transform=place @ Affine.translation(width, 3))
    grid = open_imagery([first, second]).native_grid
    assert grid.shape == (height + 3, 2 * width) and grid.transform == place
    off = make_tif(rgb, "c.tif", photometric="RGB", transform=place @ Affine.translation(width + 0.5, 0))
    assert open_imagery([first, off]).native_grid is None


@pytest.mark.parametrize(
    ("dtype", "scale", "value"),
    [("float32", 1, -9999), ("float64", 1, -3.4e38), ("float32", 1, 1e20), ("int16", 7650, -9999),
     ("uint16", 7650, 65535)],
)  # fmt: skip
def test_a_number_that_is_no_brightness_is_missing(make_tif, rgb, dtype, scale, value) -> None:
    pixels = (rgb * (scale / 255)).astype(dtype)
    pixels[:, :12] = value
    source = open_imagery(make_tif(pixels, photometric="RGB"), scale=scale)
    valid = source.read(source.native_grid).valid
    assert not valid[:12].any() and valid[12:].all()
    assert any(f"pixels of {value:.6g} in all bands" in note for note in source.notes)


def test_infrared_that_is_called_alpha(make_tif, rgb) -> None:
    """GDAL calls the fourth band of bytes alpha where nobody says what it is."""
    four = np.concatenate([rgb, rgb[1:2]])
    four[3, :10] = 0
    named = open_imagery(make_tif(four, photometric="RGB", alpha="yes", descriptions=("r", "g", "b", "NIR")))
    assert named.read(named.native_grid).valid.all() and not any("alpha" in note for note in named.notes)
    path = make_tif(four, "b.tif", photometric="RGB", alpha="yes")
    source = open_imagery(path)
    assert not source.read(source.native_grid).valid[:10].any()
    (note,) = (note for note in source.notes if "neither 0 nor full" in note)
    words = note.split(": ")[-1].split()
    subprocess.run([str(Path(sys.executable).parent / words[0]), *words[1:-1], str(path)], check=True)
    mended = open_imagery(path)
    assert mended.read(mended.native_grid).valid.all() and mended.notes == []


@pytest.mark.parametrize("quality", ["60", "95"])
def test_grey_is_told_of_after_compression_with_loss(make_tif, rgb, tmp_path, quality) -> None:
    grey = make_tif(np.repeat(rgb[:1], 3, axis=0), photometric="RGB")
    for number, space in enumerate(("ycbcr", "rgb")):
        path = tmp_path / f"{number}.tif"
        rasterio.shutil.copy(
            grey, path, driver="GTiff", compress="jpeg", photometric=space, jpeg_quality=quality
        )
        assert any("heights of grey images are wrong" in note for note in open_imagery(path).notes)
