"""When an image was taken."""

from __future__ import annotations

from datetime import date, timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st

from canopy.imagery.names import (
    acquisition_date,
    date_from_name,
    date_from_tags,
    days_since_epoch,
    parse_day,
    parse_range,
)


@given(st.dates(date(1940, 1, 1), date(2099, 12, 31)))
def test_every_way_of_writing_a_day_is_read(day):
    for text in (
        day.isoformat(),
        f"{day:%Y%m%d}",
        f"{day:%Y:%m:%d} 11:59:00",
        f"{day.isoformat()}T00:00:00Z",
    ):
        assert parse_day(text) == day
    assert date(1970, 1, 1) + timedelta(days=days_since_epoch(day)) == day
    assert date_from_name(f"ortho_{day:%Y%m%d}_x.tif") == (day if day.year < 2100 else None)


@pytest.mark.parametrize(
    "text", ["", "yesterday", "2021-13-01", "2021-02-30", "0001-01-01", "9999-01-01", "2021"]
)
def test_what_is_no_day(text):
    assert parse_day(text) is None


@pytest.mark.parametrize(
    ("name", "day"),
    [
        ("m_4407131_ne_19_060_20210826_20211201.tif", date(2021, 8, 26)),
        ("m_4407131_ne_19_060_20210826.tif", date(2021, 8, 26)),
        ("m_3511901_sw_11_1_20120502_20120904.tif", date(2012, 5, 2)),
        ("https://host/naip/m_4407131_ne_19_060_20210826.tif?sig=20200101", date(2021, 8, 26)),
        ("scene-2020-06-30-rgb.tif", date(2020, 6, 30)),
        ("events/x/2023-02-10/10300100E1/visual.tif", None),
        ("a_20200101_20210101.tif", None),  # two dates: which?
        ("2019_HARV_6_732000_4713000_image.tif", None),
        ("12345678901234.tif", None),
        ("image.tif", None),
    ],
)
def test_dates_in_names(name, day):
    assert date_from_name(name) == day


def test_tags_are_trusted_in_order():
    tags = {"TIFFTAG_DATETIME": "2022:05:05 10:00:00", "acquisition_date": "2021-07-04"}
    assert date_from_tags(tags) == date(2021, 7, 4)
    assert acquisition_date({"TIFFTAG_DATETIME": "2022:05:05 10:00:00"}, "x_20200606.tif") == date(2020, 6, 6)
    assert acquisition_date({"TIFFTAG_DATETIME": "2022:05:05 10:00:00"}, "x.tif") == date(2022, 5, 5)
    assert acquisition_date({}, "x.tif") is None
    assert days_since_epoch(None) == 0


@pytest.mark.parametrize(
    ("text", "first", "last"),
    [
        (None, None, None),
        ("2021", date(2021, 1, 1), date(2021, 12, 31)),
        ("2020-02", date(2020, 2, 1), date(2020, 2, 29)),
        ("2021-07-04", date(2021, 7, 4), date(2021, 7, 4)),
        ("2021-06/2021-09", date(2021, 6, 1), date(2021, 9, 30)),
        ("../2017", None, date(2017, 12, 31)),
        ("2017/..", date(2017, 1, 1), None),
        ("2021-06-01T00:00:00Z/2021-06-02T00:00:00Z", date(2021, 6, 1), date(2021, 6, 2)),
    ],
)
def test_intervals(text, first, last):
    assert parse_range(text) == (first, last)


@pytest.mark.parametrize("text", ["summer", "2021/2020", "21-06-01", "2021-13"])
def test_what_is_no_interval(text):
    with pytest.raises(ValueError):
        parse_range(text)
