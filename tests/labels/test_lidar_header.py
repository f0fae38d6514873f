"""What a point cloud says of its place and units, and what is refused."""

from __future__ import annotations

import importlib.util
import struct
from pathlib import Path

import laspy
import numpy as np
import pytest

from canopy.errors import DataError
from canopy.labels.points import METRES, open_lidar

_spec = importlib.util.spec_from_file_location("lidar_files", Path(__file__).parent / "lidar_files.py")
lidar_files = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(lidar_files)

# One place in Eugene, Oregon, in the CRSs that American files come in.
PLACES = {
    "EPSG:26910": (494_300.0, 4_877_800.0),
    "EPSG:2994": (637_000.0, 851_000.0),  # Oregon Lambert, international feet
    "EPSG:2270": (4_260_000.0, 880_000.0),  # Oregon South, international feet
    "EPSG:2914": (4_260_000.0, 880_000.0),
}


def cloud(tmp_path, crs, x, y, **more):
    x = x + np.array([0.0, 3.0, 0.0, 3.0])
    y = y + np.array([0.0, 0.0, 3.0, 3.0])
    return lidar_files.write_cloud(tmp_path / "c.las", x, y, np.full(4, 100.0), crs=crs, **more)


@pytest.mark.parametrize(
    ("crs", "unit", "noted"),
    [
        ("EPSG:26910", "m", False),
        ("EPSG:26910+5703", "m", False),  # NAVD88 metres
        ("EPSG:26910+6360", "us-ft", False),  # metric plane, elevations in US survey feet
        ("EPSG:26910+8228", "ft", False),  # NAVD88 international feet
        ("EPSG:2994", "ft", True),
        ("EPSG:2994+5703", "m", False),  # feet across, metres up
    ],
)
def test_the_unit_of_elevations_is_that_of_the_vertical_axis_else_that_of_x_and_y(tmp_path, crs, unit, noted):
    found = open_lidar(cloud(tmp_path, crs, *PLACES[crs.split("+")[0]]))
    assert found.z_to_m == pytest.approx(METRES[unit], rel=1e-12) and bool(found.notes) is noted


def test_international_and_us_survey_feet_are_two_units(tmp_path):
    # Kentucky single zone, US survey feet.
    path = cloud(tmp_path, "EPSG:3089", 5_700_000.0, 3_500_000.0)
    survey = open_lidar(path)
    assert survey.z_to_m == 1200 / 3937 and "US survey feet" in survey.notes[0]
    assert open_lidar(path, units="ft").z_to_m == 0.3048
    assert open_lidar(path, units="m").z_to_m == 1.0
    # Over 500 m of elevation they differ by a millimetre, over the easting by three metres and more.
    assert 5_700_000 * (survey.z_to_m - 0.3048) > 3


def test_a_file_that_says_otherwise_is_overruled_with_a_note(tmp_path):
    path = cloud(tmp_path, "EPSG:26910+5703", *PLACES["EPSG:26910"])
    found = open_lidar(path, units="us-ft")
    assert found.z_to_m == METRES["us-ft"] and "says metres" in found.notes[0]


def test_geotiff_keys_tell_the_vertical_unit_too(tmp_path):
    keys = [(1, 1, 0, 3), (1024, 0, 1, 1), (3072, 0, 1, 26910), (4099, 0, 1, 9003)]
    record = laspy.VLR("LASF_Projection", 34735, "", b"".join(struct.pack("<4H", *k) for k in keys))
    path = cloud(tmp_path, None, *PLACES["EPSG:26910"], point_format=1, vlrs=(record,))
    found = open_lidar(path)
    assert found.crs.epsg == 26910 and found.z_to_m == METRES["us-ft"]


def test_a_file_without_crs_needs_one(tmp_path):
    path = cloud(tmp_path, None, *PLACES["EPSG:26910"])
    with pytest.raises(DataError, match=r"no coordinate reference system.*--crs"):
        open_lidar(path)
    assert open_lidar(path, crs="EPSG:26910").crs.epsg == 26910


@pytest.mark.parametrize("wrong", ["EPSG:2154", "EPSG:31983", "EPSG:4326"])
def test_a_crs_that_puts_the_points_elsewhere_is_refused(tmp_path, wrong):
    path = cloud(tmp_path, None, *PLACES["EPSG:26910"])
    with pytest.raises(DataError, match="--crs"):
        open_lidar(path, crs=wrong)


@pytest.mark.parametrize("content", [b"", b"LASF", b"not lidar at all" * 60, b"LASF" + b"\0" * 500])
def test_what_is_no_point_cloud_is_named(tmp_path, content):
    path = tmp_path / "odd.laz"
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"odd\.laz"):
        open_lidar(path)


def test_no_file_a_folder_and_no_points_are_named(tmp_path):
    nothing = np.zeros(0)
    empty = lidar_files.write_cloud(tmp_path / "none.laz", nothing, nothing, nothing)
    for path, said in ((tmp_path / "gone.laz", "no such file"), (tmp_path, "a folder"), (empty, "no points")):
        with pytest.raises(DataError, match=said):
            open_lidar(path)
