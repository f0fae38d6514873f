"""Sources by name: strict manifests, the best source for an area, the demo; and dates that files tell."""

from __future__ import annotations

import json
import re
from datetime import date, timedelta

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from canopy.config import manifest_names
from canopy.errors import AreaError, ConfigError, FetchError, ImageryError, InputError
from canopy.files import check_terms
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
    named_source,
    sources_for,
)
from canopy.imagery.open import open_imagery, open_pinned
from canopy.terms import Terms, use_of, weakest

ADDRESSES = {  # what each service's address begins with, as it was found in use
    "basemap-at": "https://mapsneu.wien.gv.at/basemap/bmaporthofoto30cm/normal/google3857/{z}/{y}/{x}.jpeg",
    "bavaria-ortho": "https://wmtsod1.bayernwolke.de/wmts/by_dop/smerc/{z}/{x}/{y}",
    "czechia-ortho": "https://ags.cuzk.gov.cz/arcgis1/rest/services/ORTOFOTO_WM/MapServer/tile/{z}/{y}/{x}",
    "demo": "",
    "estonia-ortho": "https://tiles.maaamet.ee/tm/wmts/1.0.0/foto/default/GMC/{z}/{y}/{x}.jpg",
    "flanders-ortho": "https://geo.api.vlaanderen.be/OMWRGBMRVL/wmts?",
    "geosampa-ortho-2020": "https://raster.geosampa.prefeitura.sp.gov.br/geoserver/geoportal/wms?",
    "ign-ortho": "https://data.geopf.fr/wmts?SERVICE=WMTS&REQUEST=GetTile",
    "ign-ortho-wms": "https://data.geopf.fr/wms-r/wms?SERVICE=WMS",
    "japan-gsi": "https://cyberjapandata.gsi.go.jp/xyz/seamlessphoto/{z}/{x}/{y}.jpg",
    "kyfromabove": "https://spved5ihrl.execute-api.us-west-2.amazonaws.com/",
    "linz-aerial": "https://nz-imagery.s3-ap-southeast-2.amazonaws.com/catalog.json",
    "luxembourg-ortho": "https://wmts1.geoportail.lu/opendata/wmts/ortho_latest/GLOBAL_WEBMERCATOR_4_V3/{z}/",
    "maxar-open-data": "https://maxar-opendata.s3.amazonaws.com/events/catalog.json",
    "naip": "https://planetarycomputer.microsoft.com/api/stac/v1",
    "neon-rgb": "${CANOPY_NEON_RGB}",
    "nsw-imagery": "https://maps.six.nsw.gov.au/arcgis/rest/services/public/NSW_Imagery/MapServer/tile/{z}/{y}/{x}",
    "openaerialmap": "https://api.imagery.hotosm.org/stac",
    "pdok-ortho": "https://service.pdok.nl/hwh/luchtfotorgb/wmts/v1_0/Actueel_orthoHR/EPSG:3857/{z}/{x}/{y}.jpeg",
    "pdok-ortho25": "https://service.pdok.nl/hwh/luchtfotorgb/wmts/v1_0/Actueel_ortho25/EPSG:3857/{z}/{x}/{y}.jpeg",
    "pnoa-ortho": "https://tms-pnoa-ma.idee.es/1.0.0/pnoa-ma/{z}/{x}/{-y}.jpeg",
    "swissimage": "https://wmts.geo.admin.ch/1.0.0/ch.swisstopo.swissimage/default/current/3857/{z}/{x}/{y}.jpeg",
    "swissimage-dop10": "https://data.geo.admin.ch/api/stac/v1",
    "usgs-naip": "https://imagery.nationalmap.gov/arcgis/rest/services/USGSNAIPImagery/ImageServer/exportImage?",
    "vantor-open-data": "https://vantor-opendata.s3.amazonaws.com/events/catalog.json",
}
# Once believed, and wrong: folders, hosts and layers that are not there (any more).
WRONG = (
    "forests/v1/models/SSL", "forests/v1/models/compressed", "IGNF_MNH-LIDAR-HD:dalle", "gis.apfo.usda.gov",
    "wxs.ign.fr", "maxar-opendata.s3.amazonaws.com/catalog.json",
)  # fmt: skip
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
    assert set(sources) == set(ADDRESSES) and list(sources) == manifest_names("imagery")
    for source in sources.values():
        assert source.href.startswith(ADDRESSES[source.name]) and source.commercial_use and source.country
        assert source.fallback is None or source.fallback in sources
        assert source.licence and source.attribution and source.notes and 0 < source.gsd_m <= 3
        assert source.geometry.is_valid and not source.geometry.is_empty
        first, last = source.dates.split("/")
        assert first[:4].isdigit() and first <= last
        assert "sig=" not in source.href and "token" not in source.href.lower()


@pytest.mark.parametrize(
    ("lat", "lon", "name"),
    [
        (44.083, -71.296, "naip"),  # White Mountains; the demo, which is there too, is never chosen
        (37.85, -84.26, "naip"),  # Kentucky: with leaves, and so before the finer kyfromabove
        (52.09, 5.12, "pdok-ortho25"),  # Utrecht: the summer flight before the finer one of winter
        (51.22, 4.40, "flanders-ortho"),  # Antwerp
        (40.42, -3.70, "pnoa-ortho"),  # Madrid
        (38.72, -9.14, None),  # Lisbon
        (47.07, 15.44, "basemap-at"),  # Graz
        (48.15, 17.11, None),  # Bratislava
        (49.61, 6.13, "luxembourg-ortho"),
        (49.75, 6.64, None),  # Trier
        (58.38, 26.72, "estonia-ortho"),  # Tartu
        (56.95, 24.11, None),  # Riga
        (48.37, 11.60, "bavaria-ortho"),  # Hallbergmoos
        (48.78, 9.18, None),  # Stuttgart
        (49.20, 16.61, "czechia-ortho"),  # Brno
        (51.11, 17.03, None),  # Wroclaw
        (35.68, 139.69, "japan-gsi"),
        (35.18, 129.08, None),  # Busan
        (-33.70, 150.31, "nsw-imagery"),  # Katoomba
        (-37.81, 144.96, None),  # Melbourne
        (-43.53, 172.63, "linz-aerial"),  # Christchurch
        (-23.56, -46.66, "geosampa-ortho-2020"),
        (43.7, -79.4, None),  # Toronto
        (32.4, -117.0, None),  # Tijuana
        (48.4, 2.7, "ign-ortho"),  # Fontainebleau
        (50.47, 4.87, None),  # Namur
        (46.8, 8.2, "swissimage"),  # Obwalden
        (45.46, 9.19, None),  # Milan
    ],
)
def test_the_best_source_is_on_the_right_side_of_borders(lat, lon, name):
    found = [source.name for source in sources_for(AOI.from_bbox([lat, lon], size_m=500))]
    assert (found[0] if found else None) == name and not {"demo", "vantor-open-data"} & set(found)


def test_no_wrong_address_is_left(repo):
    """Neither in the manifests nor in what is said about them."""
    texts = [*repo.glob("data_manifests/**/*.yaml"), *repo.glob("docs/*.md"), *repo.glob("*.md")]
    assert len(texts) > 40
    for path in texts:
        text = path.read_text(encoding="utf-8")
        assert not [wrong for wrong in WRONG if wrong in text], path


def test_every_address_in_the_manifests_is_https_and_open(repo):
    for path in repo.glob("data_manifests/**/*.yaml"):
        for address in re.findall(r"https?://[^\s\"',)]+", path.read_text(encoding="utf-8")):
            assert address.startswith("https://"), f"{path.name}: {address}"
            check_terms(address)


def test_another_source_stands_in_for_all_when_a_host_is_down(tmp_path, monkeypatch, server, caplog):
    folder = tmp_path / "manifests" / "imagery"
    folder.mkdir(parents=True)
    monkeypatch.setenv("CANOPY_MANIFESTS", str(folder.parent))
    text = MINIMAL.replace("kind: file", "kind: stac").format(href=f"{server.url}/stac")
    second = text.replace("kind: stac", "kind: xyz").replace("/stac", "/{z}/{x}/{y}.png")
    (folder / "mine.yaml").write_text(f"{text}fallback: second\n")
    (folder / "second.yaml").write_text(second.replace("name: mine", "name: second"))
    server.fail("/stac", times=1000, status=504)
    place = AOI.from_bbox([44.5, -71.5], size_m=100)
    source = open_imagery("mine", area=place)
    assert source.name == "second" and source.terms.licence == "CC0"
    told = "mine does not answer .*all is read from second instead"
    assert re.search(told, source.notes[0]) and re.search(told, caplog.text)
    assert open_pinned(json.loads(json.dumps(source.pinned()))).terms == source.terms
    with pytest.raises(FetchError, match="504"):  # the second one has no dates to choose from
        open_imagery("mine", area=place, datetime="2021")


def test_terms_are_what_publishers_say():
    uses = {source.name: source.terms.commercial_use for source in all_sources()}
    assert uses["naip"] == "yes" and uses["maxar-open-data"] == "no" and uses["openaerialmap"] == "ask"
    for source in all_sources():  # the name of a licence never promises more than the manifest
        assert weakest(use_of(source.licence), source.terms.commercial_use) in (
            source.terms.commercial_use, "ask",
        )  # fmt: skip
    assert [Terms(licence=text, attribution="", commercial_use="ask").spdx for text in (
        "CC BY 4.0 (scne.es)", "CC BY-NC 4.0", "CC0 1.0", "Licence Ouverte 2.0 (Etalab)", "public domain",
    )] == ["CC-BY-4.0", "CC-BY-NC-4.0", "CC0-1.0", "etalab-2.0", "other"]  # fmt: skip


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
    with pytest.raises(InputError, match=r"naips: .*did you mean 'naip'.*demo, estonia-ortho"):
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
