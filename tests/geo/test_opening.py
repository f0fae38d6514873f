"""Names, drivers, VRTs, absurd sizes, how GDAL speaks HTTP."""

from __future__ import annotations

import struct
import threading

import numpy as np
import pytest
import rasterio
import rasterio.env
import rasterio.shutil
from affine import Affine

from canopy.errors import ImageryError
from canopy.files import public_name
from canopy.geo.place import SourcePlace
from canopy.geo.reading import open_raster, read_window

NORTH_UP = Affine(1, 0, 500_000, 0, -1, 4_000_000)
IMAGE = np.full((1, 20, 20), 5, dtype="uint8")


def _vrt(source: str, relative: int = 1, extra: str = "") -> str:
    return f"""<VRTDataset rasterXSize="20" rasterYSize="20"><SRS>EPSG:32610</SRS>
      <GeoTransform>500000, 1, 0, 4000000, 0, -1</GeoTransform>{extra}
      <VRTRasterBand dataType="Byte" band="1"><SimpleSource>
      <SourceFilename relativeToVRT="{relative}">{source}</SourceFilename><SourceBand>1</SourceBand>
      </SimpleSource></VRTRasterBand></VRTDataset>"""


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("/vsizip/a.zip/b.tif", "virtual path"),
        ("/vsicurl/http://host/a.tif", "virtual path"),
        ("<VRTDataset/>", "inline XML"),
        ("GTIFF_DIR:1:a.tif", "GTIFF_DIR"),
        ("NETCDF:a.nc:x", "NETCDF"),
        ("vrt://a.tif", "vrt"),
        ("s3://bucket/a.tif", "s3"),
        ("", "empty"),
        ("nowhere.tif", "no such file"),
        (".", "folder"),
        ("http://", "URL"),
    ],
)
def test_names_that_are_not_opened(name, message):
    with pytest.raises(ImageryError, match=message):
        open_raster(name)


def test_plain_formats_open(make_tif, tmp_path):
    assert open_raster(make_tif(IMAGE, NORTH_UP)).read().max() == 5
    for driver, name in (("PNG", "a.png"), ("JPEG", "a.jpg"), ("JP2OpenJPEG", "a.jp2")):
        rasterio.shutil.copy(
            make_tif(IMAGE, NORTH_UP, name="b.tif"), tmp_path / name, driver=driver, WORLDFILE="YES"
        )
        with open_raster(tmp_path / name) as ds:
            assert ds.driver == driver and ds.shape == (20, 20)


def test_rubbish_and_foreign_drivers_are_refused(tmp_path):
    path = tmp_path / "x.tif"
    path.write_bytes(b"hello world" * 30)
    with pytest.raises(ImageryError, match=r"x\.tif: not a readable raster"):
        open_raster(path)
    path = tmp_path / "x.asc"
    path.write_text("ncols 2\nnrows 2\nxllcorner 0\nyllcorner 0\ncellsize 1\n1 2\n3 4\n")
    with pytest.raises(ImageryError):
        open_raster(path)


def test_a_vrt_in_a_tif_is_refused_and_one_beside_its_files_opens(make_tif, tmp_path):
    make_tif(IMAGE, NORTH_UP, name="a.tif")
    good, hidden = tmp_path / "good.vrt", tmp_path / "hidden.tif"
    for path in (good, hidden):
        path.write_text(_vrt("a.tif"))
    assert open_raster(good).read(1).max() == 5
    with pytest.raises(ImageryError, match="not a readable raster"):
        open_raster(hidden)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (_vrt("none.tif"), "not there"),
        (_vrt("/nowhere/a.tif", 0), "not there"),
        (_vrt("/vsizip/x.zip/a.tif", 0), "virtual path"),
        (_vrt("GTIFF_DIR:1:a.tif", 0), "GTIFF_DIR"),
        (_vrt("&lt;VRTDataset/&gt;", 0), "inline XML"),
        (_vrt("a.tif").replace("<VRTRasterBand ", '<VRTRasterBand subClass="VRTRawRasterBand" '), ""),
        ("<VRTDataset>", "readable VRT"),
        ("<Other/>", "readable"),
    ],
)
def test_vrts_with_sources_that_are_no_files(make_tif, tmp_path, text, message):
    make_tif(IMAGE, NORTH_UP, name="a.tif")
    path = tmp_path / "some.vrt"
    path.write_text(text)
    with pytest.raises(ImageryError, match=rf"some\.vrt.*{message}"):
        open_raster(path)


def test_a_vrt_of_itself_and_one_with_code_give_no_pixels(make_tif, tmp_path):
    make_tif(IMAGE, NORTH_UP, name="a.tif")
    path = tmp_path / "loop.vrt"
    code = _vrt("a.tif").replace("<VRTRasterBand ", '<VRTRasterBand subClass="VRTDerivedRasterBand" ')
    code = code.replace(
        "<SimpleSource>",
        "<PixelFunctionType>f</PixelFunctionType><PixelFunctionLanguage>Python</PixelFunctionLanguage>"
        "<PixelFunctionCode>def f(*a, **k): open('touched', 'w')</PixelFunctionCode><SimpleSource>",
    )
    for text in (_vrt("loop.vrt"), code):
        path.write_text(text)
        with pytest.raises(ImageryError, match=r"loop\.vrt"), open_raster(path) as ds:
            read_window(ds, SourcePlace.of(ds).grid(), [1])


def test_no_georeferencing_is_said(tmp_path):
    path = tmp_path / "photo.png"
    profile = {"driver": "PNG", "height": 4, "width": 4, "count": 1, "dtype": "uint8"}
    with pytest.warns(rasterio.errors.NotGeoreferencedWarning), rasterio.open(path, "w", **profile) as ds:
        ds.write(np.ones((1, 4, 4), dtype="uint8"))
    with pytest.raises(ImageryError, match="no georeferencing"):
        open_raster(path)
    assert open_raster(path, georeferenced=False).shape == (4, 4)


def _forged_tiff(width: int, height: int, block: int) -> bytes:
    """A tiled BigTIFF header that declares a size and has no blocks at all."""
    count = -(-width // block) * -(-height // block)
    entries = [
        (256, 4, 1, width),
        (257, 4, 1, height),
        (258, 3, 1, 8),
        (259, 3, 1, 1),
        (262, 3, 1, 1),
        (277, 3, 1, 1),
        (322, 4, 1, block),
        (323, 4, 1, block),
        (324, 16, count, 16),
        (325, 16, count, 16),
    ]
    body = b"".join(struct.pack("<HHQQ", *entry) for entry in entries)
    return struct.pack("<2sHHHQQ", b"II", 43, 8, 0, 16, len(entries)) + body + bytes(100_000)


@pytest.mark.parametrize(("side", "block"), [(2_000_000, 512)])
def test_absurd_declared_sizes(tmp_path, side, block):
    path = tmp_path / "bomb.tif"
    path.write_bytes(_forged_tiff(side, side, block))
    with pytest.raises(ImageryError, match=r"bomb\.tif"):
        open_raster(path, georeferenced=False)


def test_places_of_every_orientation(make_tif):
    with open_raster(make_tif(IMAGE, NORTH_UP)) as ds:
        place = SourcePlace.of(ds)
        assert place.is_north_up and place.grid().shape == (20, 20)
    with open_raster(make_tif(IMAGE, NORTH_UP @ Affine.rotation(5))) as ds:
        assert not SourcePlace.of(ds).is_north_up


def test_messages_do_not_show_signatures():
    assert public_name("/vsicurl/https://h/a.tif?sig=secret") == "https://h/a.tif"


def test_remote_files_are_read_by_range(make_tif, tmp_path):
    import functools
    import http.server

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_):
            pass

    make_tif(IMAGE, NORTH_UP, name="a.tif")
    server = http.server.ThreadingHTTPServer(
        ("127.0.0.1", 0), functools.partial(Quiet, directory=str(tmp_path))
    )
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        base = f"http://127.0.0.1:{server.server_port}"
        with open_raster(f"{base}/a.tif?token=x") as ds:
            assert ds.shape == (20, 20)
        with pytest.raises(ImageryError, match="remote VRT"):
            open_raster(f"{base}/a.vrt")
        with pytest.raises(ImageryError, match="not a readable raster"):
            open_raster(f"{base}/none.tif")
    finally:
        server.shutdown()
        server.server_close()
