"""Sources by name: strict manifests, the best source for an area, the demo; and dates that files tell."""

from __future__ import annotations

from datetime import date, timedelta

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from canopy.config import manifest_names
from canopy.errors import AreaError, ConfigError, ImageryError, InputError
from canopy.geo.area import AOI
from canopy.geo.grid import Grid
from canopy.imagery.base import check_coverage
from canopy.imagery.dates import acquisition_date, date_from_name, days_since_epoch, parse_day, parse_range
from canopy.imagery.named import (
    LATITUDE,
    LONGITUDE,
    SIDE_M,
    DemoSource,
    all_sources,
    best_source,
    named_source,
)
from canopy.imagery.open import open_imagery

SHIPPED = {"demo", "ign-ortho", "maxar-open-data", "naip", "neon-rgb", "swissimage", "vantor-open-data"}
MINIMAL = """
name: mine
title: Test
kind: file
href: {href}
gsd_m: 0.5
licence: CC0
attribution: nobody
dates: 2020/2021
coverage: [-72, 44, -71, 45]
"""


@pytest.fixture
def manifest(tmp_path, monkeypatch):
    """`manifest(href, *changes)` writes mine.yaml, with texts replaced, into an otherwise empty set."""
    folder = tmp_path / "manifests" / "imagery"
    folder.mkdir(parents=True)
    monkeypatch.setenv("CANOPY_MANIFESTS", str(folder.parent))

    def write(href: object = "a.tif", *changes: tuple[str, str]) -> None:
        text = MINIMAL.format(href=href)
        for old, new in changes:
            assert old in text
            text = text.replace(old, new)
        (folder / "mine.yaml").write_text(text)

    return write


def test_every_shipped_manifest_is_valid_and_says_its_terms():
    sources = {source.name: source for source in all_sources()}
    assert set(sources) >= SHIPPED and list(sources) == manifest_names("imagery")
    for source in sources.values():
        assert source.licence and source.attribution and source.notes and 0 < source.gsd_m <= 3
        assert source.geometry.is_valid and not source.geometry.is_empty
        first, last = source.dates.split("/")
        assert first[:4].isdigit() and first <= last
        assert "sig=" not in source.href and "token" not in source.href.lower()


@pytest.mark.parametrize(
    ("lat", "lon", "name"),
    [
        (44.083, -71.296, "naip"),  # White Mountains; the demo, which is there too, is never chosen
        (43.7, -79.4, None),  # Toronto
        (32.4, -117.0, None),  # Tijuana
        (48.4, 2.7, "ign-ortho"),  # Fontainebleau
        (50.85, 4.35, None),  # Brussels
        (46.8, 8.2, "swissimage"),  # Obwalden
        (45.46, 9.19, None),  # Milan
    ],
)
def test_the_best_source_is_on_the_right_side_of_borders(lat, lon, name):
    best = best_source(AOI.from_bbox([lat, lon], size_m=500))
    assert (best.name if best else None) == name


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("licence: CC0\n", "licence: CC0\nlicens: x\n", r"'licens'.*did you mean 'licence'"),
        ("kind: file", "kind: files", "kind"),
        ("href: a.tif", "href: ''", "needs href"),
        ("[-72, 44, -71, 45]", "[-71, 44, -72, 45]", "west, south, east, north"),
        ("[-72, 44, -71, 45]", "[-72, 44, -71, 99]", "coverage"),
        ("name: mine", "name: yours", "expected 'mine'"),
        ("title: Test", "title: [unclosed", "YAML"),
    ],
)
def test_a_wrong_manifest_says_what_is_wrong(manifest, old, new, message):
    manifest("a.tif", (old, new))
    with pytest.raises(ConfigError, match=rf"mine\.yaml.*{message}"):
        named_source("mine")


def test_an_unknown_name_lists_the_known_and_the_nearest(monkeypatch, tmp_path):
    with pytest.raises(InputError, match=r"naips: .*did you mean 'naip'.*demo, ign-ortho"):
        open_imagery("naips")
    monkeypatch.setenv("CANOPY_MANIFESTS", str(tmp_path / "none"))
    with pytest.raises(ConfigError, match="CANOPY_MANIFESTS"):
        open_imagery("naip")


def test_a_directory_source_reads_the_place_named_by_its_variable(make_tif, rgb, tmp_path, monkeypatch):
    monkeypatch.delenv("CANOPY_NEON_RGB", raising=False)
    with pytest.raises(InputError, match=r"neon-rgb.*\$CANOPY_NEON_RGB, which is not set"):
        open_imagery("neon-rgb")
    make_tif(rgb, "neon/2019_HARV_6_732000_4713000_image.tif", photometric="RGB")
    monkeypatch.setenv("CANOPY_NEON_RGB", str(tmp_path / "neon"))
    source = open_imagery("neon-rgb")
    assert source.name == "neon-rgb" and any("CC0" in note for note in source.notes)
    assert source.read(source.native_grid).valid.all()
    monkeypatch.setenv("CANOPY_NEON_RGB", str(tmp_path / "elsewhere"))
    with pytest.raises(ImageryError, match="is not there"):
        open_imagery("neon-rgb")


def test_a_declared_scale_is_used_the_users_wins_and_255_lets_no_uint16_pass(manifest, make_tif, rgb):
    values = rgb.astype(np.uint16) * 10
    path = make_tif(values, photometric="RGB")
    manifest(path, ("licence", "scale: 4000\nlicence"))
    for scale, white in ((None, 4000), (2550.0, 2550)):
        source = open_imagery("mine", scale=scale)
        shown = source.read(source.native_grid).rgb
        np.testing.assert_allclose(shown, np.clip(values / white, 0, 1), atol=1e-6)
    manifest(path, ("licence", "scale: 255\nlicence"))
    with pytest.raises(ImageryError, match="--scale"):
        open_imagery("mine")


# ---- the demo --------------------------------------------------------------------------------
def test_the_demo_is_a_square_round_its_point_on_the_utm_lattice(tmp_path, monkeypatch):
    (tmp_path / "demo").mkdir()  # as `make demo` leaves it
    monkeypatch.chdir(tmp_path)
    demo = open_imagery("demo")
    assert isinstance(demo, DemoSource)
    assert demo.native_crs.epsg == 32619 and demo.native_grid.pixel == (0.5, 0.5)
    lon, lat = demo.area().centroid_lonlat
    assert abs(lon - LONGITUDE) < 1e-4 and abs(lat - LATITUDE) < 1e-4
    assert demo.area().size_m == pytest.approx((SIDE_M, SIDE_M), rel=0.02)
    assert named_source("demo").geometry.covers(demo.area().lonlat)
    grid = demo.native_grid.window(-5, -7, 20, 20)
    assert demo.read(grid).valid.sum() == 15 * 13
    with pytest.raises(AreaError, match="no imagery there"):
        check_coverage(demo, AOI.from_bbox([45.0, LONGITUDE], size_m=100))
    with pytest.raises(AreaError, match="Swapping"):
        check_coverage(demo, AOI.from_bbox([LONGITUDE, LATITUDE], size_m=100))


def test_other_grids_see_the_same_scene():
    demo = DemoSource()
    native = demo.native_grid.window(1000, 1000, 200, 200)
    image = demo.read(native)
    fine = image.rgb
    assert image.valid.all() and fine.std() > 0.02 and set(np.unique(image.date)) == {19919}
    np.testing.assert_allclose(fine * 255, demo.tile(native).rgb, atol=1e-4)
    coarse = demo.read(Grid.of(native.crs, native.transform * native.transform.scale(2), (100, 100)))
    np.testing.assert_allclose(coarse.rgb, fine.reshape(3, 100, 2, 100, 2).mean((2, 4)), atol=0.02)
    image = demo.read(AOI.from_grid(native).grid("EPSG:3857", 0.5))
    assert 0.85 < image.valid.mean() <= 1
    assert abs(image.rgb[:, image.valid].mean() - fine.mean()) < 0.02


# ---- dates -----------------------------------------------------------------------------------
@given(st.dates(date(1940, 1, 1), date(2099, 12, 31)))
def test_every_way_of_writing_a_day_is_read(day):
    for text in (day.isoformat(), f"{day:%Y%m%d}", f"{day:%Y:%m:%d} 11:59:00", f"{day}T00:00:00Z"):
        assert parse_day(text) == day
    assert date(1970, 1, 1) + timedelta(days=days_since_epoch(day)) == day
    assert date_from_name(f"ortho_{day:%Y%m%d}_x.tif") == day
    assert not any(map(parse_day, ("", "yesterday", "2021-13-01", "2021-02-30", "9999-01-01")))


@pytest.mark.parametrize(
    ("name", "day"),
    [
        ("m_4407131_ne_19_060_20210826_20211201.tif", date(2021, 8, 26)),
        ("https://host/naip/m_4407131_ne_19_060_20210826.tif?sig=20200101", date(2021, 8, 26)),
        ("scene-2020-06-30-rgb.tif", date(2020, 6, 30)),
        ("a_20200101_20210101.tif", None),  # two dates: which?
        ("2019_HARV_6_732000_4713000_image.tif", None),
    ],
)
def test_dates_in_names(name, day):
    assert date_from_name(name) == day


def test_tags_are_trusted_in_order():
    processed = {"TIFFTAG_DATETIME": "2022:05:05 10:00:00"}
    assert acquisition_date({**processed, "acquisition_date": "2021-07-04"}, "x.tif") == date(2021, 7, 4)
    assert acquisition_date(processed, "x_20200606.tif") == date(2020, 6, 6)
    assert acquisition_date(processed, "x.tif") == date(2022, 5, 5)
    assert acquisition_date({}, "x.tif") is None


@pytest.mark.parametrize(
    ("text", "first", "last"),
    [
        (None, None, None),
        ("2021", date(2021, 1, 1), date(2021, 12, 31)),
        ("2020-02", date(2020, 2, 1), date(2020, 2, 29)),
        ("2021-07-04", date(2021, 7, 4), date(2021, 7, 4)),
        ("2021-06/2021-09", date(2021, 6, 1), date(2021, 9, 30)),
        ("../2017", None, date(2017, 12, 31)),
        ("2021-06-01T00:00:00Z/..", date(2021, 6, 1), None),
    ],
)
def test_intervals(text, first, last):
    assert parse_range(text) == (first, last)
    for wrong in ("summer", "2021/2020", "21-06-01", "2021-13"):
        with pytest.raises(ValueError):
            parse_range(wrong)
