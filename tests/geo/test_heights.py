"""One rule for height rasters of any origin: in every command the same metres, whatever the file is like."""

from __future__ import annotations

import geopandas
import numpy as np
import pandas
import pytest
import rasterio
from rasterio import Affine
from shapely.geometry import box

import canopy
from canopy.calibration.gedi import correct_map, read_footprints
from canopy.chips.targets import chm_target
from canopy.errors import ImageryError
from canopy.evaluation.opening import open_heights
from canopy.geo.crs import transformer
from canopy.geo.heights import height_bands
from canopy.geo.place import SourcePlace
from canopy.geo.units import metres_per

UTM, SIDE = "EPSG:32618", 120
PLACE = Affine(1, 0, 500_000, 0, -1, 4_882_000)
US_FOOT = 1200 / 3937


@pytest.fixture(scope="module")
def truth() -> np.ndarray:
    """Metres in whole centimetres, NaN in a strip."""
    values = np.random.default_rng(2).integers(0, 3000, (SIDE, SIDE)) / 100
    values[:12] = np.nan
    return values


@pytest.fixture
def write(tmp_path):
    def to(
        name: str, *bands: np.ndarray, names=(), unit=None, tags=None, band_tags=None, scale=None, **given
    ):
        count, (height, width) = len(bands), bands[0].shape
        profile = {"crs": UTM, "transform": PLACE, "dtype": bands[0].dtype, "count": count} | given
        with rasterio.open(
            tmp_path / name, "w", driver="GTiff", height=height, width=width, **profile
        ) as file:
            file.write(np.stack(bands))
            for number, text in enumerate(names, 1):
                file.set_band_description(number, text)
            file.units = [unit] * count if unit else file.units
            file.scales = [scale or 1.0] * count
            file.update_tags(**(tags or {}))
            file.update_tags(1, **(band_tags or {}))
        return tmp_path / name

    return to


def filled(metres: np.ndarray, per_unit: float, dtype: str, nodata: float) -> np.ndarray:
    """In another unit and type, with a nodata value that nothing declares."""
    values = metres / per_unit
    values = values.round() if np.dtype(dtype).kind in "iu" else values
    return np.where(np.isnan(values), nodata, values).astype(dtype)


ODD = {
    "feet": lambda w, t: w("a.tif", filled(t, 0.3048, "float64", -9999), unit="Feet"),
    "survey feet in the description": lambda w, t: w(
        "a.tif", filled(t, US_FOOT, "float32", 1e20), names=["CHM (US survey feet)"]
    ),
    "centimetres in a tag of the band": lambda w, t: w(
        "a.tif", filled(t, 0.01, "int32", -2147483648), band_tags={"units": "cm"}
    ),
    "scaled, the second of three bands": lambda w, t: w(
        "a.tif", *(filled(t + more, 0.01, "uint16", 65535) for more in (200, 0, 5)),
        names=["DSM", "chm", "cover"], scale=0.01,
    ),
    "millimetres, from south to north": lambda w, t: w(
        "a.tif", filled(t[::-1], 0.001, "int32", -32768), unit="mm",
        transform=Affine(1, 0, 500_000, 0, 1, 4_882_000 - SIDE),
    ),
    "the smallest number there is": lambda w, t: w("a.tif", filled(t, 1, "float64", np.finfo("f8").min)),
}  # fmt: skip


@pytest.mark.parametrize("kind", ODD)
def test_every_command_reads_the_same_metres(kind, write, truth, tmp_path) -> None:
    plain = write("plain.tif", truth.astype("float32"), nodata=float("nan"))
    odd = ODD[kind](write, truth)
    exact = pytest.approx(np.nanmean(truth), abs=2e-3)
    zones = geopandas.GeoDataFrame(
        geometry=[box(500_000, 4_882_000 - SIDE, 500_000 + SIDE, 4_882_000)], crs=UTM
    )
    table = canopy.stats(odd, zones)
    assert table.mean_m[0] == exact and table.n[0] == np.isfinite(truth).sum()
    assert any("impossible heights" in note for note in table.attrs["notes"])
    scores = canopy.evaluate(odd, plain, replicates=0, shift=False).overall
    assert scores["mae_m"].value < 1e-3 and scores.n == np.isfinite(truth).sum()
    found = canopy.compare(plain, odd, mode="products")
    assert float(np.abs(found.maps["difference"]).max()) < 1e-3
    with rasterio.open(plain) as file:
        grid = SourcePlace.of(file).grid()
    np.testing.assert_allclose(chm_target(odd, grid), truth, atol=1e-3)
    at = np.random.default_rng(0).uniform(30, SIDE - 15, (2, 80))
    lon, lat = transformer(UTM, "EPSG:4326").transform(500_000 + at[0], 4_882_000 - at[1])
    shots = pandas.DataFrame({"lon": lon, "lat": lat, "rh_98": 25.0})
    discs = [read_footprints(open_heights(path), shots).map_m for path in (plain, odd)]
    np.testing.assert_allclose(*discs, atol=1e-3)


def test_the_band_of_canopy_is_the_one_that_gedi_corrects(write, truth, tmp_path) -> None:
    at = np.random.default_rng(0).uniform(15, SIDE - 15, (2, 80))
    lon, lat = transformer(UTM, "EPSG:4326").transform(500_000 + at[0], 4_882_000 - at[1])
    shots = {"shot_number": range(80), "lon": lon, "lat": lat, "rh_98": 20.0}
    pandas.DataFrame(shots).to_csv(tmp_path / "shots.csv", index=False)
    feet = filled(truth, 0.3048, "float32", -9999)
    path = write("a.tif", feet + 700, feet, names=["DSM", "CHM"], unit="ft")
    report = correct_map(path, tmp_path / "shots.csv", tmp_path / "out.tif")
    assert "were converted to metres" in " ".join(report["notes"])
    with rasterio.open(tmp_path / "out.tif") as file:
        assert file.descriptions == ("DSM", "CHM", "correction_se") and file.units[1] == "m"
        corrected, surface = file.read(2), file.read(1)
    assert np.nanmax(corrected) < 60 and np.nanmin(surface) >= 700
    np.testing.assert_array_equal(np.isnan(corrected), np.isnan(truth))


def test_units_as_the_field_writes_them(write, truth) -> None:
    for text in ("m", "Metre", "METERS", "[m]", "metres above ground", "Meter (m)", "EPSG:9001", "m AGL"):
        assert metres_per(text) == 1, text
    for text in ("ft", "Foot", "feet", "(ft)", "international feet", "ft AGL"):
        assert metres_per(text) == 0.3048, text
    for text in ("US survey foot", "US_survey_foot", "us-ft", "ftUS", "foot_us", "U.S. Survey Feet", "sft"):
        assert metres_per(text) == US_FOOT, text
    assert [metres_per(text) for text in ("furlong", "yd", "1", "unknown")] == [None] * 4
    heights = truth.astype("float32")
    for given, told in (
        ({"unit": "furlong"}, "heights in 'furlong'; expected metres.*--units m FILE"),
        ({"unit": "m", "names": ["chm_ft"]}, "in m and in ft"),
    ):
        with rasterio.open(write("b.tif", heights, **given)) as file, pytest.raises(ImageryError, match=told):
            height_bands(file)
    for names in (["canopy_height"], ["CHM (2019)"], ["rh_98"]):
        with rasterio.open(write("b.tif", heights, names=names)) as file:
            assert height_bands(file).scale == (1,) and height_bands(file).unit is None


@pytest.mark.parametrize("what", ["centimetres", "elevations"])
def test_many_different_impossible_heights_are_refused(what, write, truth) -> None:
    """Of centimetres without a word, the few below 150 would be believed; a nodata value is one number."""
    values = truth * 100 if what == "centimetres" else truth + 400
    path = write("a.tif", np.nan_to_num(values).astype("float32"))
    zones = geopandas.GeoDataFrame(geometry=[box(500_000, 4_881_900, 500_100, 4_882_000)], crs=UTM)
    with pytest.raises(ImageryError, match=r"a\.tif: \d+ % of its pixels.*--units cm FILE"):
        canopy.stats(path, zones)
    with pytest.raises(ImageryError, match="expected canopy heights in metres"):
        canopy.evaluate(write("b.tif", truth.astype("float32"), nodata=float("nan")), path)
    with rasterio.open(path, "r+") as file:  # what the message says
        file.units = ["cm"]
    if what == "centimetres":
        assert canopy.stats(path, zones).max_m[0] <= 30
