"""Two maps of one place: numbers against NumPy, any pair of grids, dates, memory, faults."""

from __future__ import annotations

import csv
import json
from html.parser import HTMLParser

import numpy as np
import pytest
import rasterio
from pyproj import Geod, Transformer

from canopy.errors import InputError
from canopy.evaluation.compare import compare as compare_with_report
from canopy.evaluation.report.pages import comparison_page
from canopy.geo.area import AOI
from canopy.geo.reading import open_raster, read_window

FILES = {"compare.json", "summary.csv", "cover.csv", "by_height.csv", "blocks.csv", "report.html"}


def compare(a, b, out=None, **options):
    """Without the page, whose figures take most of the time."""
    return compare_with_report(a, b, out, report=False, **options)


@pytest.fixture
def pair(write_map, forest):
    """Two maps on one grid with holes in different places; (path a, path b, heights a, heights b, both
    valid).
    """
    a = forest(300, 1)
    b = np.maximum(a + np.random.default_rng(5).normal(0.5, 2, a.shape), 0).astype(np.float32)
    b[50:110, 60:140] = 0.2
    a[:20, :30], b[200:210] = np.nan, np.nan
    return write_map("a.tif", a), write_map("b.tif", b), a, b, np.isfinite(a) & np.isfinite(b)


def test_numbers_equal_numpy(pair, tmp_path):
    path_a, path_b, a, b, valid = pair
    overall = compare(path_a, path_b, tmp_path / "out").to_dict()["overall"]
    x, y = a[valid].astype(float), b[valid].astype(float)
    d = y - x
    expected = {
        "n": d.size,
        "mean_a_m": x.mean(), "mean_b_m": y.mean(), "mean_difference_m": d.mean(),
        "mean_absolute_difference_m": np.abs(d).mean(), "rms_difference_m": np.sqrt((d**2).mean()),
        "r": np.corrcoef(x, y)[0, 1],
        "within_1m": (np.abs(d) <= 1).mean(),
        "within_2m": (np.abs(d) <= 2).mean(), "within_5m": (np.abs(d) <= 5).mean(),
    }  # fmt: skip
    for name, value in expected.items():
        assert overall[name] == pytest.approx(value, rel=1e-9), name
    for q in (5, 50, 95):
        assert overall[f"p{q:02d}_difference_m"] == pytest.approx(np.percentile(d, q), abs=0.03)
    # UTM near its central meridian: a pixel is 1 / 0.9996 squared of its nominal square metre
    assert overall["area_ha"] == pytest.approx(d.size / 0.9996**2 / 1e4, rel=1e-5)


def test_cover_blocks_and_classes(pair, tmp_path):
    path_a, path_b, a, b, valid = pair
    found = compare(path_a, path_b, tmp_path / "out", block_m=50).to_dict()
    x, y = a[valid] > 5, b[valid] > 5
    row = next(row for row in found["cover"] if row["above_m"] == 5)
    assert row["iou"] == pytest.approx((x & y).sum() / (x | y).sum(), rel=1e-9)
    assert row["agree"] == pytest.approx((x == y).mean(), rel=1e-9)
    assert row["only_a_ha"] / row["both_ha"] == pytest.approx((x & ~y).sum() / (x & y).sum(), rel=1e-9)
    with rasterio.open(tmp_path / "out" / "cover.tif") as dataset:
        codes = dataset.read(1)
    np.testing.assert_array_equal(codes[valid], 1 + (a[valid] > 2) + 2 * (b[valid] > 2))
    assert (codes[~valid] == 255).all()
    with rasterio.open(tmp_path / "out" / "difference.tif") as dataset:
        difference = dataset.read(1)
    np.testing.assert_array_equal(difference[valid], (b - a)[valid])
    assert np.isnan(difference[~valid]).all()
    with (tmp_path / "out" / "blocks.csv").open() as file:
        blocks = list(csv.DictReader(file))
    assert len(blocks) == 36 and sum(int(r["n"]) for r in blocks) == valid.sum()
    worst = min(blocks, key=lambda r: float(r["mean_difference_m"]))
    here = np.s_[50:100, 50:100] if float(worst["west"]) < 500_100 else np.s_[50:100, 100:150]
    assert float(worst["mean_difference_m"]) == pytest.approx((b - a)[here][valid[here]].mean(), rel=1e-6)


def test_a_map_against_itself_agrees(pair, tmp_path):
    found = compare(pair[0], pair[0], tmp_path / "out").to_dict()
    assert found["overall"]["rms_difference_m"] == 0 and found["overall"]["r"] == pytest.approx(1)
    assert all(row["agree"] == pytest.approx(1) and row["iou"] == 1 for row in found["cover"])


def test_finer_map_in_another_crs_meets_on_the_coarser_pixels(write_map, forest, tmp_path):
    """0.5 m UTM against 2 m Web Mercator made from it: no manual step, no false difference."""
    fine = np.kron(forest(150, 2), np.ones((2, 2), np.float32))
    path = write_map("fine.tif", fine, gsd=0.5)
    to_mercator = Transformer.from_crs("EPSG:32618", "EPSG:3857", always_xy=True)
    west, north = to_mercator.transform(500_010.0, 4_881_990.0)
    from canopy.geo.grid import Grid

    grid = Grid.of("EPSG:3857", (2.8, 0, west, 0, -2.8, north), (60, 60))
    with open_raster(path) as dataset:
        values, valid = read_window(dataset, grid, [1])
    assert valid.all()
    other = write_map("mercator.tif", values[0], crs="EPSG:3857", transform=grid.transform)
    found = compare(path, other, tmp_path / "out").to_dict()
    assert found["grid"]["crs"] == "EPSG:3857" and (
        found["grid"]["width_px"],
        found["grid"]["height_px"],
    ) == (60, 60)
    assert found["overall"]["rms_difference_m"] < 1e-4
    corners = Transformer.from_crs("EPSG:3857", "EPSG:4326", always_xy=True).transform(
        [west, west + 168, west + 168, west], [north, north, north - 168, north - 168]
    )
    area, _ = Geod(ellps="WGS84").polygon_area_perimeter(*corners)
    assert found["overall"]["area_ha"] == pytest.approx(abs(area) / 1e4, rel=1e-3)
    again = compare(path, other, tmp_path / "utm", gsd=3.0).to_dict()
    assert again["grid"]["crs"] == "EPSG:32618" and again["grid"]["gsd_m"] == pytest.approx(3, rel=1e-3)


def test_rotated_map_is_compared_upright(write_map, forest, tmp_path):
    heights = np.full((80, 80), 12, np.float32)
    turn = (
        rasterio.Affine.translation(500_030, 4_881_990)
        * rasterio.Affine.rotation(-20)
        * rasterio.Affine.scale(1, -1)
    )
    tilted = write_map("tilted.tif", heights, transform=turn)
    flat = write_map("flat.tif", np.full((200, 200), 10, np.float32))
    found = compare(flat, tilted, tmp_path / "out").to_dict()
    assert found["overall"]["mean_difference_m"] == pytest.approx(2, abs=1e-4)
    assert found["overall"]["n"] == pytest.approx(6400, rel=0.05)


def test_dates_find_the_clearing(pair, write_map, tmp_path):
    path_a, path_b, a, b, valid = pair
    found = compare(path_a, path_b, tmp_path / "out", mode="dates", sigma_a=1.5, sigma_b=1.5)
    lost = np.zeros_like(valid)
    lost[50:110, 60:140] = True
    z = 1.959963984540054
    expected = valid & (a > 2) & (b <= 2) & (a - b > z * np.hypot(1.5, 1.5))
    with rasterio.open(tmp_path / "out" / "classes.tif") as dataset:
        codes = dataset.read(1)
    np.testing.assert_array_equal(codes == 5, expected)
    assert (codes == 5)[lost & valid & (a > 6)].all()
    assert found.classes_ha["canopy lost"] == pytest.approx(expected.sum() / 0.9996**2 / 1e4, rel=1e-5)
    assert sum(found.classes_ha.values()) == pytest.approx(found.sums.overall()["area_ha"])
    with rasterio.open(tmp_path / "out" / "change.tif") as dataset:
        assert dataset.descriptions == ("change", "change_lower", "change_upper")
        change, lower, upper = dataset.read()
    np.testing.assert_allclose((upper - lower)[valid], 2 * z * np.hypot(1.5, 1.5), rtol=1e-5)
    np.testing.assert_allclose(change[valid], (b - a)[valid], atol=1e-5)


def test_interval_bands_are_used_and_assumptions_said(write_map, forest, tmp_path):
    heights = forest(80)
    names = ("canopy_height", "height_lower", "height_upper")
    sure = write_map("sure.tif", np.stack([heights, heights - 0.5, heights + 0.5]), names=names)
    later = write_map("later.tif", heights + 3)
    result = compare(sure, later, tmp_path / "out", mode="dates")
    found = result.to_dict()
    assert "interval bands" in found["change"]["rule"]["error_a"]
    assert "ASSUMED" in found["change"]["rule"]["error_b"]
    assert any("ASSUMED" in note for note in found["notes"])
    assert "ASSUMED" in comparison_page(result, result.block_table())


def test_auto_tells_dates_from_products(write_map, forest, tmp_path):
    def one(name, day, model):
        return write_map(name, forest(60), tags={"CANOPY_DATES": day, "CANOPY_MODEL_SHA256": model})

    early, late = one("early.tif", "2018-06-01", "m"), one("late.tif", "2021-06-01/2021-08-01", "m")
    other = one("other.tif", "2021-06-01", "another")
    assert compare(early, late, tmp_path / "1").mode == "dates"
    assert compare(early, other, tmp_path / "2").mode == "products"
    with pytest.raises(InputError, match="earlier map first"):
        compare(late, early, tmp_path / "3")
    assert not (tmp_path / "3").exists()


def test_windows_do_not_change_the_result(pair, tmp_path, monkeypatch):
    whole = compare(pair[0], pair[1], tmp_path / "whole")
    monkeypatch.setattr("canopy.evaluation.compare.TILE_PX", 64)
    parts = compare(pair[0], pair[1], tmp_path / "parts")
    one, two = whole.to_dict()["overall"], parts.to_dict()["overall"]
    assert one.keys() == two.keys() and all(one[k] == pytest.approx(two[k], rel=1e-12) for k in one)
    for name in ("difference.tif", "cover.tif"):
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "parts" / name).read_bytes()
    np.testing.assert_allclose(whole.blocks.sums["a"], parts.blocks.sums["a"], rtol=1e-12)


def test_an_area_limits_the_comparison(pair, tmp_path):
    import shapely

    circle = AOI(shapely.Point(500_150, 4_881_850).buffer(40), "EPSG:32618")
    found = compare(pair[0], pair[1], tmp_path / "out", area=circle).to_dict()
    assert found["overall"]["n"] == pytest.approx(np.pi * 40**2, rel=0.02)
    with pytest.raises(InputError, match="outside the maps"):
        compare(pair[0], pair[1], tmp_path / "no", area=AOI.from_bbox("10,10", 500))


class _Tags(HTMLParser):
    """Every tag closed in order, and every address that a page refers to."""

    def __init__(self):
        super().__init__()
        self.stack, self.links = [], []

    def handle_starttag(self, tag, attrs):
        self.links += [value for key, value in attrs if key in ("src", "href")]
        if tag not in ("meta", "img"):
            self.stack.append(tag)

    def handle_endtag(self, tag):
        assert self.stack.pop() == tag


def test_everything_is_written_and_the_page_is_self_contained(pair, tmp_path):
    compare_with_report(pair[0], pair[1], tmp_path / "out")
    assert {p.name for p in (tmp_path / "out").iterdir()} == FILES | {"difference.tif", "cover.tif"}
    json.loads((tmp_path / "out" / "compare.json").read_text())
    page = (tmp_path / "out" / "report.html").read_text()
    parser = _Tags()
    parser.feed(page)
    assert parser.stack == [] and len(parser.links) == 5
    assert all(link.startswith("data:image/png;base64,") for link in parser.links)
    assert "http" not in page.replace("http-equiv", "") and str(tmp_path) not in page


def test_bad_input_writes_nothing(pair, write_map, forest, tmp_path):
    far = write_map("far.tif", forest(30), crs="EPSG:32633")
    blank = write_map("blank.tif", np.full((300, 300), np.nan, np.float32))
    out = tmp_path / "out"
    for other, options, words in (
        (far, {}, "do not overlap"),
        (blank, {}, "no pixel is valid in both"),
        (pair[1], {"mode": "both"}, "--as"),
        (pair[1], {"confidence": 2}, "--confidence"),
        (pair[1], {"mode": "dates", "sigma_a": -3}, "--sigma-a"),
        (pair[1], {"gsd": 0}, "--gsd"),
    ):
        with pytest.raises(InputError, match=words):
            compare(pair[0], other, out, **options)
    assert not out.exists() and not list(tmp_path.glob(".*partial*"))
    out.mkdir()
    (out / "mine.txt").write_text("keep")
    with pytest.raises(InputError, match="not empty"):
        compare(pair[0], pair[1], out)
    compare(pair[0], pair[1], out, overwrite=True)
    assert (out / "mine.txt").read_text() == "keep" and (out / "difference.tif").exists()


def test_published_tiles_against_a_utm_map(write_map, tmp_path):
    """A zoom-10 tile of whole metres beside a 1 m UTM map of the same plateau: read as it is, step noted."""
    from canopy.geo.grid import HALF_WORLD_M, quadkey_at, quadkey_bounds

    x, y = Transformer.from_crs("EPSG:4326", "EPSG:3857", always_xy=True).transform(-75.0, 44.09)
    side = 2 * HALF_WORLD_M / 2**10
    quadkey = quadkey_at(int((HALF_WORLD_M - y) / side), int((x + HALF_WORLD_M) / side), 10)
    west, _, east, north = quadkey_bounds(quadkey)
    size = (east - west) / 32768
    tile = tmp_path / "v2" / "chm" / f"{quadkey}.tif"
    tile.parent.mkdir(parents=True)
    with rasterio.open(
        tile, "w", driver="GTiff", count=1, dtype="uint8", width=32768, height=32768,
        crs="EPSG:3857", nodata=255,
        transform=rasterio.Affine(size, 0, west, 0, -size, north), tiled=True,
        sparse_ok=True, compress="deflate",
    ) as dataset:  # fmt: skip
        row, col = int((north - y) / size) - 200, int((x - west) / size) - 50
        dataset.write(
            np.full((1, 400, 400), 15, np.uint8), window=rasterio.windows.Window(col, row, 400, 400)
        )
    ours = write_map("ours.tif", np.full((200, 200), 12.5, np.float32))
    found = compare(ours, tmp_path / "v2", tmp_path / "out").to_dict()
    assert found["b"]["kind"] == "published v2"
    assert found["overall"]["mean_difference_m"] == pytest.approx(2.5)
    assert found["overall"]["area_ha"] == pytest.approx(4, rel=0.02)
    # a Web-Mercator pixel is 1.19433 m x cos(latitude) on the ground
    assert found["b"]["gsd_m"] == pytest.approx(1.19433 * np.cos(np.radians(44)), rel=0.02)
    assert found["grid"]["gsd_m"] == pytest.approx(1.0, rel=0.2)


def test_arrays_in_and_arrays_out(pair, tmp_path):
    """Without a folder nothing is written and the maps come as DataArrays: the same as the files."""
    import rioxarray

    arrays = [rioxarray.open_rasterio(path, masked=True).squeeze() for path in pair[:2]]
    there = set(tmp_path.iterdir())
    found = compare(*arrays, mode="dates", sigma_a=1.5, sigma_b=1.5)
    assert set(tmp_path.iterdir()) == there
    compare(*pair[:2], tmp_path / "out", mode="dates", sigma_a=1.5, sigma_b=1.5)
    for name in ("change", "classes"):
        with rasterio.open(tmp_path / "out" / f"{name}.tif") as dataset:
            wanted = dataset.read(masked=True).astype(float).filled(np.nan)
            made = found.maps[name]
            assert made.rio.crs == dataset.crs and made.rio.transform() == dataset.transform
        np.testing.assert_allclose(np.asarray(made).reshape(wanted.shape), wanted, atol=1e-6)
    assert list(found.maps["change"].band.values) == ["change", "change_lower", "change_upper"]
    with pytest.raises(InputError, match="did you mean 'sigma_a'"):
        compare(*pair[:2], sigmaa=3)


def test_an_undeclared_nodata_value_is_no_loss(write_map, tmp_path):
    """A strip of -9999 in the later map is unknown ground, not lost canopy."""
    early = np.full((60, 60), 20, np.float32)
    late = early.copy()
    late[:, 20:30] = -9999
    found = compare(
        write_map("a.tif", early), write_map("b.tif", late, nodata=None), mode="dates", sigma_a=1, sigma_b=1
    )
    assert found.classes_ha["canopy lost"] == 0 and found.sums.n == 60 * 50
    assert any("impossible heights (such as -9999 m)" in note for note in found.notes)
