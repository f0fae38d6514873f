"""Collars of lossy images: which pixels they are, by an independent rule, and which they never are."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import rasterio
import rasterio.shutil
from scipy import ndimage

from canopy.geo.grid import Grid
from canopy.imagery.open import open_imagery

SHAPE = (256, 320)
YY, XX = np.mgrid[: SHAPE[0], : SHAPE[1]]
SLANTED = XX + 0.3 * YY < 110  # edges that cut blocks in two, as those of turned images do
JPEG = {"compress": "jpeg", "photometric": "ycbcr", "jpeg_quality": "75", "tiled": "yes"}
FORMATS = {
    "ycbcr.tif": {"driver": "GTiff", **JPEG},
    "rgb.tif": {"driver": "GTiff", **JPEG, "photometric": "rgb"},
    "webp.tif": {"driver": "GTiff", "compress": "webp", "webp_level": "75"},
    "lossy.jp2": {"driver": "JP2OpenJPEG", "quality": "20", "reversible": "no"},
}


@pytest.fixture(scope="module")
def forest() -> np.ndarray:
    """uint8 (3, h, w), 20 to 230."""
    noise = ndimage.gaussian_filter(np.random.default_rng(1).normal(size=(3, *SHAPE)), (0, 1.5, 1.5))
    centre = np.array([90, 110, 70])[:, None, None]
    return np.clip(noise / noise.std() * 35 + centre, 20, 230).astype(np.uint8)


@pytest.fixture
def lossy(make_tif: Callable, tmp_path: Path) -> Callable[..., Path]:
    """`lossy(pixels, "ycbcr.tif", nodata=0)`: the pixels, compressed."""

    def make(pixels: np.ndarray, name: str = "ycbcr.tif", **given: object) -> Path:
        rasterio.shutil.copy(
            make_tif(pixels, "plain.tif", photometric="RGB", **given), tmp_path / name, **FORMATS[name]
        )
        return tmp_path / name

    return make


def stored(path: Path) -> np.ndarray:
    with rasterio.open(path) as dataset:
        return dataset.read()


def valid_of(path: Path) -> np.ndarray:
    source = open_imagery(path)
    return source.read(source.native_grid).valid


def collar_of(pixels: np.ndarray, value: int) -> np.ndarray:
    """The collar by the rule of `canopy.geo.collar`, written otherwise: labels, and shifted arrays."""
    cells = pixels.reshape(3, SHAPE[0] // 8, 8, SHAPE[1] // 8, 8).mean((2, 4)).round()
    labels, _ = ndimage.label((np.abs(cells - value) <= 2).all(0))
    at_frame = set(np.concatenate([labels[0], labels[-1], labels[:, 0], labels[:, -1]])) - {0}
    core = np.isin(labels, list(at_frame)).repeat(8, 0).repeat(8, 1)
    near = (np.abs(pixels.astype(int) - value) <= 16).all(0)
    found = core & near
    for _ in range(18):
        around = np.pad(found, 1)
        found = near & np.logical_or.reduce(
            [around[r : r + SHAPE[0], c : c + SHAPE[1]] for r in range(3) for c in range(3)]
        )
    return found


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("value", [0, 255])
@pytest.mark.parametrize("declared", [True, False])
def test_exactly_the_collar_is_missing(lossy, forest, name: str, value: int, declared: bool) -> None:
    path = lossy(np.where(SLANTED, np.uint8(value), forest), name, nodata=value if declared else None)
    pixels, valid = stored(path), valid_of(path)
    assert (pixels != value).any(0)[SLANTED].mean() > 0.02, "not nodata any more"
    np.testing.assert_array_equal(~valid, collar_of(pixels, value) | (declared & (pixels == value).all(0)))
    assert (~valid)[SLANTED].mean() > 0.95 and (~valid)[~SLANTED].mean() < 1e-3
    (note,) = open_imagery(path).notes
    assert f"{name}: a border of {value} in an image compressed with loss" in note


def test_shadows_keep_their_pixels(lossy, forest) -> None:
    """Inside also black ones; at the frame those that are dark; beside the collar all but its rim."""
    pixels = np.where(SLANTED, np.uint8(0), forest)
    pixels[:, 100:140, 200:240] = 0
    at_frame, beside = np.s_[200:, 250:], np.s_[40:80, 96:180]
    for dark in (at_frame, beside):
        pixels[:, *dark] = pixels[:, *dark] // 16 + 6  # 7 to 20
    path = lossy(pixels)
    missing = ~valid_of(path)
    assert (stored(path)[:, *beside] <= 16).all(0).mean() > 0.5, "dark enough to be taken for the collar"
    assert not missing[:, 190:].any()
    assert not missing[ndimage.distance_transform_cdt(~SLANTED) > 18].any()


@pytest.mark.parametrize("nodata", [None, 0])
def test_what_was_not_compressed_with_loss_is_as_it_was(lossy, make_tif, forest, nodata) -> None:
    pixels = stored(lossy(np.where(SLANTED, np.uint8(0), forest)))
    for given in ({}, {"compress": "deflate"}, {"compress": "webp", "webp_lossless": True}):
        valid = valid_of(make_tif(pixels, photometric="RGB", nodata=nodata, **given))
        np.testing.assert_array_equal(valid, (nodata is None) | pixels.any(0))


def test_a_lossy_image_without_a_collar_is_whole(lossy, forest) -> None:
    forest = forest.copy()
    forest[:, :60, :60] //= 16  # 1 to 14: a dark corner
    path = lossy(forest)
    assert valid_of(path).all() and open_imagery(path).notes == []


@pytest.mark.parametrize("pixel_m", [0.5, 0.35, 1.0])
def test_a_part_has_the_collar_of_the_whole(lossy, forest, pixel_m: float) -> None:
    """In windows that see no core of the collar, too."""
    path = lossy(np.where(SLANTED, np.uint8(0), forest))
    source = open_imagery(path)
    native = source.native_grid
    place = rasterio.Affine(pixel_m, 0, native.transform.c, 0, -pixel_m, native.transform.f)
    grid = Grid.of(native.crs, place, tuple(int(extent * 0.5 / pixel_m) for extent in SHAPE))
    whole = source.read(grid).valid
    assert 0.1 < (~whole).mean() < 0.4
    for size in (16, 37):
        for row in range(0, grid.height - size, 29):
            for col in range(0, grid.width // 2, 23):
                part = open_imagery(path).read(grid.window(row, col, size, size)).valid
                np.testing.assert_array_equal(part, whole[row : row + size, col : col + size])


@pytest.mark.parametrize(("name", "wide"), [("rgb.tif", 8), ("ycbcr.tif", 16), ("webp.tif", 40)])
@pytest.mark.parametrize("as_vrt", [False, True])
def test_narrow_collars_and_those_behind_a_vrt(
    lossy, forest, tmp_path, name: str, wide: int, as_vrt: bool
) -> None:
    pixels = forest.copy()
    pixels[:, :, :wide] = 0
    path = lossy(pixels, name)
    if as_vrt:
        with rasterio.open(path) as file:
            bands = "".join(
                f'<VRTRasterBand dataType="Byte" band="{i}"><ColorInterp>{colour}</ColorInterp><SimpleSource>'
                f'<SourceFilename relativeToVRT="1">{path.name}</SourceFilename><SourceBand>{i}</SourceBand>'
                "</SimpleSource></VRTRasterBand>"
                for i, colour in enumerate(("Red", "Green", "Blue"), 1)
            )
            place = ", ".join(map(str, file.transform.to_gdal()))
            size = f'rasterXSize="{file.width}" rasterYSize="{file.height}"'
        path = tmp_path / "mosaic.vrt"
        path.write_text(
            f"<VRTDataset {size}><SRS>EPSG:32619</SRS><GeoTransform>{place}</GeoTransform>{bands}"
            "</VRTDataset>"
        )
    valid = valid_of(path)
    assert (~valid[:, :wide]).mean() > 0.95
    assert valid[:, wide + 18 :].all()
