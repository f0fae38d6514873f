"""Web tiles from a local server: rows 35 and 36 of the fault table."""

from __future__ import annotations

import hashlib
import json
import math

import numpy as np
import pytest
from rasterio.io import MemoryFile

from canopy.errors import FetchError, ImageryError, InputError
from canopy.geo.area import AOI
from canopy.geo.grid import Grid, quadkey_at
from canopy.imagery.base import ReadOptions
from canopy.imagery.open import open_imagery, open_pinned
from canopy.imagery.xyz import TileService, TileSource, decode_tile, open_tiles

LAT, LON = 44.083, -71.296
ZOOM = 17


def picture(values: np.ndarray, driver: str = "PNG", colormap: dict | None = None) -> bytes:
    """values (bands, h, w) as a picture that GDAL encodes."""
    count, height, width = values.shape
    with MemoryFile() as memory:
        settings = {"driver": driver, "width": width, "height": height, "count": count}
        with memory.open(**settings, dtype=values.dtype.name) as dataset:
            dataset.write(values)
            if colormap:
                dataset.write_colormap(1, colormap)
        return memory.read()


def world(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """A picture of the whole world: RGB (3, h, w) uint8 from global pixel numbers."""
    return np.stack([x % 251, y % 241, (x // 7 + y // 5) % 239]).astype(np.uint8)


def tile_at(x: int, y: int, px: int = 256) -> np.ndarray:
    col, row = np.meshgrid(np.arange(x * px, (x + 1) * px), np.arange(y * px, (y + 1) * px))
    return world(col, row)


def tile_number(lat: float, lon: float, zoom: int) -> tuple[int, int]:
    """The usual formula of slippy maps."""
    count = 2**zoom
    x = int((lon + 180) / 360 * count)
    y = int((1 - math.asinh(math.tan(math.radians(lat))) / math.pi) / 2 * count)
    return x, y


@pytest.fixture
def tiles(server):
    """A server that has the 5 x 5 tiles round the place, as XYZ, TMS and quadkeys."""
    cx, cy = tile_number(LAT, LON, ZOOM)
    for x in range(cx - 2, cx + 3):
        for y in range(cy - 2, cy + 3):
            body = picture(tile_at(x, y))
            server.put(f"/xyz/{ZOOM}/{x}/{y}.png", body, "image/png")
            server.put(f"/tms/{ZOOM}/{x}/{2**ZOOM - 1 - y}.png", body, "image/png")
            server.put(f"/qk/{quadkey_at(y, x, ZOOM)}.png", body, "image/png")
    return server


def area() -> AOI:
    return AOI.from_bbox([LAT, LON], size_m=300)


def lattice_window(source: TileSource, height: int = 300, width: int = 280) -> Grid:
    """A window of the tile lattice round the place, across tile borders."""
    x, y = area().to_crs("EPSG:3857").geometry.centroid.coords[0]
    row, col = source.lattice.rowcol(x, y)
    return source.lattice.window(int(row) - height // 2, int(col) - width // 2, height, width)


def expected(source: TileSource, grid: Grid) -> np.ndarray:
    row, col = source.lattice.offset_of(grid)
    return world(*np.meshgrid(np.arange(col, col + grid.width), np.arange(row, row + grid.height)))


@pytest.mark.parametrize(
    "template",
    ["/xyz/{z}/{x}/{y}.png", "/xyz/{z:02}/{x}/{y}.png", "/tms/{z}/{x}/{-y}.png", "/qk/{q}.png"],
)
def test_templates_of_all_kinds_give_the_same_exact_pixels(tiles, template):
    source = open_imagery(tiles.url + template, area=area())
    assert source.zoom == ZOOM  # 1.19 m x cos(44) = 0.86 m, within 20 % of 0.8
    grid = lattice_window(source)
    image = source.read(grid)
    assert image.valid.all() and (image.date == 0).all()
    np.testing.assert_allclose(image.rgb * 255, expected(source, grid), atol=1e-4)


WMS = (
    "/wms?SERVICE=WMS&VERSION=1.3.0&REQUEST=GetMap&LAYERS=ortho&STYLES=&CRS={crs}&BBOX={bbox}"
    "&WIDTH={width}&HEIGHT={height}&FORMAT=image/png&TRANSPARENT=TRUE"
)
IMAGE_SERVER = (
    "/arcgis/rest/services/NAIP/ImageServer/exportImage?bbox={bbox}&bboxSR=3857&imageSR=3857"
    "&size={width},{height}&format=png32&f=image"
)


@pytest.fixture
def drawing(server):
    """A WMS and an ImageServer that draw `world` for any box; gives what was asked."""
    asked: list[tuple[float, ...]] = []

    def draw(path, query, body):
        low = {key.lower(): values[0] for key, values in query.items()}
        box = tuple(float(v) for v in low["bbox"].split(","))
        width, height = map(int, low["size"].split(",") if "size" in low else (low["width"], low["height"]))
        assert low.get("crs", "EPSG:3857") == "EPSG:3857" and low.get("bboxsr", "3857") == "3857"
        asked.append((*box, width, height))
        pixel = (box[2] - box[0]) / width
        assert pixel == pytest.approx((box[3] - box[1]) / height)
        cols = (box[0] + 20037508.342789244) / pixel + np.arange(width)
        rows = (20037508.342789244 - box[3]) / pixel + np.arange(height)
        values = world(*np.meshgrid(cols.round().astype(int), rows.round().astype(int)))
        return 200, {"Content-Type": "image/png"}, picture(values)

    server.routes |= {"/wms": draw, IMAGE_SERVER.partition("?")[0]: draw}
    return server, asked


@pytest.mark.parametrize("template", [WMS, IMAGE_SERVER])
def test_a_box_template_reads_the_same_pixels_whatever_window_is_read(drawing, template):
    server, asked = drawing
    source = open_imagery(server.url + template, area=area(), gsd_m=0.5)
    assert 0.25 <= source.native_gsd_m <= 0.6
    grid = lattice_window(source)
    image = source.read(grid)
    assert image.valid.all()
    np.testing.assert_allclose(image.rgb * 255, expected(source, grid), atol=1e-4)
    part = open_imagery(server.url + template, area=AOI.from_bbox([LAT, LON], size_m=40), gsd_m=0.5)
    inner = part.read(grid.window(37, 41, 90, 80))
    np.testing.assert_array_equal(inner.rgb, image.rgb[:, 37:127, 41:121])
    sides = {(box[2] - box[0], *box[4:]) for box in asked}
    assert len(sides) == 1 and sides.pop()[1:] == (1024, 1024)  # requests of one lattice
    again = open_pinned(json.loads(json.dumps(source.pinned())))
    np.testing.assert_array_equal(again.read(grid).rgb, image.rgb)


@pytest.mark.parametrize(
    ("body", "kind", "said"),
    [
        (
            '<?xml version="1.0"?><ServiceExceptionReport><ServiceException code="LayerNotDefined">\n'
            "Could not find layer ortho</ServiceException></ServiceExceptionReport>",
            "application/vnd.ogc.se_xml",
            "Could not find layer ortho",
        ),
        ('{"error":{"code":400,"message":"Invalid bbox","details":[]}}', "application/json", "Invalid bbox"),
    ],
)
def test_an_error_sent_with_status_200_is_told_in_one_line(server, body, kind, said):
    server.routes["/wms"] = lambda *_: (200, {"Content-Type": kind}, body.encode())
    source = open_imagery(server.url + WMS + "&key=secret", area=area())
    with pytest.raises(FetchError, match=rf"sent an error in place of a picture: .*{said}") as caught:
        source.read(lattice_window(source))
    assert "\n" not in str(caught.value) and "secret" not in str(caught.value)


def test_the_bare_address_of_a_wms_is_answered_with_what_to_give(server):
    server.put("/wms", "<?xml version='1.0'?><WMS_Capabilities/>", "text/xml")
    with pytest.raises(
        ImageryError, match=r"/wms: not readable as JSON.*WMS or ImageServer is given as a temp"
    ):
        open_imagery(server.url + "/wms", area=area())


@pytest.fixture(autouse=True)
def coarse_enough(monkeypatch):
    """The test tiles exist at one zoom; make it the one that is chosen."""
    monkeypatch.setattr("canopy.imagery.xyz.DEFAULT_GSD_M", 0.8)


def test_a_missing_tile_is_an_error_unless_declared(tiles):
    template = tiles.url + "/xyz/{z}/{x}/{y}.png"
    source = open_imagery(template, area=area())
    grid = lattice_window(source, 256, 256 * 7)  # two tiles farther than there are
    with pytest.raises(FetchError, match=r"127\.0\.0\.1:\d+ has no such file"):
        source.read(grid)
    service = TileService(template=template, name="local", absent_statuses=(404,))
    declared = open_tiles(service, ReadOptions(), area())
    image = declared.read(grid)
    assert 0.5 < image.valid.mean() < 1 and image.valid[:, 256 * 3].all() and not image.valid[:, 0].any()


def test_tiles_that_are_no_image_are_nodata(tiles):
    """A placeholder with a known digest, a blank picture, an empty answer: each a hole of one tile."""
    x, y = tile_number(LAT, LON, ZOOM)
    template, path = tiles.url + "/xyz/{z}/{x}/{y}.png", f"/xyz/{ZOOM}/{x}/{y}.png"
    sign = np.full((3, 256, 256), 220, np.uint8)
    sign[:, 100:120, 60:200] = 90
    digest = hashlib.sha256(picture(sign)).hexdigest()
    for answer, digests, hole in (
        (picture(sign), (), False), (picture(sign), (digest,), True), (b"", (), True),
        (picture(np.full((3, 256, 256), 255, np.uint8)), (), True),
        (picture(np.broadcast_to(np.uint8([[[40]], [[90]], [[160]]]), (3, 256, 256))), (), True),
    ):  # fmt: skip
        tiles.put(path, answer, "image/png")
        service = TileService(template=template, name="local", placeholder_sha256=digests)
        source = open_tiles(service, ReadOptions(), area())
        valid = source.read(source.lattice.window(y * 256 - 10, x * 256 - 10, 276, 276)).valid
        assert valid[10:266, 10:266].any() != hole and valid.sum() == 276**2 - 256**2 * hole
    assert any("tiles of one colour" in note for note in source.notes)
    tiles.routes[path] = lambda *_: (204, {}, b"")
    source = open_imagery(template, area=area())
    assert not source.read(source.lattice.window(y * 256, x * 256, 256, 256)).valid.any()


def test_grey_tiles_get_the_note_of_grey_files_once_and_no_library_speaks(tiles, caplog, recwarn):
    source = open_imagery(tiles.url + "/xyz/{z}/{x}/{y}.png", area=area())
    source.read(lattice_window(source))
    assert not any("grey" in note for note in source.notes)
    fetched = len(tiles.log)
    source.read(lattice_window(source, 200, 200).pad(20))  # of tiles that are kept
    assert len(tiles.log) == fetched
    x, y = tile_number(LAT, LON, ZOOM)
    for dx in range(-2, 3):
        for dy in range(-2, 3):
            grey = np.repeat(tile_at(x + dx, y + dy)[:1], 3, axis=0)
            tiles.put(f"/xyz/{ZOOM}/{x + dx}/{y + dy}.png", picture(grey), "image/png")
    source = open_imagery(tiles.url + "/xyz/{z}/{x}/{y}.png", area=area())
    for _ in range(2):
        source.read(lattice_window(source))
    assert sum("grey" in note for note in source.notes) == 1 and caplog.text.count("grey") == 1
    assert not [w for w in recwarn if "canopy/imagery" in w.filename or "DatasetReader" in str(w.source)]


def test_pinned_tiles_keep_their_zoom(tiles):
    source = open_imagery(tiles.url + "/xyz/{z}/{x}/{y}.png", area=area(), nodata=3)
    again = open_pinned(json.loads(json.dumps(source.pinned())))
    grid = lattice_window(source)
    assert again.zoom == source.zoom and again.lattice == source.lattice
    np.testing.assert_array_equal(again.read(grid).rgb, source.read(grid).rgb)
    named = open_imagery("swissimage", area=AOI.from_bbox("46.9,7.4"))
    assert open_pinned(json.loads(json.dumps(named.pinned()))).area() == named.area()


def test_a_tile_that_is_a_web_page_or_junk_names_host_and_tile(tiles):
    x, y = tile_number(LAT, LON, ZOOM)
    for body, kind, words in (
        ("<html>portal</html>", "text/html", "sent a web page"),
        ("junk", "image/png", "no picture"),
        (picture(np.zeros((3, 512, 512), np.uint8) + 9), "image/png", "512 x 512"),
        (picture(np.zeros((1, 256, 256), np.uint16)), "image/png", "256 x 256 pixels of kind I"),
    ):
        tiles.put(f"/xyz/{ZOOM}/{x}/{y}.png", body, kind)
        source = open_imagery(tiles.url + "/xyz/{z}/{x}/{y}.png?key=secret", area=area())
        with pytest.raises(FetchError, match=rf"127\.0\.0\.1:\d+ {words}|{words}") as caught:
            source.read(lattice_window(source))
        assert "secret" not in str(caught.value) and "secret" not in source.name


@pytest.mark.parametrize(
    "template",
    ["https://h/{z}/{x}.png", "https://h/{q}/{s}.png", "tiles/{z}/{x}/{y}.png", "https://h/?BBOX={bbox}"],
)
def test_incomplete_templates_are_refused(template):
    with pytest.raises(InputError, match="template"):
        open_imagery(template)


@pytest.mark.parametrize("source", ["https://h.example/{z}/{x}/{y}.png", "swissimage", "demo"])
@pytest.mark.parametrize(
    ("option", "named"),
    [
        ({"bands": "3,2,1"}, "--bands"), ({"scale": 3.0}, "--scale"), ({"crs": "EPSG:2056"}, "--input-crs"),
        ({"datetime": "2021"}, "--datetime"),
    ],
)  # fmt: skip
def test_options_that_make_no_sense_for_tiles_and_the_demo_are_refused(source, option, named):
    area = AOI.from_bbox("46.9,7.4")
    with pytest.raises(InputError, match=f"RGB.*Leave {named} out"):
        open_imagery(source, area=area, **option)
    assert open_imagery(source, area=area, fallback_crs="EPSG:2056").native_crs.epsg != 2056


def test_an_area_across_the_antimeridian_is_one_piece(server):
    lat, zoom = -17.0, 18
    _, cy = tile_number(lat, 179.9999, zoom)
    last = 2**zoom - 1
    for x in (last - 1, last, 0, 1):
        for y in range(cy - 2, cy + 3):
            server.put(f"/{zoom}/{x}/{y}.png", picture(tile_at(x, y)), "image/png")
    area = AOI.from_bbox([lat, 180.0], size_m=200)
    source = open_imagery(server.url + "/{z}/{x}/{y}.png", area=area)
    assert source.zoom == zoom
    grid = area.grid("EPSG:32701", 1.0)
    image = source.read(grid)
    assert image.valid.all()
    asked = {int(path.split("/")[2]) for _, path, _ in server.log}
    assert asked & {last, last - 1} and asked & {0, 1}


# ---- decoding --------------------------------------------------------------------------------
def test_pictures_of_every_kind_decode():
    rgb = tile_at(3, 4)
    alpha = np.zeros((1, 256, 256), np.uint8)
    alpha[0, :, 100:] = 255
    index = (rgb[:1] % 3).astype(np.uint8)
    table = {0: (1, 2, 3, 255), 1: (40, 50, 60, 255), 2: (200, 100, 0, 0)}
    colours = np.array([table[i][:3] for i in range(3)])[index[0]].transpose(2, 0, 1)
    for body, shown, seen in (
        (picture(np.concatenate([rgb, alpha])), rgb, alpha[0] > 0),
        (picture(index, colormap=table), colours, index[0] != 2),
        (picture(rgb[:1]), np.repeat(rgb[:1], 3, axis=0), alpha[0] >= 0),
        (picture(rgb, "WEBP"), None, alpha[0] >= 0), (picture(rgb, "JPEG"), None, alpha[0] >= 0),
    ):  # fmt: skip
        got, valid = decode_tile(body, 256, "tile", "http://h/")
        np.testing.assert_array_equal(valid, seen)
        if shown is not None:
            np.testing.assert_array_equal(got[:, valid], shown[:, valid])
