"""`get` against each host's protocol: WFS, STAC and Earthdata, served by this machine."""

from __future__ import annotations

import copy
import hashlib
import json
import random
import sys
from types import ModuleType, SimpleNamespace

import pytest
import yaml
from pyproj import Transformer
from shapely.geometry import box, mapping, shape

from canopy.errors import AreaError, FetchError, InputError, MissingDependencyError
from canopy.geo.area import AOI
from canopy.imagery import stac_items
from canopy.labels import hosts
from canopy.labels.catalog import read_name
from canopy.labels.fetch import RECORD, Wish, get_files, verify_folder
from canopy.labels.hosts import plan_get
from canopy.runtime import bundled_dir

JSON = {"Content-Type": "application/json"}
BRAZIL = AOI.from_bounds([-55.0, -12.0, -54.9, -11.9])


def body(name: str, size: int = 5000) -> bytes:
    return random.Random(name).randbytes(size)


def in_france(west_km: float, south_km: float, east_km: float, north_km: float) -> AOI:
    return AOI.from_bounds([km * 1000 for km in (west_km, south_km, east_km, north_km)], "EPSG:2154")


ONE_TILE, FOUR_TILES = in_france(677.2, 6815.2, 677.4, 6815.4), in_france(676.1, 6814.1, 677.9, 6815.9)


# ---- IGN -------------------------------------------------------------------------------------
@pytest.fixture
def ign(server, point_at):
    """A WFS that pages by two and takes longitude first in CRS:84 only; `features` are its tiles."""
    to_lonlat = Transformer.from_crs(2154, 4326, always_xy=True)
    state = SimpleNamespace(layer="IGNF_LIDAR-HD_METADONNEE:metadata", features=[])
    server.put("/wms-r", body("raster"))
    for x, y in ((x, y) for x in (676, 677, 678) for y in (6815, 6816)):
        name, points = (f"LHD_FXX_{x:04d}{end}" for end in (
            f"_{y}_MNH_O_0M50_LAMB93_IGN69.tif", f"-{y}_PTS_O_LAMB93_IGN69.copc.laz"))  # fmt: skip
        server.put(f"/laz/{points.replace('-', '_')}", body(points))
        outline = mapping(box(*to_lonlat.transform_bounds(*read_name(name).bounds)))
        facts = {
            "url_mnh": f"{server.url}/wms-r?SERVICE=WMS&REQUEST=GetMap&FILENAME={name}",
            "url_npl": f"{server.url}/laz/{points}",
            "date_debut_acquisition": "2022-06-01Z",
            "date_fin_acquisition": "2022-06-03Z",
        }
        state.features.append({"type": "Feature", "geometry": outline, "properties": facts})

    def answer(path, query, _body):
        value = {key.upper(): values[0] for key, values in query.items()}
        if value["TYPENAMES"] != state.layer:
            return 400, {"Content-Type": "text/xml"}, b"<ExceptionReport>Unknown namespace</ExceptionReport>"
        *numbers, crs = value["BBOX"].split(",")
        assert crs == value["SRSNAME"] == "CRS:84"
        hits = [f for f in state.features if shape(f["geometry"]).intersects(box(*map(float, numbers)))]
        start = int(value["STARTINDEX"])
        page = {"features": hits[start : start + 2], "numberMatched": len(hits)}
        return 200, JSON, json.dumps(page).encode()

    state.answer = server.routes["/wfs/ows"] = answer
    point_at("france-lidar-hd", f"{server.url}/wfs/ows")
    return state


def test_ign_tiles_are_paged_and_chosen_by_their_names_bounds(ign, server, tmp_path):
    plan = plan_get("france-lidar-hd", Wish(area=FOUR_TILES))
    names = [f"LHD_FXX_{x:04d}_{y}_MNH_O_0M50_LAMB93_IGN69.tif" for x in (676, 677) for y in (6815, 6816)]
    assert [f.name for f in plan.files] == names and server.asked("/wfs/ows") >= 2
    assert all((f.about, f.bytes, f.day) == (True, 16_000_000, "2022-06-03") for f in plan.files)
    one = plan_get("france-lidar-hd", Wish(area=ONE_TILE, datetime="2022-06"))
    assert [f.name for f in one.files] == names[3:]
    get_files(one, tmp_path)
    record = json.loads((tmp_path / RECORD).read_text())["files"][names[3]]
    assert record["sha256"] == hashlib.sha256(body("raster")).hexdigest()
    assert "Licence Ouverte" in record["licence"] and verify_folder(tmp_path)["problems"] == {}
    cloud = plan_get("france-lidar-hd", Wish(area=ONE_TILE), product="points")
    assert [f.name for f in cloud.files] == ["LHD_FXX_0677_6816_PTS_O_LAMB93_IGN69.copc.laz"]
    assert get_files(cloud, tmp_path)[0]  # indexed with a dash, served with a _


def test_where_ign_has_nothing(ign):
    for wish in (Wish(area=ONE_TILE, datetime="2021"), Wish(area=in_france(700, 6800, 700.5, 6800.5))):
        with pytest.raises(AreaError, match="nothing there"):
            plan_get("france-lidar-hd", wish)
    with pytest.raises(InputError, match="found by area"):
        plan_get("france-lidar-hd", Wish())
    ign.layer = "renamed"
    with pytest.raises(FetchError, match=r"no list of IGNF_LIDAR-HD_METADONNEE:metadata \(400\)"):
        plan_get("france-lidar-hd", Wish(area=ONE_TILE))


@pytest.mark.parametrize("times", [2, 1000])
def test_an_answer_that_ends_before_its_own_total_is_no_plan(ign, server, times):
    """Under load the service gives empty pages: asked again, and then an error, never a shorter list."""

    def empty(path, query, body):
        status, headers, answer = ign.answer(path, query, body)
        if "STARTINDEX=2" in path and server.asked("STARTINDEX=2") <= times:
            answer = json.dumps(json.loads(answer) | {"features": []}).encode()
        return status, headers, answer

    server.routes["/wfs/ows"] = empty
    if times == 2:
        assert len(plan_get("france-lidar-hd", Wish(area=FOUR_TILES)).files) == 4
    else:
        with pytest.raises(FetchError, match="says it has 4 tiles there and gives 2"):
            plan_get("france-lidar-hd", Wish(area=FOUR_TILES))


@pytest.mark.parametrize("order", [("2025-06-13", "2023-04-20"), ("2023-04-20", "2025-06-13")])
def test_the_newest_edition_of_a_tile_counts_whatever_the_order(ign, order):
    (tile,) = [f for f in ign.features if "0677_6816" in f["properties"]["url_mnh"]]
    ign.features = [copy.deepcopy(tile) for _ in order]
    for edition, feature in zip(order, ign.features, strict=True):
        url = feature["properties"]["url_mnh"].replace("/wms-r?", f"/{edition}?")
        feature["properties"] |= {"date_edition": edition, "url_mnh": url}
    plan = plan_get("france-lidar-hd", Wish(area=ONE_TILE))
    assert [f.address.rpartition("/")[2] for f in plan.files] == ["2025-06-13"]
    assert plan.notes == ("1 tiles have an older edition, which is left out",)


def test_map_sheets_are_found_by_area_and_fetched_by_their_names(server, point_at, tmp_path):
    """GeoSampa: a WFS whose features name map sheets; the files lie elsewhere."""
    features = []
    for number, west in enumerate((-46.66, -46.65, -46.64)):
        server.put(f"/MDS_color_3314-13{number}.laz", body(str(number)))
        outline = mapping(box(west, -23.59, west + 0.01, -23.58))
        facts = {"cd_quadricula": f"3314-13{number}"}
        features.append({"type": "Feature", "geometry": outline, "properties": facts})
    server.put("/wfs", {"type": "FeatureCollection", "features": features, "numberMatched": 3})
    manifest = yaml.safe_load((bundled_dir("data_manifests") / "labels" / "sao-paulo.yaml").read_text())
    manifest["products"]["points"]["href"] = server.url + "/MDS_color_{value}.laz"
    point_at("sao-paulo", f"{server.url}/wfs", products=manifest["products"])
    plan = plan_get("sao-paulo", Wish(area=AOI.from_bounds([-46.649, -23.589, -46.635, -23.581])))
    assert [f.name for f in plan.files] == ["MDS_color_3314-131.laz", "MDS_color_3314-132.laz"]
    assert [f.bytes for f in plan.files] == [5000, 5000]  # as the host said
    assert len(get_files(plan, tmp_path)[0]) == 2


# ---- STAC ------------------------------------------------------------------------------------
def serve_stac(server, items) -> None:
    """A STAC API at /stac that finds items by their boxes."""

    def search(path, query, content):
        wanted = box(*json.loads(content)["bbox"])
        found = [i for i in items if box(*i["bbox"]).intersects(wanted)]
        answer = {"type": "FeatureCollection", "features": found, "links": []}
        return 200, {"Content-Type": "application/geo+json"}, json.dumps(answer).encode()

    server.routes["/stac/search"] = search
    root, api = f"{server.url}/stac", "https://api.stacspec.org/v1.0.0"
    server.put("/stac", {
        "type": "Catalog", "id": "api", "stac_version": "1.0.0", "description": "x",
        "conformsTo": [f"{api}/core", f"{api}/item-search"],
        "links": [{"rel": "self", "href": root}, {"rel": "root", "href": root},
                  {"rel": "search", "href": f"{root}/search", "method": "POST"}],
    })  # fmt: skip


def test_stac_items_are_found_signed_again_when_refused_and_checked(
    server, point_at, monkeypatch, tmp_path, tells_no_secret
):
    pytest.importorskip("pystac_client")
    monkeypatch.setattr(
        stac_items, "planetary_computer_sign", lambda url, fresh: f"{url}?sig={'good' if fresh else 'old'}"
    )
    server.signature = "good"
    items = []
    for number, west in enumerate((-120.0, -119.99, -110.0)):
        name = f"USGS_LPC_CA_{number}"
        asset = {"href": server.put(f"/signed/{name}.copc.laz", body(name))}
        if number == 1:
            asset |= {"file:size": 5000, "file:checksum": "1220" + hashlib.sha256(body(name)).hexdigest()}
        outline = box(west, 37.0, west + 0.01, 37.01)
        items.append({
            "type": "Feature", "stac_version": "1.0.0", "id": name, "collection": "3dep-lidar-copc",
            "links": [], "bbox": outline.bounds, "geometry": mapping(outline),
            "properties": {"datetime": "2019-05-01T00:00:00Z"}, "assets": {"data": asset},
        })  # fmt: skip

    serve_stac(server, items)
    point_at("california-3dep", f"{server.url}/stac")
    plan = plan_get("california-3dep", Wish(area=AOI.from_bounds([-119.999, 37.001, -119.985, 37.005])))
    tells_no_secret(plan.facts())
    assert [f.name for f in plan.files] == ["USGS_LPC_CA_0.copc.laz", "USGS_LPC_CA_1.copc.laz"]
    assert plan.files[1].bytes == 5000 and plan.files[1].checksum.startswith("sha256:")
    assert len(get_files(plan, tmp_path)[0]) == 2 and server.asked("sig=good") >= 2
    tells_no_secret((tmp_path / RECORD).read_text())
    assert verify_folder(tmp_path)["problems"] == {}


def test_overlapping_surveys_are_kept_apart_and_the_plan_says_so(server, point_at, tmp_path, monkeypatch):
    """Three flights: 2012 over all three tiles, 2019 over two, and 2016 over one half and some new ground."""
    pytest.importorskip("pystac_client")
    tiles = {("CA_Old_2012", k): (-120.0 + 0.01 * k, -119.99 + 0.01 * k) for k in range(3)}
    tiles |= {("CA_New_2019", k): (-120.0 + 0.01 * k, -119.99 + 0.01 * k) for k in range(2)}
    tiles |= {("CA_Mid_2016", 0): (-119.985, -119.975)}
    items = []
    for (survey, number), (west, east) in tiles.items():
        name, outline = f"{survey}_{number}", box(west, 37.0, east, 37.01)
        server.put(f"/laz/{name}.copc.laz", body(name))
        items.append({
            "type": "Feature", "stac_version": "1.0.0", "id": name, "collection": "3dep-lidar-copc",
            "links": [], "bbox": outline.bounds, "geometry": mapping(outline),
            "properties": {"datetime": None, "start_datetime": f"{survey[-4:]}-05-01T00:00:00Z",
                           "end_datetime": f"{survey[-4:]}-06-01T00:00:00Z", "3dep:usgs_id": survey},
            "assets": {"data": {"href": f"{server.url}/laz/{name}.copc.laz"}},
        })  # fmt: skip
    serve_stac(server, items)
    point_at("usgs-3dep", f"{server.url}/stac", signing=None)
    all_three = AOI.from_bounds([-119.999, 37.001, -119.971, 37.009])
    newest = plan_get("usgs-3dep", Wish(area=all_three))
    assert [f.path.split("/")[0] for f in newest.files] == [
        "CA_Mid_2016",
        *["CA_New_2019"] * 2,
        "CA_Old_2012",
    ]
    assert "the newest (--date" in newest.notes[0]
    assert newest.notes[1:] == (
        "CA_New_2019 (2019-06-01): 2 of 2 tiles taken",
        "CA_Mid_2016 (2016-06-01): 1 of 1 tiles taken",
        "CA_Old_2012 (2012-06-01): 1 of 3 tiles taken",
    )
    oldest = plan_get("usgs-3dep", Wish(area=all_three, near="2010/2013"))
    assert {f.folder for f in oldest.files} == {"CA_Old_2012"} and len(oldest.files) == 3
    assert "nearest to 2010/2013" in oldest.notes[0]
    get_files(newest, tmp_path)
    assert (tmp_path / "CA_Mid_2016" / "CA_Mid_2016_0.copc.laz").is_file()


# ---- Earthdata -------------------------------------------------------------------------------
class Granule(dict):
    def data_links(self, access=None, in_region=False):
        return [link["URL"] for link in self["umm"]["RelatedUrls"]]


@pytest.fixture
def earthaccess(server, monkeypatch):
    """A module that answers as earthaccess 0.1x does; files want its token and redirect to signed storage."""
    name = "GEDI02_A_2019162222610_O02812_04_T01244_02_003_01_V002.h5"
    digest = hashlib.sha256(body(name)).hexdigest()
    part = {"Name": name, "SizeInBytes": 5000, "Checksum": {"Value": digest, "Algorithm": "SHA-256"}}
    granule = Granule(umm={
        "RelatedUrls": [{"URL": f"{server.url}/archive/{name}{end}"} for end in ("", ".sha256")],
        "DataGranule": {"ArchiveAndDistributionInformation": [part]},
        "TemporalExtent": {"RangeDateTime": {"BeginningDateTime": "2019-06-11T22:26:10Z"}},
    })  # fmt: skip
    module = ModuleType("earthaccess")
    module.asked, module.name, module.part = [], name, part
    module.search_data = lambda **query: module.asked.append(query) or [granule]
    module.login = lambda strategy: (
        module.asked.append(strategy)
        or SimpleNamespace(authenticated=True, token={"access_token": f"earth-secret-{len(module.asked)}"})
    )
    module.Auth = lambda: SimpleNamespace(login=lambda strategy: module.login(strategy))
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
    plan = plan_get("gedi-l2a", Wish(area=BRAZIL, datetime="2019-06-01/2019-07-01"))
    expected = {"short_name": "GEDI02_A", "version": "003", "temporal": ("2019-06-01", "2019-07-01")}
    assert earthaccess.asked == [expected | {"bounding_box": BRAZIL.bounds_lonlat}]
    assert [f.name for f in plan.files] == [earthaccess.name] and plan.total_bytes == 5000
    assert get_files(plan, tmp_path)[0] and earthaccess.asked[1:] == ["environment"]
    tells_no_secret(plan)
    tells_no_secret((tmp_path / RECORD).read_text())


def test_a_failed_login_says_how_and_nothing_else(earthaccess, tmp_path, tells_no_secret, monkeypatch):
    def login(strategy):
        raise RuntimeError("refused earth-secret")

    earthaccess.login = login
    with pytest.raises(FetchError, match=r"no Earthdata login \(RuntimeError\).*Set EARTHDATA") as caught:
        get_files(plan_get("gedi-l2a", Wish(area=BRAZIL)), tmp_path)
    tells_no_secret(caught.value)
    monkeypatch.setitem(sys.modules, "earthaccess", None)
    with pytest.raises(MissingDependencyError, match="pip install 'earthaccess'"):
        plan_get("gedi-l2a", Wish(area=BRAZIL))


def test_a_token_that_ran_out_is_renewed_once_and_then_the_host_is_believed(
    earthaccess, server, tmp_path, tells_no_secret
):
    plan, seen = plan_get("gedi-l2a", Wish(area=BRAZIL)), []
    server.see = lambda headers: seen.append(headers.get("Authorization"))
    server.fail("/archive/", times=1, status=401)
    assert get_files(plan, tmp_path)[0] and earthaccess.asked[1:] == ["environment", "environment"]
    assert len(set(seen[:2])) == 2, "the second request has the new token"
    server.fail("/archive/", times=99, status=401)
    with pytest.raises(
        FetchError, match="answered 401 Unauthorized, also with a new signature or login"
    ) as no:
        get_files(plan, tmp_path / "again")
    assert server.asked("/archive/") == 4
    tells_no_secret(no.value)


@pytest.mark.parametrize(
    ("facts", "size", "about"),
    [
        ({"SizeInBytes": 5000, "Size": 1, "SizeUnit": "MB"}, 5000, False),
        ({"Size": 1062.3, "SizeUnit": "MB"}, 1_062_300_000, True),
        ({"Size": 123, "SizeUnit": "B"}, 123, False),
        ({"Size": "NA", "SizeUnit": "MB"}, 1_060_000_000, True),
    ],
)
def test_sizes_of_granules_are_read_in_every_way_that_they_are_written(earthaccess, facts, size, about):
    del earthaccess.part["SizeInBytes"], earthaccess.part["Checksum"]
    earthaccess.part.update(facts, Name="Not provided")
    plan = plan_get("gedi-l2a", Wish(area=BRAZIL))
    assert [(f.bytes, f.about) for f in plan.files] == [(size, about)]
