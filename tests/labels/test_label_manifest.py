"""The tables of labels: every row valid, the facts that trip people up, and what a wrong row is told."""

from __future__ import annotations

import math
import re
import shutil
from collections import Counter
from pathlib import Path

import pytest
import shapely
import yaml

from canopy.config import manifest_names
from canopy.errors import ConfigError, InputError
from canopy.geo.area import AOI
from canopy.geo.crs import utm_crs
from canopy.imagery.named import named_source
from canopy.labels.catalog import known_labels, label_source
from canopy.labels.names import aop_crs, neon_site, neon_sites, read_sites, sites_near
from canopy.runtime import bundled_dir

SHIPPED = {
    "california-3dep", "france-lidar-hd", "gedi-l2a", "neon", "sao-paulo", "sustainable-landscapes-brazil",
    "usgs-3dep",
}  # fmt: skip
TABLE = bundled_dir("data_manifests") / "labels" / "neon-sites.csv"


def distance_km(a, b) -> float:
    x = math.radians(a.lon - b.lon) * math.cos(math.radians((a.lat + b.lat) / 2))
    return 6371 * math.hypot(x, math.radians(a.lat - b.lat))


# ---- every manifest --------------------------------------------------------------------------
def test_every_label_source_is_valid_and_says_its_terms():
    assert set(known_labels()) >= SHIPPED
    for name in known_labels():
        source = label_source(name)
        assert (
            source.licence and source.attribution and source.citation and source.verified and source.partners
        )
        assert source.crs or "crs" in source.unverified
        assert source.checksum or "checksum" in source.unverified
        assert {p.imagery for p in source.partners} - {None} <= set(manifest_names("imagery"))
        assert set(source.sites) <= set(neon_sites())
        for product in source.products.values():
            assert product.grammar or product.match or product.asset
            assert not product.match or re.compile(product.match)
        for text in (source.href, *(product.href or "" for product in source.products.values())):
            assert "token" not in text.lower() and "sig=" not in text


def test_addresses_are_those_that_the_hosts_publish():
    """What a check against the services' own documents found wrong, and must not come back."""
    models = yaml.safe_load((bundled_dir("data_manifests") / "models.yaml").read_text())["models"]
    urls = [file["url"] for model in models.values() for file in model.get("files", ())]
    folder = "https://dataforgood-fb-data.s3.amazonaws.com/forests/v1/models/saved_checkpoints/"
    assert len(urls) == 4 and all(url.startswith(folder) and url.endswith(".pth") for url in urls)
    gedi = label_source("gedi-l2a")
    assert gedi.products[gedi.default].version == "003" and gedi.doi.endswith("GEDI02_A.003")
    assert {p.code for p in gedi.products.values()} == {
        "GEDI02_A",
        "GEDI02_B",
        "GEDI_L4A_AGB_Density_V3_2508",
    }
    assert all(product.about_bytes < 1.1e9 for product in gedi.products.values())
    for name in ("usgs-3dep", "california-3dep"):
        assert label_source(name).dates == "2012/2022"
    alaska_and_guam = [shapely.Point(-150, 64), shapely.Point(144.8, 13.5)]
    assert all(label_source("usgs-3dep").geometry.covers(place) for place in alaska_and_guam)
    assert label_source("sao-paulo").protocol == "wfs" and label_source("france-lidar-hd").parallel == 4
    assert named_source("vantor-open-data").href.startswith("https://vantor-opendata.s3.amazonaws.com/")
    assert 400 in named_source("swissimage").absent_statuses


def test_no_manifest_names_a_secret_or_a_machine():
    folder = TABLE.parent
    for path in folder.iterdir():
        text = path.read_text()
        assert not any(word in text for word in ("/work", "/root", "/tmp", "sig=", "apikey"))


# ---- NEON ------------------------------------------------------------------------------------
def test_all_47_terrestrial_sites_are_there_once():
    sites = neon_sites()
    assert Counter(site.kind for site in sites.values()) == {"terrestrial": 47, "aquatic": 34, "flight": 1}
    assert len({site.name for site in sites.values()}) == len(sites) and list(sites) == sorted(sites)
    assert {site.domain for site in sites.values()} == {f"D{number:02d}" for number in range(1, 21)}


def test_five_whole_sites_and_more_are_held_out_for_testing():
    splits = Counter(site.split for site in neon_sites().values())
    test = {site.flight_site for site in neon_sites().values() if site.split == "test"}
    assert {"WLOU", "GUAN", "HOPB", "REDB"} <= test and len(test) >= 5
    assert splits["val"] >= 3 and splits["train"] >= 30


def test_no_train_site_is_near_a_test_site():
    sites = [site for site in neon_sites().values() if site.lat is not None]
    test, train = ([s for s in sites if s.split == split] for split in ("test", "train"))
    assert min(distance_km(a, b) for a in test for b in train) > 25


def test_sites_that_share_flights_are_published_under_one_name_and_in_one_split():
    shared = {code: site.published_under for code, site in neon_sites().items() if site.published_under}
    assert len(shared) == 23
    assert shared == shared | {
        "TREE": "STEI",
        "CHEQ": "STEI",
        "KONA": "KONZ",
        "DCFS": "WOOD",
        "LEWI": "BLAN",
        "BIGC": "SOAP",
    }
    for code, flight in shared.items():
        assert neon_site(code).split == neon_site(flight).split and neon_site(flight).published_under is None
        if code != "LEWI" and code != "CHEQ":
            assert neon_site(code).utm_zone == neon_site(flight).utm_zone


def test_blandy_flies_in_17n_and_every_other_site_in_the_zone_where_it_lies():
    assert aop_crs("BLAN") == aop_crs("LEWI") == "EPSG:32617" and neon_site("LEWI").utm_zone == "18N"
    for code, site in neon_sites().items():
        if site.lat is not None and code != "LEWI":
            assert aop_crs(code) == f"EPSG:{utm_crs(site.lon, site.lat).epsg}", code


def test_a_flight_box_of_unknown_place_is_left_empty_and_says_so():
    assert (
        neon_site("cheq").unverified == ("lat", "lon", "utm_zone", "years")
        and aop_crs("CHEQ") == "EPSG:32616"
    )


def test_sites_near_an_area_are_flight_sites_nearest_first():
    assert sites_near(AOI.from_bbox([45.4937, -89.5857], size_m=1000)) == ["STEI"]
    assert sites_near(AOI.from_bbox([39.0956, -77.9832], size_m=1000)) == ["BLAN"]
    assert sites_near(AOI.from_bbox([48.4, 2.7], size_m=1000)) == []


# ---- wrong rows ------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("HARV,Harvard", "BART,Harvard"), "BART is there twice"),
        (("16N,STEI,yes", "16N,STEY,yes"), "published under 'STEY'"),
        (("16N,STEI,yes", "16N,CHEQ,yes"), "published under 'CHEQ'"),
        (("45.762439", "95.0"), "lat"),
        (("2019 2021,val,,", "2021 2019,val,,"), "years"),
        (("2019 2021,val,,", ",val,,"), "years is empty"),
        (("2019 2021,val,,", "2019 2021,both,,"), "split"),
        (("ABBY,Abby Road,", "ABBY,Abby Road,x,"), "line 2.*columns"),
        (("site,name,", "site,title,"), "name"),
    ],
)
def test_a_wrong_row_says_which_and_why(tmp_path, change, message):
    text = TABLE.read_text()
    assert change[0] in text
    path = tmp_path / "sites.csv"
    path.write_text(text.replace(*change, 1))
    with pytest.raises(ConfigError, match=message):
        read_sites(path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("licence: CC0 1.0\n", ""), "licence"),
        (("default: chm", "default: chn"), "default 'chn' is none of"),
        (("    code: DP3.30015.001\n", ""), "product 'chm' needs code"),
        (("protocol: neon", "protocol: stac"), "needs collection"),
        (("dates: 2013/..", "dates: since 2013"), "dates"),
        (("notes: >-", "note: >-"), "did you mean 'notes'"),
        (("name: neon", "name: noen"), "expected 'neon'"),
    ],
)
def test_a_wrong_manifest_says_what_is_wrong(tmp_path, monkeypatch, change, message):
    folder = tmp_path / "m"
    shutil.copytree(TABLE.parent, folder / "labels")
    path = Path(folder / "labels" / "neon.yaml")
    assert change[0] in path.read_text()
    path.write_text(path.read_text().replace(*change))
    monkeypatch.setenv("CANOPY_MANIFESTS", str(folder))
    with pytest.raises(ConfigError, match=message):
        label_source("neon")


def test_unknown_names_point_to_the_nearest():
    with pytest.raises(InputError, match="did you mean 'neon'"):
        label_source("neo")
    with pytest.raises(InputError, match="no product 'chn'; expected chm or points"):
        label_source("neon").product("chn")
    with pytest.raises(InputError, match="did you mean HARV"):
        neon_site("HARW")
