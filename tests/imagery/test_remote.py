"""Images over HTTP from a real local server that misbehaves: rows 30 to 34 and 37 of the fault table."""

from __future__ import annotations

import numpy as np
import pytest
import rasterio.shutil

from canopy.errors import FetchError
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
