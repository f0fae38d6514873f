"""`canopy predict` and `canopy.predict`: grids, areas, bands, encodings, and what lies beside a map."""

from __future__ import annotations

import datetime
import hashlib
import json
from pathlib import Path

import behaviour_support as support
import geopandas
import numpy as np
import pystac
import pytest
import rasterio
import rasterio.shutil
import shapely
from shapely.geometry import MultiPolygon, box

EAST, SOUTH = support.WEST + 150, support.NORTH - 120
WARPED = {"mask_share": 0.003}
"""Where pixels are interpolated, GDAL's bilinear kernel in float32 gives the recorded heights to 0.006 m (in
uint8 only to 0.39 m, 0.02 m in the mean), but another mask beside nodata: in 0 to 0.17 % of the pixels."""
EXACT = "gsd1", "gsd2"
SHRUNK = {"mean_m": 0.15, "mask_share": 0.02}
"""Where warped imagery is finer than the model's pixels, kernels that are all right differ: from the recorded
heights GDAL's bilinear moved these by 0.13 m in the mean (99 %: 0.8 m), its average by 0.07 m, and masks by
0.8 and 1.4 %. The default model moved by 0.22 and 0.08 m."""
TIFF = "image/tiff; application=geotiff"


@pytest.fixture
def predict(canopy, model):
    def run(*words: object, out: str = "chm.tif", code: int = 0, network: Path = model) -> support.Ran:
        return canopy("predict", *words, "--model", network, "--backend", "torch", "-o", out, code=code)

    return run


def kept(name: str, path: Path, **options: float) -> None:
    """Grid and heights of a map are those recorded."""
    support.check_grid(name, path)
    support.check_heights(name, support.metres(path), **options)


def test_aligned(predict, inputs, tmp_path) -> None:
    told = predict(inputs / "wood.tif", "--quicklook", "--json").json
    kept("predict_aligned", tmp_path / "chm.tif", stride=2)
    support.check_keys("predict_aligned", told)
    assert told["mean_height_m"] == pytest.approx(np.nanmean(support.metres(tmp_path / "chm.tif")), rel=1e-4)
    assert (tmp_path / "chm.png").stat().st_size > 5000
    # A coarser map is the average of the fine one, whatever was recorded.
    fine = support.metres(tmp_path / "chm.tif").reshape(60, 4, 75, 4).mean(axis=(1, 3))
    predict(inputs / "wood.tif", "--gsd 2", out="coarse.tif")
    whole = np.isfinite(fine)
    np.testing.assert_allclose(support.metres(tmp_path / "coarse.tif")[whole], fine[whole], atol=1e-3)


def test_the_map_is_a_valid_cog_and_says_where_it_comes_from(predict, inputs, model, tmp_path) -> None:
    from rio_cogeo import cog_validate

    predict(inputs / "wood.tif")
    valid, errors, _ = cog_validate(tmp_path / "chm.tif")
    assert valid, errors
    with rasterio.open(tmp_path / "chm.tif") as made:
        tags = made.tags()
    assert tags["CANOPY_MODEL_SHA256"] == hashlib.sha256(model.read_bytes()).hexdigest()
    names = "CANOPY_MODEL", "CANOPY_IMAGERY", "CANOPY_DATES", "CANOPY_GSD_M"
    support.check_values("predict_tags", {name: tags[name] for name in names})
    support.check_keys("predict_tags", tags)
    item = json.loads((tmp_path / "chm.json").read_text())
    support.check_keys("predict_item", item)
    facts = item["properties"]
    wanted = "datetime", "proj:code", "proj:shape", "proj:transform"
    support.check_values("predict_item", {name: facts[name] for name in wanted} | {"bbox": item["bbox"]})
    digest = hashlib.sha256((tmp_path / "chm.tif").read_bytes()).hexdigest()
    assert item["assets"]["canopy_height"]["file:checksum"] == f"1220{digest}"


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("gsd1", ("--gsd", 1)),
        ("gsd2", ("--gsd", 2)),
        ("gsd03", ("--gsd", 0.3)),
        ("utm17", ("--crs", "EPSG:32617")),
        ("mercator", ("--crs", "EPSG:3857")),
        ("degrees", ("--crs", "EPSG:4326")),
        ("quadkey", ("--crs", "quadkey")),
        ("utm17_gsd15", ("--crs", "EPSG:32617", "--gsd", 1.5)),
    ],
)
def test_other_grids(predict, inputs, tmp_path, name: str, words: tuple[object, ...]) -> None:
    predict(inputs / "wood.tif", *words)
    kept(f"predict_to_{name}", tmp_path / "chm.tif", stride=3, **({} if name in EXACT else WARPED))


@pytest.mark.parametrize(
    ("name", "image", "words"),
    [
        ("zone17", "zone17.tif", ("--crs", "EPSG:32618")),
        ("zone17_image", "zone17.tif", ("--crs", "image")),
        ("degrees", "degrees.tif", ()),
        ("degrees_image", "degrees.tif", ("--crs", "image")),
        ("mixed", "mixed", ("--crs", "EPSG:32618")),
    ],
)
def test_other_images(predict, inputs, tmp_path, name: str, image: str, words: tuple[object, ...]) -> None:
    predict(inputs / image, *words)
    kept(f"predict_from_{name}", tmp_path / "chm.tif", stride=3, **(WARPED if name == "mixed" else SHRUNK))


def test_an_odd_grid_is_kept(predict, inputs, tmp_path) -> None:
    placed = rasterio.Affine(0.6, 0, 500_000.17, 0, -0.6, 4_882_000.23)
    with rasterio.open(inputs / "whole.tif") as image:
        support.write_image(tmp_path / "odd.tif", image.read()[:, :150, :150], transform=placed)
    predict("odd.tif", "--crs", "image")
    kept("predict_odd", tmp_path / "chm.tif", **WARPED)


def test_bands_scale_and_mask(predict, inputs, tmp_path) -> None:
    """Sixteen bits, near infrared first, a mask of its own."""
    with rasterio.open(inputs / "whole.tif") as image:
        rgb = image.read().astype(np.uint16) * 40
    mask = np.ones(rgb.shape[1:], bool)
    mask[30:60, 40:90] = False
    support.write_raster(tmp_path / "deep.tif", np.concatenate([rgb[:1] + 900, rgb]), mask=mask)
    predict("deep.tif", "--bands", "2,3,4", "--scale", 10200)
    kept("predict_deep", tmp_path / "chm.tif")
    predict("deep.tif", "--bands", "2,3,4", out="none.tif", code=2)


# ---- areas ------------------------------------------------------------------------------------
def test_an_aoi_with_holes(predict, inputs, tmp_path) -> None:
    west, north = support.WEST, support.NORTH
    outer = box(west + 10, north - 90, west + 80, north - 20)
    hole = box(west + 30, north - 60, west + 50, north - 40)
    island = box(west + 100, north - 50, west + 130, north - 30)
    areas = geopandas.GeoDataFrame(geometry=[MultiPolygon([outer.difference(hole), island])], crs=32618)
    areas.to_crs(4326).to_file(tmp_path / "area.gpkg")
    predict(inputs / "wood.tif", "--aoi", "area.gpkg")
    kept("predict_aoi", tmp_path / "chm.tif", stride=2)
    predict(inputs / "wood.tif", "--aoi", "area.gpkg", "--gsd", 2, out="coarse.tif")
    kept("predict_aoi_gsd2", tmp_path / "coarse.tif", stride=1)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("point", "--bbox 44.0903,-74.9993 --size-m 50"),
        ("corners", "--bbox 44.0900,-74.9996,44.0906,-74.9989"),
        ("bounds", "--bounds -74.9996,44.0900,-74.9989,44.0906"),
        ("metres", "--bounds 500020,4881930,500090,4881990 --bounds-crs EPSG:32618"),
    ],
)
def test_areas(predict, inputs, tmp_path, name: str, words: str) -> None:
    told = predict(inputs / "wood.tif", words)
    kept(f"predict_area_{name}", tmp_path / "chm.tif")
    assert " N, " in told.err and " W, " in told.err, "the area is echoed before work"


@pytest.mark.parametrize(
    "words", [(), ("--crs", "EPSG:32617"), ("--gsd", 1), ("--crs", "EPSG:32617", "--gsd", 1.5)]
)
@pytest.mark.parametrize("image", ["wood.tif", "zone17.tif"])
def test_a_sub_area_equals_the_whole(predict, inputs, tmp_path, image: str, words: tuple) -> None:
    """Whatever the area, a pixel has its height: within 0.01 m, with the same mask."""
    words = words if "--crs" in words else (*words, "--crs", "EPSG:32618")
    predict(inputs / image, *words)
    with rasterio.open(tmp_path / "chm.tif") as whole:
        expected, grid, crs = whole.read(1), whole.transform, whole.crs.to_string()
    rng = np.random.default_rng(len(words))
    for turn in range(2):
        h, w = (int(rng.integers(20, side // 2)) for side in expected.shape)
        top, left = int(rng.integers(0, expected.shape[0] - h)), int(rng.integers(0, expected.shape[1] - w))
        (west, north), (east, south) = grid @ (left, top), grid @ (left + w, top + h)
        bounds = support.listed((west, south, east, north))
        predict(inputs / image, *words, "--bounds", bounds, "--bounds-crs", crs, out=f"{turn}.tif")
        with rasterio.open(tmp_path / f"{turn}.tif") as part:
            found = part.read(1)
            at = np.round(~grid @ (part.transform.c, part.transform.f), 6)
        col, row = int(at[0]), int(at[1])
        assert (col, row) == tuple(at), "the part lies on the whole's pixels"
        same = expected[row : row + found.shape[0], col : col + found.shape[1]]
        inside = np.s_[: same.shape[0], : same.shape[1]]
        np.testing.assert_array_equal(np.isfinite(found[inside]), np.isfinite(same))
        np.testing.assert_allclose(found[inside], same, atol=0.01)


# ---- bands and encodings ----------------------------------------------------------------------
@pytest.mark.parametrize("words", [(), ("--gsd", 1), ("--encoding", "uint16cm"), ("--crs", "EPSG:32617")])
def test_interval_quality_and_dates(predict, banded, inputs, tmp_path, words: tuple[object, ...]) -> None:
    all_bands = ("--interval", 0.9, "--quality-band", "--date-band")
    predict(inputs / "wood.tif", *all_bands, *words, network=banded)
    name = "predict_bands_" + "_".join(str(word).strip("-").replace(":", "") for word in words)
    path = tmp_path / "chm.tif"
    support.check_grid(name, path)
    with rasterio.open(path) as made:
        assert {"CANOPY_INTERVAL", "CANOPY_QUALITY_BITS"} <= set(made.tags())
        scales, bands = made.scales, dict(zip(made.descriptions, made.read(masked=True), strict=True))
    names = "canopy_height", "height_lower", "height_upper", "quality", "acquisition_date"
    height, lower, upper, quality, day = (bands[name] for name in names)
    for band, values in enumerate((height, lower, upper)):
        found = values.astype(float).filled(np.nan) * scales[band]
        support.check_heights(f"{name}_{band + 1}", found, stride=6, **(WARPED if "--crs" in words else {}))
    valid = ~np.ma.getmaskarray(height)
    assert (lower[valid] <= height[valid] + 1e-4).all() and (upper[valid] >= height[valid] - 1e-4).all()
    # Shares of pixels with a flag: one on the edge of a limit may change sides.
    bits = (1, 2, 4, 8, 16, 32, 64)
    flagged = {str(bit): float((quality[valid].astype(int) & bit > 0).mean()) for bit in bits}
    support.check_values(f"{name}_bits", flagged, abs_=0.01)
    days = int((np.datetime64("2021-06-15") - np.datetime64("1970-01-01")).astype(int))
    assert set(np.unique(np.asarray(day)[valid])) == {days}


@pytest.mark.parametrize(("encoding", "step"), [("uint16cm", 0.01), ("uint8m", 1.0)])
def test_compact_encodings(predict, inputs, tmp_path, encoding: str, step: float) -> None:
    predict(inputs / "wood.tif", "--encoding", encoding)
    support.check_grid(f"predict_{encoding}", tmp_path / "chm.tif")
    predict(inputs / "wood.tif", out="plain.tif")
    found, exact = support.metres(tmp_path / "chm.tif"), support.metres(tmp_path / "plain.tif")
    np.testing.assert_array_equal(np.isnan(found), np.isnan(exact))
    np.testing.assert_allclose(found, exact, atol=step * 0.51)
    band = json.loads((tmp_path / "chm.json").read_text())["assets"]["canopy_height"]["raster:bands"][0]
    assert (band["unit"], band["scale"]) == ("m", step)


# ---- sources ----------------------------------------------------------------------------------
def test_the_demo(predict, tmp_path) -> None:
    predict("--imagery", "demo", "--bbox", "44.083,-71.296", "--size-m", 100)
    kept("predict_demo", tmp_path / "chm.tif")


def test_a_vrt_by_name(predict, inputs, tmp_path) -> None:
    rasterio.shutil.copy(inputs / "wood.tif", tmp_path / "a.vrt", driver="VRT")
    predict("a.vrt")
    support.check_heights("predict_aligned", support.metres(tmp_path / "chm.tif"), stride=2)


def test_a_catalog_of_items(predict, inputs, tmp_path) -> None:
    """A static STAC catalog of two scenes that share ground; the newer one is taken where both have it."""
    with rasterio.open(inputs / "whole.tif") as image:
        rgb = image.read()
    catalog = pystac.Catalog("c", "two scenes")
    for name, cols, day in (("old", np.s_[:200], "2020-05-01"), ("new", np.s_[120:], "2022-05-01")):
        west = support.WEST + cols.indices(300)[0] * support.GSD
        support.write_image(tmp_path / f"{name}.tif", rgb[:, :, cols], west=west, nodata=0)
        outline = box(west, SOUTH, west + len(range(300)[cols]) / 2, support.NORTH)
        outline = geopandas.GeoSeries([outline], crs=32618).to_crs(4326)[0]
        day = datetime.datetime.fromisoformat(f"{day}T00:00:00Z")
        item = pystac.Item(name, shapely.geometry.mapping(outline), outline.bounds, day, {})
        item.add_asset("image", pystac.Asset(f"{tmp_path}/{name}.tif", media_type=TIFF, roles=["data"]))
        catalog.add_item(item)
    catalog.normalize_and_save(str(tmp_path), pystac.CatalogType.SELF_CONTAINED)
    area = ("--bounds", f"{support.WEST},{SOUTH},{EAST},{support.NORTH}", "--bounds-crs", "EPSG:32618")
    predict("--imagery", "catalog.json", *area, "--date-band")
    kept("predict_catalog", tmp_path / "chm.tif")
    with rasterio.open(tmp_path / "chm.tif") as made:
        day = made.read(2)
    first, second = (
        int(np.datetime64(d).astype("datetime64[D]").astype(int)) for d in ("2020-05-01", "2022-05-01")
    )
    assert (day[:, :120] == first).all() and (day[:, 120:] == second).all()


# ---- Python -----------------------------------------------------------------------------------
def test_from_python(predict, inputs, model, tmp_path) -> None:
    import rioxarray

    import canopy

    network = canopy.load_model(model)
    chm = canopy.predict(inputs / "wood.tif", model=network, backend="torch")
    assert chm.dims == ("y", "x") and chm.rio.crs.to_epsg() == 32618 and chm.attrs["units"] == "m"
    assert chm.rio.bounds() == (support.WEST, SOUTH, EAST, support.NORTH)
    support.check_heights("predict_aligned", chm.values, stride=2)
    for image in (rioxarray.open_rasterio(inputs / "wood.tif"), canopy.open_imagery(inputs / "wood.tif")):
        found = canopy.predict(image, model=network, backend="torch")
        np.testing.assert_allclose(found.values, chm.values, atol=1e-5)
    with pytest.raises(canopy.InputError, match="did you mean 'gsd'"):
        canopy.predict(inputs / "wood.tif", gds=2)
    path = canopy.predict(inputs / "wood.tif", model=network, backend="torch", out=tmp_path / "chm.tif")
    np.testing.assert_allclose(support.metres(path), chm.values, atol=1e-5)
    with pytest.raises(canopy.InputError, match="exists"):
        canopy.predict(inputs / "wood.tif", model=network, backend="torch", out=tmp_path / "chm.tif")
    area = {"bbox": (44.0903, -74.9993), "size_m": 20, "date_band": True}
    part = canopy.predict(str(inputs / "wood.tif"), model=network, backend="torch", **area)
    assert part.dims == ("band", "y", "x") and list(part.band.values) == ["canopy_height", "acquisition_date"]
    same = chm.sel(x=part.x, y=part.y, method="nearest", tolerance=0.01)
    np.testing.assert_allclose(part.values[0], same.values, atol=0.01)
    assert issubclass(canopy.InputError, canopy.CanopyError)


def test_the_network_alone(model) -> None:
    import torch

    import canopy

    network = canopy.load_model(model)
    assert isinstance(network, canopy.HeightModel) and not network.training
    rgb = torch.from_numpy(support.forest(100, 90, seed=9)[0][None].astype(np.float32) / 255)
    with torch.inference_mode():
        height = network(rgb)
    assert height.shape == (1, 1, 100, 90) and network(rgb[:, :, :17, :16]).shape == (1, 1, 17, 16)
    support.check_heights("network", height[0, 0].numpy(), stride=2)
