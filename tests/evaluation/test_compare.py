"""Two maps of one place: the arithmetic of change, against NumPy; grids that differ; what is written."""

from __future__ import annotations

import csv

import geopandas
import numpy as np
import pytest
import rasterio
import shapely
from scipy import ndimage

from canopy.errors import InputError
from canopy.evaluation.change import rules
from canopy.evaluation.change.rules import MapError, choose_error, classify, difference_interval, z_of
from canopy.evaluation.compare import compare as compare_with_report
from canopy.geo.area import AOI

WEST, NORTH, UTM = 500_000.0, 4_882_000.0, "EPSG:32618"
BANDS = MapError(None, 0.9, 0.0, "")


def compare(a, b, out=None, **options):
    """Without the page, whose figures take most of the time."""
    return compare_with_report(a, b, out, report=False, **options)


# ---- the arithmetic of change ---------------------------------------------------------------------
def of(*layers):
    """Heights, or heights with the ends of their interval."""
    return np.array(layers, float).reshape(len(layers), 1, -1)


def sigma(metres, step_m=0.0):
    return MapError(metres, None, step_m, "")


def test_sigmas_and_rounding_add_in_quadrature():
    change_m, lower, upper = difference_interval(of([10, 0]), of([13, 0.5]), (sigma(3), sigma(4)), 2.0)[:, 0]
    np.testing.assert_allclose(change_m, [3, 0.5])
    np.testing.assert_allclose([upper - change_m, change_m - lower], 10)
    whole = sigma(1e-9, step_m=1.0)  # two maps that are exact but for rounding to whole metres
    change_m, lower, _ = difference_interval(of([5]), of([6]), (whole, whole), 1.0)[:, 0, 0]
    assert change_m - lower == pytest.approx(np.sqrt(2 / 12))


def test_interval_bands_of_normal_errors_give_the_same_as_their_sigma():
    z90 = z_of(0.9)
    a, b = of(12, 12 - z90 * 2, 12 + z90 * 2), of(20, 20 - z90 * 1.5, 20 + z90 * 1.5)
    for z in (z_of(0.8), z_of(0.95)):
        by_bands = difference_interval(a, b, (BANDS, BANDS), z)
        np.testing.assert_allclose(by_bands, difference_interval(a, b, (sigma(2), sigma(1.5)), z), rtol=1e-12)


def test_asymmetric_bounds_use_the_ends_that_matter():
    """A gain is limited by how low B and how high A may be, a loss by the others."""
    found = difference_interval(of(10, 2, 11), of(14, 13, 30), (BANDS, BANDS), z_of(0.9))[:, 0, 0]
    np.testing.assert_allclose(found, [4, 4 - np.sqrt(2), 4 + np.sqrt(16**2 + 8**2)])


def test_the_rule_errs_at_its_nominal_rate():
    """No change at all, normal errors of the stated size: 5 % are called changed."""
    rng = np.random.default_rng(0)
    truth = rng.uniform(5, 25, (1, 400, 400))
    a, b = truth + rng.normal(0, 2, truth.shape), truth + rng.normal(0, 3, truth.shape)
    _, lower, upper = difference_interval(a, b, (sigma(2), sigma(3)), z_of(0.95))
    assert np.mean((lower > 0) | (upper < 0)) == pytest.approx(0.05, abs=0.003)


def test_classes_and_whose_error_counts():
    a = np.array([[10.0, 1.0, 10.0, 10.0, 1.0, 1.0]])
    b = np.array([[20.0, 9.0, 5.0, 1.0, 1.8, 2.5]])
    half = np.array([[3.0, 3.0, 3.0, 3.0, 0.5, 3.0]])
    codes = classify(a, b, b - a - half > 0, b - a + half < 0, 2.0)
    names = [rules.CHANGE_CLASSES[code] for code in codes[0]]
    assert names == [
        "taller", "canopy gained", "lower", "canopy lost", "taller", "no significant change"
    ]  # fmt: skip
    assert choose_error("a", 2.5, 0.9, 0.0).sigma_m == 2.5
    assert choose_error("a", None, 0.9, 0.0).level == 0.9
    assert choose_error("b", None, None, 1.0).source.startswith("ASSUMED")


# ---- maps -----------------------------------------------------------------------------------------
@pytest.fixture
def pair(write_map, forest):
    """Two maps on one grid, holes in different places: path a, path b, heights a, heights b, both valid."""
    a = forest(300, 1)
    b = np.maximum(a + np.random.default_rng(5).normal(0.5, 2, a.shape), 0).astype(np.float32)
    b[50:110, 60:140] = 0.2
    a[:20, :30], b[200:210] = np.nan, np.nan
    return write_map("a.tif", a), write_map("b.tif", b), a, b, np.isfinite(a) & np.isfinite(b)


def test_numbers_equal_numpy(pair, tmp_path):
    path_a, path_b, a, b, valid = pair
    found = compare(path_a, path_b, tmp_path / "out", block_m=50).to_dict()
    x, y = a[valid].astype(float), b[valid].astype(float)
    d = y - x
    expected = {
        "n": d.size, "mean_a_m": x.mean(), "mean_b_m": y.mean(), "mean_difference_m": d.mean(),
        "mean_absolute_difference_m": np.abs(d).mean(), "rms_difference_m": np.sqrt((d**2).mean()),
        "r": np.corrcoef(x, y)[0, 1], "within_1m": (np.abs(d) <= 1).mean(),
        "within_2m": (np.abs(d) <= 2).mean(), "within_5m": (np.abs(d) <= 5).mean(),
    }  # fmt: skip
    for name, value in expected.items():
        assert found["overall"][name] == pytest.approx(value, rel=1e-9), name
    for q in (5, 50, 95):
        assert found["overall"][f"p{q:02d}_difference_m"] == pytest.approx(np.percentile(d, q), abs=0.03)
    # UTM near its central meridian: a pixel is 1 / 0.9996 squared of its nominal square metre
    assert found["overall"]["area_ha"] == pytest.approx(d.size / 0.9996**2 / 1e4, rel=1e-5)
    row = next(row for row in found["cover"] if row["above_m"] == 5)
    x, y = x > 5, y > 5
    assert row["iou"] == pytest.approx((x & y).sum() / (x | y).sum(), rel=1e-9)
    assert row["agree"] == pytest.approx((x == y).mean(), rel=1e-9)
    assert row["only_a_ha"] / row["both_ha"] == pytest.approx((x & ~y).sum() / (x & y).sum(), rel=1e-9)
    with rasterio.open(tmp_path / "out" / "cover.tif") as dataset:
        codes = dataset.read(1)
    np.testing.assert_array_equal(codes[valid], 1 + (a[valid] > 2) + 2 * (b[valid] > 2))
    assert (codes[~valid] == 255).all()
    with (tmp_path / "out" / "blocks.csv").open() as file:
        blocks = list(csv.DictReader(file))
    assert len(blocks) == 36 and sum(int(r["n"]) for r in blocks) == valid.sum()
    row = next(r for r in blocks if (float(r["west"]), float(r["north"])) == (WEST + 100, NORTH - 50))
    here = np.s_[50:100, 100:150]
    assert float(row["mean_difference_m"]) == pytest.approx((b - a)[here][valid[here]].mean(), rel=1e-6)


def test_windows_do_not_change_the_result(pair, tmp_path, monkeypatch):
    whole = compare(pair[0], pair[1], tmp_path / "whole")
    monkeypatch.setattr("canopy.evaluation.compare.TILE_PX", 64)
    parts = compare(pair[0], pair[1], tmp_path / "parts")
    one, two = whole.to_dict()["overall"], parts.to_dict()["overall"]
    assert one.keys() == two.keys() and all(one[k] == pytest.approx(two[k], rel=1e-12) for k in one)
    for name in ("difference.tif", "cover.tif"):
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "parts" / name).read_bytes()
    np.testing.assert_allclose(whole.blocks.sums["a"], parts.blocks.sums["a"], rtol=1e-12)


def test_rotated_map_is_compared_upright(write_map):
    turned = rasterio.Affine.rotation(-20) @ rasterio.Affine.scale(1, -1)
    turn = rasterio.Affine.translation(WEST + 30, NORTH - 10) @ turned
    tilted = write_map("tilted.tif", np.full((80, 80), 12, np.float32), transform=turn)
    found = compare(write_map("flat.tif", np.full((200, 200), 10, np.float32)), tilted).to_dict()
    assert found["overall"]["mean_difference_m"] == pytest.approx(2, abs=1e-4)
    assert found["overall"]["n"] == pytest.approx(6400, rel=0.05)


def test_dates_find_the_clearing_in_files_and_arrays(pair, tmp_path):
    """Without a folder nothing is written and the maps come as DataArrays: the same as the files."""
    import rioxarray

    path_a, path_b, a, b, valid = pair
    options = {"mode": "dates", "sigma_a": 1.5, "sigma_b": 1.5}
    found = compare(path_a, path_b, tmp_path / "out", **options)
    with rasterio.open(tmp_path / "out" / "classes.tif") as dataset:
        codes = dataset.read(1)
    z = 1.959963984540054
    expected = valid & (a > 2) & (b <= 2) & (a - b > z * np.hypot(1.5, 1.5))
    np.testing.assert_array_equal(codes == 5, expected)
    assert found.classes_ha["canopy lost"] == pytest.approx(expected.sum() / 0.9996**2 / 1e4, rel=1e-5)
    assert sum(found.classes_ha.values()) == pytest.approx(found.to_dict()["overall"]["area_ha"])
    with rasterio.open(tmp_path / "out" / "change.tif") as dataset:
        assert dataset.descriptions == ("change", "change_lower", "change_upper")
        change_m, lower, upper = dataset.read()
        crs, transform = dataset.crs, dataset.transform
    np.testing.assert_allclose((upper - lower)[valid], 2 * z * np.hypot(1.5, 1.5), rtol=1e-5)
    np.testing.assert_allclose(change_m[valid], (b - a)[valid], atol=1e-5)
    there = set(tmp_path.iterdir())
    maps = compare(*(rioxarray.open_rasterio(p, masked=True).squeeze() for p in pair[:2]), **options).maps
    assert set(tmp_path.iterdir()) == there
    assert list(maps["change"].band.values) == ["change", "change_lower", "change_upper"]
    assert maps["classes"].rio.crs == crs and maps["classes"].rio.transform() == transform
    np.testing.assert_allclose(maps["change"], [change_m, lower, upper], atol=1e-6)
    np.testing.assert_array_equal(maps["classes"], np.where(codes == 255, np.nan, codes))


def test_squares_find_a_clearing_that_pixels_cannot(write_map, tmp_path, monkeypatch, area_tags):
    """Bands of 14 m either side round trees of 15 m; whatever both maps have wrong alike cancels."""
    rng = np.random.default_rng(0)
    alike = ndimage.gaussian_filter(rng.normal(0, 1, (2, 260, 300)), (0, 8, 8)) * 16
    early, late = np.maximum(15 + alike, 0).astype(np.float32)
    late[60:160, 100:200] = 0.2

    def banded(name, height, tags):
        half = np.where(height > 1, 14, 0.5).astype(np.float32)
        names = ("canopy_height", "height_lower", "height_upper")
        return write_map(name, np.stack([height, height - half, height + half]), names=names, tags=tags)

    shapes = [shapely.box(WEST + 100, NORTH - 160, WEST + 200, NORTH - 60)]
    shapes.append(shapely.box(WEST + 10, NORTH - 50, WEST + 90, NORTH - 10))
    zones = geopandas.GeoDataFrame({"stand": ["cut", "left"]}, geometry=shapes, crs=UTM)
    pair = [banded(f"{k}.tif", height, area_tags) for k, height in enumerate((early, late))]
    found = compare_with_report(*pair, tmp_path / "out", mode="dates", zones=zones)
    assert "1 of 2 polygons have changed" in (tmp_path / "out" / "report.html").read_text()
    codes = rasterio.open(tmp_path / "out" / "classes.tif").read(1)
    cut = np.zeros(codes.shape, bool)
    cut[60:160, 100:200] = True
    assert (codes[cut] == rules.CANOPY_LOSS).mean() > 0.95 and (codes[~cut] > 1).mean() < 0.01
    assert (
        found.rule["undetectable_canopy_share"] < 0.1 and "squares of 32, 64, 100 m" in found.rule["error_a"]
    )
    monkeypatch.setattr("canopy.evaluation.compare.TILE_PX", 64)
    compare(*pair, tmp_path / "parts", mode="dates")
    np.testing.assert_array_equal(rasterio.open(tmp_path / "parts" / "classes.tif").read(1), codes)
    table = geopandas.read_file(tmp_path / "out" / "zones.gpkg")
    assert list(table.stand) == ["cut", "left", "total"] and list(table.significant[:2]) == [True, False]
    row = table.iloc[0]
    assert row.change_m == pytest.approx((late - early)[cut].mean(), rel=1e-5)
    assert row.cover_b == 0 and row.canopy_lost_ha == pytest.approx(1 / 0.9996**2, rel=1e-3)
    side = np.arange(100.0)  # rho over all pairs of the square's pixels; the plateau cancels
    steps, weight = np.meshgrid(side, side), np.outer(100 - side, 100 - side) * 4.0
    weight[0] /= 2
    weight[:, 0] /= 2
    rho = 0.3 * np.average(np.exp(-np.hypot(*steps) / 20), weights=weight)
    reach = 1.96 * np.hypot(np.hypot(14 * rho**0.5, 0.3), np.hypot(0.5 * rho**0.5, 0.3))
    assert row.change_upper_m - row.change_m == pytest.approx(reach, rel=0.03)
    # Without what the tags say, no pixel can be told; of another model, the plateau stays.
    plain = [banded(f"p{k}.tif", height, {}) for k, height in enumerate((early, late))]
    bare = compare(*plain, mode="dates", zones=zones)
    assert bare.classes_ha["canopy lost"] < 0.1 and np.isnan(bare.zones.change_upper_m[0])
    assert any("no intervals of the zones" in note for note in bare.notes)
    pair[1] = banded("1.tif", late, area_tags | {"CANOPY_MODEL_SHA256": "b" * 64})
    wider = compare(*pair, mode="dates", zones=zones).zones
    assert wider.change_upper_m[0] - wider.change_m[0] > 2 * reach


def test_auto_tells_dates_from_products(write_map, forest, tmp_path):
    def one(name, day, model):
        return write_map(name, forest(60), tags={"CANOPY_DATES": day, "CANOPY_MODEL_SHA256": model})

    early, late = one("early.tif", "2018-06-01", "m"), one("late.tif", "2021-06-01/2021-08-01", "m")
    assert compare(early, late).mode == "dates"
    assert compare(early, one("other.tif", "2021-06-01", "another")).mode == "products"
    with pytest.raises(InputError, match="earlier map first"):
        compare(late, early)


def test_assumptions_and_undeclared_nodata_are_said(write_map, tmp_path):
    """A strip of -9999 in the later map is unknown ground, not lost canopy."""
    early = np.full((60, 60), 20, np.float32)
    late = early.copy()
    late[:, 20:30] = -9999
    names = ("canopy_height", "height_lower", "height_upper")
    sure = write_map("a.tif", np.stack([early, early - 0.5, early + 0.5]), names=names)
    later = write_map("b.tif", late, nodata=None)
    found = compare_with_report(sure, later, tmp_path / "out", mode="dates")
    assert found.classes_ha["canopy lost"] == 0 and found.sums.n == 60 * 50
    assert any("17 % of its pixels have impossible heights (such as -9999 m)" in note for note in found.notes)
    rule = found.to_dict()["change"]["rule"]
    assert "interval bands" in rule["error_a"] and "ASSUMED" in rule["error_b"]
    assert any("ASSUMED" in note for note in found.notes)
    assert "ASSUMED" in (tmp_path / "out" / "report.html").read_text()


def test_an_area_limits_the_comparison(pair):
    circle = AOI(shapely.Point(WEST + 150, NORTH - 150).buffer(40), UTM)
    found = compare(pair[0], pair[1], area=circle).to_dict()
    assert found["overall"]["n"] == pytest.approx(np.pi * 40**2, rel=0.02)
    with pytest.raises(InputError, match="outside the maps"):
        compare(pair[0], pair[1], area=AOI.from_bbox("10,10", 500))


def test_bad_input_writes_nothing(pair, write_map, forest, tmp_path):
    far = write_map("far.tif", forest(30), crs="EPSG:32633")
    blank = write_map("blank.tif", np.full((300, 300), np.nan, np.float32))
    out = tmp_path / "out"
    for other, options, words in (
        (far, {}, "do not overlap"),
        (blank, {}, "no pixel is valid in both"),
        (pair[1], {"mode": "both"}, "--as"),
        (pair[1], {"confidence": 95}, "--confidence"),
        (pair[1], {"mode": "dates", "sigma_a": -3}, "--sigma-a"),
        (pair[1], {"gsd": 0}, "--gsd"),
        (pair[1], {"sigmaa": 3}, "did you mean 'sigma_a'"),
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
