"""The page in a real browser, served and exported: what it shows is what the rasters hold."""

from __future__ import annotations

import functools
import http.server
import io
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import geopandas
import numpy as np
import pytest
import rasterio.warp
import shapely
from PIL import Image
from viewer_maps import GRID, UTM, heights_m

import canopy
from canopy.viewer.export import export
from canopy.viewer.page import open_view

LOADED = """[...layers.map((layer) => layer.tiles), photo].every((tiles) =>
    !tiles || !map.hasLayer(tiles) || !tiles.isLoading())"""
PIXELS = (150, 120), (220, 300), (20, 200)


class Page:
    """A page in the browser; ends the test on anything odd: messages, errors, requests to others."""

    def __init__(self, browser: Any, url: str) -> None:
        self.page = browser.new_page(viewport={"width": 1280, "height": 800})
        self.odd: list[str] = []
        self.page.on("console", lambda message: self.odd.append(message.text))
        self.page.on("pageerror", lambda error: self.odd.append(str(error)))
        self.page.on("response", lambda got: got.ok or self.odd.append(f"{got.status} {got.url}"))
        self.page.on(
            "request",
            lambda asked: asked.url.startswith((url, "data:", "blob:")) or self.odd.append(asked.url),
        )
        self.page.goto(url)
        self.page.wait_for_selector("body[data-ready]", timeout=60_000)
        self.wait()

    def wait(self) -> None:
        """Until all tiles are there."""
        for _ in range(600):
            if self.page.evaluate(LOADED):
                self.page.wait_for_timeout(300)  # tiles fade in
                return
            self.page.wait_for_timeout(100)
        raise AssertionError("tiles are missing after a minute")

    def where(self, row: float, col: float) -> tuple[float, float]:
        """On the screen: the centre of a pixel of the maps."""
        lon, lat = lonlat(row, col)
        at = self.page.evaluate(f"map.latLngToContainerPoint([{lat}, {lon}])")
        return at["x"], at["y"]

    def colour(self, row: float, col: float) -> np.ndarray:
        """On the screen, uint8 (3,)."""
        x, y = self.where(row, col)
        picture = Image.open(io.BytesIO(self.page.screenshot()))
        return np.array(picture.convert("RGB"))[int(y), int(x)]

    def click(self, row: float, col: float) -> str:
        """The text of the answer to a click on a pixel's centre; at a zoom where a pixel is many wide."""
        self.page.evaluate("map.closePopup()")
        lon, lat = lonlat(row, col)
        self.page.evaluate(f"map.setView([{lat}, {lon}], 21, {{ animate: false }})")
        self.page.evaluate("map.panBy([-150, 60], { animate: false })")  # from under the swipe's handle
        self.wait()
        self.page.mouse.click(*self.where(row, col))
        self.page.wait_for_selector("#answer")
        return str(self.page.inner_text("#answer"))

    def done(self) -> None:
        assert self.odd == []
        self.page.close()


def lonlat(row: float, col: float) -> tuple[float, float]:
    (lon,), (lat,) = rasterio.warp.transform(UTM, "EPSG:4326", *([v] for v in GRID @ (col + 0.5, row + 0.5)))
    return lon, lat


@pytest.fixture
def look(browser: Any) -> Iterator[Callable[[str], Page]]:
    opened: list[Page] = []

    def go(url: str) -> Page:
        opened.append(Page(browser, url))
        return opened[-1]

    yield go
    for page in opened:
        page.done()


@pytest.fixture(scope="module")
def exported(maps: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The same two maps as plain files behind Python's own server."""
    folder = tmp_path_factory.mktemp("web") / "page"
    found = export(open_view([str(maps / "first.tif"), str(maps / "second.tif")], None), folder, [maps])
    files = [file for file in folder.rglob("*") if file.is_file()]
    assert found["bytes"] == sum(file.stat().st_size for file in files)
    assert found["tiles"] == sum(file.suffix in (".png", ".webp") for file in files)
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=str(folder))
    handler.log_message = lambda *_: None  # type: ignore[attr-defined]
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}/"
        server.shutdown()


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["address", "exported"])
def test_a_click_tells_the_rasters_own_value(
    kind: str, request: pytest.FixtureRequest, look: Callable[[str], Page]
) -> None:
    page, heights = look(request.getfixturevalue(kind)), heights_m()
    for row, col in PIXELS:
        text = page.click(row, col).splitlines()
        value = float(heights[row, col])
        assert text[0] == "first.tif"
        assert abs(float(text[1].removesuffix(" m")) - value) <= 0.0051
        second = text[text.index("second.tif") + 1]
        assert abs(float(second.removesuffix(" m")) - (value + 10)) <= 0.0051
        if kind == "address":
            low, high = (float(part) for part in text[2].split(" m (")[0].split(" to "))
            assert abs(low - (value - 1.25)) <= 0.0051 and abs(high - (value + 2.5)) <= 0.0051
            assert text[2].endswith("(90 % interval)")
            assert text[3:5] == ["image of 2024-07-15", "flags: shadow, exposure"]
    assert page.click(55, 70).splitlines()[1] == "no height here"


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["address", "exported"])
def test_swipe_and_colours(kind: str, request: pytest.FixtureRequest, look: Callable[[str], Page]) -> None:
    from matplotlib import colormaps

    page = look(request.getfixturevalue(kind))
    page.page.evaluate("byId('opacity').value = 100; byId('opacity').oninput()")
    row, col = 200, 300
    lon, lat = lonlat(row, col)
    page.page.evaluate(f"map.setView([{lat}, {lon}], 20, {{ animate: false }})")
    page.wait()
    height = float(heights_m()[row, col])
    first, second = (np.array(colormaps["viridis"](min(h / 40, 1))[:3]) * 255 for h in (height, height + 10))
    handle = page.page.locator("#handle").bounding_box()
    middle = handle["x"] + 20, handle["y"] + 20

    def drag_to(x: float) -> None:
        page.page.mouse.move(*middle)
        page.page.mouse.down()
        page.page.mouse.move(x, middle[1], steps=4)
        page.page.mouse.up()

    drag_to(900)  # the point is left of it: the first map
    assert abs(page.colour(row, col) - first).max() < 8
    middle = 900, middle[1]
    drag_to(60)
    assert abs(page.colour(row, col) - second).max() < 8
    page.page.select_option("#view", label="Swipe: first.tif | image")
    page.wait()
    assert abs(page.colour(row, col) - np.array([200, 30, 30])).max() < 20  # the image, which is red
    page.page.select_option("#view", label="first.tif")
    page.wait()
    assert abs(page.colour(row, col) - first).max() < 8
    page.page.evaluate("byId('high').value = 80; byId('high').oninput()")
    wider = np.array(colormaps["viridis"](height / 80)[:3]) * 255
    assert abs(page.colour(row, col) - wider).max() < 8


@pytest.mark.slow
def test_a_polygon_has_the_numbers_of_canopy_stats(
    address: str, look: Callable[[str], Page], maps: Path
) -> None:
    page = look(address)
    page.page.click("#zone")
    for row, col in ((30, 40), (60, 300), (250, 320), (200, 30)):
        page.page.mouse.click(*page.where(row, col))
        page.page.wait_for_timeout(400)  # slower than a double click
    ring = page.page.evaluate("corners.map((at) => [at.lng, at.lat])")
    page.page.keyboard.press("Enter")
    page.page.wait_for_selector("#result table")
    rows = [line.split("\t") for line in page.page.inner_text("#result tbody").splitlines()]
    shown = {name.strip(): values for name, *values in rows}
    zones = geopandas.GeoDataFrame(geometry=[shapely.Polygon(ring)], crs="EPSG:4326")
    for column, name in enumerate(("first.tif", "second.tif")):
        (wanted,) = canopy.stats(str(maps / name), zones=zones).to_dict("records")
        for label, key, unit, scale, digits in (
            ("area", "area_ha", " ha", 1, 3), ("with heights", "valid_share", " %", 100, 1),
            ("mean height", "mean_m", " m", 1, 2), ("50th percentile", "p50_m", " m", 1, 2),
            ("95th percentile", "p95_m", " m", 1, 2), ("highest", "max_m", " m", 1, 2),
            ("cover above 5 m", "cover_5m", " %", 100, 1),
        ):  # fmt: skip
            assert shown[label][column] == f"{scale * wanted[key]:.{digits}f}{unit}", (name, label)
        assert shown["pixels"][column] == f"{wanted['n']:,}"


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["address", "exported"])
def test_a_profile_follows_the_line(
    kind: str, request: pytest.FixtureRequest, look: Callable[[str], Page]
) -> None:
    page, heights = look(request.getfixturevalue(kind)), heights_m()
    if kind == "address":
        got = page.page.evaluate(f"ask('profile', {[[*lonlat(100, 20)], [*lonlat(100, 340)]]})")
    else:
        corners = [[*reversed(lonlat(100, col))] for col in (20, 340)]
        got = page.page.evaluate(
            f"(async () => {{ corners = {corners}.map((at) => L.latLng(at)); return profileFromTiles(); }})()"
        )
    assert got["m"][0] == 0 and got["m"][-1] == pytest.approx(
        160, rel=5e-3
    )  # on a sphere, where no server is asked
    cols = 20 + np.array(got["m"]) / got["m"][-1] * 320
    for number, more in enumerate((0, 10)):
        wanted = heights[100, np.rint(cols).astype(int)] + more
        assert np.abs(np.array(got["heights_m"][number]) - wanted).max() < 0.6  # a pixel aside at most
    page.page.click("#line")
    for row, col in ((100, 20), (150, 200)):
        page.page.mouse.click(*page.where(row, col))
        page.page.wait_for_timeout(400)
    page.page.keyboard.press("Enter")
    page.page.wait_for_selector("#result svg path")
    assert page.page.locator("#result svg path").count() == 2


@pytest.mark.slow
def test_names_of_files_are_text(address: str, look: Callable[[str], Page]) -> None:
    page = look(address)
    assert "<i>m</i> (imagery: (c) A & B)" in page.page.inner_text(".leaflet-control-attribution")
    assert page.page.locator("#panel i, .leaflet-control-attribution i").count() == 0


def test_the_finest_zooms_go_where_a_page_would_be_too_large(maps: Path, tmp_path: Path) -> None:
    found = export(open_view([str(maps / "first.tif")], None), tmp_path / "page", most_tiles=6)
    assert found["tiles"] <= 6 and "means over" in found["notes"][0]
    tile = next((tmp_path / "page" / "heights" / "0").rglob("*.png"))
    r, g, b, a = np.moveaxis(np.array(Image.open(tile)).astype(float), -1, 0)
    known = (r * 256 + g + b / 256 - 32768)[a == 255]
    assert known.min() >= 0 and known.max() <= 20
    with pytest.raises(canopy.CanopyError, match="not empty"):
        export(open_view([str(maps / "first.tif")], None), tmp_path / "page", most_tiles=6)
    (tmp_path / "letters").mkdir()
    (tmp_path / "letters" / "dear.txt").write_text("keep me")
    with pytest.raises(canopy.CanopyError, match="other than an exported page"):
        export(open_view([str(maps / "first.tif")], None), tmp_path / "letters", overwrite=True)
    assert (tmp_path / "letters" / "dear.txt").read_text() == "keep me"
