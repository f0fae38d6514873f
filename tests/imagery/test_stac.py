"""STAC: a static catalog on disk and over HTTP, and a search API served by this machine."""

from __future__ import annotations

import json
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pystac
import pytest
from affine import Affine
from shapely.geometry import box, mapping

from canopy.errors import AreaError, FetchError, ImageryError, InputError, MissingDependencyError
from canopy.geo.area import AOI
from canopy.geo.grid import Grid
from canopy.imagery import stac_items
from canopy.imagery.base import ReadOptions
from canopy.imagery.open import open_imagery, open_pinned
from canopy.imagery.stac import in_order, open_stac
from canopy.imagery.stac_items import choose_assets, record_of, resolve

UTM = "EPSG:32619"
WEST, NORTH, SIDE = 315_000, 4_884_000, 64


def place(col: int, row: int = 0) -> Grid:
    """A 64 px grid, `col` and `row` pixels from the common corner."""
    return Grid.of(UTM, Affine(0.5, 0, WEST + 0.5 * col, 0, -0.5, NORTH - 0.5 * row), (SIDE, SIDE))


def item(name: str, grid: Grid, day: str, href: str, **properties: object) -> dict:
    footprint = grid.outline()
    return {
        "type": "Feature",
        "stac_version": "1.0.0",
        "id": name,
        "collection": "aerial",
        "geometry": mapping(footprint),
        "bbox": list(footprint.bounds),
        "properties": {"datetime": f"{day}T17:00:00Z", **properties},
        "links": [],
        "assets": {
            "image": {"href": href, "type": "image/tiff; application=geotiff", "roles": ["data"]},
            "thumbnail": {"href": "t.jpg", "type": "image/jpeg", "roles": ["thumbnail"]},
        },
    }


@pytest.fixture
def images(make_tif):
    """Three files: old and new at one place, another 40 px east. name -> (path, value, grid, day)."""
    found = {}
    for name, value, col, day in (
        ("old", 50, 0, "2016-07-01"),
        ("new", 100, 0, "2021-08-02"),
        ("east", 150, 40, "2019-06-03"),
    ):
        values = np.full((3, SIDE, SIDE), value, np.uint8)
        grid = place(col)
        path = make_tif(values, f"img/{name}.tif", transform=grid.transform, photometric="RGB", driver="COG")
        found[name] = (path, value, grid, day)
    return found


def everything() -> Grid:
    return Grid.of(UTM, place(0).transform, (SIDE, SIDE + 40))


def check_mosaic(source) -> None:
    """New lies over east lies over old; old is wholly hidden."""
    assert source.scene_ids == ("new", "east") and source.dates == ("2019-06-03", "2021-08-02")
    image = source.read(everything())
    assert image.valid.all()
    np.testing.assert_allclose(image.rgb[:, :, :SIDE] * 255, 100, atol=1e-4)
    np.testing.assert_allclose(image.rgb[:, :, SIDE:] * 255, 150, atol=1e-4)
    assert len(np.unique(image.date)) == 2 and image.date.min() > 17_000


@pytest.fixture
def catalog(images, tmp_path) -> Path:
    """catalog.json -> collection.json -> items, with relative links and hrefs; one link leads nowhere."""
    found = [item(name, grid, day, f"../../img/{name}.tif") for name, (_, _, grid, day) in images.items()]
    here = [list(place(0).pad(500).outline().bounds)]
    far = [[10.0, 50.0, 11.0, 51.0]]
    for name, extent, items in (("aerial", here, found), ("elsewhere", far, [])):
        folder = tmp_path / "stac" / name
        folder.mkdir(parents=True)
        for document in items:
            (folder / f"{document['id']}.json").write_text(json.dumps(document))
        links = [{"rel": "item", "href": f"./{each['id']}.json"} for each in items or [{"id": "missing"}]]
        document = {"type": "Collection", "id": name, "extent": {"spatial": {"bbox": extent}}, "links": links}
        (folder / "collection.json").write_text(json.dumps(document))
    links = [{"rel": "child", "href": f"{name}/collection.json"} for name in ("aerial", "elsewhere")]
    path = tmp_path / "stac" / "catalog.json"
    path.write_text(json.dumps({"type": "Catalog", "id": "root", "links": links}))
    return path


def area() -> AOI:
    return AOI.from_grid(everything())


def test_a_static_catalog_on_disk(catalog):
    check_mosaic(open_imagery(catalog, area=area()))
    check_mosaic(open_imagery(catalog.parent, area=area()))
    check_mosaic(open_imagery(catalog.parent / "aerial" / "collection.json"))
    assert open_imagery(catalog.parent / "aerial" / "old.json").scene_ids == ("old",)
    assert open_imagery(catalog, area=area(), datetime="../2017").scene_ids == ("old",)
    with pytest.raises(AreaError, match="no imagery of 2011 there"):
        open_imagery(catalog, area=area(), datetime="2011")
    with pytest.raises(InputError, match="--datetime"):
        open_imagery(catalog, area=area(), datetime="last summer")
    for text, message in (
        ("{", r"catalog\.json.*not readable as JSON"),
        ('{"type": "Topology"}', "Topology"),
    ):
        catalog.write_text(text)
        with pytest.raises(ImageryError, match=message):
            open_imagery(catalog)


def test_an_area_elsewhere_or_swapped_and_hrefs(catalog):
    with pytest.raises(ImageryError, match="remote catalog points at"):
        resolve("file:///etc/passwd", "https://example.org/catalog.json")
    assert resolve("/a/b.tif", "https://example.org/x/c.json") == "https://example.org/a/b.tif"
    assert resolve("s3://bucket/a.tif", "c.json") == "https://bucket.s3.amazonaws.com/a.tif"
    lon, lat = area().centroid_lonlat
    with pytest.raises(AreaError, match="no imagery there"):
        open_imagery(catalog, area=AOI.from_bbox([lat + 2, lon], size_m=100))
    with pytest.raises(AreaError, match="Swapping latitude and longitude"):
        open_imagery(catalog, area=AOI.from_bbox([lon, lat], size_m=100))


def test_documents_that_are_missing_are_told_of_and_end_nothing(catalog, images, server):
    far = AOI.from_bounds((10.1, 50.1, 10.2, 50.2))
    with pytest.raises(AreaError, match=r"no imagery there.*1 documents.*missing\.json"):
        open_imagery(catalog, area=far)
    (catalog.parent / "aerial" / "east.json").unlink()
    source = open_imagery(catalog, area=area())
    assert source.scene_ids == ("new",) and any("east.json" in note for note in source.notes)
    for path in catalog.parent.rglob("*.json"):
        server.put(
            "/stac/" + str(path.relative_to(catalog.parent)), path.read_text().replace("../../img", "..")
        )
    server.fail("collection", times=1, status=503)
    with pytest.raises(FetchError, match=r"no such file.*new|new.*no such file"):  # an image is no document
        open_imagery(server.url + "/stac/catalog.json", area=area())
    for name, (path, *_) in images.items():
        server.put(f"/stac/{name}.tif", path.read_bytes())
    assert open_imagery(server.url + "/stac/catalog.json", area=area()).read(everything()).valid.any()


# ---- a search API ----------------------------------------------------------------------------
@pytest.fixture
def api(server, images):
    """A STAC API at /api with one collection, paged one item at a time. Returns (server, items, searches)."""
    url = server.url + "/api"
    items = []
    for name, (path, _, grid, day) in images.items():
        server.put(f"/img/{name}.tif", path.read_bytes())
        items.append(item(name, grid, day, f"{server.url}/img/{name}.tif"))
    searches: list[dict] = []

    def root(path, query, body):
        kinds = {"self": url, "root": url, "data": url + "/collections", "search": url + "/search"}
        links = [{"rel": rel, "href": href, "type": "application/json"} for rel, href in kinds.items()]
        links[-1] |= {"type": "application/geo+json", "method": "POST"}
        parts = ("core", "item-search", "collections")
        conforms = [f"https://api.stacspec.org/v1.0.0/{part}" for part in parts]
        answer = {"type": "Catalog", "id": "local", "stac_version": "1.0.0", "description": "local",
                  "conformsTo": conforms, "links": links}  # fmt: skip
        return 200, {"Content-Type": "application/json"}, json.dumps(answer).encode()

    def search(path, query, body):
        asked = json.loads(body)
        searches.append(asked)
        wanted, named = box(*asked["bbox"]), asked.get("collections", ["aerial"])
        hits = [i for i in items if box(*i["bbox"]).intersects(wanted) and i["collection"] in named]
        page = int(asked.get("token", 0))
        more = {"rel": "next", "href": url + "/search", "method": "POST", "body": asked | {"token": page + 1}}
        links = [more] if page + 1 < len(hits) else []
        answer = {"type": "FeatureCollection", "features": hits[page : page + 1], "links": links}
        return 200, {"Content-Type": "application/geo+json"}, json.dumps(answer).encode()

    server.routes |= {"/api": root, "/api/": root, "/api/search": search}
    return server, items, searches


def test_an_api_is_searched_by_area_and_collection(api):
    server, _, searches = api
    source = open_stac(
        server.url + "/api", area(), ReadOptions(), name="local", collection="aerial", assets=("image",)
    )
    check_mosaic(source)
    assert searches[0]["collections"] == ["aerial"] and len(searches) == 3
    assert searches[0]["bbox"] == pytest.approx(area().bounds_lonlat)
    with pytest.raises(InputError, match="searched by area"):
        open_imagery(server.url + "/api")


def test_without_pystac_client_the_remedy_is_named(api, catalog, monkeypatch):
    server, *_ = api
    monkeypatch.setitem(sys.modules, "pystac_client", None)
    with pytest.raises(MissingDependencyError, match=r"[Pp]ip install 'canopy-height\[stac\]'"):
        open_imagery(server.url + "/api", area=area())
    check_mosaic(open_imagery(catalog, area=area()))  # static catalogs need no more than the core


def test_a_busy_search_is_repeated_and_a_dead_one_named(api):
    server, *_ = api
    server.fail("/api/search", times=2, status=503)
    check_mosaic(open_imagery(server.url + "/api", area=area()))
    server.fail("/api/search", times=1000, status=503)
    with pytest.raises(FetchError, match=r"127\.0\.0\.1:\d+ did not answer the search"):
        open_imagery(server.url + "/api", area=area())


@pytest.mark.parametrize("total", [{"numberMatched": 3}, {"context": {"matched": 3}}])
def test_a_search_that_gives_fewer_items_than_it_says_it_has_is_refused(api, total):
    server, items, _ = api
    page = {"type": "FeatureCollection", "features": items[:1], "links": [], **total}
    server.fail("/api/search", status=200, body=json.dumps(page).encode())
    with pytest.raises(FetchError, match="says it has 3 items there and gives 1"):
        open_imagery(server.url + "/api", area=area())


def test_a_search_goes_on_after_an_empty_page_that_names_a_next_one(api):
    server, _, searches = api
    link = {"rel": "next", "href": server.url + "/api/search", "method": "POST"}
    link["body"] = {"bbox": list(area().bounds_lonlat), "collections": ["aerial"], "token": 0}
    page = {"type": "FeatureCollection", "features": [], "links": [link], "numberMatched": 3}
    server.fail("/api/search", times=2, status=200, body=json.dumps(page).encode())
    check_mosaic(open_imagery(server.url + "/api", area=area()))
    assert len(searches) == 3
    server.fail("/api/search", times=1000, status=200, body=json.dumps(page).encode())
    with pytest.raises(FetchError, match="page after page without items"):
        open_imagery(server.url + "/api", area=area())


def test_items_without_colour_are_counted_aloud(api):
    server, items, _ = api
    items[0]["assets"] = {"dem": {"href": "dem.tif", "type": "image/tiff"}}
    source = open_imagery(server.url + "/api", area=area())
    assert source.notes[0] == "1 of 3 items have no colour asset and are left out, such as old"
    for entry in items:
        entry["assets"] = items[0]["assets"]
    with pytest.raises(ImageryError, match="'old' has no colour asset"):
        open_imagery(server.url + "/api", area=area())


def test_signatures_are_made_when_reading_and_made_again_on_403(api, monkeypatch):
    server, items, _ = api
    for entry in items:
        name = entry["id"]
        server.put(f"/signed/{name}.tif", server.files[f"/img/{name}.tif"][0])
        entry["assets"]["image"]["href"] = f"{server.url}/signed/{name}.tif"
    tokens = {"current": "first"}
    server.signature = "first"

    def sign(href: str, fresh: bool) -> str:
        if fresh:
            tokens["current"] = server.signature
        return f"{href}?sig={tokens['current']}"

    monkeypatch.setattr(stac_items, "planetary_computer_sign", sign)
    source = open_stac(server.url + "/api", area(), ReadOptions(), name="local", signing="planetary-computer")
    server.signature = "second"
    check_mosaic(source)
    shown = json.dumps([source.name, source.scene_ids, source.notes, source.pinned()])
    assert "sig=" not in shown


@pytest.fixture
def token_service(server, monkeypatch):
    """Planetary Computer's token service; gives the list of what it was asked."""
    asked: list[str] = []

    def token(path, query, body):
        asked.append(path)
        time.sleep(0.05)
        answer = {"token": f"sig=token{len(asked)}", "msft:expiry": "2099-01-01T00:00:00Z"}
        return 200, {"Content-Type": "application/json"}, json.dumps(answer).encode()

    server.routes["/sas/naipeuwest/naip"] = token
    monkeypatch.setenv("PC_SDK_SAS_URL", server.url + "/sas")
    monkeypatch.setattr(stac_items, "_tokens", {})
    return asked


BLOB = "https://naipeuwest.blob.core.windows.net/naip/v002/a.tif"


def test_threads_share_one_token_and_an_old_one_is_renewed(token_service, monkeypatch):
    with ThreadPoolExecutor(8) as pool:
        signed = list(pool.map(lambda _: stac_items.planetary_computer_sign(BLOB, True), range(8)))
    assert set(signed) == {BLOB + "?sig=token1"} and len(token_service) == 1
    assert stac_items.planetary_computer_sign(BLOB, False) == BLOB + "?sig=token1"
    monkeypatch.setattr(stac_items, "_YOUNG_S", 0.0)
    assert stac_items.planetary_computer_sign(BLOB, True) == BLOB + "?sig=token2"


def test_what_needs_no_signature_has_none(token_service, server, caplog):
    public = "https://ai4edatasetspublicassets.blob.core.windows.net/assets/a.png"
    for href in ("/data/a.tif", "https://example.org/a.tif", public):
        assert stac_items.planetary_computer_sign(href, True) == href
    caplog.set_level("WARNING", logger="canopy")
    # Some containers are open to all: without the token service they are read as they are.
    server.fail("/sas/", times=100, status=503)
    assert token_service == [] and stac_items.planetary_computer_sign(BLOB, False) == BLOB
    assert "no signature" in caplog.text
    assert (
        stac_items.signing_of("https://planetarycomputer.microsoft.com/api/stac/v1") == "planetary-computer"
    )
    assert stac_items.signing_of("https://example.org/planetarycomputer.microsoft.com") is None


# ---- assets ----------------------------------------------------------------------------------
def bands(*names: str) -> list[dict]:
    return [{"name": f"B{i}", "common_name": name} for i, name in enumerate(names)]


def choose(assets: dict[str, dict], preferred: tuple[str, ...] = ()) -> tuple:
    return choose_assets({key: pystac.Asset.from_dict(asset) for key, asset in assets.items()}, preferred)


def test_assets_are_chosen_by_key_then_bands_then_colours():
    tif = {"type": "image/tiff"}
    one = {"data": {"href": "d.tif", "eo:bands": bands("blue", "green", "red", "nir"), **tif}}
    assert choose(one) == (("d.tif",), (3, 2, 1))
    assert choose({**one, "visual": {"href": "v.tif", **tif}}) == (("v.tif",), None)
    assert choose({**one, "x": {"href": "x.tif", **tif}}, ("x",)) == (("x.tif",), None)
    sized = {f"dop10_{gsd}": {"href": f"{gsd}.tif", "eo:gsd": gsd, **tif} for gsd in (2.0, 0.1)}
    assert choose(sized) == (("0.1.tif",), None)  # swisstopo names neither bands nor usual keys
    singles = {
        name: {"href": f"{name}.tif", "eo:bands": bands(name), **tif}
        for name in ("blue", "nir", "red", "green")
    }
    assert choose(singles) == (("red.tif", "green.tif", "blue.tif"), None)
    assert choose({"overview": {"href": "o.tif", "roles": ["overview"], **tif}}) == ((), None)
    # A catalog calls an image a thumbnail: who names it wants it.
    visual = {"visual": {"href": "v.tif", "roles": ["thumbnail"], **tif}, **one}
    assert choose(visual) == (("d.tif",), (3, 2, 1)) and choose(visual, ("visual",)) == (("v.tif",), None)


def test_three_single_band_assets_make_rgb(make_tif, rgb, tmp_path):
    document = item("triple", Grid.of(UTM, place(0).transform, rgb.shape[1:]), "2020-01-01", "unused.tif")
    document["assets"] = {}
    for index, colour in enumerate(("red", "green", "blue")):
        make_tif(rgb[index : index + 1], f"{colour}.tif")
        document["assets"][colour] = {
            "href": f"./{colour}.tif",
            "type": "image/tiff",
            "eo:bands": bands(colour),
        }
    path = tmp_path / "item.json"
    path.write_text(json.dumps(document))
    source = open_imagery(path)
    image = source.read(Grid.of(UTM, place(0).transform, rgb.shape[1:]))
    np.testing.assert_allclose(image.rgb * 255, rgb, atol=1e-4)
    assert source.dates == ("2020-01-01",)


def test_newest_then_least_cloudy_then_by_id():
    entries = [
        record_of(pystac.Item.from_dict(item(name, place(0), day, "a.tif", **more), href="/here.json"))
        for name, day, more in (
            ("c", "2020-01-01", {"eo:cloud_cover": 30}), ("b", "2020-01-01", {"eo:cloud_cover": 5}),
            ("a", "2020-01-01", {}), ("z", "2021-01-01", {"eo:cloud_cover": 90}),
        )
    ]  # fmt: skip
    order = [(record.scene_id, record.hidden) for record in in_order(entries, None)]
    assert order == [("z", False), ("b", True), ("c", True), ("a", True)]


def test_a_hidden_scene_fills_where_the_newer_one_has_no_pixels(make_tif, tmp_path):
    """Half a swath in an item whose geometry is the whole box: the older item is seen through the hole."""
    half = np.full((3, SIDE, SIDE), 100, np.uint8)
    half[:, :, : SIDE // 2] = 0
    documents = []
    for name, values, day in (("new", half, "2021-08-02"), ("old", np.full_like(half, 50), "2016-07-01")):
        path = make_tif(values, f"{name}.tif", transform=place(0).transform, photometric="RGB", nodata=0)
        documents.append(item(name, place(0), day, str(path)))
    path = tmp_path / "items.json"
    path.write_text(json.dumps({"type": "FeatureCollection", "features": documents}))
    source = open_imagery(path)
    assert source.scene_ids == ("new",) and source.dates == ("2021-08-02",)
    assert source.read(place(SIDE // 2)).valid[:, : SIDE // 2].all() and source.scene_ids == ("new",)
    image = source.read(place(0))
    assert image.valid.all() and source.scene_ids == ("new", "old")
    np.testing.assert_allclose(image.rgb[:, :, : SIDE // 2] * 255, 50, atol=1e-4)
    np.testing.assert_allclose(image.rgb[:, :, SIDE // 2 :] * 255, 100, atol=1e-4)


def test_pinned_scenes_are_opened_again_without_a_search(api):
    server, items, searches = api
    source = open_imagery(server.url + "/api", area=area())
    pin = json.loads(json.dumps(source.pinned()))
    asked = len(searches)
    items.clear()  # what the host would find now is another thing
    again = open_pinned(pin)
    assert again.scene_ids == source.scene_ids and again.notes == source.notes
    assert again.native_gsd_m == source.native_gsd_m and not again.has_own_extent
    check_mosaic(again)
    assert len(searches) == asked and open_pinned(again.pinned()).scene_ids == again.scene_ids
    part = open_pinned(pin, area=AOI.from_grid(place(SIDE + 28).window(0, 0, 8, 8)))
    assert part.scene_ids == ("east",)
    with pytest.raises(AreaError, match="no imagery there"):
        open_pinned(pin, area=AOI.from_bbox([0.0, 0.0], size_m=100))
