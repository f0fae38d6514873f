"""STAC: a static catalog on disk and over HTTP, and a search API served by this machine."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from affine import Affine
from shapely.geometry import box, mapping

from canopy.errors import AreaError, FetchError, ImageryError, InputError
from canopy.geo.area import AOI
from canopy.geo.grid import Grid
from canopy.imagery import stac
from canopy.imagery.base import ReadOptions, check_coverage
from canopy.imagery.open import open_imagery
from canopy.imagery.stac import choose_assets, parse_item, resolve

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
        path = make_tif(
            values, f"img/{name}.tif", transform=grid.transform, photometric="RGB", driver="COG", height=SIDE
        )
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
    """catalog.json -> collection.json -> items, with relative links and hrefs."""
    folder = tmp_path / "stac" / "aerial"
    folder.mkdir(parents=True)
    for name, (_, _, grid, day) in images.items():
        (folder / f"{name}.json").write_text(json.dumps(item(name, grid, day, f"../../img/{name}.tif")))
    far = [[10.0, 50.0, 11.0, 51.0]]
    here = [list(place(0).pad(500).outline().bounds)]
    for name, extent, children in (("aerial", here, list(images)), ("elsewhere", far, ["missing"])):
        links = [{"rel": "item", "href": f"./{child}.json"} for child in children]
        document = {"type": "Collection", "id": name, "extent": {"spatial": {"bbox": extent}}, "links": links}
        (folder.parent / name).mkdir(exist_ok=True)
        (folder.parent / name / "collection.json").write_text(json.dumps(document))
    root = {
        "type": "Catalog",
        "id": "root",
        "links": [
            {"rel": "self", "href": "https://example.org/catalog.json"},
            *({"rel": "child", "href": f"{name}/collection.json"} for name in ("aerial", "elsewhere")),
        ],
    }
    path = folder.parent / "catalog.json"
    path.write_text(json.dumps(root))
    return path


def area() -> AOI:
    return AOI.from_grid(everything())


def test_a_static_catalog_on_disk(catalog):
    check_mosaic(open_imagery(catalog, area=area()))
    check_mosaic(open_imagery(catalog.parent, area=area()))
    check_mosaic(open_imagery(catalog.parent / "aerial" / "collection.json"))
    assert open_imagery(catalog.parent / "aerial" / "old.json").scene_ids == ("old",)


def test_dates_limit_the_items(catalog):
    source = open_imagery(catalog, area=area(), datetime="../2017")
    assert source.scene_ids == ("old",)
    with pytest.raises(AreaError, match="no imagery of 2011 there"):
        open_imagery(catalog, area=area(), datetime="2011")
    with pytest.raises(InputError, match="--datetime"):
        open_imagery(catalog, area=area(), datetime="last summer")


def test_an_area_elsewhere_or_swapped(catalog):
    lon, lat = area().centroid_lonlat
    with pytest.raises(AreaError, match="no imagery there"):
        open_imagery(catalog, area=AOI.from_bbox([lat + 2, lon], size_m=100))
    with pytest.raises(AreaError, match="Swapping latitude and longitude"):
        open_imagery(catalog, area=AOI.from_bbox([lon, lat], size_m=100))
    with pytest.raises(AreaError, match="Swapping"):
        check_coverage(open_imagery(catalog, area=area()), AOI.from_bbox([lon, lat], size_m=100))


def test_a_document_that_is_missing_is_named(catalog):
    far = AOI.from_bounds((10.1, 50.1, 10.2, 50.2))
    with pytest.raises(ImageryError, match=r"missing\.json.*no such file"):
        open_imagery(catalog, area=far)


def test_one_bad_item_is_named_and_is_no_hole(catalog, images):
    source = open_imagery(catalog, area=area())
    images["east"][0].write_bytes(b"II*\0broken")
    with pytest.raises(ImageryError, match=r"east"):
        source.read(everything())


def test_a_static_catalog_over_http(server, catalog, images):
    for path in catalog.parent.rglob("*.json"):
        server.put("/stac/" + str(path.relative_to(catalog.parent)), path.read_text())
    for name, (path, *_) in images.items():
        server.put(f"/img/{name}.tif", path.read_bytes())
    server.fail("collection", times=1, status=503)
    check_mosaic(open_imagery(server.url + "/stac/catalog.json", area=area()))


def test_a_remote_catalog_may_not_name_local_files():
    with pytest.raises(ImageryError, match="remote catalog points at"):
        resolve("file:///etc/passwd", "https://example.org/catalog.json")
    assert resolve("/a/b.tif", "https://example.org/x/c.json") == "https://example.org/a/b.tif"
    assert resolve("s3://bucket/a.tif", "c.json") == "https://bucket.s3.amazonaws.com/a.tif"


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
        links = [
            {"rel": "self", "href": url, "type": "application/json"},
            {"rel": "root", "href": url, "type": "application/json"},
            {"rel": "data", "href": url + "/collections", "type": "application/json"},
            {"rel": "search", "href": url + "/search", "type": "application/geo+json", "method": "POST"},
        ]
        conforms = [
            "https://api.stacspec.org/v1.0.0/core",
            "https://api.stacspec.org/v1.0.0/item-search",
            "https://api.stacspec.org/v1.0.0/collections",
        ]
        answer = {"type": "Catalog", "id": "local", "stac_version": "1.0.0", "description": "local",
                  "conformsTo": conforms, "links": links}  # fmt: skip
        return 200, {"Content-Type": "application/json"}, json.dumps(answer).encode()

    def search(path, query, body):
        asked = json.loads(body)
        searches.append(asked)
        wanted = box(*asked["bbox"])
        hits = [i for i in items if box(*i["bbox"]).intersects(wanted)]
        hits = [i for i in hits if not asked.get("collections") or i["collection"] in asked["collections"]]
        page = int(asked.get("token", 0))
        links = []
        if page + 1 < len(hits):
            links = [
                {
                    "rel": "next",
                    "href": url + "/search",
                    "method": "POST",
                    "body": asked | {"token": page + 1},
                }
            ]
        answer = {"type": "FeatureCollection", "features": hits[page : page + 1], "links": links}
        return 200, {"Content-Type": "application/geo+json"}, json.dumps(answer).encode()

    server.routes |= {"/api": root, "/api/": root, "/api/search": search}
    return server, items, searches


def test_an_api_is_searched_by_area_and_collection(api):
    server, _, searches = api
    query = stac.StacQuery(server.url + "/api", "local", collection="aerial", assets=("image",))
    check_mosaic(stac.open_stac(query, area(), ReadOptions()))
    assert searches[0]["collections"] == ["aerial"] and len(searches) == 3
    assert searches[0]["bbox"] == pytest.approx(area().bounds_lonlat)


def test_an_api_given_by_its_url(api):
    server, *_ = api
    check_mosaic(open_imagery(server.url + "/api", area=area()))
    with pytest.raises(InputError, match="searched by area"):
        open_imagery(server.url + "/api")


def test_a_busy_search_is_repeated_and_a_dead_one_named(api):
    server, *_ = api
    server.fail("/api/search", times=2, status=503)
    check_mosaic(open_imagery(server.url + "/api", area=area()))
    server.fail("/api/search", times=1000, status=503)
    with pytest.raises(FetchError, match=r"127\.0\.0\.1:\d+ did not answer the search"):
        open_imagery(server.url + "/api", area=area())


def test_a_search_answer_that_is_a_web_page(api):
    server, *_ = api
    server.fail(
        "/api/search",
        times=1000,
        status=200,
        body=b"<html>log in</html>",
        headers={"Content-Type": "text/html"},
    )
    with pytest.raises(ImageryError, match=r"127\.0\.0\.1"):
        open_imagery(server.url + "/api", area=area())


def test_an_item_without_colour_is_named(api):
    server, items, _ = api
    items[1]["assets"] = {"dem": {"href": "dem.tif", "type": "image/tiff"}}
    query = stac.StacQuery(server.url + "/api", "local", collection="aerial")
    with pytest.raises(ImageryError, match="'new' has no colour asset"):
        stac.open_stac(query, area(), ReadOptions())


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

    monkeypatch.setattr(stac, "planetary_computer_sign", sign)
    query = stac.StacQuery(server.url + "/api", "local", signing="planetary-computer")
    source = stac.open_stac(query, area(), ReadOptions())
    server.signature = "second"
    check_mosaic(source)
    shown = json.dumps([source.name, source.scene_ids, source.notes, vars(source.layers[0]).get("href")])
    assert "sig=" not in shown


def test_the_real_signer_asks_for_a_token_once_and_again_when_told(server, monkeypatch):
    from planetary_computer import sas
    from planetary_computer.settings import Settings

    counts = []

    def token(path, query, body):
        counts.append(path)
        answer = {"token": f"sig=token{len(counts)}", "msft:expiry": "2099-01-01T00:00:00Z"}
        return 200, {"Content-Type": "application/json"}, json.dumps(answer).encode()

    server.routes["/sas/naipeuwest/naip"] = token
    monkeypatch.setenv("PC_SDK_SAS_URL", server.url + "/sas")
    Settings.get.cache_clear()
    sas.TOKEN_CACHE.clear()
    try:
        href = "https://naipeuwest.blob.core.windows.net/naip/v002/a.tif"
        assert stac.planetary_computer_sign(href, False) == href + "?sig=token1"
        assert stac.planetary_computer_sign(href, False) == href + "?sig=token1"
        assert stac.planetary_computer_sign(href, True) == href + "?sig=token2"
    finally:
        Settings.get.cache_clear()
        sas.TOKEN_CACHE.clear()


# ---- assets ----------------------------------------------------------------------------------
def bands(*names: str) -> list[dict]:
    return [{"name": f"B{i}", "common_name": name} for i, name in enumerate(names)]


def test_assets_are_chosen_by_key_then_bands_then_colours():
    tif = {"type": "image/tiff"}
    one = {"data": {"href": "d.tif", "eo:bands": bands("blue", "green", "red", "nir"), **tif}}
    assert choose_assets(one) == (("d.tif",), (3, 2, 1))
    assert choose_assets({**one, "visual": {"href": "v.tif", **tif}}) == (("v.tif",), None)
    assert choose_assets({**one, "x": {"href": "x.tif", **tif}}, ["x"]) == (("x.tif",), None)
    singles = {
        name: {"href": f"{name}.tif", "eo:bands": bands(name), **tif}
        for name in ("blue", "nir", "red", "green")
    }
    assert choose_assets(singles) == (("red.tif", "green.tif", "blue.tif"), None)
    assert choose_assets({"overview": {"href": "o.tif", "roles": ["overview"], **tif}}) == ((), None)


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


def test_newest_then_least_cloudy_then_by_id(images):
    grid = place(0)
    entries = [
        parse_item(item(name, grid, day, "a.tif", **more), "here.json")
        for name, day, more in (
            ("c", "2020-01-01", {"eo:cloud_cover": 30}),
            ("b", "2020-01-01", {"eo:cloud_cover": 5}),
            ("a", "2020-01-01", {}),
            ("z", "2021-01-01", {"eo:cloud_cover": 90}),
        )
    ]
    assert [i.item_id for i in sorted(entries, key=lambda i: i.order)] == ["z", "b", "c", "a"]
    assert [i.item_id for i in stac.visible(entries, None)] == ["z"]


def test_bad_json_is_named(tmp_path):
    path = tmp_path / "x.json"
    path.write_text("{")
    with pytest.raises(ImageryError, match=r"x\.json.*not readable as JSON"):
        open_imagery(path)
    path.write_text('{"type": "Topology"}')
    with pytest.raises(ImageryError, match="Topology"):
        open_imagery(path)
