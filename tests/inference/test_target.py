"""Which grid is predicted on and which is delivered."""

from __future__ import annotations

import math

import pytest
from shapely.geometry import box

from canopy.errors import AreaError, ConfigError, ImageryError, InputError
from canopy.geo.area import AOI
from canopy.geo.crs import to_crs
from canopy.geo.grid import Grid
from canopy.inference.inputs import check_options, choose_target
from canopy.inference.options import PredictOptions

UTM = to_crs("EPSG:32618")
AREA = AOI(box(500_000.2, 4_880_000.2, 500_200.7, 4_880_150.9), UTM, is_box=True)


def test_by_default_one_grid_in_utm_at_the_models_gsd() -> None:
    target = choose_target(AREA, 0.5)
    assert target.predict == target.output
    assert target.output.crs == UTM
    assert target.output.pixel == (0.5, 0.5)
    assert target.output.bounds == (500_000, 4_880_000, 500_201, 4_880_151)


def test_the_images_utm_zone_in_another_datum_is_kept() -> None:
    nad83 = to_crs("EPSG:26918")
    assert choose_target(AREA, 0.5, native_crs=nad83).output.crs == nad83


def test_web_mercator_is_measured_on_the_ground() -> None:
    output = choose_target(AREA, 0.5, crs="EPSG:3857").output
    assert output.gsd_m == pytest.approx(0.5, rel=1e-3)
    assert output.pixel[0] == pytest.approx(0.5 / math.cos(math.radians(44.07)), rel=5e-3)


@pytest.mark.parametrize("gsd", [0.25, 1.0, 10.0])
def test_another_gsd_is_resampled_from_the_models(gsd: float) -> None:
    target = choose_target(AREA, 0.5, gsd_m=gsd)
    assert target.predict != target.output
    assert target.output.pixel == (gsd, gsd)
    assert target.predict.pixel == (0.5, 0.5)
    west, south, east, north = target.predict.bounds
    assert west < target.output.bounds[0] and south < target.output.bounds[1]
    assert east > target.output.bounds[2] and north > target.output.bounds[3]


def test_degrees_are_never_predicted_on() -> None:
    target = choose_target(AREA, 0.5, crs="EPSG:4326")
    assert target.output.crs.epsg == 4326
    assert target.predict.crs == UTM
    assert target.output.pixel[1] == pytest.approx(0.5 / 111_195)


@pytest.mark.parametrize("crs", ["EPSG:5703", "EPSG:4978", 'LOCAL_CS["field",UNIT["metre",1]]'])
def test_a_crs_that_places_nothing_is_refused(crs: str) -> None:
    with pytest.raises(InputError, match=r"--crs.*places nothing on a map; expected a projected"):
        choose_target(AREA, 0.5, crs=crs)


def test_image_grid_is_kept_to_the_pixel() -> None:
    native = Grid.of(UTM, (0.52, 0, 500_000.17, 0, -0.52, 4_880_100.09), (300, 200))
    target = choose_target(AOI.from_grid(native), 0.5, crs="image", native=native)
    assert target.output == native and target.predict == target.output, (
        "4 % off the model's scale: predicted as it is"
    )
    coarse = Grid.of(UTM, (0.8, 0, 500_000.17, 0, -0.8, 4_880_100.09), (300, 200))
    target = choose_target(AOI.from_grid(coarse), 0.5, crs="image", native=coarse)
    assert target.output == coarse and target.predict != target.output
    part = AOI(box(500_050, 4_879_900, 500_060, 4_880_000), UTM, is_box=True)
    output = choose_target(part, 0.5, crs="image", native=coarse).output
    assert output.is_aligned(coarse)
    west, south, east, north = output.bounds
    assert west <= 500_050 and east >= 500_060 and south <= 4_879_900 and north >= 4_880_000
    assert output.width <= 15 and output.height <= 127


def test_what_cannot_be_is_refused() -> None:
    native = Grid.of(UTM, (0.5, 0, 0, 0, -0.5, 4_880_100), (30, 20))
    with pytest.raises(ImageryError, match="no single grid"):
        choose_target(AREA, 0.5, crs="image")
    with pytest.raises(AreaError, match="overlap"):
        choose_target(AREA, 0.5, crs="image", native=native)
    for gsd in (0, -1, math.nan, math.inf):
        with pytest.raises(ConfigError, match="--gsd"):
            check_options(PredictOptions(gsd=gsd))
    across = AOI.from_bounds("179.9,10,-179.9,10.1")
    with pytest.raises(AreaError, match="antimeridian"):
        choose_target(across, 0.5, crs="EPSG:4326")
