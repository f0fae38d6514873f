"""The server of `canopy serve`: what it answers, what it refuses, and how the command begins and ends."""

from __future__ import annotations

import io
import os
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import httpx
import numpy as np
import pytest
import rasterio
from PIL import Image
from rasterio.windows import Window
from viewer_maps import GRID, SHAPE, UTM, heights_m, start_serving

from canopy.viewer.layers import HeightLayer
from canopy.viewer.page import open_view
from canopy.viewer.tiles import tile_at, tiles_in


def test_only_this_computer_is_answered_and_nothing_but_the_page_is_given(address: str) -> None:
    page = httpx.get(address)
    assert page.status_code == 200 and "default-src 'self'" in page.headers["content-security-policy"]
    assert httpx.get(address, headers={"Host": "elsewhere.example"}).status_code == 400
    for path in (
        "heights/2/16/0/0.png", "heights/0/30/0/0.png", "heights/0/3/8/0.png", "heights/0/3/-1/0.png",
        "..%2f..%2fetc/passwd", "%2e%2e/app.py", "static/", "heights/", "first.tif", "image/3/9/0.webp",
    ):  # fmt: skip
        assert httpx.get(address + path).status_code == 404, path
    for body in ("", "{}", "[]", '[["a", 1]]', "[[200, 0]]", "[[NaN, 0]]", "[[1e400, 0]]", "[[0, 0, 0]]"):
        answer = httpx.post(f"{address}point", content=body)
        assert answer.status_code == 400 and "\n" not in answer.json()["error"], body
    assert httpx.post(f"{address}zone", json=[[0, 0], [1, 1]]).status_code == 400
    assert httpx.post(f"{address}zone", json=[[-71, 44], [-70, 44], [-70, 45]]).status_code == 400
    assert httpx.post(f"{address}point", content=b"[" * 2_000_000).status_code == 413
    with socket.create_connection(("127.0.0.1", int(address.split(":")[2].strip("/")))):
        pass


def test_tiles_hold_the_rasters_heights(address: str, maps: Path) -> None:
    config = httpx.get(f"{address}config.json").json()
    about = config["layers"][0]
    lon, lat = (sum(about["bounds"][i::2]) / 2 for i in (0, 1))
    x, y = tile_at(lon, lat, about["max_zoom"])
    answer = httpx.get(f"{address}heights/0/{about['max_zoom']}/{x}/{y}.png")
    rgba = np.array(Image.open(io.BytesIO(answer.content))).astype(float)
    got = rgba[..., 0] * 256 + rgba[..., 1] + rgba[..., 2] / 256 - 32768
    side = 2 * np.pi * 6378137 / 2 ** about["max_zoom"]
    cols, rows = np.meshgrid(np.arange(256) + 0.5, np.arange(256) + 0.5)
    at = (x + cols / 256) * side - np.pi * 6378137, np.pi * 6378137 - (y + rows / 256) * side
    east, north = rasterio.warp.transform("EPSG:3857", UTM, at[0].ravel(), at[1].ravel())
    col, row = (np.floor(v).astype(int).reshape(256, 256) for v in ~GRID @ (np.array(east), np.array(north)))
    inside = (row >= 0) & (row < SHAPE[0]) & (col >= 0) & (col < SHAPE[1])
    wanted = np.where(inside, heights_m()[row.clip(0, SHAPE[0] - 1), col.clip(0, SHAPE[1] - 1)], np.nan)
    known = np.isfinite(wanted) & (rgba[..., 3] == 255)
    assert known.sum() > 10_000 and ((rgba[..., 3] == 255) == np.isfinite(wanted)).mean() > 0.995
    off = np.abs(got - wanted)[known]
    # Where a tile's pixel lies within a hair of an edge, the neighbour is as right.
    assert np.quantile(off, 0.99) < 0.008 and off.max() < 0.8


def test_many_files_are_one_map_at_every_zoom(tmp_path: Path, maps: Path) -> None:
    """A run of 45 tiles: coarse tiles are put together from finer ones, and nothing is lost between."""
    (tmp_path / "tiles").mkdir()
    with rasterio.open(maps / "second.tif") as file:
        for number, (row, col) in enumerate((r, c) for r in range(0, 300, 60) for c in range(0, 360, 40)):
            window = Window(col, row, 40, 60)
            profile = file.profile | {"width": 40, "height": 60, "transform": file.window_transform(window)}
            del profile["tiled"], profile["blockxsize"], profile["blockysize"]
            with rasterio.open(tmp_path / "tiles" / f"{number:02}.tif", "w", **profile) as tile:
                tile.write(file.read(window=window))
    run, whole = HeightLayer(str(tmp_path)), HeightLayer(str(maps / "second.tif"))
    assert len(run.heights.tiles) == 45
    for zoom in range(whole.pyramid.deepest - 4, whole.pyramid.deepest + 1):
        sums = []
        for layer in (run, whole):
            tiles = [layer.pyramid.tile(zoom, x, y) for x, y in tiles_in(whole.pyramid.bounds, zoom)]
            known = [(values[0][valid].sum(), valid.sum()) for values, valid in filter(None, tiles)]
            sums.append(np.sum(known, axis=0))
        assert sums[0][1] == pytest.approx(sums[1][1], rel=0.12)  # of a coarse tile the edge is much
        assert sums[0][0] / sums[0][1] == pytest.approx(sums[1][0] / sums[1][1], rel=0.03)
    lon, lat = (sum(whole.pyramid.bounds[i::2]) / 2 for i in (0, 1))
    assert run.point(lon, lat)["height_m"] == whole.point(lon, lat)["height_m"]


def test_maps_of_one_name_are_told_apart(maps: Path, tmp_path: Path) -> None:
    (tmp_path / "later").mkdir()
    again = shutil.copy(maps / "second.tif", tmp_path / "later" / "first.tif")
    config = open_view([str(maps / "first.tif"), str(again)], None).config()
    assert [layer["name"] for layer in config["layers"]] == [f"{maps.name}/first.tif", "later/first.tif"]
    assert config["image"]["name"] == "rgb.tif" and config["base"] is None


def test_ctrl_c_ends_it_with_a_line(maps: Path) -> None:
    pytest.importorskip("uvicorn")
    process, url = start_serving(str(maps / "first.tif"))
    assert httpx.get(url).status_code == 200
    taken = url.split(":")[2].strip("/")
    again = _serve(str(maps / "first.tif"), "--port", taken)
    assert again.returncode == 2 and "leave --port out" in again.stderr.lower()
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=30)
    assert process.returncode == 0 and out == "" and err.splitlines() == ["stopped"]


@pytest.mark.parametrize("what", ["image", "no crs", "nothing", "three", "far"])
def test_what_cannot_be_shown_is_a_line(what: str, maps: Path, tmp_path: Path) -> None:
    first = str(maps / "first.tif")
    if what == "no crs":
        with rasterio.open(
            tmp_path / "a.tif",
            "w",
            driver="GTiff",
            count=1,
            height=9,
            width=9,
            dtype="float32",
            transform=GRID,
        ) as file:
            file.write(np.zeros((1, 9, 9), np.float32))
    if what == "far":
        with rasterio.open(
            tmp_path / "far.tif", "w", driver="GTiff", count=3, height=9, width=9, dtype="uint8", crs=UTM,
            transform=GRID @ GRID.translation(90_000, 0),
        ) as file:  # fmt: skip
            file.write(np.arange(243, dtype=np.uint8).reshape(3, 9, 9))
    arguments, said = {
        "image": ([str(maps / "rgb.tif")], "a colour image"),
        "no crs": ([str(tmp_path / "a.tif")], "coordinate reference system"),
        "nothing": ([str(tmp_path / "none.tif")], "none.tif"),
        "three": ([first] * 3, "one or two"),
        "far": ([first, "--imagery", str(tmp_path / "far.tif")], "does not lie under the map"),
    }[what]
    done = _serve(*arguments)
    assert done.returncode == 2 and said in done.stderr and len(done.stderr.splitlines()) == 1, done.stderr


def test_a_missing_extra_is_named_with_its_command(maps: Path, tmp_path: Path) -> None:
    (tmp_path / "starlette.py").write_text("raise ImportError")
    path = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    done = _serve(str(maps / "first.tif"), env=os.environ | {"PYTHONPATH": path})
    assert done.returncode == 2 and "pip install 'canopy-height[serve]'" in done.stderr


def _serve(*arguments: str, env: Mapping[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "canopy", "serve", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, check=False, env=env)
