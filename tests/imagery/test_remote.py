"""Images over HTTP from a real local server that misbehaves: rows 30 to 34 and 37 of the fault table."""

from __future__ import annotations

import json
import re

import httpx
import numpy as np
import pytest
import rasterio.shutil
from shapely.geometry import box, mapping

from canopy import web
from canopy.errors import FetchError, InputError
from canopy.files import check_terms
from canopy.imagery.base import ReadOptions
from canopy.imagery.open import open_imagery
from canopy.imagery.scene import Handles, Scene, SceneRecord

SIZE = 1024


@pytest.fixture(scope="module")
def noise() -> np.ndarray:
    return np.random.default_rng(5).integers(1, 255, (3, SIZE, SIZE), dtype=np.uint8)


@pytest.fixture
def cog(make_tif, noise, tmp_path) -> bytes:
    path = tmp_path / "cog.tif"
    options = {"driver": "COG", "BLOCKSIZE": 256, "COMPRESS": "DEFLATE", "OVERVIEWS": "NONE"}
    rasterio.shutil.copy(make_tif(noise, photometric="RGB"), path, **options)
    return path.read_bytes()


def test_a_cog_is_read_by_ranges(server, cog, noise):
    source = open_imagery(server.put("/a.tif", cog) + "?token=secret")
    window = source.native_grid.window(700, 700, 64, 64)
    np.testing.assert_allclose(source.read(window).rgb * 255, noise[:, 700:764, 700:764], atol=1e-4)
    assert source.name.endswith("/a.tif") and "secret" not in repr(
        (source.name, source.scene_ids, source.notes)
    )
    assert source.read(source.native_grid.window(9999, 0, 8, 8)).valid.sum() == 0


@pytest.mark.parametrize("status", [429, 500])
def test_a_busy_host_is_asked_again(server, cog, noise, status):
    url = server.put("/a.tif", cog)
    server.fail("/a.tif", times=6, status=status, headers={"Retry-After": "0"})
    source = open_imagery(url)
    source.close()  # a look at the image has filled its cache
    server.fail("/a.tif", times=2, status=status)
    server.cut("/a.tif", times=1, after=5000, from_byte=20_000)
    np.testing.assert_allclose(source.read(source.native_grid).rgb * 255, noise, atol=1e-4)


def test_a_host_that_always_cuts_is_given_up_on_and_named(server, cog):
    url = server.put("/a.tif", cog)
    source = open_imagery(url + "?sig=secret")
    source.close()  # a look at the image has filled its cache
    server.cut("/a.tif", times=10_000, after=100, from_byte=20_000)
    with pytest.raises(FetchError, match=r"a\.tif.*127\.0\.0\.1.*gave up after") as caught:
        source.read(source.native_grid)
    assert "secret" not in str(caught.value)


def test_a_web_page_instead_of_an_image_names_the_host(server):
    url = server.put("/a.tif", "<!DOCTYPE html><html>please log in</html>", "text/html")
    with pytest.raises(FetchError, match=r"127\.0\.0\.1:\d+ sent a web page"):
        open_imagery(url)


def test_a_host_without_ranges_is_told_clearly(server, cog):
    url = server.put("/a.tif", cog)
    server.no_ranges.add("/a.tif")
    with pytest.raises(FetchError, match=r"does not answer range requests.*ownload"):
        open_imagery(url)


FORBIDDEN = (
    "https://server.arcgisonline.com/ArcGIS/rest/services/World_Imagery/MapServer/tile/{z}/{y}/{x}",
    "https://wayback.maptiles.arcgis.com/arcgis/rest/services/World_Imagery/WMTS/1.0.0/{z}/{y}/{x}",
    "https://ecn.t3.tiles.virtualearth.net/tiles/a{q}.jpeg?g=1",
    "https://mt1.google.com/vt/lyrs=s&x={x}&y={y}&z={z}",
    "https://khms1.googleapis.com/kh?v=980&x={x}&y={y}&z={z}",
    "https://api.mapbox.com/v4/mapbox.satellite/{z}/{x}/{y}.jpg90",
)


def test_hosts_whose_terms_forbid_it_are_refused_wherever_their_address_stands(server, tmp_path):
    for address in FORBIDDEN:
        for given in (address, re.sub(r"\{.*?\}", "1", address)):  # a template, and one picture
            with pytest.raises(InputError, match=r"may not be read: its terms forbid") as caught:
                open_imagery(given)
            assert caught.value.exit_code == 2
    item = {
        "type": "Feature", "id": "a", "properties": {"datetime": "2021-01-01T00:00:00Z"},
        "geometry": mapping(box(0, 0, 1, 1)),
        "assets": {"visual": {"href": "https://api.mapbox.com/a.tif", "type": "image/tiff"}},
    }  # fmt: skip
    (tmp_path / "item.json").write_text(json.dumps(item))
    with pytest.raises(InputError, match="Mapbox may not be read"):
        open_imagery(tmp_path / "item.json")
    server.routes["/go.tif"] = lambda *_: (302, {"Location": "https://mt1.google.com/vt"}, b"")
    with pytest.raises(InputError, match="Google Maps may not be read"):
        web.get(server.url + "/go.tif")
    for open_host in (
        "https://storage.googleapis.com/neon/a.tif", "https://tiles.arcgis.com/t/MapServer/tile/{z}/{y}/{x}",
        "https://notmapbox.com.example.org/{z}/{x}/{y}",
    ):  # fmt: skip
        check_terms(open_host)


def test_a_bucket_that_refuses_is_explained():
    """Earth Search's `s3://naip-analytic`, whose requester pays, becomes an https address that says 403."""
    answer = httpx.Response(403, request=httpx.Request("GET", "https://naip-analytic.s3.amazonaws.com/a.tif"))
    with pytest.raises(FetchError, match=r"refuses the image \(403\).*aws s3 cp --request-payer requester"):
        web.check_answer(answer, str(answer.request.url), "the image", signed=False)


def test_an_expired_signature_is_renewed_and_never_shown(server, cog, noise):
    url = server.put("/signed/a.tif", cog)
    server.signature = "one"
    asked: list[bool] = []

    def sign(href: str, fresh: bool) -> str:
        asked.append(fresh)
        return f"{href}?sig={server.signature if fresh or len(asked) == 1 else 'one'}"

    record = SceneRecord(scene_id="a", assets=(url,))
    scene = Scene(record, ReadOptions(), Handles(), sign)
    grid = scene.facts.place.grid()
    server.signature = "two"  # what was signed before now answers 403
    pixels = scene.read(grid)
    np.testing.assert_allclose(pixels[0] * 255, noise, atol=1e-4)
    assert asked[-1] is True
    server.signature = "never"
    refusing = Scene(record, ReadOptions(), Handles(), lambda href, fresh: f"{href}?sig=topsecret")
    with pytest.raises(FetchError, match="403") as caught:
        _ = refusing.facts
    assert "topsecret" not in str(caught.value)
