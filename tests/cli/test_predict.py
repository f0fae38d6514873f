"""`canopy predict` as its users meet it: files, facts beside them, areas, grids, machine-readable output."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import rasterio


@pytest.fixture
def predict(canopy, model_file):
    def run(*words: object, out: str = "chm.tif", code: int = 0):
        done = canopy("predict", *words, "--model", model_file, "-o", out)
        assert done.code == code, done.err
        return done

    return run


def test_the_same_input_gives_the_same_bytes(predict, make_image, heights) -> None:
    image = make_image(photometric="RGB")
    predict(image, out="a.tif")
    predict(image, "--workers", "1", out="b.tif")
    assert Path("a.tif").read_bytes() == Path("b.tif").read_bytes()
    # Another batch size may use another matrix kernel: the last bits of a float, no more.
    predict(image, "--batch-size", "1", out="c.tif")
    np.testing.assert_allclose(heights("c.tif"), heights("a.tif"), atol=1e-3)


def test_the_stac_item(predict, make_image) -> None:
    pystac = pytest.importorskip("pystac")
    predict(make_image("m_4407101_ne_18_060_20210715.tif", photometric="RGB"), "--quicklook")
    raw = json.loads(Path("chm.json").read_text())
    item = pystac.Item.from_dict(raw)
    assert item.id == "chm"
    assert item.datetime.date().isoformat() == "2021-07-15"
    assert item.properties["proj:code"] == "EPSG:32618"
    assert item.properties["proj:shape"] == [100, 120]
    assert item.properties["proj:transform"] == [0.5, 0, 500_000, 0, -0.5, 4_882_000]
    assert item.properties["processing:software"]["canopy"]
    assert item.common_metadata.created is not None
    west, south, east, north = item.bbox
    assert -75.001 < west < east < -74.99 and 44.09 < south < north < 44.1
    asset = item.assets["canopy_height"]
    digest = hashlib.sha256(Path("chm.tif").read_bytes()).hexdigest()
    assert asset.extra_fields["file:checksum"] == f"1220{digest}"
    assert asset.extra_fields["file:size"] == Path("chm.tif").stat().st_size
    band = asset.extra_fields["raster:bands"][0]
    assert (band["unit"], band["data_type"], band["nodata"]) == ("m", "float32", "nan")
    assert raw["stac_version"] == "1.1.0"
    assert raw["assets"]["canopy_height"]["bands"] == [
        {key: band[key] for key in ("name", "data_type", "nodata", "unit", "statistics")}
    ]
    assert [link.rel for link in item.links] == ["derived_from"]
    assert set(item.stac_extensions) == {
        f"https://stac-extensions.github.io/{name}/schema.json"
        for name in ("projection/v2.0.0", "raster/v1.1.0", "file/v2.1.0", "processing/v1.1.0")
    }
    for one in item.assets.values():
        assert (Path("chm.json").parent / one.href).is_file()


def test_unknown_dates_stay_a_valid_item(predict, make_image) -> None:
    pystac = pytest.importorskip("pystac")
    predict(make_image(photometric="RGB"))
    item = pystac.Item.from_dict(json.loads(Path("chm.json").read_text()))
    assert item.datetime is None
    assert item.properties["start_datetime"] < item.properties["end_datetime"] <= item.properties["created"]


def test_the_quicklook_is_a_picture_of_the_map(predict, make_image) -> None:
    from PIL import Image

    done = predict(make_image(photometric="RGB"), "--quicklook")
    assert "chm.png" in done.out
    with Image.open("chm.png") as picture:
        pixels = np.asarray(picture.convert("RGB"))
    assert min(pixels.shape[:2]) > 300
    assert len(np.unique(pixels.reshape(-1, 3), axis=0)) > 50


# ---- what is printed --------------------------------------------------------------------------
def test_json_is_one_object_and_nothing_else(predict, make_image) -> None:
    done = predict(make_image(photometric="RGB"), "--json")
    result = json.loads(done.out)
    assert result["output"] == "chm.tif"
    assert result["sha256"] == hashlib.sha256(Path("chm.tif").read_bytes()).hexdigest()
    assert result["valid_fraction"] == 1.0
    assert result["mean_height_m"] > 0
    with rasterio.open("chm.tif") as made:
        assert result["mean_height_m"] == pytest.approx(float(made.read(1).mean()), rel=1e-4)
    assert "tile" in done.err, "the area is echoed on stderr"


def test_quiet_says_only_the_result(predict, make_image) -> None:
    assert predict(make_image(photometric="RGB"), "-q").err == ""


def test_a_map_without_its_item_is_no_map(predict, make_image, tmp_path) -> None:
    """What lies beside a map takes its place with it, or nothing does."""
    image = make_image(photometric="RGB")
    predict(image, "--quicklook")
    before = Path("chm.tif").read_bytes()
    Path("chm.json").unlink()
    Path("chm.json").mkdir()
    done = predict(image, "--quicklook", "--overwrite", "--gsd", "1", code=2)
    assert "chm.json" in done.error_line and "Traceback" not in done.err
    assert Path("chm.tif").read_bytes() == before
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_the_default_name_follows_the_image(canopy, model_file, make_image) -> None:
    image = make_image("forest.tif", photometric="RGB")
    assert canopy("predict", image, "--model", model_file).code == 0
    assert Path("forest_chm.tif").is_file()


def test_negative_numbers_after_a_space_and_one_area_only(predict, make_image) -> None:
    image = make_image(photometric="RGB")
    done = predict(image, "--bbox", "-23.55,-46.63", "--size-m", "500", code=2)
    assert "23.55" in done.error_line and "S" in done.error_line and "no imagery there" in done.error_line
    line = predict(image, "--bbox", "44,-75,45,-74", "--bounds", "-75,44,-74,45", code=2).error_line
    assert "--bbox" in line and "--bounds" in line
    # A point alone is the middle of a square kilometre.
    assert "1.0 x 1.0 km" in predict(image, "--bbox", "44.09,-75", "--dry-run").err


def test_an_image_in_degrees_keeps_its_grid_if_asked_to(predict, make_image, heights) -> None:
    placed = rasterio.Affine(6e-6, 0, -71.3, 0, -4.5e-6, 44.1)  # both sides half a metre there
    predict(make_image(crs="EPSG:4326", transform=placed, photometric="RGB"), "--crs", "image")
    with rasterio.open("chm.tif") as made:
        assert made.crs.to_epsg() == 4326 and made.transform == placed and made.shape == (100, 120)
    assert np.isfinite(heights("chm.tif")).mean() > 0.95


def test_crs_image_in_degrees_is_predicted_in_metres(predict, make_image, heights) -> None:
    step = 0.5 / 111_320
    placed = rasterio.Affine(step, 0, -71.3, 0, -step, 44.1)
    image = make_image(crs="EPSG:4326", transform=placed, photometric="RGB")
    predict(image, "--crs", "EPSG:4326")
    with rasterio.open("chm.tif") as made:
        assert made.crs.to_epsg() == 4326
    made = heights("chm.tif")
    assert np.isfinite(made).mean() > 0.9
    assert made[np.isfinite(made)].std() > 0.1


def test_a_coarser_map_is_the_average_of_the_fine_one(predict, make_image, heights) -> None:
    image = make_image(photometric="RGB")
    predict(image, out="fine.tif")
    predict(image, "--gsd", "2", out="coarse.tif")
    fine = heights("fine.tif").reshape(25, 4, 30, 4).mean(axis=(1, 3))
    np.testing.assert_allclose(heights("coarse.tif"), fine, atol=1e-3)


def test_a_coarse_pixel_with_a_height_has_a_day(predict, make_image, heights) -> None:
    """Also where the fine pixel at its middle has no image."""
    mask = np.ones((100, 120), bool)
    mask[1::3, 1::3] = False  # the middle of every 3 x 3
    placed = rasterio.Affine(0.5, 0, 500_001, 0, -0.5, 4_882_000.5)  # whole multiples of 1.5 m
    image = make_image("a_20210715.tif", transform=placed, mask=mask, photometric="RGB")
    predict(image, "--gsd", "1.5", "--date-band")
    with rasterio.open("chm.tif") as made:
        height, day = made.read()
    assert np.isfinite(height).any()
    assert (
        day[np.isfinite(height)] == (np.datetime64("2021-07-15") - np.datetime64("1970-01-01")).astype(int)
    ).all()


def test_a_finer_map_interpolates_and_keeps_validity(predict, make_image, heights) -> None:
    mask = np.ones((100, 120), bool)
    mask[30:50, 40:70] = False
    image = make_image(mask=mask, photometric="RGB")
    predict(image, out="model.tif")
    predict(image, "--gsd", "0.25", out="fine.tif")
    fine = heights("fine.tif")
    assert fine.shape == (200, 240)
    assert abs(np.nanmean(fine) - np.nanmean(heights("model.tif"))) < 0.05
    hole = np.isnan(fine)
    assert hole[60:100, 80:140].all()
    assert hole.mean() == pytest.approx((~mask).mean(), abs=0.02)


@pytest.mark.parametrize("encoding", ["float32", "uint16cm"])
def test_the_date_band_holds_days(predict, make_image, encoding: str) -> None:
    import datetime

    image = make_image("m_4407101_ne_18_060_20210715.tif", photometric="RGB")
    predict(image, "--date-band", "--encoding", encoding)
    with rasterio.open("chm.tif") as made:
        assert made.descriptions == ("canopy_height", "acquisition_date")
        days = made.read(2) * made.scales[1]
    assert set(np.unique(days)) == {(datetime.date(2021, 7, 15) - datetime.date(1970, 1, 1)).days}
    predict(image, "--date-band", "--encoding", "uint8m", out="other.tif", code=2)


@pytest.mark.parametrize(
    "words",
    [
        ("--encoding", "int4"), ("--gsd", "-1"), ("--gsd", "nan"), ("--device", "abacus"),
        ("--precision", "fp8"), ("--precision", "bf16", "--backend", "onnx"), ("--precision", "int8"),
        ("--backend", "abacus"), ("--backend", "openvino", "--device", "cuda"), ("--batch-size", "0"),
        ("--workers", "0"), ("--crs", "EPSG:1"), ("--size-m", "100"), ("--bands", "1,2"),
        ("--bands", "7,8,9"), ("--datetime", "someday"),
    ],
)  # fmt: skip
def test_impossible_options_exit_2(predict, make_image, tmp_path, words: tuple[str, ...]) -> None:
    done = predict(make_image(photometric="RGB"), *words, code=2)
    assert done.error_line.startswith("canopy: ")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["image.tif"]


@pytest.mark.skipif(os.name == "nt", reason="signals of Unix")
def test_ctrl_c_is_one_line_and_leaves_nothing(repo, model_file, tmp_path) -> None:
    words = ["predict", "--imagery", "demo", "--bbox", "44.083,-71.296", "--size-m", "1500", "-o", "chm.tif"]
    program = [
        sys.executable,
        "-c",
        "from canopy.cli.main import main; main()",
        *words,
        "--model",
        str(model_file),
    ]
    running = subprocess.Popen(
        program, cwd=tmp_path, stderr=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": str(repo)},
        # A shell's background jobs ignore the signal, and so would what they start.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip
    deadline = time.monotonic() + 60
    while not list(tmp_path.glob(".chm.tif.*")) and running.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    time.sleep(0.2)
    running.send_signal(signal.SIGINT)
    told = running.communicate(timeout=60)[1].splitlines()
    assert running.returncode == 130 and told[-1].startswith("canopy: interrupted; ")
    assert "Traceback" not in "".join(told) and list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("words", ["'--help'", "'predict', '--help'"])
def test_help_imports_neither_torch_nor_xarray(repo: Path, words: str) -> None:
    code = (
        f"import sys; sys.argv = ['canopy', {words}]\n"
        "from canopy.cli.main import main\n"
        "try: main()\n"
        "except SystemExit: pass\n"
        "heavy = {'torch', 'xarray', 'matplotlib', 'geopandas', 'rasterio', 'numpy'}\n"
        "heavy |= {'pydantic'} if len(sys.argv) == 2 else set()\n"
        "heavy &= set(sys.modules)\n"
        "sys.exit(f'imported {heavy}' if heavy else 0)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=repo, timeout=60)
    assert done.returncode == 0, done.stderr
    assert ("--bbox" in done.stdout) == ("predict" in words)


def test_a_coarse_map_of_a_polygon_equals_that_of_the_whole(predict, make_image, heights) -> None:
    import geopandas
    from shapely.geometry import Point

    image = make_image(photometric="RGB")
    predict(image, "--gsd", "2", out="whole.tif")
    geopandas.GeoDataFrame(geometry=[Point(500_030, 4_881_975).buffer(15)], crs=32618).to_file("disc.gpkg")
    predict(image, "--gsd", "2", "--aoi", "disc.gpkg", out="disc.tif")
    disc = heights("disc.tif")
    with rasterio.open("disc.tif") as small, rasterio.open("whole.tif") as large:
        window = rasterio.windows.from_bounds(*small.bounds, transform=large.transform).round()
        expected = large.read(1, window=window)
    inside = np.isfinite(disc)
    assert 150 < inside.sum() < 200
    np.testing.assert_allclose(disc[inside], expected[inside], atol=1e-3)


# ---- inputs are never outputs -----------------------------------------------------------------
@pytest.mark.parametrize("name", ["stand.json", "stand.png", "stand.tif"])
def test_no_input_is_ever_overwritten(predict, make_image, tmp_path, name: str) -> None:
    """The AOI, the image and the model file, under the name of the map, of its item or of its picture."""
    import shutil

    import geopandas
    from shapely.geometry import Point

    image = make_image(photometric="RGB")
    aoi = tmp_path / "aoi.geojson"
    geopandas.GeoDataFrame(geometry=[Point(500_030, 4_881_975).buffer(15)], crs=32618).to_crs(4326).to_file(
        aoi
    )
    taken = tmp_path / name
    shutil.copy(image if name.endswith(".tif") else aoi, taken)
    before = taken.read_bytes()
    words = (taken,) if name.endswith(".tif") else (image, "--aoi", taken)
    done = predict(*words, "--quicklook", "--overwrite", out="stand.tif", code=2)
    assert name in done.error_line and "input" in done.error_line
    assert taken.read_bytes() == before


def test_a_very_long_name_is_refused_at_once(predict, make_image) -> None:
    done = predict(make_image(photometric="RGB"), out="x" * 250 + ".tif", code=2)
    assert "bytes" in done.error_line and "240" in done.error_line


# ---- from Python ------------------------------------------------------------------------------
def test_arrays_and_opened_imagery_are_images(make_image, model_file, tmp_path) -> None:
    import rioxarray

    import canopy

    image = make_image(photometric="RGB")
    options = {"model": model_file, "device": "cpu", "backend": "torch"}
    chm = canopy.predict(image, **options)
    assert chm.dims == ("y", "x") and chm.rio.crs.to_epsg() == 32618 and np.isfinite(chm.values).any()
    array = rioxarray.open_rasterio(image)
    np.testing.assert_allclose(canopy.predict(array, **options), chm, atol=1e-5)
    np.testing.assert_allclose(canopy.predict(canopy.open_imagery(image), **options), chm, atol=1e-5)
    for wrong, said in ((array[0], "red, green and blue"), (array.drop_vars("spatial_ref"), "CRS")):
        with pytest.raises(canopy.InputError, match=said):
            canopy.predict(wrong, **options)
    with pytest.raises(canopy.InputError, match="did you mean 'gsd'"):
        canopy.predict(image, gds=2)
