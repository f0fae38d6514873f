"""`canopy data describe FILE`: what is said of files whose truth rasterio and geopandas wrote."""

from __future__ import annotations

import json

import geopandas
import numpy as np
import pytest
import rasterio
from pyproj import CRS
from shapely.geometry import Point, box

METRE = rasterio.Affine(1, 0, 500_000, 0, -1, 4_882_000)
UTM = "EPSG:32619"


def raster(path, *bands, crs=UTM, names=(), unit=None, **profile) -> None:
    pixels = np.stack(bands)
    count, height, width = pixels.shape
    size = {"count": count, "height": height, "width": width, "dtype": pixels.dtype}
    with rasterio.open(path, "w", driver="GTiff", crs=crs, transform=METRE, **size, **profile) as file:
        file.write(pixels)
        for number, name in enumerate(names, 1):
            file.set_band_description(number, name)
        if unit:
            file.units = [unit] * count


@pytest.fixture
def described(canopy, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def run(name: str, *words: str) -> dict:
        return json.loads(canopy("data", "describe", name, "--json", *words).out)

    return run


@pytest.fixture
def heights() -> np.ndarray:
    return np.random.default_rng(1).uniform(1, 30, (100, 100)).astype(np.float32)


def test_feet_are_converted_and_a_file_without_a_day_says_so(described, heights) -> None:
    raster("chm.tif", heights / np.float32(0.3048), unit="ft")
    said = described("chm.tif")
    view = said["as_heights"]
    assert view["metres_per_value"] == 0.3048 and "converted to metres" in view["notes"][0]
    assert view["heights_m"] == pytest.approx([heights.min(), heights.max()], abs=1e-3)
    assert (view["date"], view["date_from"]) == (None, "none")
    assert (said["driver"], said["size_px"], said["crs"]) == ("GTiff", [100, 100], UTM)
    assert view["gsd_m"] == pytest.approx(1, abs=0.001) and "refused" in said["as_imagery"]


def test_of_surface_and_canopy_the_canopy_band_is_taken(described, canopy, heights) -> None:
    raster("two.tif", heights + 200, heights, names=("DSM", "CHM"))
    assert described("two.tif")["as_heights"]["height_band"] == 2
    raster("zs.tif", heights, heights, names=("zmean", "zmax"))
    assert described("zs.tif", "--band", "zmax")["as_heights"]["height_band"] == 2
    refused = canopy("data", "describe", "zs.tif")
    assert refused.code == 2 and "1 zmean, 2 zmax" in refused.error_line


def test_undeclared_nodata_is_found(described, heights) -> None:
    heights[:, :10] = -9999
    raster("chm_20210715.tif", heights)
    view = described("chm_20210715.tif")["as_heights"]
    assert (view["impossible_value"], view["usable_px"]) == (-9999, 9000)
    assert (view["date"], view["date_from"]) == ("2021-07-15", "name")
    assert "10 % of its pixels have impossible heights" in view["notes"][0]


def test_the_horizontal_part_is_the_crs(described, heights) -> None:
    raster("flat.tif", heights, crs=CRS("EPSG:32619+5703").to_wkt())
    said = described("flat.tif")
    assert said["crs"] == said["as_heights"]["crs"] == UTM
    assert said["vertical_datum"] == "NAVD88 height"
    raster("three.tif", heights, crs=CRS(UTM).to_3d().to_wkt())
    assert described("three.tif")["as_heights"]["crs"] == UTM


def test_an_image_says_its_rgb_bands(described) -> None:
    rgb = np.random.default_rng(1).integers(1, 255, (3, 100, 100)).astype(np.uint8)
    raster("rgb.tif", *rgb, photometric="RGB")
    view = described("rgb.tif")["as_imagery"]
    assert (view["rgb_bands"], view["white"], view["date_from"]) == ([1, 2, 3], 255, "none")


def test_layers_are_listed_and_chosen(described, canopy) -> None:
    zones = geopandas.GeoDataFrame({"n": [1]}, geometry=[box(5e5, 4.88e6, 5.01e5, 4.881e6)], crs=UTM)
    plots = geopandas.GeoDataFrame({"height": [12.0, -9999.0]}, geometry=[Point(5e5, 4.88e6)] * 2, crs=UTM)
    zones.to_file("two.gpkg", layer="stands")
    plots.to_file("two.gpkg", layer="plots")
    said = described("two.gpkg")
    assert set(said["layers"]) == {"stands", "plots"}
    assert said["as_zones"] == {"layer": "stands", "features": 1, "polygons": 1, "crs": UTM}
    assert "holds 2 layers" in said["as_plots"]["refused"]
    view = described("two.gpkg", "--layer", "plots")["as_plots"]
    assert (view["layer"], view["rows"], view["height_column"]) == ("plots", 1, "height")
    assert "1 rows left out: an impossible height" in view["notes"][0]


def test_what_no_reader_takes_is_refused_with_its_own_words(canopy, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.tif").write_bytes(b"nothing")
    ran = canopy("data", "describe", "a.tif")
    assert ran.code == 2 and "not a readable raster" in ran.error_line
