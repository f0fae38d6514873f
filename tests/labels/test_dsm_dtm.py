"""Surface minus terrain of odd rasters: units, bands, datums, places, values that nothing declares."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import rasterio
from pyproj import CRS
from rasterio import Affine

from canopy.errors import DataError, ImageryError
from canopy.labels.chm import ChmOptions, chm_from_rasters

UTM, SIDE = "EPSG:32619", 60
PLACE = Affine(1, 0, 500_000, 0, -1, 4_882_000)
US_FOOT = 1200 / 3937


@pytest.fixture(scope="module")
def tall() -> np.ndarray:
    return np.random.default_rng(1).uniform(0, 30, (SIDE, SIDE)).round(2)


@pytest.fixture(scope="module")
def ground() -> np.ndarray:
    return np.random.default_rng(2).uniform(200, 260, (SIDE, SIDE)).round(2)


@pytest.fixture
def made(tmp_path, monkeypatch):
    """`made(dsm={...}, dtm={...})`: the heights of two rasters, of bands and what rasterio takes."""
    monkeypatch.chdir(tmp_path)

    def make(*, dsm, dtm, options=None, **more) -> np.ndarray:
        for name, given in (("dsm.tif", dict(dsm)), ("dtm.tif", dict(dtm))):
            bands = np.atleast_3d(np.asarray(given.pop("bands")).T).T
            names, unit = given.pop("names", ()), given.pop("unit", None)
            count, height, width = bands.shape
            profile = {"crs": UTM, "transform": PLACE, "dtype": bands.dtype, "count": count} | given
            with rasterio.open(name, "w", driver="GTiff", height=height, width=width, **profile) as file:
                file.write(bands)
                file.units = [unit] * count if unit else file.units
                for number, text in enumerate(names, 1):
                    file.set_band_description(number, text)
        return heights(options, **more)

    def heights(options=None, **more) -> np.ndarray:
        chm_from_rasters(
            "dsm.tif", "dtm.tif", "chm.tif", ChmOptions(overwrite=True, **(options or {})), **more
        )
        with rasterio.open("chm.tif") as file:
            return file.read(1)

    make.again = heights
    return make


def rio(command: str, *name: str) -> None:
    """Type what a message says."""
    words = [name[0] if word == "FILE" and name else word for word in command.split()]
    subprocess.run([str(Path(sys.executable).parent / words[0]), *words[1:]], check=True)


@pytest.mark.parametrize(
    ("unit", "metres", "dtm_unit", "dtm_metres"),
    [("US survey feet", US_FOOT, "ftUS", US_FOOT), ("Feet", 0.3048, "m", 1), ("cm", 0.01, "dm", 0.1),
     ("millimeter", 0.001, "Metre", 1)],
)  # fmt: skip
def test_each_raster_has_its_unit(made, tall, ground, unit, metres, dtm_unit, dtm_metres) -> None:
    dsm = {"bands": (ground + tall) / metres, "unit": unit}
    got = made(dsm=dsm, dtm={"bands": ground / dtm_metres, "unit": dtm_unit})
    np.testing.assert_allclose(got, tall, atol=2e-3)


def test_an_unknown_unit_is_refused_with_a_command_that_helps(made, tall, ground) -> None:
    with pytest.raises(ImageryError, match=r"dsm\.tif: heights in 'furlong'") as refused:
        made(dsm={"bands": ground + tall, "unit": "furlong"}, dtm={"bands": ground})
    rio(str(refused.value).split(": ")[-1], "dsm.tif")
    np.testing.assert_allclose(made.again(), tall, atol=2e-3)


def test_of_several_bands_the_one_that_says_so(made, tall, ground) -> None:
    both = np.stack([tall, ground + tall, ground])
    names = ["CHM", "Surface model", "bare earth"]
    got = made(dsm={"bands": both, "names": names}, dtm={"bands": both, "names": names})
    np.testing.assert_allclose(got, tall, atol=2e-3)
    with pytest.raises(DataError, match=r"dsm\.tif: holds 3 bands \(1, 2, 3\)") as refused:
        made(dsm={"bands": both}, dtm={"bands": ground})
    rio(str(refused.value).split(": ")[-1].replace(" N ", " 2 ").replace("dsm.tif", "one.tif"), "dsm.tif")
    Path("one.tif").replace("dsm.tif")
    np.testing.assert_allclose(made.again(), tall, atol=2e-3)


def test_rows_from_the_south_and_foreign_places(made, tall, ground) -> None:
    south = {"transform": Affine(1, 0, 500_000, 0, 1, 4_882_000 - SIDE)}
    dsm, dtm = {"bands": ground + tall}, {"bands": ground}
    for one, other in ((south, {}), ({}, south), (south, south)):
        flip = [np.s_[::-1] if side else np.s_[:] for side in (one, other)]
        got = made(dsm={"bands": dsm["bands"][flip[0]], **one}, dtm={"bands": ground[flip[1]], **other})
        np.testing.assert_allclose(got, tall, atol=2e-3)
    local = {"crs": 'LOCAL_CS["site",UNIT["metre",1]]'}
    with pytest.raises(DataError, match=r"dsm\.tif: site is a Engineering CRS.*Name it with --input-crs"):
        made(dsm=dsm | local, dtm=dtm | local)
    np.testing.assert_allclose(made.again({"input_crs": UTM}), tall, atol=2e-3)


def test_one_datum_in_metres_and_feet_and_two_datums(made, tall, ground) -> None:
    navd = {"crs": CRS("EPSG:32619+5703").to_wkt()}, {"crs": CRS("EPSG:32619+6360").to_wkt()}
    dsm = {"bands": ground + tall}
    got = made(dsm=dsm | navd[0], dtm={"bands": ground / US_FOOT, "unit": "US survey foot"} | navd[1])
    np.testing.assert_allclose(got, tall, atol=2e-3)
    for crs in (CRS(UTM).to_3d().to_wkt(), CRS("EPSG:32619+5773").to_wkt()):
        with pytest.raises(DataError, match=r"above the same vertical datum"):
            made(dsm=dsm | navd[0], dtm={"bands": ground, "crs": crs})


@pytest.mark.parametrize("value", [-9999, -32768, -3.4028235e38, 3.4028235e38, 1e20, 9999, np.nan])
def test_what_is_no_elevation_is_missing(made, tall, ground, caplog, value) -> None:
    surface, terrain = (ground + tall).astype("f4"), ground.astype("f4")
    surface[:6] = terrain[:6] = value
    got = made(dsm={"bands": surface}, dtm={"bands": terrain})
    assert np.isnan(got[:6]).all()
    np.testing.assert_allclose(got[6:], tall[6:], atol=2e-3)
    assert ("10.0% of the pixels have impossible elevations" in caplog.text) == np.isfinite(value)


@pytest.mark.parametrize(("surface_m", "told"), [(0, "both exactly 0 m"), (-100, "both exactly -100 m"),
                                                 (None, "terrain alone is exactly 0 m")])  # fmt: skip
def test_what_may_be_no_elevation_is_told_and_can_be_declared(
    made, tall, ground, caplog, surface_m, told
) -> None:
    surface, terrain = ground - 190 + tall, ground - 190
    terrain[:6] = surface_m or 0
    if surface_m is not None:
        surface[:6] = surface_m
    made(dsm={"bands": surface}, dtm={"bands": terrain})
    assert told in caplog.text and "10% of the pixels" in caplog.text
    rio(caplog.text.split("(")[-1].split(")")[0], "dtm.tif")
    assert np.isnan(made.again()[:6]).all()


def test_a_dry_run_says_the_place_and_writes_nothing(made, tall, ground) -> None:
    made(dsm={"bands": ground + tall}, dtm={"bands": ground})
    Path("chm.tif").unlink()
    facts = chm_from_rasters("dsm.tif", "dtm.tif", "chm.tif", dry_run=True)
    assert (facts["width_px"], facts["height_px"], facts["crs"]) == (SIDE, SIDE, UTM)
    assert sorted(path.name for path in Path().iterdir()) == ["dsm.tif", "dtm.tif"]
