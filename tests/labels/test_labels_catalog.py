"""Sources of labels, NEON's sites, names of tiles: all valid, the facts that trip people up, wrong rows."""

from __future__ import annotations

import math
import re
from collections import Counter

import pyproj
import pytest
import shapely
import yaml

from canopy.config import manifest_names
from canopy.errors import ConfigError, InputError
from canopy.geo.area import AOI
from canopy.geo.crs import utm_crs
from canopy.imagery.named import named_source
from canopy.labels.catalog import (
    IGN_CRS,
    known_labels,
    label_source,
    neon_site,
    neon_sites,
    read_name,
)
from canopy.labels.neon import sites_near
from canopy.runtime import bundled_dir

SHIPPED = {
    "california-3dep", "france-lidar-hd", "gedi-l2a", "neon", "sao-paulo", "sustainable-landscapes-brazil",
    "usgs-3dep",
}  # fmt: skip
TABLE = bundled_dir("data_manifests") / "labels" / "neon-sites.csv"


def distance_km(a, b) -> float:
    x = math.radians(a["lon"] - b["lon"]) * math.cos(math.radians((a["lat"] + b["lat"]) / 2))
    return 6371 * math.hypot(x, math.radians(a["lat"] - b["lat"]))


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


META = "https://dataforgood-fb-data.s3.amazonaws.com/forests"
# Every address that the manifests may hold, as the hosts' own documents have it.
ADDRESSES = (
    rf"{META}/v1/models/saved_checkpoints/(SSLhuge_satellite|compressed_SSL(huge(_aerial)?|large))\.pth",
    rf"{META}/v1/models/saved_checkpoints/aerial_normalization_quantiles_predictor\.ckpt",
    rf"{META}/(v1/alsgedi_global_v6_float|v2/global/dinov3_global_chm_v2_ml3)",
    r"hf://facebook/dinov3-vitl16-chmv2-dpt-head",
    r"https://huggingface\.co/(facebook/dinov3-vitl16-chmv2-dpt-head|datasets/AI4Forest/Open-Canopy)",
    r"https://ai\.meta\.com/resources/models-and-libraries/chmv2-downloads/",
    r"https://planetarycomputer\.microsoft\.com/api/stac/v1",
    r"https://data\.geopf\.fr/wfs/ows",
    r"https://data\.neonscience\.org(/api/v0)?",
    r"https://wfs\.geosampa\.prefeitura\.sp\.gov\.br/geoserver/geoportal/wfs",
    r"https://laz-m3dc-pmsp\.s3\.sa-east-1\.amazonaws\.com/MDS_color_\{value\}\.laz",
    r"https://doi\.org/10\.(5067/GEDI/GEDI02_A\.003|3334/ORNLDAAC/1644)",
)


def addresses(value) -> list[str]:
    """All in a manifest, wherever they stand."""
    if isinstance(value, str):
        return [text.rstrip(".,;:)") for text in re.findall(r"(?:https?|hf)://[^\s\"'<>`]+", value)]
    return [
        text
        for one in (value.values() if isinstance(value, dict) else value if isinstance(value, list) else ())
        for text in addresses(one)
    ]


def test_addresses_are_those_that_the_hosts_publish():
    """What a check against the services' own documents found wrong, and must not come back."""
    folder = bundled_dir("data_manifests")
    files = [folder / "models.yaml", *folder.glob("labels/*.yaml"), *folder.glob("benchmarks/*.yaml")]
    found = {text for file in files for text in addresses(yaml.safe_load(file.read_text()))}
    assert (
        len(found) >= 12
        and [t for t in sorted(found) if not any(re.fullmatch(a, t) for a in ADDRESSES)] == []
    )
    gedi = label_source("gedi-l2a")
    assert gedi.products[gedi.default].version == "003" and gedi.doi.endswith("GEDI02_A.003")
    assert {name: (p.code, p.version) for name, p in gedi.products.items()} == {
        "v3": ("GEDI02_A", "003"), "l2b": ("GEDI02_B", "003"), "l4a": ("GEDI_L4A_AGB_Density_V3_2508", None),
        "v2": ("GEDI02_A", "002"), "l2b-v2": ("GEDI02_B", "002"),
        "l4a-v2": ("GEDI_L4A_AGB_Density_V2_1_2056", None),
    }  # fmt: skip
    assert "C3974616071-LPCLOUD" in gedi.verified[0] and "C4212593885-ORNL_CLOUD" in gedi.verified[0]
    assert all(product.about_bytes < 1.1e9 for product in gedi.products.values())
    for name in ("usgs-3dep", "california-3dep"):
        assert label_source(name).dates == "2012/2022"
    alaska_and_guam = [shapely.Point(-150, 64), shapely.Point(144.8, 13.5)]
    assert all(label_source("usgs-3dep").geometry.covers(place) for place in alaska_and_guam)
    assert label_source("sao-paulo").protocol == "wfs" and label_source("france-lidar-hd").parallel == 4
    assert named_source("vantor-open-data").href.startswith("https://vantor-opendata.s3.amazonaws.com/")
    assert 400 in named_source("swissimage").absent_statuses


# ---- NEON ------------------------------------------------------------------------------------
def test_all_sites_are_there_once_and_their_splits_are_apart():
    sites = neon_sites()
    assert Counter(site["kind"] for site in sites.values()) == {"terrestrial": 47, "aquatic": 34, "flight": 1}
    assert len({site["name"] for site in sites.values()}) == len(sites) and list(sites) == sorted(sites)
    assert {site["domain"] for site in sites.values()} == {f"D{number:02d}" for number in range(1, 21)}
    for site in sites.values():  # gaps are named
        for name in ("lat", "lon", "utm_zone", "flown", "years"):
            assert (site[name] in (None, [])) == (name in site["unverified"]), (site["site"], name)
        assert site["years"] == sorted(set(site["years"])) and len(site["state"]) == 2
    splits = Counter(site["split"] for site in sites.values())
    assert set(splits) == {"train", "val", "test", "none"} and splits["val"] >= 3 and splits["train"] >= 30
    test = {site["flight_site"] for site in sites.values() if site["split"] == "test"}
    assert {"WLOU", "GUAN", "HOPB", "REDB"} <= test
    placed = [site for site in sites.values() if site["lat"] is not None]
    tested, train = ([s for s in placed if s["split"] == split] for split in ("test", "train"))
    assert min(distance_km(a, b) for a in tested for b in train) > 25


def test_sites_that_share_flights_are_published_under_one_name_and_fly_in_its_zone():
    sites = neon_sites()
    shared = {code: site["published_under"] for code, site in sites.items() if site["published_under"]}
    known = {"TREE": "STEI", "CHEQ": "STEI", "KONA": "KONZ", "DCFS": "WOOD", "LEWI": "BLAN", "BIGC": "SOAP"}
    assert len(shared) == 23 and shared == shared | known
    for code, flight in shared.items():
        assert sites[code]["split"] == sites[flight]["split"] and sites[flight]["published_under"] is None
    assert sites["BLAN"]["flight_crs"] == sites["LEWI"]["flight_crs"] == "EPSG:32617"
    assert sites["LEWI"]["utm_zone"] == "18N"
    for code, site in sites.items():  # everybody else in the zone where the site lies
        if site["lat"] is not None and code != "LEWI":
            assert site["flight_crs"] == f"EPSG:{utm_crs(site['lon'], site['lat']).epsg}", code


def test_sites_near_an_area_are_flight_sites_nearest_first():
    assert sites_near(AOI.from_bbox([45.4937, -89.5857], size_m=1000)) == ["STEI"]
    assert sites_near(AOI.from_bbox([39.0956, -77.9832], size_m=1000)) == ["BLAN"]
    assert sites_near(AOI.from_bbox([48.4, 2.7], size_m=1000)) == []


# ---- wrong rows ------------------------------------------------------------------------------
def test_a_table_of_sites_that_is_none_says_so(point_at, tmp_path):
    path = tmp_path / "manifests" / "labels" / "neon-sites.csv"
    path.write_text(path.read_text().replace("45.762439", "north"))
    with pytest.raises(ConfigError, match="'north'"):
        neon_sites()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"licence": None}, "licence"),
        ({"default": "chn"}, "default 'chn' is none of"),
        ({"protocol": "wfs"}, "product 'chm' needs layers"),
        ({"protocol": "stac"}, "needs collection"),
        ({"dates": "since 2013"}, "dates"),
        ({"note": "x"}, "did you mean 'notes'"),
    ],
)
def test_a_wrong_manifest_says_what_is_wrong(point_at, changes, message):
    point_at("neon", "https://data.neonscience.org/api/v0", **changes)
    with pytest.raises(ConfigError, match=message):
        label_source("neon")


def test_unknown_names_point_to_the_nearest():
    with pytest.raises(InputError, match="did you mean 'neon'"):
        label_source("neo")
    with pytest.raises(InputError, match="no product 'chn'; expected chm or points"):
        label_source("neon").product("chn")
    with pytest.raises(InputError, match="did you mean HARV"):
        neon_site("HARW")


# ---- names of tiles ---------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("name", "bounds", "crs"),
    [
        ("NEON_D16_WREF_DP3_580000_5075000_CHM.tif", (580000, 5075000, 581000, 5076000), "EPSG:32610"),
        # 77.98 W is in zone 18: the tiles of Blandy are nevertheless named in zone 17's metres.
        ("NEON_D02_BLAN_DP3_753000_4327000_CHM.tif", (753000, 4327000, 754000, 4328000), "EPSG:32617"),
        ("NEON_D04_GUAN_DP1_725000_1985000_classified_point_cloud_colorized.laz",
         (725000, 1985000, 726000, 1986000), "EPSG:32619"),
        ("2019_HARV_6_732000_4713000_image.tif", (732000, 4713000, 733000, 4714000), "EPSG:32618"),
        # IGN's names hold the north edge.
        ("LHD_FXX_0651_6863_MNH_O_0M50_LAMB93_IGN69.tif", (651000, 6862000, 652000, 6863000), "EPSG:2154"),
        ("LHD_FXX_0881-6546_PTS_O_LAMB93_IGN69.copc.laz", (881000, 6545000, 882000, 6546000), "EPSG:2154"),
        ("LHD_FXX_0881_6546_PTS_LAMB93_IGN69.copc.laz", (881000, 6545000, 882000, 6546000), "EPSG:2154"),
        ("LHD_REU_0340_7650_MNT_O_0M50_RGR92UTM40S_REUN89.tif", (340000, 7649000, 341000, 7650000),
         "EPSG:2975"),
    ],
)  # fmt: skip
def test_a_name_gives_its_bounds_and_crs(name, bounds, crs):
    tile = read_name(f"https://host/a/b/{name}?X-Goog-Signature=1")
    assert tile.bounds == bounds and tile.crs == crs


def test_names_of_sites_that_do_not_exist_and_of_no_grammar():
    with pytest.raises(InputError, match="did you mean WREF"):
        read_name("NEON_D16_WREX_DP3_580000_5075000_CHM.tif")
    for name in ("", "image.tif", "LHD_FXX_0651_6863_MNH_O_0M50_LAMB94_IGN69.tif", "0123.tif"):
        assert read_name(name) is None


def test_every_crs_of_a_name_exists():
    for code in {*IGN_CRS.values(), *(site["flight_crs"] for site in neon_sites().values())}:
        assert pyproj.CRS.from_string(code).is_projected
