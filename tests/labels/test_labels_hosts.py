"""`get` against each host's protocol: WFS, STAC, Earthdata and buckets, served by this machine."""

from __future__ import annotations

import hashlib
import json
import random
import sys
import types

import pytest
import yaml
from pyproj import Transformer
from shapely.geometry import box, mapping, shape

from canopy.errors import AreaError, FetchError, InputError, MissingDependencyError
from canopy.geo.area import AOI
from canopy.imagery import stac
from canopy.labels import hosts
from canopy.labels.catalog import read_name
from canopy.labels.fetch import RECORD, Wish, get_files, verify_folder
from canopy.labels.hosts import plan_get
from canopy.runtime import bundled_dir


def body(name: str, size: int = 5000) -> bytes:
    return random.Random(name).randbytes(size)


# ---- IGN -------------------------------------------------------------------------------------
class Ign:
    """A WFS that pages, takes longitude first in CRS:84 only, and does not know the older layers."""

    def __init__(self, server) -> None:
        self.server, self.cap = server, 2
        self.known = {"IGNF_LIDAR-HD_METADONNEE:metadata"}
        corners = [(x, y) for x in (676, 677, 678) for y in (6815, 6816)]
        self.tiles = [read_name(f"LHD_FXX_{x:04d}_{y:04d}_MNH_O_0M50_LAMB93_IGN69.tif") for x, y in corners]
        to_lonlat = Transformer.from_crs(2154, 4326, always_xy=True)
        self.features = []
        for tile, (x, y) in zip(self.tiles, corners, strict=True):
            name, points = tile.filename, f"LHD_FXX_{x:04d}-{y:04d}_PTS_O_LAMB93_IGN69.copc.laz"
            server.put("/wms-r", body("raster"))
            server.put(f"/laz/{points.replace('-', '_')}", body(points))
            outline = box(*to_lonlat.transform_bounds(*tile.bounds))
            facts = {
                "url_mnh": f"{server.url}/wms-r?SERVICE=WMS&REQUEST=GetMap&FILENAME={name}",
                "url_npl": f"{server.url}/laz/{points}",
                "date_debut_acquisition": "2022-06-01Z",
                "date_fin_acquisition": "2022-06-03Z",
            }
            self.features.append({"type": "Feature", "geometry": mapping(outline), "properties": facts})
        server.routes["/wfs/ows"] = self.answer

    def answer(self, path, query, _body):
        value = {key.upper(): values[0] for key, values in query.items()}
        if value["TYPENAMES"] not in self.known:
            return 400, {"Content-Type": "text/xml"}, b"<ExceptionReport>Unknown namespace</ExceptionReport>"
        *numbers, crs = value["BBOX"].split(",")
        assert crs == value["SRSNAME"] == "CRS:84"
        wanted = box(*map(float, numbers))
        hits = [f for f in self.features if shape(f["geometry"]).intersects(wanted)]
        start = int(value["STARTINDEX"])
        page = hits[start : start + min(self.cap, int(value["COUNT"]))]
        answer = {
            "type": "FeatureCollection",
            "features": page,
            "numberMatched": len(hits),
            "numberReturned": len(page),
        }
        return 200, {"Content-Type": "application/json"}, json.dumps(answer).encode()


@pytest.fixture
def ign(server, point_at):
    point_at("france-lidar-hd", f"{server.url}/wfs/ows")
    return Ign(server)


def in_france(west_km: float, south_km: float, east_km: float, north_km: float) -> AOI:
    return AOI.from_bounds([km * 1000 for km in (west_km, south_km, east_km, north_km)], "EPSG:2154")


def test_ign_tiles_are_paged_and_chosen_by_their_names_bounds(ign, server, tmp_path):
    plan = plan_get("france-lidar-hd", Wish(area=in_france(676.1, 6814.1, 677.9, 6815.9)))
    assert [f.name for f in plan.files] == sorted(t.filename for t in ign.tiles if t.bounds[0] < 678_000)
    assert server.asked("/wfs/ows") >= 2 and all(f.about and f.bytes == 16_000_000 for f in plan.files)
    assert {f.day for f in plan.files} == {"2022-06-03"}
    one = plan_get("france-lidar-hd", Wish(area=in_france(677.2, 6815.2, 677.4, 6815.4)))
    assert [f.name for f in one.files] == ["LHD_FXX_0677_6816_MNH_O_0M50_LAMB93_IGN69.tif"]
    get_files(one, tmp_path)
    cloud = plan_get("france-lidar-hd", Wish(area=in_france(677.2, 6815.2, 677.4, 6815.4)), product="points")
    assert [f.name for f in cloud.files] == ["LHD_FXX_0677_6816_PTS_O_LAMB93_IGN69.copc.laz"]
    assert get_files(cloud, tmp_path)[0]  # indexed with a dash, served with a _
    record = json.loads((tmp_path / RECORD).read_text())["files"][one.files[0].name]
    assert (
        record["sha256"] == hashlib.sha256(body("raster")).hexdigest()
        and "Licence Ouverte" in record["licence"]
    )
    assert verify_folder(tmp_path)["problems"] == {}


def test_a_layer_that_is_gone_is_named(ign):
    ign.known = set()
    with pytest.raises(FetchError, match=r"no list of IGNF_LIDAR-HD_METADONNEE:metadata \(400\)"):
        plan_get("france-lidar-hd", Wish(area=in_france(677.2, 6815.2, 677.4, 6815.4)))


def test_ign_dates_and_empty_places(ign):
    here = in_france(677.2, 6815.2, 677.4, 6815.4)
    assert plan_get("france-lidar-hd", Wish(area=here, datetime="2022-06")).files
    for wish in (Wish(area=here, datetime="2021"), Wish(area=in_france(700, 6800, 700.5, 6800.5))):
        with pytest.raises(AreaError, match="nothing there"):
            plan_get("france-lidar-hd", wish)
    with pytest.raises(InputError, match="found by area"):
        plan_get("france-lidar-hd", Wish())


def test_an_answer_that_ends_before_its_own_total_is_no_plan(ign, server):
    """Under load the service gives empty pages: asked again, and then an error, never a shorter list."""
    here, whole = in_france(676.1, 6814.1, 677.9, 6815.9), ign.answer

    def empty(path, query, body):
        status, headers, answer = whole(path, query, body)
        answer = json.loads(answer)
        if server.asked("STARTINDEX=2") < limit and answer["features"] and "STARTINDEX=2" in path:
            answer["features"] = []
        return status, headers, json.dumps(answer).encode()

    server.routes["/wfs/ows"] = empty
    limit = 3
    assert len(plan_get("france-lidar-hd", Wish(area=here)).files) == 4
    limit = 1000
    with pytest.raises(FetchError, match="says it has 4 tiles there and gives 2"):
        plan_get("france-lidar-hd", Wish(area=here))


def test_the_newest_edition_of_a_tile_counts_whatever_the_order(ign, server):
    wish = Wish(area=in_france(677.2, 6815.2, 677.4, 6815.4))
    (tile,) = [f for f in ign.features if "0677_6816" in f["properties"]["url_mnh"]]
    editions = []
    for edition in ("2025-06-13", "2023-04-20"):
        other = json.loads(json.dumps(tile))
        other["properties"]["date_edition"] = edition
        other["properties"]["url_mnh"] = tile["properties"]["url_mnh"].replace("/wms-r?", f"/{edition}?")
        editions.append(other)
    for order in (editions, editions[::-1]):
        ign.features = order
        plan = plan_get("france-lidar-hd", wish)
        assert [f.address.rpartition("/")[2] for f in plan.files] == ["2025-06-13"]
        assert plan.notes == ("1 tiles have an older edition, which is left out",)


# ---- STAC ------------------------------------------------------------------------------------
@pytest.fixture
def dep(server, point_at, monkeypatch):
    """An API with three items, whose files want a signature that runs out."""
    pytest.importorskip("pystac_client")
    monkeypatch.setattr(
        stac, "planetary_computer_sign", lambda url, fresh: f"{url}?sig={'good' if fresh else 'old'}"
    )
    server.signature = "good"
    items = []
    for number, west in enumerate((-120.0, -119.99, -110.0)):
        name = f"USGS_LPC_CA_{number}"
        server.put(f"/signed/{name}.copc.laz", body(name))
        asset = {"href": f"{server.url}/signed/{name}.copc.laz"}
        if number == 1:
            asset |= {"file:size": 5000, "file:checksum": "1220" + hashlib.sha256(body(name)).hexdigest()}
        items.append({
            "type": "Feature", "stac_version": "1.0.0", "id": name, "collection": "3dep-lidar-copc",
            "links": [], "bbox": [west, 37.0, west + 0.01, 37.01],
            "geometry": mapping(box(west, 37.0, west + 0.01, 37.01)),
            "properties": {"datetime": "2019-05-01T00:00:00Z"}, "assets": {"data": asset},
        })  # fmt: skip

    def search(path, query, content):
        wanted = box(*json.loads(content)["bbox"])
        found = [i for i in items if box(*i["bbox"]).intersects(wanted)]
        return (
            200,
            {"Content-Type": "application/geo+json"},
            json.dumps({"type": "FeatureCollection", "features": found, "links": []}).encode(),
        )

    server.routes["/stac/search"] = search
    server.put("/stac", {
        "type": "Catalog", "id": "api", "stac_version": "1.0.0", "description": "x",
        "conformsTo": ["https://api.stacspec.org/v1.0.0/core", "https://api.stacspec.org/v1.0.0/item-search"],
        "links": [{"rel": "self", "href": f"{server.url}/stac"},
                  {"rel": "root", "href": f"{server.url}/stac"},
                  {"rel": "search", "href": f"{server.url}/stac/search", "method": "POST"}],
    })  # fmt: skip
    point_at("california-3dep", f"{server.url}/stac")


def test_stac_items_are_found_signed_again_when_refused_and_checked(dep, server, tmp_path, tells_no_secret):
    plan = plan_get("california-3dep", Wish(area=AOI.from_bounds([-119.999, 37.001, -119.985, 37.005])))
    tells_no_secret(plan.facts())
    assert [f.name for f in plan.files] == ["USGS_LPC_CA_0.copc.laz", "USGS_LPC_CA_1.copc.laz"]
    assert plan.files[1].bytes == 5000
    assert plan.files[1].checksum.startswith("sha256:")
    assert len(get_files(plan, tmp_path)[0]) == 2 and server.asked("sig=good") >= 2
    tells_no_secret((tmp_path / RECORD).read_text())
    assert verify_folder(tmp_path)["problems"] == {}


# ---- Earthdata -------------------------------------------------------------------------------
class Granule(dict):
    def data_links(self, access=None, in_region=False):
        return [link["URL"] for link in self["umm"]["RelatedUrls"] if link["Type"] == "GET DATA"]


@pytest.fixture
def earthaccess(server, monkeypatch):
    """A module that answers as earthaccess 0.1x does; files want its token and redirect to signed storage."""
    name = "GEDI02_A_2019162222610_O02812_04_T01244_02_003_01_V002.h5"
    module = types.ModuleType("earthaccess")
    module.asked = []
    digest = hashlib.sha256(body(name)).hexdigest()
    part = {"Name": name, "SizeInBytes": 5000, "Checksum": {"Value": digest, "Algorithm": "SHA-256"}}
    granule = Granule(umm={
        "RelatedUrls": [{"Type": "GET DATA", "URL": f"{server.url}/archive/{name}"},
                        {"Type": "VIEW RELATED INFORMATION", "URL": "x"},
                        {"Type": "GET DATA", "URL": f"{server.url}/archive/{name}.sha256"}],
        "DataGranule": {"ArchiveAndDistributionInformation": [part]},
        "TemporalExtent": {"RangeDateTime": {"BeginningDateTime": "2019-06-11T22:26:10Z"}},
    })  # fmt: skip

    def search_data(count=-1, **query):
        module.asked.append(query)
        return [granule]

    def login(strategy="all", persist=False):
        module.asked.append(strategy)
        return types.SimpleNamespace(authenticated=True, token={"access_token": "earth-secret"})

    module.search_data, module.login, module.name, module.granule = search_data, login, name, granule
    monkeypatch.setitem(sys.modules, "earthaccess", module)
    hosts._bearer.cache_clear()
    monkeypatch.setenv("EARTHDATA_TOKEN", "earth-secret")
    server.signature = "good"
    server.put(f"/signed/{name}", body(name))
    server.routes[f"/archive/{name}"] = lambda *_: (303, {"Location": f"/signed/{name}?sig=good"}, b"")
    yield module
    hosts._bearer.cache_clear()


def test_gedi_granules_are_searched_without_login_and_fetched_with_one(
    earthaccess, tmp_path, tells_no_secret
):
    area = AOI.from_bounds([-55.0, -12.0, -54.9, -11.9])
    plan = plan_get("gedi-l2a", Wish(area=area, datetime="2019-06-01/2019-07-01"))
    expected = {"short_name": "GEDI02_A", "version": "003", "temporal": ("2019-06-01", "2019-07-01")}
    assert (
        earthaccess.asked[0] == expected | {"bounding_box": area.bounds_lonlat}
        and len(earthaccess.asked) == 1
    )
    assert [f.name for f in plan.files] == [earthaccess.name] and plan.total_bytes == 5000
    got = get_files(plan, tmp_path)
    assert got[0] and earthaccess.asked[1:] == ["environment"]
    tells_no_secret(plan)
    tells_no_secret((tmp_path / RECORD).read_text())


def test_a_failed_login_says_how_and_nothing_else(earthaccess, tmp_path, tells_no_secret):
    def login(strategy="all", persist=False):
        raise RuntimeError("refused earth-secret")

    earthaccess.login = login
    plan = plan_get("gedi-l2a", Wish(area=AOI.from_bounds([-55.0, -12.0, -54.9, -11.9])))
    with pytest.raises(
        FetchError, match=r"no Earthdata login \(RuntimeError\).*Set EARTHDATA_TOKEN"
    ) as caught:
        get_files(plan, tmp_path)
    tells_no_secret(caught.value)


def test_without_earthaccess_the_remedy_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "earthaccess", None)
    with pytest.raises(MissingDependencyError, match="pip install earthaccess"):
        plan_get("gedi-l2a", Wish(area=AOI.from_bounds([-55.0, -12.0, -54.9, -11.9])))


@pytest.mark.parametrize(
    ("facts", "size", "about"),
    [
        ({"SizeInBytes": 5000, "Size": 1, "SizeUnit": "MB"}, 5000, False),
        ({"Size": 1062.3, "SizeUnit": "MB"}, 1_062_300_000, True),
        ({"Size": 123, "SizeUnit": "B"}, 123, False),
        ({"Size": "NA", "SizeUnit": "MB"}, 1_060_000_000, True),
        ({}, 1_060_000_000, True),
    ],
)
def test_sizes_of_granules_are_read_in_every_way_that_they_are_written(earthaccess, facts, size, about):
    part = earthaccess.granule["umm"]["DataGranule"]["ArchiveAndDistributionInformation"][0]
    for key in ("SizeInBytes", "Checksum"):
        part.pop(key)
    part.update(facts, Name="Not provided")
    plan = plan_get("gedi-l2a", Wish(area=AOI.from_bounds([-55.0, -12.0, -54.9, -11.9])))
    assert [(f.bytes, f.about) for f in plan.files] == [(size, about)]


# ---- GeoSampa --------------------------------------------------------------------------------
@pytest.fixture
def geosampa(server, point_at):
    """A WFS whose features name map sheets; the files lie elsewhere."""
    features = []
    for number, west in enumerate((-46.66, -46.65, -46.64, -46.63, -46.62)):
        server.put(f"/MDS_color_3314-13{number}.laz", body(str(number)))
        outline = mapping(box(west, -23.59, west + 0.01, -23.58))
        properties = {"cd_quadricula": f"3314-13{number}"}
        features.append({"type": "Feature", "geometry": outline, "properties": properties})
    server.put("/wfs", {"type": "FeatureCollection", "features": features, "numberMatched": 5})
    manifest = yaml.safe_load((bundled_dir("data_manifests") / "labels" / "sao-paulo.yaml").read_text())
    manifest["products"]["points"]["href"] = server.url + "/MDS_color_{value}.laz"
    point_at("sao-paulo", f"{server.url}/wfs", products=manifest["products"])
    return AOI.from_bounds([-46.665, -23.589, -46.615, -23.581])


def test_map_sheets_are_found_by_area_and_fetched_by_their_names(geosampa, tmp_path):
    part = AOI.from_bounds([-46.649, -23.589, -46.635, -23.581])
    plan = plan_get("sao-paulo", Wish(area=part))
    assert [f.name for f in plan.files] == ["MDS_color_3314-131.laz", "MDS_color_3314-132.laz"]
    assert [f.bytes for f in plan.files] == [5000, 5000]
    assert len(get_files(plan, tmp_path)[0]) == 2
    assert len(plan_get("sao-paulo", Wish(area=geosampa, match="3314-13[34]")).files) == 2
